"""The machine that the bench runs on: what it is, and how steady."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

_SPIN_BYTES = b"\0" * (1 << 20)
_SPINS = 60


def spin() -> float:
    """Do always the same work, and say how many seconds it took: on a quiet machine that is always the same."""
    began = time.perf_counter()
    for _ in range(_SPINS):
        hashlib.sha256(_SPIN_BYTES).digest()
    return time.perf_counter() - began


def facts() -> dict[str, str]:
    """What one must know of the machine to compare figures."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "processor": f"{os.cpu_count()} x {model}",
        "kernel": platform.release(),
        "containerd": _first_line("containerd", "--version").split()[2],
        "runc": _first_line("runc", "--version").split()[2],
        "go": _first_line("go", "version").split()[2],
        "python": platform.python_version(),
        "grpcio": version("grpcio"),
        "protobuf": version("protobuf"),
    }


def revision() -> str:
    """Which state of the source this is, with its changes."""
    return _output("git", "describe", "--always", "--dirty", "--abbrev=12").strip() or "unknown"


def _first_line(*command: str) -> str:
    return _output(*command).splitlines()[0]


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
