"""Ready-made backends: call functions, keep a record, or iterate.

A backend is any object with `process_event`; these save writing a class for the common cases. Each may be given to several
clients at once, and all their methods may be called from any thread.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from libcontainerd.errors import CallCancelledError, DeadlineExceededError, InvalidParameterError
from libcontainerd.types import INIT_PROCESS_NAME, EventInfo, EventType

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

EventCallback = Callable[[str, EventType, EventInfo], object]
"""Takes the container's id, what happened, and the facts. What it returns is ignored."""

_SAID_IN_ERRORS = 20


class RecordedEvent(NamedTuple):
    """One event as a backend received it.

    Attributes:
        container_id: The container the event is about.
        event: What happened.
        info: The facts.
    """

    container_id: str
    event: EventType
    info: EventInfo


class CallbackBackend:
    """Calls functions.

    A function runs on a thread of the client's. It may block, which holds up its own container's events and no others,
    and it may call any verb of the client. What it raises is logged by the client. Functions of different containers run
    at the same time.

    Args:
        callback: Called for each event that `on` does not name; None ignores those.
        on: Functions for single kinds of events, called instead of `callback`.

    Raises:
        InvalidParameterError: there is nothing to call, or something that cannot be called.

    Example:
        >>> from libcontainerd.types import EventInfo, EventType
        >>> def ended(container_id, event, info):
        ...     print(f"{container_id}: {info.process_id} ended with {info.exit_code}")
        >>> backend = CallbackBackend(on={EventType.EXIT: ended})
        >>> backend.process_event("web", EventType.START, EventInfo("web", "web", pid=41))
        >>> backend.process_event("web", EventType.EXIT, EventInfo("web", "web", pid=41, exit_code=3))
        web: web ended with 3
    """

    def __init__(
        self, callback: EventCallback | None = None, *, on: Mapping[EventType, EventCallback] | None = None
    ) -> None:
        chosen = dict(on or {})
        if callback is None and not chosen:
            raise InvalidParameterError(
                "a CallbackBackend needs a callback, or callbacks for kinds of events in on="
            )
        for kind, function in chosen.items():
            if not isinstance(kind, EventType):
                raise InvalidParameterError(
                    f"the keys of on= are EventTypes, such as EventType.EXIT, not {kind!r}"
                )
            if not callable(function):
                raise InvalidParameterError(f"the callback for {kind} cannot be called: {function!r}")
        if callback is not None and not callable(callback):
            raise InvalidParameterError(f"the callback cannot be called: {callback!r}")
        self._callbacks = {kind: chosen.get(kind, callback) for kind in EventType}

    def process_event(self, container_id: str, event: EventType, info: EventInfo) -> None:
        """Call the function for this kind of event, if there is one, and let its exception out."""
        callback = self._callbacks[event]
        if callback is not None:
            callback(container_id, event, info)


class RecordingBackend:
    """Keeps the events, and lets other threads wait for one.

    Args:
        maxlen: How many events to keep, the newest; None keeps all of them, which is for tests and short programs.

    Raises:
        InvalidParameterError: `maxlen` is less than 1.

    Example:
        >>> from libcontainerd.types import EventInfo, EventType
        >>> backend = RecordingBackend()
        >>> backend.process_event("web", EventType.EXIT, EventInfo("web", "web", pid=41, exit_code=3))
        >>> backend.wait_for(EventType.EXIT, "web", "init", timeout=1).info.exit_code
        3
        >>> [recorded.event.value for recorded in backend.events("web")]
        ['exit']
    """

    def __init__(self, maxlen: int | None = None) -> None:
        if maxlen is not None and maxlen < 1:
            raise InvalidParameterError(
                f"maxlen is the number of events to keep, at least 1 or None, not {maxlen}"
            )
        # Guards _kept and _count; innermost, no callback is called while it is held.
        self._came = threading.Condition(threading.Lock())
        self._kept: deque[RecordedEvent] = deque(maxlen=maxlen)
        self._count = 0

    def process_event(self, container_id: str, event: EventType, info: EventInfo) -> None:
        """Record the event and wake those who wait. Never blocks."""
        recorded = RecordedEvent(container_id, event, info)
        with self._came:
            self._kept.append(recorded)
            self._count += 1
            self._came.notify_all()

    def events(self, container_id: str | None = None) -> list[RecordedEvent]:
        """Return what has been kept so far, in the order received: one container's order is containerd's.

        Args:
            container_id: Only this container's events; None for all.
        """
        with self._came:
            kept = list(self._kept)
        return [recorded for recorded in kept if container_id in (None, recorded.container_id)]

    def clear(self) -> None:
        """Forget what was kept, such as between two runs of one container."""
        with self._came:
            self._kept.clear()

    def wait_for(
        self,
        what: EventType | Callable[[RecordedEvent], bool],
        container_id: str | None = None,
        process_id: str | None = None,
        *,
        timeout: float = 10.0,
    ) -> RecordedEvent:
        """Return the first event that matches, waiting for it if it has not come yet.

        Events kept before the call count. A waiter that is slower than `maxlen` events come may miss one.

        Args:
            what: A kind of event; or a function that is asked of each event, on the calling thread and once per event.
            container_id: Only this container's events; None for any.
            process_id: Only this process's: an exec's id, or ``"init"`` or the container's id for the init process.
            timeout: Seconds to wait; 0 only looks.

        Raises:
            DeadlineExceededError: no such event came in time; the message tells what did.
            InvalidParameterError: `timeout` is negative or no number, or `what` is neither a kind of event nor callable.
        """
        if not isinstance(what, EventType) and not callable(what):
            raise InvalidParameterError(
                f"wait for an EventType, or for what a function says, not for {what!r}"
            )
        if timeout < 0 or math.isnan(timeout):
            raise InvalidParameterError(f"timeout is in seconds, 0 or more, not {timeout}")
        deadline = time.monotonic() + timeout
        asked = 0
        while True:
            with self._came:
                remaining = deadline - time.monotonic()
                if remaining > 0 and self._count == asked:
                    self._came.wait(min(remaining, threading.TIMEOUT_MAX))
                fresh = list(islice(self._kept, max(0, len(self._kept) - (self._count - asked)), None))
                asked = self._count
            for recorded in fresh:
                if _matches(recorded, what, container_id, process_id):
                    return recorded
            if remaining <= 0:
                raise DeadlineExceededError(self._explain(what, container_id, process_id, timeout))

    def _explain(
        self,
        what: EventType | Callable[[RecordedEvent], bool],
        container_id: str | None,
        process_id: str | None,
        timeout: float,
    ) -> str:
        wanted = f"{what.value!r} event" if isinstance(what, EventType) else "event that the function accepts"
        if process_id is not None:
            wanted += f" of process {process_id!r}"
        if container_id is not None:
            wanted += f" of container {container_id!r}"
        seen = self.events(container_id)
        told = ", ".join(
            f"{one.event.value} {one.container_id}/{one.info.process_id}" for one in seen[-_SAID_IN_ERRORS:]
        )
        of = "" if container_id is None else " of that container"
        return f"no {wanted} came within {timeout:g} s; events kept{of}: {len(seen)}" + (
            f", the last ones: {told}" if told else ""
        )


class IteratorBackend:
    """Hands the events to a ``for`` loop, one by one, in the order received.

    The loop waits for the next event until `close` is called, from whatever thread; then it ends at once, and events that
    it has not taken are dropped. A ``with`` block closes at its end. Several loops may share one backend: each event goes
    to one of them.

    Args:
        maxsize: How many events may wait to be taken. 0, the default, sets no limit: then a loop that does not keep up
            costs memory. With a limit `process_event` blocks while it is reached, so that containerd's events pile up in
            the client's queue instead, and each container that has one occupies a thread: good for few containers. Close
            the backend before the client, or the client's ``close`` waits for the loop in vain until its timeout.

    Raises:
        InvalidParameterError: `maxsize` is negative.

    Example:
        >>> from libcontainerd.types import EventInfo, EventType
        >>> with IteratorBackend() as backend:
        ...     backend.process_event("web", EventType.START, EventInfo("web", "web", pid=41))
        ...     backend.process_event("web", EventType.EXIT, EventInfo("web", "web", pid=41, exit_code=3))
        ...     for container_id, event, info in backend:
        ...         print(container_id, event.value, info.pid, info.exit_code)
        ...         if event is EventType.EXIT:
        ...             break
        web start 41 0
        web exit 41 3
    """

    def __init__(self, maxsize: int = 0) -> None:
        if maxsize < 0:
            raise InvalidParameterError(
                f"maxsize is the number of events that may wait, 0 for no limit, not {maxsize}"
            )
        self._maxsize = maxsize
        # Guards _waiting and _closed; innermost, nothing is called while it is held. Both conditions are of this lock.
        self._lock = threading.Lock()
        self._came = threading.Condition(self._lock)
        self._taken = threading.Condition(self._lock)
        self._waiting: deque[RecordedEvent] = deque()
        self._closed = False

    def process_event(self, container_id: str, event: EventType, info: EventInfo) -> None:
        """Put the event in the line; after `close`, drop it. Blocks only while `maxsize` events wait."""
        recorded = RecordedEvent(container_id, event, info)
        with self._lock:
            while self._maxsize and len(self._waiting) >= self._maxsize and not self._closed:
                self._taken.wait()
            if not self._closed:
                self._waiting.append(recorded)
                self._came.notify()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> RecordedEvent:
        """Wait for the next event and return it.

        Raises:
            StopIteration: the backend is closed, or is closed while this waits.
        """
        with self._lock:
            while not self._waiting and not self._closed:
                self._came.wait()
            if self._closed:
                raise StopIteration
            return self._take()

    def get(self, timeout: float) -> RecordedEvent:
        """Wait for the next event, but not for ever.

        Args:
            timeout: Seconds; 0 only looks.

        Raises:
            DeadlineExceededError: none came in time.
            CallCancelledError: the backend is closed, or is closed while this waits.
            InvalidParameterError: `timeout` is negative or no number.
        """
        if timeout < 0 or math.isnan(timeout):
            raise InvalidParameterError(f"timeout is in seconds, 0 or more, not {timeout}")
        with self._lock:
            if not self._came.wait_for(
                lambda: self._waiting or self._closed, min(timeout, threading.TIMEOUT_MAX)
            ):
                raise DeadlineExceededError(f"no event came within {timeout:g} s")
            if self._closed:
                raise CallCancelledError("no event is to be had: the IteratorBackend was closed")
            return self._take()

    def close(self) -> None:
        """End the iteration at once, in every thread; drop what waits and what comes. May be called again."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
            self._came.notify_all()
            self._taken.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> RecordedEvent:
        """Remove the first event; the caller holds the lock and has seen that there is one."""
        recorded = self._waiting.popleft()
        self._taken.notify()
        return recorded


def _matches(
    recorded: RecordedEvent,
    what: EventType | Callable[[RecordedEvent], bool],
    container_id: str | None,
    process_id: str | None,
) -> bool:
    if container_id is not None and recorded.container_id != container_id:
        return False
    if process_id is not None:
        named = recorded.container_id if process_id == INIT_PROCESS_NAME else process_id
        if recorded.info.process_id != named:
            return False
    return recorded.event is what if isinstance(what, EventType) else what(recorded)
