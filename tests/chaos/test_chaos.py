"""Chaos on a real containerd: rounds of random work while containerd, shims, the runner and the connection are killed.

A round is drawn from a seed; they are printed. `make chaos ROUNDS=100 SEED=n` runs rounds n, n+1 and so on. As for all tests,
LIBCONTAINERD_TEST_CONTAINERD names the directory of another containerd than the installed one.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path

import grpc
import pytest
import structlog

from libcontainerd import Remote
from tests.chaos.round import Round
from tests.integration.containers import Raw, kill_shims
from tests.integration.proxy import Proxy
from tests.leaks import no_leaks

_LINES = 400


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test of each round."""
    rounds = int(os.environ.get("LIBCONTAINERD_CHAOS_ROUNDS") or 100)
    first = int(os.environ.get("LIBCONTAINERD_CHAOS_SEED") or time.time_ns() // 1_000_000 % 1_000_000 * 1000)
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(first, first + rounds))


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="lcc-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def containerd_log() -> Iterator[list[str]]:
    """What containerd has logged in this round, and what the supervisor has."""
    lines: list[str] = []

    def keep(_logger: object, _level: str, event: MutableMapping[str, object]) -> MutableMapping[str, object]:
        lines.append(str(event.get("line") or event))
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[keep])
    yield lines
    structlog.configure(**before)


@pytest.fixture
def make(
    containerd_binary: Path, release: tuple[int, int], rootfs: Path, directory: Path
) -> Iterator[Callable[[int], Round]]:
    """Makes a round on a containerd of its own, behind a connection that can be cut. Nothing of ours may be left of it."""
    namespace = f"chaos-{uuid.uuid4().hex[:8]}"
    try:
        with (
            no_leaks(),
            Remote.start(
                directory / "root", directory / "state", binary=str(containerd_binary), restart_attempts=1000
            ) as remote,
            Proxy(remote.address) as proxy,
            grpc.insecure_channel(
                f"unix:{remote.address}", options=(("grpc.default_authority", "localhost"),)
            ) as channel,
        ):
            raw = Raw(channel, namespace)
            made: list[Round] = []

            def start(seed: int) -> Round:
                made.append(
                    Round(seed, remote, proxy, raw, directory=directory, rootfs=rootfs, release=release)
                )
                return made[-1]

            yield start
            for each in made:
                each.daemon.close()
            kill_shims(remote.address)
    finally:
        shutil.rmtree(Path("/run/containerd/runc", namespace), ignore_errors=True)


@pytest.mark.timeout(600)
def test_a_round(
    seed: int,
    make: Callable[[int], Round],
    containerd_log: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    began = time.monotonic()
    chaos = make(seed)
    problems = _reckon(chaos, containerd_log)
    lost = sum("orphan_ended" in line for line in containerd_log)
    outcome = f", {lost} shims out of reach" if lost else ""
    if problems:
        outcome += f"\n  FAILED: {problems[0]}\n"
    with capsys.disabled():
        sys.stdout.write(
            f"\nseed {seed}: {time.monotonic() - began:.0f} s, {chaos.ledger.life + 1} lives of the runner,"
            f" {chaos.ledger.summary()}{outcome} "
        )
    if problems:
        pytest.fail("\n".join([f"to replay: make chaos ROUNDS=1 SEED={seed}", *problems]), pytrace=False)


def _reckon(chaos: Round, containerd_log: list[str]) -> list[str]:
    """Run a round, and say what is wrong, with all that is known of it."""
    try:
        problems = chaos.run()
    except Exception:  # noqa: BLE001 - told with the rest
        problems = [traceback.format_exc()]
    if problems and chaos.daemon.alive:
        chaos.daemon.dump()
    if not problems:
        return []
    log = chaos.log.read_text(errors="replace").splitlines()
    concerned = set(re.findall(r"\bjob\d+", "\n".join(problems)))
    return [
        *problems,
        f"--- {chaos.ledger.summary()}; what was told of those, and the faults:",
        *chaos.ledger.history(concerned),
        "--- log of the runner, with its threads' stacks:",
        *log[-_LINES:],
        "--- log of containerd:",
        *containerd_log[-_LINES:],
    ]
