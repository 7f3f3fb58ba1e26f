"""Calls on threads of their own, so that whoever waits for one can stop waiting while it goes on.

grpcio's own way to that is a future, and costs a thread for each: 320 microseconds of CPU for an empty call, where a blocking
one costs 120. A thread that is kept for the next call makes it 190, of which 40 are for that a call can still be cut off:
it is made as a stream of one answer, because a blocking one cannot be cancelled.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Generic, TypeVar

_Answer_co = TypeVar("_Answer_co", covariant=True)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Protocol

    class Answers(Protocol[_Answer_co]):
        """grpcio's stream of answers, here of one."""

        def __iter__(self) -> Iterator[_Answer_co]: ...
        def cancel(self) -> object: ...


_IDLE_SECONDS: Final = 1.0


class UnderWay(Generic[_Answer_co]):
    """One call, from its beginning to its end. Thread-safe.

    Attributes:
        over: It has ended.
        answer: What came back; None while it goes on, and where it failed.
        failure: Why nothing did.
    """

    def __init__(self, begin: Callable[[], Answers[_Answer_co]]) -> None:
        self._begin = begin
        self._call: Answers[_Answer_co] | None = None
        self._cancelled = False
        self.over = False
        self.answer: _Answer_co | None = None
        self.failure: BaseException | None = None
        # Guards `over` against `_then`; innermost, nothing is called while it is held.
        self._lock = threading.Lock()
        self._then: Callable[[], None] | None = None
        # Released to make the one who waits look up; a bare lock, at a tenth of an Event's price.
        self._signal = threading.Lock()
        self._signal.acquire()

    def wait(self, seconds: float) -> None:
        """Wait until it is over, `wake` is called, or the time is up. For one thread at a time."""
        if not self.over:
            self._signal.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))

    def wake(self) -> None:
        """Let the one who waits look up."""
        with suppress(RuntimeError):  # somebody has just done so
            self._signal.release()

    def cancel(self) -> None:
        """Cut it off, in containerd too."""
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()

    def when_over(self, then: Callable[[], None]) -> None:
        """Have something done when it is over; at once if it is."""
        with self._lock:
            if not self.over:
                self._then = then
                return
        then()

    def execute(self) -> None:
        """Make the call, and wait for its end."""
        try:
            self._call = self._begin()
            if self._cancelled:
                self._call.cancel()
            for answer in self._call:
                self.answer = answer
        except BaseException as error:  # noqa: BLE001 - it is the caller's to raise
            # Without the way it came: that would hold this frame, and with it the call, until the collector comes.
            self.failure = error.with_traceback(None)

    def conclude(self) -> None:
        """Say that it is over."""
        with self._lock:
            self.over = True
            then = self._then
        self.wake()
        if then is not None:
            then()


class _Caller:
    """One thread, as the others see it."""

    __slots__ = ("call", "wake")

    def __init__(self) -> None:
        self.call: UnderWay[object] | None = None
        # Released to have the thread look up: there is a call to make, or there will be none.
        self.wake = threading.Lock()
        self.wake.acquire()


class Callers:
    """The threads. One ends after a second without a call, and all idle ones at `close`. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the two below; innermost, nothing waits while it is held
        self._idle: list[_Caller] = []
        self._closed = False

    def make(self, call: UnderWay[object]) -> None:
        """Have a call made, on the thread that was busy last, or a new one.

        Raises:
            RuntimeError: no thread can be had.
        """
        with self._lock:
            caller = self._idle.pop() if self._idle else None
        if caller is not None:
            caller.call = call
            caller.wake.release()
            return
        threading.Thread(target=self._serve, args=(call,), name="libcontainerd-call", daemon=True).start()

    def close(self) -> None:
        """Keep no thread any more; calls can still be made."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for caller in idle:
            caller.wake.release()

    def _serve(self, first: UnderWay[object]) -> None:
        me, call = _Caller(), first
        del first  # or its answer would live as long as the thread
        while True:
            call.execute()
            with self._lock:
                stays = not self._closed
                if stays:  # before the caller goes on, who may have the next call to make
                    self._idle.append(me)
            call.conclude()
            del call
            following = self._next(me) if stays else None
            if following is None:
                return
            call, following = following, None

    def _next(self, me: _Caller) -> UnderWay[object] | None:
        """The next call to make, or None when it is time to end."""
        if not me.wake.acquire(timeout=_IDLE_SECONDS):
            with self._lock:
                if me in self._idle:
                    self._idle.remove(me)
                    return None
            me.wake.acquire()  # taken at the last moment
        call, me.call = me.call, None
        return call
