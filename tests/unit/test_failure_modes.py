"""The list of failure modes is whole and names tests that exist; and what of it the source itself has to show."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tools import check_docs

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src/libcontainerd"
PAGE = ROOT / "docs/failure-modes.md"
ROW = re.compile(r"^\| (\d+)([a-z]?)( †)? \| (.+?) \| (.+?) \|$", re.MULTILINE)

# Locks that are signals, guard nothing, and are taken in order to wait; and the ends of FIFOs, which count their users.
SIGNALS = {"wake", "_signal", "_end", "self"}
# Says there why it takes one by hand.
BY_HAND = {"_events/serial.py"}


def calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    """Yield each call of a method or function of that name in the product, with its file."""
    for path in sorted(SOURCE.rglob("*.py")):
        if "pb" in path.parts or "testing" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name:
                yield path.relative_to(SOURCE).as_posix(), node


def test_no_number_is_left_out() -> None:
    numbers = [int(row[0]) for row in ROW.findall(PAGE.read_text())]
    assert sorted(set(numbers)) == list(range(1, 112))
    assert sorted(numbers) == numbers


def test_each_row_names_a_test_or_gives_a_reason() -> None:
    for number, part, _, wrong, here in ROW.findall(PAGE.read_text()):
        assert wrong.endswith("."), number
        assert "::test_" in here or len(here) > 10, f"{number}{part}"


def test_each_suspicion_was_tried() -> None:
    suspicions = [row for row in ROW.findall(PAGE.read_text()) if row[2]]
    assert len(suspicions) == 13
    for number, part, _, _, here in suspicions:
        assert "::test_" in here, f"{number}{part}"


def test_each_test_that_is_named_is_there() -> None:
    assert list(check_docs.missing_tests(PAGE, ROOT)) == []


def test_locks_are_taken_by_with() -> None:
    by_hand = {
        file
        for file, call in calls("acquire")
        if isinstance(call.func, ast.Attribute)
        and ast.unparse(call.func.value).rpartition(".")[2] not in SIGNALS
    }
    assert by_hand <= BY_HAND


def test_nobody_signals_a_pid() -> None:
    """A pid that was read a while ago may be another's; a pidfd, or the child that is ours to reap, may not."""
    assert [
        file for file, _ in [*calls("kill"), *calls("killpg")] if not file.startswith("supervisor/")
    ] == []


def test_no_preexec_fn_and_no_asynchronous_grpc() -> None:
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword):
                assert node.arg != "preexec_fn", path
            if isinstance(node, ast.Attribute):
                assert not ast.unparse(node).startswith("grpc.aio"), path
