"""Clean-up in a containerd that refuses, or is away: it insists, without haste, until its deadline."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import grpc
import pytest
from structlog.testing import capture_logs

from libcontainerd import _cleanup as cleanup
from libcontainerd._records import Container, Process, Step
from libcontainerd._wire.connection import NAMESPACE_HEADER, Address, Deadline
from libcontainerd._wire.pb.services import containers_pb2
from libcontainerd._wire.pb.types import task_pb2
from libcontainerd._wire.shelter import Lease, Shelter
from libcontainerd.errors import DeadlineExceededError
from libcontainerd.types import ExitStatus
from tests.unit.beside import Beside
from tests.unit.server import Process as ServedProcess
from tests.unit.server import Scripted, fail, lose

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
REFUSED = fail(grpc.StatusCode.FAILED_PRECONDITION, "scripted")


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as made:
        yield made


@pytest.fixture
def calls(server: Scripted) -> Iterator[Lease]:
    shelter = Shelter(Address(server.path, with_credentials=False), ((NAMESPACE_HEADER, "test"),))
    with shelter.enter("undo") as lease:
        yield lease
    shelter.close()


@pytest.fixture
def container() -> Container:
    return Container("web")


@pytest.fixture
def task(server: Scripted, container: Container) -> Process:
    server.processes["web", ""] = ServedProcess(7, task_pb2.Status.RUNNING)
    made = container.reserve_task()
    container.advance(made, Step.CREATE, 7)
    container.advance(made, Step.START, 7)
    return made


@pytest.mark.parametrize("method", ["Tasks.Kill", "Tasks.Wait", "Tasks.Delete"])
def test_a_task_is_removed_although_the_connection_broke(
    server: Scripted, calls: Lease, container: Container, task: Process, method: str
) -> None:
    server.script(method, fail(UNAVAILABLE), lose(UNAVAILABLE))
    with capture_logs() as logs:
        cleanup.remove_process(calls, container, task)
    assert server.processes == {}
    assert logs == []


def test_an_exec_is_removed_by_a_containerd_that_comes_back(
    server: Scripted, calls: Lease, container: Container, task: Process
) -> None:
    server.processes["web", "e"] = ServedProcess(8, task_pb2.Status.RUNNING)
    exec_record = container.reserve_exec("e")
    server.script("Tasks.DeleteProcess", fail(UNAVAILABLE), fail(UNAVAILABLE))
    cleanup.remove_process(calls, container, exec_record)
    assert list(server.processes) == [("web", "")]


def test_a_container_is_removed_although_the_connection_broke(server: Scripted, calls: Lease) -> None:
    sent = server.containers["web"] = containers_pb2.Container(id="web", labels={"a": "b"})
    server.script("Containers.Get", fail(UNAVAILABLE))
    server.script("Containers.Delete", fail(UNAVAILABLE), lose(UNAVAILABLE))
    with capture_logs() as logs:
        cleanup.remove_container(calls, sent)
    assert server.containers == {}
    assert logs == []


def test_a_clean_up_that_cannot_be_done_is_given_up_and_said(
    server: Scripted, calls: Lease, container: Container, task: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleanup, "CLEAN_UP_SECONDS", 0.3)
    server.script("Tasks.Kill", *[fail(UNAVAILABLE)] * 1000)
    with capture_logs() as logs:
        Beside(lambda: cleanup.remove_process(calls, container, task)).answer()
    assert [(each["event"], each["container"], each["exec"]) for each in logs] == [
        ("clean_up_failed", "web", "")
    ]
    assert 2 <= len(server.called("Tasks.Kill")) < 15, "again, and not as fast as it goes"


@pytest.mark.parametrize("known", [False, True], ids=["running", "its exit is known"])
def test_a_deletion_that_is_refused_is_repeated_without_haste(
    server: Scripted, calls: Lease, container: Container, task: Process, known: bool
) -> None:
    if known:
        container.note_exit(task, ExitStatus(0, datetime.now(UTC)))
    server.script("Tasks.Kill", *[REFUSED] * 1000)
    server.script("Tasks.Delete", *[REFUSED] * 1000)
    with pytest.raises(DeadlineExceededError):
        cleanup.end_process(calls, container, task, doing="undo", deadline=Deadline(0.4))
    assert 2 <= len(server.called("Tasks.Delete")) < 15
