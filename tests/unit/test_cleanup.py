"""Clean-up in a containerd that refuses, or is away: it insists, without haste, until its deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import grpc
import pytest
from structlog.testing import capture_logs

from libcontainerd import _cleanup as cleanup
from libcontainerd._records import Container, Process, Step
from libcontainerd._wire.connection import NAMESPACE_HEADER, Address, Deadline
from libcontainerd._wire.pb.services import containers_pb2, tasks_pb2
from libcontainerd._wire.pb.types import task_pb2
from libcontainerd._wire.shelter import Lease, Shelter
from libcontainerd.errors import (
    ConflictError,
    DeadlineExceededError,
    SystemFailureError,
    UnavailableError,
)
from libcontainerd.types import ExitStatus
from tests.unit.beside import DEADLINE, Beside
from tests.unit.server import Process as ServedProcess
from tests.unit.server import Scripted, fail, lose
from tests.unit.server import Step as Scripting

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
    monkeypatch.setattr(cleanup, "CLEAN_UP_SECONDS", 2.0)
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
        cleanup.end_process(calls, container, task, doing="undo", deadline=Deadline(2.0))
    assert 2 <= len(server.called("Tasks.Delete")) < 15


# ------------------------------------------------------------------------------------------------------- making a task

SHIM_IN_THE_WAY = fail(
    grpc.StatusCode.UNKNOWN,
    "failed to start shim: mkdir /run/containerd/io.containerd.runtime.v2.task/test/web: file exists: unknown",
)
BUNDLE_IN_THE_WAY = fail(
    grpc.StatusCode.UNKNOWN,
    "mkdir /run/containerd/io.containerd.runtime.v2.task/test/web: file exists",
)
RUNC_IN_THE_WAY = fail(
    grpc.StatusCode.UNKNOWN,
    "OCI runtime create failed: runc create failed: container with given ID already exists: unknown",
)
SHIM_THAT_ENDS = fail(grpc.StatusCode.UNKNOWN, "failed to create shim task: ttrpc: closed: unknown")
SHIM_THAT_HAS_ENDED = fail(
    grpc.StatusCode.UNKNOWN,
    "failed to start shim: start failed: dial unix /run/containerd/s/6a79: connect: connection refused: unknown",
)
TASK_IN_THE_WAY = fail(grpc.StatusCode.ALREADY_EXISTS, "task web: already exists")


def make_task(calls: Lease, cut: threading.Event | None = None, seconds: float = DEADLINE) -> int:
    request = tasks_pb2.CreateTaskRequest(container_id="web")
    return cleanup.make_task(
        calls, request, cut=cut or threading.Event(), doing="start", deadline=Deadline(seconds)
    ).pid


@pytest.mark.parametrize(
    "remains",
    [
        SHIM_IN_THE_WAY,
        BUNDLE_IN_THE_WAY,
        RUNC_IN_THE_WAY,
        SHIM_THAT_ENDS,
        SHIM_THAT_HAS_ENDED,
        TASK_IN_THE_WAY,
    ],
    ids=[
        "a directory",
        "a directory in 2.1's words",
        "runc's state",
        "a shim that ends",
        "a shim's socket",
        "an unseen task",
    ],
)
def test_a_task_is_made_when_the_remains_of_an_earlier_one_are_gone(
    server: Scripted, calls: Lease, remains: Scripting
) -> None:
    server.containers["web"] = containers_pb2.Container(id="web")
    server.script("Tasks.Create", remains, remains, remains)
    assert make_task(calls) > 0
    assert len(server.called("Tasks.Create")) == 4


def test_a_task_that_is_there_is_no_remains(server: Scripted, calls: Lease, task: Process) -> None:
    server.containers["web"] = containers_pb2.Container(id="web")
    with pytest.raises(ConflictError):
        make_task(calls)
    assert len(server.called("Tasks.Create")) == 1


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (fail(grpc.StatusCode.UNKNOWN, "OCI runtime create failed: mkdir: file exists"), SystemFailureError),
        (fail(UNAVAILABLE), UnavailableError),
    ],
)
def test_another_failure_is_told_at_once(
    server: Scripted, calls: Lease, step: Scripting, error: type[Exception]
) -> None:
    server.script("Tasks.Create", step)
    with pytest.raises(error):
        make_task(calls)
    assert len(server.called("Tasks.Create")) == 1


EMPTY_SHIM = fail(grpc.StatusCode.NOT_FOUND, "container not created: not found")


@pytest.mark.parametrize("at_once", [True, False], ids=["may be just being made", "is left"])
def test_a_shim_without_a_task_is_shut_down_after_a_while(
    server: Scripted, calls: Lease, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    monkeypatch.setattr(cleanup, "_EMPTY_SECONDS", 3600.0 if at_once else 0.0)
    server.containers["web"] = containers_pb2.Container(id="web")
    server.script("Tasks.Create", TASK_IN_THE_WAY)
    server.script("Tasks.Get", EMPTY_SHIM)
    assert make_task(calls) > 0
    assert len(server.called("Tasks.Delete")) == (0 if at_once else 1)


def test_remains_that_stay_are_told_in_time(
    server: Scripted, calls: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleanup, "_REMAINS_SECONDS", 2.0)
    server.script("Tasks.Create", *[SHIM_IN_THE_WAY] * 1000)
    with pytest.raises(SystemFailureError, match="file exists"):
        make_task(calls)
    assert 2 <= len(server.called("Tasks.Create")) < 15


def test_close_ends_the_waiting_for_remains(
    server: Scripted, calls: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleanup, "_FIRST_PAUSE_SECONDS", 3600.0)
    monkeypatch.setattr(cleanup, "_REMAINS_SECONDS", 7200.0)
    monkeypatch.setattr(cleanup, "_MOST_PAUSE_SECONDS", 3600.0)
    server.script("Tasks.Create", SHIM_IN_THE_WAY)
    cut = threading.Event()
    making = Beside(lambda: make_task(calls, cut, seconds=7200.0))
    server.wait_for("Tasks.Create")
    cut.set()
    with pytest.raises(SystemFailureError):
        making.answer()


# -------------------------------------------------------------------------------------------------------- stand-ins


def create_container(calls: Lease, cut: threading.Event | None = None, seconds: float = DEADLINE) -> None:
    request = containers_pb2.CreateContainerRequest(container=containers_pb2.Container(id="web"))
    cleanup.make_container(
        calls, request, cut=cut or threading.Event(), doing="create", deadline=Deadline(seconds)
    )


def stand_in(age: float = 0.0) -> containers_pb2.Container:
    made = containers_pb2.Container(id="web", labels={cleanup.STAND_IN_LABEL: "of somebody"})
    made.created_at.seconds = int(time.time() - age)
    return made


def test_an_orphan_is_ended_and_its_stand_in_removed(server: Scripted, calls: Lease) -> None:
    server.processes["web", ""] = ServedProcess(7, task_pb2.Status.RUNNING)
    pids: list[int] = []

    def is_ours(task: task_pb2.Process | None) -> bool:
        assert task is not None
        pids.append(task.pid)
        return True

    assert cleanup.end_orphan(calls, "web", is_ours, doing="end")
    assert pids == [7]
    assert server.processes == {}
    assert server.containers == {}


def test_a_shim_without_a_task_is_told_to_delete_it(server: Scripted, calls: Lease) -> None:
    assert cleanup.end_orphan(calls, "web", lambda task: task is None, doing="end")
    assert len(server.called("Tasks.Delete")) == 1
    assert server.containers == {}


def test_what_is_not_ours_is_left(server: Scripted, calls: Lease) -> None:
    server.processes["web", ""] = ServedProcess(7, task_pb2.Status.RUNNING)
    assert not cleanup.end_orphan(calls, "web", lambda task: False, doing="end")
    assert list(server.processes) == [("web", "")]
    assert server.containers == {}


def test_the_task_of_a_container_is_no_orphan(server: Scripted, calls: Lease) -> None:
    theirs = server.containers["web"] = containers_pb2.Container(id="web")
    server.processes["web", ""] = ServedProcess(7, task_pb2.Status.RUNNING)
    assert not cleanup.end_orphan(calls, "web", lambda task: True, doing="end")
    assert server.containers == {"web": theirs}
    assert list(server.processes) == [("web", "")]


def test_a_stand_in_goes_although_the_answer_got_lost(server: Scripted, calls: Lease) -> None:
    server.script("Containers.Create", lose(UNAVAILABLE))
    with pytest.raises(UnavailableError):
        cleanup.end_orphan(calls, "web", lambda task: True, doing="end")
    assert server.containers == {}
    assert server.called("Tasks.Delete") == []


def test_a_container_is_made_when_the_stand_in_is_gone(server: Scripted, calls: Lease) -> None:
    server.containers["web"] = stand_in()
    making = Beside(lambda: create_container(calls))
    server.wait_for("Containers.Create", 2)
    assert cleanup.is_stand_in(server.containers["web"])
    del server.containers["web"]
    making.answer()
    assert not cleanup.is_stand_in(server.containers["web"])


def test_a_stand_in_that_was_forgotten_is_removed(server: Scripted, calls: Lease) -> None:
    server.containers["web"] = stand_in(age=cleanup.STALE_SECONDS + 10)
    create_container(calls)
    assert not cleanup.is_stand_in(server.containers["web"])


@pytest.mark.parametrize("unknown", [False, True], ids=["a container", "what cannot be asked for"])
def test_a_container_in_the_way_is_told_at_once(server: Scripted, calls: Lease, unknown: bool) -> None:
    server.containers["web"] = containers_pb2.Container(id="web")
    if unknown:
        server.script("Containers.Get", fail(UNAVAILABLE))
    with pytest.raises(ConflictError):
        create_container(calls)
    assert len(server.called("Containers.Create")) == 1


def test_a_container_that_went_away_between_is_made(server: Scripted, calls: Lease) -> None:
    server.script("Containers.Create", fail(grpc.StatusCode.ALREADY_EXISTS))
    create_container(calls)
    assert list(server.containers) == ["web"]


def test_close_ends_the_waiting_for_a_stand_in(server: Scripted, calls: Lease) -> None:
    server.containers["web"] = stand_in()
    cut = threading.Event()
    making = Beside(lambda: create_container(calls, cut))
    server.wait_for("Containers.Get")
    cut.set()
    with pytest.raises(ConflictError):
        making.answer()


def test_a_stand_in_that_stays_is_told_in_time(
    server: Scripted, calls: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleanup, "_STAND_IN_SECONDS", 0.2)
    server.containers["web"] = stand_in()
    with pytest.raises(ConflictError):
        create_container(calls)


def test_a_stand_in_without_a_time_is_not_old(server: Scripted) -> None:
    assert not cleanup.is_stale(containers_pb2.Container(id="web"))
