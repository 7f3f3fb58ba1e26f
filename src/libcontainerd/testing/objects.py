"""What is kept that is no message of the API: blobs, what is being written, snapshots."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from libcontainerd._wire.pb.services import content_pb2, snapshots_pb2
from libcontainerd._wire.pb.types.mount_pb2 import Mount
from libcontainerd.testing.timestamps import stamp


@dataclass
class Blob:
    """What a namespace knows of one blob."""

    digest: str
    size: int
    created_at: datetime
    updated_at: datetime
    labels: dict[str, str] = field(default_factory=dict)

    def message(self, *, listed: bool = False) -> content_pb2.Info:
        """As Info answers; 1.6 tells no time of the last change in lists."""
        return content_pb2.Info(
            digest=self.digest,
            size=self.size,
            created_at=stamp(self.created_at),
            updated_at=stamp(None if listed else self.updated_at),
            labels=self.labels,
        )


@dataclass
class Ingest:
    """A blob that is being written."""

    ref: str
    started_at: datetime
    updated_at: datetime
    total: int = 0
    expected: str = ""
    data: bytearray = field(default_factory=bytearray)
    locked_since: datetime | None = None

    def __post_init__(self) -> None:
        self._hash = hashlib.sha256(self.data)

    def write(self, data: bytes, *, anew: bool) -> None:
        """Add bytes, after what is there or in its place."""
        if anew:
            self.data.clear()
            self._hash = hashlib.sha256()
        self.data += data
        self._hash.update(data)

    @property
    def digest(self) -> str:
        """The digest of what was written so far."""
        return f"sha256:{self._hash.hexdigest()}"

    def message(self) -> content_pb2.Status:
        """As Status answers; the store keeps no expected digest."""
        return content_pb2.Status(
            ref=self.ref,
            started_at=stamp(self.started_at),
            updated_at=stamp(self.updated_at),
            offset=len(self.data),
            total=self.total,
        )


@dataclass
class Snapshot:
    """One snapshot, and its directory."""

    number: int
    name: str
    parent: str
    kind: int
    directory: Path
    labels: dict[str, str]
    created_at: datetime
    updated_at: datetime

    def message(self) -> snapshots_pb2.Info:
        """As Stat answers."""
        return snapshots_pb2.Info(
            name=self.name,
            parent=self.parent,
            kind=self.kind,
            created_at=stamp(self.created_at),
            updated_at=stamp(self.updated_at),
            labels=self.labels,
        )

    def mounts(self) -> list[Mount]:
        """How to mount it."""
        access = "ro" if self.kind == snapshots_pb2.Kind.VIEW else "rw"
        return [Mount(type="bind", source=str(self.directory), options=["rbind", access])]
