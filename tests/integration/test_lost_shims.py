"""Shims that a start has left which was cut off by containerd's death: none stays, and nobody else's is taken for one."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import pytest
from structlog.testing import capture_logs

from libcontainerd import Client, Remote, UnavailableError, cio, oci
from libcontainerd.supervisor import orphans
from tests.integration.containers import (
    Collected,
    MakeSpec,
    Raw,
    alive,
    kill_shims,
    shims_of,
    stop,
    wait_until,
)

_GRACE = 60.0

RUNC = """\
#!/bin/sh
for word in "$@"; do
    if [ "$word" = create ] && [ -e {hold} ]; then
        touch {begun}
        while [ -e {hold} ]; do sleep 0.05; done
        [ -e {fail} ] && exit 1
    fi
done
exec runc "$@"
"""


@dataclass
class Runc:
    """A runc whose `create` can be held up, and made to fail after that."""

    directory: Path

    def __post_init__(self) -> None:
        self.hold, self.fail, self.begun = (self.directory / name for name in ("hold", "fail", "begun"))
        self.path = self.directory / "held-runc"
        names = {name: shlex.quote(str(self.directory / name)) for name in ("hold", "fail", "begun")}
        self.path.write_text(RUNC.format(**names))
        self.path.chmod(0o755)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="lcs-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)  # of a shim that was killed something may be deleted just now


@pytest.fixture
def runc(directory: Path) -> Runc:
    return Runc(directory)


@pytest.fixture
def remote(containerd_binary: Path, directory: Path) -> Iterator[Remote]:
    """A containerd of the test's own: it is killed."""
    with Remote.start(directory / "root", directory / "state", binary=str(containerd_binary)) as started:
        yield started
        kill_shims(started.address)


@pytest.fixture
def raw_channel(remote: Remote) -> Iterator[grpc.Channel]:
    options = (("grpc.default_authority", "localhost"),)
    with grpc.insecure_channel(f"unix:{remote.address}", options=options) as channel:
        yield channel


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the seconds between the sweeper's looks; before `remote` is made."""

    def set_pause(seconds: float) -> None:
        monkeypatch.setattr(orphans, "_SOON_SECONDS", seconds)
        monkeypatch.setattr(orphans, "_SECONDS", seconds)
        monkeypatch.setattr(orphans, "_SHARE", 0)

    return set_pause


@pytest.fixture
def never(sweep: Callable[[float], None]) -> None:
    sweep(3600.0)


@pytest.fixture
def often(sweep: Callable[[float], None]) -> None:
    sweep(0.2)


def cut_off_a_start(remote: Remote, client: Client, raw: Raw, runc: Runc, container_id: str) -> None:
    """Kill containerd while it has runc make a container, and have runc fail; return when both reach the next containerd."""
    for each in (runc.hold, runc.fail):
        each.touch()

    def create() -> None:
        with suppress(grpc.RpcError):
            raw.create_task(container_id)

    creating = threading.Thread(target=create)
    creating.start()
    wait_until(runc.begun.exists, "runc is asked to create")
    assert remote._supervisor is not None
    killed = remote._supervisor.pid
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    runc.hold.unlink()
    creating.join()
    wait_until(lambda: remote._supervisor and remote._supervisor.pid not in (None, killed), "another runs")
    wait_until(lambda: answers(client.version), "the client has reached it", _GRACE)
    wait_until(lambda: answers(raw.container_ids), "and so have we", _GRACE)


def answers(call: Callable[[], object]) -> bool:
    try:
        call()
    except (UnavailableError, grpc.RpcError):
        return False
    return True


def gone(remote: Remote, container_id: str) -> bool:
    return all(shim.container_id != container_id for shim in orphans.shims_of(remote.address))


def options_for(runc: Runc) -> dict[str, object]:
    return {"binary_name": str(runc.path)}


@pytest.mark.usefixtures("never")
def test_a_deletion_ends_the_shim_that_a_cut_off_start_has_left(
    remote: Remote, namespace: str, raw: Raw, spec: MakeSpec, runc: Runc
) -> None:
    with remote.new_client(namespace) as client:
        client.create("web", spec("sleep", "60"), options_for(runc))
        cut_off_a_start(remote, client, raw, runc, "web")
        client.delete("web")
        wait_until(lambda: not shims_of(remote.address), "the shim has ended", _GRACE)
        client.create("web", spec("true"))
        client.start("web")
        assert client.wait("web", timeout=_GRACE).code == 0
        client.delete_task("web")
        client.delete("web")
    assert raw.container_ids() == set()


@pytest.mark.usefixtures("never")
def test_a_container_whose_start_was_cut_off_can_be_started(
    remote: Remote, namespace: str, raw: Raw, spec: MakeSpec, runc: Runc
) -> None:
    with remote.new_client(namespace) as client:
        client.create("web", spec("sh", "-c", "exit 3"), options_for(runc))
        cut_off_a_start(remote, client, raw, runc, "web")
        client.start("web")
        assert client.wait("web", timeout=_GRACE).code == 3
        client.delete_task("web")
        client.delete("web")


@pytest.mark.usefixtures("often")
def test_a_shim_that_no_call_reaches_is_ended(
    remote: Remote, namespace: str, raw: Raw, spec: MakeSpec, runc: Runc
) -> None:
    with remote.new_client(namespace) as client:
        client.create("web", spec("sleep", "60"), options_for(runc))
        cut_off_a_start(remote, client, raw, runc, "web")
        raw.delete_container("web")
        wait_until(lambda: not shims_of(remote.address), "the shim has ended", _GRACE)
        wait_until(lambda: not raw.container_ids(), "the stand-in is gone", _GRACE)
        client.delete("web")


@pytest.mark.usefixtures("often")
def test_a_process_that_no_call_reaches_is_ended(
    remote: Remote, namespace: str, raw: Raw, spec: MakeSpec
) -> None:
    with remote.new_client(namespace) as client:
        client.create("web", spec("sleep", "3600"))
        pid = client.start("web")
        raw.delete_container("web")
        wait_until(lambda: not alive(pid), "the process has ended", _GRACE)
        wait_until(lambda: not shims_of(remote.address), "the shim has ended", _GRACE)
        wait_until(lambda: not raw.container_ids(), "the stand-in is gone", _GRACE)


@pytest.fixture
def lost(
    remote: Remote, namespace: str, directory: Path, containerd_binary: Path
) -> Iterator[tuple[int, str]]:
    """A shim that was started as containerd does it, and whose bundle is gone: its pid, and its socket."""
    bundle = directory / "bundle"
    bundle.mkdir()
    (bundle / "config.json").write_text("{}")
    log = bundle / "log"
    os.mkfifo(log)
    shim = shutil.which("containerd-shim-runc-v2", path=f"{containerd_binary.parent}:{os.environ['PATH']}")
    assert shim is not None
    with log.open("r+b", buffering=0):
        subprocess.run(
            [shim, "-namespace", namespace, "-id", "lost", "-address", remote.address, "start"],
            cwd=bundle,
            env={**os.environ, "TTRPC_ADDRESS": f"{remote.address}.ttrpc"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_GRACE,
            check=True,
        )
        (made,) = shims_of(remote.address)

        with socket.socket(socket.AF_UNIX) as connection:
            ((path, _),) = orphans._sockets(made)
            connection.connect(path)
            wait_until(lambda: len(orphans._sockets(made)) == 2, "it takes connections", _GRACE)
        shutil.rmtree(bundle)
        yield made, path


@pytest.mark.usefixtures("often")
def test_a_shim_that_containerd_does_not_know_is_killed_with_its_socket(
    raw: Raw, lost: tuple[int, str]
) -> None:
    pid, path = lost
    wait_until(lambda: not alive(pid), "the shim has ended", _GRACE)
    wait_until(lambda: not os.path.exists(path), "its socket is gone", _GRACE)
    wait_until(lambda: not raw.container_ids(), "the stand-in is gone", _GRACE)


@pytest.mark.usefixtures("often")
def test_what_is_of_use_is_left_alone(
    remote: Remote, namespace: str, raw: Raw, spec: MakeSpec, runc: Runc
) -> None:
    shared = oci.with_annotations({"io.containerd.runc.v2.group": "pod"})
    with remote.new_client(namespace) as client, capture_logs() as logs:
        client.create("first", spec("sleep", "3600", options=[shared]))
        client.start("first")
        client.create("second", spec("sleep", "3600", options=[shared]))
        second = client.start("second")
        assert len(shims_of(remote.address)) == 1
        stop(client, "first")  # the shim that bears its name goes on for the second

        client.create("hung", spec("sleep", "3600"))
        hung_init = client.start("hung")
        (hung,) = [pid for pid, line in shims_of(remote.address).items() if " -id hung " in line]
        os.kill(hung, signal.SIGSTOP)

        client.create("slow", spec("sleep", "3600"), options_for(runc))
        runc.hold.touch()
        starting = threading.Thread(
            target=client.start, args=("slow",), kwargs={"timeout": 10 * _GRACE}, daemon=True
        )
        starting.start()
        wait_until(runc.begun.exists, "runc is asked to create")

        # Each of these is ended by a look, the second one when there have been two for all that was there before.
        for name in ("a", "b"):
            client.create(name, spec("sleep", "3600"))
            client.start(name)
            raw.delete_container(name)
            wait_until(partial(gone, remote, name), "an orphan has ended", _GRACE)

        os.kill(hung, signal.SIGCONT)
        runc.hold.unlink()
        starting.join()
        assert alive(second)
        assert alive(hung_init)
        for name in ("second", "hung", "slow"):
            stop(client, name)
    ended = {each["container"] for each in logs if each["event"] == "orphan_ended"}
    assert ended <= {"a", "b"}


@pytest.mark.usefixtures("never")
def test_a_restore_ends_our_tasks_that_have_lost_their_container(
    remote: Remote, namespace: str, raw: Raw, spec: MakeSpec
) -> None:
    with remote.new_client(namespace) as first:
        first.create("ours", spec("sleep", "3600"))
        first.start("ours", attach_stdio=Collected())
        first.create("anybodys", spec("sleep", "3600"))
        first.start("anybodys")  # without FIFOs
    containers = {name: raw.container(name) for name in ("ours", "anybodys")}
    for name in containers:
        raw.delete_container(name)
    with remote.new_client(namespace) as second:
        assert second.restore_all(cio.null_io) == {}
        wait_until(lambda: "ours" not in raw.tasks_by_id(), "ours is gone", _GRACE)
        wait_until(lambda: not raw.container_ids(), "the stand-in is gone", _GRACE)
        assert set(raw.tasks_by_id()) == {"anybodys"}
    raw.create_container(containers["anybodys"])
    raw.remove_everything()
    wait_until(lambda: not shims_of(remote.address), "the shims have ended", _GRACE)
