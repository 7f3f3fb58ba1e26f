"""The project's own files agree with each other, and hold nothing of one machine."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import changelog, check_docs

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# What no file may hold, written so that this file does not hold it either.
FORBIDDEN = {
    "a path of one machine": re.compile(
        r"/wor[k]/(?:main|shared|\.)|/hom[e]/\w|/roo[t]/\.|(?<!\w)\.\./share[d]"
    ),
    "a package registry's host": re.compile(
        r"\bpy(?:pi|thonhosted)\.org|\bregistry\.npmjs|\bproxy\.golang|\bdeb\.debian"
    ),
    "an image registry's host": re.compile(r"\b(?:docker|quay|ghcr|gcr)\.io\b"),
    "an option that names a registry": re.compile(r"--(?:extra-)?index-ur[l]|--find-link[s]"),
    "something left to do": re.compile(r"\b(?:TOD[O]|FIXM[E]|XX[X]|HAC[K])\b"),
}
GENERATED = "src/libcontainerd/_wire/pb/"


def tracked() -> list[str]:
    """Return the files that git tracks; all but what tools leave, where there is no git."""
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-z"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        inside = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        return sorted(str(path) for path in inside if not path.parts[0].startswith((".venv", ".git/")))
    return [name for name in answer.stdout.split("\0") if name and (ROOT / name).is_file()]


def findings(name: str, text: str) -> Iterator[str]:
    """Yield each forbidden thing in a file's text, with its line."""
    for number, line in enumerate(text.splitlines(), 1):
        for what, pattern in FORBIDDEN.items():
            if pattern.search(line):
                yield f"{name}:{number} holds {what}"


def pins(name: str) -> dict[str, str]:
    """Return the lines of a constraints file as normalized names and versions."""
    lines = [
        line for line in (ROOT / "constraints" / name).read_text().splitlines() if not line.startswith("#")
    ]
    found = [re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line) for line in lines]
    assert all(found), f"{name} holds something other than name==version"
    return {normalized(match[1]): match[2] for match in found if match is not None}


def normalized(name: str) -> str:
    """Return a package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_no_file_holds_what_belongs_to_one_machine() -> None:
    names = tracked()
    wrong: list[str] = []
    for name in names:
        if not name.startswith(GENERATED):
            wrong += findings(name, (ROOT / name).read_text(encoding="utf-8", errors="replace"))

    assert "pyproject.toml" in names
    assert wrong == []


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("cd /wor" + "k/main/src", "a path of one machine"),
        ("see ../share" + "d/reference", "a path of one machine"),
        ("pip install --index-ur" + "l x", "an option that names a registry"),
        ("image = 'docker" + ".io/library/busybox'", "an image registry's host"),
        ("https://py" + "pi.org/x", "a package registry's host"),
        ("# TO" + "DO: later", "something left to do"),
    ],
)
def test_a_forbidden_line_is_found(line: str, what: str) -> None:
    assert list(findings("file", f"fine\n{line}\n")) == [f"file:2 holds {what}"]


def test_the_lower_bounds_are_those_that_the_oldest_run_installs() -> None:
    bounds = dict(re.split(r">=", requirement) for requirement in PYPROJECT["project"]["dependencies"])
    oldest = pins("oldest.txt")

    assert {normalized(name): version for name, version in bounds.items()} == {
        normalized(name): oldest[normalized(name)] for name in bounds
    }


def test_test_tools_are_the_same_in_both_runs() -> None:
    newest, oldest = pins("newest.txt"), pins("oldest.txt")
    tools = PYPROJECT["project"]["optional-dependencies"]["test"]

    assert {name: oldest[name] for name in tools} == {name: newest[name] for name in tools}


def test_everything_that_is_installed_directly_is_pinned() -> None:
    project = PYPROJECT["project"]
    runtime = [requirement.partition(">=")[0] for requirement in project["dependencies"]]
    development = [name for names in project["optional-dependencies"].values() for name in names]
    wanted = {normalized(name) for name in [*runtime, *development] if not name.startswith("libcontainerd")}

    assert wanted - pins("newest.txt").keys() == set()


def test_each_runtime_dependency_has_its_reason() -> None:
    text = (ROOT / "docs/dependencies.md").read_text()
    rows = dict(re.findall(r"^\| ([a-z-]+) \| ([0-9.]+) \|", text, re.MULTILINE))

    assert rows == dict(requirement.split(">=") for requirement in PYPROJECT["project"]["dependencies"])


def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE)
    listed = subprocess.run(
        ["make", "-C", str(ROOT), "help"], capture_output=True, text=True, timeout=30, check=True
    )

    assert sorted(re.findall(r"^  make ([a-z-]+) +\S", listed.stdout, re.MULTILINE)) == sorted(targets)
    assert sorted(re.findall(r"^\.PHONY: ([a-z-]+)$", text, re.MULTILINE)) == sorted(targets)


def test_make_check_runs_every_check() -> None:
    (steps,) = re.findall(r"^check: ([a-z -]+?) *##", (ROOT / "Makefile").read_text(), re.MULTILINE)

    assert {"format-check", "lint", "types", "protos-check", "layers", "changelog", "docs", "test"} <= set(
        steps.split()
    )


def test_ci_runs_the_same_targets() -> None:
    steps = re.findall(r"^step ([a-z]+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE)

    assert {"check", "oldest", "stress"} <= set(steps)


def test_the_fragments_are_in_order() -> None:
    assert list(changelog.problems(ROOT)) == []


def test_no_document_has_a_dead_link_or_broken_code() -> None:
    wrong: list[str] = []
    for document in check_docs.documents(ROOT):
        wrong += [*check_docs.dead_links(document), *check_docs.broken_code(document)]

    assert wrong == []
