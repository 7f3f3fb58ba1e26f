"""A containerd that has lost its mind: whatever it answers, a verb gives a sane value or one of our errors, and the client lives."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import grpc
import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from libcontainerd import Client, Status, cio
from libcontainerd import _cleanup as cleanup
from libcontainerd import client as client_module
from libcontainerd._events import delivery
from libcontainerd._wire import typeurl
from libcontainerd._wire.identifiers import is_identifier
from libcontainerd._wire.pb.events import task_pb2 as task_events
from libcontainerd._wire.pb.runc.options_pb2 import ProcessDetails
from libcontainerd._wire.pb.services.containers_pb2 import ContainersServicer
from libcontainerd._wire.pb.services.tasks_pb2 import ListPidsResponse, TasksServicer
from libcontainerd._wire.pb.services.version_pb2 import VersionServicer
from libcontainerd._wire.pb.types import event_pb2, task_pb2
from libcontainerd._wire.pb.wellknown_pb2 import Any
from libcontainerd.errors import (
    DeadlineExceededError,
    LibcontainerdError,
    SystemFailureError,
    UnavailableError,
)
from libcontainerd.stats import Stats, Usage
from libcontainerd.types import EventInfo, EventType, ExitStatus, Restored, Summary, Version
from tests.conftest import Count
from tests.leaks import no_leaks
from tests.unit import nonsense
from tests.unit.beside import DEADLINE, eventually
from tests.unit.server import Process, Scripted, Step, fail, say

SPEC = {"ociVersion": "1.0.2", "process": {"args": ["/bin/true"], "cwd": "/"}, "root": {"path": "rootfs"}}
PROCESS = {"args": ["/bin/true"], "cwd": "/"}

METHODS: Final = {
    f"{servicer.service.name.rpartition('.')[2]}.{method.name}": method.response
    for servicer in (ContainersServicer, TasksServicer, VersionServicer)
    for method in servicer.service.methods
    if not method.client_streaming
}


def _direct(dio: cio.DirectIO) -> cio.IO:
    return dio


def is_whole(number: object) -> bool:
    return isinstance(number, int) and 0 <= number < 2**32


def is_exit(answer: object) -> bool:
    return isinstance(answer, ExitStatus) and is_whole(answer.code) and answer.exited_at.tzinfo is not None


def is_none(answer: object) -> bool:
    return answer is None


Verb = Callable[[Client, str], object]

# Each with the methods that it calls, and what it may return.
VERBS: Final[dict[str, tuple[Verb, list[str], Callable[[object], bool]]]] = {
    "version": (lambda client, _: client.version(), ["Version.Version"], lambda it: isinstance(it, Version)),
    "create": (
        lambda client, name: client.create(f"{name}-new", SPEC),
        ["Containers.Create", "Containers.Get", "Containers.Delete"],
        is_none,
    ),
    "start": (
        lambda client, name: client.start(name, None, True, _direct),
        ["Tasks.Create", "Tasks.Start", "Tasks.Kill", "Tasks.Wait", "Tasks.Delete"],
        is_whole,
    ),
    "exec": (
        lambda client, name: client.exec(name, "sh", PROCESS, True, _direct),
        ["Tasks.Exec", "Tasks.Start", "Tasks.Kill", "Tasks.Wait", "Tasks.DeleteProcess"],
        is_whole,
    ),
    "signal_process": (
        lambda client, name: client.signal_process(name, "init", 9),
        ["Tasks.Kill", "Tasks.Resume"],
        is_none,
    ),
    "resize_terminal": (
        lambda client, name: client.resize_terminal(name, "init", 80, 24),
        ["Tasks.ResizePty"],
        is_none,
    ),
    "close_stdin": (lambda client, name: client.close_stdin(name, "init"), ["Tasks.CloseIO"], is_none),
    "pause": (lambda client, name: client.pause(name), ["Tasks.Pause"], is_none),
    "resume": (lambda client, name: client.resume(name), ["Tasks.Resume"], is_none),
    "status": (lambda client, name: client.status(name), ["Tasks.Get"], lambda it: isinstance(it, Status)),
    "list_pids": (
        lambda client, name: client.list_pids(name),
        ["Tasks.ListPids"],
        lambda it: isinstance(it, list) and all(is_whole(pid) for pid in it),
    ),
    "summary": (
        lambda client, name: client.summary(name),
        ["Tasks.ListPids"],
        lambda it: isinstance(it, list) and all(isinstance(each, Summary) for each in it),
    ),
    "stats": (
        lambda client, name: client.stats(name),
        ["Tasks.Metrics", "Tasks.Get"],
        lambda it: isinstance(it, Stats) and isinstance(it.usage, Usage),
    ),
    "stats_all": (
        lambda client, _: client.stats_all(),
        ["Tasks.Metrics"],
        lambda it: isinstance(it, dict) and all(isinstance(each, Stats) for each in it.values()),
    ),
    "update_resources": (
        lambda client, name: client.update_resources(name, {"pids": {"limit": 5}}),
        ["Tasks.Update"],
        is_none,
    ),
    "wait": (lambda client, name: client.wait(name, timeout=0.05), ["Tasks.Get"], is_exit),
    "delete_task": (
        lambda client, name: client.delete_task(name),
        ["Tasks.Get", "Tasks.Delete"],
        is_exit,
    ),
    "delete": (
        lambda client, name: client.delete(name),
        ["Tasks.Get", "Containers.Delete"],
        is_none,
    ),
    "replace": (
        lambda client, name: client.replace(name, SPEC, timeout=0.3),
        ["Containers.Create", "Tasks.Get", "Tasks.Kill", "Tasks.Wait", "Tasks.Delete", "Containers.Delete"],
        is_none,
    ),
}
SLOW: Final = [HealthCheck.too_slow, HealthCheck.data_too_large]
NOT_RUNNING: Final = {"start", "delete"}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_ASK_AGAIN_SECONDS", 0.02)
    monkeypatch.setattr(delivery, "_LATE_EVENT_SECONDS", 0.02)
    monkeypatch.setattr(delivery, "_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(delivery, "_FIRST_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(cleanup, "_MOST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(cleanup, "_DEATH_SECONDS", 0.05)


@st.composite
def scripts(draw: st.DrawFn, methods: list[str]) -> dict[str, list[Step]]:
    """Nonsense for the next calls of some of the methods, and of one at least."""
    chosen = draw(st.lists(st.sampled_from(methods), min_size=1, max_size=3, unique=True))
    kinds = list(METHODS.values())
    return {
        method: draw(st.lists(nonsense.answers(METHODS[method], kinds), min_size=1, max_size=3))
        for method in chosen
    }


def forget_all(server: Scripted, client: Client, name: str) -> None:
    """Let a container go, in the server and then in the client, which has to notice."""
    with server.lock:
        for key in [key for key in server.processes if key[0] == name]:
            del server.processes[key]
    client.delete_task(name)
    try:
        client.delete(name)
    except LookupError:
        assert repr(client).endswith(": 0 containers>")


@pytest.mark.parametrize("verb", VERBS)
def test_no_answer_is_too_absurd(verb: str, tmp_path: Path, count: Count) -> None:
    call, methods, is_sane = VERBS[verb]
    assert set(methods) <= METHODS.keys()
    state = tmp_path / "state"
    numbers = itertools.count()

    with no_leaks(), Scripted() as server, Client(server.path, namespace="test", state_dir=state) as client:

        @settings(max_examples=count(60, 10), suppress_health_check=SLOW)
        @given(scripts(methods))
        def any_answers(script: dict[str, list[Step]]) -> None:
            name = f"c{next(numbers)}"
            client.create(name, SPEC)
            if verb not in NOT_RUNNING:
                client.start(name, attach_stdio=_direct)
            for method, steps in script.items():
                server.script(method, *steps)
            with suppress(LibcontainerdError):
                came = call(client, name)
                assert is_sane(came), came
            server.forget_scripts()
            for left in {name, f"{name}-new"} & {path.name for path in state.iterdir()}:
                forget_all(server, client, left)
            eventually(lambda: not list(state.iterdir()), "an empty state directory")
            server.containers.clear()

        any_answers()
        client.create("sound", SPEC)
        pid = client.start("sound")
        assert client.list_pids("sound") == [pid]
        server.exit("sound", code=7)
        assert client.wait("sound", timeout=DEADLINE).code == 7
        assert client.delete_task("sound").error is None
        client.delete("sound")


def is_restored(answer: object) -> bool:
    return (
        isinstance(answer, Restored)
        and is_whole(answer.pid)
        and all(is_identifier(name) and is_whole(pid) for name, pid in answer.execs.items())
    )


RESTORING: Final[dict[str, tuple[Verb, list[str], Callable[[object], bool]]]] = {
    "restore": (
        lambda client, name: client.restore(name, _direct, timeout=2),
        ["Containers.Get", "Tasks.Get", "Tasks.ListPids", "Tasks.DeleteProcess"],
        is_restored,
    ),
    "restore_all": (
        lambda client, _: client.restore_all(_direct, timeout=2),
        ["Containers.ListStream", "Tasks.List", "Tasks.Get", "Tasks.ListPids", "Tasks.DeleteProcess"],
        lambda it: (
            isinstance(it, dict)
            and all(is_restored(each) or isinstance(each, LibcontainerdError) for each in it.values())
        ),
    ),
}


@pytest.mark.parametrize("verb", RESTORING)
def test_nothing_absurd_is_restored(verb: str, tmp_path: Path, count: Count) -> None:
    call, methods, is_sane = RESTORING[verb]
    assert set(methods) <= METHODS.keys()
    state = tmp_path / "state"
    numbers = itertools.count()

    with (
        no_leaks(),
        Scripted() as server,
        Client(server.path, namespace="test", state_dir=state) as earlier,
        Client(server.path, namespace="test", state_dir=state) as client,
    ):

        @settings(max_examples=count(60, 10), suppress_health_check=SLOW)
        @given(scripts(methods))
        def any_answers(script: dict[str, list[Step]]) -> None:
            name = f"c{next(numbers)}"
            earlier.create(name, SPEC)
            earlier.start(name, attach_stdio=_direct)
            earlier.exec(name, "sh", PROCESS, attach_stdio=_direct)
            for method, steps in script.items():
                server.script(method, *steps)
            with suppress(LibcontainerdError):
                came = call(client, name)
                assert is_sane(came), came
            server.forget_scripts()
            for each in client._containers.all():  # a nonsense name may have been restored as well
                forget_all(server, client, each.id)
            forget_all(server, earlier, name)
            assert {path.name for path in tmp_path.iterdir()} <= {"state"}
            server.containers.clear()

        any_answers()


@pytest.mark.parametrize("method", ["Containers.Get", "Tasks.Get", "Tasks.ListPids"])
@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceededError),
        (grpc.StatusCode.INTERNAL, SystemFailureError),
    ],
)
def test_a_restore_without_an_answer_leaves_no_record(
    tmp_path: Path, method: str, code: grpc.StatusCode, error: type[LibcontainerdError]
) -> None:
    """What is not known to run is not said to, nor that it has ended."""
    with (
        Scripted() as server,
        Client(server.path, namespace="test", state_dir=tmp_path) as earlier,
        Client(server.path, namespace="test", state_dir=tmp_path) as client,
    ):
        earlier.create("web", SPEC)
        pid = earlier.start("web", attach_stdio=_direct)
        server.script(method, fail(code))
        with no_leaks(), pytest.raises(error):
            client.restore("web", _direct)
        assert repr(client).endswith(": 0 containers>")
        assert client.restore("web", _direct) == Restored(alive=True, pid=pid, execs={})
        forget_all(server, client, "web")


def test_an_exec_with_a_path_for_a_name_is_not_restored(tmp_path: Path) -> None:
    """Its FIFOs would be outside of the bundle, and be removed with its exit."""
    with (
        Scripted() as server,
        Client(server.path, namespace="test", state_dir=tmp_path / "state") as earlier,
        Client(server.path, namespace="test", state_dir=tmp_path / "state") as client,
    ):
        earlier.create("web", SPEC)
        earlier.start("web")
        victims = [tmp_path / "victim-stdout", tmp_path / "victim-stderr"]
        for each in victims:
            os.mkfifo(each)
        name = "../../victim"
        stdio = [f"{tmp_path}/state/web/{name}-{stream}" for stream in ("stdout", "stderr")]
        pids = [task_pb2.ProcessInfo(pid=77, info=typeurl.pack(ProcessDetails(exec_id=name)))]
        server.processes["web", name] = Process(77, task_pb2.Status.RUNNING, stdio=("", stdio[0], stdio[1]))
        server.script("Tasks.ListPids", say(ListPidsResponse(processes=pids).SerializeToString()))
        restored = client.restore("web", _direct)
        assert restored.execs == {}
        server.exit("web", name)
        server.exit("web")
        assert client.wait("web", timeout=DEADLINE).code == 0
        client.delete_task("web")
        client.delete("web")
        assert all(each.is_fifo() for each in victims)
        assert server.called("Tasks.DeleteProcess") == []


# --------------------------------------------------------------------------------------------------------------- events

EVENTS: Final[list[type[Message]]] = [
    task_events.TaskExit,
    task_events.TaskOOM,
    task_events.TaskCreate,
    task_events.TaskStart,
    task_events.TaskExecAdded,
    task_events.TaskExecStarted,
    task_events.TaskPaused,
    task_events.TaskResumed,
    task_events.TaskDelete,
]


@st.composite
def envelopes(draw: st.DrawFn) -> event_pb2.Envelope | bytes:
    """What a publisher, or a server, may send instead of an event: some of it about our container or exec."""
    kind = draw(st.sampled_from(EVENTS))
    if draw(st.sampled_from([False, False, False, True])):
        return draw(st.one_of(nonsense.messages(event_pb2.Envelope), st.binary(max_size=100)))
    payload = draw(st.one_of(nonsense.messages(kind), st.binary(max_size=100)))
    if draw(st.booleans()):
        names = {"container_id": "web", **draw(st.sampled_from([{}, {"id": "sh"}, {"exec_id": "sh"}]))}
        known = {name: value for name, value in names.items() if name in kind.DESCRIPTOR.fields_by_name}
        payload += kind(**known).SerializeToString()  # the last one of a field counts
    return event_pb2.Envelope(
        namespace=draw(st.sampled_from(["test", "test", "test", "other", ""])),
        topic=draw(st.one_of(st.just("/tasks/exit"), nonsense.names)),
        event=Any(
            type_url=draw(st.one_of(st.just(kind.DESCRIPTOR.full_name), nonsense.names)), value=payload
        ),
    )


class Exits:
    """A backend that remembers exits."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, int]] = []

    def process_event(self, container_id: str, event: EventType, info: EventInfo, /) -> None:
        assert container_id == info.container_id
        assert len(info.process_id) <= 76
        assert is_whole(info.pid)
        assert is_whole(info.exit_code)
        if event is EventType.EXIT:
            self.seen.append((container_id, info.process_id, info.exit_code))


def test_no_event_is_too_absurd(tmp_path: Path, count: Count) -> None:
    state = tmp_path / "state"
    numbers = itertools.count(1000)

    with no_leaks(), Scripted() as server:
        backend = Exits()
        with Client(server.path, namespace="test", state_dir=state, backend=backend) as client:

            @settings(max_examples=count(60, 10), suppress_health_check=SLOW)
            @given(st.lists(envelopes(), min_size=1, max_size=10))
            def any_events(sent: list[event_pb2.Envelope | bytes]) -> None:
                client.create("web", SPEC)
                client.start("web")
                client.exec("web", "sh", PROCESS)
                for each in sent:
                    server.send(each)
                # One about a container that nobody lies about: what came before it on its stream has been dealt with, and where
                # the stream broke, the client came back.
                code = next(numbers)
                client.create("sound", SPEC)
                client.start("sound")
                server.exit("sound", code=code)
                eventually(lambda: ("sound", "sound", code) in backend.seen, "the exit of the sound one")
                assert client.delete_task("sound").code == code
                client.delete("sound")
                forget_all(server, client, "web")

            any_events()


def test_garbage_in_the_stream_is_a_gap_and_no_end(tmp_path: Path) -> None:
    backend = Exits()
    with (
        Scripted() as server,
        Client(server.path, namespace="test", state_dir=tmp_path, backend=backend) as client,
    ):
        client.create("web", SPEC)
        client.start("web")
        server.exit("web", code=3, told=False)
        server.send(b"\xff")
        eventually(lambda: backend.seen == [("web", "web", 3)], "what was missed is asked for")
        server.wait_for("Events.Subscribe", 2)
        client.delete_task("web")
