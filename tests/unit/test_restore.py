"""Restoring from the fake: how much is asked, what comes in between, and what is left when it fails."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message
from structlog.testing import capture_logs

from libcontainerd import (
    CallCancelledError,
    Client,
    ConflictError,
    EventType,
    InvalidParameterError,
    LibcontainerdError,
    NotFoundError,
    Restored,
    SystemFailureError,
    UnavailableError,
    cio,
)
from libcontainerd._events import catchup
from libcontainerd._wire import typeurl
from libcontainerd._wire.pb.events.task_pb2 import TaskExit
from libcontainerd.backends import RecordingBackend
from libcontainerd.testing import FakeContainerd
from tests.leaks import no_leaks_of_ours
from tests.unit.beside import DEADLINE, Beside, eventually, race

SPEC = {"ociVersion": "1.0.2", "process": {"args": ["/bin/true"], "cwd": "/"}, "root": {"path": "/"}}
PROCESS = {"args": ["/bin/true"], "cwd": "/"}


@pytest.fixture
def fake() -> Iterator[FakeContainerd]:
    with FakeContainerd() as made:
        yield made


@pytest.fixture
def backend() -> RecordingBackend:
    return RecordingBackend()


def connect(fake: FakeContainerd, backend: RecordingBackend | None = None) -> Client:
    return Client(
        fake.address, namespace="test", state_dir=fake.state_dir, backend=backend, default_timeout=DEADLINE
    )


@pytest.fixture
def client(fake: FakeContainerd, backend: RecordingBackend) -> Iterator[Client]:
    with connect(fake, backend) as made:
        yield made


def keep(dio: cio.DirectIO) -> cio.IO:
    return dio


def leave(
    fake: FakeContainerd,
    *container_ids: str,
    execs: tuple[str, ...] = (),
    attach_stdio: cio.AttachStdio = cio.null_io,
) -> None:
    """Leave running containers behind."""
    with connect(fake) as earlier:
        for container_id in container_ids:
            earlier.create(container_id, SPEC)
            earlier.start(container_id, attach_stdio=attach_stdio)
            for exec_id in execs:
                earlier.exec(container_id, exec_id, PROCESS, attach_stdio=attach_stdio)


def exits(backend: RecordingBackend) -> list[tuple[str, int]]:
    return [
        (each.info.process_id, each.info.exit_code)
        for each in backend.events()
        if each.event is EventType.EXIT
    ]


def of_exec(exec_id: str) -> Callable[[Message], bool]:
    return lambda request: getattr(request, "exec_id", "") == exec_id


# ------------------------------------------------------------------------------------------------------ how much is asked


def test_many_containers_take_few_calls(fake: FakeContainerd, client: Client) -> None:
    names = [f"c{number}" for number in range(200)]
    leave(fake, *names)
    leave(fake, "with-execs", execs=("a", "b"))
    fake.calls.clear()

    restored = client.restore_all(cio.null_io)

    assert restored.keys() == {*names, "with-execs"}
    assert all(isinstance(each, Restored) and each.alive for each in restored.values())
    fake.calls.wait_for("Tasks/List", 2)
    fake.calls.wait_for("Tasks/Get", 4)
    assert Counter(call.method for call in fake.calls.all()) == {
        "Containers/ListStream": 1,
        "Tasks/List": 2,  # the second by the patrol, after all are in the map
        "Tasks/Get": 4,  # each exec now, and by the patrol
    }


def test_nothing_to_restore(fake: FakeContainerd, client: Client) -> None:
    assert client.restore_all(cio.null_io) == {}


@pytest.mark.parametrize("bad", ["a path", None, 3])
def test_bad_arguments_are_refused_before_anything_is_asked(
    fake: FakeContainerd, client: Client, bad: object
) -> None:
    fake.calls.clear()
    with pytest.raises(InvalidParameterError, match="attach_stdio is a callback"):
        client.restore("c", bad)  # type: ignore[arg-type] # that is the mistake
    with pytest.raises(InvalidParameterError, match="attach_stdio is a callback"):
        client.restore_all(bad)  # type: ignore[arg-type] # that is the mistake
    with pytest.raises(InvalidParameterError, match="container id"):
        client.restore("../c")
    assert fake.calls.all() == []


# ------------------------------------------------------------------------------------------------- what comes in between


def test_an_exit_after_the_answer_is_an_event(
    fake: FakeContainerd, client: Client, backend: RecordingBackend
) -> None:
    leave(fake, "c", attach_stdio=keep)
    asked = fake.hang("Tasks/Get", after=True)
    restoring = Beside(lambda: client.restore("c"))
    asked.wait_hit()
    fake.process("c").exit(5)
    eventually(lambda: fake.published()[-1].topic == "/tasks/exit", "its exit is told")
    asked.release()

    assert restoring.answer().alive

    backend.wait_for(EventType.EXIT, "c")
    assert client.wait("c").code == 5
    assert client.delete_task("c").code == 5
    assert exits(backend) == [("c", 5)]


def test_an_execs_exit_after_the_answer_is_told_once(
    fake: FakeContainerd, client: Client, backend: RecordingBackend
) -> None:
    leave(fake, "c", execs=("e",), attach_stdio=keep)
    asked = fake.hang("Tasks/Get", after=True, where=of_exec("e"))
    restoring = Beside(lambda: client.restore("c"))
    asked.wait_hit()
    fake.process("c", "e").exit(5)
    eventually(lambda: fake.published()[-1].topic == "/tasks/exit", "its exit is told")
    asked.release()

    assert restoring.answer().execs.keys() == {"e"}

    fake.calls.wait_for("Tasks/DeleteProcess")
    assert client.wait("c", "e").code == 5
    assert exits(backend) == [("e", 5)]


def test_an_exit_after_the_list_is_an_event(
    fake: FakeContainerd, client: Client, backend: RecordingBackend
) -> None:
    leave(fake, "c", "d")
    asked = fake.hang("Tasks/List", after=True)
    restoring = Beside(lambda: client.restore_all(cio.null_io))
    asked.wait_hit()
    fake.process("c").exit(5)
    eventually(lambda: fake.published()[-1].topic == "/tasks/exit", "its exit is told")
    asked.release()

    assert {name: each.alive for name, each in restoring.answer().items() if isinstance(each, Restored)} == {
        "c": True,
        "d": True,
    }

    backend.wait_for(EventType.EXIT, "c")
    assert exits(backend) == [("c", 5)]


def test_an_exit_that_is_told_late_is_not_told_again(
    fake: FakeContainerd, client: Client, backend: RecordingBackend
) -> None:
    leave(fake, "c", execs=("e",), attach_stdio=keep)
    fake.process("c", "e").exit(5)
    fake.process("c").exit(6)
    eventually(lambda: fake.published()[-1].topic == "/tasks/exit", "its exit is told")
    told = [each for each in fake.published() if each.topic == "/tasks/exit"]

    assert not client.restore("c").alive
    backend.wait_for(EventType.EXIT, "c", "e")
    for envelope in told:  # as the shim does when containerd was away
        fake.publish("test", envelope.topic, typeurl.unpack(envelope.event, TaskExit))
    client.create("next", SPEC)
    client.start("next")
    backend.wait_for(EventType.START, "next")

    assert exits(backend) == [("e", 5)]
    assert client.delete_task("c").code == 6


def test_a_task_that_the_list_leaves_out_is_asked_for(
    fake: FakeContainerd, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(fake, "c", attach_stdio=keep)
    monkeypatch.setattr(catchup, "ask_for_all", lambda connection, deadline: {})

    (restored,) = client.restore_all(keep).values()

    assert isinstance(restored, Restored)
    assert restored.alive


def test_input_that_was_ended_without_the_shim_being_told(fake: FakeContainerd, client: Client) -> None:
    with connect(fake) as earlier:
        earlier.create("c", SPEC)
        earlier.start("c", with_stdin=True, attach_stdio=keep)
    os.unlink(os.path.join(fake.state_dir, "c", "init-stdin"))
    fake.calls.clear()
    kept: list[cio.DirectIO] = []

    def attach(dio: cio.DirectIO) -> cio.IO:
        kept.append(dio)
        return dio

    client.restore("c", attach)

    fake.calls.wait_for("Tasks/CloseIO")
    assert kept[0].stdin is None


# -------------------------------------------------------------------------------------------------------- when it fails


def test_two_restores_at_once(fake: FakeContainerd, client: Client) -> None:
    leave(fake, "c")

    came = race(lambda: client.restore("c"), lambda: client.restore("c"))

    assert sorted(type(each).__name__ for each in came) == ["ConflictError", "Restored"]


@pytest.mark.parametrize("method", ["Containers/Get", "Tasks/Get", "Tasks/ListPids"])
def test_a_restore_that_gets_no_answer_leaves_no_record(
    fake: FakeContainerd, client: Client, method: str
) -> None:
    leave(fake, "c", execs=("e",), attach_stdio=keep)
    fake.fail(method)
    with no_leaks_of_ours(fake.state_dir):
        with pytest.raises(UnavailableError, match="cannot restore container 'c'"):
            client.restore("c", keep)
        with pytest.raises(NotFoundError):
            client.status("c")

    assert client.restore("c", keep).execs.keys() == {"e"}


def test_an_exec_that_gets_no_answer_spoils_its_container_and_no_other(
    fake: FakeContainerd, client: Client
) -> None:
    leave(fake, "c", "d", execs=("e",), attach_stdio=keep)
    fake.fail(
        "Tasks/Get",
        grpc.StatusCode.UNKNOWN,
        "ttrpc: closed",
        where=lambda request: request.container_id == "c",  # type: ignore[attr-defined] # it is a GetRequest
    )

    results = client.restore_all(keep)

    assert isinstance(results["c"], LibcontainerdError)
    assert isinstance(results["d"], Restored)
    assert client.restore("c", keep).execs.keys() == {"e"}


@pytest.mark.parametrize("method", ["Containers/ListStream", "Tasks/List"])
def test_lists_that_do_not_come_leave_no_record(fake: FakeContainerd, client: Client, method: str) -> None:
    leave(fake, "c", attach_stdio=keep)
    fake.fail(method)
    with no_leaks_of_ours(fake.state_dir), pytest.raises(UnavailableError, match="namespace 'test'"):
        client.restore_all(keep)

    assert client.restore_all(keep).keys() == {"c"}


def test_close_ends_a_restore(fake: FakeContainerd) -> None:
    leave(fake, "c", execs=("e",), attach_stdio=keep)
    with no_leaks_of_ours(fake.state_dir):
        client = connect(fake)
        asked = fake.hang("Tasks/Get", where=of_exec("e"))
        restoring = Beside(lambda: client.restore("c", keep))
        asked.wait_hit()
        client.close()
        with pytest.raises(CallCancelledError):
            restoring.answer()
        asked.release()


def test_an_unstarted_exec_that_cannot_be_deleted(fake: FakeContainerd, client: Client) -> None:
    leave(fake, "c", execs=("e",))
    fake.fail("Tasks/Start", grpc.StatusCode.UNKNOWN, "scripted")
    fake.fail("Tasks/DeleteProcess", grpc.StatusCode.UNKNOWN, "scripted", times=2)
    with connect(fake) as another:
        another.restore("c")
        with capture_logs() as logs, pytest.raises(SystemFailureError):
            another.exec("c", "left", PROCESS, attach_stdio=keep)
        assert [each["event"] for each in logs] == ["clean_up_failed"]
    Path(fake.state_dir, "c", "left-exec").touch()

    with pytest.raises(SystemFailureError):
        client.restore("c")

    assert client.restore("c").execs.keys() == {"e"}
    assert not Path(fake.state_dir, "c", "left-exec").exists()


def test_fifos_that_cannot_be_opened(fake: FakeContainerd, client: Client) -> None:
    leave(fake, "c", attach_stdio=keep)
    bundle = Path(fake.state_dir, "c")
    (bundle / "init-stdout").unlink()
    (bundle / "init-stdout").touch()

    with capture_logs() as logs:
        assert client.restore("c", keep).alive

    assert [(each["event"], each["container"]) for each in logs] == [("stdio_gone", "c")]


def test_what_is_in_use_is_left_out(fake: FakeContainerd, client: Client) -> None:
    leave(fake, "c")
    client.create("ours", SPEC)
    client.restore("c")

    assert client.restore_all(cio.null_io) == {}
    with pytest.raises(ConflictError):
        client.restore("ours")
