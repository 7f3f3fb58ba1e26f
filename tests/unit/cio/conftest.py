"""Every test of cio must leave no thread and no descriptor behind; the pump's idle time is shortened so as not to wait."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from libcontainerd.cio import pump
from tests.unit.cio.shim import eventually, open_descriptors, pump_threads


@pytest.fixture(autouse=True)
def _nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pump, "_IDLE_SECONDS", 0.05)
    before = open_descriptors()
    yield
    eventually(lambda: not pump_threads(), f"the end of the pump's threads {pump_threads()}")
    gc.collect()
    eventually(lambda: open_descriptors() <= before, f"the close of {open_descriptors() - before}")
