"""The scale part of the bench: cost against the number of containers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.peers import environment
from benchmarks.samples import Samples
from benchmarks.scale_client import FAKE_NUMBERS, REAL_NUMBERS


def measure(samples: Samples, progress: Callable[[str], None]) -> None:
    """Up to ten thousand containers on the fake, each in a process of its own."""
    if not samples.has(FAKE_NUMBERS[-1], "scale", "library") or not samples.peers("attached"):
        progress(f"scale: {', '.join(map(str, FAKE_NUMBERS))} containers on the fake, 1000 attached")
        _run(["fake"], samples, progress)


def measure_real(samples: Samples, address: str, directory: Path, progress: Callable[[str], None]) -> None:
    """Up to two hundred on containerd, in the namespace that the directory is called like."""
    if not samples.has(REAL_NUMBERS[-1], "scale_real", "library"):
        progress(f"scale: {', '.join(map(str, REAL_NUMBERS))} containers on containerd")
        _run(["real", address, str(directory)], samples, progress)


def _run(arguments: Iterable[str], samples: Samples, progress: Callable[[str], None]) -> None:
    command = [sys.executable, "-m", "benchmarks.scale_client", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        for line in process.stdout or ():
            kind, number, figures = json.loads(line)
            progress(f"scale: {kind} {number}")
            samples.add(number, kind, "library", figures)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} has failed")
