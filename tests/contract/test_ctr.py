"""A client that nobody here wrote: containerd's own ``ctr`` against the fake, whose processes really run."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from libcontainerd.testing import FakeContainerd
from libcontainerd.testing.releases import RELEASES
from tests.integration.containers import wait_until

CTR = shutil.which("ctr")

pytestmark = [
    pytest.mark.skipif(CTR is None, reason="no ctr here"),
    # It makes its FIFOs in /run/containerd, whatever it is told.
    pytest.mark.skipif(os.geteuid() != 0, reason="ctr wants root"),
]


class Ctr:
    """Runs ctr."""

    def __init__(self, address: str, directory: Path) -> None:
        self.address = address
        self.rootfs = str(directory / "root")
        self._directory = directory

    def command(self, *args: str) -> list[str]:
        return [str(CTR), "-a", self.address, *args]

    def run(self, *args: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(self.command(*args), input=stdin, capture_output=True, timeout=30, check=False)

    def hear(self, *args: str, says: str, text: bytes, code: int) -> tuple[int, bytes, bytes]:
        """Run a shell that says something, and ends once that was heard.

        ctr lets go of FIFOs that it is still opening when the process has ended. A real container does not end that soon, but a
        process of the host runtime may.

        Returns:
            ctr's exit code, and what came out of its stdout and stderr.
        """
        out, err, heard = (self._directory / name for name in ("out", "err", "heard"))
        script = f"{says}; while [ ! -e {heard} ]; do sleep 0.01; done; exit {code}"
        with (
            out.open("wb") as to_out,
            err.open("wb") as to_err,
            subprocess.Popen(
                self.command(*args, "/bin/sh", "-c", script),
                stdin=subprocess.DEVNULL,
                stdout=to_out,
                stderr=to_err,
            ) as process,
        ):
            try:
                wait_until(lambda: text in (out.read_bytes(), err.read_bytes()), "it is heard", timeout=60)
                heard.touch()
                returned = process.wait(60)
            finally:
                process.kill()
        heard.unlink()
        return returned, out.read_bytes(), err.read_bytes()

    def __call__(self, *args: str, stdin: bytes = b"") -> str:
        """Run it; it must succeed."""
        done = self.run(*args, stdin=stdin)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def rows(self, *args: str) -> list[list[str]]:
        """What a listing says, without its heading."""
        return [line.split() for line in self(*args).splitlines()[1:]]


@pytest.fixture(params=list(RELEASES))
def ctr(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ctr]:
    (tmp_path / "root").mkdir()
    with FakeContainerd("host", version=request.param) as fake:
        yield Ctr(fake.address, tmp_path)
        unserved = [call.method for call in fake.calls.all() if call.code in ("UNIMPLEMENTED", "INTERNAL")]
    assert unserved == []


def test_version(ctr: Ctr) -> None:
    said = ctr("version")

    assert "Server:" in said
    assert "libcontainerd-fake" in said


def test_namespaces(ctr: Ctr) -> None:
    ctr("namespaces", "create", "one", "key=value")

    assert ctr.rows("namespaces", "ls") == [["one", "key=value"]]
    ctr("namespaces", "rm", "one")
    assert ctr.rows("namespaces", "ls") == []


def test_containers(ctr: Ctr) -> None:
    ctr("containers", "create", "--rootfs", ctr.rootfs, "c", "/bin/sleep", "1000")

    assert ctr.rows("containers", "ls") == [["c", "-", "io.containerd.runc.v2"]]
    assert '"ID": "c"' in ctr("containers", "info", "c")
    ctr("containers", "rm", "c")
    assert ctr.rows("containers", "ls") == []
    missing = ctr.run("containers", "info", "c")
    assert missing.returncode == 1
    assert b'container "c" in namespace "default": not found' in missing.stderr


def test_run(ctr: Ctr) -> None:
    said = ctr.hear("run", "--rm", "--rootfs", ctr.rootfs, "one", says="echo hello", text=b"hello\n", code=0)
    failed = ctr.hear("run", "--rm", "--rootfs", ctr.rootfs, "two", says="echo no >&2", text=b"no\n", code=7)
    missing = ctr.run("run", "--rm", "--rootfs", ctr.rootfs, "four", "/no/such/program")

    assert said == (0, b"hello\n", b"")
    assert failed == (7, b"", b"no\n")
    assert missing.returncode == 1
    assert b"no such file or directory" in missing.stderr
    assert ctr.rows("containers", "ls") == []
    assert ctr.rows("tasks", "ls") == []


def test_tasks(ctr: Ctr) -> None:
    ctr("run", "-d", "--rootfs", ctr.rootfs, "c", "/bin/sleep", "1000")
    ((name, pid, state),) = ctr.rows("tasks", "ls")

    assert (name, state) == ("c", "RUNNING")
    assert [row[0] for row in ctr.rows("tasks", "ps", "c")] == [pid]
    executed = ctr.hear("tasks", "exec", "--exec-id", "e", "c", says="echo hi", text=b"hi\n", code=9)
    assert executed == (9, b"hi\n", b"")
    assert "pids.current" in ctr("tasks", "metrics", "c")
    ctr("tasks", "pause", "c")
    assert ctr.rows("tasks", "ls") == [["c", pid, "PAUSED"]]
    ctr("tasks", "resume", "c")
    assert ctr.rows("tasks", "ls") == [["c", pid, "RUNNING"]]
    refused = ctr.run("tasks", "rm", "c")
    assert refused.returncode == 1
    ctr("tasks", "kill", "-s", "SIGKILL", "c")
    wait_until(lambda: ctr.rows("tasks", "ls") == [["c", pid, "STOPPED"]], "it is killed")
    ctr.run("tasks", "rm", "c")
    assert ctr.rows("tasks", "ls") == []
    ctr("containers", "rm", "c")


def test_events(ctr: Ctr) -> None:
    with subprocess.Popen(ctr.command("events"), stdout=subprocess.PIPE) as events:
        try:
            assert events.stdout is not None
            os.set_blocking(events.stdout.fileno(), False)
            seen = b""
            number = 0
            deadline = time.monotonic() + 60
            while b"/namespaces/create" not in seen:  # until it is subscribed, which nothing tells
                assert time.monotonic() < deadline
                ctr("namespaces", "create", f"n{number}")
                number += 1
                seen += events.stdout.read() or b""
            ctr("run", "--rm", "--rootfs", ctr.rootfs, "c", "/bin/true")
            while b"/containers/delete" not in seen:
                assert time.monotonic() < deadline, seen
                seen += events.stdout.read() or b""
        finally:
            events.terminate()

    topics = [line.split()[5].decode() for line in seen.splitlines() if b'"c"' in line]
    assert topics == [
        "/containers/create",
        "/tasks/create",
        "/tasks/start",
        "/tasks/exit",
        "/tasks/delete",
        "/containers/delete",
    ]


def test_content(ctr: Ctr) -> None:
    data = b"some content\n"
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"

    ctr("content", "ingest", "--expected-size", str(len(data)), "--expected-digest", digest, "r", stdin=data)

    assert ctr.rows("content", "ls")[0][0] == digest
    assert ctr("content", "get", digest) == data.decode()


def test_what_is_listed(ctr: Ctr) -> None:
    assert ctr.rows("images", "ls") == []
    ctr("leases", "create", "--id", "l")
    assert ctr.rows("leases", "ls")[0][0] == "l"
    ctr("snapshots", "prepare", "s")
    assert ctr.rows("snapshots", "ls") == [["s", "Active"]]
    ctr("snapshots", "rm", "s")
    plugins = {(row[0], row[1], row[-1]) for row in ctr.rows("plugins", "ls")}
    assert ("io.containerd.snapshotter.v1", "overlayfs", "ok") in plugins
    assert {row[2] for row in plugins} == {"ok"}
