"""The end of a process's input: told to containerd until it has heard it, and asked for again where it has not."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
from structlog.testing import capture_logs

from libcontainerd import _stdin
from libcontainerd._events.serial import SerialQueue
from libcontainerd._records import Container, Process, Step
from libcontainerd._stdin import StdinCloser
from libcontainerd._wire.connection import Address, Connection, Deadline
from libcontainerd._wire.pb.services.tasks_pb2 import CloseIORequest
from libcontainerd._wire.pb.types import task_pb2
from libcontainerd.cio.attached import Attached
from libcontainerd.cio.fifo import FifoSet, InputStream
from libcontainerd.errors import SystemFailureError, UnavailableError
from libcontainerd.types import ExitStatus
from tests.unit.beside import DEADLINE, eventually
from tests.unit.server import Process as ServedProcess
from tests.unit.server import Scripted, fail

CLOSE_IO = "Tasks.CloseIO"
UNAVAILABLE, INTERNAL = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL


class Desk:
    """A closer, and a process whose shim has come for its input."""

    def __init__(self, server: Scripted, directory: Path) -> None:
        self.server = server
        self.connection = Connection(Address(server.path, with_credentials=False), namespace="test")
        self.background = SerialQueue("background")
        self.closing = threading.Event()
        self.closer = StdinCloser(self.connection, self.background, self.closing)
        self.container = Container("web")
        self.process: Process = self.container.reserve_task()
        fifos = FifoSet.within(str(directory), "init", with_stdin=True, terminal=False)
        self.attached = Attached.attach(
            lambda dio: dio,
            fifos,
            owner=(0, 0),
            on_stdin_close=lambda stream: self.closer.owner_closed(self.container, self.process, stream),
        )
        self.container.attach(self.process, self.attached)
        self.attached.process_is_there()

    @property
    def stream(self) -> InputStream:
        assert self.attached.direct is not None
        assert self.attached.direct.stdin is not None
        return self.attached.direct.stdin

    def close(self) -> None:
        self.attached.discard()
        self.background.close(DEADLINE)
        self.connection.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shim comes at once or never, and a second try does not take long to come."""
    monkeypatch.setattr(_stdin, "_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(InputStream, "_has_reader", lambda _: True)


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as made:
        made.processes["web", ""] = ServedProcess(1, task_pb2.Status.RUNNING)
        yield made


@pytest.fixture
def desk(server: Scripted, tmp_path: Path) -> Iterator[Desk]:
    made = Desk(server, tmp_path)
    yield made
    made.close()


def test_an_input_that_its_owner_closed_is_ended_although_containerd_was_away(desk: Desk) -> None:
    desk.server.script(CLOSE_IO, *[fail(UNAVAILABLE)] * 3)
    with capture_logs() as logs:
        desk.stream.close()
        assert desk.stream.ended.wait(DEADLINE)
    assert desk.stream.told
    assert logs == []
    desk.closer.close(desk.container, desk.process, Deadline(DEADLINE))
    assert len(desk.server.called(CLOSE_IO)) == 4, "it was told, and is not told again"


def test_a_forked_child_ends_no_input(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)
        desk.closer.owner_closed(desk.container, desk.process, desk.stream)
    assert desk.background.close(DEADLINE) == 0
    assert desk.server.called("Tasks.CloseIO") == []
    assert not desk.stream.ended.is_set()


def test_closing_an_input_whose_end_could_not_be_told_tells_it_then(desk: Desk) -> None:
    desk.server.script(CLOSE_IO, fail(INTERNAL), fail(INTERNAL, "still not"))
    with capture_logs() as logs:
        desk.stream.close()
        assert desk.stream.ended.wait(DEADLINE)
        eventually(lambda: logs, "the log")
    assert [(each["event"], each["container"]) for each in logs] == [("stdin_not_closed", "web")]
    assert not desk.stream.told

    with pytest.raises(SystemFailureError, match="cannot close the stdin of 'init' in container 'web'"):
        desk.closer.close(desk.container, desk.process, Deadline(DEADLINE))
    desk.closer.close(desk.container, desk.process, Deadline(DEADLINE))
    (*_, last) = desk.server.called(CLOSE_IO)
    assert last == CloseIORequest(container_id="web", stdin=True)
    assert len(desk.server.called(CLOSE_IO)) == 3


def test_a_client_that_closes_stops_trying(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stdin, "_RETRY_SECONDS", 3600.0)
    desk.server.script(CLOSE_IO, fail(UNAVAILABLE))
    desk.stream.close()
    desk.server.wait_for(CLOSE_IO)
    with capture_logs() as logs:
        desk.closing.set()
        assert desk.stream.ended.wait(DEADLINE)
    assert not desk.stream.told
    assert logs == [], "who closes the client knows"


def test_an_input_that_nobody_tells_of_in_time_is_given_up(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_stdin, "CLEAN_UP_SECONDS", 0.1)
    desk.server.stop()
    with capture_logs() as logs:
        desk.stream.close()
        assert desk.stream.ended.wait(DEADLINE)
        eventually(lambda: logs, "the log")
    assert [each["event"] for each in logs] == ["stdin_not_closed"]
    with pytest.raises(UnavailableError):
        desk.closer.close(desk.container, desk.process, Deadline(DEADLINE))


def test_the_input_of_what_has_ended_needs_no_end(desk: Desk) -> None:
    desk.container.advance(desk.process, Step.CREATE)
    desk.container.note_exit(desk.process, ExitStatus(0, datetime.now(UTC)))
    desk.server.script(CLOSE_IO, fail(INTERNAL))
    desk.closer.close(desk.container, desk.process, Deadline(DEADLINE))
    assert desk.stream.told


def test_an_input_that_ends_late_closes_nobody_elses(desk: Desk) -> None:
    """The process has ended meanwhile, and another may have its name."""
    desk.container.advance(desk.process, Step.CREATE)
    desk.container.note_exit(desk.process, ExitStatus(0, datetime.now(UTC)))
    desk.stream.close()
    assert desk.stream.ended.wait(DEADLINE)
    assert desk.stream.told
    assert desk.server.called(CLOSE_IO) == []
