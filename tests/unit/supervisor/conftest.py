"""A log that is closed hands on what waits in a second; in tests that compare what was logged it has as long as it takes."""

from __future__ import annotations

import pytest

from libcontainerd.supervisor import child


@pytest.fixture(autouse=True)
def _patient_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_CLOSE_TIMEOUT", 30.0)
