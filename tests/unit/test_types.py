"""The API's words: spelled as the original and containerd spell them, and never changed under a thread."""

from __future__ import annotations

import dataclasses
import inspect
from datetime import UTC, datetime

import pytest

from libcontainerd.types import (
    INIT_PROCESS_NAME,
    Backend,
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


class Terse:
    """A backend that has names of its own for what it is given, and an answer that nobody looks at."""

    def process_event(self, cid: str, kind: EventType, facts: EventInfo) -> bool:
        return bool(cid and kind and facts)


def test_a_backend_is_called_by_position_and_may_answer_what_it_likes() -> None:
    backend: Backend = Terse()  # the type checker's part of this test
    assert backend.process_event("web", EventType.EXIT, EventInfo("web")) is True
    parameters = list(inspect.signature(Backend.process_event).parameters.values())
    assert {each.kind for each in parameters} == {inspect.Parameter.POSITIONAL_ONLY}
