"""Delivery: what follows from events and from their absence, in the way of nobody and heard by `close`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import structlog

from libcontainerd import cio
from libcontainerd._events import delivery as delivery_module
from libcontainerd._records import Container, Process, Step
from libcontainerd._wire import typeurl
from libcontainerd._wire.pb.events import task_pb2 as task_events
from libcontainerd._wire.pb.types import task_pb2
from libcontainerd._wire.pb.wellknown_pb2 import Any
from libcontainerd.cio.attached import Attached
from tests.unit.beside import DEADLINE, Beside, eventually
from tests.unit.events.office import Office
from tests.unit.server import Process as ServedProcess
from tests.unit.server import Scripted


class UsersIO:
    """An IO of the user's own, that notes how it is driven."""

    def __init__(self, dio: cio.DirectIO) -> None:
        self.dio = dio
        self.calls: list[str] = []

    def cancel(self) -> None:
        self.calls.append("cancel")

    def wait(self) -> None:
        self.calls.append("wait")

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery_module, "_RETRY_SECONDS", 0.02)
    monkeypatch.setattr(delivery_module, "_FIRST_LOOK_SECONDS", 0.01)


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as made:
        yield made


@pytest.fixture
def office(server: Scripted, tmp_path: Path) -> Iterator[Office]:
    made = Office(server, tmp_path)
    yield made
    made.close()


# ------------------------------------------------------------------------------------------------------- without events


def test_what_is_being_started_is_not_asked_for_until_that_is_over(office: Office, server: Scripted) -> None:
    container, _ = office.run("web")
    undone = container.reserve_exec(
        "undone"
    )  # containerd no longer knows it, and its start has not come back yet
    container.advance(undone, Step.CREATE)
    assert not office.delivery.look(container, undone, grace=False)
    assert server.called("Tasks.Get") == []

    container.forget(undone)
    container.made(undone)
    assert office.delivery.look(container, undone, grace=False)
    eventually(lambda: len(server.called("Tasks.Get")) == 1, "the question")
    assert undone.exit is None
    assert office.exits == []


def test_close_is_heard_by_who_looks_for_execs(
    office: Office, server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery_module, "_FIRST_LOOK_SECONDS", 3600.0)
    container, init = office.run("web")
    office.exec(container, "e")
    office.tell_exit(container, init)
    eventually(lambda: office.exits, "init's exit")

    def close() -> int:
        office.delivery.close(DEADLINE)
        return office.background.close(DEADLINE / 2)

    assert Beside(close).answer(DEADLINE / 2) == 0, "nothing is under way any more"


def test_execs_are_looked_for_as_long_as_it_takes(
    office: Office, server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery_module, "_MOST_LOOK_SECONDS", 0.01)
    container, init = office.run("web")
    office.exec(container, "e")
    office.tell_exit(container, init)
    server.wait_for("Tasks.Get", 20)
    server.exit("web", "e", 4, told=False)
    eventually(lambda: ("e", 4) in office.exits, "the exec's exit")


# ---------------------------------------------------------------------------------------------------- the reading thread


def test_nothing_is_logged_on_the_thread_that_reads(server: Scripted, tmp_path: Path) -> None:
    logged: list[tuple[str, str]] = []
    go_on = threading.Event()

    def note(_logger: object, _level: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        logged.append((threading.current_thread().name, event["event"]))
        go_on.wait(DEADLINE)  # as a full pipe behind a log would
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[note])
    office = Office(server, tmp_path)
    try:
        garbage = Any(type_url="containerd.events.TaskExit", value=b"\xff\xff")
        foreign = task_events.TaskExit(container_id="nobody", id="nobody", pid=1)
        container, init = office.run("web")

        def read() -> str:
            office.tell("/tasks/exit", garbage)
            office.tell("/tasks/exit", foreign)
            office.tell("/tasks/new", Any(type_url="containerd.events.TaskNew"))
            office.tell_exit(container, init, 5)
            office.tell_exit(container, init, 5)
            return threading.current_thread().name

        reader = Beside(read).answer()
        eventually(lambda: office.exits == [("web", 5)], "the exit")
        eventually(lambda: logged, "the log")
        go_on.set()
        eventually(lambda: len(logged) == 2, "the second line")
        assert [event for _, event in logged] == ["event_malformed", "event_ignored"]
        assert reader not in [name for name, _ in logged]
    finally:
        go_on.set()
        office.close()
        structlog.configure(**before)


def test_a_flood_of_malformed_events_is_counted_and_not_kept(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    class Log:
        def warning(self, event: str, *, error: str, events: int) -> None:
            begun.set()
            go_on.wait(DEADLINE)
            logged.append(events)

    monkeypatch.setattr(office.delivery, "_log", Log())
    backlogs: list[int] = []
    monkeypatch.setattr(office.delivery._queue, "_on_backlog", lambda _key, length: backlogs.append(length))
    garbage = Any(type_url="containerd.events.TaskExit", value=b"\xff\xff")
    try:
        office.tell("/tasks/exit", garbage)
        assert begun.wait(DEADLINE)
        for _ in range(20_000):
            office.tell("/tasks/exit", garbage)
    finally:
        go_on.set()
    eventually(lambda: sum(logged) == 20_001, "all are counted")
    assert logged == [1, 20_000]
    assert backlogs == []


def test_a_backlog_is_not_logged_on_the_thread_that_appends(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    class Log:
        def warning(self, event: str, **_: object) -> None:
            threads.append(f"{event} {threading.current_thread().name}")

    monkeypatch.setattr(office.delivery, "_log", Log())
    office.delivery._report_backlog("web", 1000)
    eventually(lambda: threads, "the log")
    assert threads[0].startswith("events_pile_up ")
    assert not threads[0].endswith(threading.current_thread().name)


# ----------------------------------------------------------------------------------------------------------- its end


def test_an_exec_is_forgotten_whatever_its_end_brings(
    office: Office, server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    container, _ = office.run("web")

    def explode(*_: object, **__: object) -> bool:
        raise OSError(24, "too many open files")

    for broken in ("drain", "_delete_exec", "finish"):
        process = office.exec(container, "e")
        server.processes["web", "e"].status = task_pb2.Status.STOPPED
        with monkeypatch.context() as patched:
            patched.setattr(office.delivery, broken, explode)
            office.tell_exit(container, process)
            eventually(partial(container.is_gone, process), f"the exec is forgotten although {broken} fails")
    container.reserve_exec("e")


def test_an_exec_is_not_deleted_before_its_start_was_answered(office: Office, server: Scripted) -> None:
    container, _ = office.run("web")
    process = container.reserve_exec("e")
    server.processes["web", "e"] = ServedProcess(99, task_pb2.Status.STOPPED)
    container.advance(process, Step.CREATE)
    office.tell("/tasks/exec-started", _started("web", "e", 99))
    process.pid = 99
    office.tell_exit(container, process, 3)
    eventually(lambda: office.exits == [("e", 3)], "its exit is told")
    removal = Beside(lambda: container.claim_removal(process, 0.1))
    assert removal.answer() is False
    assert server.called("Tasks.DeleteProcess") == []

    container.made(process)
    eventually(partial(container.is_gone, process), "its deletion")
    assert len(server.called("Tasks.DeleteProcess")) == 1


def test_an_exec_of_a_deleted_container_does_not_take_the_next_ones_with_it(
    office: Office, server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    container, init = office.run("web")
    process = office.exec(container, "e")
    begun, go_on = threading.Event(), threading.Event()

    def slow_reader(*_: object, **__: object) -> bool:
        begun.set()
        return go_on.wait(DEADLINE)

    monkeypatch.setattr(office.delivery, "drain", slow_reader)
    office.tell_exit(container, process)
    assert begun.wait(DEADLINE)
    container.forget(init)
    office.containers.remove(container)

    again, _ = office.run("web")
    office.exec(again, "e")
    go_on.set()
    eventually(partial(container.is_gone, process), "the old one is forgotten")
    assert server.called("Tasks.DeleteProcess") == []
    assert ("web", "e") in server.processes


def _started(container_id: str, exec_id: str, pid: int) -> Any:
    return typeurl.pack(task_events.TaskExecStarted(container_id=container_id, exec_id=exec_id, pid=pid))


def unread(office: Office, container: Container, process: Process) -> tuple[Attached, UsersIO]:
    """Give a process the user's own IO, and output that nobody has read yet."""
    ios: list[UsersIO] = []

    def attach(dio: cio.DirectIO) -> UsersIO:
        ios.append(UsersIO(dio))
        return ios[0]

    attached = office.attach(container, process, attach)
    for path in (attached.stdout, attached.stderr):
        fd = os.open(path, os.O_WRONLY)
        os.write(fd, b"unread")
        os.close(fd)
    return attached, ios[0]


def test_an_io_whose_reader_is_stuck_is_closed_with_the_client(office: Office) -> None:
    container, init = office.run("web")
    _, io = unread(office, container, init)
    office.delivery.finish(container, init, drained=False)
    container.forget(init)
    assert io.calls == []
    assert io.dio.stdout.read(3) == b"unr", "what is left may still be read"
    office.delivery.shut_leftovers()
    assert io.calls == ["cancel", "close"]
    office.delivery.shut_leftovers()
    assert io.calls == ["cancel", "close"]
    assert io.dio.stdout.read(3) == b""


def test_an_io_whose_reader_came_to_the_end_after_all_is_closed_at_the_next_occasion(office: Office) -> None:
    container, init = office.run("web")
    _, late = unread(office, container, init)
    office.delivery.finish(container, init, drained=False)
    for stream in late.dio.outputs:
        assert stream.read() == b"unread"

    _, other = office.run("other")
    _, stuck = unread(office, container, other)
    office.delivery.finish(container, other, drained=False)
    assert late.calls == ["cancel", "close"]
    assert stuck.calls == []
    office.delivery.shut_leftovers()
    assert late.calls == ["cancel", "close"], "once"
    assert stuck.calls == ["cancel", "close"]
