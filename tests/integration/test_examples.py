"""The examples, run as a user runs them: they do what they say, and leave nothing behind."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from libcontainerd import Remote
from tests.integration.containers import Raw, wait_until

EXAMPLES = Path(__file__).parents[2] / "examples"
_RUNC_STATE = Path("/run/containerd/runc")


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run one of the examples to its end."""
    return subprocess.run(
        [sys.executable, "-W", "error", *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env={**os.environ, **variables},
    )


def processes_with(text: str) -> list[str]:
    """Return the command lines of live processes that have `text` in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(FileNotFoundError, ProcessLookupError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if text in line:
                found.append(line)
    return found


# ------------------------------------------------------------------------------------------------------------ demo


def test_the_demo_shows_a_life_and_leaves_nothing() -> None:
    began = time.monotonic()
    ran = run(EXAMPLES / "demo.py")
    took = time.monotonic() - began

    assert (ran.returncode, ran.stderr) == (0, "")
    steps = re.findall(r"^ +\d+\.\d\d s  (\w[\w ,]*?) +\d+ ms", ran.stdout, re.MULTILINE)
    assert [step.split()[0].rstrip(",") for step in steps] == [
        *("make", "start", "connect"),
        *("create", "start", "write", "exec", "exec", "pause", "resume", "kill", "delete", "wait"),
        *("look", "stop"),
    ]
    events = re.findall(r"event: demo (.+)$", ran.stdout, re.MULTILINE)
    assert events == [
        *("create", "start"),
        *("exec-added of greeting", "exec-started of greeting", "exit of greeting, code 7"),
        *("exec-added of shell", "exec-started of shell", "exit of shell, code 0"),
        *("paused", "resumed", "exit, code 137"),
    ]
    assert took < 30  # alone on two cores it is about one second
    directory = re.search(r", in (/\S+)$", ran.stdout, re.MULTILINE)
    namespace = re.search(r"namespace (\S+)$", ran.stdout, re.MULTILINE)
    assert directory is not None
    assert namespace is not None
    assert not Path(directory[1]).exists()
    assert not (_RUNC_STATE / namespace[1]).exists()
    wait_until(lambda: not processes_with(directory[1]), "containerd and its shim have ended")


def test_a_demo_that_is_interrupted_leaves_nothing() -> None:
    # A pipe that holds a single write, so that the demo is never more than one line ahead of who reads it.
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_DIRECT)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    with (
        open(reader, "rb", buffering=0) as lines,
        subprocess.Popen(
            [sys.executable, EXAMPLES / "demo.py"], stdout=writer, stderr=subprocess.DEVNULL
        ) as demo,
    ):
        os.close(writer)
        directory = ""
        while line := lines.read(4096).decode():
            directory = directory or "".join(re.findall(r", in (/\S+)$", line))
            if "write to its stdin" in line:
                demo.send_signal(signal.SIGINT)
                break
        while lines.read(4096):
            pass
        assert demo.wait(30) != 0

    assert directory
    assert not Path(directory).exists()
    wait_until(lambda: not processes_with(directory), "containerd and its shim have ended")


def test_a_demo_without_containerd_says_what_is_missing_and_runs_on_the_fake(tmp_path: Path) -> None:
    ran = run(EXAMPLES / "demo.py", PATH=str(tmp_path))

    assert (ran.returncode, ran.stderr) == (0, "")
    assert re.match(r"No real container \(no containerd, .*busybox.*\):\na FakeContainerd", ran.stdout)


# --------------------------------------------------------------------------------------------------------- minimal


@pytest.fixture
def minimal(remote: Remote, rootfs: Path, tmp_path: Path) -> Iterator[list[str | Path]]:
    """The command that runs the minimal example, but for the program."""
    yield [EXAMPLES / "minimal.py", remote.address, tmp_path / "state", rootfs]
    with suppress(OSError):  # what runc leaves of a namespace
        (_RUNC_STATE / "minimal").rmdir()


@pytest.fixture
def namespace() -> str:
    """The one that the example works in."""
    return "minimal"


def test_the_minimal_daemon_runs_a_program_and_cleans_up(
    minimal: list[str | Path], raw: Raw, tmp_path: Path
) -> None:
    ran = run(*minimal, "sh", "-c", "echo out; echo err >&2; exit 5")

    assert (ran.returncode, ran.stdout, ran.stderr) == (5, "out\n", "err\n")
    assert raw.container_ids() == set()
    assert raw.tasks_by_id() == {}
    assert list((tmp_path / "state").iterdir()) == []


def test_the_minimal_daemon_leaves_nothing_of_a_program_that_is_not_there(
    minimal: list[str | Path], raw: Raw, tmp_path: Path
) -> None:
    ran = run(*minimal, "no-such-program")

    assert ran.returncode == 1
    assert "InvalidParameterError" in ran.stderr.splitlines()[-1]
    assert raw.container_ids() == set()
    assert raw.tasks_by_id() == {}
    assert list((tmp_path / "state").iterdir()) == []
