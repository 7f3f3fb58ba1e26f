"""The page about testing: its test file is run by pytest, as a reader would; its programs are run by tests/unit/test_docs.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from libcontainerd.testing import FakeContainerd

PAGE = (Path(__file__).parents[3] / "docs/testing.md").read_text(encoding="utf-8")


def test_the_test_file_passes(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python fragment\n(# test_daemon\.py\n.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "test_daemon.py").write_text(code)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )

    assert f"{code.count('def test_')} passed" in ran.stdout, ran.stdout + ran.stderr


def test_what_the_page_names_is_there() -> None:
    table = PAGE.partition("| to see how your program takes | do |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(\w+)", table))

    assert named
    assert all(callable(getattr(FakeContainerd, name)) for name in named)
