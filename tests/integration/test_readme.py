"""The documents' code that needs a real containerd, run as a reader runs it.

Blocks marked ``sh containerd`` and ``python containerd`` of one document are run in order, each as a program of its own, in
one directory; what one prints is compared with the ``text`` block that follows it. A document has at least one of these.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tools import check_docs

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PROGRAMS = {"sh containerd": ["sh", "-euc"], "python containerd": [sys.executable, "-W", "error", "-c"]}


def blocks(document: Path) -> list[tuple[str, str]]:
    """Return a document's code blocks with their marks."""
    return [(mark.strip(), code) for mark, code in _FENCE.findall(document.read_text(encoding="utf-8"))]


DOCUMENTS = [
    document
    for document in check_docs.documents(ROOT)
    if any(mark in _PROGRAMS for mark, _ in blocks(document))
]


@pytest.fixture
def directory(containerd_binary: Path) -> Iterator[Path]:
    """Where a document's programs run."""
    assert containerd_binary.exists()
    made = Path(tempfile.mkdtemp(prefix="lc-docs-"))
    yield made
    shutil.rmtree(made)
    with suppress(OSError):  # what runc leaves of the namespace
        Path("/run/containerd/runc/quickstart").rmdir()


def test_the_readme_is_among_them() -> None:
    assert ROOT / "README.md" in DOCUMENTS


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_the_code_of_a_document_does_what_it_says(document: Path, directory: Path) -> None:
    printed = None
    compared = 0
    for mark, code in blocks(document):
        if mark in _PROGRAMS:
            ran = subprocess.run(
                [*_PROGRAMS[mark], code],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=50,
                check=False,
                env={**os.environ, "TMPDIR": str(directory)},
            )
            assert (ran.returncode, ran.stderr) == (0, ""), code
            printed = ran.stdout
        elif mark == "text" and printed is not None:
            assert printed == code
            compared += 1
        else:
            printed = None

    assert compared > 0
    assert {path.name for path in directory.iterdir()} <= {"rootfs"}
    assert not [line for line in _mounts() if str(directory) in line]


def _mounts() -> list[str]:
    return Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
