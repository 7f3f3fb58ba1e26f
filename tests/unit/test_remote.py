"""Remote: what it refuses before it starts anything, and what it makes clients of."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from libcontainerd import Remote, supervisor
from libcontainerd.errors import CallCancelledError, InvalidParameterError
from tests.unit.server import Scripted


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as made:
        yield made


def test_a_relative_state_dir_is_refused_before_anything_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object) -> None:
        raise AssertionError("nothing may be started")

    monkeypatch.setattr(supervisor, "Supervisor", start)
    monkeypatch.chdir(tmp_path)
    for state in ("state", Path("state"), ""):
        with pytest.raises(InvalidParameterError, match="state_dir must be an absolute path"):
            Remote.start(tmp_path / "root", state)
        with pytest.raises(InvalidParameterError, match="state_dir must be an absolute path"):
            Remote.connect(tmp_path / "socket", state_dir=state)
    assert list(tmp_path.iterdir()) == []


def test_clients_are_closed_with_the_remote_and_none_is_made_after(server: Scripted, tmp_path: Path) -> None:
    with Remote.connect(server.path, state_dir=tmp_path) as made:
        first, second = made.new_client("test"), made.new_client("other")
        first.close()
        third = made.new_client("test")
    assert [each.closed for each in (first, second, third)] == [True] * 3
    with pytest.raises(CallCancelledError, match="the remote was cleaned up"):
        made.new_client("test")


_FORGETFUL = """
import atexit, sys
from libcontainerd import Remote
from libcontainerd.client import Client


close = Client.close
def told(self, timeout=10.0):
    print("client closed")
    close(self, timeout)
Client.close = told

with Remote.connect(sys.argv[1], state_dir=sys.argv[2]) as first:
    first.new_client("test")
atexit.register(print, "containerd stopped")
client = Remote.connect(sys.argv[1], state_dir=sys.argv[2]).new_client("test")
print("the end")
"""


def test_a_client_that_was_forgotten_is_closed_before_its_containerd_stops(
    server: Scripted, tmp_path: Path
) -> None:
    program = [sys.executable, "-c", _FORGETFUL, server.path, str(tmp_path)]
    ran = subprocess.run(program, capture_output=True, text=True, timeout=20, check=True)
    assert ran.stdout.split("\n")[:-1] == ["client closed", "the end", "client closed", "containerd stopped"]
