"""Which processes are taken for orphaned shims, and how they are ended, with processes that stand in for shims."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from libcontainerd._runtime import KEEP_LABEL
from libcontainerd._wire.pb.services import containers_pb2
from libcontainerd._wire.pb.types import sandbox_pb2, task_pb2
from libcontainerd.errors import LibcontainerdError
from libcontainerd.supervisor import claim, orphans
from libcontainerd.supervisor.orphans import Shim, Sweeper, shims_of
from tests.integration.containers import alive
from tests.unit.beside import eventually
from tests.unit.server import Held, Process, Scripted, fail

# Listens where it is told, has a child, and stays.
SHIM = """\
import socket, subprocess, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
child = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
held = []
while True:
    held.append(listener.accept())
    print("connected", flush=True)
"""


class Log:
    """Keeps the events that it is given."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []

    def event(self, method: str, event: str, **fields: object) -> None:
        self.events.append((event, fields))

    def names(self) -> list[str]:
        return [name for name, _ in self.events]


class Stand:
    """A process in a shim's stead."""

    def __init__(self, directory: Path, address: str, container_id: str = "web", *more: str) -> None:
        self.bundle = directory / "bundle"
        self.bundle.mkdir()
        self.socket = str(directory / "s")
        names = ["-namespace", "test", "-id", container_id, "-address", address, *more]
        self.process = subprocess.Popen(
            [sys.executable, "-c", SHIM, self.socket, *names], cwd=self.bundle, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        self.child = int(self.process.stdout.readline())

    @property
    def pid(self) -> int:
        return self.process.pid

    def lose_bundle(self) -> None:
        self.bundle.rmdir()

    def connected(self) -> None:
        """Wait until it has taken a connection."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"connected\n"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        with suppress(ProcessLookupError):
            os.kill(self.child, 9)


Make = Callable[..., Stand]


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as made:
        yield made


@pytest.fixture
def make(server: Scripted) -> Iterator[Make]:
    made: list[Stand] = []
    with tempfile.TemporaryDirectory(prefix="lco-") as directory:

        def stand(container_id: str = "web", *more: str, address: str = "") -> Stand:
            own = Path(directory, str(len(made)))
            own.mkdir()
            made.append(Stand(own, address or server.path, container_id, *more))
            return made[-1]

        yield stand
        for each in made:
            each.close()


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def sweeper(server: Scripted, log: Log, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sweeper]:
    monkeypatch.setattr(orphans, "_END_SECONDS", 0.2)
    made = Sweeper(server.path, log)  # type: ignore[arg-type] # what it uses of one
    yield made
    made.stop()


def test_a_shim_is_known_by_its_arguments(server: Scripted, make: Make) -> None:
    ours = make("web")
    make("other", address=f"{server.path}x")
    make("starting", "start")
    make("ending", "delete")
    make("../web")
    assert shims_of(server.path) == {Shim(ours.pid, str(claim.start_time(ours.pid)), "test", "web")}


def test_an_abandoned_shim_is_killed_at_the_second_look(
    server: Scripted, make: Make, sweeper: Sweeper, log: Log
) -> None:
    shim = make()
    shim.lose_bundle()
    sweeper.look()
    assert shim.process.poll() is None
    assert server.called("Containers.Create") == []

    sweeper.look()
    assert shim.process.wait(30) == -9
    eventually(lambda: not alive(shim.child), "its child has ended")
    assert not os.path.exists(shim.socket)
    fields = {"pid": shim.pid, "namespace": "test", "container": "web"}
    assert log.events == [("orphan_ended", {**fields, "by": "signal"})]
    assert server.containers == {}


def test_what_containerd_ends_is_not_killed(
    server: Scripted, make: Make, sweeper: Sweeper, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans, "_END_SECONDS", 30.0)
    shim = make()
    server.processes["web", ""] = Process(7, task_pb2.Status.RUNNING)

    def delete(context: grpc.ServicerContext, go_on: Callable[[], object]) -> object:
        shim.close()
        return go_on()

    server.script("Tasks.Delete", delete)  # type: ignore[arg-type] # as the steps there
    sweeper.look()
    sweeper.look()
    assert server.processes == {}
    assert server.containers == {}
    assert [(name, fields["by"]) for name, fields in log.events] == [("orphan_ended", "containerd")]


def test_a_shim_whose_container_is_there_is_left(server: Scripted, make: Make, sweeper: Sweeper) -> None:
    shim = make()
    shim.lose_bundle()
    server.containers["web"] = containers_pb2.Container(id="web")
    for _ in range(3):
        sweeper.look()
    assert shim.process.poll() is None
    assert server.called("Containers.Create") == []


@pytest.mark.parametrize(
    ("labels", "left"),
    [({}, True), ({KEEP_LABEL: "1"}, False), (None, False)],
    ids=["a sandbox's own", "an ended container's record", "no record"],
)
def test_a_sandboxs_shim_is_left(
    make: Make, log: Log, monkeypatch: pytest.MonkeyPatch, labels: dict[str, str] | None, left: bool
) -> None:
    monkeypatch.setattr(orphans, "_END_SECONDS", 0.2)
    with Scripted(services=("containers", "tasks", "sandboxes")) as server:
        if labels is not None:
            server.sandboxes["web"] = sandbox_pb2.Sandbox(sandbox_id="web", labels=labels)
        shim = make(address=server.path)
        shim.lose_bundle()
        sweeper = Sweeper(server.path, log)  # type: ignore[arg-type] # as above
        for _ in range(2):
            sweeper.look()
        sweeper.stop()
    assert (shim.process.poll() is None) is left


def test_a_container_that_comes_between_the_looks_keeps_its_shim(
    server: Scripted, make: Make, sweeper: Sweeper
) -> None:
    shim = make()
    shim.lose_bundle()
    sweeper.look()
    server.script("Containers.Create", fail(grpc.StatusCode.ALREADY_EXISTS))
    sweeper.look()
    assert shim.process.poll() is None
    assert server.called("Tasks.Delete") == []


@pytest.mark.parametrize("why", ["its bundle is there", "somebody is connected to it"])
def test_a_shim_that_others_may_share_is_spared(
    server: Scripted, make: Make, sweeper: Sweeper, log: Log, why: str
) -> None:
    shim = make()
    with socket.socket(socket.AF_UNIX) as connection:
        if why == "somebody is connected to it":
            shim.lose_bundle()
            connection.connect(shim.socket)
            shim.connected()
        for _ in range(2):
            sweeper.look()
        calls = len(server.calls)
        sweeper.look()
    assert shim.process.poll() is None
    assert len(server.calls) == calls, "it is not asked for again"
    assert log.events == []


def test_one_that_was_spared_is_ended_when_everybody_has_left_it(
    server: Scripted, make: Make, sweeper: Sweeper, log: Log
) -> None:
    shim = make()
    for _ in range(3):
        sweeper.look()
    assert shim.process.poll() is None
    shim.lose_bundle()
    for _ in range(2):
        sweeper.look()
    assert shim.process.wait(30) == -9
    assert log.names() == ["orphan_ended"]


def test_it_is_killed_while_nobody_can_have_its_id(
    server: Scripted, make: Make, sweeper: Sweeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim = make()
    shim.lose_bundle()
    kill = orphans._kill
    there: list[bool] = []

    def watched(killed: Shim, process: int) -> None:
        there.append("web" in server.containers)
        kill(killed, process)

    monkeypatch.setattr(orphans, "_kill", watched)
    for _ in range(2):
        sweeper.look()
    assert shim.process.wait(30) == -9
    assert there == [True]


def test_channels_of_namespaces_without_shims_are_closed(make: Make, sweeper: Sweeper) -> None:
    shim = make()
    sweeper.look()
    (shelter,) = sweeper._shelters.values()
    shim.close()
    sweeper.look()
    assert shelter.closed
    assert sweeper._shelters == {}


def test_another_process_of_that_pid_is_not_touched(
    server: Scripted, make: Make, sweeper: Sweeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = make()
    stranger.lose_bundle()
    earlier = {Shim(stranger.pid, "1", "test", "web"), Shim(2**22 + 1, "1", "test", "web")}
    monkeypatch.setattr(orphans, "shims_of", lambda address: earlier)
    for _ in range(3):
        sweeper.look()
    assert stranger.process.poll() is None
    assert server.called("Containers.Create") == []


def test_one_that_cannot_be_ended_keeps_no_other(
    server: Scripted, make: Make, sweeper: Sweeper, log: Log
) -> None:
    for each in (make("a"), make("b")):
        each.lose_bundle()
    server.script("Containers.Create", fail(grpc.StatusCode.INTERNAL))
    sweeper.look()
    sweeper.look()
    assert sorted(log.names()) == ["orphan_ended", "orphan_not_ended"]
    sweeper.look()
    assert sorted(log.names()) == ["orphan_ended", "orphan_ended", "orphan_not_ended"]


def test_nothing_is_concluded_from_a_containerd_that_is_away(
    server: Scripted, make: Make, sweeper: Sweeper
) -> None:
    shim = make()
    shim.lose_bundle()
    sweeper.look()
    server.script("Containers.Get", fail(grpc.StatusCode.UNAVAILABLE))
    with pytest.raises(LibcontainerdError):
        sweeper.look()
    assert shim.process.poll() is None


def test_the_thread_looks_again_whatever_a_look_brings(
    server: Scripted, make: Make, sweeper: Sweeper, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans, "_SOON_SECONDS", 0.01)
    monkeypatch.setattr(orphans, "_SECONDS", 0.01)
    found = orphans.shims_of
    surprises = iter([RuntimeError("unforeseen")])

    def surprising(address: str) -> set[Shim]:
        for surprise in surprises:
            raise surprise
        return found(address)

    monkeypatch.setattr(orphans, "shims_of", surprising)
    server.script("Containers.Get", fail(grpc.StatusCode.UNAVAILABLE))
    shim = make()
    shim.lose_bundle()
    sweeper.start()
    sweeper.soon()
    eventually(lambda: "orphan_ended" in log.names(), "it is ended")
    assert shim.process.wait(30) == -9
    assert log.names().count("orphans_not_looked_for") == 2


def test_stop_ends_a_look_that_waits_for_an_answer(
    server: Scripted, make: Make, sweeper: Sweeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans, "_SOON_SECONDS", 0.01)
    held = Held()
    server.script("Containers.Get", held)
    make()
    sweeper.start()
    assert held.begun.wait(30)
    sweeper.stop()
    assert not sweeper._thread.is_alive()
    held.release()


def test_a_sweeper_that_never_began_can_be_stopped(server: Scripted, log: Log) -> None:
    Sweeper(server.path, log).stop()  # type: ignore[arg-type] # as above


def test_what_is_gone_is_neither_abandoned_nor_a_parent() -> None:
    gone = Shim(2**22 + 1, "1", "test", "web")
    assert not orphans.is_abandoned(gone)
    assert orphans._sockets(gone.pid) == []
    assert orphans._children(gone.pid) == set()
    orphans._kill_child(gone.pid, os.getpid())


def test_a_child_that_is_anothers_is_not_killed(make: Make) -> None:
    shim = make()
    orphans._kill_child(shim.child, os.getpid())
    assert alive(shim.child)
