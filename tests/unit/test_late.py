"""The switch that makes lateness certain."""

from __future__ import annotations

import threading
import time

import pytest

from libcontainerd._events.serial import SerialQueue
from tests import late


@pytest.mark.parametrize("wanted", ["nonsense", "events", "events:soon", "queue:0.1,:", "evnts:1"])
def test_what_is_no_lateness_is_refused(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SerialQueue, "append", SerialQueue.append)
    with pytest.raises(ValueError, match=rf"{late.VARIABLE}={wanted}: want events requests .*KIND:SECONDS"):
        late.install(wanted)


def test_what_a_queue_holds_is_late_as_a_whole_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SerialQueue, "append", SerialQueue.append)  # which is what is put back
    late.install("queue:0.05")
    queue, ran, last = SerialQueue("late"), list[int](), threading.Event()
    begun = time.monotonic()
    for number in range(20):
        queue.append("key", lambda number=number: ran.append(number))  # type: ignore[misc] # mypy knows no default here
    queue.append("key", last.set)
    assert last.wait(30)
    assert time.monotonic() - begun >= 0.05
    assert ran == list(range(20))
    queue.close(30)
