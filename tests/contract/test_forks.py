"""Programs that fork while a client is live: nothing hangs, nothing is shared, and the parent goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from tests.contract import programs
from tests.contract.servers import Server, Services

ROOT = Path(__file__).parents[2]
Run = Callable[[str], dict[str, object]]


@pytest.fixture
def run(server: Server, services: Services, tmp_path: Path) -> Run:
    """Runs a scenario of forking.py in a program of its own, and gives what it found out."""

    def make(scenario: str) -> dict[str, object]:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.contract.forking",
                server.address,
                services.namespace,
                str(tmp_path / "state"),
                scenario,
            ],
            cwd=ROOT,
            env={**os.environ, "SPEC": json.dumps(services.spec(*programs.CAT))},
            capture_output=True,
            text=True,
            timeout=55,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert (found["status"], found["echoed"], found["exit"]) == ("running", True, 0), "the parent goes on"
        assert isinstance(found, dict)
        return found

    return make


def test_a_forked_child_is_told_at_once_that_the_client_is_not_its_own(run: Run) -> None:
    found = run("use")

    child = cast("dict[str, object]", found["child"])
    refused = cast("dict[str, str]", child["refused"])
    assert {"create", "start", "exec", "wait", "delete_task", "delete", "version"} <= set(refused)
    assert {
        name
        for name, said in refused.items()
        if not said.startswith("FailedPreconditionError: a client that process ")
    } == set()
    assert all("which was forked from it" in said for said in refused.values())
    assert "of another process" in str(child["repr"])
    assert found["code"] == 3


@pytest.mark.parametrize("scenario", ["leave", "end"])
def test_a_forked_child_ends_and_leaves_its_parents_client_alone(run: Run, scenario: str) -> None:
    found = run(scenario)

    assert (found["child"], found["code"]) == ({}, 3)


def test_multiprocessing_may_fork(run: Run) -> None:
    found = run("multiprocessing")

    assert (found["code"], found["pool"]) == (0, [3, 2, 1, 0])


def test_other_programs_inherit_nothing(run: Run) -> None:
    assert run("subprocess")["descriptors"] == "[]"
