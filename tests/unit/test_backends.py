"""The ready-made backends: what they call, keep and hand out, and that nobody waits for ever."""

from __future__ import annotations

import doctest
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libcontainerd import backends
from libcontainerd.backends import CallbackBackend, IteratorBackend, RecordedEvent, RecordingBackend
from libcontainerd.errors import CallCancelledError, DeadlineExceededError, InvalidParameterError
from libcontainerd.types import Backend, EventInfo, EventType

SOON = 20.0
"""Seconds that a condition may take on a busy machine; no test waits for it where the code is right."""

START = RecordedEvent("web", EventType.START, EventInfo("web", "web", 41))
EXIT = RecordedEvent("web", EventType.EXIT, EventInfo("web", "web", 41, 3))
EXEC_EXIT = RecordedEvent("web", EventType.EXIT, EventInfo("web", "sh", 42, 0))
OTHER_EXIT = RecordedEvent("db", EventType.EXIT, EventInfo("db", "db", 43, 1))


def feed(backend: Backend, *events: RecordedEvent) -> None:
    for container_id, event, info in events:
        backend.process_event(container_id, event, info)


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def joined(thread: threading.Thread) -> bool:
    thread.join(SOON)
    return not thread.is_alive()


def blocked_in(condition: threading.Condition, count: int = 1) -> None:
    """Return when that many threads wait in a condition."""
    deadline = time.monotonic() + SOON
    while len(condition._waiters) < count:  # type: ignore[attr-defined]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_examples_in_the_documentation_run() -> None:
    result = doctest.testmod(backends)
    assert result.attempted >= 12
    assert result.failed == 0


# ------------------------------------------------------------------------------------------------------ CallbackBackend


def test_a_callback_gets_every_event() -> None:
    got: list[RecordedEvent] = []
    feed(CallbackBackend(lambda *event: got.append(RecordedEvent(*event))), START, EXIT, OTHER_EXIT)
    assert got == [START, EXIT, OTHER_EXIT]


def test_a_callback_of_one_kind_is_called_instead_of_the_general_one() -> None:
    general: list[str] = []
    exits: list[str] = []
    backend = CallbackBackend(
        lambda cid, event, info: general.append(cid),
        on={EventType.EXIT: lambda cid, event, info: exits.append(cid)},
    )
    feed(backend, START, OTHER_EXIT)
    assert (general, exits) == (["web"], ["db"])


def test_events_that_nobody_wants_are_ignored() -> None:
    exits: list[str] = []
    feed(CallbackBackend(on={EventType.EXIT: lambda cid, event, info: exits.append(cid)}), START, EXIT)
    assert exits == ["web"]


def test_a_callbacks_exception_gets_out() -> None:
    def fail(container_id: str, event: EventType, info: EventInfo) -> None:
        raise KeyError(container_id)

    with pytest.raises(KeyError):
        feed(CallbackBackend(fail), EXIT)


def test_changing_the_mapping_later_changes_nothing() -> None:
    got: list[str] = []
    on = {EventType.EXIT: lambda cid, event, info: got.append(cid)}
    backend = CallbackBackend(on=on)
    on.clear()
    feed(backend, EXIT)
    assert got == ["web"]


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match="needs a callback"):
        CallbackBackend()
    with pytest.raises(InvalidParameterError, match="needs a callback"):
        CallbackBackend(on={})
    with pytest.raises(InvalidParameterError, match="cannot be called: 3"):
        CallbackBackend(3)  # type: ignore[arg-type]
    with pytest.raises(InvalidParameterError, match="for exit cannot be called: None"):
        CallbackBackend(on={EventType.EXIT: None})  # type: ignore[dict-item]
    with pytest.raises(InvalidParameterError, match="not 'exit'"):
        CallbackBackend(on={"exit": print})  # type: ignore[dict-item]


# ----------------------------------------------------------------------------------------------------- RecordingBackend


def test_events_are_kept_in_order_and_by_container() -> None:
    backend = RecordingBackend()
    feed(backend, START, OTHER_EXIT, EXIT)
    assert backend.events() == [START, OTHER_EXIT, EXIT]
    assert backend.events("web") == [START, EXIT]
    assert backend.events("nobody") == []
    backend.events().clear()
    assert len(backend.events()) == 3


@given(st.integers(1, 5), st.integers(0, 12))
def test_the_newest_are_kept(maxlen: int, count: int) -> None:
    backend = RecordingBackend(maxlen)
    for pid in range(count):
        backend.process_event("web", EventType.START, EventInfo("web", "web", pid))
    assert [one.info.pid for one in backend.events()] == list(range(count))[-maxlen:]


def test_an_event_that_has_come_is_found_at_once() -> None:
    backend = RecordingBackend()
    feed(backend, START, EXEC_EXIT, EXIT, OTHER_EXIT)
    assert backend.wait_for(EventType.EXIT, timeout=0) == EXEC_EXIT
    assert backend.wait_for(EventType.EXIT, "db", timeout=0) == OTHER_EXIT
    assert backend.wait_for(EventType.EXIT, "web", "web", timeout=0) == EXIT
    assert backend.wait_for(EventType.EXIT, "web", "init", timeout=0) == EXIT
    assert backend.wait_for(EventType.EXIT, process_id="init", timeout=0) == EXIT
    assert backend.wait_for(EventType.EXIT, "web", "sh", timeout=0) == EXEC_EXIT
    assert backend.wait_for(lambda one: one.info.pid > 41, timeout=0) == EXEC_EXIT
    assert backend.wait_for(lambda one: one.info.pid > 41, "db", timeout=0) == OTHER_EXIT


def test_an_event_that_is_still_to_come_is_waited_for() -> None:
    backend = RecordingBackend()
    feed(backend, START)
    found: list[RecordedEvent] = []
    threads = [
        in_thread(lambda: found.append(backend.wait_for(EventType.EXIT, "web", timeout=SOON)))
        for _ in range(3)
    ]
    blocked_in(backend._came, 3)
    feed(backend, OTHER_EXIT)
    feed(backend, EXIT)
    assert all(map(joined, threads))
    assert found == [EXIT] * 3


def test_the_function_is_asked_once_per_event_and_may_use_the_backend() -> None:
    backend = RecordingBackend()
    feed(backend, START)
    asked: list[int] = []

    def wanted(one: RecordedEvent) -> bool:
        asked.append(one.info.pid)
        if len(asked) == 1:
            feed(backend, OTHER_EXIT, EXIT)
        return one == EXIT

    assert backend.wait_for(wanted, timeout=SOON) == EXIT
    assert asked == [41, 43, 41]


def test_a_wait_in_vain_says_what_came() -> None:
    backend = RecordingBackend()
    feed(backend, START, OTHER_EXIT)
    with pytest.raises(DeadlineExceededError) as caught:
        backend.wait_for(EventType.EXIT, "web", "sh", timeout=0.01)
    assert str(caught.value) == (
        "no 'exit' event of process 'sh' of container 'web' came within 0.01 s; "
        "events kept of that container: 1, the last ones: start web/web"
    )
    with pytest.raises(DeadlineExceededError, match=r"no event that the function accepts came .* kept: 2"):
        backend.wait_for(lambda one: False, timeout=0)


def test_a_flood_of_other_events_does_not_prolong_a_wait() -> None:
    backend = RecordingBackend(maxlen=10)

    def other(one: RecordedEvent) -> bool:
        feed(backend, START)
        return False

    feed(backend, START)
    before = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        backend.wait_for(other, timeout=0.05)
    assert time.monotonic() - before < SOON


def test_what_was_cleared_is_not_found() -> None:
    backend = RecordingBackend()
    feed(backend, EXIT)
    backend.clear()
    assert backend.events() == []
    with pytest.raises(DeadlineExceededError, match=r"kept: 0$"):
        backend.wait_for(EventType.EXIT, timeout=0)
    feed(backend, OTHER_EXIT)
    assert backend.wait_for(EventType.EXIT, timeout=0) == OTHER_EXIT


def test_recording_is_safe_from_many_threads() -> None:
    backend = RecordingBackend()
    start = threading.Barrier(8)

    def record(number: int) -> None:
        start.wait(SOON)
        for pid in range(200):
            backend.process_event(str(number), EventType.START, EventInfo(str(number), "", pid))

    threads = [in_thread(lambda number=number: record(number)) for number in range(8)]  # type: ignore[misc]
    assert all(map(joined, threads))
    for number in range(8):
        assert [one.info.pid for one in backend.events(str(number))] == list(range(200))


def test_bad_arguments_of_a_recording_are_refused() -> None:
    with pytest.raises(InvalidParameterError, match="at least 1"):
        RecordingBackend(0)
    backend = RecordingBackend()
    feed(backend, EXIT)
    for timeout in (-1.0, float("nan")):
        with pytest.raises(InvalidParameterError, match="timeout"):
            backend.wait_for(EventType.EXIT, timeout=timeout)
    with pytest.raises(InvalidParameterError, match="not for 'exit'"):
        backend.wait_for("exit")  # type: ignore[arg-type]
    assert backend.wait_for(EventType.EXIT, timeout=float("inf")) == EXIT


# ------------------------------------------------------------------------------------------------------ IteratorBackend


def test_a_loop_takes_the_events_in_order_until_it_is_closed() -> None:
    backend = IteratorBackend()
    taken: list[RecordedEvent] = []
    thread = in_thread(lambda: taken.extend(backend))
    feed(backend, START, OTHER_EXIT, EXIT)
    blocked_in(backend._came)
    backend.close()
    assert joined(thread)
    assert taken == [START, OTHER_EXIT, EXIT]


def test_close_ends_every_blocked_loop() -> None:
    backend = IteratorBackend()
    threads = [in_thread(lambda: list(backend)) for _ in range(4)]
    blocked_in(backend._came, 4)
    backend.close()
    assert all(map(joined, threads))


def test_close_ends_a_loop_that_has_events_left() -> None:
    backend = IteratorBackend()
    feed(backend, START, EXIT)
    assert next(backend) == START
    backend.close()
    assert list(backend) == []
    with pytest.raises(StopIteration):
        next(backend)


def test_what_comes_after_close_is_dropped() -> None:
    backend = IteratorBackend(maxsize=1)
    backend.close()
    backend.close()
    feed(backend, START, EXIT)
    assert list(backend) == []


def test_a_with_block_closes_at_its_end() -> None:
    with IteratorBackend() as backend:
        feed(backend, START)
    assert list(backend) == []


def test_a_full_one_blocks_until_an_event_is_taken() -> None:
    backend = IteratorBackend(maxsize=2)
    feed(backend, START, OTHER_EXIT)
    thread = in_thread(lambda: feed(backend, EXIT))
    blocked_in(backend._taken)
    assert next(backend) == START
    assert joined(thread)
    assert [next(backend), next(backend)] == [OTHER_EXIT, EXIT]


def test_close_frees_those_who_wait_for_room() -> None:
    backend = IteratorBackend(maxsize=1)
    feed(backend, START)
    threads = [in_thread(lambda: feed(backend, EXIT)) for _ in range(3)]
    blocked_in(backend._taken, 3)
    backend.close()
    assert all(map(joined, threads))
    assert list(backend) == []


def test_several_loops_share_the_events() -> None:
    backend = IteratorBackend(maxsize=3)
    taken: list[int] = []
    loops = [in_thread(lambda: taken.extend(one.info.pid for one in backend)) for _ in range(3)]
    for pid in range(500):
        backend.process_event("web", EventType.START, EventInfo("web", "web", pid))
    blocked_in(backend._came, 3)
    backend.close()
    assert all(map(joined, loops))
    assert sorted(taken) == list(range(500))


def test_get_waits_no_longer_than_told() -> None:
    backend = IteratorBackend()
    with pytest.raises(DeadlineExceededError, match=r"within 0.01 s"):
        backend.get(0.01)
    feed(backend, START)
    assert backend.get(0) == START
    feed(backend, EXIT)
    assert backend.get(float("inf")) == EXIT
    for timeout in (-1.0, float("nan")):
        with pytest.raises(InvalidParameterError, match="timeout"):
            backend.get(timeout)


def test_close_ends_a_blocked_get() -> None:
    backend = IteratorBackend()
    cut_short: list[CallCancelledError] = []

    def get() -> None:
        try:
            backend.get(SOON)
        except CallCancelledError as error:
            cut_short.append(error)

    thread = in_thread(get)
    blocked_in(backend._came)
    backend.close()
    assert joined(thread)
    assert len(cut_short) == 1


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match="not -1"):
        IteratorBackend(-1)
