"""The API's words: spelled as the original and containerd spell them, and never changed under a thread."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime

import pytest

from libcontainerd.types import (
    INIT_PROCESS_NAME,
    EventInfo,
    EventType,
    ExitStatus,
    Status,
    Summary,
    Version,
)


def test_events_are_spelled_as_in_the_original() -> None:
    assert [str(each) for each in EventType] == [
        "unknown", "exit", "oom", "create", "start", "exec-added", "exec-started", "paused", "resumed",
    ]  # fmt: skip
    assert EventType("exec-added") is EventType.EXEC_ADDED
    assert f"{EventType.EXIT}" == "exit"


def test_states_are_spelled_as_in_containerd() -> None:
    assert [str(each) for each in Status] == ["created", "running", "paused", "pausing", "stopped", "unknown"]
    assert INIT_PROCESS_NAME == "init"


def test_an_events_facts_do_not_change() -> None:
    info = EventInfo("web")
    assert info == EventInfo("web", "", 0, 0, None, oom_killed=False)
    assert hash(info) == hash(EventInfo("web"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.pid = 5  # type: ignore[misc] # that is what is tried
    assert not hasattr(info, "__dict__")


def test_answers_unpack_in_the_originals_order() -> None:
    now = datetime.now(UTC)
    code, exited_at, error = ExitStatus(5, now)
    assert (code, exited_at, error) == (5, now, None)
    assert tuple(Summary(1, "init")) == (1, "init")
    assert tuple(Version("1.6.20", "rev")) == ("1.6.20", "rev")
