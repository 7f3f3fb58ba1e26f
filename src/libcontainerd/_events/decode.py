"""From containerd's envelope to an event in this library's words. Pure: no state, no I/O, no log.

Each kind of event fills the fields that the original filled, and no others. An envelope comes from whoever may publish
to containerd, so nothing in it is believed: what it holds decodes, or is `MalformedEvent`, or is none of our business.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError

from libcontainerd._wire.identifiers import MAX_LENGTH
from libcontainerd._wire.pb.events import task_pb2
from libcontainerd.types import EventInfo, EventType

if TYPE_CHECKING:
    from collections.abc import Callable

    from libcontainerd._wire.pb.types.event_pb2 import Envelope
    from libcontainerd._wire.pb.wellknown_pb2 import Timestamp

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_GO_ZERO_TIME: Final = -62135596800  # seconds from the epoch to 0001-01-01, which is how Go says "no time"
_LAST_SECOND: Final = 253402300799  # of the year 9999, the last one of protobuf's and of Python's
_LOGGED_NAME: Final = 200


class MalformedEvent(ValueError):  # noqa: N818  # as DESIGN speaks of them; it never leaves the package
    """An envelope without a payload, or with one that does not decode as what it says it is."""


class UnknownEvent(MalformedEvent):
    """An event of a kind that this library has no word for: of a newer containerd's, or anybody's."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a container's, decoded."""

    type: EventType
    info: EventInfo


def decode(envelope: Envelope) -> Event | None:
    """Return the event in an envelope, or None if its kind is one of containerd's that no backend hears of.

    `oom_killed` is only set on the OOM event itself: that later ones carry it too is for whoever keeps the records.
    Whether the envelope is of the right namespace and the container known is not looked at.

    Args:
        envelope: As received; not changed.

    Raises:
        UnknownEvent: its kind is not known.
        MalformedEvent: there is no payload, it does not decode, or it names what cannot be a name.
    """
    if not envelope.HasField("event"):
        raise MalformedEvent(f"event on topic {envelope.topic[:_LOGGED_NAME]!r} has no payload")
    payload = envelope.event
    url = payload.type_url
    read = _READERS.get(url) or _READERS.get(url.rpartition("/")[2])
    if read is None:
        if url in _NOT_FOR_BACKENDS:
            return None
        if not url:
            raise MalformedEvent(f"event on topic {envelope.topic[:_LOGGED_NAME]!r} does not say what it is")
        raise UnknownEvent(f"event on topic {envelope.topic[:_LOGGED_NAME]!r} is a {url[:_LOGGED_NAME]!r}")
    try:
        event = read(payload.value)
    except (DecodeError, ValueError, RecursionError) as error:
        # The last two come from protobuf in pure Python: bad UTF-8, and groups nested without end.
        size = len(payload.value)
        raise MalformedEvent(f"{size} bytes do not decode as {url[:_LOGGED_NAME]}") from error
    # Names are remembered, thousands of them, and one of them could be as long as a message.
    longest = max(len(event.info.container_id), len(event.info.process_id))
    if longest > MAX_LENGTH:
        raise MalformedEvent(f"{url[:_LOGGED_NAME]} names something with {longest} characters")
    return event


def utc(stamp: Timestamp) -> datetime | None:
    """Return a timestamp as an aware datetime in UTC, cut to microseconds; None for Go's zero time and for absurd ones."""
    seconds, nanos = stamp.seconds, stamp.nanos
    if _GO_ZERO_TIME < seconds <= _LAST_SECOND and 0 <= nanos < 1_000_000_000:
        return _EPOCH + timedelta(0, seconds, nanos // 1000)
    return None


def _exit(value: bytes) -> Event:
    event = task_pb2.TaskExit.FromString(value)
    exited_at = utc(event.exited_at) if event.HasField("exited_at") else None
    # For init the id is the container's own: that is how events name it.
    return Event(
        EventType.EXIT, EventInfo(event.container_id, event.id, event.pid, event.exit_status, exited_at)
    )


def _oom(value: bytes) -> Event:
    return Event(EventType.OOM, EventInfo(task_pb2.TaskOOM.FromString(value).container_id, oom_killed=True))


def _create(value: bytes) -> Event:
    event = task_pb2.TaskCreate.FromString(value)
    return Event(EventType.CREATE, EventInfo(event.container_id, event.container_id, event.pid))


def _start(value: bytes) -> Event:
    event = task_pb2.TaskStart.FromString(value)
    return Event(EventType.START, EventInfo(event.container_id, event.container_id, event.pid))


def _exec_added(value: bytes) -> Event:
    event = task_pb2.TaskExecAdded.FromString(value)
    return Event(EventType.EXEC_ADDED, EventInfo(event.container_id, event.exec_id))


def _exec_started(value: bytes) -> Event:
    event = task_pb2.TaskExecStarted.FromString(value)
    return Event(EventType.EXEC_STARTED, EventInfo(event.container_id, event.exec_id, event.pid))


def _paused(value: bytes) -> Event:
    return Event(EventType.PAUSED, EventInfo(task_pb2.TaskPaused.FromString(value).container_id))


def _resumed(value: bytes) -> Event:
    return Event(EventType.RESUMED, EventInfo(task_pb2.TaskResumed.FromString(value).container_id))


_NOT_FOR_BACKENDS: Final = {
    "containerd.events.TaskCheckpointed",
    "containerd.events.TaskDelete",
    "containerd.events.TaskIO",
}

# By the type and not by the topic, as the original: the topic is only what the subscription filters by.
_READERS: Final[dict[str, Callable[[bytes], Event]]] = {
    "containerd.events.TaskExit": _exit,
    "containerd.events.TaskOOM": _oom,
    "containerd.events.TaskCreate": _create,
    "containerd.events.TaskStart": _start,
    "containerd.events.TaskExecAdded": _exec_added,
    "containerd.events.TaskExecStarted": _exec_started,
    "containerd.events.TaskPaused": _paused,
    "containerd.events.TaskResumed": _resumed,
}
