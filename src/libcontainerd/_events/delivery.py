"""From an event to the backend, and what an exit entails.

An event is noted in its container's record on the reading thread, and delivered on the queue's. What follows from an
exit (ending stdin, letting output to its end, deleting an exec) is background work: in the way of no event.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog

from libcontainerd._cleanup import delete_process
from libcontainerd._events import catchup
from libcontainerd._events.decode import MalformedEvent, UnknownEvent, decode
from libcontainerd._events.serial import SerialQueue
from libcontainerd._wire.connection import Deadline
from libcontainerd._wire.shelter import CLEAN_UP_SECONDS
from libcontainerd.cio.direct import drain
from libcontainerd.errors import (
    DeadlineExceededError,
    LibcontainerdError,
    NotFoundError,
    UnavailableError,
)
from libcontainerd.types import EventType

if TYPE_CHECKING:
    from libcontainerd._records import Container, ContainerMap, Process
    from libcontainerd._wire.connection import Connection
    from libcontainerd._wire.pb.types.event_pb2 import Envelope
    from libcontainerd._wire.shelter import Shelter
    from libcontainerd.cio.attached import Attached
    from libcontainerd.cio.fifo import InputStream, OutputStream
    from libcontainerd.types import Backend, EventInfo, ExitStatus

_EXEC_DRAIN_SECONDS: Final = 300.0
_LATE_EVENT_SECONDS: Final = 1.0
_RETRY_SECONDS: Final = 1.0
_ASK_SECONDS: Final = 10.0
_FIRST_LOOK_SECONDS: Final = 0.5
_MOST_LOOK_SECONDS: Final = 30.0

_log = structlog.get_logger("libcontainerd")


class Delivery:
    """Hands a client's events to its backend, each exit exactly once, and cleans up after ended execs. Thread-safe."""

    def __init__(
        self,
        connection: Connection,
        shelter: Shelter,
        containers: ContainerMap,
        backend: Backend | None,
        background: SerialQueue,
    ) -> None:
        self._connection = connection
        self._shelter = shelter
        self._containers = containers
        self._backend = backend
        self._background = background
        self._queue = SerialQueue("backend", self._report_backlog)
        self._closing = threading.Event()
        self._lock = (
            threading.Lock()
        )  # guards the three below; innermost, nothing waits or is called back under it
        self._skipped: Counter[type[MalformedEvent]] = Counter()
        self._leftovers: weakref.WeakSet[InputStream | OutputStream] = weakref.WeakSet()
        self._unfinished: list[Attached] = []
        self._log = _log.bind(namespace=connection.namespace)

    def runs_caller(self) -> bool:
        """Whether the calling thread is delivering an event."""
        return self._queue.runs_caller()

    def close(self, timeout: float) -> None:
        """Take no more events, and let those that are queued finish until the timeout (seconds)."""
        self._closing.set()
        for container in self._containers.with_deleted():
            container.wake()
        undelivered = self._queue.close(timeout)
        if undelivered:
            self._log.warning("events_undelivered", events=undelivered)

    # Events.

    def receive(self, envelope: Envelope) -> None:
        """Take one message of the subscription; runs on the reading thread, so it decodes, notes and queues."""
        if envelope.namespace != self._connection.namespace:
            return
        try:
            event = decode(envelope)
        except MalformedEvent as error:
            self._note_skipped(type(error), str(error))
            return
        if event is None:
            return
        container = self._containers.find(event.info.container_id)
        if container is None:
            return  # somebody else's, in the same namespace
        process = container.process_of(event.info.process_id)
        info = container.apply(event.type, event.info)
        if info is None:
            return  # told already
        if event.type is EventType.EXIT:
            self._queue_exit(container, process, info)
        else:
            self.tell(event.type, info)

    def _note_skipped(self, kind: type[MalformedEvent], error: str) -> None:
        """Have it logged; a log may block, and this thread must not. Those that come meanwhile are counted, not kept."""
        with self._lock:
            self._skipped[kind] += 1
            first = self._skipped[kind] == 1
        if first:
            self._queue.append("", partial(self._log_skipped, kind, error))

    def _log_skipped(self, kind: type[MalformedEvent], error: str) -> None:
        with self._lock:
            events = self._skipped.pop(kind)
        if kind is UnknownEvent:
            self._log.debug("event_ignored", error=error, events=events)
        else:
            self._log.warning("event_malformed", error=error, events=events)

    def _queue_exit(self, container: Container, process: Process | None, info: EventInfo) -> None:
        self._queue.append(container.id, partial(self._deliver_exit, container, process, info))
        if process is None:
            return
        if process.attached is not None:
            self._background.append((container.id, process.id, "io"), process.attached.process_ended)
        if not process.exec_id and container.running_execs():
            self.follow_execs(container)

    def _deliver(self, event: EventType, info: EventInfo) -> None:
        if self._backend is None:
            return
        try:
            self._backend.process_event(info.container_id, event, info)
        except Exception:  # noqa: BLE001 - a backend's error is logged, and the next event delivered
            self._log.exception(
                "backend_failed", container=info.container_id, exec=info.process_id, event_type=str(event)
            )

    def _deliver_exit(self, container: Container, process: Process | None, info: EventInfo) -> None:
        self._deliver(EventType.EXIT, info)
        if process is not None and process.exec_id:
            self._background.append(
                (container.id, process.id), partial(self._remove_exec, container, process)
            )

    def _report_backlog(self, key: object, length: int) -> None:
        self._background.append(
            (key, "backlog"), partial(self._log.warning, "events_pile_up", container=key, waiting=length)
        )

    # Exits without an event.

    def ask(self, container: Container, process: Process, deadline: Deadline, *, grace: bool = True) -> bool:
        """Ask containerd whether a process has ended; if so, note it and see that it is reported.

        Args:
            container: Its container.
            process: The process.
            deadline: When to give up.
            grace: Give an event that is merely late the time to come first.

        Raises:
            LibcontainerdError: there was no answer.
        """
        doing = f"ask for {process.id!r} in container {container.id!r}"
        answer = catchup.ask(
            self._connection, container.id, process.exec_id, doing=doing, deadline=deadline, pid=process.pid
        )
        if answer is None:
            return False
        if not grace or not container.wait_reported(process, _LATE_EVENT_SECONDS):
            self.conclude(container, process, *answer)
        return True

    def conclude(self, container: Container, process: Process, status: ExitStatus, pid: int = 0) -> None:
        """Note an exit that was found out, and see that it is reported if it was not."""
        container.note_exit(process, status, pid)
        self._report(container, process)

    def tell(self, event: EventType, info: EventInfo) -> None:
        """Deliver an event that is in the record already."""
        self._queue.append(info.container_id, partial(self._deliver, event, info))

    def look(
        self, container: Container, process: Process, *, deadline: Deadline | None = None, grace: bool = True
    ) -> bool:
        """As `ask`, but what is only just being made is not asked for; False says that there was no answer."""
        if container.is_making(process):
            return False
        deadline = Deadline(_ASK_SECONDS) if deadline is None else deadline.at_most(_ASK_SECONDS)
        try:
            self.ask(container, process, deadline, grace=grace)
        except LibcontainerdError as error:
            self._log.debug("not_answered", container=container.id, exec=process.exec_id, error=str(error))
            return False
        return True

    def settle(self, container: Container, process: Process) -> None:
        """See that an exit that is known is reported: by its event, or without where that does not come soon."""
        if not container.wait_reported(process, _LATE_EVENT_SECONDS):
            self._report(container, process)

    def follow_execs(self, container: Container) -> None:
        """Init has ended: see in the background that the exits of its execs follow."""
        self._background.append((container.id, "execs"), partial(self._look_for_execs, container))

    def _look_for_execs(self, container: Container) -> None:
        """After init's end: find out about execs whose exits do not follow. A shim that was killed tells of init alone."""
        pause = _FIRST_LOOK_SECONDS
        while not self._closing.is_set():
            container.wait_execs(pause, self._closing.is_set)
            running = container.running_execs()
            if not running:
                return
            for process in running:
                self.look(container, process, grace=False)
            pause = min(pause * 2, _MOST_LOOK_SECONDS)

    def _report(self, container: Container, process: Process) -> None:
        info = container.claim_report(process)
        if info is not None:
            self._queue_exit(container, process, info)

    # What an exit entails.

    def _remove_exec(self, container: Container, process: Process) -> None:
        """Let an ended exec's output to its end, delete it in containerd, and forget it."""
        if not container.claim_removal(process, CLEAN_UP_SECONDS):
            return
        drained = False
        try:
            attached = [] if process.attached is None else [process.attached]
            drained = self.drain(container, attached, _EXEC_DRAIN_SECONDS)
            self._delete_exec(container, process)
        finally:
            try:
                self.finish(container, process, drained=drained)
            finally:
                container.forget(process)

    def _delete_exec(self, container: Container, process: Process) -> None:
        doing = f"delete exec {process.id!r} of container {container.id!r}"
        deadline = Deadline(CLEAN_UP_SECONDS)
        # With its container an exec is gone, and both names may be another's by now.
        while self._containers.find(container.id) is container:
            try:
                with self._shelter.enter(doing) as calls:
                    delete_process(calls, container, process, doing=doing, deadline=deadline)
            except NotFoundError:
                pass
            except LibcontainerdError as error:
                again = (
                    isinstance(error, UnavailableError | DeadlineExceededError) and deadline.remaining() > 0
                )
                if again and not self._closing.wait(_RETRY_SECONDS):
                    continue
                if not self._closing.is_set():
                    self._log.warning(
                        "exec_not_deleted", container=container.id, exec=process.exec_id, error=str(error)
                    )
            return

    def drain(self, container: Container, processes: list[Attached], limit: float) -> bool:
        """Let the readers of output come to the end within a limit (seconds), and say whether they have."""
        drained = drain(
            [each.direct for each in processes if each.direct is not None],
            limit=limit,
            hurry=self._closing.is_set,
        )
        if not drained:
            self._log.warning("output_left_unread", container=container.id)
        return drained

    def finish(self, container: Container, process: Process, *, drained: bool) -> None:
        """Close a deleted process's IO; what its owner may still read ends with `shut_leftovers` at the latest."""
        attached = process.attached
        if attached is None:
            return
        container.remove_files(attached)
        left = attached.finish(drained=drained, hurry=self._closing.is_set)
        with self._lock:
            self._leftovers.update(left)
            earlier = list(self._unfinished)
            if left and attached.has_users_io:
                self._unfinished.append(attached)
        over = [each for each in earlier if each.finish_late()]
        with self._lock:
            self._unfinished = [each for each in self._unfinished if each not in over]

    def shut_leftovers(self) -> None:
        """Close the streams that were left to owners who have not closed them, and the IO that goes with them."""
        with self._lock:
            leftovers, unfinished = list(self._leftovers), self._unfinished
            self._unfinished = []
        for attached in unfinished:
            attached.abandon()
        for stream in leftovers:
            stream.shut()
