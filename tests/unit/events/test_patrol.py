"""The patrol: what records and containerd say of the same processes, and what is delivered where they differ."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from libcontainerd._events import patrol as patrol_module
from libcontainerd._records import Container, State, Step
from libcontainerd._wire.pb.events import task_pb2 as task_events
from libcontainerd._wire.pb.types import task_pb2
from libcontainerd.errors import NotFoundError
from libcontainerd.types import EventType
from tests.unit.beside import DEADLINE, Beside, eventually
from tests.unit.events.office import Office
from tests.unit.server import Context, Held, Scripted, fail
from tests.unit.server import Process as ServedProcess

LIST, GET = "Tasks.List", "Tasks.Get"
FREEZES = [EventType.PAUSED, EventType.RESUMED]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patrol_module, "_LATE_EVENT_SECONDS", 0.02)
    monkeypatch.setattr(patrol_module, "_FIRST_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(patrol_module, "_DOUBT_SECONDS", 0.02)


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as made:
        yield made


@pytest.fixture
def office(server: Scripted, tmp_path: Path) -> Iterator[Office]:
    made = Office(server, tmp_path)
    yield made
    made.close()


def caught_up(office: Office) -> None:
    """Catch up, and wait until that is over: the queue of its key is in order."""
    office.patrol.catch_up()
    done = threading.Event()
    assert office.background.append(("", "catch-up"), done.set)
    assert done.wait(DEADLINE)


def freezes(office: Office) -> list[EventType]:
    return [event for event, _ in list(office.events) if event in FREEZES]


# ------------------------------------------------------------------------------------------------------------ after a gap


def test_one_question_is_enough_for_all_inits(office: Office, server: Scripted) -> None:
    names = [f"c{number}" for number in range(200)]
    for name in names:
        office.run(name)
    for name in names[::2]:
        server.exit(name, code=5, told=False)

    caught_up(office)

    eventually(lambda: len(office.exits) == 100, "the exits")
    assert sorted(office.exits) == sorted((name, 5) for name in names[::2])
    assert len(server.called(LIST)) == 1
    assert server.called(GET) == []


def test_nothing_is_asked_where_nothing_runs(office: Office, server: Scripted) -> None:
    container, init = office.run("web")
    office.tell_exit(container, init)

    caught_up(office)
    assert server.called(LIST) == []

    office.patrol.look_round()
    assert len(server.called(LIST)) == 1, "for strays"


def test_an_exec_without_an_answer_holds_nobody_up(office: Office, server: Scripted) -> None:
    container, _ = office.run("web")
    for name, code in (("a", 3), ("b", 4)):
        office.exec(container, name)
        server.exit("web", name, code, told=False)
    office.exec(container, "goes-on")
    server.exit("web", code=5, told=False)
    server.script(GET, *[fail(grpc.StatusCode.UNAVAILABLE)] * 2)

    office.patrol.catch_up()

    eventually(lambda: len(office.exits) == 3, "the exits")
    assert sorted(office.exits) == [("a", 3), ("b", 4), ("web", 5)]
    assert office.exits[0] == ("web", 5)


def test_the_ends_of_execs_come_first(office: Office, server: Scripted) -> None:
    container, _ = office.run("web")
    office.exec(container, "e")
    server.exit("web", "e", 3, told=False)
    server.exit("web", code=5, told=False)

    office.patrol.catch_up()

    eventually(lambda: office.exits == [("e", 3), ("web", 5)], "the exits, in this order")


def test_what_containerd_no_longer_knows_has_ended_somehow(office: Office, server: Scripted) -> None:
    container, init = office.run("web")
    process = office.exec(container, "e")
    server.processes.clear()

    office.patrol.catch_up()

    eventually(lambda: len(office.exits) == 2, "the exits")
    assert sorted(office.exits) == [("e", 255), ("web", 255)]
    for each in (init, process):
        assert each.exit is not None
        assert isinstance(each.exit.error, NotFoundError)


def test_a_task_that_the_list_leaves_out_is_asked_for(office: Office, server: Scripted) -> None:
    office.run("web")
    office.run("other")
    hidden = server.processes["web", ""]
    hidden.status = task_pb2.Status.UNKNOWN  # what containerd says while a shim does not answer

    caught_up(office)
    server.wait_for(GET)
    office.run("third")
    caught_up(office)

    assert office.exits == []


def test_another_process_of_that_name_is_another(office: Office, server: Scripted) -> None:
    container, init = office.run("web")
    office.exec(container, "e")
    for key in list(server.processes):
        server.processes[key] = ServedProcess(server.new_pid(), task_pb2.Status.RUNNING)

    office.patrol.catch_up()

    eventually(lambda: len(office.exits) == 2, "the exits")
    assert sorted(office.exits) == [("e", 255), ("web", 255)]
    assert init.exit is not None
    assert "another process has its name" in str(init.exit.error)


def test_the_question_is_repeated_until_it_is_answered(office: Office, server: Scripted) -> None:
    office.run("web")
    server.exit("web", code=5, told=False)
    server.script(LIST, *[fail(code) for code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN)] * 2)

    office.patrol.catch_up()

    eventually(lambda: office.exits == [("web", 5)], "the exit")
    assert len(server.called(LIST)) == 5


def test_close_is_heard_by_who_asks_again(
    office: Office, server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patrol_module, "_FIRST_RETRY_SECONDS", 3600.0)
    monkeypatch.setattr(patrol_module, "_MOST_RETRY_SECONDS", 3600.0)
    office.run("web")
    server.script(LIST, fail(grpc.StatusCode.UNAVAILABLE))
    office.patrol.catch_up()
    server.wait_for(LIST)
    office.patrol.stop()

    assert Beside(lambda: office.background.close(DEADLINE / 2)).answer() == 0


def test_close_is_heard_by_who_is_in_doubt(
    office: Office, server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patrol_module, "_DOUBT_SECONDS", 3600.0)
    container, _ = office.run("web")
    office.exec(container, "e")
    server.script(GET, fail(grpc.StatusCode.UNAVAILABLE))
    office.patrol.catch_up()
    server.wait_for(GET)
    office.patrol.stop()

    assert Beside(lambda: office.background.close(DEADLINE / 2)).answer() == 0


def test_a_container_that_hangs_keeps_no_other_from_catching_up(office: Office, server: Scripted) -> None:
    container, _ = office.run("hung")
    office.exec(container, "e")
    held = Held()
    server.script(GET, held)
    office.patrol.catch_up()
    assert held.begun.wait(DEADLINE)

    for name in ("a", "b"):
        other, _ = office.run(name)
        office.exec(other, "e")
        server.exit(name, "e", code=5, told=False)
        server.exit(name, code=6, told=False)
    office.patrol.catch_up()
    eventually(lambda: len(office.exits) == 4, "the exits of the others")
    assert sorted(office.exits) == [("a", 6), ("b", 6), ("e", 5), ("e", 5)]
    assert not held.cut.is_set()
    held.release()


def making(office: Office, name: str) -> Container:
    """A container whose init was made, and is just being started by a thread."""
    container, init = office.run(name)
    init.making = True
    return container


def test_what_is_being_started_is_asked_for_when_that_is_over(office: Office, server: Scripted) -> None:
    container = making(office, "web")
    process = container.reserve_exec("e")
    server.exit("web", code=5, told=False)
    caught_up(office)
    server.wait_for(LIST)
    assert office.exits == []
    assert server.called(GET) == []
    assert process.state is State.RESERVED

    init = container.require_task("look at it")
    container.made(init)

    eventually(lambda: office.exits == [("web", 5)], "the exit that fell in the gap")


def test_a_process_that_is_made_while_the_answer_is_on_its_way_goes_on(
    office: Office, server: Scripted
) -> None:
    office.run("first")
    held = Held(first=True)
    server.script(LIST, held)
    office.patrol.catch_up()
    assert held.begun.wait(DEADLINE)
    office.run("second")
    held.release()
    caught_up(office)

    assert office.exits == []


# ------------------------------------------------------------------------------------------------------ frozen, thawed


def test_a_freeze_and_a_thaw_that_were_missed_are_told(office: Office, server: Scripted) -> None:
    container, _ = office.run("web")
    server.processes["web", ""].status = task_pb2.Status.PAUSED
    caught_up(office)
    eventually(lambda: freezes(office) == [EventType.PAUSED], "the freeze")
    assert container.is_paused()
    caught_up(office)

    server.processes["web", ""].status = task_pb2.Status.RUNNING
    caught_up(office)
    eventually(lambda: freezes(office) == FREEZES, "the thaw, and the freeze once")
    assert not container.is_paused()
    assert [info.container_id for event, info in office.events if event in FREEZES] == ["web", "web"]


def test_a_freeze_is_told_once_although_its_event_comes_late(office: Office, server: Scripted) -> None:
    container, _ = office.run("web")
    server.processes["web", ""].status = task_pb2.Status.PAUSED
    caught_up(office)

    office.tell_task(task_events.TaskPaused(container_id="web"))
    office.tell_task(task_events.TaskResumed(container_id="web"))
    office.tell_task(task_events.TaskResumed(container_id="web"))

    eventually(lambda: freezes(office) == FREEZES, "each once")
    assert not container.is_paused()


def test_what_was_told_since_is_newer_than_the_answer(office: Office, server: Scripted) -> None:
    container, _ = office.run("web")

    def meanwhile(context: Context, go_on: object) -> object:
        server.processes["web", ""].status = task_pb2.Status.PAUSED
        answer = go_on()  # type: ignore[operator]
        office.tell_task(task_events.TaskPaused(container_id="web"))
        office.tell_task(task_events.TaskResumed(container_id="web"))
        server.processes["web", ""].status = task_pb2.Status.RUNNING
        return answer

    server.script(LIST, meanwhile)  # type: ignore[arg-type]
    caught_up(office)

    eventually(lambda: freezes(office) == FREEZES, "what the events have told")
    office.patrol.look_round()
    assert not container.is_paused()
    assert freezes(office) == FREEZES


def test_a_task_that_was_only_made_is_not_thawed(office: Office, server: Scripted) -> None:
    container, _ = office.run("other")
    made = office.containers.reserve("made")
    init = made.reserve_task()
    made.advance(init, Step.CREATE, 7)
    made.made(init)
    server.processes["made", ""] = ServedProcess(7, task_pb2.Status.CREATED)
    caught_up(office)
    server.processes["made", ""].status = task_pb2.Status.RUNNING
    caught_up(office)

    assert office.events == []
    assert init.state is State.CREATED
    assert not container.is_paused()


# ---------------------------------------------------------------------------------------------------------- once a minute


def test_an_exit_whose_event_got_lost_is_found(office: Office, server: Scripted) -> None:
    container, _ = office.run("web")
    office.run("goes-on")
    office.exec(container, "e")
    office.exec(container, "goes-on")
    server.exit("web", "e", 4, told=False)

    office.patrol.look_round()
    eventually(lambda: office.exits == [("e", 4)], "the exec's exit")
    server.exit("web", "goes-on", 3, told=False)
    server.exit("web", code=5, told=False)
    office.patrol.look_round()
    eventually(lambda: len(office.exits) == 3, "the others'")
    office.patrol.look_round()

    assert office.exits == [("e", 4), ("goes-on", 3), ("web", 5)]


def test_what_seems_over_is_looked_at_twice(office: Office, server: Scripted) -> None:
    container, _ = office.run("web")
    office.exec(container, "e")
    processes = dict(server.processes)
    server.processes.clear()

    def back(context: Context, go_on: object) -> object:
        server.processes.update(processes)
        return go_on()  # type: ignore[operator]

    server.script(GET, lambda context, go_on: go_on(), back)  # type: ignore[arg-type]
    office.patrol.look_round()

    assert len(server.called(GET)) == 3, "one exec at first, and then both"
    assert office.exits == []


def test_an_event_that_is_merely_late_is_waited_for(
    office: Office, server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    container, init = office.run("web")
    server.processes.clear()
    waited: list[float] = []

    def told_meanwhile(seconds: float) -> bool:
        waited.append(seconds)
        office.tell_exit(container, init, 137)
        return False

    monkeypatch.setattr(office.patrol._closing, "wait", told_meanwhile)
    office.patrol.look_round()

    assert waited == [patrol_module._LATE_EVENT_SECONDS]
    assert server.called(GET) == []
    eventually(lambda: office.exits == [("web", 137)], "the event's code")


def test_a_round_without_an_answer_finds_nothing(office: Office, server: Scripted) -> None:
    container, _ = office.run("web")
    office.exec(container, "e")
    server.exit("web", "e", 4, told=False)
    server.exit("web", code=5, told=False)
    server.script(LIST, fail(grpc.StatusCode.UNAVAILABLE))
    office.patrol.look_round()
    assert office.exits == []

    server.processes["web", ""].status = task_pb2.Status.RUNNING
    server.script(GET, fail(grpc.StatusCode.UNAVAILABLE))
    office.patrol.look_round()
    assert office.exits == []


def test_what_is_being_started_is_no_concern_of_the_patrols(office: Office, server: Scripted) -> None:
    container = making(office, "web")
    process = office.exec(container, "e")
    process.making = True
    server.processes.clear()
    office.patrol.look_round()

    assert server.called(GET) == []
    assert office.exits == []


def test_it_goes_round_by_itself_whatever_a_round_brings(
    office: Office, server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patrol_module, "_INTERVAL_SECONDS", 0.01)
    rounds: list[str] = []
    look_round = office.patrol.look_round

    def fail_first() -> None:
        rounds.append("round")
        if len(rounds) == 1:
            raise RuntimeError("a mistake")
        look_round()

    monkeypatch.setattr(office.patrol, "look_round", fail_first)
    office.run("web")
    server.exit("web", code=5, told=False)
    office.patrol.start()

    eventually(lambda: office.exits == [("web", 5)], "the exit")
    assert len(rounds) > 1


def test_close_is_heard_by_the_patrol(
    office: Office, server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patrol_module, "_LATE_EVENT_SECONDS", 3600.0)
    monkeypatch.setattr(patrol_module, "_INTERVAL_SECONDS", 0.01)
    office.run("web")
    server.exit("web", code=5, told=False)
    office.patrol.start()
    server.wait_for(LIST)
    office.patrol.stop()

    Beside(lambda: office.patrol.join(DEADLINE)).answer()
    assert not [each for each in threading.enumerate() if each.name.startswith("libcontainerd-patrol")]
    assert office.exits == []
