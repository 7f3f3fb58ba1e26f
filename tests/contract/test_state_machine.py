"""Random sequences of calls, against a server and a model of it at once: what they answer must agree.

The model is written from what containerd 1.6 was seen to do, and knows nothing of the fake. Every server is driven by the
same rules, the real one with fewer of them because each of its tasks takes a shim.
"""

from __future__ import annotations

import enum
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from libcontainerd._wire.pb.services import containers_pb2, tasks_pb2
from libcontainerd._wire.pb.types import task_pb2
from tests.contract.servers import Server, Services, process_any, process_document, spec_any

CONTAINERS = st.sampled_from(["one", "two"])
EXECS = st.sampled_from(["a", "b"])
SIGKILL = 9
KILLED = 137


class State(enum.Enum):
    """A process's state, by the number that containerd gives it."""

    CREATED = task_pb2.Status.CREATED
    RUNNING = task_pb2.Status.RUNNING
    STOPPED = task_pb2.Status.STOPPED
    PAUSED = task_pb2.Status.PAUSED


@dataclass
class TaskModel:
    """A task, its init's state and its execs'."""

    state: State = State.CREATED
    execs: dict[str, State] = field(default_factory=dict)

    def end(self) -> None:
        """Init has ended, and every exec that ran with it."""
        self.state = State.STOPPED
        self.execs = {
            name: State.STOPPED if state is State.RUNNING else state for name, state in self.execs.items()
        }


OK = "OK"
NOT_FOUND = "NOT_FOUND"
EXISTS = "ALREADY_EXISTS"
UNKNOWN = "UNKNOWN"
PRECONDITION = "FAILED_PRECONDITION"


@dataclass
class Model:
    """What containerd knows: containers, and the tasks that stay behind when a container is deleted."""

    containers: set[str] = field(default_factory=set)
    tasks: dict[str, TaskModel] = field(default_factory=dict)

    def task(self, name: str) -> TaskModel | None:
        """The task that calls reach: only through its container."""
        return self.tasks.get(name) if name in self.containers else None


class Machine(RuleBasedStateMachine):
    """Drives a server and the model."""

    services: Services

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    @initialize()
    def begin(self) -> None:
        """Take a namespace of the run's own."""
        namespace = f"m-{uuid.uuid4().hex[:10]}"
        shared = type(self).services
        self.services = Services(shared.channel, namespace, shared.rootfs, shared.release)

    def teardown(self) -> None:
        self.restore_containers()
        self.services.remove_everything()

    def restore_containers(self) -> None:
        """Bring tasks back into reach whose containers were deleted."""
        for name in self.model.tasks:
            if name not in self.model.containers:
                self.services.make_container(name)

    def agree(self, expected: str, method: Callable[..., object], request: object) -> bool:
        """Make a call, compare its code, and say whether it was answered."""
        try:
            method(request, metadata=self.services.metadata, timeout=60)
        except grpc.RpcError as error:
            code, details = error.code().name, error.details()
        else:
            code, details = OK, ""
        assert code == expected, f"{request!r}: {code}: {details}"
        return code == OK

    # Containers.

    @rule(name=CONTAINERS)
    def create_container(self, name: str) -> None:
        expected = EXISTS if name in self.model.containers else OK
        container = containers_pb2.Container(
            id=name,
            runtime=containers_pb2.Container.Runtime(name="io.containerd.runc.v2"),
            spec=spec_any(self.services.spec()),
        )
        request = containers_pb2.CreateContainerRequest(container=container)
        if self.agree(expected, self.services.containers.Create, request):
            self.model.containers.add(name)

    @rule(name=CONTAINERS)
    def delete_container(self, name: str) -> None:
        expected = OK if name in self.model.containers else NOT_FOUND
        request = containers_pb2.DeleteContainerRequest(id=name)
        if self.agree(expected, self.services.containers.Delete, request):
            self.model.containers.discard(name)

    @precondition(lambda self: len(self.model.tasks) < 2)
    @rule(name=CONTAINERS, exec_id=EXECS)
    def run(self, name: str, exec_id: str) -> None:
        """Come to where most is possible in one step: random single ones seldom do."""
        self.create_container(name)
        self.create_task(name)
        self.start_task(name)
        self.add_exec(name, exec_id)

    # Tasks.

    @rule(name=CONTAINERS)
    def create_task(self, name: str) -> None:
        expected = OK if name in self.model.containers else NOT_FOUND
        if expected == OK and name in self.model.tasks:
            expected = EXISTS
        request = tasks_pb2.CreateTaskRequest(container_id=name)
        if self.agree(expected, self.services.tasks.Create, request):
            self.model.tasks[name] = TaskModel()

    @rule(name=CONTAINERS)
    def start_task(self, name: str) -> None:
        task = self.model.task(name)
        expected = NOT_FOUND if task is None else OK if task.state is State.CREATED else UNKNOWN
        if (
            self.agree(expected, self.services.tasks.Start, tasks_pb2.StartRequest(container_id=name))
            and task
        ):
            task.state = State.RUNNING

    @rule(name=CONTAINERS)
    def pause(self, name: str) -> None:
        task = self.model.task(name)
        expected = NOT_FOUND if task is None else OK if task.state is State.RUNNING else UNKNOWN
        request = tasks_pb2.PauseTaskRequest(container_id=name)
        if self.agree(expected, self.services.tasks.Pause, request) and task:
            task.state = State.PAUSED

    @rule(name=CONTAINERS)
    def resume(self, name: str) -> None:
        task = self.model.task(name)
        expected = NOT_FOUND if task is None else OK if task.state is State.PAUSED else UNKNOWN
        request = tasks_pb2.ResumeTaskRequest(container_id=name)
        if self.agree(expected, self.services.tasks.Resume, request) and task:
            task.state = State.RUNNING

    @rule(name=CONTAINERS)
    def kill(self, name: str) -> None:
        task = self.model.task(name)
        expected = OK if task is not None and task.state is not State.STOPPED else NOT_FOUND
        request = tasks_pb2.KillRequest(container_id=name, signal=SIGKILL)
        if self.agree(expected, self.services.tasks.Kill, request) and task:
            assert self.services.wait(name) == KILLED
            for exec_id, state in task.execs.items():
                if state is State.RUNNING:
                    assert self.services.wait(name, exec_id) == KILLED
            task.end()

    @rule(name=CONTAINERS)
    def delete_task(self, name: str) -> None:
        task = self.model.task(name)
        deletable = task is not None and task.state in (State.CREATED, State.STOPPED)
        expected = NOT_FOUND if task is None else OK if deletable else UNKNOWN
        if self.agree(expected, self.services.tasks.Delete, tasks_pb2.DeleteTaskRequest(container_id=name)):
            del self.model.tasks[name]

    # Execs.

    @rule(name=CONTAINERS, exec_id=EXECS)
    def add_exec(self, name: str, exec_id: str) -> None:
        task = self.model.task(name)
        if task is None:
            expected = NOT_FOUND
        elif exec_id in task.execs:
            expected = EXISTS
        else:
            expected = UNKNOWN if task.state in (State.PAUSED, State.STOPPED) else OK
        request = tasks_pb2.ExecProcessRequest(
            container_id=name, exec_id=exec_id, spec=process_any(process_document())
        )
        if self.agree(expected, self.services.tasks.Exec, request) and task:
            task.execs[exec_id] = State.CREATED

    # What becomes of an exec that is started before its init runs, or after it ended, differs between runtimes.
    @precondition(lambda self: any(task.state is State.RUNNING for task in self.model.tasks.values()))
    @rule(name=CONTAINERS, exec_id=EXECS)
    def start_exec(self, name: str, exec_id: str) -> None:
        task = self.model.task(name)
        state = None if task is None else task.execs.get(exec_id)
        if task is not None and state is State.CREATED and task.state is not State.RUNNING:
            return
        expected = NOT_FOUND if state is None else OK if state is State.CREATED else UNKNOWN
        request = tasks_pb2.StartRequest(container_id=name, exec_id=exec_id)
        if self.agree(expected, self.services.tasks.Start, request) and task:
            task.execs[exec_id] = State.RUNNING

    @rule(name=CONTAINERS, exec_id=EXECS)
    def kill_exec(self, name: str, exec_id: str) -> None:
        task = self.model.task(name)
        state = None if task is None else task.execs.get(exec_id)
        if task is not None and task.state is State.PAUSED:
            return  # a frozen exec takes its signal only when it is thawed
        expected = {State.CREATED: PRECONDITION, State.RUNNING: OK}.get(state or State.STOPPED, NOT_FOUND)
        request = tasks_pb2.KillRequest(container_id=name, exec_id=exec_id, signal=SIGKILL)
        if self.agree(expected, self.services.tasks.Kill, request) and task:
            assert self.services.wait(name, exec_id) == KILLED
            task.execs[exec_id] = State.STOPPED

    @rule(name=CONTAINERS, exec_id=EXECS)
    def delete_exec(self, name: str, exec_id: str) -> None:
        task = self.model.task(name)
        state = None if task is None else task.execs.get(exec_id)
        if task is not None and task.state is State.PAUSED:
            return
        expected = NOT_FOUND if state is None else UNKNOWN if state is State.RUNNING else OK
        request = tasks_pb2.DeleteProcessRequest(container_id=name, exec_id=exec_id)
        if self.agree(expected, self.services.tasks.DeleteProcess, request) and task:
            del task.execs[exec_id]

    # What is told of them.

    @rule(name=CONTAINERS)
    def look(self, name: str) -> None:
        task = self.model.task(name)
        seen = self.services.process(name)
        assert (None if seen is None else State(seen.status)) is (None if task is None else task.state)
        if task is None or task.state is State.PAUSED:
            return
        for exec_id in ("a", "b"):
            process = self.services.process(name, exec_id)
            assert (None if process is None else State(process.status)) is task.execs.get(exec_id)

    @rule()
    def list_everything(self) -> None:
        assert self.services.container_ids() == self.model.containers
        listed = {name: State(process.status) for name, process in self.services.tasks_by_id().items()}
        assert listed == {name: task.state for name, task in self.model.tasks.items()}


def _examples(server: Server) -> int:
    """How many sequences: a real one takes seconds."""
    stressed = os.environ.get("LIBCONTAINERD_STRESS") == "1"
    if server.real:
        return 60 if stressed else 12
    return 600 if stressed else 100 if "scripted" in server.name else 30


@pytest.mark.stress
@pytest.mark.timeout(300)
def test_server_and_model_agree(server: Server, services: Services) -> None:
    class Bound(Machine):
        pass

    Bound.services = services
    run_state_machine_as_test(
        Bound,
        settings=settings(
            max_examples=_examples(server),
            stateful_step_count=25,
            deadline=None,
            database=None,
            derandomize=True,  # what CI sees can be seen again; more examples are other examples
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink) if not server.real else (Phase.generate,),
        ),
    )
