"""What a client knows of its containers: the records, the one transition table, and the map.

A record changes only under its own lock, and nothing that can wait is called under it. The order of locks is: the
map's, then a record's, then nothing.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum
from typing import TYPE_CHECKING, Final, TypeVar

from libcontainerd.errors import ConflictError, FailedPreconditionError, InvalidParameterError, NotFoundError
from libcontainerd.types import INIT_PROCESS_NAME, EventInfo, EventType, ExitStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from libcontainerd._bundle import Bundle
    from libcontainerd._wire.pb.runc.options_pb2 import Options
    from libcontainerd.cio.attached import Attached

_BEGINNINGS: Final = {
    EventType.CREATE: 1,
    EventType.START: 2,
    EventType.EXEC_ADDED: 4,
    EventType.EXEC_STARTED: 8,
}
"""The bits of `Process.begun`."""

_EXITS_PER_CONTAINER: Final = 1024
_EXITS_OF_DELETED: Final = 32
_CONTAINERS_REMEMBERED: Final = 256


class State(Enum):
    """The states of a process, init or exec."""

    RESERVED = "its id is taken; containerd may not know it yet"
    CREATED = "containerd knows it; it does not run"
    RUNNING = "it runs"
    PAUSED = "it is frozen"
    EXITED = "its exit is known"
    GONE = "containerd no longer knows it, or never did"


class Step(Enum):
    """What moves a process from state to state."""

    CREATE = "containerd made it"
    START = "it was started"
    PAUSE = "it was frozen"
    RESUME = "it was thawed"
    EXIT = "it ended"
    REMOVE = "it was deleted, or its start failed"


# Every move that there is. Nothing is started, and so nothing ends, before the answer that it was made. But the answer of
# a start, and the events that tell of it, come in either order: what was told before leaves the state as it is.
TRANSITIONS: Final[Mapping[tuple[State, Step], State]] = {
    (State.RESERVED, Step.CREATE): State.CREATED,
    (State.RESERVED, Step.REMOVE): State.GONE,
    (State.CREATED, Step.CREATE): State.CREATED,
    (State.CREATED, Step.START): State.RUNNING,
    (State.CREATED, Step.EXIT): State.EXITED,
    (State.CREATED, Step.REMOVE): State.GONE,
    (State.RUNNING, Step.CREATE): State.RUNNING,
    (State.RUNNING, Step.START): State.RUNNING,
    (State.RUNNING, Step.PAUSE): State.PAUSED,
    (State.RUNNING, Step.RESUME): State.RUNNING,
    (State.RUNNING, Step.EXIT): State.EXITED,
    (State.RUNNING, Step.REMOVE): State.GONE,
    (State.PAUSED, Step.PAUSE): State.PAUSED,
    (State.PAUSED, Step.RESUME): State.RUNNING,
    (State.PAUSED, Step.EXIT): State.EXITED,
    (State.PAUSED, Step.REMOVE): State.GONE,
    (State.EXITED, Step.CREATE): State.EXITED,
    (State.EXITED, Step.START): State.EXITED,
    (State.EXITED, Step.EXIT): State.EXITED,
    (State.EXITED, Step.REMOVE): State.GONE,
}

_STEPS_TO: Final[Mapping[State, tuple[Step, ...]]] = {
    State.CREATED: (Step.CREATE,),
    State.RUNNING: (Step.CREATE, Step.START),
    State.PAUSED: (Step.CREATE, Step.START, Step.PAUSE),
}
"""How a process gets there that was found in containerd."""

_STEP_OF_EVENT: Final[Mapping[EventType, Step]] = {
    EventType.CREATE: Step.CREATE,
    EventType.START: Step.START,
    EventType.EXEC_STARTED: Step.START,
    EventType.PAUSED: Step.PAUSE,
    EventType.RESUMED: Step.RESUME,
}


class Process:
    """One run of a process: the init of one task, or one exec. The container's lock guards it.

    Attributes:
        id: ``"init"`` or the exec's id.
        answered: containerd has answered us that it was made. An event says that one was, and it may be another's.
        making: A thread is still starting it. It may have ended already, but nobody may delete it: containerd looks for it once
            more before it answers the start.
        asked: When containerd was asked for it last, on the monotonic clock.
        pid: In the host's pid namespace; 0 until it is known.
        exit: How it ended, once that is known.
        reported: Its exit has been handed to the backend's queue.
        deleting: A thread is deleting it in containerd.
        oom_killed: The out-of-memory killer was seen in this run (of an init).
        begun: Which events of its coming up the backend was told.
        turns: How often it was told to be frozen or thawed (of an init): who asked before that has an old answer.
        attached: Its IO.
    """

    __slots__ = (
        "answered",
        "asked",
        "attached",
        "begun",
        "deleting",
        "exit",
        "id",
        "making",
        "oom_killed",
        "pid",
        "reported",
        "state",
        "turns",
    )

    def __init__(self, process_id: str) -> None:
        self.id = process_id
        self.answered = False
        self.asked = -math.inf
        self.making = True
        self.state = State.RESERVED
        self.pid = 0
        self.exit: ExitStatus | None = None
        self.reported = False
        self.deleting = False
        self.oom_killed = False
        self.begun = 0
        self.turns = 0
        self.attached: Attached | None = None

    @property
    def exec_id(self) -> str:
        """What containerd calls it: nothing for init."""
        return "" if self.id == INIT_PROCESS_NAME else self.id

    def advance(self, step: Step) -> bool:
        """Take a step; False when the table has no such move from here."""
        state = TRANSITIONS.get((self.state, step))
        if state is None:
            return False
        self.state = state
        return True

    def is_told_again(self, event: EventType, pid: int) -> bool:
        """Whether it is an event of its coming up that was told before; notes one that was not."""
        bit = _BEGINNINGS.get(event, 0)
        if not bit or pid not in (0, self.pid):
            return False
        before, self.begun = self.begun, self.begun | bit
        return before == self.begun


@dataclass(frozen=True, slots=True)
class SpecFacts:
    """What this library needs to remember of a container's spec and runtime."""

    terminal: bool
    owner: tuple[int, int]
    options: Options | None
    runtime: str = ""
    keeps_exits: bool = False


class Container:
    """The record of one container.

    Attributes:
        id: Its id.
        changed: The record's lock, and the condition that its waiters wait for: notified at every change.
        kept: Whether containerd may have a record that keeps its exit (`_keeping`); of whoever makes or removes its task.
    """

    __slots__ = (
        "_deleting",
        "_exits",
        "_runs",
        "_tidying",
        "_yielded",
        "bundle",
        "changed",
        "execs",
        "facts",
        "id",
        "kept",
        "ready",
        "task",
    )

    def __init__(self, container_id: str, earlier_runs: Iterable[tuple[str, int]] = ()) -> None:
        self.id = container_id
        self.kept = False
        # Guards every member below and every Process in them. Second in the order, after the map's lock; a waiter may
        # hold it only while it waits on the condition.
        self.changed = threading.Condition(threading.Lock())
        self.ready = False
        self.bundle: Bundle | None = None
        self.facts = SpecFacts(terminal=False, owner=(0, 0), options=None)
        self.task: Process | None = None
        self.execs: dict[str, Process] = {}
        self._deleting = False
        self._tidying = 0  # threads that are removing a process's files from the bundle
        self._yielded = False  # the bundle is nobody's any more, or a later container's
        self._exits: OrderedDict[str, ExitStatus] = OrderedDict()
        # An exit of an earlier container of the same id may come late, or twice: it must not become this one's.
        self._runs: OrderedDict[tuple[str, int], None] = OrderedDict.fromkeys(earlier_runs)

    def publish(self, bundle: Bundle, facts: SpecFacts) -> None:
        """The container is in containerd: from now on the verbs may find it."""
        with self.changed:
            self.bundle, self.facts, self.ready = bundle, facts, True

    def runs(self) -> list[tuple[str, int]]:
        """Name and pid of the processes whose exits were delivered."""
        with self.changed:
            return list(self._runs)

    def trim(self) -> None:
        """Keep of a container that was deleted what a memory of many can afford."""
        with self.changed:
            self.bundle = None
            self.facts = SpecFacts(terminal=False, owner=(0, 0), options=None)
            if INIT_PROCESS_NAME in self._exits:
                # The one that is asked for most, and its execs may have outlived it.
                self._exits.move_to_end(INIT_PROCESS_NAME)
            for memory in (self._exits, self._runs):
                while len(memory) > _EXITS_OF_DELETED:
                    memory.popitem(last=False)

    # Looking up.

    def require_task(self, doing: str) -> Process:
        """The init process.

        Raises:
            NotFoundError: the container has no task.
        """
        with self.changed:
            return self._require_task(doing)

    def has_task(self) -> bool:
        """Whether the container has a task, running or ended."""
        with self.changed:
            return self.task is not None and self.task.state is not State.RESERVED

    def _require_task(self, doing: str) -> Process:
        if self.task is None or self.task.state is State.RESERVED:
            raise NotFoundError(f"cannot {doing}: container is not running")
        return self.task

    def require_process(self, process_id: str, doing: str) -> Process:
        """Init or an exec.

        Raises:
            NotFoundError: the container has no task, or no such exec.
        """
        with self.changed:
            task = self._require_task(doing)
            if process_id == INIT_PROCESS_NAME:
                return task
            process = self.execs.get(process_id)
            if process is None:
                raise NotFoundError(f"cannot {doing}: no such exec")
            return process

    def last_exit(self, process_id: str) -> ExitStatus | None:
        """How the last process of that name ended, if it is remembered."""
        with self.changed:
            return self._exits.get(process_id)

    def require_bundle(self) -> Bundle:
        """The bundle of a container that was created."""
        with self.changed:
            if self.bundle is None:
                raise NotFoundError(f"cannot start anything in container {self.id!r}: no such container")
            return self.bundle

    # Reserving: each taken under the lock before any RPC or path, and given back by `forget`.

    def reserve_task(self) -> Process:
        """Take the container's one task.

        Raises:
            ConflictError: the container is started already, or being deleted.
        """
        with self.changed:
            if self._deleting:
                raise ConflictError(f"cannot start container {self.id!r}: it is being deleted")
            if self.task is not None:
                raise ConflictError(f"cannot start container {self.id!r}: container already started")
            self.task = Process(INIT_PROCESS_NAME)
            return self.task

    def reserve_exec(self, process_id: str) -> Process:
        """Take an exec's id.

        Raises:
            InvalidParameterError: the container is not running.
            ConflictError: the id is taken.
        """
        with self.changed:
            task = self.task
            if task is None or task.deleting or task.state in (State.RESERVED, State.EXITED, State.GONE):
                raise InvalidParameterError(
                    f"cannot exec {process_id!r} in container {self.id!r}: container is not running"
                )
            if process_id in self.execs:
                raise ConflictError(f"cannot exec {process_id!r} in container {self.id!r}: id already in use")
            process = self.execs[process_id] = Process(process_id)
            return process

    def reserve_found(self, process_id: str) -> Process:
        """Take the place of a process that may be in containerd, before that is asked for it.

        Until `adopt`, what events tell of it is in the answer that comes, or found by asking once more.
        """
        with self.changed:
            process = Process(process_id)
            if process_id == INIT_PROCESS_NAME:
                self.task = process
            else:
                self.execs[process_id] = process
            return process

    def adopt(self, process: Process, state: State, pid: int, ended: ExitStatus | None = None) -> None:
        """Take over what containerd has answered of a process that was found.

        Args:
            process: As reserved.
            state: How it is, or was when it ended.
            pid: Its pid.
            ended: How it ended, if that shall not be told as an event.
        """
        with self.changed:
            process.answered = True
            process.pid = pid
            for step in _STEPS_TO[state]:
                process.advance(step)
            if ended is not None:
                self._latch(process, ended)
                process.reported = True
                _remember(self._runs, (process.id, pid), None, _EXITS_PER_CONTAINER)
            self.changed.notify_all()

    def reserve_deletion(self) -> None:
        """Take the container's end.

        Raises:
            FailedPreconditionError: its task exists.
            ConflictError: another call is deleting it.
        """
        with self.changed:
            if self._deleting:
                raise ConflictError(f"cannot delete container {self.id!r}: another call is deleting it")
            if self.task is not None:
                raise FailedPreconditionError(
                    f"cannot delete container {self.id!r}: its task still exists; stop it and call delete_task first"
                )
            self._deleting = True

    def release_deletion(self) -> None:
        """The deletion failed: the container stays."""
        with self.changed:
            self._deleting = False

    def yield_bundle(self) -> None:
        """The container's deletion removes the bundle, and a successor may have one of the same path.

        So nothing of this container's removes files from now on, such as the clean-up after an exec whose output nobody
        read, or that containerd was slow to delete. One that is at it is waited for.
        """
        with self.changed:
            self._yielded = True
            self.changed.wait_for(lambda: not self._tidying)

    def remove_files(self, attached: Attached) -> None:
        """Remove the FIFOs of a process that is gone, unless the bundle was yielded."""
        with self.changed:
            ours = not self._yielded
            self._tidying += ours
        if not ours:
            attached.disown()
            return
        try:
            attached.unlink()
        finally:
            with self.changed:
                self._tidying -= 1
                self.changed.notify_all()

    def claim_removal(self, process: Process, timeout: float) -> bool:
        """Become the one thread that deletes this process in containerd; False once another has done so.

        Waits for the thread that starts it, and for another that deletes it, and takes over where that one failed. Gives up,
        with False, when the time is up.
        """
        with self.changed:
            free = self.changed.wait_for(
                lambda: process.state is State.GONE or not (process.deleting or process.making), timeout
            )
            if not free or process.state is State.GONE:
                return False
            process.deleting = True
            return True

    def made(self, process: Process) -> None:
        """Its start is over, in whatever way."""
        with self.changed:
            process.making = False
            self.changed.notify_all()

    def release_removal(self, process: Process) -> None:
        """The deletion in containerd failed: the process stays."""
        with self.changed:
            process.deleting = False
            self.changed.notify_all()

    def forget(self, process: Process) -> None:
        """The process is gone: drop its record, and remember its exit if it had one."""
        with self.changed:
            process.advance(Step.REMOVE)
            if process.pid:  # the exit of a start that failed may still come, and is no news then
                _remember(self._runs, (process.id, process.pid), None, _EXITS_PER_CONTAINER)
            if process is self.task:
                self.task = None
            elif self.execs.get(process.id) is process:
                del self.execs[process.id]
            self.changed.notify_all()

    # Progress.

    def attach(self, process: Process, attached: Attached) -> None:
        """Note a process's IO."""
        with self.changed:
            process.attached = attached

    def advance(self, process: Process, step: Step, pid: int = 0) -> None:
        """Note that a verb succeeded."""
        with self.changed:
            process.answered = True
            process.pid = pid or process.pid
            process.advance(step)
            self.changed.notify_all()

    def note_exit(self, process: Process, status: ExitStatus, pid: int = 0) -> None:
        """Note an exit that a call has brought to light, before or instead of its event."""
        with self.changed:
            if process.state is State.GONE:
                return  # its start failed while somebody asked: that it is not there is no exit
            process.pid = process.pid or pid
            self._latch(process, status)

    def note_frozen(self, process: Process, frozen: bool, turns: int) -> EventInfo | None:
        """Note that a call has found a task frozen or thawed, and its event did not come.

        Args:
            process: The task's init.
            frozen: Whether it was frozen.
            turns: Its turns before the call was made: what was told since is newer than the answer.

        Returns:
            The event to deliver; None where this is no news.
        """
        with self.changed:
            before = process.state
            if process.turns != turns or not process.advance(Step.PAUSE if frozen else Step.RESUME):
                return None
            if process.state is before:
                return None
            process.turns += 1
            self.changed.notify_all()
            return EventInfo(self.id, oom_killed=self._oom_killed())

    def _latch(self, process: Process, status: ExitStatus) -> None:
        unknown = process.exit is not None and process.exit.error is not None and not process.reported
        if process.exit is None or (unknown and status.error is None):
            process.exit = status
            _remember(self._exits, process.id, status, _EXITS_PER_CONTAINER)
        process.advance(Step.EXIT)
        self.changed.notify_all()

    def claim_report(self, process: Process) -> EventInfo | None:
        """The exit event to deliver, for whoever asks first; None for everybody else."""
        with self.changed:
            return self._claim_report(process)

    def _claim_report(self, process: Process) -> EventInfo | None:
        if process.reported or process.exit is None or process.state is State.GONE:
            return None
        process.reported = True
        _remember(self._runs, (process.id, process.pid), None, _EXITS_PER_CONTAINER)
        self.changed.notify_all()
        return EventInfo(
            container_id=self.id,
            process_id=self.id if process.id == INIT_PROCESS_NAME else process.id,
            pid=process.pid,
            exit_code=process.exit.code,
            exited_at=process.exit.exited_at,
            oom_killed=self._oom_killed(),
        )

    def _oom_killed(self) -> bool:
        return self.task is not None and self.task.oom_killed

    def wait_exit(
        self, process: Process, timeout: float | None, stop: Callable[[], bool] = lambda: False
    ) -> ExitStatus | None:
        """Wait until the exit of a process is known; None when the time is up, it is gone, or `stop` says so."""
        with self.changed:
            self.changed.wait_for(
                lambda: process.exit is not None or process.state is State.GONE or stop(), timeout
            )
            return process.exit

    def wake(self) -> None:
        """Have every waiter look again."""
        with self.changed:
            self.changed.notify_all()

    def is_making(self, process: Process) -> bool:
        """Whether a thread is still starting the process."""
        with self.changed:
            return process.making

    def claim_question(self, process: Process, interval: float) -> bool:
        """Whether it is time to ask containerd for the process: for all that wait, once in an interval (seconds)."""
        now = time.monotonic()
        with self.changed:
            if now - process.asked < interval:
                return False
            process.asked = now
            return True

    def is_ours(self, process: Process) -> bool:
        """Whether containerd has answered us that it made the process."""
        with self.changed:
            return process.answered

    def is_gone(self, process: Process) -> bool:
        """Whether the process is no longer in containerd, or never was."""
        with self.changed:
            return process.state is State.GONE

    def is_paused(self) -> bool:
        """Whether the task is frozen, as far as events have told."""
        with self.changed:
            return self.task is not None and self.task.state is State.PAUSED

    def wait_reported(self, process: Process, timeout: float) -> bool:
        """Wait until the exit's event has come in and been queued; False when the time is up."""
        with self.changed:
            return self.changed.wait_for(lambda: process.reported, timeout)

    # Events.

    def apply(self, event: EventType, info: EventInfo) -> EventInfo | None:
        """Take over what an event says.

        Returns:
            The event as the backend shall see it; None for what was delivered already: an event that came before, an exit
            that was found out, or a freeze or thaw that a call has found out.
        """
        with self.changed:
            process = self._process_of(info.process_id)
            if event is EventType.EXIT:
                return self._apply_exit(process, info)
            if event is EventType.OOM and self.task is not None:
                self.task.oom_killed = True
            elif process is not None and (process.id, info.pid) not in self._runs:
                before, step = process.state, _STEP_OF_EVENT.get(event)
                if step is not None and process.advance(step):
                    process.pid = process.pid or info.pid
                    self.changed.notify_all()
                    if step in (Step.PAUSE, Step.RESUME):
                        process.turns += 1
                        if process.state is before:
                            return None
            if process is not None and process.is_told_again(event, info.pid):
                return None
            return replace(info, oom_killed=True) if self._oom_killed() else info

    def _apply_exit(self, process: Process | None, info: EventInfo) -> EventInfo | None:
        name = INIT_PROCESS_NAME if info.process_id == self.id else info.process_id
        earlier = (name, info.pid) in self._runs
        live = process is not None and process.state is not State.RESERVED
        # Pids come round again, so a run that is known by its pid is believed before the memory of earlier ones.
        if process is not None and live and (info.pid == process.pid or (not process.pid and not earlier)):
            process.pid = info.pid
            self._latch(process, ExitStatus(info.exit_code, info.exited_at or datetime.now(UTC)))
            return self._claim_report(process)
        if earlier:
            return None
        if process is not None or (name, 0) in self._runs:
            return None  # of an earlier run, which failed to start or was concluded without its event
        if not self.ready:
            return None  # being restored: what is ours is found ended by the answers that come
        # A process that somebody else started in our container: told once, like our own.
        _remember(self._runs, (name, info.pid), None, _EXITS_PER_CONTAINER)
        return replace(info, oom_killed=self._oom_killed())

    def process_of(self, process_id: str) -> Process | None:
        """The process that an event names: init by the container's id, an exec by its own."""
        with self.changed:
            return self._process_of(process_id)

    def _process_of(self, process_id: str) -> Process | None:
        return self.task if process_id in ("", self.id) else self.execs.get(process_id)

    def running(self) -> list[Process]:
        """The processes that are in containerd and whose exits are not known, init first."""
        with self.changed:
            return [
                each for each in self._processes() if each.exit is None and each.state is not State.RESERVED
            ]

    def running_execs(self) -> list[Process]:
        """The execs whose exits are not known."""
        return [process for process in self.running() if process.id != INIT_PROCESS_NAME]

    def ended_execs(self) -> list[Process]:
        """The execs whose exits are known, and which are not removed yet."""
        with self.changed:
            return [each for each in self.execs.values() if each.exit is not None]

    def wait_execs(self, timeout: float, stop: Callable[[], bool]) -> None:
        """Wait until the exits of all execs are known, the time is up, or `stop` says so."""
        with self.changed:
            self.changed.wait_for(
                lambda: stop() or all(each.exit is not None for each in self.execs.values()), timeout
            )

    def attached(self) -> list[Attached]:
        """The IO of every process that has any."""
        with self.changed:
            return [each.attached for each in self._processes() if each.attached is not None]

    def attached_and_started(self) -> list[Attached]:
        """The IO of every process that has any and is not just being started, or restored."""
        made = (State.RESERVED, State.CREATED)
        with self.changed:
            return [
                each.attached
                for each in self._processes()
                if each.attached and not (each.making and each.state in made)
            ]

    def _processes(self) -> list[Process]:
        return [*([] if self.task is None else [self.task]), *self.execs.values()]


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def _remember(memory: OrderedDict[_Key, _Value], key: _Key, value: _Value, limit: int) -> None:
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > limit:
        memory.popitem(last=False)


class ContainerMap:
    """The containers that a client looks after, by id, and a bounded memory of those it has deleted."""

    def __init__(self) -> None:
        # Guards both dicts; first in the order, before a record's lock. Nothing waits under it.
        self._lock = threading.Lock()
        self._containers: dict[str, Container] = {}
        self._deleted: OrderedDict[str, Container] = OrderedDict()

    def reserve(self, container_id: str, verb: str = "create") -> Container:
        """Take an id.

        Args:
            container_id: The id.
            verb: What for, for the error's message.

        Raises:
            ConflictError: it is taken.
        """
        with self._lock:
            if container_id in self._containers:
                raise ConflictError(f"cannot {verb} container {container_id!r}: id already in use")
            earlier = self._deleted.get(container_id)
            container = Container(container_id, () if earlier is None else earlier.runs())
            self._containers[container_id] = container
            return container

    def release(self, container: Container) -> None:
        """The creation or restoration failed: the id is free again."""
        with self._lock:
            del self._containers[container.id]

    def publish(self, container: Container) -> None:
        """It succeeded: what is remembered of an earlier container of that id no longer answers."""
        with self._lock:
            self._deleted.pop(container.id, None)

    def remove(self, container: Container) -> None:
        """The container was deleted: free the id, and remember how its processes ended."""
        container.trim()
        with self._lock:
            del self._containers[container.id]
            _remember(self._deleted, container.id, container, _CONTAINERS_REMEMBERED)

    def find(self, container_id: str) -> Container | None:
        """The record of that id, whatever its state."""
        with self._lock:
            return self._containers.get(container_id)

    def get(self, container_id: str, doing: str) -> Container:
        """The record of a container that was created.

        Raises:
            NotFoundError: there is none.
        """
        container = self.find(container_id)
        if container is None or not container.ready:
            raise NotFoundError(f"cannot {doing}: no such container")
        return container

    def deleted(self, container_id: str) -> Container | None:
        """What is remembered of a container that was deleted."""
        with self._lock:
            return self._deleted.get(container_id)

    def all(self) -> list[Container]:
        """Every record there is now."""
        with self._lock:
            return list(self._containers.values())

    def with_deleted(self) -> list[Container]:
        """Every record there is now or is remembered: the end of an exec may still be looked for after its container's."""
        with self._lock:
            return [*self._containers.values(), *self._deleted.values()]
