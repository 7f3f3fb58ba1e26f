"""Calls on kept threads: who waits can stop waiting, a thread serves call after call, and none stays."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from libcontainerd._wire import callers as callers_module
from libcontainerd._wire.callers import Callers, UnderWay
from tests import leaks
from tests.unit.beside import DEADLINE, eventually


class Stream:
    """What grpcio gives for a call: here it ends when it is let, or cut off."""

    def __init__(self, answer: object = "answer", *, held: bool = False) -> None:
        self.answer = answer
        self.begun = threading.Event()
        self.let = threading.Event()
        self.cancelled = False
        if not held:
            self.let.set()

    def __call__(self) -> Stream:
        return self

    def __iter__(self) -> Iterator[object]:
        self.begun.set()
        assert self.let.wait(DEADLINE)
        if self.cancelled:
            raise ValueError("cut off")
        if isinstance(self.answer, BaseException):
            raise self.answer
        yield self.answer

    def cancel(self) -> None:
        self.cancelled = True
        self.let.set()


@pytest.fixture
def callers() -> Iterator[Callers]:
    with leaks.no_leaks():
        made = Callers()
        yield made
        made.close()


def ended(call: UnderWay[object]) -> UnderWay[object]:
    while not call.over:
        call.wait(DEADLINE)
    return call


def on_which_thread(callers: Callers) -> threading.Thread:
    seen: list[threading.Thread] = []

    def begin() -> Stream:
        seen.append(threading.current_thread())
        return Stream()

    call: UnderWay[object] = UnderWay(begin)
    callers.make(call)
    ended(call)
    return seen[0]


def test_a_call_is_answered(callers: Callers) -> None:
    call: UnderWay[object] = UnderWay(Stream("here"))
    callers.make(call)
    assert ended(call).answer == "here"
    assert call.failure is None
    call.wait(DEADLINE)  # for what is over nobody waits


def test_one_thread_serves_one_call_after_the_other(callers: Callers) -> None:
    assert len({on_which_thread(callers) for _ in range(20)}) == 1


def test_calls_at_once_have_a_thread_each(callers: Callers) -> None:
    streams = [Stream(number, held=True) for number in range(3)]
    calls: list[UnderWay[object]] = [UnderWay(stream) for stream in streams]
    for call in calls:
        callers.make(call)
    for stream in streams:
        assert stream.begun.wait(DEADLINE)
    for stream in streams:
        stream.let.set()
    assert [ended(call).answer for call in calls] == [0, 1, 2]


def test_a_failure_comes_without_the_way_it_took(callers: Callers) -> None:
    for failure in (ValueError("closed"), KeyboardInterrupt()):
        call: UnderWay[object] = UnderWay(Stream(failure))
        callers.make(call)
        assert ended(call).failure is failure
        assert call.answer is None
        assert failure.__traceback__ is None
    assert on_which_thread(callers).name == "libcontainerd-call"


def test_who_waits_is_woken_and_the_call_goes_on(callers: Callers) -> None:
    stream = Stream(held=True)
    call: UnderWay[object] = UnderWay(stream)
    callers.make(call)
    assert stream.begun.wait(DEADLINE)
    call.wake()
    call.wake()
    call.wait(DEADLINE)
    assert not call.over
    call.wait(0.001)
    assert not call.over
    stream.let.set()
    assert ended(call).answer == "answer"


def test_a_call_is_cut_off(callers: Callers) -> None:
    stream = Stream(held=True)
    call: UnderWay[object] = UnderWay(stream)
    callers.make(call)
    assert stream.begun.wait(DEADLINE)
    call.cancel()
    assert isinstance(ended(call).failure, ValueError)


def test_a_call_is_cut_off_before_it_begins(callers: Callers) -> None:
    stream = Stream(held=True)
    call: UnderWay[object] = UnderWay(stream)
    call.cancel()
    callers.make(call)
    assert isinstance(ended(call).failure, ValueError)


def test_what_follows_a_call_is_done_once(callers: Callers) -> None:
    done: list[str] = []
    follow: Callable[[], None] = lambda: done.append("done")  # noqa: E731 - twice the same
    stream = Stream(held=True)
    call: UnderWay[object] = UnderWay(stream)
    callers.make(call)
    call.when_over(follow)
    assert done == []
    stream.let.set()
    ended(call)
    eventually(lambda: done == ["done"], "what follows")
    call.when_over(follow)
    assert done == ["done", "done"]


def test_calls_can_be_made_after_the_end_and_no_thread_stays(callers: Callers) -> None:
    first = on_which_thread(callers)
    callers.close()
    second, third = on_which_thread(callers), on_which_thread(callers)
    assert len({first, second, third}) == 3


def test_an_idle_thread_ends_by_itself(callers: Callers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callers_module, "_IDLE_SECONDS", 0.01)
    first = on_which_thread(callers)
    eventually(lambda: not callers._idle, "the idle thread's end")
    assert on_which_thread(callers) != first


def test_a_thread_that_is_taken_at_the_last_moment_serves(
    callers: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callers_module, "_IDLE_SECONDS", 0.001)
    me = callers_module._Caller()  # no longer among the idle: somebody has it, and has not said for what
    call: UnderWay[object] = UnderWay(Stream())

    def give() -> None:
        me.call = call
        me.wake.release()

    timer = threading.Timer(0.1, give)
    timer.start()
    assert callers._next(me) is call
    timer.join()
