"""The words of the API: events, states, exit statuses, and the Backend that receives events.

Every name here is the field's own (containerd's or the original libcontainerd's). All values are immutable and may be
shared between threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from datetime import datetime

INIT_PROCESS_NAME: Final = "init"
"""What the API calls a container's first process. In events that process carries the container's id instead."""


class EventType(StrEnum):
    """What happened to a container, as the original's ``EventType`` spells it."""

    UNKNOWN = "unknown"
    EXIT = "exit"
    OOM = "oom"
    CREATE = "create"
    START = "start"
    EXEC_ADDED = "exec-added"
    EXEC_STARTED = "exec-started"
    PAUSED = "paused"
    RESUMED = "resumed"


class Status(StrEnum):
    """The state of a container's task, in containerd's words."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    PAUSING = "pausing"
    STOPPED = "stopped"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class EventInfo:
    """The facts of one event.

    Attributes:
        container_id: The container the event is about.
        process_id: The exec's id, or the container's own id where the event is about its init process. Empty for
            events about the container as a whole (``oom``, ``paused``, ``resumed``).
        pid: The process's pid in the host's pid namespace; 0 where the event carries none.
        exit_code: Set on ``exit``: 0 to 255, 128 + the signal's number for a killed process, 255 where it is unknown.
        exited_at: Set on ``exit``: when the process ended, in UTC; None where containerd does not say.
        oom_killed: The kernel's out-of-memory killer has been at work in this run of the container's task.
    """

    container_id: str
    process_id: str = ""
    pid: int = 0
    exit_code: int = 0
    exited_at: datetime | None = None
    oom_killed: bool = False


class Version(NamedTuple):
    """containerd's own version, and the revision it was built from."""

    version: str
    revision: str


class ExitStatus(NamedTuple):
    """How a process ended.

    Attributes:
        code: 0 to 255; 255 with an ``error`` means that the real code is unknown.
        exited_at: When it ended, in UTC.
        error: Why the code is unknown, or None.
    """

    code: int
    exited_at: datetime
    error: Exception | None = None


class Summary(NamedTuple):
    """One process of a container.

    Attributes:
        pid: In the host's pid namespace.
        process_id: ``"init"``, an exec's id, or empty for a process that init or an exec has spawned.
    """

    pid: int
    process_id: str


class Restored(NamedTuple):
    """A container as `Client.restore` has found it.

    Attributes:
        alive: Its task is there and has not ended: it runs, is frozen, or was never started.
        pid: The init process's, in the host's pid namespace; that of a task that has ended may be another's by now. 0 without
            a task.
        execs: The ids of the execs that run, with their pids.
    """

    alive: bool
    pid: int
    execs: dict[str, int]


class Backend(Protocol):
    """**Protocol**: the user's object that receives a client's events."""

    def process_event(self, container_id: str, event: EventType, info: EventInfo, /) -> object:
        """Take one event.

        Called for one event of a container at a time, in containerd's order, on a thread of the client's. It may
        block (other containers' events go on) and may call any verb of the client, also for the same container. An
        exception is logged, and the next event is delivered.

        Args:
            container_id: The container the event is about.
            event: What happened.
            info: The facts.

        Returns:
            Nothing that is looked at.
        """
