"""Lateness made certain, so that a test that looks too early fails every time and not once in a thousand runs.

`LIBCONTAINERD_TEST_LATE=events:0.3,answers:0.1` holds things up in the tests' own process, each kind by its seconds:

events      what containerd publishes reaches the client's records so long after it was published
requests    a call leaves this process late
answers     a call has its effect at once, and returns late
queue       what a queue holds (events for the backend, work in the background) runs late
output      a copy moves bytes late, the first few times, and tells its end late
threads     a thread that was started begins late

Order and completeness stay: what is late is no more than what a busy machine does. A test that fails under this has either
looked before its condition was there to see, or has a deadline that is shorter than these delays.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from libcontainerd._events.serial import SerialQueue
from libcontainerd._events.subscriber import Subscriber
from libcontainerd._wire.callers import UnderWay
from libcontainerd._wire.connection import Connection
from libcontainerd.cio.pump import Copy, Pump

if TYPE_CHECKING:
    from collections.abc import Hashable

    from libcontainerd._wire.pb.types.event_pb2 import Envelope

VARIABLE: Final = "LIBCONTAINERD_TEST_LATE"
_SLOW_STEPS: Final = 8
"""How often a copy is held up: one that moves megabytes would otherwise not come to its end."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


def install(wanted: str) -> None:
    """Hold up what `wanted`, the variable's value, names.

    Raises:
        ValueError: it names something else, or no number of seconds.
    """
    for each in filter(None, wanted.split(",")):
        kind, _, seconds = each.partition(":")
        try:
            _KINDS[kind](float(seconds))
        except (KeyError, ValueError) as error:
            raise ValueError(f"{VARIABLE}={wanted}: want {' '.join(_KINDS)}, each as KIND:SECONDS") from error


def _before(function: Callable[_P, _R], seconds: float) -> Callable[_P, _R]:
    @functools.wraps(function)
    def late(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        time.sleep(seconds)
        return function(*args, **kwargs)

    return late


def _after(function: Callable[_P, _R], seconds: float) -> Callable[_P, _R]:
    @functools.wraps(function)
    def late(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        finally:
            time.sleep(seconds)

    return late


def _events(seconds: float) -> None:
    hand_on = Subscriber._hand_on

    def late(self: Subscriber, envelope: Envelope) -> None:
        # By the time of publication: a burst is late as a whole, and not the longer the more it holds.
        published = envelope.timestamp.seconds + envelope.timestamp.nanos / 1e9
        time.sleep(max(0.0, min(seconds, published + seconds - time.time())))
        if not self._closed.is_set():
            hand_on(self, envelope)

    setattr(Subscriber, "_hand_on", late)  # noqa: B010 - mypy has methods for constants


def _requests(seconds: float) -> None:
    for owner, name in ((Connection, "call"), (Connection, "gather"), (UnderWay, "execute")):
        setattr(owner, name, _before(getattr(owner, name), seconds))


def _answers(seconds: float) -> None:
    for owner, name in ((Connection, "call"), (Connection, "gather"), (UnderWay, "execute")):
        setattr(owner, name, _after(getattr(owner, name), seconds))


def _queue(seconds: float) -> None:
    append = SerialQueue.append

    def late(self: SerialQueue, key: Hashable, item: Callable[[], object]) -> bool:
        due = time.monotonic() + seconds

        def run() -> object:
            time.sleep(max(0.0, due - time.monotonic()))
            return item()

        return append(self, key, run)

    setattr(SerialQueue, "append", late)  # noqa: B010 - likewise


def _output(seconds: float) -> None:
    advance = Pump._advance
    held_up: WeakKeyDictionary[Copy, int] = WeakKeyDictionary()

    def late(self: Pump, copy: Copy) -> None:
        times = held_up.get(copy, 0)
        if times < _SLOW_STEPS:
            held_up[copy] = times + 1
            time.sleep(seconds)
        advance(self, copy)

    setattr(Pump, "_advance", late)  # noqa: B010 - likewise
    setattr(Copy, "finish", _before(Copy.finish, seconds))  # noqa: B010 - likewise


def _threads(seconds: float) -> None:
    setattr(threading.Thread, "run", _before(threading.Thread.run, seconds))  # noqa: B010 - likewise


_KINDS: Final[dict[str, Callable[[float], None]]] = {
    "events": _events,
    "requests": _requests,
    "answers": _answers,
    "queue": _queue,
    "output": _output,
    "threads": _threads,
}
