"""One task as its shim sees it: init, execs, their states, and what is told about them."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Final

import grpc

from libcontainerd._wire import typeurl
from libcontainerd._wire.pb.events import task_pb2 as task_events
from libcontainerd._wire.pb.runc.options_pb2 import ProcessDetails
from libcontainerd._wire.pb.types import task_pb2
from libcontainerd.testing.processes import (
    EXEC_REFUSES,
    INIT_REFUSES,
    Execution,
    Process,
    ProcessSpec,
    Runtime,
    RuntimeFailure,
    State,
)
from libcontainerd.testing.refusals import (
    Refusal,
    already_exists,
    closing,
    failed_precondition,
    not_found,
    unknown,
)
from libcontainerd.testing.stdio import ShimStdio, StdioError
from libcontainerd.testing.timestamps import stamp

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from libcontainerd._wire.pb.services.tasks_pb2 import CreateTaskRequest, ExecProcessRequest

KILLED: Final = 128 + signal.SIGKILL
_EXECS_END_SECONDS: Final = 5.0
_INVENTORY_FILE: Final = "inventory.img"
_MEMORY_FILE: Final = "pages-1.img"
_STDIO_FILE: Final = "descriptors.json"

Publish = Callable[[str, "Message"], None]
"""Publishes an event on a topic, in the task's namespace."""


class Task:
    """A container's task, and the shim that looks after it.

    Args:
        spec: What init runs.
        request: The request that asks for it.
        runtime: What runs it.
        publish: Where its events go.
        clock: What time it is.
        bundle: The directory that the create event names.
        open_timeout: Seconds that the client may take to open its ends.
        image: The files of the checkpoint that it begins with.
    """

    def __init__(
        self,
        spec: ProcessSpec,
        request: CreateTaskRequest,
        *,
        runtime: Runtime,
        publish: Publish,
        clock: Callable[[], datetime],
        bundle: str,
        open_timeout: float,
        image: Mapping[str, bytes] | None = None,
    ) -> None:
        self._runtime = runtime
        self._publish = publish
        self._clock = clock
        self._open_timeout = open_timeout
        self._bundle = bundle
        self._request = request
        # Guards what follows and every Process. No RPC, runtime or stdio is called under it; waiters wait on it.
        self.changed = threading.Condition(threading.RLock())
        self.dead = False
        self.creating = True
        self.updates: list[Mapping[str, object]] = []
        self.execs: dict[str, Process] = {}
        self.restored = request.HasField("checkpoint")
        self._image = image or {}
        self._checkpoints = 0
        self.init = Process(spec, _stdio_of(spec, request))

    # ------------------------------------------------------------------------------------------------- looking up

    def process(self, exec_id: str) -> Process:
        """Init, or an exec by its id.

        Raises:
            Refusal: there is no such exec, or the shim is dead.
        """
        with self.changed:
            if self.dead:
                raise unknown("ttrpc: closed")
            if not exec_id:
                return self.init
            if exec_id not in self.execs:
                raise not_found(f"process does not exist {exec_id}")
            return self.execs[exec_id]

    def describe(self, exec_id: str) -> task_pb2.Process:
        """What Get answers."""
        with self.changed:
            return self.process(exec_id).message(paused=self.init.state is State.PAUSED)

    def _check(self, process: Process, verb: str) -> None:
        table = INIT_REFUSES if process is self.init else EXEC_REFUSES
        if text := table.get((process.state, verb)):
            raise unknown(text)

    def check(self, verb: str) -> None:
        """Refuse what init's state does not allow.

        Raises:
            Refusal: it does not.
        """
        with self.changed:
            self._check(self.init, verb)

    # --------------------------------------------------------------------------------------------------- beginning

    def create(self) -> int:
        """Have the runtime make init, open its stdio, and announce it.

        Raises:
            Refusal: it cannot be made; nothing is left.
        """
        doing = "failed to create shim task"
        if not self.restored:
            self._make(self.init, doing, "OCI runtime create failed: runc create failed")
            self._open(self.init, f"{doing}: ")
        with self.changed:
            self.creating = False
        request = self._request
        self._publish(
            "/tasks/create",
            task_events.TaskCreate(
                container_id=self.init.id,
                bundle=self._bundle,
                rootfs=request.rootfs,
                io=task_events.TaskIO(
                    stdin=request.stdin,
                    stdout=request.stdout,
                    stderr=request.stderr,
                    terminal=request.terminal,
                ),
                checkpoint=f"{self._bundle}/checkpoint" if self.restored else "",
                pid=self.init.pid,
            ),
        )
        return self.init.pid

    def _make(self, process: Process, doing: str, prefix: str) -> Execution:
        before = f"{doing}: " if doing else ""
        try:
            process.stdio.prepare()
        except StdioError as error:
            raise unknown(f"{before}failed to create init process I/O: {error}") from error
        try:
            execution = self._runtime.create(
                process.spec, process.stdio, lambda status: self._exited(process, status)
            )
        except RuntimeFailure as error:
            raise unknown(f"{before}{prefix}: {error}") from error
        with self.changed:
            process.execution = execution
            if not process.spec.exec_id:
                process.pid = execution.pid
        return execution

    def _open(self, process: Process, doing: str = "") -> None:
        try:
            process.stdio.open(self._open_timeout)
        except StdioError as error:
            if not process.spec.exec_id:
                self._release(process)
            how = (
                "failed to start console copy"
                if process.stdio.terminal
                else "failed to start io pipe copy: unable to copy pipes: containerd-shim"
            )
            text = f"{doing}{how}: {error}"
            if error.late:
                raise Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, text) from error
            raise unknown(text) from error

    def start(self, exec_id: str, stopping: Callable[[], bool]) -> int:
        """Let init or an exec run, announce it, and give its pid; where the server is going away, wait for no reader.

        Raises:
            Refusal: its state does not allow it, or it cannot be run.
        """
        with self.changed:
            process = self.process(exec_id)
            self._check(process, "start")
            if process.starting:
                raise unknown("cannot start a running process")
            if exec_id and self.init.state is State.PAUSED:
                raise unknown(
                    "OCI runtime exec failed: exec failed: cannot exec in a paused container"
                    " (use --ignore-paused to override)"
                )
            process.starting = True  # an exit that comes from now on is told after the start
        if stopping():  # since before that, so that `give_up_opening` may have missed it
            process.stdio.give_up_opening()
        try:
            pid = self._run_exec(process) if exec_id else self._run_init()
        except BaseException:
            with self.changed:
                process.starting = False
                process.failed = True
                self.changed.notify_all()
            raise
        with self.changed:
            process.state = State.RUNNING
            process.pid = pid
        if exec_id:
            self._publish(
                "/tasks/exec-started",
                task_events.TaskExecStarted(container_id=self.init.id, exec_id=exec_id, pid=pid),
            )
        else:
            self._publish("/tasks/start", task_events.TaskStart(container_id=self.init.id, pid=pid))
        with self.changed:
            process.starting = False
            early = process.early_exit
        if early is not None:
            self._exited(process, early)
        return pid

    def _run_init(self) -> int:
        init = self.init
        if self.restored:
            init.spec = replace(init.spec, memory=self._read_image())
            self._make(init, "", "OCI runtime restore failed")
            self._open(init)
        with self.changed:
            execution = init.execution
        if execution is None:
            raise unknown("container not created")
        execution.start()
        return execution.pid

    def _read_image(self) -> Mapping[str, object]:
        failed = "OCI runtime restore failed"
        if _STDIO_FILE not in self._image:
            raise unknown(
                f"{failed}: open {self._bundle}/checkpoint/{_STDIO_FILE}: no such file or directory"
            )
        try:
            inventory, memory = (json.loads(self._image[name]) for name in (_INVENTORY_FILE, _MEMORY_FILE))
        except (KeyError, ValueError):
            inventory, memory = None, None
        if not isinstance(inventory, dict) or not isinstance(memory, dict):
            raise unknown(
                f"{failed}: criu failed: type NOTIFY errno 0\nlog file: {self._bundle}/work/restore.log"
            )
        return memory

    def checkpoint(self) -> dict[str, bytes]:
        """The files of a checkpoint of init, by name.

        Raises:
            Refusal: there is no criu here.
        """
        with self.changed:
            execution = self.init.execution
            self._checkpoints += 1
            number = self._checkpoints
        if execution is None:
            raise unknown("container not created")
        try:
            memory = execution.checkpoint()
        except RuntimeFailure as error:
            raise unknown(
                f"runc did not terminate successfully: exit status 1: {error} path= {self._bundle}/criu-dump.log"
            ) from error
        # No two are the same, as with criu: they hold times.
        inventory = {"container": self.init.id, "pid": self.init.pid, "number": number}
        return {
            _STDIO_FILE: b'["/dev/null","/dev/null","/dev/null"]',
            _INVENTORY_FILE: json.dumps(inventory).encode(),
            _MEMORY_FILE: json.dumps(memory).encode(),
        }

    def _run_exec(self, process: Process) -> int:
        with self.changed:
            if process.failed:
                raise unknown("cannot start an exec whose start has failed")
        execution = self._make(process, "", "OCI runtime exec failed: exec failed")
        execution.start()
        self._open(process)
        return execution.pid

    def add_exec(self, spec: ProcessSpec, request: ExecProcessRequest) -> None:
        """Keep what an exec shall be; nothing runs before it is started.

        Raises:
            Refusal: the id is taken, or init's state does not allow it.
        """
        with self.changed:
            if spec.exec_id in self.execs:
                raise already_exists(f"id {spec.exec_id}")
            self._check(self.init, "exec")
            self.execs[spec.exec_id] = Process(spec, _stdio_of(spec, request))
        self._publish(
            "/tasks/exec-added",
            task_events.TaskExecAdded(container_id=self.init.id, exec_id=spec.exec_id),
        )

    # ------------------------------------------------------------------------------------------------------- ending

    def _exited(self, process: Process, status: int) -> None:
        """A process has ended: end init's execs with it, tell it, and wake those who wait."""
        with self.changed:
            if self.dead or process.state is State.STOPPED:
                return
            if process.starting:
                process.early_exit = status
                return
            process.state = State.STOPPED
            process.exit_status = status
            process.exited_at = self._clock()
            running = [] if process is not self.init else self._running_execs()
        for each in running:
            if each.execution is not None:
                each.execution.signal(signal.SIGKILL)
        with self.changed:
            self.changed.wait_for(lambda: all(each.ended for each in running), _EXECS_END_SECONDS)
        self._publish(
            "/tasks/exit",
            task_events.TaskExit(
                container_id=self.init.id,
                id=process.id,
                pid=process.pid,
                exit_status=status,
                exited_at=stamp(process.exited_at),
            ),
        )
        with self.changed:
            process.ended = True
            self.changed.notify_all()

    def _running_execs(self) -> list[Process]:
        return [each for each in self.execs.values() if each.state is State.RUNNING]

    def wait(self, exec_id: str, context: grpc.ServicerContext, stopping: Callable[[], bool]) -> Process:
        """Wait for a process's end.

        Raises:
            Refusal: there is no such exec, the shim has died, or the server is going away.
        """
        process = self.process(exec_id)

        def wake() -> None:
            with self.changed:
                self.changed.notify_all()

        context.add_callback(wake)
        with self.changed:
            self.changed.wait_for(
                lambda: process.ended or process.failed or self.dead or stopping() or not context.is_active()
            )
            if stopping():
                raise closing()
            if self.dead and not process.ended:
                raise unknown("ttrpc: closed")
        return process

    def kill(self, exec_id: str, number: int, *, everyone: bool) -> None:
        """Send a signal.

        Raises:
            Refusal: the process has ended or was never started, or there is no such signal.
        """
        with self.changed:
            process = self.process(exec_id)
            targets = [process]
            if everyone:
                targets = [self.init, *self._running_execs()]
            elif process.state is State.STOPPED:
                raise not_found("process already finished")
            elif process.execution is None:
                raise failed_precondition("process not created")
            executions = [each.execution for each in targets if each.execution is not None]
        for execution in executions:
            try:
                execution.signal(number)
            except OSError as error:
                raise unknown(
                    "unknown error after kill: runc did not terminate successfully: exit status 1: unable to"
                    f" signal init: {str(error.strerror).lower()}\n"
                ) from error

    def delete(self) -> Process:
        """Undo the task.

        Returns:
            Init as it was: a task that was never started has no exit status.

        Raises:
            Refusal: init's state does not allow it.
        """
        with self.changed:
            if text := INIT_REFUSES.get((self.init.state, "delete")):
                raise unknown(f"failed to delete task: {text}")
            created = self.init.state is State.CREATED
            execution = self.init.execution
        answer = self.init
        if created and execution is not None:
            execution.signal(signal.SIGKILL)
            with self.changed:
                self.changed.wait_for(lambda: self.init.ended, _EXECS_END_SECONDS)
                answer = Process(self.init.spec, self.init.stdio)
                answer.pid = self.init.pid
        if execution is not None:
            execution.drain()
        self.release()
        self._publish(
            "/tasks/delete",
            task_events.TaskDelete(
                container_id=self.init.id,
                pid=self.init.pid,
                exit_status=self.init.exit_status,
                exited_at=stamp(self.init.exited_at),
            ),
        )
        return answer

    def delete_exec(self, exec_id: str) -> Process:
        """Forget an exec that has ended or was never started.

        Raises:
            Refusal: it runs, or there is no such.
        """
        with self.changed:
            process = self.process(exec_id)
            self._check(process, "delete")
        if process.execution is not None:
            process.execution.drain()
        with self.changed:
            self.execs.pop(exec_id, None)
        self._release(process)
        return process

    def give_up_opening(self) -> None:
        """The server goes away: whoever waits for a client's readers shall not hold it up."""
        with self.changed:
            waiting = [each for each in (self.init, *self.execs.values()) if each.starting]
            if self.creating:
                waiting.append(self.init)
            self.changed.notify_all()
        for process in waiting:
            process.stdio.give_up_opening()

    def die(self, *, told: bool) -> None:
        """The shim is killed: so are its processes, and containerd, if it is up, tells of init alone."""
        with self.changed:
            if self.dead:
                return
            self.dead = True
            self.changed.notify_all()
        self.release()
        if not told:
            return
        at = stamp(self._clock())
        init = self.init
        self._publish(
            "/tasks/exit",
            task_events.TaskExit(
                container_id=init.id, id=init.id, pid=init.pid, exit_status=KILLED, exited_at=at
            ),
        )
        self._publish(
            "/tasks/delete",
            task_events.TaskDelete(container_id=init.id, pid=init.pid, exit_status=KILLED, exited_at=at),
        )

    def release(self) -> None:
        """End every process without a report, and give back all that is held."""
        with self.changed:
            self.dead = True
            processes = [self.init, *self.execs.values()]
            self.changed.notify_all()
        for process in processes:
            self._release(process)

    def _release(self, process: Process) -> None:
        if process.execution is not None:
            process.execution.release()
        process.stdio.close()

    # ------------------------------------------------------------------------------------------------ in the middle

    def _executions(self) -> list[Execution]:
        with self.changed:
            processes = [self.init, *self.execs.values()]
            return [
                each.execution
                for each in processes
                if each.execution is not None and each.state is not State.STOPPED
            ]

    def pause(self) -> None:
        """Freeze every process.

        Raises:
            Refusal: init's state does not allow it.
        """
        with self.changed:
            self._check(self.init, "pause")
            self.init.state = State.PAUSED
        for execution in self._executions():
            execution.pause()
        self._publish("/tasks/paused", task_events.TaskPaused(container_id=self.init.id))

    def resume(self) -> None:
        """Thaw every process.

        Raises:
            Refusal: init's state does not allow it.
        """
        with self.changed:
            self._check(self.init, "resume")
            self.init.state = State.RUNNING
        for execution in self._executions():
            execution.resume()
        self._publish("/tasks/resumed", task_events.TaskResumed(container_id=self.init.id))

    def resize(self, exec_id: str, width: int, height: int) -> None:
        """Set a terminal's size.

        Raises:
            Refusal: the process has ended, or there is no such.
        """
        with self.changed:
            process = self.process(exec_id)
            self._check(process, "resize")
        if process.execution is not None:
            try:
                process.execution.resize(width, height)
            except OSError as error:  # its terminal was hung up
                raise unknown(str(error.strerror).lower()) from error

    def close_input(self, exec_id: str) -> None:
        """Give up the shim's own hold on a process's stdin.

        Raises:
            Refusal: there is no such process.
        """
        self.process(exec_id).stdio.close_input()

    def pids(self) -> list[task_pb2.ProcessInfo]:
        """Every pid, with the ids of execs."""
        with self.changed:
            if self.init.state is State.STOPPED:
                return []
            named = [
                (each.spec.exec_id, each.execution)
                for each in (self.init, *self._running_execs())
                if each.execution is not None
            ]
        execs = {execution.pid: exec_id for exec_id, execution in named if exec_id}
        pids = dict.fromkeys(pid for _, execution in named for pid in execution.pids())
        return [
            task_pb2.ProcessInfo(
                pid=pid,
                info=typeurl.pack(ProcessDetails(exec_id=execs[pid])) if pid in execs else None,
            )
            for pid in pids
        ]

    def metrics(self) -> Message:
        """What its processes use."""
        return self._runtime.metrics(self._executions())

    def tell_oom(self) -> None:
        """The kernel's out-of-memory killer was at work."""
        self._publish("/tasks/oom", task_events.TaskOOM(container_id=self.init.id))


def _stdio_of(spec: ProcessSpec, request: CreateTaskRequest | ExecProcessRequest) -> ShimStdio:
    return ShimStdio(
        request.stdin,
        request.stdout,
        request.stderr,
        terminal=request.terminal,
        name=spec.exec_id or spec.container_id,
        namespace=spec.namespace,
    )
