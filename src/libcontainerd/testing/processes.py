"""What a shim knows of a process, what its states refuse, and what it asks of a runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Final, Protocol

from libcontainerd._wire.pb.types import task_pb2
from libcontainerd.testing.stdio import ShimStdio
from libcontainerd.testing.timestamps import stamp

if TYPE_CHECKING:
    from google.protobuf.message import Message


class State(Enum):
    """A process's states, by the words that shims use in their refusals."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


_STATUS: Final = {
    State.CREATED: task_pb2.Status.CREATED,
    State.RUNNING: task_pb2.Status.RUNNING,
    State.PAUSED: task_pb2.Status.PAUSED,
    State.STOPPED: task_pb2.Status.STOPPED,
}

# What the shim's states refuse, word for word. What is not here is allowed.
INIT_REFUSES: Final[Mapping[tuple[State, str], str]] = {
    (State.CREATED, "pause"): "cannot pause task in created state",
    (State.CREATED, "resume"): "cannot resume task in created state",
    (State.CREATED, "checkpoint"): "cannot checkpoint a task in created state",
    (State.RUNNING, "start"): "cannot start a running process",
    (State.RUNNING, "resume"): "cannot resume a running process",
    (State.RUNNING, "delete"): "cannot delete a running process",
    (State.PAUSED, "start"): "cannot start a paused process",
    (State.PAUSED, "pause"): "cannot pause a paused container",
    (State.PAUSED, "delete"): "cannot delete a paused process",
    (State.PAUSED, "exec"): "cannot exec in a paused state",
    (State.STOPPED, "start"): "cannot start a stopped process",
    (State.STOPPED, "pause"): "cannot pause a stopped container",
    (State.STOPPED, "resume"): "cannot resume a stopped container",
    (State.STOPPED, "exec"): "cannot exec in a stopped state",
    (State.STOPPED, "update"): "cannot update a stopped container",
    (State.STOPPED, "checkpoint"): "cannot checkpoint a stopped container",
}
EXEC_REFUSES: Final[Mapping[tuple[State, str], str]] = {
    (State.RUNNING, "start"): "cannot start a running process",
    (State.RUNNING, "delete"): "cannot delete a running process",
    (State.STOPPED, "start"): "cannot start a stopped process",
    (State.STOPPED, "resize"): "cannot resize a stopped container",
}


class RuntimeFailure(Exception):  # noqa: N818 - it is the runtime's report, not a mistake of this program
    """The runtime cannot run a process; the text is what runc says after its own prefix."""


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """What a runtime is to run.

    Attributes:
        namespace: The containerd namespace.
        container_id: The container.
        exec_id: The exec, or empty for init.
        process: The OCI spec's process.
        root: The root filesystem's path, or empty.
        memory: What a process that is restored from a checkpoint remembers.
    """

    namespace: str
    container_id: str
    exec_id: str
    process: Mapping[str, object]
    root: str
    memory: Mapping[str, object] = field(default_factory=dict)

    @property
    def args(self) -> list[str]:
        """The command line."""
        args = self.process.get("args")
        return [str(each) for each in args] if isinstance(args, list) else []


class Execution(Protocol):
    """**Protocol**: a process in a runtime's hands. Its methods may be called from any thread."""

    @property
    def pid(self) -> int:
        """Its pid."""

    def start(self) -> None:
        """Let it run."""

    def signal(self, number: int) -> None:
        """Send it a signal; what has ended ignores it.

        Raises:
            OSError: there is no such signal.
        """

    def pause(self) -> None:
        """Freeze it and what it has spawned."""

    def resume(self) -> None:
        """Thaw it."""

    def resize(self, width: int, height: int) -> None:
        """Set its terminal's size, if it has one.

        Raises:
            OSError: its terminal was hung up.
        """

    def pids(self) -> list[int]:
        """Its pid, and those of what it has spawned."""

    def checkpoint(self) -> Mapping[str, object]:
        """What of it a checkpoint keeps, as JSON can say it.

        Raises:
            RuntimeFailure: there is no criu here.
        """

    def drain(self) -> None:
        """After its end: let output that it left reach the client, within the shim's two seconds."""

    def release(self) -> None:
        """End it if it still runs, without a report, and give back all it holds."""


class Runtime(Protocol):
    """**Protocol**: what makes processes of specs."""

    def create(self, spec: ProcessSpec, stdio: ShimStdio, on_exit: Callable[[int], None]) -> Execution:
        """Make a process that waits to be started.

        Args:
            spec: What to run.
            stdio: Its streams; they are opened between this and `Execution.start` for init, and after that for an exec.
            on_exit: To be called once, with the exit status, when it has ended.

        Raises:
            RuntimeFailure: it cannot be run.
        """

    def metrics(self, executions: list[Execution]) -> Message:
        """What a task's processes use."""


class Process:
    """Init or an exec. The task's lock guards it."""

    def __init__(self, spec: ProcessSpec, stdio: ShimStdio) -> None:
        self.spec = spec
        self.stdio = stdio
        self.state = State.CREATED
        self.execution: Execution | None = None
        self.pid = 0
        self.exit_status = 0
        self.exited_at: datetime | None = None
        self.early_exit: int | None = None
        self.ended = False
        self.starting = False
        self.failed = False

    @property
    def id(self) -> str:
        """As containerd names it: init by its container's id."""
        return self.spec.exec_id or self.spec.container_id

    def message(self, *, paused: bool = False) -> task_pb2.Process:
        """What Get answers. containerd fills no container id."""
        state = State.PAUSED if paused and self.state is State.RUNNING else self.state
        return task_pb2.Process(
            id=self.id,
            pid=self.pid,
            status=_STATUS[state],
            stdin=self.stdio.stdin,
            stdout=self.stdio.stdout,
            stderr=self.stdio.stderr,
            terminal=self.stdio.terminal,
            exit_status=self.exit_status,
            exited_at=stamp(self.exited_at),
        )
