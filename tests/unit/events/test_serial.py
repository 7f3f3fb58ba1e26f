"""SerialQueue: its two pure classes against models, and its threads with barriers."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import pytest
import structlog.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from libcontainerd._events import serial
from libcontainerd._events.serial import Crew, Lane, Lanes, Move, SerialQueue, Step, Worker

SOON = 20.0
"""Seconds that a condition may take on a busy machine; no test waits for it where the code is right."""


def nothing() -> None:
    """An item that does nothing."""


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, f"not within {SOON} s: {what}"
        time.sleep(0.001)


def threads_of(name: str) -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(f"libcontainerd-{name}-")]


@contextmanager
def queue(name: str = "test") -> Iterator[SerialQueue]:
    made = SerialQueue(name)
    try:
        yield made
    finally:
        made.close(SOON)


# -------------------------------------------------------------------------------------------------------- pure: Lanes


def labelled(label: int, ran: list[int]) -> Callable[[], None]:
    return lambda: ran.append(label)


class LanesMachine(RuleBasedStateMachine):
    """Lanes against a dict of lists."""

    def __init__(self) -> None:
        super().__init__()
        self.lanes = Lanes(quota=3)
        self.waiting: dict[int, list[int]] = {}
        self.held: dict[int, Lane] = {}
        self.turns: dict[int, int] = {}
        self.line: list[int] = []
        self.ran: list[int] = []
        self.label = 0

    @rule(key=st.integers(0, 4))
    def add(self, key: int) -> None:
        self.label += 1
        if key not in self.line and key not in self.held:
            self.line.append(key)
        queued = self.waiting.setdefault(key, [])
        queued.append(self.label)
        assert self.lanes.add(key, labelled(self.label, self.ran)) == len(queued)

    @rule()
    def take(self) -> None:
        lane = self.lanes.take()
        if not self.line:
            assert lane is None
            return
        assert lane is not None
        key = self.line.pop(0)
        assert lane.key == key
        self.held[key] = lane
        self.turns[key] = 3

    @precondition(lambda self: self.held)
    @rule(pick=st.randoms(use_true_random=False))
    def next_item(self, pick: st.DrawFn) -> None:
        key = pick.choice(sorted(self.held))  # type: ignore[attr-defined]
        item = self.lanes.next_item(self.held[key])
        if not self.waiting[key] or (self.turns[key] == 0 and self.line):
            assert item is None
            return
        assert item is not None
        self.turns[key] = (self.turns[key] or 3) - 1
        item()
        assert self.ran.pop() == self.waiting[key].pop(0)

    @precondition(lambda self: self.held)
    @rule(pick=st.randoms(use_true_random=False))
    def put_down(self, pick: st.DrawFn) -> None:
        key = pick.choice(sorted(self.held))  # type: ignore[attr-defined]
        self.lanes.put_down(self.held.pop(key))
        if self.waiting[key]:
            self.line.append(key)
        else:
            del self.waiting[key]

    @rule()
    def discard(self) -> None:
        assert self.lanes.discard() == sum(map(len, self.waiting.values()))
        self.line.clear()
        self.waiting = {key: [] for key in self.held}

    @invariant()
    def a_key_is_known_exactly_while_it_is_needed(self) -> None:
        needed = {key for key, queued in self.waiting.items() if queued} | set(self.held)
        assert len(self.lanes) == len(needed)
        assert self.lanes.ready == bool(self.line)


TestLanes = LanesMachine.TestCase
TestLanes.settings = settings(deadline=None, max_examples=60)


def test_a_turn_ends_only_if_others_wait() -> None:
    lanes = Lanes(quota=2)
    for _ in range(5):
        lanes.add("a", nothing)
    lane = lanes.take()
    assert lane is not None
    assert [lanes.next_item(lane) for _ in range(3)] == [nothing] * 3
    lanes.add("b", nothing)
    assert lanes.next_item(lane) is nothing
    assert lanes.next_item(lane) is None
    lanes.put_down(lane)
    following = lanes.take()
    assert following is not None
    assert following.key == "b"


# --------------------------------------------------------------------------------------------------------- pure: Crew


class CrewMachine(RuleBasedStateMachine):
    """A crew at work on a line that is only a number: who waits, who runs, and how long."""

    def __init__(self) -> None:
        super().__init__()
        self.crew = Crew()
        self.line = 0
        self.closed = False
        self.roused: set[Worker] = set()
        """Appointed, and not looked up since."""
        self.waits: dict[Worker, float] = {}

    def keep_watch(self) -> None:
        if self.crew.watch is None and self.line:
            had_idle = bool(self.crew.idle)
            before = set(self.crew.members)
            worker = self.crew.appoint()
            assert (worker in before) == had_idle, "a thread was made although one was idle"
            self.roused.add(worker)

    def follow(self, worker: Worker, step: Step) -> None:
        self.waits.pop(worker, None)
        if step is Move.TAKE:
            assert self.line > 0
            self.line -= 1
            self.keep_watch()
        elif step is Move.LEAVE:
            assert worker not in self.crew.members
        else:
            assert isinstance(step, float)
            assert 0 < step <= serial.IDLE
            self.waits[worker] = step

    @precondition(lambda self: not self.closed)
    @rule()
    def a_key_becomes_ready(self) -> None:
        self.line += 1
        self.keep_watch()

    @precondition(lambda self: self.waits or self.roused)
    @rule(data=st.data(), timed_out=st.booleans())
    def one_looks_up(self, data: st.DataObject, timed_out: bool) -> None:
        resting = sorted(set(self.waits) | self.roused, key=lambda worker: worker.number)
        worker = data.draw(st.sampled_from(resting), "worker")
        timed_out = timed_out and worker not in self.roused
        self.roused.discard(worker)
        others_awake = [w for w in self.crew.awake if w.moved or not (worker.looking and timed_out)]
        before = set(self.crew.members)
        step = self.crew.look(worker, ready=self.line > 0, timed_out=timed_out, closed=self.closed)
        if step is Move.TAKE:
            assert not others_awake, "took a key although a worker was not known to be blocked"
        if step is Move.LEAVE and not self.closed:
            assert timed_out
        assert self.crew.members <= before
        self.follow(worker, step)

    @precondition(lambda self: self.crew.running)
    @rule(data=st.data())
    def one_puts_its_key_down(self, data: st.DataObject) -> None:
        running = sorted(self.crew.running, key=lambda worker: worker.number)
        worker = data.draw(st.sampled_from(running), "worker")
        self.crew.moved(worker)
        assert worker in self.crew.awake
        if self.line:
            self.line -= 1
        else:
            self.follow(worker, self.crew.finish(worker, closed=self.closed))

    @rule()
    def close(self) -> None:
        self.closed = True

    @invariant()
    def somebody_has_the_watch_while_a_key_waits(self) -> None:
        assert self.crew.watch is not None or not self.line

    @invariant()
    def each_has_one_role(self) -> None:
        crew = self.crew
        watch = set() if crew.watch is None else {crew.watch}
        assert crew.members == crew.running | set(crew.idle) | watch
        assert len(crew.members) == len(crew.running) + len(crew.idle) + len(watch)
        assert set(crew.awake) <= crew.running
        assert serial.MIN_PATIENCE <= crew.patience <= serial.PATIENCE
        assert crew.members - crew.running <= set(self.waits) | self.roused


TestCrew = CrewMachine.TestCase
TestCrew.settings = settings(deadline=None, max_examples=100)


def appointed(crew: Crew) -> Worker:
    return crew.appoint()


def looks(crew: Crew, worker: Worker, *, ready: bool = True, timed_out: bool = False) -> Step:
    return crew.look(worker, ready=ready, timed_out=timed_out, closed=False)


def test_the_watch_waits_for_a_worker_that_gets_on() -> None:
    crew = Crew()
    first = appointed(crew)
    assert looks(crew, first) is Move.TAKE
    second = appointed(crew)
    assert looks(crew, second) == serial.PATIENCE
    for _ in range(3):
        crew.moved(first)
        assert looks(crew, second, timed_out=True) == serial.PATIENCE
    assert looks(crew, second, timed_out=True) is Move.TAKE


def test_the_watch_does_not_judge_before_its_look_is_over() -> None:
    crew = Crew()
    first = appointed(crew)
    looks(crew, first)
    second = appointed(crew)
    looks(crew, second)
    assert looks(crew, second, timed_out=False) == serial.PATIENCE


def test_looks_grow_shorter_while_all_are_blocked_and_long_again_after_progress() -> None:
    crew = Crew()
    looks(crew, appointed(crew))
    waits = []
    for _ in range(8):
        watch = appointed(crew)
        step = looks(crew, watch)
        assert isinstance(step, float)
        waits.append(step)
        assert looks(crew, watch, timed_out=True) is Move.TAKE
    assert waits == sorted(waits, reverse=True)
    assert waits[-1] == serial.MIN_PATIENCE
    running = next(iter(crew.awake))
    watch = appointed(crew)
    looks(crew, watch)
    crew.moved(running)
    assert looks(crew, watch, timed_out=True) == serial.PATIENCE


def test_a_key_is_taken_at_once_where_all_are_known_to_be_blocked() -> None:
    crew = Crew()
    looks(crew, appointed(crew))
    second = appointed(crew)
    looks(crew, second)
    assert looks(crew, second, timed_out=True) is Move.TAKE
    assert crew.finish(second, closed=False) == serial.LINGER
    assert looks(crew, second, timed_out=True) is Move.TAKE


def test_the_last_one_awake_takes_over_the_watch_and_lingers() -> None:
    crew = Crew()
    first = appointed(crew)
    looks(crew, first)
    second = appointed(crew)
    assert looks(crew, second) == serial.PATIENCE
    assert crew.finish(first, closed=False) == serial.LINGER
    assert crew.watch is first
    assert list(crew.idle) == [second]
    # What came meanwhile is taken without a further wait, and the other one goes on to rest.
    assert looks(crew, second, timed_out=True) == serial.IDLE
    assert looks(crew, first, timed_out=True) is Move.TAKE


def test_one_that_finishes_while_others_are_awake_and_watched_rests() -> None:
    crew = Crew()
    first = appointed(crew)
    looks(crew, first)
    second = appointed(crew)
    looks(crew, second)
    looks(crew, second, timed_out=True)
    watch = appointed(crew)
    assert crew.finish(first, closed=False) == serial.IDLE
    assert crew.watch is watch


def test_one_that_lingers_has_judged_nobody_yet() -> None:
    crew = Crew()
    workers = [appointed(crew)]
    looks(crew, workers[0])
    for _ in range(2):
        workers.append(appointed(crew))
        looks(crew, workers[-1])
        assert looks(crew, workers[-1], timed_out=True) is Move.TAKE
    assert list(crew.awake) == [workers[2]]
    assert crew.finish(workers[1], closed=False) == serial.LINGER
    assert looks(crew, workers[1], timed_out=True) is not Move.TAKE


def test_the_one_that_went_idle_last_is_used_first() -> None:
    crew = Crew()
    workers = []
    for _ in range(3):
        workers.append(appointed(crew))
        looks(crew, workers[-1], ready=False)
    # Each was idle when the next was needed, so that there is only one.
    assert crew.members == {workers[0]}

    looks(crew, appointed(crew))
    second = appointed(crew)
    looks(crew, second)
    looks(crew, second, timed_out=True)
    crew.finish(workers[0], closed=False)
    looks(crew, workers[0], ready=False, timed_out=True)
    crew.finish(second, closed=False)
    looks(crew, second, ready=False, timed_out=True)
    assert list(crew.idle) == [workers[0], second]
    assert crew.appoint() is second


def test_an_idle_worker_leaves_after_its_second() -> None:
    crew = Crew()
    worker = appointed(crew)
    assert looks(crew, worker, ready=False) == serial.IDLE
    assert looks(crew, worker, ready=False, timed_out=True) is Move.LEAVE
    assert not crew.members


# ------------------------------------------------------------------------------------------------------------ threads


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 9), max_size=300))
def test_items_of_a_key_run_in_order_and_never_together(keys: list[int]) -> None:
    ran: dict[int, list[int]] = {}
    busy: set[int] = set()
    overlaps = []

    def item(key: int, number: int) -> Callable[[], None]:
        def run() -> None:
            if key in busy:
                overlaps.append(key)
            busy.add(key)
            ran.setdefault(key, []).append(number)
            busy.discard(key)

        return run

    with queue() as q:
        for number, key in enumerate(keys):
            assert q.append(key, item(key, number))
        assert q.close(SOON) == 0
    assert not overlaps
    assert ran == {k: [n for n, key in enumerate(keys) if key == k] for k in set(keys)}


def test_order_holds_for_each_of_many_appenders() -> None:
    ran: list[tuple[int, int]] = []
    start = threading.Barrier(4)

    def add(q: SerialQueue, appender: int) -> None:
        start.wait(SOON)
        for number in range(500):
            q.append("key", lambda pair=(appender, number): ran.append(pair))  # type: ignore[misc]

    with queue() as q:
        threads = [threading.Thread(target=add, args=(q, n)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
        assert q.close(SOON) == 0
    assert len(ran) == 2000
    for appender in range(4):
        assert [number for a, number in ran if a == appender] == list(range(500))


@pytest.mark.parametrize("blocked", [1, 3, 40])
def test_blocked_keys_delay_no_other(blocked: int) -> None:
    gate = threading.Event()
    with queue() as q:
        try:
            up = threading.Barrier(blocked + 1)

            def block() -> None:
                up.wait(SOON)
                gate.wait(SOON)

            for key in range(blocked):
                q.append(key, block)
                q.append(key, nothing)
            up.wait(SOON)
            for number in range(20):
                ran = threading.Event()
                q.append(("free", number), ran.set)
                assert ran.wait(SOON)
            assert len(q._lanes) >= blocked
        finally:
            gate.set()


def test_a_new_key_runs_within_milliseconds_behind_blocked_ones() -> None:
    gate = threading.Event()
    with queue() as q:
        try:
            up = threading.Barrier(11)

            def block() -> None:
                up.wait(SOON)
                gate.wait(SOON)

            for key in range(10):
                q.append(key, block)
            up.wait(SOON)
            waits = []
            for number in range(30):
                ran = threading.Event()
                before = time.monotonic()
                q.append(("free", number), ran.set)
                assert ran.wait(SOON)
                waits.append(time.monotonic() - before)
            # The median: one sample may meet whatever else this machine does.
            assert sorted(waits)[15] < 0.05
        finally:
            gate.set()


def test_a_busy_key_does_not_starve_another() -> None:
    other = threading.Event()
    with queue() as q:

        def again() -> None:
            if not other.is_set():
                q.append("busy", again)
                q.append("busy", nothing)

        q.append("busy", again)
        q.append("other", other.set)
        assert other.wait(SOON)


def test_a_burst_of_quick_items_makes_few_threads() -> None:
    names = set()
    ran = []

    def item() -> None:
        names.add(threading.current_thread().name)
        ran.append(1)

    with queue("burst") as q:
        for number in range(10_000):
            q.append(number % 1000, item)
        assert q.close(SOON) == 0
    assert len(ran) == 10_000
    # Two or three on a quiet machine; one more for each time the system did not let any of them run.
    assert len(names) <= 12


def test_threads_are_named_daemons_and_gone_after_idleness(no_leaks: None) -> None:
    q = SerialQueue("idle")
    seen: list[threading.Thread] = []
    ran = threading.Event()

    def item() -> None:
        seen.append(threading.current_thread())
        ran.set()

    q.append("key", item)
    assert ran.wait(SOON)
    assert seen[0].name == "libcontainerd-idle-1"
    assert seen[0].daemon
    wait_until(lambda: not threads_of("idle"), "idle threads end")
    # And the queue still works.
    ran.clear()
    q.append("key", ran.set)
    assert ran.wait(SOON)
    assert q.close(SOON) == 0
    assert not threads_of("idle")


def test_an_idle_thread_is_woken_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nobody looks up by himself in the time that the test has.
    monkeypatch.setattr(serial, "IDLE", 10 * SOON)
    names = []
    with queue("again") as q:
        for _ in range(20):
            ran = threading.Event()
            q.append("key", lambda: names.append(threading.current_thread().name))
            q.append("key", ran.set)
            assert ran.wait(SOON)
            wait_until(lambda: len(q._crew.idle) == len(q._crew.members), "all are idle again")
    assert len(set(names)) <= 3
    assert not threads_of("again"), "close() has not sent the idle ones home"


def test_nothing_is_kept_of_a_drained_key() -> None:
    class Held:
        pass

    held = Held()
    gone = weakref.ref(held)
    with queue() as q:
        q.append("key", lambda held=held: None)  # type: ignore[misc]
        del held
        wait_until(lambda: len(q._lanes) == 0, "the key's entry goes")
        wait_until(lambda: gone() is None, "the item is let go, though its thread is idle")
        for number in range(2000):
            q.append(number, nothing)
        wait_until(lambda: len(q._lanes) == 0, "2,000 keys' entries go")


@pytest.mark.parametrize("error", [ValueError("boom"), SystemExit(3), KeyboardInterrupt()])
def test_a_failing_item_is_logged_and_the_next_one_runs(error: BaseException) -> None:
    ran = []

    def fail() -> None:
        raise error

    with structlog.testing.capture_logs() as logs:
        q = SerialQueue("fail")
        q.append("web", fail)
        q.append("web", lambda: ran.append("next"))
        assert q.close(SOON) == 0
    assert ran == ["next"]
    assert logs == [
        {"event": "item_failed", "log_level": "error", "queue": "fail", "key": "web", "exc_info": True}
    ]


def test_a_log_that_fails_does_not_stop_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def error(self, *args: object, **fields: object) -> None:
            raise OSError("disk full")

    monkeypatch.setattr(serial, "_log", Broken())
    ran = []

    def fail() -> None:
        raise ValueError

    q = SerialQueue("fail")
    q.append("web", fail)
    q.append("web", lambda: ran.append("next"))
    assert q.close(SOON) == 0
    assert ran == ["next"]


def test_an_item_may_append_to_its_own_key_and_to_others() -> None:
    order = []
    done = threading.Event()
    with queue() as q:

        def first() -> None:
            assert q.append("own", lambda: order.append("third"))
            other = threading.Event()
            assert q.append("other", other.set)
            assert other.wait(SOON), "the other key waits for this one"
            assert q.append("own", done.set)
            order.append("first")

        gate = threading.Event()
        q.append("own", lambda: gate.wait(SOON))
        q.append("own", first)
        q.append("own", lambda: order.append("second"))
        gate.set()
        assert done.wait(SOON)
    assert order == ["first", "second", "third"]


def test_append_does_not_wait_for_a_running_item() -> None:
    gate, up = threading.Event(), threading.Event()
    with queue() as q:

        def block() -> None:
            up.set()
            gate.wait(SOON)

        q.append("key", block)
        assert up.wait(SOON)
        # Would never return if it waited: the gate opens only after it.
        for _ in range(100):
            assert q.append("key", nothing)
        gate.set()


def test_a_key_that_cannot_be_hashed_is_refused() -> None:
    with queue() as q:
        with pytest.raises(TypeError):
            q.append([], nothing)  # type: ignore[arg-type]
        ran = threading.Event()
        q.append("key", ran.set)
        assert ran.wait(SOON)


# -------------------------------------------------------------------------------------------------------------- close


def test_close_lets_queued_items_finish_and_refuses_new_ones(no_leaks: None) -> None:
    ran = []
    q = SerialQueue("close")
    for number in range(500):
        q.append(number % 7, lambda: ran.append(1))
    assert q.close(SOON) == 0
    assert len(ran) == 500
    assert not threads_of("close")
    assert q.append("key", nothing) is False
    assert q.close(SOON) == 0
    assert len(ran) == 500


def test_close_waits_for_its_threads_to_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serial, "LINGER", 0.2)
    q = SerialQueue("gone")
    ran = threading.Event()
    q.append("key", ran.set)
    assert ran.wait(SOON)
    wait_until(lambda: not q._crew.running, "the worker lingers")
    assert q.close(SOON) == 0
    assert not threads_of("gone")


def test_close_of_a_queue_that_was_never_used() -> None:
    assert SerialQueue("unused").close(0) == 0


@pytest.mark.parametrize("timeout", [0.05, 0.0, -1.0])
def test_close_drops_and_counts_what_has_not_begun(timeout: float, no_leaks: None) -> None:
    gate, up = threading.Event(), threading.Event()
    ran = []

    def block() -> None:
        up.set()
        gate.wait(SOON)
        ran.append("blocked")

    q = SerialQueue("drop")
    q.append("stuck", block)
    assert up.wait(SOON)
    for _ in range(3):
        q.append("stuck", lambda: ran.append("behind"))
    before = time.monotonic()
    assert q.close(timeout) == 3
    assert time.monotonic() - before < SOON
    assert not ran
    assert q.close(0) == 3
    gate.set()
    wait_until(lambda: not threads_of("drop"), "the blocked thread ends with its item")
    assert ran == ["blocked"]
    assert len(q._lanes) == 0


def test_close_without_limit() -> None:
    q = SerialQueue("limit")
    q.append("key", nothing)
    assert q.close(float("inf")) == 0


def test_queued_keys_run_while_close_waits_though_all_workers_are_blocked() -> None:
    gate, up = threading.Event(), threading.Event()
    q = SerialQueue("grow")

    def block() -> None:
        up.set()
        gate.wait(SOON)

    q.append("stuck", block)
    assert up.wait(SOON)
    q.append("free", gate.set)
    assert q.close(SOON) == 0


def test_several_threads_close_at_once() -> None:
    q = SerialQueue("several")
    results = []
    start = threading.Barrier(5)

    def close() -> None:
        start.wait(SOON)
        results.append(q.close(SOON))

    threads = [threading.Thread(target=close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(1000):
        q.append(number % 50, nothing)
    start.wait(SOON)
    for thread in threads:
        thread.join(SOON)
    assert results == [0] * 4


def test_close_inside_an_item_does_not_wait_for_itself(no_leaks: None) -> None:
    q = SerialQueue("inside")
    results: list[int] = []
    ran: list[str] = []
    gate, closed = threading.Event(), threading.Event()

    def close() -> None:
        gate.wait(SOON)
        results.append(q.close(SOON))
        closed.set()

    before = time.monotonic()
    q.append("own", close)
    q.append("own", lambda: ran.append("behind"))
    q.append("other", lambda: ran.append("other"))
    gate.set()
    assert closed.wait(SOON)
    assert time.monotonic() - before < SOON
    assert results == [1]
    assert ran == ["other"]


def test_two_items_that_close_do_not_wait_for_each_other(no_leaks: None) -> None:
    q = SerialQueue("mutual")
    both = threading.Barrier(2)
    results: list[int] = []
    done = threading.Semaphore(0)

    def close() -> None:
        both.wait(SOON)
        results.append(q.close(SOON))
        done.release()

    before = time.monotonic()
    q.append("a", close)
    q.append("b", close)
    assert done.acquire(timeout=SOON)
    assert done.acquire(timeout=SOON)
    assert time.monotonic() - before < SOON
    assert results == [0, 0]


def test_a_close_outside_does_not_wait_for_one_inside() -> None:
    q = SerialQueue("outside")
    inside, outside = threading.Event(), threading.Event()

    def close() -> None:
        inside.set()
        outside.wait(SOON)
        q.close(SOON)

    q.append("a", close)
    assert inside.wait(SOON)
    outside.set()
    before = time.monotonic()
    assert q.close(SOON) == 0
    assert time.monotonic() - before < SOON


# ------------------------------------------------------------------------------------------------------------ backlog


def test_a_backlog_is_reported_once_per_key_and_nothing_is_dropped() -> None:
    reports: list[tuple[Hashable, int]] = []
    ran: list[int] = []
    gate = threading.Event()
    q = SerialQueue("backlog", on_backlog=lambda key, waiting: reports.append((key, waiting)))
    for key in ("a", "b"):
        q.append(key, lambda: gate.wait(SOON))
    wait_until(lambda: len(q._crew.running) == 2, "both keys are blocked")
    for _ in range(serial.BACKLOG):
        q.append("a", lambda: ran.append(1))
    assert not reports
    for _ in range(serial.BACKLOG):
        q.append("a", lambda: ran.append(1))
    assert reports == [("a", serial.BACKLOG + 1)]
    for _ in range(serial.BACKLOG + 10):
        q.append("b", lambda: ran.append(1))
    assert reports == [("a", serial.BACKLOG + 1), ("b", serial.BACKLOG + 1)]
    gate.set()
    assert q.close(SOON) == 0
    assert len(ran) == 3 * serial.BACKLOG + 10


def test_the_memory_of_reported_keys_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serial, "BACKLOG", 0)
    reports = []
    q = SerialQueue("memory", on_backlog=lambda key, waiting: reports.append(key))
    for number in range(3000):
        q.append(number, nothing)
    q.append(2999, nothing)
    assert q.close(SOON) == 0
    assert reports == list(range(3000))
    assert len(q._reported) <= 1024


def test_a_failing_report_is_logged_and_the_item_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serial, "BACKLOG", 0)

    def report(key: Hashable, waiting: int) -> None:
        raise ValueError

    ran = []
    with structlog.testing.capture_logs() as logs:
        q = SerialQueue("report", on_backlog=report)
        assert q.append("key", lambda: ran.append(1))
        assert q.close(SOON) == 0
    assert ran == [1]
    assert [log["event"] for log in logs] == ["backlog_report_failed"]


# ------------------------------------------------------------------------------------------------- what may strike it


def test_no_thread_to_be_had_is_logged_and_made_good_by_the_next_append(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[int] = []
    with structlog.testing.capture_logs() as logs, monkeypatch.context() as patch:

        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        q = SerialQueue("refused")
        patch.setattr(threading.Thread, "start", refuse)
        assert q.append("a", lambda: ran.append(1))
    assert [log["event"] for log in logs] == ["worker_not_started"]
    assert not ran
    assert q.append("a", lambda: ran.append(2))
    assert q.close(SOON) == 0
    assert ran == [1, 2]


class Struck:
    """A key whose hashing stands for an allocation at which the collector runs a finalizer that appends."""

    def __init__(self, strike: Callable[[], None]) -> None:
        self._strike = strike

    def __hash__(self) -> int:
        self._strike()
        return 1

    def __eq__(self, other: object) -> bool:
        return self is other


@pytest.mark.parametrize("moment", [1, 2])
def test_a_finalizer_may_append_in_the_midst_of_an_append(moment: int) -> None:
    """It strikes before the key's lane is looked up, or while it is made; and it appends to the very key."""
    hashed = 0
    ran: list[str] = []
    done = threading.Event()
    with queue() as q:

        def strike() -> None:
            nonlocal hashed
            hashed += 1
            if hashed == moment:
                assert q._section.inside
                assert q.append(key, lambda: ran.append("late"))
                assert q.append("another", done.set)

        key = Struck(strike)
        q.append(key, lambda: ran.append("first"))
        assert hashed >= moment
        assert done.wait(SOON)
        assert q.close(SOON) == 0
    assert ran == ["first", "late"]


def test_a_finalizer_may_append_in_the_midst_of_a_workers_step() -> None:
    struck = []
    with queue("strike") as q:
        done = threading.Event()

        def strike() -> None:
            if q._section.inside and threading.current_thread().name.startswith("libcontainerd-strike-"):
                struck.append(1)
                assert q.append("late", done.set)

        q.append(Struck(strike), nothing)
        assert done.wait(SOON)
    assert struck


def test_the_collector_may_run_at_any_allocation() -> None:
    """The real thing: streams in cycles whose finalizers append, with a collection after every few allocations."""
    ran: list[int] = []
    queued: list[bool] = []

    class Stream:
        def __init__(self, q: SerialQueue) -> None:
            self.queue = q
            self.cycle = self

        def __del__(self) -> None:
            queued.append(self.queue.append("closing", lambda: ran.append(1)))

    before = gc.get_threshold()
    q = SerialQueue("collector")
    gc.set_threshold(5, 2, 2)
    try:
        for number in range(2000):
            Stream(q)
            q.append(number % 300, nothing)
    finally:
        gc.set_threshold(*before)
    # Once is not enough: it does nothing while a collection that another thread has begun is under way.
    wait_until(lambda: gc.collect() >= 0 and len(queued) == 2000, "all finalizers have run")
    assert q.close(SOON) == 0
    assert queued == [True] * 2000
    assert len(ran) == 2000
