"""The client against a scripted containerd: what it undoes, what it finds out, and what it tells, when things go wrong."""

from __future__ import annotations

import errno
import gc
import math
import os
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import grpc
import pytest
from google.protobuf.message import Message
from structlog.testing import capture_logs

from libcontainerd import Client, cio, oci
from libcontainerd import client as client_module
from libcontainerd._bundle import BUNDLE_LABEL, Bundle
from libcontainerd._events import delivery
from libcontainerd._records import Container
from libcontainerd._records import Process as Record
from libcontainerd._wire import typeurl
from libcontainerd._wire.pb import wellknown_pb2
from libcontainerd._wire.pb.events import task_pb2 as task_events
from libcontainerd._wire.pb.runc.options_pb2 import CheckpointOptions, Options
from libcontainerd._wire.pb.services import containers_pb2, tasks_pb2
from libcontainerd._wire.pb.types import event_pb2, task_pb2
from libcontainerd.cio.attached import Attached
from libcontainerd.errors import (
    CallCancelledError,
    ConflictError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidParameterError,
    LibcontainerdError,
    NotFoundError,
    NotImplementedByServerError,
    SystemFailureError,
    UnavailableError,
)
from libcontainerd.types import EventInfo, EventType, ExitStatus, Status, Summary, Version
from tests.unit.beside import DEADLINE, Beside, eventually, race
from tests.unit.server import Context, Held, Process, Scripted, fail, lose

SPEC = {"ociVersion": "1.0.2", "process": {"args": ["/bin/true"], "cwd": "/"}, "root": {"path": "rootfs"}}
PROCESS = {"args": ["/bin/true"], "cwd": "/"}
_T = TypeVar("_T")

UNAVAILABLE, UNKNOWN, INTERNAL = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
)


class Recorder:
    """A backend that remembers, and does what a test wants on top."""

    def __init__(self) -> None:
        self.events: list[tuple[EventType, EventInfo]] = []
        self.then: Callable[[EventType, EventInfo], object] = lambda event, info: None

    def process_event(self, container_id: str, event: EventType, info: EventInfo) -> None:
        assert container_id == info.container_id
        self.events.append((event, info))
        self.then(event, info)

    def last(self) -> EventType | None:
        """Return the last event's type."""
        return self.events[-1][0] if self.events else None

    def exits(self, process_id: str = "web") -> list[int]:
        """Return the codes of a process's exits that were told."""
        return [
            info.exit_code
            for event, info in list(self.events)
            if event is EventType.EXIT and info.process_id == process_id
        ]

    def wait_for_exit(self, process_id: str = "web") -> int:
        """Wait until a process's exit was told, and return its code."""
        eventually(lambda: self.exits(process_id), f"the exit of {process_id}")
        (code,) = self.exits(process_id)
        return code


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_ASK_AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(delivery, "_LATE_EVENT_SECONDS", 0.2)
    monkeypatch.setattr(delivery, "_RETRY_SECONDS", 0.02)
    monkeypatch.setattr(delivery, "_FIRST_LOOK_SECONDS", 0.02)
    monkeypatch.delenv("LIBCONTAINERD_NOCLEAN", raising=False)
    monkeypatch.delenv("DOCKER_RAMDISK", raising=False)


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as made:
        yield made


@pytest.fixture
def backend() -> Recorder:
    return Recorder()


@pytest.fixture
def client(server: Scripted, backend: Recorder, tmp_path: Path) -> Iterator[Client]:
    with connect(server, tmp_path, backend) as made:
        yield made


def connect(server: Scripted, state: Path, backend: Recorder | None = None) -> Client:
    return Client(
        server.path, namespace="test", state_dir=state / "state", backend=backend, default_timeout=DEADLINE
    )


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def files(state: Path) -> list[str]:
    return sorted(str(each.relative_to(state)) for each in state.rglob("*"))


def started(client: Client, container_id: str = "web", attach: cio.AttachStdio = cio.null_io) -> int:
    client.create(container_id, SPEC)
    return client.start(container_id, attach_stdio=attach)


def held_up(held: Held, call: Callable[[float], _T]) -> tuple[Beside[_T], float]:
    """Make a call with a deadline that passes while it is held up; the deadline, too, which has begun already.

    On a busy machine a deadline may pass before the call has come so far; then a longer one is tried.
    """
    for seconds in (0.1, 1.0, DEADLINE / 2):
        calling = Beside(lambda seconds=seconds: call(seconds))  # type: ignore[misc] # mypy cannot infer it
        eventually(lambda calling=calling: held.begun.is_set() or not calling.running, "the call")  # type: ignore[misc] # likewise
        if held.begun.is_set():
            return calling, seconds
        with suppress(DeadlineExceededError):
            calling.answer()
    raise AssertionError("the call does not come through")


def let_go_after_the_deadline(held: Held, seconds: float) -> None:
    """Let a call go that its caller has given up on; the caller now waits for its end, to undo it."""
    threading.Timer(seconds, held.release).start()


def request(server: Scripted, method: str) -> object:
    """Return the one request of a method."""
    (only,) = server.called(method)
    return only


# ------------------------------------------------------------------------------------------------------------ constructor


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"namespace": ""}, "namespace"),
        ({"namespace": "a/b"}, "namespace"),
        ({"backend": object()}, "has a method process_event"),
        ({"runtime": ""}, "a shim's name"),
        ({"default_timeout": 0}, "positive number"),
        ({"runtime": "\udcff"}, "a shim's name"),
        ({"runtime": 5}, "a shim's name"),
        ({"state_dir": "relative"}, "absolute path"),
        ({"state_dir": "/tmp/\udcff"}, "valid Unicode"),
        ({"state_dir": "/tmp/a\0b"}, "valid Unicode"),
        ({"state_dir": b"/tmp/bytes"}, "valid Unicode"),
        ({"address": "relative"}, "must be absolute"),
        ({"address": "tcp://localhost:1"}, "whoever reaches containerd is root"),
    ],
)
def test_a_bad_argument_is_refused_before_anything_is_tried(
    server: Scripted, tmp_path: Path, arguments: dict[str, object], said: str
) -> None:
    good: dict[str, object] = {"address": server.path, "namespace": "test", "state_dir": tmp_path}
    with pytest.raises(InvalidParameterError, match=said):
        Client(**{**good, **arguments})  # type: ignore[arg-type] # one of them is wrong
    assert server.calls == []


def event_threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("libcontainerd-events")]


def test_a_server_that_is_no_containerd_is_refused(tmp_path: Path) -> None:
    with Scripted(services=("version",)) as server:
        with pytest.raises(NotImplementedByServerError):
            connect(server, tmp_path)
        assert event_threads() == []


def test_nobody_there_is_unavailable_at_once(server: Scripted, tmp_path: Path) -> None:
    server.stop()
    begin = time.monotonic()
    with pytest.raises(UnavailableError, match="there is no such file"):
        connect(server, tmp_path)
    assert time.monotonic() - begin < 5


def test_somebody_who_does_not_answer_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "silent"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        begin = time.monotonic()
        with pytest.raises((DeadlineExceededError, UnavailableError), match="cannot subscribe"):
            Client(path, namespace="test", state_dir=tmp_path, default_timeout=0.4)
        assert time.monotonic() - begin < 5
    assert event_threads() == []


def test_a_client_says_where_it_is(client: Client, server: Scripted) -> None:
    assert repr(client) == f"<Client of namespace 'test' at {server.path}: 0 containers>"
    assert not client.closed
    client.close()
    assert repr(client).endswith(": closed>")
    assert client.closed


# ----------------------------------------------------------------------------------------------------------------- create


def test_containerd_is_told_everything_of_a_container(client: Client, server: Scripted, state: Path) -> None:
    client.create("web", SPEC, {"binary_name": "crun"}, runtime="io.containerd.other.v1", labels={"a": "b"})
    (sent,) = server.called("Containers.Create")
    assert isinstance(sent, containers_pb2.CreateContainerRequest)
    container = sent.container
    assert container.id == "web"
    assert dict(container.labels) == {"a": "b", BUNDLE_LABEL: str(state / "web")}
    assert container.runtime.name == "io.containerd.other.v1"
    assert typeurl.unpack(container.runtime.options, Options) == Options(binary_name="crun")
    told = oci.parse_spec(typeurl.unpack_json(container.spec, typeurl.SPEC_URL))
    assert told == oci.parse_spec(SPEC)
    assert files(state) == ["web"]

    client.create("plain", oci.parse_spec(SPEC), Options(root="/r"))
    plain = server.containers["plain"]
    assert plain.runtime.name == "io.containerd.runc.v2"
    assert typeurl.unpack(plain.runtime.options, Options) == Options(root="/r")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"container_id": "a/b"}, "container id"),
        ({"container_id": ".."}, "container id"),
        ({"spec": {"ociVersion": 5}}, "ociVersion"),
        ({"runtime_options": {"nope": 1}}, "no field 'nope'"),
        ({"runtime_options": {"io_uid": "x"}}, "io_uid"),
        ({"runtime_options": CheckpointOptions()}, "want a containerd"),
        ({"runtime_options": wellknown_pb2.Any()}, "want a containerd"),
        ({"runtime": "\udcff"}, "a shim's name"),
        ({"runtime": 5}, "a shim's name"),
        ({"labels": {"": "x"}}, "must not be empty"),
        ({"labels": {BUNDLE_LABEL: "/elsewhere"}}, "this library's own"),
        ({"labels": {"k": "v" * 4096}}, "more than 4096 bytes"),
        ({"labels": {"é" * 1024: "é" * 1025}}, "more than 4096 bytes"),
        ({"timeout": -1}, "positive number"),
    ],
)
def test_a_bad_container_is_refused_and_nothing_touched(
    client: Client, server: Scripted, state: Path, arguments: dict[str, object], said: str
) -> None:
    good: dict[str, object] = {"container_id": "web", "spec": SPEC}
    with pytest.raises(InvalidParameterError, match=said):
        client.create(**{**good, **arguments})  # type: ignore[arg-type] # one of them is wrong
    assert server.called("Containers.Create") == []
    assert not state.exists()


def test_two_creations_at_once_and_the_winner_is_unharmed(
    client: Client, server: Scripted, state: Path
) -> None:
    outcomes = race(*[lambda: client.create("web", SPEC)] * 5)
    assert outcomes.count(None) == 1
    assert sum(isinstance(each, ConflictError) for each in outcomes) == 4
    assert files(state) == ["web"]
    assert client.start("web") > 0


def test_a_creation_whose_answer_got_lost_is_undone(client: Client, server: Scripted, state: Path) -> None:
    server.script("Containers.Create", lose(UNAVAILABLE))
    with pytest.raises(UnavailableError, match="cannot create container 'web'"):
        client.create("web", SPEC)
    assert server.containers == {}
    assert not state.exists()
    client.create("web", SPEC)


def test_a_creation_that_takes_too_long_is_undone_when_it_is_over(
    client: Client, server: Scripted, state: Path
) -> None:
    slow = Held(first=True)
    server.script("Containers.Create", slow)
    creating, seconds = held_up(slow, lambda seconds: client.create("web", SPEC, timeout=seconds))
    let_go_after_the_deadline(slow, seconds)
    with pytest.raises(DeadlineExceededError, match="cannot create container 'web'"):
        creating.answer()
    assert server.containers == {}
    assert not state.exists()


def test_somebody_elses_container_of_that_id_is_not_undone(client: Client, server: Scripted) -> None:
    theirs = server.containers["web"] = containers_pb2.Container(id="web", labels={"whose": "theirs"})
    with pytest.raises(ConflictError, match="already exists"):
        client.create("web", SPEC)
    server.script("Containers.Create", fail(UNAVAILABLE))
    with pytest.raises(UnavailableError):
        client.create("web", SPEC)
    assert server.containers == {"web": theirs}


def test_an_undoing_that_fails_is_logged_and_the_first_error_told(client: Client, server: Scripted) -> None:
    server.script("Containers.Create", lose(UNAVAILABLE))
    server.script("Containers.Get", fail(INTERNAL, "broken"))
    with capture_logs() as logs, pytest.raises(UnavailableError):
        client.create("web", SPEC)
    (log,) = [each for each in logs if each["event"] == "clean_up_failed"]
    assert log["container"] == "web"
    assert "broken" in log["error"]


# ---------------------------------------------------------------------------------------------------------------- replace


def test_replace_makes_what_is_not_there(client: Client, server: Scripted) -> None:
    client.replace("web", SPEC, labels={"a": "b"})
    assert server.containers["web"].labels["a"] == "b"
    assert server.called("Containers.Delete") == []


def test_replace_clears_away_a_running_container_of_ours(
    client: Client, server: Scripted, backend: Recorder
) -> None:
    first = started(client)
    client.replace("web", SPEC, labels={"a": "b"})
    assert backend.wait_for_exit() == 137
    assert server.containers["web"].labels["a"] == "b"
    assert server.processes == {}
    assert client.start("web") != first


def test_replace_ends_a_task_of_a_start_that_was_cut_off(client: Client, server: Scripted) -> None:
    client.create("web", SPEC)
    server.processes["web", ""] = Process(
        77, task_pb2.Status.RUNNING
    )  # came to light when containerd was restarted
    with pytest.raises(FailedPreconditionError, match="a task exists"):
        client.delete("web")
    client.replace("web", SPEC, labels={"a": "b"})
    assert server.containers["web"].labels["a"] == "b"
    assert server.processes == {}
    assert client.start("web") != 77


def test_replace_ends_a_task_whose_container_is_gone(client: Client, server: Scripted) -> None:
    server.processes["web", ""] = Process(77, task_pb2.Status.RUNNING)
    client.replace("web", SPEC)
    assert server.processes == {}
    assert client.start("web") != 77


def test_replace_that_cannot_end_what_is_in_the_way_leaves_nothing_of_its_own(
    client: Client, server: Scripted, state: Path
) -> None:
    server.processes["web", ""] = Process(77, task_pb2.Status.RUNNING)
    server.script("Tasks.Kill", fail(INTERNAL))
    with pytest.raises(SystemFailureError):
        client.replace("web", SPEC)
    assert server.containers == {}
    assert not state.exists()
    client.replace("web", SPEC)


def test_replace_finds_a_creation_that_arrives_late(client: Client, server: Scripted) -> None:
    server.containers["web"] = containers_pb2.Container(id="web", labels={"whose": "an earlier one's"})

    def arrive(context: Context, go_on: Callable[[], Message]) -> Message:
        done = go_on()
        server.containers["web"] = containers_pb2.Container(id="web", labels={"whose": "the late one's"})
        return done

    server.script("Containers.Delete", arrive)
    client.replace("web", SPEC)
    assert "whose" not in server.containers["web"].labels


@pytest.mark.parametrize("labelled", [True, False])
def test_replace_removes_the_bundle_that_an_earlier_program_left(
    client: Client, server: Scripted, state: Path, labelled: bool
) -> None:
    (state / "web").mkdir(parents=True)
    (state / "web" / "e-exec").touch()
    (state / "other").mkdir()
    labels = {BUNDLE_LABEL: str(state / ("web" if labelled else "other"))}
    server.containers["web"] = containers_pb2.Container(id="web", labels=labels)
    client.replace("web", SPEC)
    assert files(state) == ["other", "web"]


@pytest.mark.parametrize("status", [None, task_pb2.Status.RUNNING, task_pb2.Status.STOPPED])
def test_replace_clears_away_what_an_earlier_program_left(
    client: Client, server: Scripted, status: int | None
) -> None:
    server.containers["web"] = containers_pb2.Container(id="web", labels={"whose": "an earlier one's"})
    if status is not None:
        server.processes["web", ""] = Process(77, status)
    client.replace("web", SPEC)
    assert "whose" not in server.containers["web"].labels
    assert client.start("web") > 0


def test_a_bad_replacement_leaves_the_old_one(client: Client, server: Scripted) -> None:
    started(client)
    with pytest.raises(InvalidParameterError):
        client.replace("web", SPEC, {"nope": 1})
    assert client.status("web") is Status.RUNNING


def test_a_replacement_whose_time_is_up_says_so(client: Client) -> None:
    with pytest.raises(DeadlineExceededError):
        client.replace("web", SPEC, timeout=1e-9)


def test_what_cannot_be_cleared_away_is_said(client: Client, server: Scripted) -> None:
    started(client)
    server.script("Tasks.Delete", fail(INTERNAL, "broken"))
    with pytest.raises(SystemFailureError, match="broken"):
        client.replace("web", SPEC)


# ------------------------------------------------------------------------------------------------------------------ start


def test_a_start_without_fifos(client: Client, server: Scripted, backend: Recorder) -> None:
    pid = started(client)
    assert pid == server.processes["web", ""].pid
    sent = request(server, "Tasks.Create")
    assert isinstance(sent, tasks_pb2.CreateTaskRequest)
    assert (sent.container_id, sent.stdin, sent.stdout, sent.stderr, sent.terminal) == (
        "web",
        "",
        "",
        "",
        False,
    )
    assert not sent.HasField("options")
    eventually(lambda: len(backend.events) == 2, "two events")
    assert backend.events == [
        (EventType.CREATE, EventInfo("web", "web", pid)),
        (EventType.START, EventInfo("web", "web", pid)),
    ]


def test_a_start_with_fifos(client: Client, server: Scripted, state: Path) -> None:
    client.create("web", SPEC)
    client.start("web", with_stdin=True, attach_stdio=lambda dio: dio)
    sent = request(server, "Tasks.Create")
    assert isinstance(sent, tasks_pb2.CreateTaskRequest)
    assert [sent.stdin, sent.stdout, sent.stderr] == [
        str(state / "web" / f"init-{stream}") for stream in ("stdin", "stdout", "stderr")
    ]
    assert files(state) == ["web", "web/init-stderr", "web/init-stdin", "web/init-stdout"]


def nothing_left_of_a_start(client: Client, server: Scripted, state: Path) -> None:
    """Check that a failed start has left nothing, and that the next one works."""
    assert server.processes == {}
    assert files(state) == ["web"]
    with pytest.raises(NotFoundError, match="container is not running"):
        client.status("web")
    client.start("web", attach_stdio=lambda dio: dio)
    assert client.status("web") is Status.RUNNING


def test_an_attachment_that_fails_aborts_the_start(client: Client, server: Scripted, state: Path) -> None:
    class MineError(Exception):
        pass

    def attach(dio: cio.DirectIO) -> cio.IO:
        raise MineError

    client.create("web", SPEC)
    with pytest.raises(MineError):
        client.start("web", attach_stdio=attach)
    assert server.called("Tasks.Create") == []
    nothing_left_of_a_start(client, server, state)


def test_a_program_that_is_not_there(client: Client, server: Scripted, state: Path) -> None:
    client.create("web", SPEC)
    text = 'OCI runtime create failed: exec: "x": executable file not found in $PATH: unknown'
    server.script("Tasks.Create", fail(UNKNOWN, text))
    with pytest.raises(InvalidParameterError, match="executable file not found"):
        client.start("web", attach_stdio=lambda dio: dio)
    nothing_left_of_a_start(client, server, state)


def test_a_task_whose_creation_answered_too_late_is_removed(
    client: Client, server: Scripted, state: Path
) -> None:
    client.create("web", SPEC)
    slow = Held(first=True)
    server.script("Tasks.Create", slow)
    starting, seconds = held_up(
        slow, lambda seconds: client.start("web", attach_stdio=lambda dio: dio, timeout=seconds)
    )
    let_go_after_the_deadline(slow, seconds)
    with pytest.raises(DeadlineExceededError, match="cannot start container 'web'"):
        starting.answer()
    nothing_left_of_a_start(client, server, state)


def test_a_task_whose_start_failed_and_that_runs_is_killed_and_removed(
    client: Client, server: Scripted, state: Path, backend: Recorder
) -> None:
    client.create("web", SPEC)
    server.script("Tasks.Start", lose(UNKNOWN))
    with pytest.raises(SystemFailureError, match="the answer got lost"):
        client.start("web", attach_stdio=lambda dio: dio)
    kill = request(server, "Tasks.Kill")
    assert isinstance(kill, tasks_pb2.KillRequest)
    assert (kill.container_id, kill.exec_id, kill.signal) == ("web", "", signal.SIGKILL)
    assert len(server.called("Tasks.Delete")) == 1
    nothing_left_of_a_start(client, server, state)


def test_the_late_exit_of_a_failed_start_does_not_end_the_next(
    client: Client, server: Scripted, backend: Recorder
) -> None:
    client.create("web", SPEC)
    server.script("Tasks.Start", fail(UNKNOWN))
    with pytest.raises(SystemFailureError):
        client.start("web")
    pid = client.start("web")
    for _ in range(2):
        late = task_events.TaskExit(container_id="web", id="web", pid=pid - 1, exit_status=137)
        server.tell("exit", late)
    server.tell("oom", task_events.TaskOOM(container_id="web"))
    eventually(lambda: backend.last() is EventType.OOM, "the event after them")
    assert backend.exits() in ([], [137]), "the first one's end, if it came before its undoing was over"
    assert client.status("web") is Status.RUNNING
    with pytest.raises(DeadlineExceededError):
        client.wait("web", timeout=0.01)


def test_somebody_elses_task_is_not_removed(client: Client, server: Scripted) -> None:
    client.create("web", SPEC)
    theirs = server.processes["web", ""] = Process(77, task_pb2.Status.RUNNING)
    with pytest.raises(ConflictError, match="already exists"):
        client.start("web")
    assert server.processes == {("web", ""): theirs}
    assert server.called("Tasks.Kill") == server.called("Tasks.Delete") == []


def test_a_second_start_is_a_conflict_and_the_first_unharmed(client: Client, state: Path) -> None:
    client.create("web", SPEC)
    outcomes = race(*[lambda: client.start("web", attach_stdio=lambda dio: dio)] * 4)
    assert sum(isinstance(each, ConflictError) for each in outcomes) == 3
    assert sum(isinstance(each, int) for each in outcomes) == 1
    assert files(state) == ["web", "web/init-stderr", "web/init-stdout"]


def test_a_start_needs_a_container(client: Client) -> None:
    with pytest.raises(NotFoundError, match="no such container"):
        client.start("web")
    with pytest.raises(NotFoundError, match="no such container"):
        client.start("web", checkpoint_dir="/c")


def test_an_undoing_that_cannot_be_done_is_logged(client: Client, server: Scripted) -> None:
    client.create("web", SPEC)
    server.script("Tasks.Start", fail(UNKNOWN))
    server.script("Tasks.Delete", fail(INTERNAL, "broken"))
    with capture_logs() as logs, pytest.raises(SystemFailureError, match="cannot start"):
        client.start("web")
    assert [each["error"] for each in logs if each["event"] == "clean_up_failed"] == [
        "cannot clean up after 'init' in container 'web': broken"
    ]


# ------------------------------------------------------------------------------------------------------------------- exec


def test_an_execs_life(client: Client, server: Scripted, backend: Recorder, state: Path) -> None:
    started(client)
    pid = client.exec("web", "e", PROCESS, attach_stdio=lambda dio: dio)
    sent = request(server, "Tasks.Exec")
    assert isinstance(sent, tasks_pb2.ExecProcessRequest)
    assert (sent.exec_id, sent.stdin, sent.stdout) == ("e", "", str(state / "web/e-stdout"))
    told = oci.parse_process(typeurl.unpack_json(sent.spec, typeurl.PROCESS_URL))
    assert told == oci.parse_process(PROCESS)
    assert pid == server.processes["web", "e"].pid

    server.exit("web", "e", 5)
    assert backend.wait_for_exit("e") == 5
    eventually(lambda: ("web", "e") not in server.processes, "the exec's deletion")
    eventually(lambda: files(state) == ["web"], "the end of its FIFOs")
    assert client.wait("web", "e").code == 5
    eventually(lambda: isinstance(_again(client), int), "its id")


def _again(client: Client) -> int | LibcontainerdError:
    try:
        return client.exec("web", "e", PROCESS)
    except ConflictError as error:
        return error


@pytest.mark.parametrize("method", ["Tasks.Exec", "Tasks.Start"])
@pytest.mark.parametrize("done", [False, True])
def test_an_exec_that_fails_leaves_nothing(
    client: Client, server: Scripted, state: Path, method: str, done: bool
) -> None:
    started(client)
    server.script(method, lose(UNKNOWN) if done else fail(UNKNOWN))
    with pytest.raises(SystemFailureError, match="cannot exec 'e' in container 'web'"):
        client.exec("web", "e", PROCESS, attach_stdio=lambda dio: dio)
    assert ("web", "e") not in server.processes
    assert files(state) == ["web"]
    with pytest.raises(NotFoundError, match="no such exec"):
        client.signal_process("web", "e", signal.SIGTERM)
    client.exec("web", "e", PROCESS)


@pytest.mark.parametrize("method", ["Tasks.Exec", "Tasks.Start"])
def test_an_exec_is_refused_while_the_event_of_a_freeze_is_on_its_way(
    client: Client, server: Scripted, method: str
) -> None:
    started(client)
    said = "cannot exec in a paused state" if method == "Tasks.Exec" else "cannot exec in a paused container"
    server.script(method, fail(UNKNOWN, said))
    with pytest.raises(FailedPreconditionError, match="paused"):
        client.exec("web", "e", PROCESS)
    server.script(method, fail(UNKNOWN, "cannot exec in a stopped state"))
    with pytest.raises(InvalidParameterError, match="container is not running"):
        client.exec("web", "e", PROCESS)


@pytest.mark.parametrize("exec_id", ["init", "web", "a/b", ""])
def test_an_execs_id_is_its_own(client: Client, server: Scripted, exec_id: str) -> None:
    started(client)
    with pytest.raises(InvalidParameterError, match="exec id"):
        client.exec("web", exec_id, PROCESS)
    assert server.called("Tasks.Exec") == []


def test_an_exec_needs_a_running_container(client: Client, server: Scripted, backend: Recorder) -> None:
    with pytest.raises(NotFoundError, match="no such container"):
        client.exec("web", "e", PROCESS)
    client.create("web", SPEC)
    with pytest.raises(InvalidParameterError, match="container is not running"):
        client.exec("web", "e", PROCESS)
    client.start("web")
    server.exit("web")
    backend.wait_for_exit()
    with pytest.raises(InvalidParameterError, match="container is not running"):
        client.exec("web", "e", PROCESS)


def deletions(server: Scripted) -> list[str]:
    """What was deleted, in order."""
    return [
        call.method for call in list(server.calls) if call.method in ("Tasks.DeleteProcess", "Tasks.Delete")
    ]


def test_an_ended_exec_is_deleted_before_its_task(
    client: Client, server: Scripted, backend: Recorder
) -> None:
    started(client)
    client.exec("web", "e", PROCESS)
    held = threading.Event()  # until the backend has its exit the exec is not removed

    def hold(event: EventType, info: EventInfo) -> None:
        if event is EventType.EXIT and info.process_id == "e":
            held.wait(DEADLINE)

    backend.then = hold
    server.exit("web", "e", code=3)
    server.exit("web", code=4)
    assert (client.wait("web", "e").code, client.wait("web").code) == (3, 4)

    assert client.delete_task("web").code == 4

    assert deletions(server) == ["Tasks.DeleteProcess", "Tasks.Delete"]
    held.set()
    eventually(lambda: not client._containers.all()[0].execs, "the exec is forgotten")


def test_a_task_is_deleted_after_the_execs_that_end_with_it(
    client: Client, server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_LATE_EXECS_SECONDS", DEADLINE)
    started(client)
    client.exec("web", "e", PROCESS)
    server.exit("web", code=4)
    client.wait("web")
    deletion = Beside(lambda: client.delete_task("web"))
    server.exit("web", "e", code=137)

    assert deletion.answer().code == 4
    # The clean-up after the exec may come as well, between the two or last, and see that it is gone.
    done = deletions(server)
    assert done.index("Tasks.DeleteProcess") < done.index("Tasks.Delete")


def test_an_exec_that_containerd_calls_running_keeps_no_task(
    client: Client, server: Scripted, backend: Recorder
) -> None:
    started(client)
    client.exec("web", "e", PROCESS)
    held = threading.Event()
    backend.then = lambda event, info: (
        info.process_id == "e" and event is EventType.EXIT and held.wait(DEADLINE)
    )
    server.exit("web", "e", code=3)
    server.exit("web", code=4)
    client.wait("web", "e")
    client.wait("web")
    server.script("Tasks.DeleteProcess", fail(grpc.StatusCode.FAILED_PRECONDITION))

    assert client.delete_task("web").code == 4

    assert deletions(server) == ["Tasks.DeleteProcess", "Tasks.Delete"]
    held.set()


def test_an_execs_deletion_waits_for_a_containerd_that_is_away(
    client: Client, server: Scripted, backend: Recorder
) -> None:
    started(client)
    client.exec("web", "e", PROCESS)
    server.script("Tasks.DeleteProcess", fail(UNAVAILABLE), fail(UNAVAILABLE))
    server.exit("web", "e")
    eventually(lambda: ("web", "e") not in server.processes, "the exec's deletion")
    assert len(server.called("Tasks.DeleteProcess")) == 3


def test_an_execs_deletion_that_fails_is_logged_and_the_record_dropped(
    client: Client, server: Scripted
) -> None:
    started(client)
    client.exec("web", "e", PROCESS)
    server.script("Tasks.DeleteProcess", fail(INTERNAL, "broken"))
    with capture_logs() as logs:
        server.exit("web", "e", 4)
        eventually(lambda: [each for each in logs if each["event"] == "exec_not_deleted"], "the log")
    (log,) = [each for each in logs if each["event"] == "exec_not_deleted"]
    assert (log["container"], log["exec"]) == ("web", "e")
    assert client.wait("web", "e").code == 4


def test_a_late_clean_up_leaves_the_files_of_a_successor_of_the_same_names(
    client: Client, server: Scripted, backend: Recorder, state: Path
) -> None:
    """An exec's deletion is answered late, and meanwhile its container goes and another comes."""
    started(client)
    client.exec("web", "e", PROCESS, attach_stdio=lambda dio: dio)
    record = client._containers.get("web", "look")
    earlier = record.execs["e"]
    answer = Held(first=True)
    server.script("Tasks.DeleteProcess", answer)
    server.exit("web", "e")
    assert answer.begun.wait(DEADLINE)
    server.exit("web")
    backend.wait_for_exit()
    client.delete_task("web")
    client.delete("web")

    started(client)
    client.exec("web", "e", PROCESS, attach_stdio=lambda dio: dio)
    answer.release()
    eventually(lambda: record.is_gone(earlier), "the clean-up")

    assert files(state) == ["web", "web/e-stderr", "web/e-stdout"]


# --------------------------------------------------------------------------------------------------------- exits and wait


def test_an_exit_that_nobody_told_is_found_out_once(
    client: Client, server: Scripted, backend: Recorder
) -> None:
    started(client)
    waiting = [Beside(lambda: client.wait("web")) for _ in range(3)]
    server.exit("web", code=7, told=False)
    assert {each.answer().code for each in waiting} == {7}
    assert backend.wait_for_exit() == 7

    server.tell_exit("web")
    server.tell("oom", task_events.TaskOOM(container_id="web"))
    eventually(lambda: backend.last() is EventType.OOM, "the event after it")
    assert backend.exits() == [7], "the late event is the same exit"


def test_a_late_event_is_preferred_to_the_answer(client: Client, server: Scripted, backend: Recorder) -> None:
    started(client)
    server.exit("web", code=7, told=False)
    waiting = Beside(lambda: client.wait("web"))
    server.wait_for("Tasks.Get")
    server.tell_exit("web")
    assert waiting.answer().code == 7
    assert backend.wait_for_exit() == 7


def test_a_broken_connection_is_waited_through(client: Client, server: Scripted, backend: Recorder) -> None:
    started(client)
    server.script("Tasks.Get", *[fail(UNAVAILABLE)] * 3)
    waiting = Beside(lambda: client.wait("web"))
    server.wait_for("Tasks.Get", 3)
    assert waiting.running
    server.exit("web", code=9, told=False)
    assert waiting.answer().code == 9


def test_waiting_has_an_end(client: Client, server: Scripted) -> None:
    started(client)
    begin = time.monotonic()
    with pytest.raises(DeadlineExceededError, match="it has not ended in time"):
        client.wait("web", timeout=0.15)
    assert 0.15 <= time.monotonic() - begin < 5
    for name, said in (("nope", "no such exec"),):
        with pytest.raises(NotFoundError, match=said):
            client.wait("web", name)
    with pytest.raises(NotFoundError, match="no such container"):
        client.wait("other")


def test_waiting_for_a_start_that_takes_long(client: Client, server: Scripted) -> None:
    client.create("web", SPEC)
    held = Held()
    server.script("Tasks.Start", held)
    starting = Beside(lambda: client.start("web"))
    assert held.begun.wait(DEADLINE)
    waiting = Beside(lambda: client.wait("web"))
    held.release()
    assert starting.answer() > 0
    server.exit("web", code=3)
    assert waiting.answer().code == 3


def test_an_exit_is_remembered_after_the_container_is_gone(
    client: Client, server: Scripted, backend: Recorder
) -> None:
    started(client)
    client.exec("web", "e", PROCESS)
    server.exit("web", "e", 4)
    backend.wait_for_exit("e")
    server.exit("web", code=5)
    backend.wait_for_exit()
    assert client.delete_task("web").code == 5
    assert (client.wait("web").code, client.wait("web", "e").code) == (5, 4)
    client.delete("web")
    assert (client.wait("web").code, client.wait("web", "e").code) == (5, 4)
    client.create("web", SPEC)
    with pytest.raises(NotFoundError, match="container is not running"):
        client.wait("web")


# ------------------------------------------------------------------------------------------------------------ delete_task


def test_a_tasks_deletion_says_how_it_ended(client: Client, server: Scripted, backend: Recorder) -> None:
    started(client)
    server.exit("web", code=5)
    status = client.delete_task("web")
    assert (status.code, status.error) == (5, None)
    assert server.processes == {}
    assert backend.wait_for_exit() == 5
    assert client.start("web") > 0, "the container can be started again"


def refused(status: ExitStatus, kind: type[LibcontainerdError]) -> None:
    assert status.code == 255
    assert isinstance(status.error, kind)


def test_a_deletion_that_cannot_be_is_255_with_the_reason(client: Client, server: Scripted) -> None:
    refused(client.delete_task("web"), NotFoundError)
    client.create("web", SPEC)
    refused(client.delete_task("web"), NotFoundError)
    client.start("web")
    refused(client.delete_task("web"), FailedPreconditionError)
    server.script("Tasks.Get", fail(UNAVAILABLE))
    with capture_logs() as logs:
        refused(client.delete_task("web"), UnavailableError)
    assert [(each["event"], each["container"]) for each in logs] == [("task_not_deleted", "web")]
    assert client.status("web") is Status.RUNNING


def test_a_deletion_that_failed_can_be_repeated(client: Client, server: Scripted) -> None:
    started(client)
    server.exit("web", code=5)
    server.script("Tasks.Delete", fail(UNAVAILABLE), fail(INTERNAL))
    refused(client.delete_task("web"), UnavailableError)
    refused(client.delete_task("web"), SystemFailureError)
    with pytest.raises(FailedPreconditionError, match="its task still exists"):
        client.delete("web")
    assert client.delete_task("web").code == 5


@pytest.mark.parametrize("lost", [lose(UNAVAILABLE), lose(grpc.StatusCode.DEADLINE_EXCEEDED)])
def test_a_deletion_whose_answer_got_lost_is_done_the_second_time(
    client: Client, server: Scripted, lost: Callable[..., tasks_pb2.DeleteResponse]
) -> None:
    started(client)
    server.exit("web", code=5)
    client.wait("web")
    server.script("Tasks.Delete", lost)
    first = client.delete_task("web")
    assert first.code == 255
    assert client.delete_task("web").code == 5, "the exit is known, and containerd no longer knows the task"
    client.delete("web")


def test_an_exit_that_nobody_told_before_the_deletion(
    client: Client, server: Scripted, backend: Recorder
) -> None:
    started(client)
    server.exit("web", code=6, told=False)
    assert client.delete_task("web").code == 6
    assert backend.wait_for_exit() == 6


def test_a_task_that_containerd_no_longer_knows(client: Client, server: Scripted, backend: Recorder) -> None:
    started(client)
    server.processes.clear()
    status = client.delete_task("web")
    assert status.code == 255
    assert backend.wait_for_exit() == 255
    client.delete("web")


def test_two_callers_delete_a_task_once(client: Client, server: Scripted) -> None:
    started(client)
    server.exit("web", code=5)
    client.wait("web")
    held = Held()
    server.script("Tasks.Delete", held)
    first, second = (Beside(lambda: client.delete_task("web")) for _ in range(2))
    assert held.begun.wait(DEADLINE)
    refused(client.delete_task("web", timeout=0.05), DeadlineExceededError)
    held.release()
    assert {first.answer().code, second.answer().code} == {5}
    assert len(server.called("Tasks.Delete")) == 1


def test_the_second_caller_takes_over_where_the_first_failed(client: Client, server: Scripted) -> None:
    started(client)
    server.exit("web", code=5)
    client.wait("web")
    held = Held()
    server.script("Tasks.Delete", held)
    first = Beside(lambda: client.delete_task("web", timeout=3.0))
    assert held.begun.wait(DEADLINE)
    second = Beside(lambda: client.delete_task("web"))
    refused(first.answer(), DeadlineExceededError)
    assert second.answer().code == 5
    held.release()


# ----------------------------------------------------------------------------------------------------------------- delete


def test_a_container_is_deleted_with_its_bundle(client: Client, server: Scripted, state: Path) -> None:
    client.create("web", SPEC)
    client.delete("web")
    assert server.containers == {}
    assert files(state) == []
    with pytest.raises(NotFoundError, match="no such container"):
        client.delete("web")


def test_a_container_that_somebody_else_removed_is_forgotten(
    client: Client, server: Scripted, state: Path
) -> None:
    client.create("web", SPEC)
    server.containers.clear()
    client.delete("web")
    assert files(state) == []
    client.create("web", SPEC)


def test_a_deletion_that_fails_leaves_the_container(client: Client, server: Scripted, state: Path) -> None:
    client.create("web", SPEC)
    server.script("Containers.Delete", fail(INTERNAL))
    with pytest.raises(SystemFailureError, match="cannot delete container 'web'"):
        client.delete("web")
    assert files(state) == ["web"]
    client.start("web")
    with pytest.raises(FailedPreconditionError, match="call delete_task first"):
        client.delete("web")


# ------------------------------------------------------------------------------------------------------------------- gaps


def test_what_ended_in_a_gap_is_told_with_its_real_code(
    client: Client, server: Scripted, backend: Recorder
) -> None:
    started(client)
    client.exec("web", "e", PROCESS)
    started(client, "db")
    server.exit("web", "e", 4, told=False)
    server.exit("web", code=5, told=False)
    server.processes.pop(("db", ""))
    server.script("Tasks.Get", fail(UNAVAILABLE), fail(UNAVAILABLE))
    server.end_streams(UNAVAILABLE)

    assert backend.wait_for_exit("web") == 5
    assert backend.wait_for_exit("e") == 4
    assert backend.wait_for_exit("db") == 255
    server.end_streams()
    server.wait_for("Events.Subscribe", 3)
    started(client, "last")
    assert (backend.exits("web"), backend.exits("e"), backend.exits("db")) == ([5], [4], [255])


def test_a_process_that_is_only_being_made_is_not_asked_for(
    client: Client, server: Scripted, backend: Recorder
) -> None:
    client.create("web", SPEC)
    held = Held()
    server.script("Tasks.Create", held)
    starting = Beside(lambda: client.start("web"))
    assert held.begun.wait(DEADLINE)
    with capture_logs() as logs:
        server.end_streams()
        eventually(lambda: [each for each in logs if each["event"] == "events_resumed"], "the catching up")
    # The prover goes on to catch up; a container that runs makes the end of that visible.
    assert server.called("Tasks.Get") == []
    held.release()
    assert starting.answer() > 0
    assert client.status("web") is Status.RUNNING
    assert backend.exits() == []


def test_execs_of_a_killed_shim_are_found_out(client: Client, server: Scripted, backend: Recorder) -> None:
    started(client)
    for name in ("a", "b"):
        client.exec("web", name, PROCESS)
    server.exit("web", "a", 3, told=False)
    server.processes.pop(("web", "b"))
    server.exit("web", code=137)
    assert backend.wait_for_exit("web") == 137
    assert backend.wait_for_exit("a") == 3
    assert backend.wait_for_exit("b") == 255


# ----------------------------------------------------------------------------------------------------------------- events


def malformed(logs: list[MutableMapping[str, object]]) -> int:
    """How many malformed events were logged."""
    counts = [each["events"] for each in list(logs) if each["event"] == "event_malformed"]
    return sum(count for count in counts if isinstance(count, int))


def test_what_is_no_event_of_ours_is_skipped(client: Client, server: Scripted, backend: Recorder) -> None:
    pid = started(client)
    eventually(lambda: len(backend.events) == 2, "create and start")
    exited = task_events.TaskExit(container_id="web", id="web", pid=pid, exit_status=1)
    with capture_logs() as logs:
        server.tell("exit", exited, namespace="other")
        server.tell("exit", task_events.TaskExit(container_id="nobody", id="nobody", pid=1))
        server.tell("delete", task_events.TaskDelete(container_id="web", pid=pid))
        server.publish("/tasks/exit", None)
        garbage = wellknown_pb2.Any(type_url="containerd.events.TaskExit", value=b"\xff\xff")
        server.send(event_pb2.Envelope(namespace="test", topic="/tasks/exit", event=garbage))
        unheard = wellknown_pb2.Any(type_url="containerd.events.Unheard", value=b"")
        server.send(event_pb2.Envelope(namespace="test", topic="/tasks/unheard", event=unheard))
        server.tell("oom", task_events.TaskOOM(container_id="web"))
        eventually(lambda: len(backend.events) == 3, "the event after them")
        # They are logged beside the events, and perhaps together.
        eventually(lambda: malformed(logs) == 2, "the log of both")
    assert backend.events[-1] == (EventType.OOM, EventInfo("web", oom_killed=True))
    assert malformed(logs) == 2
    assert client.status("web") is Status.RUNNING


def test_a_backend_that_fails_hears_the_next_event(
    client: Client, server: Scripted, backend: Recorder
) -> None:
    def fail_always(event: EventType, info: EventInfo) -> None:
        raise RuntimeError("the backend's own")

    backend.then = fail_always
    with capture_logs() as logs:
        started(client)
        server.exit("web", code=5)
        assert backend.wait_for_exit() == 5
        eventually(
            lambda: len([each for each in logs if each["event"] == "backend_failed"]) == 3, "three logs"
        )
    assert {each["container"] for each in logs if each["event"] == "backend_failed"} == {"web"}


def test_a_backend_may_use_the_client(
    client: Client, server: Scripted, backend: Recorder, state: Path
) -> None:
    done = threading.Event()

    def clean_up(event: EventType, info: EventInfo) -> None:
        if event is EventType.EXIT:
            assert client.delete_task("web").code == 5
            client.delete("web")
            client.create("web", SPEC)
            done.set()

    backend.then = clean_up
    started(client)
    server.exit("web", code=5)
    assert done.wait(DEADLINE)
    assert files(state) == ["web"]


def test_without_a_backend_events_are_still_followed(server: Scripted, tmp_path: Path) -> None:
    with connect(server, tmp_path) as client:
        started(client)
        server.exit("web", code=5)
        assert client.wait("web").code == 5


# ----------------------------------------------------------------------------------------------------------- other verbs


def test_containerds_version(client: Client) -> None:
    assert client.version() == Version("1.6.20", "scripted")


def test_signals_are_passed_on(client: Client, server: Scripted) -> None:
    started(client)
    client.exec("web", "e", PROCESS)
    client.signal_process("web", "init", signal.SIGTERM)
    client.signal_process("web", "e", 12)
    sent = [
        (each.exec_id, each.signal)
        for each in server.called("Tasks.Kill")
        if isinstance(each, tasks_pb2.KillRequest)
    ]
    assert sent == [("", 15), ("e", 12)]
    for wrong in (0, -1, 65, 1000):
        with pytest.raises(InvalidParameterError, match="no signal"):
            client.signal_process("web", "init", wrong)
    server.script("Tasks.Kill", fail(UNKNOWN, "container does not exist: unknown"))
    with pytest.raises(NotFoundError, match="cannot send signal 15 to 'init'"):
        client.signal_process("web", "init", 15)


def test_a_kill_thaws_what_is_frozen(client: Client, server: Scripted, backend: Recorder) -> None:
    started(client)
    client.pause("web")
    eventually(lambda: backend.last() is EventType.PAUSED, "the pause")
    client.signal_process("web", "init", signal.SIGKILL)
    assert len(server.called("Tasks.Resume")) == 1
    assert backend.wait_for_exit() == 137


def test_a_kill_is_done_although_the_thaw_failed(client: Client, server: Scripted, backend: Recorder) -> None:
    started(client)
    client.pause("web")
    eventually(lambda: backend.last() is EventType.PAUSED, "the pause")
    server.script("Tasks.Resume", fail(UNKNOWN, "no such container"))
    client.signal_process("web", "init", signal.SIGKILL)
    assert server.processes["web", ""].killed


def test_freezing_and_looking(client: Client, server: Scripted) -> None:
    pid = started(client)
    client.pause("web")
    assert client.status("web") is Status.PAUSED
    client.resume("web")
    assert client.status("web") is Status.RUNNING
    assert client.list_pids("web") == [pid]
    assert client.summary("web") == [Summary(pid, "init")]


def test_a_terminals_size(client: Client, server: Scripted) -> None:
    started(client)
    client.resize_terminal("web", "init", 80, 24)
    sent = request(server, "Tasks.ResizePty")
    assert isinstance(sent, tasks_pb2.ResizePtyRequest)
    assert (sent.width, sent.height) == (80, 24)
    for width, height in ((-1, 5), (5, 65536)):
        with pytest.raises(InvalidParameterError, match="0 to 65535"):
            client.resize_terminal("web", "init", width, height)


def test_closing_stdin_reaches_the_shim(client: Client, server: Scripted, state: Path) -> None:
    client.create("web", SPEC)
    client.start("web", with_stdin=True, attach_stdio=lambda dio: dio)
    closing = Beside(lambda: client.close_stdin("web", "init"))
    fd = os.open(state / "web" / "init-stdin", os.O_RDONLY)
    assert os.read(fd, 1) == b""
    os.close(fd)
    closing.answer()
    sent = request(server, "Tasks.CloseIO")
    assert isinstance(sent, tasks_pb2.CloseIORequest)
    assert (sent.container_id, sent.exec_id, sent.stdin) == ("web", "", True)
    client.close_stdin("web", "init")
    assert len(server.called("Tasks.CloseIO")) == 1


def test_closing_an_stdin_that_is_not_ours(client: Client, server: Scripted) -> None:
    started(client)
    client.close_stdin("web", "init")
    assert len(server.called("Tasks.CloseIO")) == 1
    server.script("Tasks.CloseIO", fail(grpc.StatusCode.NOT_FOUND))
    client.close_stdin("web", "init")
    server.script("Tasks.CloseIO", fail(INTERNAL))
    with pytest.raises(SystemFailureError):
        client.close_stdin("web", "init")


def test_a_stdin_that_cannot_be_closed_in_time(client: Client, server: Scripted) -> None:
    client.create("web", SPEC)
    client.start("web", with_stdin=True, attach_stdio=lambda dio: dio)
    with pytest.raises(DeadlineExceededError, match="cannot close the stdin"):
        client.close_stdin("web", "init", timeout=0.05)  # no reader has come
    server.exit("web")
    client.close_stdin("web", "init")


def test_every_verb_says_what_is_not_there(client: Client) -> None:
    verbs: list[Callable[[str], object]] = [
        client.status,
        client.pause,
        client.resume,
        client.list_pids,
        client.summary,
        lambda name: client.signal_process(name, "init", 9),
        lambda name: client.resize_terminal(name, "init", 1, 1),
        lambda name: client.close_stdin(name, "init"),
    ]
    client.create("web", SPEC)
    for verb in verbs:
        with pytest.raises(NotFoundError, match="no such container"):
            verb("none")
        with pytest.raises(NotFoundError, match="container is not running"):
            verb("web")


# ---------------------------------------------------------------------------------------------------------------- closing


def test_close_ends_calls_that_hang(server: Scripted, tmp_path: Path) -> None:
    client = connect(server, tmp_path)
    started(client)
    held = Held()
    server.script("Tasks.Pause", held)
    pausing = Beside(lambda: client.pause("web", timeout=math.inf))
    waiting = Beside(lambda: client.wait("web", timeout=math.inf))
    assert held.begun.wait(DEADLINE)
    server.wait_for("Tasks.Get")  # which who waits asks now and then
    client.close()
    for call in (pausing, waiting):
        with pytest.raises(CallCancelledError, match="the client was closed meanwhile"):
            call.answer()
    assert server.processes["web", ""].status == task_pb2.Status.RUNNING, "containers keep running"


def test_close_beside_a_start_leaves_no_half_started_task(server: Scripted, tmp_path: Path) -> None:
    client = connect(server, tmp_path)
    client.create("web", SPEC)
    held = Held(first=True)
    server.script("Tasks.Create", held)
    starting = Beside(lambda: client.start("web", attach_stdio=lambda dio: dio))
    assert held.begun.wait(DEADLINE)
    closing = Beside(client.close)
    eventually(lambda: client._shelter.closed, "the close")
    held.release()
    with pytest.raises(CallCancelledError):
        starting.answer()
    closing.answer()
    assert server.processes == {}
    assert files(tmp_path / "state") == ["web"]


def test_after_close_every_verb_is_cancelled(client: Client, server: Scripted) -> None:
    started(client)
    client.close()
    client.close()
    count = len(server.calls)
    verbs: list[Callable[[], object]] = [
        client.version,
        lambda: client.create("db", SPEC),
        lambda: client.start("web"),
        lambda: client.exec("web", "e", PROCESS),
        lambda: client.pause("web"),
        lambda: client.wait("web"),
        lambda: client.delete("web"),
        lambda: client.signal_process("web", "init", 15),
    ]
    for verb in verbs:
        with pytest.raises(CallCancelledError):
            verb()
    assert len(server.calls) == count


def test_close_lets_queued_events_finish(server: Scripted, tmp_path: Path, backend: Recorder) -> None:
    client = connect(server, tmp_path, backend)
    go, busy = threading.Event(), threading.Event()

    def block(event: EventType, info: EventInfo) -> None:
        busy.set()
        go.wait()

    backend.then = block
    started(client)
    assert busy.wait(DEADLINE)
    server.exit("web", code=5)
    client.wait("web")
    closing = Beside(client.close)
    eventually(lambda: client.closed, "the close")
    go.set()
    closing.answer()
    assert backend.exits() == [5]


def test_close_does_not_wait_for_a_backend_for_ever(
    server: Scripted, tmp_path: Path, backend: Recorder
) -> None:
    client = connect(server, tmp_path, backend)
    go, busy = threading.Event(), threading.Event()

    def block(event: EventType, info: EventInfo) -> None:
        busy.set()
        go.wait()

    backend.then = block
    started(client)
    assert busy.wait(DEADLINE)
    lanes = client._delivery._queue._lanes._lanes
    eventually(lambda: lanes["web"].items, "an event behind the one that blocks")
    with capture_logs() as logs:
        Beside(lambda: client.close(timeout=0.2)).answer(within=15)
    assert [each["event"] for each in logs if each["event"] == "events_undelivered"]
    go.set()


@pytest.mark.parametrize("method", ["Tasks.Delete", "Tasks.Exec", "Tasks.Get", "Containers.Get"])
def test_a_call_that_hangs_holds_up_no_other(server: Scripted, client: Client, method: str) -> None:
    """Neither of another container nor of the same one: no lock is held while containerd is asked."""
    started(client)
    started(client, "other")
    if method == "Tasks.Delete":
        server.exit("web", code=3)
        client.wait("web")
    held = Held()
    server.script(method, held)
    calls: dict[str, Callable[[], object]] = {
        "Tasks.Delete": lambda: client.delete_task("web"),
        "Tasks.Exec": lambda: client.exec("web", "slow", PROCESS),
        "Tasks.Get": lambda: client.status("web"),
        "Containers.Get": lambda: client.restore("elsewhere"),
    }
    hanging = Beside(calls[method])
    assert held.begun.wait(DEADLINE)

    def others() -> None:
        client.exec("other", "e", PROCESS)
        assert client.list_pids("web")
        client.create("third", SPEC)
        client.start("third")
        server.exit("third", code=4)
        assert client.wait("third").code == 4
        assert client.delete_task("third").code == 4
        client.delete("third")
        if method != "Tasks.Delete":
            client.exec("web", "quick", PROCESS)
            server.exit("web", "quick", code=5)
            assert client.wait("web", "quick").code == 5

    Beside(others).answer()
    assert hanging.running
    held.release()
    with suppress(NotFoundError):  # of the one that is not there to be restored
        hanging.answer()


def test_close_ends_what_is_still_looked_for_after_its_containers_end(
    server: Scripted, client: Client, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exec whose exit nobody told, of a container that is deleted: its waiter is woken, and its IO closed."""
    monkeypatch.setattr(delivery, "_FIRST_LOOK_SECONDS", 3600.0)
    monkeypatch.setattr(client_module, "_ASK_AGAIN_SECONDS", 3600.0)
    attached: list[cio.DirectIO] = []

    def attach(dio: cio.DirectIO) -> cio.IO:
        attached.append(dio)
        return dio

    started(client)
    client.exec("web", "e", PROCESS, attach_stdio=attach)
    begun = threading.Event()
    wait_exit = Container.wait_exit

    def wait(*args: object, **others: object) -> object:
        begun.set()
        return wait_exit(*args, **others)  # type: ignore[arg-type] # passed on as they came

    monkeypatch.setattr(Container, "wait_exit", wait)
    waiting = Beside(lambda: client.wait("web", "e", timeout=DEADLINE))
    assert begun.wait(DEADLINE)
    with server.lock:
        server.processes.clear()
    client.delete_task("web")
    client.delete("web")

    Beside(lambda: client.close(timeout=3600.0)).answer()
    with suppress(CallCancelledError):  # or it is looked for a last time, and nowhere to be found
        assert waiting.answer().code == 255
    assert [stream.read() for stream in attached[0].outputs] == [b"", b""]


def test_close_from_many_threads_and_from_the_backend(
    server: Scripted, tmp_path: Path, backend: Recorder
) -> None:
    client = connect(server, tmp_path, backend)
    backend.then = lambda event, info: client.close(timeout=1) if event is EventType.EXIT else None
    started(client)
    server.exit("web")
    eventually(lambda: client.closed, "the close")
    assert race(*[client.close] * 3) == [None] * 3


# -------------------------------------------------------------------------------------------- whatever comes in between


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupt_after_the_deletion_of_a_task_locks_nothing(
    client: Client, server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in ("settle", "finish"):
        started(client)
        server.exit("web", code=5)
        with monkeypatch.context() as interrupted:
            interrupted.setattr(delivery.Delivery, step, interrupt)
            with pytest.raises(KeyboardInterrupt):
                client.delete_task("web")
        assert client.wait("web").code == 5
        refused(client.delete_task("web", timeout=1), NotFoundError)
        client.delete("web")


def test_an_interrupt_while_a_bundle_is_removed_frees_the_id(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.create("web", SPEC)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(Bundle, "remove", interrupt)
        with pytest.raises(KeyboardInterrupt):
            client.delete("web")
    client.create("web", SPEC)
    client.delete("web")


def test_a_start_that_cannot_even_be_undone_frees_the_id(
    client: Client, server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(client)
    server.script("Tasks.Start", fail(INTERNAL))
    with monkeypatch.context() as broken:
        broken.setattr(Attached, "discard", interrupt)
        with pytest.raises(KeyboardInterrupt):
            client.exec("web", "e", PROCESS)
    assert client.exec("web", "e", PROCESS) > 0


def test_a_start_that_fails_for_lack_of_descriptors_leaves_nothing(
    client: Client, server: Scripted, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(client)

    def none_left(*_: object) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    server.script("Tasks.Start", fail(INTERNAL, "no more"))
    with monkeypatch.context() as full:
        full.setattr(os, "eventfd", none_left)
        with pytest.raises(SystemFailureError, match="no more"):
            client.exec("web", "e", PROCESS, with_stdin=True, attach_stdio=lambda dio: dio)
    assert files(state) == ["web"]
    client.exec("web", "e", PROCESS, with_stdin=True, attach_stdio=lambda dio: dio)


def test_an_io_that_cannot_be_given_up_keeps_no_other_from_its_end(
    server: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    abandoned: list[Attached] = []
    abandon = Attached.abandon

    def abandon_or_fail(self: Attached) -> None:
        abandoned.append(self)
        if len(abandoned) == 1:
            raise OSError(errno.EMFILE, "too many open files")
        abandon(self)

    with connect(server, tmp_path) as client:
        for name in ("web", "db"):
            started(client, name, attach=lambda dio: dio)
        with monkeypatch.context() as broken:
            broken.setattr(Attached, "abandon", abandon_or_fail)
            client.close()
        assert len(set(abandoned)) == 2
        abandon(abandoned[0])


def test_a_failed_exec_leaves_nothing_to_the_collector(client: Client, server: Scripted) -> None:
    class Sink:
        def __call__(self, data: bytes) -> None:
            raise AssertionError("nothing was written")

    started(client)
    sink = Sink()
    gone = weakref.ref(sink)
    attach = cio.copy(stdout=sink)
    gc.collect()
    gc.disable()
    try:
        server.script("Tasks.Start", fail(INTERNAL))
        with suppress(SystemFailureError):
            client.exec("web", "e", PROCESS, attach_stdio=attach)
        del sink, attach
        eventually(lambda: gone() is None, "the end of the user's destination")
    finally:
        gc.enable()


def test_a_container_whose_task_another_made_is_not_deleted(client: Client, server: Scripted) -> None:
    client.create("web", SPEC)
    server.processes["web", ""] = Process(77)
    with pytest.raises(FailedPreconditionError, match="a task exists that was not started here"):
        client.delete("web")
    assert server.called("Containers.Delete") == []
    server.script("Tasks.Get", fail(UNAVAILABLE))
    with pytest.raises(UnavailableError):
        client.delete("web")
    server.processes.clear()
    client.delete("web")
    assert server.containers == {}


@pytest.mark.parametrize(
    ("timeout", "limits"),
    [(12, (6, 8)), (0.9, (0, 0.6)), (60, (40, 45)), (math.inf, (math.inf, math.inf))],
)
def test_readers_get_most_of_a_deletions_time_and_never_more_than_there_is(
    client: Client,
    server: Scripted,
    monkeypatch: pytest.MonkeyPatch,
    timeout: float,
    limits: tuple[float, float],
) -> None:
    given: list[float] = []

    def drain(_self: object, _container: object, _processes: object, limit: float) -> bool:
        given.append(limit)
        return True

    started(client)
    server.exit("web")
    client.wait("web")
    monkeypatch.setattr(delivery.Delivery, "drain", drain)
    client.delete_task("web", timeout=timeout)
    (limit,) = given
    assert limits[0] <= limit <= limits[1]


def test_a_wait_is_over_in_time_also_when_containerd_hangs(
    client: Client, server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "_ASK_SECONDS", 3 * DEADLINE)
    started(client)
    held = Held()
    server.script("Tasks.Get", held)
    waiting, _ = held_up(held, lambda seconds: client.wait("web", timeout=seconds))
    with pytest.raises(DeadlineExceededError, match="has not ended in time"):
        waiting.answer()
    assert held.cut.wait(DEADLINE)


def test_a_crowd_that_waits_asks_like_one(
    client: Client, server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(client)
    monkeypatch.setattr(client_module, "_ASK_AGAIN_SECONDS", 0.1)
    rounds: list[float] = []
    wait_exit = Container.wait_exit

    def counted(
        self: Container, process: Record, timeout: float | None, stop: Callable[[], bool] = lambda: False
    ) -> ExitStatus | None:
        rounds.append(time.monotonic())
        return wait_exit(self, process, timeout, stop)

    monkeypatch.setattr(Container, "wait_exit", counted)
    crowd = [Beside(lambda: client.wait("web")) for _ in range(20)]
    eventually(lambda: len(rounds) > 3 * len(crowd), "three rounds of each")
    asked, intervals = len(server.called("Tasks.Get")), (rounds[-1] - rounds[0]) / 0.1
    server.exit("web", code=5)
    assert {each.answer().code for each in crowd} == {5}
    assert 1 <= asked <= intervals + 2, "not each for itself"


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("signal_process", ("web", "init", "KILL")),
        ("signal_process", ("web", "init", None)),
        ("resize_terminal", ("web", "init", "80", 24)),
        ("resize_terminal", ("web", "init", 80, None)),
    ],
)
def test_an_argument_of_another_type_is_refused_in_our_words(
    client: Client, verb: str, arguments: tuple[object, ...]
) -> None:
    started(client)
    with pytest.raises(InvalidParameterError):
        getattr(client, verb)(*arguments)
    with pytest.raises(InvalidParameterError, match="a positive number of seconds"):
        client.status("web", timeout="5")  # type: ignore[arg-type] # which is refused


def test_a_forked_child_leaves_its_parents_clients_alone(
    client: Client, server: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)
        own = connect(server, tmp_path / "own")
        client_module._close_at_exit()
        client.close()
        assert "of another process" in repr(client)
        with pytest.raises(FailedPreconditionError, match="which was forked from it"):
            client.version()
    assert own.closed
    assert not client.closed
    client.version()


# ---------------------------------------------------------------------------------------- what ends before it has started


class EndsAtOnce:
    """A start that is answered late: after the process's end is known, and its deletion, if there is one, was done."""

    def __init__(self, server: Scripted, exec_id: str, deletion: str) -> None:
        self.server = server
        self.exec_id = exec_id
        self.deletion = deletion
        self.overtaken = False
        self._deleted = threading.Event()

    def __call__(self, context: Context, go_on: Callable[[], Message]) -> Message:
        done = go_on()
        self.server.script(self.deletion, self._delete)
        self.server.exit("web", self.exec_id, 3)
        self.overtaken = self._deleted.wait(
            0.3
        )  # the time that containerd takes; a client that waits needs none
        if self.overtaken:
            context.abort(grpc.StatusCode.NOT_FOUND, "process does not exist: not found")
        return done

    def _delete(self, context: Context, go_on: Callable[[], Message]) -> Message:
        self._deleted.set()
        return go_on()


def test_an_exec_that_ends_at_once_is_not_deleted_before_its_start_is_answered(
    client: Client, server: Scripted, backend: Recorder
) -> None:
    started(client)
    start = EndsAtOnce(server, "e", "Tasks.DeleteProcess")
    server.script("Tasks.Start", start)
    assert client.exec("web", "e", PROCESS) > 0
    assert not start.overtaken
    assert backend.wait_for_exit("e") == 3
    server.wait_for("Tasks.DeleteProcess")
    assert client.wait("web", "e").code == 3


def test_a_task_that_the_backend_deletes_at_once_is_not_deleted_before_its_start_is_answered(
    client: Client, server: Scripted, backend: Recorder
) -> None:
    deleted: list[ExitStatus] = []

    def delete(event: EventType, info: EventInfo) -> None:
        if event is EventType.EXIT:
            deleted.append(client.delete_task("web"))

    backend.then = delete
    client.create("web", SPEC)
    start = EndsAtOnce(server, "", "Tasks.Delete")
    server.script("Tasks.Start", start)
    assert client.start("web") > 0
    assert not start.overtaken
    eventually(lambda: [each.code for each in deleted] == [3], "the deletion")
    client.delete("web")


def test_a_start_is_undone_although_the_connection_breaks_again(client: Client, server: Scripted) -> None:
    client.create("web", SPEC)
    server.script("Tasks.Start", lose(UNAVAILABLE))
    server.script("Tasks.Kill", fail(UNAVAILABLE))
    server.script("Tasks.Delete", fail(UNAVAILABLE), lose(UNAVAILABLE))
    with capture_logs() as logs, pytest.raises(UnavailableError):
        client.start("web")
    assert server.processes == {}
    assert [each for each in logs if each["event"] == "clean_up_failed"] == []
