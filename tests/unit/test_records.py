"""Records: the transition table, what is reserved and given back, each exit told once, and the map of containers."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Literal, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from libcontainerd import _records
from libcontainerd._bundle import Bundle
from libcontainerd._records import TRANSITIONS, Container, ContainerMap, Process, SpecFacts, State, Step
from libcontainerd.cio import null_io
from libcontainerd.cio.attached import Attached
from libcontainerd.errors import ConflictError, FailedPreconditionError, InvalidParameterError, NotFoundError
from libcontainerd.types import EventInfo, EventType, ExitStatus
from tests.unit.beside import Beside, race

WHEN = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
FACTS = SpecFacts(terminal=False, owner=(0, 0), options=None)
DOING = "look at it"
FIFTH = ExitStatus(5, WHEN)


def made(container_id: str = "web") -> Container:
    container = Container(container_id)
    container.publish(Bundle(f"/run/{container_id}", (0, 0)), FACTS)
    return container


def running_task(container: Container, pid: int = 100) -> Process:
    task = container.reserve_task()
    container.advance(task, Step.CREATE, pid)
    container.advance(task, Step.START, pid)
    return task


def running_exec(container: Container, name: str = "e", pid: int = 200) -> Process:
    process = container.reserve_exec(name)
    container.advance(process, Step.CREATE)
    container.advance(process, Step.START, pid)
    return process


def exit_of(name: str, pid: int, code: int = 0, container_id: str = "web") -> EventInfo:
    return EventInfo(container_id, name, pid, code, WHEN)


# ------------------------------------------------------------------------------------------------------------- the table


def test_the_table_is_closed() -> None:
    reached = {State.RESERVED}
    while more := {to for (at, _), to in TRANSITIONS.items() if at in reached} - reached:
        reached |= more
    assert reached == set(State)


def test_the_table_moves_only_forward_but_for_a_thaw() -> None:
    order = [State.RESERVED, State.CREATED, State.RUNNING, State.PAUSED, State.EXITED, State.GONE]
    back = {(at, step) for (at, step), to in TRANSITIONS.items() if order.index(to) < order.index(at)}
    assert back == {(State.PAUSED, Step.RESUME)}


def test_the_table_is_complete() -> None:
    for state in State:
        assert ((state, Step.REMOVE) in TRANSITIONS) is (state is not State.GONE)
        created = state not in (State.RESERVED, State.GONE)
        assert ((state, Step.EXIT) in TRANSITIONS) is created, "whatever was made can end"
    assert not [at for at, _ in TRANSITIONS if at is State.GONE], "nothing comes back"
    assert {to for (_, step), to in TRANSITIONS.items() if step is Step.REMOVE} == {State.GONE}
    assert {to for (_, step), to in TRANSITIONS.items() if step is Step.EXIT} == {State.EXITED}
    assert {
        to for (at, step), to in TRANSITIONS.items() if at is State.EXITED and step is not Step.REMOVE
    } == {State.EXITED}


@pytest.mark.parametrize(("state", "step"), list(itertools.product(State, Step)))
def test_a_step_twice_is_a_step_once(state: State, step: Step) -> None:
    # The answer to a call and the event about the same thing both take the step.
    after = TRANSITIONS.get((state, step))
    if after is not None and after is not State.GONE:
        assert TRANSITIONS[after, step] is after


@pytest.mark.parametrize(("state", "step"), list(itertools.product(State, Step)))
def test_a_process_follows_the_table(state: State, step: Step) -> None:
    process = Process("init")
    process.state = state
    assert process.advance(step) is ((state, step) in TRANSITIONS)
    assert process.state is TRANSITIONS.get((state, step), state)


def test_containerds_name_of_a_process() -> None:
    assert Process("init").exec_id == ""
    assert Process("e").exec_id == "e"


# ------------------------------------------------------------------------------------------------------------ looking up


def test_a_container_has_no_task_until_containerd_made_it() -> None:
    container = made()
    for _ in range(2):
        with pytest.raises(NotFoundError, match="container is not running"):
            container.require_task(DOING)
        with pytest.raises(NotFoundError, match="container is not running"):
            container.require_process("e", DOING)
        if container.task is None:
            container.reserve_task()
    task = container.process_of("web")
    assert task is not None
    container.advance(task, Step.CREATE, 7)
    assert container.require_task(DOING) is container.require_process("init", DOING) is task
    assert task.pid == 7


def test_processes_are_found_by_name() -> None:
    container = made()
    task, process = running_task(container), running_exec(container)

    assert container.require_process("e", DOING) is process
    assert container.process_of("e") is process
    assert container.process_of("web") is container.process_of("") is task
    assert container.process_of("none") is None
    with pytest.raises(NotFoundError, match="cannot look at it: no such exec"):
        container.require_process("none", DOING)
    assert container.running() == [task, process]
    assert container.running_execs() == [process]


def test_what_is_only_reserved_does_not_run() -> None:
    # containerd answers NOT_FOUND for it, which must not be taken for its end.
    container = made()
    task = container.reserve_task()
    assert container.running() == []
    assert container.is_making(task)
    container.advance(task, Step.CREATE, 1)
    container.made(task)
    assert not container.is_making(task)
    reserved = container.reserve_exec("e")
    assert container.running() == [task]
    assert container.running_execs() == []
    container.advance(reserved, Step.CREATE)
    assert container.running_execs() == [reserved]


def test_a_bundle_is_there_once_published() -> None:
    container = Container("web")
    assert not container.ready
    with pytest.raises(NotFoundError, match="no such container"):
        container.require_bundle()
    bundle, facts = Bundle("/b", (1, 2)), replace(FACTS, terminal=True)
    container.publish(bundle, facts)
    assert (container.ready, container.require_bundle(), container.facts) == (True, bundle, facts)


# ------------------------------------------------------------------------------------------------------------- reserving


def test_a_container_has_one_task() -> None:
    container = made()
    outcomes = race(*[container.reserve_task] * 6)
    (task,) = [each for each in outcomes if isinstance(each, Process)]
    assert [str(each) for each in outcomes if each is not task] == [
        "cannot start container 'web': container already started"
    ] * 5
    container.forget(task)
    assert container.reserve_task() is not task


def test_an_exec_needs_a_task_that_runs() -> None:
    container = made()

    def refused() -> None:
        with pytest.raises(InvalidParameterError, match="container is not running"):
            container.reserve_exec("e")

    refused()
    task = container.reserve_task()
    refused()
    container.advance(task, Step.CREATE, 1)
    container.forget(container.reserve_exec("e"))
    container.advance(task, Step.START, 1)
    container.forget(container.reserve_exec("e"))
    container.apply(EventType.PAUSED, EventInfo("web"))
    container.forget(container.reserve_exec("e"))
    container.made(task)
    assert container.claim_removal(task, 0)
    refused()
    container.release_removal(task)
    container.forget(container.reserve_exec("e"))
    container.note_exit(task, FIFTH)
    refused()
    container.forget(task)
    refused()


def test_an_execs_id_is_taken_once() -> None:
    container = made()
    running_task(container)
    outcomes = race(*[lambda: container.reserve_exec("e")] * 6)
    (process,) = [each for each in outcomes if isinstance(each, Process)]
    assert sum(isinstance(each, ConflictError) for each in outcomes) == 5
    container.forget(process)
    assert container.reserve_exec("e") is not process


def test_forgetting_an_earlier_run_leaves_the_later_one() -> None:
    container = made()
    running_task(container)
    first = running_exec(container)
    container.forget(first)
    second = running_exec(container, pid=201)
    container.forget(first)
    assert container.require_process("e", DOING) is second
    assert container.is_gone(first)
    assert not container.is_gone(second)


def test_a_container_is_deleted_once_and_only_without_a_task() -> None:
    container = made()
    task = container.reserve_task()
    with pytest.raises(FailedPreconditionError, match="its task still exists"):
        container.reserve_deletion()
    container.forget(task)

    outcomes = race(*[container.reserve_deletion] * 4)
    assert outcomes.count(None) == 1
    assert sum(isinstance(each, ConflictError) for each in outcomes) == 3
    with pytest.raises(ConflictError, match="being deleted"):
        container.reserve_task()
    container.release_deletion()
    container.reserve_task()


def test_start_and_delete_at_once_do_not_both_win() -> None:
    for _ in range(50):
        container = made()
        outcomes = race(container.reserve_task, container.reserve_deletion)
        assert sum(isinstance(each, Exception) for each in outcomes) == 1


def test_nobody_deletes_a_process_that_is_still_being_started() -> None:
    # It may have ended already; but containerd looks for it once more before it answers the start.
    container = made()
    task = running_task(container)
    container.note_exit(task, ExitStatus(0, datetime.now(UTC)))
    assert not container.claim_removal(task, 0.01)

    waiting = Beside(lambda: container.claim_removal(task, 20))
    container.made(task)
    assert waiting.answer()


def test_one_thread_at_a_time_deletes_a_process() -> None:
    container = made()
    task = running_task(container)
    container.made(task)
    assert race(*[lambda: container.claim_removal(task, 0)] * 5).count(True) == 1
    assert not container.claim_removal(task, 0.01)

    waiting = Beside(lambda: container.claim_removal(task, 20))
    container.release_removal(task)
    assert waiting.answer(), "it takes over where the other has failed"

    waiting = Beside(lambda: container.claim_removal(task, 20))
    container.forget(task)
    assert not waiting.answer()
    assert not container.claim_removal(task, 0)


# ------------------------------------------------------------------------------------------------------------- progress


def test_an_exit_is_known_by_its_event() -> None:
    container = made()
    task = running_task(container)
    info = container.apply(EventType.EXIT, exit_of("web", 100, 5))
    assert info == exit_of("web", 100, 5)
    assert task.exit == FIFTH
    assert task.reported
    assert task.state is State.EXITED
    assert container.last_exit("init") == FIFTH
    assert container.running() == []


def test_an_exit_that_was_found_out_is_told_once() -> None:
    container = made()
    running_task(container)
    process = running_exec(container)
    assert container.claim_report(process) is None, "it has not ended"
    container.note_exit(process, FIFTH)
    assert race(*[lambda: container.claim_report(process)] * 6).count(None) == 5
    assert container.apply(EventType.EXIT, exit_of("e", 200, 5)) is None
    container.note_exit(process, ExitStatus(255, WHEN))
    assert process.exit == FIFTH, "the first that was known counts"


def test_a_real_exit_takes_the_place_of_an_unknown_one_until_that_was_told() -> None:
    unknown = ExitStatus(255, WHEN, NotFoundError("no longer known"))
    container = made()
    task = running_task(container)
    process = running_exec(container)
    container.note_exit(task, unknown)
    assert task.exit == unknown
    assert container.apply(EventType.EXIT, exit_of("web", 100, 5)) == exit_of("web", 100, 5)
    assert (task.exit, container.last_exit("init")) == (FIFTH, FIFTH)

    container.note_exit(process, unknown)
    told = container.claim_report(process)
    assert told is not None
    assert told.exit_code == 255
    assert container.apply(EventType.EXIT, exit_of("e", 200, 5)) is None
    assert process.exit == unknown, "what was told stays"
    container.forget(process)
    assert container.apply(EventType.EXIT, exit_of("e", 200, 5)) is None
    assert container.last_exit("e") == unknown


def test_asking_and_the_event_at_once_tell_an_exit_once() -> None:
    for _ in range(50):
        container = made()
        task = running_task(container)

        def ask(container: Container = container, task: Process = task) -> EventInfo | None:
            container.note_exit(task, FIFTH)
            return container.claim_report(task)

        def hear(container: Container = container) -> EventInfo | None:
            return container.apply(EventType.EXIT, exit_of("web", 100, 5))

        assert sorted(race(ask, hear), key=lambda each: each is None) == [exit_of("web", 100, 5), None]


def test_an_exit_without_a_time_was_now() -> None:
    container = made()
    task = running_task(container)
    container.apply(EventType.EXIT, replace(exit_of("web", 100), exited_at=None))
    assert task.exit is not None
    assert timedelta(0) <= datetime.now(UTC) - task.exit.exited_at < timedelta(minutes=1)


def test_an_exit_of_another_pid_is_not_ours() -> None:
    container = made()
    task = running_task(container)
    assert container.apply(EventType.EXIT, exit_of("web", 99, 1)) is None
    assert task.exit is None


def test_a_beginning_that_comes_twice_is_told_once_for_each_run() -> None:
    container = made()
    task = container.reserve_task()
    of_init, added, started = EventInfo("web", "web", 100), EventInfo("web", "e"), EventInfo("web", "e", 200)

    def told(event: EventType, info: EventInfo) -> list[EventInfo | None]:
        return [container.apply(event, info) for _ in range(3)]

    assert told(EventType.CREATE, of_init) == [of_init, None, None]
    container.advance(task, Step.CREATE, 100)
    assert told(EventType.START, of_init) == [of_init, None, None]
    container.advance(task, Step.START, 100)
    for _ in range(2):
        exec_ = container.reserve_exec("e")
        assert told(EventType.EXEC_ADDED, added) == [added, None, None]
        container.advance(exec_, Step.CREATE)
        assert told(EventType.EXEC_STARTED, started) == [started, None, None]
        container.forget(exec_)
        started = replace(started, pid=201)


def test_the_start_of_an_earlier_run_does_not_hide_the_next_ones() -> None:
    container = made()
    running_task(container)
    failed = container.reserve_exec("e")
    container.advance(failed, Step.CREATE)
    container.forget(failed)
    exec_ = container.reserve_exec("e")
    late, started = EventInfo("web", "e", 200), EventInfo("web", "e", 201)
    assert container.apply(EventType.EXEC_STARTED, late) == late
    container.advance(exec_, Step.CREATE)
    assert container.apply(EventType.EXEC_STARTED, started) == started


def test_a_late_exit_of_a_failed_start_does_not_end_the_next() -> None:
    container = made()
    failed = container.reserve_task()
    container.advance(failed, Step.CREATE, 100)
    container.forget(failed)
    task = container.reserve_task()
    assert container.apply(EventType.EXIT, exit_of("web", 100, 137)) is None
    container.advance(task, Step.CREATE, 101)
    assert container.apply(EventType.EXIT, exit_of("web", 100, 137)) is None
    container.advance(task, Step.START, 101)
    assert task.exit is None
    assert task.state is State.RUNNING
    assert container.apply(EventType.EXIT, exit_of("web", 101, 0)) is not None


def test_a_late_start_of_an_earlier_exec_does_not_hide_the_next_ones_exit() -> None:
    container = made()
    running_task(container)
    running = running_exec(container, "e", 200)
    container.forget(running)
    process = container.reserve_exec("e")
    container.apply(EventType.EXEC_STARTED, EventInfo("web", "e", 200))
    container.advance(process, Step.CREATE)
    container.apply(EventType.EXEC_STARTED, EventInfo("web", "e", 200))
    container.apply(EventType.EXEC_STARTED, EventInfo("web", "e", 201))
    # The exit comes before the answer of Start.
    assert container.apply(EventType.EXIT, exit_of("e", 201, 5)) == exit_of("e", 201, 5)
    container.advance(process, Step.START, 201)
    assert process.exit == FIFTH


def test_an_exit_before_the_answer_of_start_stays() -> None:
    container = made()
    running_task(container)
    process = container.reserve_exec("e")
    container.advance(process, Step.CREATE)
    assert container.apply(EventType.EXIT, exit_of("e", 200, 5)) is not None
    container.advance(process, Step.START, 200)
    assert process.state is State.EXITED
    assert (process.exit, process.pid) == (FIFTH, 200)


def test_a_process_that_somebody_else_started_is_told_once() -> None:
    container = made()
    running_task(container)
    foreign = exit_of("theirs", 300, 3)
    assert container.apply(EventType.EXIT, foreign) == foreign
    assert container.apply(EventType.EXIT, foreign) is None
    assert container.apply(EventType.EXIT, replace(foreign, pid=301)) is not None
    assert container.last_exit("theirs") is None


def test_out_of_memory_is_of_one_run() -> None:
    container = made()
    running_task(container)
    running_exec(container)
    assert container.apply(EventType.EXEC_ADDED, EventInfo("web", "e")) == EventInfo("web", "e")
    oom = container.apply(EventType.OOM, EventInfo("web", oom_killed=True))
    assert oom == EventInfo("web", oom_killed=True)
    for event, info in (
        (EventType.PAUSED, EventInfo("web")),
        (EventType.EXIT, exit_of("e", 200, 1)),
        (EventType.EXIT, exit_of("theirs", 300, 1)),
        (EventType.EXIT, exit_of("web", 100, 137)),
    ):
        told = container.apply(event, info)
        assert told == replace(info, oom_killed=True)

    container.forget(container.require_task(DOING))
    again = container.reserve_task()
    container.advance(again, Step.CREATE, 101)
    told = container.apply(EventType.START, EventInfo("web", "web", 101))
    assert told == EventInfo("web", "web", 101)


def test_pausing_is_followed() -> None:
    container = made()
    assert not container.is_paused()
    running_task(container)
    for event, paused in ((EventType.PAUSED, True), (EventType.PAUSED, True), (EventType.RESUMED, False)):
        container.apply(event, EventInfo("web"))
        assert container.is_paused() is paused


def test_an_exit_that_comes_before_a_restore_has_found_its_exec_is_left_to_that() -> None:
    container = Container("web")
    assert container.apply(EventType.EXIT, exit_of("e", 200, 5)) is None
    task, process = container.reserve_found("init"), container.reserve_found("e")
    assert container.apply(EventType.EXIT, exit_of("e", 200, 5)) is None
    container.adopt(task, State.RUNNING, 100)
    container.adopt(process, State.RUNNING, 200)
    container.publish(Bundle("/run/web", (0, 0)), FACTS)
    container.note_exit(process, FIFTH, 200)
    assert container.claim_report(process) == exit_of("e", 200, 5)
    assert container.apply(EventType.EXIT, exit_of("e", 200, 5)) is None


def test_a_freeze_that_was_found_out_is_told_once() -> None:
    container = made()
    task = running_task(container)
    container.apply(EventType.OOM, EventInfo("web", oom_killed=True))
    assert container.note_frozen(task, False, task.turns) is None, "it was not frozen"
    assert container.note_frozen(task, True, task.turns) == EventInfo("web", oom_killed=True)
    assert container.is_paused()
    assert container.note_frozen(task, True, task.turns) is None
    assert container.apply(EventType.PAUSED, EventInfo("web")) is None
    assert container.apply(EventType.RESUMED, EventInfo("web")) == EventInfo("web", oom_killed=True)
    assert container.apply(EventType.RESUMED, EventInfo("web")) is None


def test_a_freeze_that_was_found_out_is_old_when_something_was_told_since() -> None:
    container = made()
    task = running_task(container)
    turns = task.turns
    for event in (EventType.PAUSED, EventType.RESUMED):
        container.apply(event, EventInfo("web"))
    assert container.note_frozen(task, True, turns) is None
    assert not container.is_paused()
    container.note_exit(task, FIFTH)
    assert container.note_frozen(task, True, task.turns) is None


def test_a_pid_comes_with_the_answer_or_the_event() -> None:
    container = made()
    running_task(container)
    process = container.reserve_exec("e")
    container.advance(process, Step.CREATE)
    assert process.pid == 0
    container.apply(EventType.EXEC_STARTED, EventInfo("web", "e", 200))
    assert (process.pid, process.state) == (200, State.RUNNING)
    container.advance(process, Step.START, 200)
    container.advance(process, Step.START)
    assert process.pid == 200


def test_events_about_nothing_change_nothing() -> None:
    container = made()
    for event in (EventType.OOM, EventType.START, EventType.PAUSED, EventType.UNKNOWN):
        info = EventInfo("web", "web", 5)
        assert container.apply(event, info) == info
    assert container.task is None


def test_the_io_of_what_is_just_being_started_is_told_apart() -> None:
    container = made()
    task = container.reserve_task()
    attached = Attached(null_io)
    container.attach(task, attached)
    found = []
    for step in (Step.CREATE, Step.START):
        found.append(container.attached_and_started())
        container.advance(task, step, 1)
    found.append(container.attached_and_started())
    assert found == [[], [], [attached]]


def test_every_attached_io_is_found() -> None:
    container = made()
    task = running_task(container)
    running_exec(container, "plain", 201)
    process = running_exec(container)
    first, second = Attached(null_io), Attached(null_io)
    container.attach(task, first)
    container.attach(process, second)
    assert container.attached() == [first, second]


# --------------------------------------------------------------------------------------------------------------- waiting


def test_waiters_for_an_exit_all_wake() -> None:
    container = made()
    task = running_task(container)
    waiting = [Beside(lambda: container.wait_exit(task, None)) for _ in range(4)]
    container.note_exit(task, FIFTH)
    assert [each.answer() for each in waiting] == [FIFTH] * 4
    container.forget(task)
    assert container.wait_exit(task, 0) == FIFTH


def test_a_wait_ends_when_the_process_is_gone_the_time_is_up_or_it_is_stopped() -> None:
    container = made()
    task = running_task(container)
    assert container.wait_exit(task, 0.01) is None

    stop: list[bool] = []
    waiting = Beside(lambda: container.wait_exit(task, None, lambda: bool(stop)))
    container.wake()
    assert waiting.running
    stop.append(True)
    container.wake()
    assert waiting.answer() is None

    waiting = Beside(lambda: container.wait_exit(task, None))
    container.forget(task)
    assert waiting.answer() is None


def test_waiting_until_an_exit_was_told() -> None:
    container = made()
    task = running_task(container)
    assert not container.wait_reported(task, 0.01)
    waiting = Beside(lambda: container.wait_reported(task, 20))
    container.note_exit(task, FIFTH)
    assert not container.wait_reported(task, 0.01)
    container.claim_report(task)
    assert waiting.answer()


def test_waiting_for_all_execs() -> None:
    container = made()
    running_task(container)
    container.wait_execs(20, never)
    first, second = running_exec(container, "a", 201), running_exec(container, "b", 202)
    waiting = Beside(lambda: container.wait_execs(20, never))
    container.note_exit(first, FIFTH)
    assert waiting.running
    container.forget(second)
    waiting.answer()
    running_exec(container, "c", 203)
    container.wait_execs(0.01, never)
    container.wait_execs(20, lambda: True)


def never() -> bool:
    return False


# -------------------------------------------------------------------------------------------------------------- memories


def test_the_memory_of_exits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_records, "_EXITS_PER_CONTAINER", 10)
    container = made()
    running_task(container)
    for number in range(30):
        process = running_exec(container, f"e{number}", 200 + number)
        container.apply(EventType.EXIT, exit_of(f"e{number}", 200 + number, number))
        container.forget(process)
        container.apply(EventType.EXIT, exit_of("theirs", 1000 + number))
    remembered = [number for number in range(30) if container.last_exit(f"e{number}")]
    assert remembered == list(range(20, 30))
    assert len(container._runs) == 10


def test_the_last_exit_of_a_name_is_the_one_remembered() -> None:
    container = made()
    for code in (1, 2, 3):
        task = running_task(container, 100 + code)
        container.apply(EventType.EXIT, exit_of("web", 100 + code, code))
        container.forget(task)
    assert container.last_exit("init") == ExitStatus(3, WHEN)
    assert container.last_exit("e") is None


# --------------------------------------------------------------------------------------------------------------- the map


def test_an_id_is_reserved_by_one() -> None:
    containers = ContainerMap()
    outcomes = race(*[lambda: containers.reserve("web")] * 8)
    (container,) = [each for each in outcomes if isinstance(each, Container)]
    assert sum(isinstance(each, ConflictError) for each in outcomes) == 7
    assert containers.find("web") is container
    with pytest.raises(NotFoundError, match="no such container"):
        containers.get("web", DOING)

    containers.release(container)
    assert containers.find("web") is None
    assert containers.all() == []
    again = containers.reserve("web")
    again.publish(Bundle("/b", (0, 0)), FACTS)
    containers.publish(again)
    assert containers.get("web", DOING) is again
    assert containers.all() == [again]


def test_a_deleted_container_is_remembered_until_the_next_of_its_id() -> None:
    containers = ContainerMap()
    first = containers.reserve("web")
    first.publish(Bundle("/b", (0, 0)), FACTS)
    containers.publish(first)
    assert containers.deleted("web") is None
    containers.remove(first)
    assert containers.find("web") is None
    assert containers.deleted("web") is first

    failed = containers.reserve("web")
    assert containers.deleted("web") is first, "the next one may still fail"
    containers.release(failed)
    second = containers.reserve("web")
    containers.publish(second)
    assert containers.deleted("web") is None


def test_an_exit_of_a_container_that_was_deleted_is_not_the_next_ones() -> None:
    containers = ContainerMap()
    first = containers.reserve("web")
    first.publish(Bundle("/b", (0, 0)), FACTS)
    task = running_task(first)
    assert first.apply(EventType.EXIT, exit_of("web", 100)) is not None
    first.forget(task)
    containers.remove(first)

    second = containers.reserve("web")
    second.publish(Bundle("/b", (0, 0)), FACTS)
    assert second.apply(EventType.EXIT, exit_of("web", 100)) is None
    assert second.last_exit("init") is None


def test_the_memory_of_deleted_containers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_records, "_CONTAINERS_REMEMBERED", 10)
    containers = ContainerMap()
    for number in range(30):
        containers.remove(containers.reserve(f"c{number}"))
    assert [number for number in range(30) if containers.deleted(f"c{number}")] == list(range(20, 30))


def test_many_threads_on_many_ids() -> None:
    containers = ContainerMap()
    won: Counter[str] = Counter()

    def work() -> None:
        for number in range(100):
            try:
                container = containers.reserve(f"c{number}")
            except ConflictError:
                continue
            won[container.id] += 1

    assert race(*[work] * 4) == [None] * 4
    assert won == Counter({f"c{number}": 1 for number in range(100)})
    assert len(containers.all()) == 100


# ------------------------------------------------------------------------------------------------------ the state machine

_NAMES = ("init", "e")
_Phase = Literal["reserved", "created", "started"]


@dataclass(eq=False)
class Run:
    """One run as containerd has it, and what was told of it."""

    name: str
    pid: int
    process: Process
    phase: _Phase = "reserved"
    ended: bool = False
    known: bool = False
    forgotten: bool = False
    told: int = 0
    begun: bool = False

    @property
    def code(self) -> int:
        return self.pid % 256


class OneContainer(RuleBasedStateMachine):
    """A container's processes come and go; events come late, twice and beside the answers."""

    def __init__(self) -> None:
        super().__init__()
        self.container = made()
        self.runs: list[Run] = []
        self.pids = itertools.count(1000)
        self.oom = False
        self.foreign: Counter[tuple[str, int]] = Counter()

    @initialize()
    def a_task_runs(self) -> None:
        self.reserve("init")
        (run,) = self.runs
        run.phase = "started"
        self.container.advance(run.process, Step.CREATE, run.pid)
        self.container.advance(run.process, Step.START, run.pid)

    def current(self, name: str) -> Run | None:
        return next((run for run in self.runs if run.name == name and not run.forgotten), None)

    def pick(self, data: st.DataObject, *phases: _Phase, ended: bool | None = None) -> Run | None:
        fitting = [
            run
            for run in self.runs
            if not run.forgotten and run.phase in phases and (ended is None or run.ended is ended)
        ]
        return data.draw(st.sampled_from(fitting)) if fitting else None

    def told(self, info: EventInfo | None) -> None:
        """Check an exit that goes to the backend, and count it."""
        if info is None:
            return
        name = "init" if info.process_id == "web" else info.process_id
        (run,) = [run for run in self.runs if (run.name, run.pid) == (name, info.pid)]
        run.told += 1
        assert run.ended
        assert info.exit_code == run.code
        assert info.oom_killed is (self.oom and self.current("init") is not None)

    @rule(name=st.sampled_from(_NAMES))
    def reserve(self, name: str) -> None:
        task = self.current("init")
        try:
            process = self.container.reserve_task() if name == "init" else self.container.reserve_exec(name)
        except (ConflictError, InvalidParameterError) as error:
            if name == "init":
                assert task is not None
            elif isinstance(error, ConflictError):
                assert self.current(name) is not None
            else:
                assert task is None or task.phase == "reserved" or task.known
            return
        assert self.current(name) is None
        self.runs.append(Run(name, next(self.pids), process))
        if name == "init":
            self.oom = False

    @rule(data=st.data(), answered=st.booleans())
    def it_comes_to_run(self, data: st.DataObject, answered: bool) -> None:
        """Create is answered; containerd starts it; the answer of Start comes in, or the event that tells of it."""
        run = self.pick(data, "reserved", "created", "started")
        if run is None:
            return
        if run.phase == "reserved":
            run.phase = "created"
            self.container.advance(run.process, Step.CREATE, run.pid if run.name == "init" else 0)
            return
        run.phase = "started"
        if answered:
            self.container.advance(run.process, Step.START, run.pid)
        elif not run.ended:
            init = run.name == "init"
            info = EventInfo("web", "web" if init else run.name, run.pid)
            told = self.container.apply(EventType.START if init else EventType.EXEC_STARTED, info)
            expected = replace(info, oom_killed=self.oom and self.current("init") is not None)
            assert told == (None if run.begun else expected)
            run.begun = True

    @precondition(lambda self: any(run.forgotten and run.process.pid for run in self.runs))
    @rule()
    def an_old_start_is_told_late(self) -> None:
        run = [run for run in self.runs if run.forgotten and run.process.pid][-1]
        init = run.name == "init"
        info = EventInfo("web", "web" if init else run.name, run.pid)
        self.container.apply(EventType.START if init else EventType.EXEC_STARTED, info)

    @rule(data=st.data())
    def it_ends(self, data: st.DataObject) -> None:
        if run := self.pick(data, "started", ended=False):
            run.ended = True

    @precondition(lambda self: any(run.ended for run in self.runs))
    @rule(data=st.data(), again=st.integers(1, 3))
    def its_exit_is_told(self, data: st.DataObject, again: int) -> None:
        """At any time after it: at once, late, after the run was forgotten, and more than once."""
        run = data.draw(st.sampled_from([run for run in self.runs if run.ended]))
        name = "web" if run.name == "init" else run.name
        for _ in range(again):
            self.told(self.container.apply(EventType.EXIT, exit_of(name, run.pid, run.code)))
        if not run.forgotten:
            run.known = True
            assert run.told == 1

    @rule(data=st.data())
    def its_exit_is_asked_for(self, data: st.DataObject) -> None:
        run = self.pick(data, "started", ended=True)
        if run is not None and run.process.pid:
            self.container.note_exit(run.process, ExitStatus(run.code, WHEN))
            self.told(self.container.claim_report(run.process))
            run.known = True
            assert run.told == 1

    @rule(data=st.data())
    def it_is_forgotten(self, data: st.DataObject) -> None:
        """After its end, or because its start failed."""
        if run := self.pick(data, "reserved", "created", "started"):
            self.container.forget(run.process)
            run.forgotten = True

    @precondition(lambda self: self.current("init") is not None)
    @rule()
    def memory_runs_out(self) -> None:
        self.container.apply(EventType.OOM, EventInfo("web", oom_killed=True))
        self.oom = True

    @rule(name=st.sampled_from(["theirs", "others"]), pid=st.integers(1, 3))
    def somebody_elses_process_ends(self, name: str, pid: int) -> None:
        told = self.container.apply(EventType.EXIT, exit_of(name, pid))
        self.foreign[name, pid] += 1
        assert (told is not None) is (self.foreign[name, pid] == 1)

    @invariant()
    def each_exit_is_told_once_and_to_its_own_run(self) -> None:
        for run in self.runs:
            assert run.told <= 1, f"{run} was told twice"
            if run.known:
                assert run.told == 1
                assert run.process.exit == ExitStatus(run.code, WHEN)
            elif run.process.exit is not None:
                raise AssertionError(f"{run} has somebody's exit")
            assert run.process.pid in (0, run.pid)
            assert self.container.is_gone(run.process) is run.forgotten

    @invariant()
    def the_record_holds_what_is_there(self) -> None:
        there = [run for run in self.runs if not run.forgotten]
        running = {run.process for run in there if run.phase != "reserved" and not run.known}
        assert set(self.container.running()) == running
        for name in _NAMES:
            known = [run for run in self.runs if run.name == name and run.known]
            assert (self.container.last_exit(name) is not None) is bool(known)


OneContainer.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestOneContainer = cast("type[object]", OneContainer.TestCase)


def test_threads_that_reserve_claim_and_forget_leave_an_empty_record() -> None:
    container = made()
    task = running_task(container)
    reports: list[EventInfo] = []

    def live(worker: int) -> None:
        for number in range(60):
            pid = 1000 * (worker + 1) + number
            process = running_exec(container, f"e{worker}", pid)
            heard = container.apply(EventType.EXIT, exit_of(f"e{worker}", pid, worker))
            container.note_exit(process, ExitStatus(worker, WHEN))
            asked = container.claim_report(process)
            reports.extend(each for each in (heard, asked) if each is not None)
            container.forget(process)

    assert race(*[lambda worker=worker: live(worker) for worker in range(4)]) == [None] * 4
    assert container.execs == {}
    assert container.running() == [task]
    assert Counter(info.pid for info in reports).most_common(1)[0][1] == 1
    assert len(reports) == 240


# ---------------------------------------------------------------------------------------------- what the memory can afford


def test_little_is_kept_of_a_deleted_container_and_its_inits_exit_is_part_of_it() -> None:
    containers = ContainerMap()
    container = containers.reserve("web")
    container.publish(Bundle("/run/web", (0, 0)), FACTS)
    task = running_task(container)
    execs = [running_exec(container, f"e{number}", 200 + number) for number in range(100)]
    container.note_exit(task, FIFTH)
    for each in execs:
        container.note_exit(each, FIFTH)
        assert container.claim_report(each)
        container.forget(each)
    assert container.claim_report(task)
    container.forget(task)
    containers.remove(container)

    kept = containers.deleted("web")
    assert kept is not None
    assert kept.last_exit("init") == FIFTH
    assert kept.last_exit("e99") == FIFTH
    assert kept.last_exit("e0") is None
    assert len(kept._exits) == len(kept.runs()) == _records._EXITS_OF_DELETED
    assert kept.bundle is None


def test_the_whole_memory_is_of_thousands_and_not_of_millions() -> None:
    assert _records._CONTAINERS_REMEMBERED * _records._EXITS_OF_DELETED <= 10_000


class RemovingLock:
    """A map's lock that lets another thread remove a container whenever it is given back."""

    def __init__(self, containers: ContainerMap, container: Container) -> None:
        self._lock = containers._lock
        self._containers: ContainerMap | None = containers
        self._container = container

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        containers, self._containers = self._containers, None
        if containers is not None:
            containers.remove(self._container)


def test_an_id_that_is_freed_while_it_is_taken_again_keeps_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    containers = ContainerMap()
    old = containers.reserve("web")
    task = running_task(old)
    assert old.apply(EventType.EXIT, exit_of("web", 100))
    old.forget(task)

    monkeypatch.setattr(containers, "_lock", RemovingLock(containers, old))
    try:
        fresh = containers.reserve("web")
    except ConflictError:
        fresh = containers.reserve("web")
    assert fresh.apply(EventType.EXIT, exit_of("web", 100)) is None, "told already, by the old container"


def test_a_question_is_asked_once_in_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    container = made()
    task, other = running_task(container), running_exec(container)
    assert container.claim_question(task, 5)
    assert not container.claim_question(task, 5)
    assert container.claim_question(other, 5)
    now[0] += 4.9
    assert not container.claim_question(task, 5)
    now[0] += 0.2
    assert container.claim_question(task, 5)


# --------------------------------------------------------------------------------------------------- what is found again


@pytest.mark.parametrize("state", [State.CREATED, State.RUNNING, State.PAUSED])
def test_a_process_that_was_found_is_as_it_was(state: State) -> None:
    container = Container("web")
    task = container.reserve_found("init")
    with pytest.raises(NotFoundError):
        container.require_task(DOING)
    container.adopt(task, state, 100)
    assert container.require_task(DOING) is task
    assert (task.state, task.pid, task.answered) == (state, 100, True)
    assert container.running() == [task]


def test_an_exit_before_the_answer_is_in_the_answer() -> None:
    container = Container("web")
    task, process = container.reserve_found("init"), container.reserve_found("e")
    assert container.apply(EventType.EXIT, exit_of("web", 100)) is None
    assert container.apply(EventType.EXIT, exit_of("e", 200)) is None
    container.adopt(task, State.RUNNING, 100, FIFTH)
    container.adopt(process, State.RUNNING, 200)
    container.note_exit(process, FIFTH)
    assert container.claim_report(task) is None, "it is told by the one who found it"
    told = container.claim_report(process)
    assert told is not None
    assert told.exit_code == 5
    for name, pid in (("web", 100), ("e", 200)):
        assert container.apply(EventType.EXIT, exit_of(name, pid)) is None
    assert container.last_exit("init") == FIFTH
    container.forget(task)
    assert container.apply(EventType.EXIT, exit_of("web", 100)) is None, "late, and of that run"


def test_an_exit_after_the_answer_is_told() -> None:
    container = Container("web")
    task = container.reserve_found("init")
    container.adopt(task, State.PAUSED, 100)
    told = container.apply(EventType.EXIT, exit_of("web", 100, 3))
    assert told is not None
    assert told.exit_code == 3


def test_what_was_not_found_leaves_its_place() -> None:
    container = Container("web")
    for name in ("init", "e"):
        container.forget(container.reserve_found(name))
    container.publish(Bundle("/run/web", (0, 0)), FACTS)
    running_task(container)
    running_exec(container)


def test_an_id_that_is_taken_is_told_by_what_was_wanted() -> None:
    containers = ContainerMap()
    containers.reserve("web")
    with pytest.raises(ConflictError, match="cannot restore container 'web'"):
        containers.reserve("web", "restore")
