"""Containers that look at themselves, by runc alone: no daemon stands between a spec and what comes of it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from libcontainerd import oci
from tests import servers

# A container here lives for milliseconds; a machine under load takes seconds to start one.
_DEADLINE = 40


@dataclass(frozen=True)
class Seen:
    """What a container printed, and how it ended."""

    output: str
    code: int

    def status(self, name: str) -> str:
        """Give one line of a printed /proc/self/status."""
        (value,) = [line.split(":", 1)[1] for line in self.output.splitlines() if line.startswith(f"{name}:")]
        return value.strip()


class Runc:
    """Runs bundles under a state directory of its own."""

    def __init__(self, program: Path, directory: Path, rootfs: Path) -> None:
        self.program = program
        self.directory = directory
        self.rootfs = rootfs
        self._made: list[str] = []

    def command(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.program, "--root", self.directory / "state", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_DEADLINE,
            check=False,
        )

    def bundle(self, spec: oci.Spec) -> tuple[str, Path]:
        """Write a bundle, on the shared root filesystem unless the spec names one; give a new id for it."""
        if spec.root is None or spec.root.path == "rootfs":
            spec = oci.with_rootfs(self.rootfs, readonly=True)(spec)
        name = f"oci-{uuid.uuid4().hex[:12]}"
        path = self.directory / name
        path.mkdir()
        (path / "config.json").write_bytes(oci.dump(spec))
        self._made.append(name)
        return name, path

    def run(self, spec: oci.Spec, script: str = "") -> Seen:
        """Run a container to its end; `script` is for its shell."""
        if script:
            # runc copies the two streams one beside the other, so that only within one is there an order.
            spec = oci.with_args("sh", "-c", f"exec 2>&1\n{script}")(spec)
        name, bundle = self.bundle(spec)
        done = self.command("run", "--bundle", bundle, name)
        return Seen(done.stdout, done.returncode)

    def start(self, spec: oci.Spec) -> str:
        """Start a container that stays, without output; give its id."""
        name, bundle = self.bundle(spec)
        subprocess.run(
            [self.program, "--root", self.directory / "state", "run", "--detach", "--bundle", bundle, name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_DEADLINE,
            check=True,
        )
        return name

    def run_on_terminal(self, spec: oci.Spec) -> str:
        """Run a container with a terminal; give what it printed there."""
        name, bundle = self.bundle(spec)
        path = self.directory / "console"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            listener.settimeout(_DEADLINE)
            done = self.command("run", "--detach", "--console-socket", path, "--bundle", bundle, name)
            assert done.returncode == 0, done.stdout
            connection, _ = listener.accept()
            with connection:
                _, (terminal,), _, _ = socket.recv_fds(connection, 4096, 1)
        with os.fdopen(terminal, "rb", buffering=0) as file:
            return _read_to_the_end(file.fileno()).decode()

    def close(self) -> None:
        """Delete what is left, and the cgroup that tests make containers' cgroups in."""
        for name in self._made:
            self.command("delete", "--force", name)
        for place in ("", "*/"):
            for cgroup in Path("/sys/fs/cgroup").glob(f"{place}{self.directory.name}"):
                cgroup.rmdir()


def _read_to_the_end(terminal: int) -> bytes:
    printed = b""
    while True:
        try:
            chunk = os.read(terminal, 4096)
        except OSError:
            # EIO is how a terminal says that its other side is gone.
            return printed
        if not chunk:
            return printed
        printed += chunk


@pytest.fixture
def runc(rootfs: Path) -> Iterator[Runc]:
    """Runc with a state directory that every user can enter, on the shared root filesystem."""
    found = servers.find().runc
    assert found is not None
    directory = Path(tempfile.mkdtemp(prefix="libcontainerd-oci-"))
    directory.chmod(0o755)
    runner = Runc(found.path, directory, rootfs)
    try:
        yield runner
    finally:
        runner.close()
        shutil.rmtree(directory)


@pytest.fixture
def own_rootfs(runc: Runc) -> Path:
    """A root filesystem for one test, which may write to it."""
    own = runc.directory / "own-rootfs"
    shutil.copytree(runc.rootfs, own, symlinks=True)
    return own


def cgroup_value(seen: Seen) -> str:
    """Give the last line of the output, for containers that print one cgroup file."""
    return seen.output.strip().splitlines()[-1]


def features(runner: Runc) -> dict[str, object]:
    """Give runc's own features document, as plain JSON."""
    document: dict[str, object] = json.loads(runner.command("features").stdout)
    return document
