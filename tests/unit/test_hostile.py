"""A containerd that has lost its mind: whatever it answers, a verb gives a sane value or one of our errors, and the client lives."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from libcontainerd import Client, Status, cio
from libcontainerd import client as client_module
from libcontainerd import _cleanup as cleanup
from libcontainerd._events import delivery
from libcontainerd._wire.pb.services.containers_pb2 import ContainersServicer
from libcontainerd._wire.pb.services.tasks_pb2 import TasksServicer
from libcontainerd._wire.pb.services.version_pb2 import VersionServicer
from libcontainerd.errors import LibcontainerdError
from libcontainerd.types import ExitStatus, Summary, Version
from tests.leaks import no_leaks
from tests.unit import nonsense
from tests.unit.beside import DEADLINE, eventually
from tests.unit.server import Scripted, Step

SPEC = {"ociVersion": "1.0.2", "process": {"args": ["/bin/true"], "cwd": "/"}, "root": {"path": "rootfs"}}
PROCESS = {"args": ["/bin/true"], "cwd": "/"}

METHODS: Final = {
    f"{servicer.service.name.rpartition('.')[2]}.{method.name}": method.response
    for servicer in (ContainersServicer, TasksServicer, VersionServicer)
    for method in servicer.service.methods
    if not method.server_streaming
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
def test_no_answer_is_too_absurd(verb: str, tmp_path: Path) -> None:
    call, methods, is_sane = VERBS[verb]
    assert set(methods) <= METHODS.keys()
    state = tmp_path / "state"
    numbers = itertools.count()

    with no_leaks(), Scripted() as server, Client(server.path, namespace="test", state_dir=state) as client:

        @settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
        @given(scripts(methods))
        def any_answers(script: dict[str, list[Step]]) -> None:
            name = f"c{next(numbers)}"
            client.create(name, SPEC)
            if verb not in NOT_RUNNING:
                client.start(name, attach_stdio=_direct)
            for method, steps in script.items():
                server.script(method, *steps)
            try:
                answer = call(client, name)
            except LibcontainerdError as error:
                assert str(error)
            else:
                assert is_sane(answer), answer
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
