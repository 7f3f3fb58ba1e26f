"""Checkpoints: a task's state out of containerd's content store into a directory, and back for a task to begin with.

On its way the archive is content, which a lease of our own keeps. With the lease's end containerd collects it, whatever
went wrong; and where this program dies in the middle, the lease expires. Content that somebody else keeps as well stays.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import uuid
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from libcontainerd import _archive as archive
from libcontainerd import _cleanup as cleanup
from libcontainerd._wire import typeurl
from libcontainerd._wire.connection import NotSentError
from libcontainerd._wire.pb.runc import linux_pb2, options_pb2
from libcontainerd._wire.pb.services import containers_pb2, content_pb2, leases_pb2, tasks_pb2
from libcontainerd._wire.pb.types import task_pb2
from libcontainerd._wire.pb.types.descriptor_pb2 import Descriptor
from libcontainerd.errors import (
    ConflictError,
    FailedPreconditionError,
    InvalidParameterError,
    LibcontainerdError,
    NotFoundError,
    PermissionDeniedError,
    SystemFailureError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from libcontainerd._records import Container
    from libcontainerd._wire.connection import Connection, Deadline
    from libcontainerd._wire.shelter import Lease, Shelter

CRIU_TYPE: Final = "application/vnd.containerd.container.criu.checkpoint.criu.tar"
_OLD_RUNTIME: Final = "io.containerd.runtime.v1.linux"
_INVENTORY: Final = "inventory.img"
"""What criu opens first of a checkpoint."""

_LEASE_LIFE: Final = timedelta(days=1)
_READ_BYTES: Final = 4 << 20
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_LOG: Final = re.compile(r"(/\S*/(?:criu-)?(?:dump|restore)\.log)\b")
_LOG_TAIL_BYTES: Final = 64 << 10
_LOG_LINES: Final = 3


class Checkpoints:
    """A client's checkpoints. Thread-safe; what is promised and raised is said at `Client.create_checkpoint` and `Client.start`."""

    def __init__(self, connection: Connection, shelter: Shelter) -> None:
        self._connection = connection
        self._shelter = shelter

    # ------------------------------------------------------------------------------------------- out of containerd

    def create(self, container: Container, directory: str, *, leave: bool, deadline: Deadline) -> None:
        """Write a container's checkpoint into a directory; the task ends with it, or with `leave` goes on."""
        doing = f"checkpoint container {container.id!r}"
        container.require_task(doing)
        with (
            self._shelter.enter(doing) as calls,
            _emptied(directory, doing),
            self._leased(calls, doing, deadline) as lease,
        ):
            found = self._dump(calls, container, lease, leave=leave, doing=doing, deadline=deadline)
            source = _Blob(self._connection, found, doing=doing, deadline=deadline)
            try:
                archive.unpack(source, directory, found.size)
            except archive.ArchiveError as error:
                raise SystemFailureError(f"cannot {doing}: {error}") from error
            if not os.path.isfile(os.path.join(directory, _INVENTORY)):
                raise SystemFailureError(f"cannot {doing}: its archive holds no checkpoint of criu's")

    def _dump(
        self,
        calls: Lease,
        container: Container,
        lease: str,
        *,
        leave: bool,
        doing: str,
        deadline: Deadline,
    ) -> Descriptor:
        """Have criu write the checkpoint, and find its archive among the content that came of it."""
        look = containers_pb2.GetContainerRequest(id=container.id)
        known = calls.call(calls.containers.Get, look, doing=doing, deadline=deadline).container
        old = known.runtime.name == _OLD_RUNTIME
        kind = linux_pb2.CheckpointOptions if old else options_pb2.CheckpointOptions
        request = tasks_pb2.CheckpointTaskRequest(
            container_id=container.id, options=typeurl.pack(kind(exit=not leave))
        )
        with self._frozen(calls, container, doing, deadline):
            try:
                answer = calls.call(
                    calls.tasks.Checkpoint, request, doing=doing, deadline=deadline, lease=lease
                )
            except ConflictError as error:
                return self._written(calls, lease, error, doing, deadline)
            except LibcontainerdError as error:
                raise with_criu_log(error) from error
        for descriptor in answer.descriptors:
            if descriptor.media_type == CRIU_TYPE:
                return descriptor
        raise SystemFailureError(f"cannot {doing}: containerd has made no archive of it")

    @contextmanager
    def _frozen(self, calls: Lease, container: Container, doing: str, deadline: Deadline) -> Iterator[None]:
        """Freeze the task for the length of a block, unless it is frozen already: what criu does not see stands still too."""
        look = tasks_pb2.GetRequest(container_id=container.id)
        status = calls.call(calls.tasks.Get, look, doing=doing, deadline=deadline).process.status
        if status == task_pb2.Status.PAUSED:
            yield
            return
        pause = tasks_pb2.PauseTaskRequest(container_id=container.id)
        frozen = True
        try:
            try:
                calls.call(calls.tasks.Pause, pause, doing=doing, deadline=deadline)
            except (FailedPreconditionError, NotFoundError, NotSentError):
                frozen = False
                raise
            yield
        finally:
            if frozen:
                cleanup.resume_task(calls, container)

    def _written(
        self, calls: Lease, lease: str, conflict: ConflictError, doing: str, deadline: Deadline
    ) -> Descriptor:
        """Find the archive where containerd stumbled after it had written it.

        containerd up to 1.7 fails where the container's spec, which it writes last, is content already: from another checkpoint
        of the same spec. By then criu has ended the process.
        """
        there = set(_DIGEST.findall(str(conflict)))
        request = leases_pb2.ListResourcesRequest(id=lease)
        resources = calls.call(calls.leases.ListResources, request, doing=doing, deadline=deadline).resources
        found = [each.id for each in resources if each.type == "content" and each.id not in there]
        if not there or len(found) != 1:
            raise conflict
        info = self._connection.call(
            self._connection.content.Info,
            content_pb2.InfoRequest(digest=found[0]),
            doing=doing,
            deadline=deadline,
        ).info
        return Descriptor(media_type=CRIU_TYPE, digest=info.digest, size=info.size)

    # ----------------------------------------------------------------------------------------------- into containerd

    @contextmanager
    def uploaded(
        self, calls: Lease, entries: list[archive.Entry], doing: str, deadline: Deadline
    ) -> Iterator[Descriptor]:
        """Have a checkpoint's archive in containerd for the length of a block."""
        with self._leased(calls, doing, deadline) as lease:
            yield self._upload(entries, lease, doing, deadline)

    def _upload(self, entries: list[archive.Entry], lease: str, doing: str, deadline: Deadline) -> Descriptor:
        digest = hashlib.sha256()
        size = 0
        failures: list[Exception] = []

        def requests() -> Iterator[content_pb2.WriteContentRequest]:
            nonlocal size
            try:
                for data in archive.pack(entries):
                    yield content_pb2.WriteContentRequest(
                        action=content_pb2.WriteAction.WRITE, ref=lease, offset=size, data=data
                    )
                    digest.update(data)
                    size += len(data)
            except Exception as error:  # noqa: BLE001 - raised below: gRPC would print it, and say nothing of it
                failures.append(error)
                return
            yield content_pb2.WriteContentRequest(
                action=content_pb2.WriteAction.COMMIT, ref=lease, offset=size, total=size
            )

        # The same archive may be there already, for another container's start: the lease then keeps it as well.
        with suppress(ConflictError):
            self._connection.gather(
                self._connection.content.Write, requests(), doing=doing, deadline=deadline, lease=lease
            )
        if failures:
            raise SystemFailureError(f"cannot {doing}: {failures[0]}") from failures[0]
        return Descriptor(media_type=CRIU_TYPE, digest=f"sha256:{digest.hexdigest()}", size=size)

    @contextmanager
    def _leased(self, calls: Lease, doing: str, deadline: Deadline) -> Iterator[str]:
        """Have a lease of containerd's for the length of a block; what it alone keeps is gone after it."""
        lease = f"libcontainerd-{uuid.uuid4().hex}"
        expires = (datetime.now(UTC) + _LEASE_LIFE).strftime("%Y-%m-%dT%H:%M:%SZ")
        request = leases_pb2.CreateRequest(id=lease, labels={"containerd.io/gc.expire": expires})
        try:
            calls.call(calls.leases.Create, request, doing=doing, deadline=deadline)
            yield lease
        finally:
            cleanup.remove_lease(calls, lease)


class _Blob:
    """A blob of content, read from its beginning to its end in ranges of a few megabytes."""

    def __init__(
        self, connection: Connection, descriptor: Descriptor, *, doing: str, deadline: Deadline
    ) -> None:
        self._connection = connection
        self._descriptor = descriptor
        self._doing = doing
        self._deadline = deadline
        self._offset = 0
        self._data = memoryview(b"")

    def read(self, count: int) -> bytes:
        """At most so many bytes; none at the end."""
        if not self._data and self._offset < self._descriptor.size:
            self._fetch()
        data, self._data = self._data[:count], self._data[count:]
        return bytes(data)

    def _fetch(self) -> None:
        wanted = min(_READ_BYTES, self._descriptor.size - self._offset)
        request = content_pb2.ReadContentRequest(
            digest=self._descriptor.digest, offset=self._offset, size=wanted
        )
        # Each range to its end: a stream that is not read to its end would have to be cancelled.
        pieces = self._connection.gather(
            self._connection.content.Read, request, doing=self._doing, deadline=self._deadline
        )
        data = b"".join(piece.data for piece in pieces)
        if len(data) != wanted:
            raise SystemFailureError(
                f"cannot {self._doing}: containerd sent {len(data)} bytes of {wanted} of its archive"
            )
        self._offset += wanted
        self._data = memoryview(data)


# --------------------------------------------------------------------------------------------------------- directories


def surveyed(directory: str, doing: str) -> list[archive.Entry]:
    """What is in the directory of a checkpoint.

    Raises:
        InvalidParameterError: there is no such directory, or it holds no checkpoint.
        PermissionDeniedError: this user may not read it.
        SystemFailureError: it cannot be read otherwise.
    """
    with _translated(doing):
        try:
            entries = archive.survey(directory)
        except (archive.ArchiveError, FileNotFoundError, NotADirectoryError) as error:
            raise InvalidParameterError(f"cannot {doing}: checkpoint_dir: {error}") from error
    if not any(entry.name == _INVENTORY and entry.size is not None for entry in entries):
        raise InvalidParameterError(
            f"cannot {doing}: checkpoint_dir: {directory} holds no checkpoint (no {_INVENTORY})"
        )
    return entries


@contextmanager
def _emptied(directory: str, doing: str) -> Iterator[None]:
    """Have an empty directory, ours or new, and leave it as it was if the block fails.

    Raises:
        InvalidParameterError: it holds something already, is no directory, or its parent is not there.
    """
    with _translated(doing):
        made = _make_empty(directory, doing)
    try:
        with _translated(doing):
            yield
    except BaseException:
        with suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)
        if made:
            with suppress(OSError):
                os.rmdir(directory)
        raise


def _make_empty(directory: str, doing: str) -> bool:
    """Make the directory; False where it was there, and empty."""
    try:
        os.mkdir(directory, 0o700)  # it will hold a process's memory
    except FileExistsError:
        if not os.path.isdir(directory):
            raise InvalidParameterError(
                f"cannot {doing}: checkpoint_dir: {directory} is no directory"
            ) from None
        if os.listdir(directory):
            raise InvalidParameterError(f"cannot {doing}: checkpoint_dir: {directory} is not empty") from None
        return False
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise InvalidParameterError(f"cannot {doing}: checkpoint_dir: {error}") from error
    return True


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    try:
        yield
    except LibcontainerdError:
        raise
    except PermissionError as error:
        raise PermissionDeniedError(f"cannot {doing}: {error}") from error
    except OSError as error:
        raise SystemFailureError(f"cannot {doing}: {error}") from error


# ------------------------------------------------------------------------------------------------------------ criu's log


def with_criu_log(error: LibcontainerdError) -> LibcontainerdError:
    """The same error, with the last complaints of criu's log where the message names one that can be read."""
    named = _LOG.search(str(error))
    complaints = _complaints(named.group(1)) if named is not None else []
    if not complaints:
        return error
    return type(error)(f"{error}; criu says: {'; '.join(complaints)}")


def _complaints(path: str) -> list[str]:
    try:
        with open(path, "rb") as log:
            if not stat.S_ISREG(os.fstat(log.fileno()).st_mode):
                return []
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - _LOG_TAIL_BYTES))
            lines = log.read(_LOG_TAIL_BYTES).decode(errors="replace").splitlines()
    except OSError:  # on another machine, or not for this user
        return []
    lines = [line.strip() for line in lines if line.strip()]
    return ([line for line in lines if "Error" in line] or lines)[-_LOG_LINES:]
