"""The pytest plugin, as a user's own test run finds it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

USERS_TEST = """
import pytest
from libcontainerd import EventType
from libcontainerd.testing import prints

SPEC = {"ociVersion": "1.0.2", "process": {"args": ["echo", "hi"], "cwd": "/", "env": ["PATH=/bin"]}, "root": {"path": "/"}}


def test_scripted(containerd, libcontainerd_client, libcontainerd_backend):
    containerd.script(prints(exit_code=3))
    libcontainerd_client.create("c", SPEC)
    libcontainerd_client.start("c")
    assert libcontainerd_client.wait("c").code == 3
    assert libcontainerd_backend.wait_for(EventType.EXIT).info.exit_code == 3


@pytest.mark.containerd(runtime="host")
def test_host(libcontainerd_client):
    libcontainerd_client.create("c", SPEC)
    libcontainerd_client.start("c")
    assert libcontainerd_client.wait("c").code == 0
"""


def run(directory: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--strict-markers", *args],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def test_a_users_tests(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_daemon.py").write_text(USERS_TEST)

    done = run(tmp_path, "-q")

    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_it_is_told_by_pytest(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    fixtures = run(tmp_path, "--fixtures").stdout
    markers = run(tmp_path, "--markers").stdout

    for name in ("containerd", "libcontainerd_backend", "libcontainerd_client"):
        assert f"{name} --" in fixtures
    assert '@pytest.mark.containerd(runtime="scripted", version="1.6")' in markers


def test_it_costs_nothing_before_it_is_asked_for() -> None:
    code = "import sys, libcontainerd_pytest; print([name for name in sys.modules if name in ('grpc', 'libcontainerd')])"

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )

    assert done.stdout == "[]\n"


def test_the_fixtures(
    containerd: object, libcontainerd_client: object, request: pytest.FixtureRequest
) -> None:
    assert request.getfixturevalue("libcontainerd_backend").events() == []
