"""What tests of real containers share: a look at containerd past the client, and processes run to their end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grpc

from libcontainerd import Client, ExitStatus, NotFoundError, Remote, cio, oci
from libcontainerd._wire import typeurl
from libcontainerd._wire.connection import NAMESPACE_HEADER
from libcontainerd._wire.pb.services import containers_pb2, tasks_pb2
from libcontainerd._wire.pb.types import task_pb2
from libcontainerd.backends import RecordingBackend
from libcontainerd.types import EventType

_RAW_SECONDS = 60.0


class MakeSpec(Protocol):
    """Makes a spec on the shared root filesystem, with a cgroup of its own and a /tmp to write to."""

    def __call__(self, *args: str, options: Sequence[oci.SpecOption] = ()) -> oci.Spec:
        """Return the spec of a container that runs `args`, changed by `options`."""


class Raw:
    """containerd past the client: plain stubs on a channel of its own, in one namespace."""

    def __init__(self, channel: grpc.Channel, namespace: str) -> None:
        self.metadata = ((NAMESPACE_HEADER, namespace),)
        self.containers = containers_pb2.ContainersStub(channel)
        self.tasks = tasks_pb2.TasksStub(channel)

    def container(self, container_id: str) -> containers_pb2.Container:
        request = containers_pb2.GetContainerRequest(id=container_id)
        return self.containers.Get(request, metadata=self.metadata, timeout=_RAW_SECONDS).container

    def create_container(self, container: containers_pb2.Container) -> None:
        request = containers_pb2.CreateContainerRequest(container=container)
        self.containers.Create(request, metadata=self.metadata, timeout=_RAW_SECONDS)

    def delete_container(self, container_id: str) -> None:
        request = containers_pb2.DeleteContainerRequest(id=container_id)
        self.containers.Delete(request, metadata=self.metadata, timeout=_RAW_SECONDS)

    def container_ids(self) -> set[str]:
        answer = self.containers.List(
            containers_pb2.ListContainersRequest(), metadata=self.metadata, timeout=_RAW_SECONDS
        )
        return {container.id for container in answer.containers}

    def tasks_by_id(self) -> dict[str, task_pb2.Process]:
        answer = self.tasks.List(tasks_pb2.ListTasksRequest(), metadata=self.metadata, timeout=_RAW_SECONDS)
        return {task.id: task for task in answer.tasks}

    def process(self, container_id: str, exec_id: str = "") -> task_pb2.Process | None:
        """A task's init or an exec as containerd sees it; None where it knows of none."""
        request = tasks_pb2.GetRequest(container_id=container_id, exec_id=exec_id)
        try:
            return self.tasks.Get(request, metadata=self.metadata, timeout=_RAW_SECONDS).process
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.NOT_FOUND, error  # noqa: PT017 - anything else is a surprise
            return None

    def kill(self, container_id: str, exec_id: str = "", signal_number: int = signal.SIGKILL) -> None:
        request = tasks_pb2.KillRequest(container_id=container_id, exec_id=exec_id, signal=signal_number)
        self.tasks.Kill(request, metadata=self.metadata, timeout=_RAW_SECONDS)

    def create_task(self, container_id: str) -> None:
        """Make a task without stdio."""
        request = tasks_pb2.CreateTaskRequest(container_id=container_id)
        self.tasks.Create(request, metadata=self.metadata, timeout=_RAW_SECONDS)

    def start_task(self, container_id: str) -> None:
        request = tasks_pb2.StartRequest(container_id=container_id)
        self.tasks.Start(request, metadata=self.metadata, timeout=_RAW_SECONDS)

    def exec(self, container_id: str, exec_id: str, process: oci.Process, stdout: str, stderr: str) -> None:
        """Start an exec with FIFOs of the test's own."""
        request = tasks_pb2.ExecProcessRequest(
            container_id=container_id,
            exec_id=exec_id,
            stdout=stdout,
            stderr=stderr,
            spec=typeurl.pack_json(typeurl.PROCESS_URL, oci.dump(process)),
        )
        self.tasks.Exec(request, metadata=self.metadata, timeout=_RAW_SECONDS)
        start = tasks_pb2.StartRequest(container_id=container_id, exec_id=exec_id)
        self.tasks.Start(start, metadata=self.metadata, timeout=_RAW_SECONDS)

    def delete_exec(self, container_id: str, exec_id: str) -> None:
        request = tasks_pb2.DeleteProcessRequest(container_id=container_id, exec_id=exec_id)
        self.tasks.DeleteProcess(request, metadata=self.metadata, timeout=_RAW_SECONDS)

    def delete_task(self, container_id: str) -> None:
        request = tasks_pb2.DeleteTaskRequest(container_id=container_id)
        self.tasks.Delete(request, metadata=self.metadata, timeout=_RAW_SECONDS)

    def remove_everything(self) -> None:
        """Kill and delete all tasks and containers of the namespace, whoever made them."""
        for container_id in self.tasks_by_id():
            deadline = time.monotonic() + _RAW_SECONDS
            while self.process(container_id) is not None:
                assert time.monotonic() < deadline, f"the task of {container_id!r} cannot be removed"
                with suppress(grpc.RpcError):
                    self.kill(container_id)
                with suppress(grpc.RpcError):  # a frozen process dies only when it is thawed
                    self.tasks.Resume(
                        tasks_pb2.ResumeTaskRequest(container_id=container_id),
                        metadata=self.metadata,
                        timeout=5,
                    )
                with suppress(grpc.RpcError):
                    self.tasks.Wait(
                        tasks_pb2.WaitRequest(container_id=container_id), metadata=self.metadata, timeout=5
                    )
                with suppress(grpc.RpcError):
                    self.delete_task(container_id)
        for container_id in self.container_ids():
            with suppress(grpc.RpcError):
                self.delete_container(container_id)


@dataclass(frozen=True)
class Result:
    """What a process wrote, and how it ended."""

    out: bytes
    err: bytes
    status: ExitStatus


class Collected:
    """An `attach_stdio` that keeps all output, and feeds stdin where there is any."""

    def __init__(self, stdin: cio.Input | None = None) -> None:
        self._out: list[bytes] = []
        self._err: list[bytes] = []
        self._copy = cio.copy(stdin, self._take_out, self._take_err)
        self._changed = threading.Condition()
        self.dio: cio.DirectIO | None = None
        self.io: cio.IO | None = None

    def __call__(self, dio: cio.DirectIO) -> cio.IO:
        self.dio = dio
        self.io = self._copy(dio)
        return self.io

    def _take_out(self, data: bytes) -> None:
        with self._changed:
            self._out.append(data)
            self._changed.notify_all()

    def _take_err(self, data: bytes) -> None:
        with self._changed:
            self._err.append(data)
            self._changed.notify_all()

    @property
    def out(self) -> bytes:
        return b"".join(self._out)

    @property
    def err(self) -> bytes:
        return b"".join(self._err)

    @property
    def stdin(self) -> cio.InputStream:
        assert self.dio is not None
        assert self.dio.stdin is not None
        return self.dio.stdin

    def wait_for(self, text: bytes, timeout: float = 30.0) -> None:
        """Wait until stdout has held `text`."""
        with self._changed:
            came = self._changed.wait_for(lambda: text in self.out, timeout)
        assert came, f"{text!r} did not come, but {self.out[-1000:]!r}"

    def wait(self) -> None:
        """Wait for the end of the output."""
        assert self.io is not None
        self.io.wait()


def run(
    client: Client, container_id: str, spec: oci.Spec | Mapping[str, object], stdin: cio.Input | None = None
) -> Result:
    """Run a container to its end, and remove it."""
    client.create(container_id, spec)
    result = run_task(client, container_id, stdin)
    client.delete(container_id)
    return result


def run_task(client: Client, container_id: str, stdin: cio.Input | None = None) -> Result:
    """Run the task of a container that was created to its end, and delete the task."""
    collected = Collected(stdin)
    client.start(container_id, with_stdin=stdin is not None, attach_stdio=collected)
    ended = client.wait(container_id, timeout=50)
    status = client.delete_task(container_id)
    assert status == ended
    return Result(collected.out, collected.err, status)


def process(*args: str, terminal: bool = False) -> oci.Process:
    """What an exec shall run."""
    return oci.Process(args=list(args), cwd="/", env=["PATH=/bin"], terminal=terminal)


def run_exec(
    client: Client, container_id: str, exec_id: str, *args: str, stdin: cio.Input | None = None
) -> Result:
    """Run an exec to its end, and to the end of its output."""
    collected = Collected(stdin)
    client.exec(container_id, exec_id, process(*args), with_stdin=stdin is not None, attach_stdio=collected)
    status = client.wait(container_id, exec_id, timeout=50)
    collected.wait()
    return Result(collected.out, collected.err, status)


@contextmanager
def running(
    client: Client,
    container_id: str,
    spec: oci.Spec,
    attach_stdio: cio.AttachStdio = cio.null_io,
    *,
    with_stdin: bool = False,
) -> Iterator[int]:
    """Have a container run for the length of a block; gives its pid."""
    client.create(container_id, spec)
    yield client.start(container_id, with_stdin=with_stdin, attach_stdio=attach_stdio)
    stop(client, container_id)


def stop(client: Client, container_id: str) -> ExitStatus:
    """Kill a container's task if it still runs, and remove the container."""
    with suppress(NotFoundError):
        client.signal_process(container_id, "init", signal.SIGKILL)
    client.wait(container_id, timeout=30)
    status = client.delete_task(container_id)
    assert status.error is None, status
    client.delete(container_id)
    return status


def wait_until(true: Callable[[], object], what: str, timeout: float = 30.0) -> None:
    """Wait for a condition that nothing announces."""
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.005)


def bundle_of(raw: Raw, container_id: str) -> Path:
    """The bundle directory, as the container's label tells it."""
    return Path(raw.container(container_id).labels["libcontainerd/bundle.path"])


def wait_exec_gone(client: Client, container_id: str, exec_id: str) -> None:
    """Wait until an ended exec was deleted in containerd and its record dropped."""

    def gone() -> bool:
        try:
            client.close_stdin(container_id, exec_id)
        except NotFoundError:
            return True
        return False

    wait_until(gone, f"exec {exec_id!r} is forgotten")


def exit_of(backend: RecordingBackend, container_id: str, process_id: str = "init") -> int:
    """Wait for a process's exit event, and give the code."""
    return backend.wait_for(EventType.EXIT, container_id, process_id, timeout=60).info.exit_code


def alive(pid: int) -> bool:
    """Whether there is a process of that pid that is more than a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def shims_of(address: str) -> dict[int, str]:
    """The shims that belong to the containerd at an address: pids and command lines."""
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        with suppress(OSError):
            words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
            if b"containerd-shim" in words[0] and address.encode() in words:
                found[int(name)] = b" ".join(words).decode()
    return found


def divert_log(remote: Remote, take: Callable[[str], object]) -> None:
    """Have a containerd that outlives a test log past structlog: else its lines come among those that a test captures."""
    assert remote._supervisor is not None
    log = remote._supervisor._log

    def event(_method: str, name: str, **fields: object) -> None:
        with suppress(Exception):  # it is logged while pytest goes from one test's output to the next one's
            take(str(fields.get("line", f"{name} {fields}")))

    setattr(log, "event", event)  # noqa: B010 - mypy has methods for constants


def kill_shims(address: str) -> None:
    """Kill the shims that a failed test has left, with their containers' processes."""
    for pid in shims_of(address):
        with suppress(OSError):
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for each in (pid, *map(int, children)):
                os.kill(each, signal.SIGKILL)
