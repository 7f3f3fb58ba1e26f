"""Records against containerd, all at once: after a gap in the stream of events, and once a minute.

Events get lost: with a connection, and without any sign between a shim and containerd (a shim gives one up after 15
seconds). What containerd knows of every init comes in one answer; execs are asked for one by one, and so is whatever
that answer leaves in doubt.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog

from libcontainerd._events import catchup
from libcontainerd._wire.connection import Deadline
from libcontainerd._wire.pb.types import task_pb2
from libcontainerd.errors import LibcontainerdError
from libcontainerd.types import EventType

if TYPE_CHECKING:
    from collections.abc import Mapping

    from libcontainerd._events.delivery import Delivery
    from libcontainerd._events.serial import SerialQueue
    from libcontainerd._events.strays import Strays
    from libcontainerd._records import Container, ContainerMap, Process
    from libcontainerd._wire.connection import Connection

_INTERVAL_SECONDS: Final = 60.0
_LATE_EVENT_SECONDS: Final = 5.0
"""How long the patrol lets an event be late. That of a killed shim's init is, by 2 s, and nobody is in a hurry here."""

_LIST_SECONDS: Final = 60.0
"""containerd gives each shim that does not answer 2 s, one after the other."""

_ASK_SECONDS: Final = 10.0
_FIRST_RETRY_SECONDS: Final = 0.1
_MOST_RETRY_SECONDS: Final = 2.0
_DOUBT_SECONDS: Final = 1.0

_FROZEN: Final = {task_pb2.Status.PAUSED: True, task_pb2.Status.RUNNING: False}

_log = structlog.get_logger("libcontainerd")


@dataclass(frozen=True, slots=True)
class _Case:
    """A container as its record was before containerd was asked.

    Attributes:
        container: The container.
        init: Its init, if that is not known to have ended.
        turns: Init's turns.
        execs: Its execs that are not known to have ended.
        making: Those of them all that a thread is still starting: the answer may be older than they are.
    """

    container: Container
    init: Process | None
    turns: int
    execs: tuple[Process, ...]
    making: frozenset[Process]


class Patrol:
    """Compares a client's records with containerd, and has delivered what was missed. Thread-safe."""

    def __init__(
        self,
        connection: Connection,
        containers: ContainerMap,
        delivery: Delivery,
        background: SerialQueue,
        strays: Strays,
    ) -> None:
        self._connection = connection
        self._strays = strays
        self._containers = containers
        self._delivery = delivery
        self._background = background
        self._closing = threading.Event()
        self._log = _log.bind(namespace=connection.namespace)
        self._thread = threading.Thread(
            target=self._walk, name=f"libcontainerd-patrol-{connection.namespace}", daemon=True
        )

    def start(self) -> None:
        """Begin to go round."""
        self._thread.start()

    def stop(self) -> None:
        """Ask nothing more; idempotent."""
        self._closing.set()

    def join(self, timeout: float) -> None:
        """Wait for the thread's end, after `stop` and the end of the connection, for some seconds at most."""
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(min(max(timeout, 0.0), threading.TIMEOUT_MAX))

    # After a gap.

    def catch_up(self) -> None:
        """After a gap in the stream: see that what was missed in it is delivered, in the background."""
        self._background.append(("", "catch-up"), self._catch_up)

    def _catch_up(self) -> None:
        pause = _FIRST_RETRY_SECONDS
        while not self._closing.is_set():
            cases = self._cases()
            if not cases:
                return
            tasks = self._ask_for_all()
            if tasks is not None:
                for case in cases:
                    self._settle(case, tasks.get(case.container.id))
                return
            self._closing.wait(pause)
            pause = min(pause * 2, _MOST_RETRY_SECONDS)

    def _settle(self, case: _Case, task: task_pb2.Process | None) -> None:
        """Deliver what the answer says of a container, and ask for what it leaves in doubt."""
        container, init = case.container, case.init
        doubts = list(case.execs)
        if init is not None and not self._is_well(case, task):
            if task is not None and task.status == task_pb2.Status.STOPPED and not doubts and not case.making:
                self._delivery.conclude(
                    container, init, catchup.exit_status(task.exit_status, task.exited_at), task.pid
                )
            else:
                # After its execs: who hears of init's end deletes the task, and with it what is known of them.
                doubts.append(init)
        if doubts:
            self._background.append((container.id, "catch-up"), partial(self._ask, container, doubts))

    def _ask(self, container: Container, doubts: list[Process]) -> None:
        """Ask for processes one by one, until each is answered for."""
        while doubts and not self._closing.is_set():
            doubts = [
                each
                for each in doubts
                if each.exit is None and not self._delivery.look(container, each, grace=False)
            ]
            if doubts:
                self._closing.wait(_DOUBT_SECONDS)

    # Once a minute.

    def _walk(self) -> None:
        while not self._closing.wait(_INTERVAL_SECONDS):
            try:
                self.look_round()
            except Exception:  # noqa: BLE001 - the thread outlives whatever one round brings; it is logged
                self._log.exception("patrol_failed")

    def look_round(self) -> None:
        """Look once for exits whose events got lost, and for strays; what looks like an exit is looked at twice."""
        cases = self._cases()
        tasks = self._ask_for_all()
        if tasks is None:
            return
        suspects = [(case.container, each) for case in cases for each in self._suspects(case, tasks)]
        if not suspects or self._closing.wait(_LATE_EVENT_SECONDS):
            return
        for container, process in suspects:
            if process.exit is None and not self._closing.is_set():
                self._log.info("exit_event_missing", container=container.id, exec=process.exec_id)
                self._delivery.look(container, process, grace=False)

    def _suspects(self, case: _Case, tasks: Mapping[str, task_pb2.Process]) -> list[Process]:
        suspects = [
            each for each in case.execs if each not in case.making and self._seems_over(case.container, each)
        ]
        if case.init is not None and case.init not in case.making:
            task = tasks.get(case.container.id)
            if not self._is_well(case, task):
                suspects.append(case.init)
        return suspects

    def _seems_over(self, container: Container, process: Process) -> bool:
        if self._closing.is_set():
            return False
        doing = f"look after {process.id!r} in container {container.id!r}"
        try:
            answer = catchup.ask(
                self._connection,
                container.id,
                process.exec_id,
                doing=doing,
                deadline=Deadline(_ASK_SECONDS),
                pid=process.pid,
            )
        except LibcontainerdError:
            return False
        return answer is not None

    # Both.

    def _cases(self) -> list[_Case]:
        """What is to be asked for: every container with a process that is not known to have ended."""
        cases = []
        for container in self._containers.all():
            running = container.running()
            if not running:
                continue
            init = next((each for each in running if not each.exec_id), None)
            cases.append(
                _Case(
                    container,
                    init,
                    0 if init is None else init.turns,
                    tuple(each for each in running if each.exec_id),
                    frozenset(each for each in running if container.is_making(each)),
                )
            )
        return cases

    def _ask_for_all(self) -> dict[str, task_pb2.Process] | None:
        try:
            tasks = catchup.ask_for_all(self._connection, Deadline(_LIST_SECONDS))
        except LibcontainerdError as error:
            self._log.debug("not_answered", error=str(error))
            return None
        self._strays.look(tasks)
        return tasks

    def _is_well(self, case: _Case, task: task_pb2.Process | None) -> bool:
        """Whether init is there, frozen or not; if that has changed without an event, say so."""
        if (
            case.init is None
            or case.init in case.making
            or task is None
            or task.status in (task_pb2.Status.STOPPED, task_pb2.Status.UNKNOWN)
            or catchup.is_another(task, case.init.pid)
        ):
            return False
        frozen = _FROZEN.get(task.status)
        if frozen is not None:
            info = case.container.note_frozen(case.init, frozen, case.turns)
            if info is not None:
                self._delivery.tell(EventType.PAUSED if frozen else EventType.RESUMED, info)
        return True
