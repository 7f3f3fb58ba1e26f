"""Another client that nobody here wrote: containerd's own Go client, in a program that asks the fake and the real containerd the same.

The program says what it was answered and which events it saw. What the two servers make it say must be equal, line by line.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contract.conftest import fake_like
from tests.contract.servers import Server

SOURCE = Path(__file__).parent / "goclient" / "main.go"
PACKAGES = "golang-go golang-github-containerd-containerd-dev"
GOPATH = Path("/usr/share/gocode")  # where Debian's packages put their sources
CLIENT = GOPATH / "src/github.com/containerd/containerd/client.go"


def _missing() -> str:
    if shutil.which("go") is None or not CLIENT.is_file():
        return f"no Go client of containerd (Debian's packages: {PACKAGES})"
    return ""


@pytest.fixture(scope="session")
def goclient() -> Path:
    """The program, built once for each state of its source and kept in the user's cache."""
    if missing := _missing():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{missing}; in CI this test must run")
        pytest.skip(missing)
    stamp = hashlib.sha256(SOURCE.read_bytes() + CLIENT.read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "libcontainerd"
    program = cache / f"goclient-{stamp}"
    if not program.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="goclient-") as directory:
            built = Path(directory, "goclient")
            subprocess.run(
                ["go", "build", "-o", built, SOURCE],
                env={
                    "PATH": os.environ["PATH"],
                    "HOME": directory,
                    "GO111MODULE": "off",
                    "GOPATH": str(GOPATH),
                    "GOCACHE": str(cache / "go-build"),
                    "GOFLAGS": "-buildvcs=false",
                },
                cwd=directory,
                check=True,
                timeout=280,
            )
            built.rename(program)  # whole, or not there: others may build at the same time
    return program


def say(program: Path, server: Server, rootfs: Path, fifos: Path) -> list[str]:
    fifos.mkdir()
    namespace = f"g{uuid.uuid4().hex[:10]}"
    ran = subprocess.run(
        [program, server.address, namespace, rootfs, fifos],
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr
    # runc 1.3 says more than the 1.1 before it; and of 2.1 the event of a task's deletion comes late now and then, or never.
    told = ran.stdout.replace("error during container init: ", "").splitlines()
    return [line for line in told if line != "event /tasks/delete" or " 1." in server.name]


@pytest.mark.real
@pytest.mark.timeout(300)
def test_the_go_client_sees_no_difference(
    goclient: Path, make_server: Callable[[str], Server], rootfs: Path, tmp_path: Path
) -> None:
    containerd = make_server("containerd")
    fake = make_server(fake_like(containerd, "host"))

    real = say(goclient, containerd, rootfs, tmp_path / "real")

    assert say(goclient, fake, rootfs, tmp_path / "fake") == real
    assert len(real) > 100
