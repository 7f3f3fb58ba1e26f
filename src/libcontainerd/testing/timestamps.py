"""Times as containerd sends them: protobuf's timestamps, and Go's zero time where there is none."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from libcontainerd._wire.pb.wellknown_pb2 import Timestamp

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_GO_ZERO_SECONDS: Final = -62135596800


def now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


def stamp(time: datetime | None) -> Timestamp:
    """A timestamp; None becomes Go's zero time, the beginning of the year 1."""
    if time is None:
        return Timestamp(seconds=_GO_ZERO_SECONDS)
    since = time - _EPOCH
    return Timestamp(seconds=since.days * 86400 + since.seconds, nanos=since.microseconds * 1000)
