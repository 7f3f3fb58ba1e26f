"""What containerd keeps in its database: by namespace, in memory."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from libcontainerd.testing.refusals import Refusal, check_labels, unknown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, MutableMapping

    from libcontainerd._wire.pb.services.containers_pb2 import Container
    from libcontainerd._wire.pb.services.images_pb2 import Image
    from libcontainerd._wire.pb.services.leases_pb2 import Lease
    from libcontainerd._wire.pb.types.sandbox_pb2 import Sandbox
    from libcontainerd.testing.objects import Blob, Ingest, Snapshot
    from libcontainerd.testing.releases import Release


@dataclass
class Space:
    """One namespace's part."""

    labels: dict[str, str] = field(default_factory=dict)
    containers: dict[str, Container] = field(default_factory=dict)
    images: dict[str, Image] = field(default_factory=dict)
    leases: dict[str, Lease] = field(default_factory=dict)
    leased: dict[str, set[tuple[str, str]]] = field(default_factory=dict)
    blobs: dict[str, Blob] = field(default_factory=dict)
    ingests: dict[str, Ingest] = field(default_factory=dict)
    snapshots: dict[tuple[str, str], Snapshot] = field(default_factory=dict)
    sandboxes: dict[str, Sandbox] | None = None  # a table that is made for the first, and stays

    def contents(self) -> list[str]:
        """What it is not empty of, in containerd's words."""
        found = [
            name
            for name, held in (
                ("images", self.images),
                ("blobs", self.blobs),
                ("containers", self.containers),
            )
            if held
        ]
        found += [f"snapshots on {name} snapshotter" for name in sorted({key[0] for key in self.snapshots})]
        return found


class Store:
    """Every namespace's part.

    Attributes:
        lock: Guards all of it. Innermost but for the exchange's, which is taken under it; nothing that waits is called
            while it is held.
        clock: What time it is.
        release: The containerd that keeps it.
    """

    def __init__(self, clock: Callable[[], datetime], release: Release) -> None:
        self.lock = threading.RLock()
        self.clock = clock
        self.release = release
        self._spaces: dict[str, Space] = {}

    def space(self, namespace: str) -> Space:
        """A namespace's part, to read; an empty one that is kept nowhere if it does not exist."""
        return self._spaces.get(namespace) or Space()

    def make_space(self, namespace: str) -> Space:
        """A namespace's part, to write: containerd makes a namespace when something is first kept in it."""
        return self._spaces.setdefault(namespace, Space())

    def has_space(self, namespace: str) -> bool:
        """Whether the namespace exists."""
        return namespace in self._spaces

    def drop_space(self, namespace: str) -> None:
        """Forget a namespace."""
        del self._spaces[namespace]

    def spaces(self) -> list[tuple[str, Space]]:
        """All of them, by name."""
        return sorted(self._spaces.items())

    def clear(self) -> None:
        """Forget everything."""
        with self.lock:
            self._spaces.clear()


def set_labels(target: MutableMapping[str, str], labels: Mapping[str, str], what: str) -> None:
    """Replace labels; one with an empty value is not kept.

    Raises:
        Refusal: one cannot be kept.
    """
    check_labels(labels, what)
    target.clear()
    target.update({key: value for key, value in labels.items() if value})


def set_masked_labels(
    target: MutableMapping[str, str], labels: Mapping[str, str], paths: Iterable[str], what: str
) -> list[str]:
    """Take over what a field mask says of labels, and return the paths that are about something else.

    Raises:
        Refusal: a label cannot be kept.
    """
    check_labels(labels, what)
    others = []
    for path in paths:
        if path == "labels":
            set_labels(target, labels, what)
        elif path.startswith("labels."):
            key = path.removeprefix("labels.")
            if labels.get(key):
                target[key] = labels[key]
            else:
                target.pop(key, None)
        else:
            others.append(path)
    return others


def check_label_keys(labels: Mapping[str, str], doing: str) -> None:
    """Refuse a label without a key, which the database cannot hold.

    Raises:
        Refusal: there is one.
    """
    if "" in labels:
        refusal = unknown("")
        raise Refusal(refusal.code, f'{doing}: failed to set label ""="{labels[""]}": key required')
