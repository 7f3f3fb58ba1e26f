"""The documents say what the source says: states, layers, modules, locks, threads; and their Python blocks run.

A block marked ``python`` is a program that runs as it is, without a containerd, and is run here. One marked
``python containerd`` needs a real one and is run by tests/integration/test_readme.py. One marked ``python fragment`` is only
compiled, by tools/check_docs.py.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import libcontainerd
from libcontainerd import errors
from libcontainerd._records import TRANSITIONS, State, Step
from libcontainerd.types import EventType
from tests.unit.test_layers import LAYERS, read_sources
from tools import check_docs

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def section(text: str, title: str) -> str:
    """Return what stands under a heading, to the next one of its level."""
    _, _, rest = text.partition(f"\n## {title}\n")
    assert rest, f"there is no section {title!r}"
    return re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """Return the cells of a Markdown table's rows, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines, "there is no table"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names(cell: str) -> list[str]:
    """Return what a cell has in backquotes."""
    return re.findall(r"`([^`]+)`", cell)


def blocks(marked: str) -> list[tuple[Path, str]]:
    """Return the documents' code blocks of one mark."""
    found = []
    for document in check_docs.documents(ROOT):
        for mark, code in _FENCE.findall(document.read_text(encoding="utf-8")):
            if mark.strip() == marked:
                found.append((document, code))
    return found


# ---------------------------------------------------------------------------------------------------- architecture


def test_the_diagram_has_each_move_of_the_table() -> None:
    drawn = re.findall(
        r"^ +(\w+) --> (\w+): (\w+)$", section(ARCHITECTURE, "States of a process"), re.MULTILINE
    )
    moves = {(State[before], Step[step]): State[after] for before, after, step in drawn}

    assert len(moves) == len(drawn), "a move is drawn twice"
    assert moves == {move: after for move, after in TRANSITIONS.items() if move[0] is not after}


def test_the_states_list_each_step_that_changes_nothing() -> None:
    listed = {
        (State[names(state)[0]], Step[step])
        for state, steps in rows(section(ARCHITECTURE, "States of a process"))
        for step in names(steps)
    }

    assert listed == {move for move, after in TRANSITIONS.items() if move[0] is after}


def test_the_layers_are_those_that_imports_are_checked_by() -> None:
    table = [row for row in rows(section(ARCHITECTURE, "Layers")) if row[0].isdigit()]

    assert [tuple(names(modules)) for _, modules in table] == [tuple(layer) for layer in LAYERS]


def test_each_module_has_its_line() -> None:
    table = [row for row in rows(section(ARCHITECTURE, "Layers")) if row[0].startswith("`")]
    listed = [names(module)[0] for module, _ in table]
    private_parts = {name for name in read_sources() if name.startswith("oci.")}

    assert sorted(listed) == sorted(set(read_sources()) - private_parts - {""})


def test_each_lock_has_its_line() -> None:
    listed = [names(lock)[0] for lock, _ in rows(section(ARCHITECTURE, "Locks"))]

    assert sorted(listed) == sorted(
        lock for name, text in read_sources().items() for lock in locks(name, text)
    )


def locks(module: str, text: str) -> Iterator[str]:
    """Yield each attribute that is made a lock, or a condition with a lock of its own."""
    for outer in ast.walk(ast.parse(text)):
        if not isinstance(outer, ast.ClassDef):
            continue
        for node in ast.walk(outer):
            target, value = _assigned(node)
            if target is None or not isinstance(value, ast.Call):
                continue
            made = ast.unparse(value.func)
            shares = made.endswith("Condition") and value.args and isinstance(value.args[0], ast.Attribute)
            if made in {"threading.Lock", "threading.RLock", "threading.Condition"} and not shares:
                yield f"{module}.{outer.name}.{target.attr}"


def _assigned(node: ast.AST) -> tuple[ast.Attribute | None, ast.expr | None]:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
        return node.targets[0], node.value
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute):
        return node.target, node.value
    return None, None


def test_each_kind_of_thread_has_its_line() -> None:
    table = rows(section(ARCHITECTURE, "Threads"))
    listed = {names(module)[0] for _, module, *_ in table}
    makers = {name for name, text in read_sources().items() if re.search(r"\bthreading\.Thread\(", text)}

    assert listed == makers
    for thread, module, *_ in table:
        fixed = re.split(r"[A-Z]", names(thread)[0])[0].removesuffix("backend-").removesuffix("background-")
        assert fixed in read_sources()[names(module)[0]]


# ---------------------------------------------------------------------------------------------------------- README


def test_the_readme_lists_each_verb_that_there_is() -> None:
    told = {
        name for _, python, _ in rows(section(README, "The verbs")) for name in re.findall(r"(\w+)\(", python)
    }
    there = {
        name
        for class_ in (libcontainerd.Client, libcontainerd.Remote)
        for name in vars(class_)
        if not name.startswith("_")
    }

    assert told == there - {"closed", "failure"}  # those that are no verbs


def test_a_verb_that_is_there_is_no_limit() -> None:
    limits = section(README, "Limits").partition("\n- After")[0]

    assert [name for name in names(limits) if hasattr(libcontainerd.Client, name)] == []


def test_the_readme_lists_each_event_and_error() -> None:
    events = [name for event, *_ in rows(section(README, "Events")) for name in names(event)]
    assert sorted(events) == sorted(set(EventType) - {EventType.UNKNOWN})

    told = {names(error)[0]: names(builtin) for error, builtin, _ in rows(section(README, "Errors"))}
    there = {
        class_.__name__: [base.__name__ for base in class_.__bases__ if base is not errors.LibcontainerdError]
        for class_ in errors.LibcontainerdError.__subclasses__()
        if class_.__module__ == errors.__name__
    }
    assert told == there


@pytest.mark.parametrize(
    "document", sorted({document for document, _ in blocks("python")}), ids=lambda each: each.name
)
def test_a_documents_python_blocks_run_one_after_the_other(document: Path, tmp_path: Path) -> None:
    program = "\n".join(code for where, code in blocks("python") if where == document)
    command = [sys.executable, "-W", "error", "-c", program]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)

    assert (ran.returncode, ran.stderr) == (0, ""), document


def test_every_python_block_is_of_a_kind_that_is_run_or_said_to_be_a_fragment() -> None:
    marks = {
        mark.strip()
        for document in check_docs.documents(ROOT)
        for mark, _ in _FENCE.findall(document.read_text(encoding="utf-8"))
    }

    assert {mark for mark in marks if mark.startswith("py")} <= {
        "python",
        "python containerd",
        "python fragment",
    }
