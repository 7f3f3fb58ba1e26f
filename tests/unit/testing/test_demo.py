"""The demo without a containerd: it says so, and shows the same life."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parents[3] / "examples/demo.py"


def test_the_demo_on_the_fake() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", DEMO, "--fake"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )

    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "No real container (--fake was asked for)" in ran.stdout
    assert "unisolated" in ran.stdout
    assert re.search(r"connect .* containerd 1\.6\.20 \(a fake\)", ran.stdout)
    assert "it had 11 events, one exit for each of its 3 processes" in ran.stdout
    assert "nothing is left of it" in ran.stdout
