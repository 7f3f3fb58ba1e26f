"""The snapshots service: directories that are prepared from one another.

Real directories under the fake's own, copied from their parents: what the ``native`` snapshotter does. ``overlayfs`` is served
the same way, so that clients find the snapshotter that they ask for by default.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc

from libcontainerd._wire.pb.events import snapshot_pb2 as snapshot_events
from libcontainerd._wire.pb.services import snapshots_pb2
from libcontainerd._wire.pb.wellknown_pb2 import Empty
from libcontainerd.testing.filters import FilterError, Filters, fields
from libcontainerd.testing.objects import Snapshot
from libcontainerd.testing.refusals import (
    Refusal,
    already_exists,
    check_labels,
    failed_precondition,
    invalid_argument,
    namespace_of,
    not_found,
    unimplemented,
)
from libcontainerd.testing.store import set_masked_labels

if TYPE_CHECKING:
    from libcontainerd.testing.exchange import Exchange
    from libcontainerd.testing.store import Space, Store

SNAPSHOTTERS: Final = ("native", "overlayfs")
_ACTIVE: Final = snapshots_pb2.Kind.ACTIVE
_VIEW: Final = snapshots_pb2.Kind.VIEW
_COMMITTED: Final = snapshots_pb2.Kind.COMMITTED
_KIND_NAMES: Final = {_ACTIVE: "Active", _VIEW: "View", _COMMITTED: "Committed"}
_BLOCK: Final = 512


class Snapshots(snapshots_pb2.SnapshotsServicer):
    """The snapshots service.

    Args:
        store: Where snapshots are kept.
        exchange: Where events go.
        directory: Where their directories go.
    """

    def __init__(self, store: Store, exchange: Exchange, directory: Path) -> None:
        self._store = store
        self._exchange = exchange
        self._directory = directory
        self._count = 0  # the store's lock guards it

    def clear(self) -> None:
        """Remove every directory."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _find(self, context: grpc.ServicerContext, snapshotter: str, key: str) -> Snapshot:
        namespace = namespace_of(context)
        _check_snapshotter(snapshotter)
        with self._store.lock:
            return _snapshot(self._store.space(namespace), snapshotter, key)

    def Prepare(
        self, request: snapshots_pb2.PrepareSnapshotRequest, context: grpc.ServicerContext
    ) -> snapshots_pb2.PrepareSnapshotResponse:
        """Make a directory to write to, as its parent left it."""
        snapshot = self._add(
            context, request.snapshotter, request.key, request.parent, request.labels, kind=_ACTIVE
        )
        return snapshots_pb2.PrepareSnapshotResponse(mounts=snapshot.mounts())

    def View(
        self, request: snapshots_pb2.ViewSnapshotRequest, context: grpc.ServicerContext
    ) -> snapshots_pb2.ViewSnapshotResponse:
        """Make a directory to read from, as its parent left it."""
        snapshot = self._add(
            context, request.snapshotter, request.key, request.parent, request.labels, kind=_VIEW
        )
        return snapshots_pb2.ViewSnapshotResponse(mounts=snapshot.mounts())

    def _add(
        self,
        context: grpc.ServicerContext,
        snapshotter: str,
        key: str,
        parent: str,
        labels: Mapping[str, str],
        *,
        kind: int,
    ) -> Snapshot:
        namespace = namespace_of(context)
        _check_snapshotter(snapshotter)
        check_labels(labels, "info")
        if not key:
            raise Refusal(grpc.StatusCode.UNKNOWN, "bucket name required")
        now = self._store.clock()
        with self._store.lock:
            space = self._store.make_space(namespace)
            if (snapshotter, key) in space.snapshots:
                raise already_exists(f'snapshot "{key}"')
            below = space.snapshots.get((snapshotter, parent)) if parent else None
            if parent and below is None:
                raise not_found(f"parent snapshot {parent} does not exist")
            if below is not None and below.kind != _COMMITTED:
                raise invalid_argument(
                    "failed to create snapshot: parent"
                    f' "{namespace}/{below.number}/{parent}" is not committed snapshot'
                )
            self._count += 1
            directory = self._directory / snapshotter / str(self._count)
            snapshot = Snapshot(self._count, key, parent, kind, directory, dict(labels), now, now)
            space.snapshots[(snapshotter, key)] = snapshot
        if below is None:
            directory.mkdir(parents=True)
        else:
            shutil.copytree(below.directory, directory, symlinks=True)
        if kind == _ACTIVE:
            self._exchange.publish(
                namespace, "/snapshot/prepare", snapshot_events.SnapshotPrepare(key=key, parent=parent)
            )
        return snapshot

    def Mounts(
        self, request: snapshots_pb2.MountsRequest, context: grpc.ServicerContext
    ) -> snapshots_pb2.MountsResponse:
        """Say how to mount a snapshot that was not committed."""
        snapshot = self._find(context, request.snapshotter, request.key)
        if snapshot.kind == _COMMITTED:
            name = f"{namespace_of(context)}/{snapshot.number}/{snapshot.name}"
            raise failed_precondition(
                f"failed to get snapshot mount: requested snapshot {name} not active or view"
            )
        return snapshots_pb2.MountsResponse(mounts=snapshot.mounts())

    def Commit(self, request: snapshots_pb2.CommitSnapshotRequest, context: grpc.ServicerContext) -> Empty:
        """Keep what was written, under a name."""
        namespace = namespace_of(context)
        _check_snapshotter(request.snapshotter)
        check_labels(request.labels, "info")
        with self._store.lock:
            space = self._store.space(namespace)
            snapshot = _snapshot(space, request.snapshotter, request.key)
            if (request.snapshotter, request.name) in space.snapshots and request.name != request.key:
                raise already_exists(f'snapshot "{request.name}"')
            if snapshot.kind != _ACTIVE:
                name = f"{namespace}/{snapshot.number}/{request.key}"
                raise failed_precondition(f'failed to commit snapshot: snapshot "{name}" is not active')
            del space.snapshots[(request.snapshotter, request.key)]
            snapshot.name, snapshot.kind = request.name, _COMMITTED
            snapshot.labels = dict(request.labels)
            snapshot.created_at = snapshot.updated_at = self._store.clock()
            space.snapshots[(request.snapshotter, request.name)] = snapshot
        self._exchange.publish(
            namespace,
            "/snapshot/commit",
            snapshot_events.SnapshotCommit(key=request.key, name=request.name),
        )
        return Empty()

    def Remove(self, request: snapshots_pb2.RemoveSnapshotRequest, context: grpc.ServicerContext) -> Empty:
        """Remove a snapshot that is nobody's parent."""
        namespace = namespace_of(context)
        _check_snapshotter(request.snapshotter)
        with self._store.lock:
            space = self._store.space(namespace)
            snapshot = _snapshot(space, request.snapshotter, request.key)
            if any(
                key[0] == request.snapshotter and each.parent == request.key
                for key, each in space.snapshots.items()
            ):
                raise failed_precondition("cannot remove snapshot with child")
            del space.snapshots[(request.snapshotter, request.key)]
        shutil.rmtree(snapshot.directory, ignore_errors=True)
        self._exchange.publish(namespace, "/snapshot/remove", snapshot_events.SnapshotRemove(key=request.key))
        return Empty()

    def Stat(
        self, request: snapshots_pb2.StatSnapshotRequest, context: grpc.ServicerContext
    ) -> snapshots_pb2.StatSnapshotResponse:
        """Describe a snapshot."""
        snapshot = self._find(context, request.snapshotter, request.key)
        return snapshots_pb2.StatSnapshotResponse(info=snapshot.message())

    def Update(
        self, request: snapshots_pb2.UpdateSnapshotRequest, context: grpc.ServicerContext
    ) -> snapshots_pb2.UpdateSnapshotResponse:
        """Change a snapshot's labels."""
        snapshot = self._find(context, request.snapshotter, request.info.name)
        with self._store.lock:
            labels = dict(snapshot.labels)
            paths = list(request.update_mask.paths) or ["labels"]
            for path in set_masked_labels(labels, request.info.labels, paths, "info"):
                raise invalid_argument(f'cannot update "{path}" field on snapshot "{request.info.name}"')
            snapshot.labels = labels
            snapshot.updated_at = self._store.clock()
            return snapshots_pb2.UpdateSnapshotResponse(info=snapshot.message())

    def List(
        self, request: snapshots_pb2.ListSnapshotsRequest, context: grpc.ServicerContext
    ) -> Iterator[snapshots_pb2.ListSnapshotsResponse]:
        """Describe a snapshotter's snapshots."""
        _check_snapshotter(request.snapshotter)
        try:
            namespace = namespace_of(context)
            filters = Filters(request.filters)
        except (Refusal, FilterError) as error:  # of this call alone containerd does not translate errors
            text = error.details if isinstance(error, Refusal) else str(error)
            raise Refusal(grpc.StatusCode.UNKNOWN, text) from error
        with self._store.lock:
            snapshots = sorted(self._store.space(namespace).snapshots.items())
            found = [
                each.message()
                for (snapshotter, name), each in snapshots
                if snapshotter == request.snapshotter
                and filters.match(
                    fields(
                        {"kind": _KIND_NAMES[each.kind].lower(), "name": name, "parent": each.parent},
                        each.labels,
                    )
                )
            ]
        if found:
            yield snapshots_pb2.ListSnapshotsResponse(info=found)

    def Usage(
        self, request: snapshots_pb2.UsageRequest, context: grpc.ServicerContext
    ) -> snapshots_pb2.UsageResponse:
        """Count what a snapshot takes."""
        snapshot = self._find(context, request.snapshotter, request.key)
        entries = [snapshot.directory, *snapshot.directory.rglob("*")]
        size = sum(entry.lstat().st_blocks * _BLOCK for entry in entries)
        return snapshots_pb2.UsageResponse(size=size, inodes=len(entries))

    def Cleanup(self, request: snapshots_pb2.CleanupRequest, context: grpc.ServicerContext) -> Empty:
        """Refuse, as snapshotters do that have nothing to clean up."""
        namespace_of(context)
        _check_snapshotter(request.snapshotter)
        raise unimplemented("snapshotter does not implement Cleanup method: not implemented")


def _check_snapshotter(name: str) -> None:
    if not name:
        raise invalid_argument("snapshotter argument missing")
    if name not in SNAPSHOTTERS:
        raise invalid_argument(f"snapshotter not loaded: {name}")


def _snapshot(space: Space, snapshotter: str, key: str) -> Snapshot:
    snapshot = space.snapshots.get((snapshotter, key))
    if snapshot is None:
        raise not_found(f"snapshot {key} does not exist")
    return snapshot
