"""Runs the contract and integration tests on several containerds, and prints what works on which as a table.

    python -m tools.matrix [SUITE...]

SUITE is a Debian release, by default bookworm, trixie and sid; `tools/fetch_containerd.py` fetches what is missing. The
table is made of the tests' results alone: a feature is a group of tests, and a cell says how many of them passed there.
Where a version lacks a thing, its tests see to it that it is refused in clear words, and the cell says so.

Exits with 1 if a test failed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree as ET

from tools import fetch_containerd

ROOT = Path(__file__).parents[1]
SUITES = ("bookworm", "trixie", "sid")
UNAVAILABLE = "unavailable"
"""The property that a test records where this version lacks what it is about; its value says what the version does."""

_JOBS = "3"
_TIMEOUT = 3600

# Title, and the tests it stands for: a pattern that is found in "integration.test_stdio::test_name". First come, first
# served. A file that none names is a feature of its own.
FEATURES: tuple[tuple[str, str], ...] = (
    ("user namespaces", r"user_namespace"),
    ("specs, seen from inside", r"integration\.oci\."),
    ("gaps and outages of containerd", r"test_gaps|test_outages"),
    ("restore after a restart of the client", r"test_restor"),
    ("checkpoints", r"checkpoint"),
    ("out of memory", r"out_of_memory"),
    ("pause and resume", r"pause|frozen"),
    ("terminals", r"terminal"),
    ("execs", r"_execs?(_|\b)"),
    ("runtime: runc", r"runtimes::test_runc"),
    ("runtime: crun", r"runtimes::test_crun"),
    ("runtime: io.containerd.runtime.v1.linux", r"runtimes::test_v1"),
    ("cgroup v2", r"cgroup_?v2"),
    ("rootless", r"rootless"),
    ("stats and limits", r"test_(stats|resources)|test_metrics"),
    ("containers: create, start, wait, delete", r"test_lifecycle|test_replace|test_state_machine"),
    ("stdin, stdout, stderr", r"test_stdio"),
    ("events", r"test_events|test_promises"),
    ("refusals and errors", r"test_refusals|test_failures"),
    ("many at once", r"test_concurrency|test_leaks|test_close"),
    ("content, images, leases, snapshots", r"test_store"),
    ("a private containerd", r"test_supervisor"),
    ("connections by TLS", r"test_tls"),
    ("programs that fork", r"test_forks"),
    ("ctr beside this library", r"test_ctr"),
    ("the fake says the same", r"test_words|test_goclient"),
    ("examples and documents", r"test_examples|test_readme"),
)


@dataclass
class Cell:
    """How a feature's tests ended on one version."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: int = 0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.failed:
            return f"**{len(self.failed)} of {self.passed + len(self.failed)} tests fail**"
        if not self.passed:
            return "not tested"
        words = "; ".join(self.notes) if self.notes else "ok"
        return f"{words} ({self.passed})"


Column = dict[str, Cell]
"""Features and how they are on one version."""


def feature_of(test: str) -> str:
    """Return the feature that a test, as "integration.test_stdio::test_name", belongs to."""
    for title, pattern in FEATURES:
        if re.search(pattern, test):
            return title
    return test.partition("::")[0].rpartition(".")[2].removeprefix("test_").replace("_", " ")


def read_results(xml: str) -> Column:
    """Return what a JUnit report says, by feature.

    Tests of the fake are left out: they say nothing of a version.
    """
    column: Column = {}
    for case in ET.fromstring(xml).iter("testcase"):  # noqa: S314 - pytest has just written it
        name = f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name', '')}"
        if "[fake" in name:
            continue
        cell = column.setdefault(feature_of(name), Cell())
        if case.find("failure") is not None or case.find("error") is not None:
            if name not in cell.failed:  # once for the test, though it may fail and its fixtures as well
                cell.failed.append(name)
        elif case.find("skipped") is not None:
            cell.skipped += 1
        else:
            cell.passed += 1
            for each in case.iterfind("properties/property"):
                note = each.get("value", "")
                if each.get("name") == UNAVAILABLE and note not in cell.notes:
                    cell.notes.append(note)
    return column


def table(columns: Mapping[str, Column]) -> str:
    """Return the table in Markdown: features down, versions across; a number is how many tests passed."""
    titles = [title for title, _ in FEATURES]
    found = {title for column in columns.values() for title in column}
    rows = [title for title in titles if title in found] + sorted(found.difference(titles))
    lines = [["feature", *columns], ["---"] * (len(columns) + 1)]
    lines += [[title, *(str(column.get(title, Cell())) for column in columns.values())] for title in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def heading(suite: str, versions: Mapping[str, str]) -> str:
    """Return a column's heading: upstream's version of containerd, and Debian's name for the release."""
    containerd = re.match(r"[\d.]*\d", versions.get("containerd", ""))
    return f"{containerd[0] if containerd else '?'} ({suite})"


def run(suite: str, binaries: Path, arguments: Iterable[str]) -> Column:
    """Run the tests on the containerd in a directory."""
    with tempfile.TemporaryDirectory(prefix="libcontainerd-matrix-") as directory:
        report = Path(directory) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--junitxml",
            str(report),
            "-o",
            "junit_family=xunit1",
        ]
        command += ["--numprocesses", _JOBS, "--dist", "worksteal", "-k", "not fake", *arguments]
        environment = {**os.environ, "LIBCONTAINERD_TEST_CONTAINERD": str(binaries)}
        print(f"matrix: {suite}: {' '.join(command[1:])}", flush=True)
        subprocess.run(command, cwd=ROOT, env=environment, timeout=_TIMEOUT, check=False)
        return read_results(report.read_text(encoding="utf-8")) if report.exists() else {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description="Run the tests on several containerds, and print a table.")
    parser.add_argument("suites", nargs="*", metavar="SUITE", default=[])
    parser.add_argument("--tests", nargs="+", default=["tests/contract", "tests/integration"])
    chosen = parser.parse_args(arguments)
    suites = chosen.suites or list(SUITES)
    if fetch_containerd.main(["fetch", *suites]):
        return 1
    cache = fetch_containerd.cache_directory(os.environ)
    columns: dict[str, Column] = {}
    for suite in suites:
        versions = fetch_containerd.fetched(cache / suite) or {}
        columns[heading(suite, versions)] = run(suite, cache / suite / "bin", chosen.tests)
    print()
    print(table(columns))
    failed = [
        f"{name}: {test}"
        for name, column in columns.items()
        for cell in column.values()
        for test in cell.failed
    ]
    empty = [name for name, column in columns.items() if not any(cell.passed for cell in column.values())]
    for line in (*failed, *(f"{name}: no test has run" for name in empty)):
        print(f"matrix: {line}", file=sys.stderr)
    return 1 if failed or empty else 0


if __name__ == "__main__":
    sys.exit(main())
