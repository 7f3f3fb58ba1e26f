"""What containerd says of a process whose exit event is missing, and what it does not say."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from libcontainerd._events import catchup
from libcontainerd._wire.connection import Address, Connection, Deadline
from libcontainerd._wire.pb.types import task_pb2
from libcontainerd._wire.pb.wellknown_pb2 import Timestamp
from libcontainerd.errors import DeadlineExceededError, LibcontainerdError, NotFoundError, UnavailableError
from libcontainerd.types import ExitStatus, Status
from tests.unit.beside import DEADLINE
from tests.unit.server import EXIT_SECONDS, Held, Process, Scripted, fail

WHEN = datetime.fromtimestamp(EXIT_SECONDS, UTC)


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as made:
        yield made


@pytest.fixture
def connection(server: Scripted) -> Iterator[Connection]:
    made = Connection(Address(server.path, with_credentials=False), namespace="test")
    yield made
    made.close()


def ask(
    connection: Connection, exec_id: str = "", seconds: float = DEADLINE, pid: int = 0
) -> tuple[ExitStatus, int] | None:
    return catchup.ask(connection, "web", exec_id, doing="ask for it", deadline=Deadline(seconds), pid=pid)


def is_now(moment: datetime) -> bool:
    return timedelta(0) <= datetime.now(UTC) - moment < timedelta(minutes=1)


@pytest.mark.parametrize("exec_id", ["", "e"])
def test_a_process_that_has_ended_says_how(server: Scripted, connection: Connection, exec_id: str) -> None:
    server.processes["web", exec_id] = Process(1234, task_pb2.Status.STOPPED, 5)
    assert ask(connection, exec_id) == (ExitStatus(5, WHEN), 1234)


@pytest.mark.parametrize("status", set(task_pb2.Status.values()) - {task_pb2.Status.STOPPED})
def test_a_process_that_has_not_ended_is_no_exit(
    server: Scripted, connection: Connection, status: int
) -> None:
    server.processes["web", ""] = Process(1234, status)
    assert ask(connection) is None


def test_a_process_that_containerd_no_longer_knows_has_ended_somehow(connection: Connection) -> None:
    answer = ask(connection)
    assert answer is not None
    (code, exited_at, error), pid = answer
    assert (code, pid) == (255, 0)
    assert is_now(exited_at)
    assert isinstance(error, NotFoundError)


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN]
)
def test_no_answer_is_no_exit(server: Scripted, connection: Connection, code: grpc.StatusCode) -> None:
    server.script("Tasks.Get", fail(code))
    with pytest.raises(LibcontainerdError, match="cannot ask for it"):
        ask(connection)


def test_what_runs_under_another_pid_is_another(server: Scripted, connection: Connection) -> None:
    served = server.processes["web", ""] = Process(1234, task_pb2.Status.RUNNING)
    assert ask(connection, pid=1234) is None
    answer = ask(connection, pid=1233)
    assert answer is not None
    (code, _, error), pid = answer
    assert (code, pid) == (255, 0)
    assert isinstance(error, NotFoundError)

    served.status, served.code = task_pb2.Status.STOPPED, 5
    # What has ended need not have its pid any more.
    assert ask(connection, pid=1233) == (ExitStatus(5, WHEN), 1234)
    served.status = task_pb2.Status.UNKNOWN
    assert ask(connection, pid=1233) is None
    served.status, served.pid = task_pb2.Status.RUNNING, 0
    assert ask(connection, pid=1233) is None


def test_one_answer_tells_of_all_inits(server: Scripted, connection: Connection) -> None:
    assert catchup.ask_for_all(connection, Deadline(DEADLINE)) == {}
    server.processes["web", ""] = Process(1, task_pb2.Status.PAUSED)
    server.processes["web", "e"] = Process(2, task_pb2.Status.RUNNING)
    server.processes["db", ""] = Process(3, task_pb2.Status.STOPPED, 5)
    answer = catchup.ask_for_all(connection, Deadline(DEADLINE))
    assert {name: (task.pid, task.status, task.exit_status) for name, task in answer.items()} == {
        "web": (1, task_pb2.Status.PAUSED, 0),
        "db": (3, task_pb2.Status.STOPPED, 5),
    }
    server.script("Tasks.List", fail(grpc.StatusCode.UNAVAILABLE))
    with pytest.raises(UnavailableError, match="cannot list the tasks of namespace 'test'"):
        catchup.ask_for_all(connection, Deadline(DEADLINE))


def test_a_question_has_a_deadline(server: Scripted, connection: Connection) -> None:
    server.script("Tasks.Get", Held())
    with pytest.raises(DeadlineExceededError):
        ask(connection, seconds=0.1)


def test_a_containerd_that_is_gone_is_no_exit(server: Scripted, connection: Connection) -> None:
    server.stop()
    with pytest.raises(UnavailableError):
        ask(connection, seconds=5)


def test_a_time_that_is_not_told_is_now() -> None:
    assert catchup.exit_status(3, Timestamp(seconds=EXIT_SECONDS)) == ExitStatus(3, WHEN)
    for absurd in (Timestamp(seconds=-62135596800), Timestamp(seconds=2**62)):
        assert is_now(catchup.exit_status(3, absurd).exited_at)


def test_an_unknown_exit_says_why() -> None:
    reason = RuntimeError("why")
    assert catchup.unknown_exit(reason)[::2] == (255, reason)


def test_every_state_has_its_word() -> None:
    words = {
        name: catchup.status_of(task_pb2.Process(status=number)) for name, number in task_pb2.Status.items()
    }
    assert words == {
        "UNKNOWN": Status.UNKNOWN,
        "CREATED": Status.CREATED,
        "RUNNING": Status.RUNNING,
        "STOPPED": Status.STOPPED,
        "PAUSED": Status.PAUSED,
        "PAUSING": Status.PAUSING,
    }
    assert catchup.status_of(task_pb2.Process(status=99)) is Status.UNKNOWN
