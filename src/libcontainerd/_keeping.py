"""Records that keep containerd from forgetting how an init has ended.

From 1.7 on, a containerd that starts puts away each shim whose init has ended, and with it the exit code: of an init that ended
while containerd was down nothing is left to ask. It spares a shim for whose id its sandbox store has a record. So a container that
asks for it has one, for as long as it has a task.

Nobody promises this: it follows from the condition in containerd's clean-up, seen to work on 1.7.24 and 2.1.9. 1.6 has no such
store, and needs none.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from libcontainerd._runtime import KEEP_LABEL
from libcontainerd._wire.pb.services import containers_pb2, sandbox_pb2
from libcontainerd._wire.pb.types.sandbox_pb2 import Sandbox
from libcontainerd.errors import (
    ConflictError,
    LibcontainerdError,
    NotFoundError,
    NotImplementedByServerError,
)

if TYPE_CHECKING:
    from libcontainerd._records import Container
    from libcontainerd._wire.connection import Deadline
    from libcontainerd._wire.shelter import Lease, Shelter

_log = structlog.get_logger("libcontainerd")


def keep(calls: Lease, container: Container, *, doing: str, deadline: Deadline) -> None:
    """Store a container's record; after its task was made, for until then it would hide what is left of one that was not.

    Raises:
        LibcontainerdError: that failed. A containerd without such a store is no error.
    """
    container.kept = True
    record = Sandbox(
        sandbox_id=container.id,
        # Without this the whole containerd panics (1.7.24 and 2.1.9).
        runtime=Sandbox.Runtime(name=container.facts.runtime),
        labels={KEEP_LABEL: "1"},
    )
    request = sandbox_pb2.StoreCreateRequest(sandbox=record)
    with suppress(ConflictError, NotImplementedByServerError):
        calls.call(calls.sandboxes.Create, request, doing=doing, deadline=deadline)


def let_go(calls: Lease, container: Container, *, doing: str, deadline: Deadline) -> None:
    """Delete a container's record, if it may have one; its task is gone.

    Raises:
        LibcontainerdError: that failed, and can be repeated.
    """
    if container.kept:
        _delete(calls, container.id, doing, deadline)
        container.kept = False


def _delete(calls: Lease, container_id: str, doing: str, deadline: Deadline) -> None:
    request = sandbox_pb2.StoreDeleteRequest(sandbox_id=container_id)
    with suppress(NotFoundError, NotImplementedByServerError):
        calls.call(calls.sandboxes.Delete, request, doing=doing, deadline=deadline)


def sweep(shelter: Shelter, deadline: Deadline) -> None:
    """Delete the records whose container was removed by another hand. What cannot be done is logged, and left for the next time."""
    doing = "sweep out the records of ended containers"
    try:
        with shelter.enter(doing) as calls:
            request = sandbox_pb2.StoreListRequest(filters=[f'labels."{KEEP_LABEL}"'])
            found = calls.call(calls.sandboxes.List, request, doing=doing, deadline=deadline).list
            for record in found:
                look = containers_pb2.GetContainerRequest(id=record.sandbox_id)
                try:
                    calls.call(calls.containers.Get, look, doing=doing, deadline=deadline)
                except NotFoundError:
                    _delete(calls, record.sandbox_id, doing, deadline)
    except NotImplementedByServerError:
        pass
    except LibcontainerdError as error:
        _log.warning("records_not_swept", namespace=shelter.metadata[0][1], error=str(error))
