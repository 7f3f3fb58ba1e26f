"""Decoding of envelopes: each kind's fields, and that hostile ones give nothing or MalformedEvent."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone

import pytest
import structlog.testing
from google.protobuf.message import DecodeError, Message
from hypothesis import example, given
from hypothesis import strategies as st

from libcontainerd._events.decode import Event, MalformedEvent, UnknownEvent, decode, utc
from libcontainerd._wire import typeurl
from libcontainerd._wire.pb.events import container_pb2, task_pb2
from libcontainerd._wire.pb.types.event_pb2 import Envelope
from libcontainerd._wire.pb.wellknown_pb2 import Any, Timestamp
from libcontainerd.types import EventInfo, EventType

C = "web"
KINDS = [
    "TaskExit",
    "TaskOOM",
    "TaskCreate",
    "TaskStart",
    "TaskExecAdded",
    "TaskExecStarted",
    "TaskPaused",
    "TaskResumed",
]
EXITED = Timestamp(seconds=1_700_000_000, nanos=123_456_789)
EXITED_AT = datetime(2023, 11, 14, 22, 13, 20, 123_456, tzinfo=UTC)


def envelope(message: Message, topic: str = "/tasks/x") -> Envelope:
    return Envelope(namespace="ns", topic=topic, event=typeurl.pack(message))


@pytest.mark.parametrize(
    ("message", "kind", "info"),
    [
        (task_pb2.TaskCreate(container_id=C, bundle="/b", pid=7), EventType.CREATE, EventInfo(C, C, 7)),
        (task_pb2.TaskStart(container_id=C, pid=7), EventType.START, EventInfo(C, C, 7)),
        (
            task_pb2.TaskExit(container_id=C, id=C, pid=7, exit_status=137, exited_at=EXITED),
            EventType.EXIT,
            EventInfo(C, C, 7, 137, EXITED_AT),
        ),
        (
            task_pb2.TaskExit(container_id=C, id="sh", pid=8, exit_status=0, exited_at=EXITED),
            EventType.EXIT,
            EventInfo(C, "sh", 8, 0, EXITED_AT),
        ),
        (
            task_pb2.TaskExit(container_id=C, id=C, pid=2**32 - 1, exit_status=2**32 - 1),
            EventType.EXIT,
            EventInfo(C, C, 2**32 - 1, 2**32 - 1, None),
        ),
        (task_pb2.TaskOOM(container_id=C), EventType.OOM, EventInfo(C, oom_killed=True)),
        (task_pb2.TaskExecAdded(container_id=C, exec_id="sh"), EventType.EXEC_ADDED, EventInfo(C, "sh")),
        (
            task_pb2.TaskExecStarted(container_id=C, exec_id="sh", pid=9),
            EventType.EXEC_STARTED,
            EventInfo(C, "sh", 9),
        ),
        (task_pb2.TaskPaused(container_id=C), EventType.PAUSED, EventInfo(C)),
        (task_pb2.TaskResumed(container_id=C), EventType.RESUMED, EventInfo(C)),
    ],
)
def test_each_kind_fills_its_fields(message: Message, kind: EventType, info: EventInfo) -> None:
    assert decode(envelope(message)) == Event(kind, info)


@pytest.mark.parametrize("prefix", ["type.googleapis.com/", "types.containerd.io/", "a/b/", "/"])
def test_a_type_url_may_have_a_prefix(prefix: str) -> None:
    packed = envelope(task_pb2.TaskPaused(container_id=C))
    packed.event.type_url = prefix + packed.event.type_url
    assert decode(packed) == Event(EventType.PAUSED, EventInfo(C))


@pytest.mark.parametrize(
    "message",
    [
        task_pb2.TaskDelete(container_id=C, pid=7, exit_status=1),
        task_pb2.TaskCheckpointed(container_id=C),
        task_pb2.TaskIO(),
    ],
)
def test_kinds_that_are_no_backends_business_are_passed_over(message: Message) -> None:
    with structlog.testing.capture_logs() as logs:
        assert decode(envelope(message, "/tasks/other")) is None
    assert logs == []


@pytest.mark.parametrize(
    "message",
    [
        container_pb2.ContainerCreate(id=C),
        container_pb2.ContainerDelete(id=C),
    ],
)
def test_other_kinds_are_unknown(message: Message) -> None:
    with pytest.raises(
        UnknownEvent, match=re.escape(f"'/tasks/other' is a '{message.DESCRIPTOR.full_name}'")
    ):
        decode(envelope(message, "/tasks/other"))


def test_an_absurd_name_does_not_fill_the_log() -> None:
    packed = Envelope(topic="t" * 10_000, event=Any(type_url="u" * 10_000))
    with pytest.raises(UnknownEvent) as raised:
        decode(packed)
    assert len(str(raised.value)) < 1000


def test_no_payload_is_malformed() -> None:
    with pytest.raises(MalformedEvent, match=r"'/tasks/exit' has no payload"):
        decode(Envelope(topic="/tasks/exit"))


def test_a_payload_without_a_type_is_malformed() -> None:
    with pytest.raises(MalformedEvent, match=r"'/tasks/exit' does not say what it is"):
        decode(Envelope(topic="/tasks/exit", event=Any(value=b"x")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "value",
    [
        b"\x0a\x05abc",  # a string cut short
        b"\x0a\x02\xff\xfe",  # invalid UTF-8
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # an absurd length
        b"\x07",  # no such wire type
    ],
)
def test_what_does_not_decode_is_malformed(kind: str, value: bytes) -> None:
    with pytest.raises(MalformedEvent, match=f"{len(value)} bytes do not decode as containerd.events.{kind}"):
        decode(Envelope(event=Any(type_url=f"containerd.events.{kind}", value=value)))


@pytest.mark.parametrize(
    "message",
    [
        task_pb2.TaskExit(container_id=C, id="e" * 77, pid=7),
        task_pb2.TaskExecAdded(container_id=C, exec_id="e" * 1_000_000),
        task_pb2.TaskStart(container_id="c" * 77, pid=7),
    ],
)
def test_a_name_longer_than_containerd_takes_is_malformed(message: Message) -> None:
    """Whoever may publish could fill the memory of names with names as long as messages."""
    with pytest.raises(MalformedEvent, match=r"names something with [0-9]+ characters") as raised:
        decode(envelope(message))
    assert len(str(raised.value)) < 200


def test_a_name_as_long_as_containerd_takes_is_good() -> None:
    event = decode(envelope(task_pb2.TaskExit(container_id=C, id="e" * 76, pid=7)))
    assert event == Event(EventType.EXIT, EventInfo(C, "e" * 76, 7))


# --------------------------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize(
    ("seconds", "nanos", "expected"),
    [
        (0, 0, datetime(1970, 1, 1, tzinfo=UTC)),
        (0, 999, datetime(1970, 1, 1, tzinfo=UTC)),
        (-1, 999_999_999, datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)),
        (253_402_300_799, 999_999_999, datetime.max.replace(tzinfo=UTC)),
        (-62_135_596_799, 0, datetime(1, 1, 1, 0, 0, 1, tzinfo=UTC)),
        (-62_135_596_800, 0, None),
        (-62_135_596_800, 5, None),
        (-62_135_596_801, 0, None),
        (253_402_300_800, 0, None),
        (2**63 - 1, 0, None),
        (-(2**63), 0, None),
        (1, -1, None),
        (1, 1_000_000_000, None),
    ],
)
def test_time_is_utc_or_none(seconds: int, nanos: int, expected: datetime | None) -> None:
    assert utc(Timestamp(seconds=seconds, nanos=nanos)) == expected
    exit_event = task_pb2.TaskExit(container_id=C, id=C, exited_at=Timestamp(seconds=seconds, nanos=nanos))
    decoded = decode(envelope(exit_event))
    assert decoded is not None
    assert decoded.info.exited_at == expected


@given(
    st.datetimes(
        min_value=datetime(1, 1, 2),  # noqa: DTZ001  # hypothesis wants bounds without a zone
        max_value=datetime(9999, 12, 30),  # noqa: DTZ001
        timezones=st.sampled_from([UTC, timezone(timedelta(hours=-11))]),
    )
)
def test_time_survives(moment: datetime) -> None:
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    there = utc(stamp)
    assert there == moment
    assert there.utcoffset() == timedelta(0)


# ------------------------------------------------------------------------------------------------------------ hostile

hostile_urls = st.one_of(
    st.sampled_from([f"containerd.events.{kind}" for kind in KINDS]),
    st.sampled_from([f"/x/containerd.events.{kind}" for kind in KINDS]),
    st.sampled_from(["containerd.events.TaskDelete", "", "/", "containerd.events.", "TaskExit"]),
    st.text(),
)


@st.composite
def wild_exits(draw: st.DrawFn) -> bytes:
    """A TaskExit at the limits of its types, perhaps with some of its bytes changed."""
    message = task_pb2.TaskExit(
        container_id=draw(st.text(max_size=100)),
        id=draw(st.text(max_size=100)),
        pid=draw(st.integers(0, 2**32 - 1)),
        exit_status=draw(st.integers(0, 2**32 - 1)),
        exited_at=Timestamp(
            seconds=draw(st.integers(-(2**63), 2**63 - 1)), nanos=draw(st.integers(-(2**31), 2**31 - 1))
        ),
    )
    value = bytearray(message.SerializeToString())
    for _ in range(draw(st.integers(0, 3))):
        if value:
            value[draw(st.integers(0, len(value) - 1))] = draw(st.integers(0, 255))
    return bytes(value)


def survives(packed: Envelope) -> None:
    """Decode; anything but an event of sound types, None or MalformedEvent is an error."""
    try:
        event = decode(packed)
    except MalformedEvent:
        return
    if event is None:
        return
    info = event.info
    assert isinstance(info.container_id, str)
    assert isinstance(info.process_id, str)
    assert 0 <= info.pid < 2**32
    assert 0 <= info.exit_code < 2**32
    assert info.exited_at is None or info.exited_at.tzinfo is UTC


@given(hostile_urls, st.one_of(st.binary(), wild_exits()))
@example("containerd.events.TaskExit", b"\x5b" * 5000)  # groups in groups
@example("containerd.events.TaskExit", b"\x08\x01")  # the right field with the wrong type
def test_hostile_payloads_only_ever_give_none_or_malformed(url: str, value: bytes) -> None:
    try:
        any_message = Any(type_url=url, value=value)
    except (ValueError, UnicodeEncodeError):
        return  # surrogates: protobuf does not let such a name in
    survives(Envelope(topic="/tasks/exit", event=any_message))


@given(st.binary())
def test_hostile_envelopes_only_ever_give_none_or_malformed(data: bytes) -> None:
    try:
        packed = Envelope.FromString(data)
    except DecodeError:
        return  # grpc does not hand such bytes on
    survives(packed)


def test_hostile_payloads_under_protobuf_in_pure_python() -> None:
    """Without its C extension protobuf raises other errors for the same bytes."""
    program = """
from libcontainerd._events.decode import MalformedEvent, decode
from libcontainerd._wire.pb.types.event_pb2 import Envelope
from libcontainerd._wire.pb.wellknown_pb2 import Any
from google.protobuf.internal import api_implementation
import random
print(api_implementation.Type())
def attempt(value):
    try:
        decode(Envelope(event=Any(type_url="containerd.events.TaskExit", value=value)))
    except MalformedEvent:
        return True
    return False
assert attempt(bytes([10, 2, 255, 254]))
assert attempt(bytes([91]) * 5000)
chance = random.Random(1)
assert any([attempt(chance.randbytes(chance.randrange(40))) for _ in range(2000)])
"""
    environment = {**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        timeout=50,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "python\n"), done.stderr
