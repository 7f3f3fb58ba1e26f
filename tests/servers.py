"""Which real servers the tests can run on here, and why not if they cannot."""

from __future__ import annotations

import functools
import os
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CHOSEN = "LIBCONTAINERD_TEST_CONTAINERD"
"""Names a directory with the containerd to test, its shims, runc and ctr; `tools/fetch_containerd.py` makes some."""

# A root shell opened with plain `su` has no sbin in its PATH, and runc lives there.
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
_VERSION = re.compile(r"\bv?(\d+\.\d+[\w.~+-]*)")
_RELEASE = re.compile(r"v?(\d+)\.(\d+)")
_CRIU_SETTINGS = "network-lock skip\n"  # it would lock with iptables, which need not be there; no container here has a network
_ELF64_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PT_INTERP = 3


@dataclass(frozen=True)
class Program:
    """A program found on this machine."""

    path: Path
    version: str

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor version: (1, 6)."""
        return release_of(self.version)

    def __str__(self) -> str:
        return f"{self.path.name} {self.version} ({self.path})"


@dataclass(frozen=True)
class Servers:
    """What tests of a real containerd need; `missing` is empty when they can run."""

    containerd: Program | None
    runc: Program | None
    busybox: Path | None
    missing: str

    def describe(self) -> str:
        """Return the line that a test run ends with."""
        if self.missing:
            return f"no real containerd: {self.missing}"
        return f"{self.containerd}, {self.runc}"


def choose() -> None:
    """Put the directory that LIBCONTAINERD_TEST_CONTAINERD names, if it does, first in PATH.

    So its containerd and ctr are the ones under test, and its runc and shims the ones that containerd runs.

    Raises:
        ValueError: there is no containerd in it.
    """
    chosen = os.environ.get(CHOSEN)
    if not chosen:
        return
    directory = os.path.abspath(chosen)
    if not os.access(os.path.join(directory, "containerd"), os.X_OK):
        raise ValueError(f"{CHOSEN}: no containerd in {directory}")
    path = os.environ.get("PATH", os.defpath)
    if path.split(":")[0] != directory:
        os.environ["PATH"] = f"{directory}:{path}"


def find() -> Servers:
    """Look for containerd, runc and a static busybox in PATH and in the sbin directories."""
    containerd, runc = _find_program("containerd"), _find_program("runc")
    busybox = _which("busybox")
    if busybox is not None and not is_static(busybox):
        busybox = None
    reasons = [f"needs Linux, this is {sys.platform}"] if sys.platform != "linux" else []
    wanted = {"containerd": containerd, "runc": runc, "a static busybox": busybox}
    lacking = [name for name, found in wanted.items() if found is None]
    if lacking:
        reasons.append("not found: " + ", ".join(lacking))
    if os.geteuid() != 0:
        reasons.append("not root")
    return Servers(containerd, runc, busybox, "; ".join(reasons))


def release_of(version: str) -> tuple[int, int]:
    """Return a version's major and minor number."""
    numbers = _RELEASE.match(version)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


@dataclass(frozen=True)
class Criu:
    """A criu that can do its work here, and the environment in which containerd finds it.

    Attributes:
        program: The criu, or None.
        missing: Why there is none.
    """

    program: Program | None
    missing: str

    def prepare(self, directory: Path) -> tuple[str, dict[str, str]]:
        """Make in a directory what containerd needs; a directory for its PATH, and its further environment.

        Without a criu, nothing.
        """
        if self.program is None:
            return "", {}
        first = directory / "criu-path"
        first.mkdir()
        (first / "criu").symlink_to(self.program.path)
        settings = directory / "criu-home/.criu"
        settings.mkdir(parents=True)
        (settings / "default.conf").write_text(_CRIU_SETTINGS)
        return str(first), {"HOME": str(settings.parent)}


@functools.cache
def find_criu() -> Criu:
    """Look for a criu that says that it can work on this kernel, in PATH and among the suites that were fetched."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "libcontainerd"
    candidates = [_which("criu"), *sorted(cache.glob("*/bin/criu"))]
    tried = []
    for path in candidates:
        if path is None:
            continue
        program = _find_program(str(path))
        check = subprocess.run([path, "check"], capture_output=True, text=True, timeout=60, check=False)
        if program is not None and check.returncode == 0:
            return Criu(program, "")
        tried.append(str(path))
    reason = f"these cannot work on this kernel: {', '.join(tried)}" if tried else "not found"
    return Criu(None, f"{reason}; python tools/fetch_containerd.py fetch sid gets one")


def is_static(program: Path) -> bool:
    """Say whether a 64-bit little-endian ELF program asks for no dynamic loader."""
    with program.open("rb") as file:
        header = file.read(_ELF64_HEADER.size)
        if len(header) < _ELF64_HEADER.size or header[:6] != b"\x7fELF\x02\x01":
            return False
        fields = _ELF64_HEADER.unpack(header)
        offset, size, count = fields[5], fields[9], fields[10]
        file.seek(offset)
        table = file.read(size * count)
    kinds = [struct.unpack_from("<I", table, index * size)[0] for index in range(count)]
    return _PT_INTERP not in kinds


def _which(name: str) -> Path | None:
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_SBIN}")
    return Path(found) if found is not None else None


def _find_program(name: str) -> Program | None:
    path = _which(name)
    if path is None:
        return None
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    version = _VERSION.search(answer.stdout)
    return Program(path, version.group(1) if version is not None else "of unknown version")
