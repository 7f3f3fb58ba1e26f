"""Fetches the containerd, runc, crun and criu of a Debian release into a directory of our own, to test against them.

    python tools/fetch_containerd.py fetch SUITE...    fetch bookworm, trixie, sid ...; nothing where it is there already
    python tools/fetch_containerd.py list              what is there

Each suite gets $XDG_CACHE_HOME/libcontainerd/SUITE (by default ~/.cache), with bin/ and lib/. Nothing of the system's
changes but that the package patchelf is installed where it is missing. The packages are unpacked, not installed: apt works
in a state of its own, with the mirror that this machine's sources name. Programs that this machine's libraries are too old
for, or that miss one, are pointed at the suite's own libraries; so the directory cannot be moved.

Needs Debian and root.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("containerd", "runc", "crun", "criu", "libc6")
RECIPE = 1
"""Part of the stamp: raise it when what is fetched, or how it is put together, changes."""

_STAMP = "fetched.json"
_PROGRAMS = re.compile(r"containerd|containerd-shim(-\w+)*|ctr|runc|crun|criu")
_PROGRAM_DIRECTORIES = ("usr/bin", "usr/sbin", "bin", "sbin")
_LIBRARY_PACKAGES = re.compile(r"lib[\w.+-]+")
_SUITE = re.compile(r"[a-z][a-z0-9-]*")
# Debian's own archive, by the names it gives its releases; other archives have suites and components of their own.
_SUITES = {"stable", "testing", "unstable", "oldstable", "bookworm", "trixie", "forky", "sid"}
_APT_TIMEOUT = 600


class RefusedError(Exception):
    """It cannot be done here; the message says why."""


@dataclass(frozen=True)
class Source:
    """A package archive as apt's sources name it."""

    uri: str
    options: str = ""
    """What stands in brackets before it, without them."""

    def line(self, suite: str) -> str:
        """Return the line of an apt sources file for a suite of it."""
        options = f"[{self.options}] " if self.options else ""
        return f"deb {options}{self.uri} {suite} main\n"


# --------------------------------------------------------------------------------------------------------- apt's sources


def one_line_sources(text: str) -> Iterator[Source]:
    """Yield the archives of Debian in a file of one-line sources."""
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)\s+([^#]*)", line)
        if match and match[3] in _SUITES and "main" in match[4].split():
            yield Source(match[2], (match[1] or "").strip())


def deb822_sources(text: str) -> Iterator[Source]:
    """Yield the archives of Debian in a file of deb822 stanzas."""
    for stanza in re.split(r"\n\s*\n", text):
        fields = _fields(stanza)
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
            continue
        if not _SUITES.intersection(fields.get("suites", "").split()):
            continue
        if "main" not in fields.get("components", "").split():
            continue
        signed_by = fields.get("signed-by", "")
        # A key that stands in the file itself has no place in a line; apt's own keys serve then.
        options = f"signed-by={signed_by}" if signed_by.startswith("/") and " " not in signed_by else ""
        for uri in fields.get("uris", "").split():
            yield Source(uri, options)


def _fields(stanza: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line.startswith("#"):
            continue
        if line[:1].isspace():
            fields[name] = f"{fields.get(name, '')} {line.strip()}".strip()
        elif ":" in line:
            name, _, value = line.partition(":")
            name = name.strip().lower()
            fields[name] = value.strip()
    return fields


def machine_source(etc_apt: Path) -> Source:
    """Return the archive that this machine has its Debian packages from.

    Raises:
        RefusedError: its sources name none.
    """
    parts = etc_apt / "sources.list.d"
    found: list[Source] = []
    for path in (etc_apt / "sources.list", *sorted(parts.glob("*.list"))):
        if path.is_file():
            found += one_line_sources(path.read_text(encoding="utf-8"))
    for path in sorted(parts.glob("*.sources")):
        found += deb822_sources(path.read_text(encoding="utf-8"))
    if not found:
        raise RefusedError(f"no archive of Debian's in {etc_apt}/sources.list and {parts}")
    return found[0]


def apt_configuration(state: Path) -> str:
    """Return the configuration under which apt works in `state` alone, with no package installed."""
    settings = {
        "Dir::State": state / "state",
        "Dir::State::status": state / "status",
        "Dir::State::Lists": state / "lists",
        "Dir::Cache": state / "cache",
        "Dir::Etc::SourceList": state / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "APT::Sandbox::User": "root",
        "APT::Install-Recommends": "false",
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
    }
    return "".join(f'{name} "{value}";\n' for name, value in settings.items())


# ------------------------------------------------------------------------------------------------------------ the stamp


def stamp(suite: str, destination: Path, versions: Mapping[str, str]) -> str:
    """Return what is written when all is in place."""
    fields = {"recipe": RECIPE, "suite": suite, "directory": str(destination), "packages": dict(versions)}
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def fetched(destination: Path) -> dict[str, str] | None:
    """Return the versions of the packages in a directory; None where they have to be fetched (again)."""
    try:
        found = json.loads((destination / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if found.get("recipe") != RECIPE or found.get("directory") != str(destination):
        return None
    return {str(name): str(version) for name, version in found["packages"].items()}


def cache_directory(environment: Mapping[str, str]) -> Path:
    """Return where the suites are kept."""
    base = environment.get("XDG_CACHE_HOME", "")
    home = Path(base) if os.path.isabs(base) else Path(environment.get("HOME") or Path.home()) / ".cache"
    return home / "libcontainerd"


def versions_of(archives: Sequence[str]) -> dict[str, str]:
    """Return packages and their versions from the names of .deb files: NAME_VERSION_ARCHITECTURE.deb."""
    parts = [name.removesuffix(".deb").split("_") for name in archives]
    return {name: version.replace("%3a", ":") for name, version, _architecture in parts}


def lacks_libraries(ldd: str) -> bool:
    """Say from what ldd printed whether this machine misses a library, or has one that is too old."""
    return "not found" in ldd


# ------------------------------------------------------------------------------------------------------------- fetching


def fetch(suite: str, destination: Path, source: Source) -> None:
    """Fetch a suite's programs and their libraries into a directory, which is made anew.

    Raises:
        RefusedError: it failed; the directory then has no stamp.
    """
    if destination.exists():
        shutil.rmtree(destination)
    destination.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="libcontainerd-fetch-") as name:
        state = Path(name)
        archives = _download(suite, state, source)
        unpacked = state / "unpacked"
        unpacked.mkdir()
        for archive in archives:
            package = archive.name.partition("_")[0]
            if package in PACKAGES or _LIBRARY_PACKAGES.fullmatch(package):
                _run("dpkg", "-x", archive, unpacked)
        _collect(unpacked, destination)
        known = versions_of([archive.name for archive in archives])
    _point_at_libraries(destination)
    for name in ("containerd", "ctr", "runc", "crun", "criu"):  # that they run here is what all this was for
        _run(destination / "bin" / name, "--version")
    (destination / _STAMP).write_text(stamp(suite, destination, {name: known[name] for name in PACKAGES}))


def _download(suite: str, state: Path, source: Source) -> list[Path]:
    for directory in ("state", "lists/partial", "cache/archives/partial"):
        (state / directory).mkdir(parents=True)
    (state / "status").touch()
    (state / "sources.list").write_text(source.line(suite))
    configuration = state / "apt.conf"
    configuration.write_text(apt_configuration(state))
    environment = {"APT_CONFIG": str(configuration), "DEBIAN_FRONTEND": "noninteractive"}
    _say(f"{suite}: apt-get update, in a state of its own")
    _run("apt-get", "-qq", "update", environment=environment)
    _say(f"{suite}: apt-get --download-only install {' '.join(PACKAGES)}")
    _run("apt-get", "-qq", "-y", "--download-only", "install", *PACKAGES, environment=environment)
    return sorted((state / "cache/archives").glob("*.deb"))


def _collect(unpacked: Path, destination: Path) -> None:
    """Copy the programs to bin/ and the shared libraries to lib/."""
    programs, libraries = destination / "bin", destination / "lib"
    programs.mkdir()
    libraries.mkdir()
    for directory in _PROGRAM_DIRECTORIES:
        for path in (unpacked / directory).glob("*"):
            if _PROGRAMS.fullmatch(path.name) and path.is_file():
                shutil.copy2(path, programs / path.name)
    # Libraries lie in lib, lib64 and lib/TRIPLET; what is deeper are plugins.
    for pattern in ("*.so*", "*-linux-*/*.so*"):
        for directory in ("lib", "lib64", "usr/lib", "usr/lib64"):
            for path in sorted((unpacked / directory).glob(pattern)):
                _copy_library(path, libraries)


def _copy_library(path: Path, libraries: Path) -> None:
    target = libraries / path.name
    if target.exists() or target.is_symlink():
        return
    if path.is_symlink() and "/" not in os.readlink(path):
        target.symlink_to(os.readlink(path))
    elif path.is_file():
        shutil.copy2(path, target)


def _point_at_libraries(destination: Path) -> None:
    """Have programs that cannot run with this machine's libraries use the suite's."""
    libraries = destination / "lib"
    for program in sorted((destination / "bin").iterdir()):
        answer = subprocess.run(["ldd", program], capture_output=True, text=True, timeout=60, check=False)
        if not lacks_libraries(answer.stdout + answer.stderr):
            continue
        interpreter = libraries / Path(_run("patchelf", "--print-interpreter", program).strip()).name
        _say(f"{program.name}: with libraries from {libraries}")
        _run(
            *("patchelf", "--set-interpreter", interpreter),
            *("--force-rpath", "--set-rpath", libraries, program),
        )


def _run(*command: str | Path, environment: Mapping[str, str] | None = None) -> str:
    answer = subprocess.run(
        command,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_APT_TIMEOUT,
        check=False,
    )
    if answer.returncode:
        words = " ".join(map(str, command))
        raise RefusedError(f"{words}: exit code {answer.returncode}\n{answer.stdout}{answer.stderr}".rstrip())
    return answer.stdout


def _say(line: str) -> None:
    print(f"fetch: {line}", flush=True)


# --------------------------------------------------------------------------------------------------- the command line


def refuse_elsewhere() -> None:
    """Refuse where this cannot work.

    Raises:
        RefusedError: not Debian, or not root.
    """
    if not Path("/etc/debian_version").exists() or not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise RefusedError("needs Debian, whose packages it fetches")
    if os.geteuid() != 0:
        raise RefusedError("needs root")


def _install_patchelf() -> None:
    if shutil.which("patchelf"):
        return
    _say("apt-get install patchelf, which is missing")
    install = ("apt-get", "-qq", "-y", "install", "--no-install-recommends", "patchelf")
    environment = {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        _run(*install, environment=environment)
    except RefusedError:  # the machine's package lists may be missing, or old
        _run("apt-get", "-qq", "update")
        _run(*install, environment=environment)


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Keep a second run that uses the same directory waiting."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_all(suites: Sequence[str], cache: Path) -> None:
    for suite in suites:
        destination = cache / suite
        with _alone(cache):
            versions = fetched(destination)
            if versions is None:
                refuse_elsewhere()
                _install_patchelf()
                fetch(suite, destination, machine_source(Path("/etc/apt")))
                versions = fetched(destination)
        _say(_summary(suite, destination, versions or {}))


def _summary(suite: str, destination: Path, versions: Mapping[str, str]) -> str:
    held = ", ".join(f"{name} {versions[name]}" for name in PACKAGES if name in versions)
    return f"{suite}: {held} in {destination}"


def _suite(name: str) -> str:
    if not _SUITE.fullmatch(name):
        raise argparse.ArgumentTypeError(f"{name!r} is no name of a Debian suite")
    return name


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(
        description="Fetch the containerd of Debian releases, to test against it."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fetch").add_argument("suites", nargs="+", type=_suite, metavar="SUITE")
    commands.add_parser("list")
    chosen = parser.parse_args(arguments)
    cache = cache_directory(os.environ)
    if chosen.command == "list":
        for destination in sorted(path.parent for path in cache.glob(f"*/{_STAMP}")):
            versions = fetched(destination)
            if versions is not None:
                print(_summary(destination.name, destination, versions))
        return 0
    try:
        _fetch_all(chosen.suites, cache)
    except (RefusedError, subprocess.TimeoutExpired) as error:
        print(f"fetch: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
