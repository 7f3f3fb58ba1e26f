"""Taking back what a failed or cancelled call has left in containerd.

Every clean-up has a deadline of its own, never the caller's, which may be what has just passed. It is done also when the
client was closed meanwhile, over a connection of its own.
"""

from __future__ import annotations

import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import structlog

from libcontainerd._wire.connection import Deadline
from libcontainerd._wire.pb.services import containers_pb2, tasks_pb2
from libcontainerd.errors import (
    CallCancelledError,
    FailedPreconditionError,
    LibcontainerdError,
    NotFoundError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from libcontainerd._records import Container, Process
    from libcontainerd._wire.connection import Connection

CLEAN_UP_SECONDS: Final = 45.0
_KILL_AGAIN_SECONDS: Final = 0.05

_log = structlog.get_logger("libcontainerd")


def remove_container(connection: Connection, sent: containers_pb2.Container) -> None:
    """Remove a container whose creation broke off, if it is there and really the one that was sent."""
    doing = f"clean up after the creation of container {sent.id!r}"

    def remove(over: Connection) -> None:
        deadline = Deadline(CLEAN_UP_SECONDS)
        request = containers_pb2.GetContainerRequest(id=sent.id)
        found = over.call(
            over.containers.Get, request, doing=doing, deadline=deadline, wait_for_ready=True
        ).container
        if (found.labels, found.spec) == (sent.labels, sent.spec):
            deletion = containers_pb2.DeleteContainerRequest(id=sent.id)
            over.call(over.containers.Delete, deletion, doing=doing, deadline=deadline)

    _clean_up(connection, remove, container=sent.id)


def remove_process(connection: Connection, container: Container, process: Process) -> None:
    """Remove a process from containerd, whatever its state: never made, made, running or ended."""
    doing = f"clean up after {process.id!r} in container {container.id!r}"

    def remove(over: Connection) -> None:
        deadline = Deadline(CLEAN_UP_SECONDS)
        kill = tasks_pb2.KillRequest(
            container_id=container.id, exec_id=process.exec_id, signal=signal.SIGKILL
        )
        while True:
            try:
                delete_process(over, container, process, doing=doing, deadline=deadline)
            except FailedPreconditionError:  # it runs
                with suppress(NotFoundError):
                    over.call(over.tasks.Kill, kill, doing=doing, deadline=deadline)
                container.wait_exit(process, _KILL_AGAIN_SECONDS)
            else:
                return

    _clean_up(connection, remove, container=container.id, exec=process.exec_id)


def delete_process(
    connection: Connection, container: Container, process: Process, *, doing: str, deadline: Deadline
) -> None:
    """Have containerd delete an exec, or with init the task.

    Raises:
        LibcontainerdError: it could not; `FailedPreconditionError` where the process runs.
    """
    if process.exec_id:
        exec_request = tasks_pb2.DeleteProcessRequest(container_id=container.id, exec_id=process.exec_id)
        connection.call(
            connection.tasks.DeleteProcess, exec_request, doing=doing, deadline=deadline, wait_for_ready=True
        )
    else:
        task_request = tasks_pb2.DeleteTaskRequest(container_id=container.id)
        connection.call(
            connection.tasks.Delete, task_request, doing=doing, deadline=deadline, wait_for_ready=True
        )


def _clean_up(connection: Connection, remove: Callable[[Connection], None], **what: str) -> None:
    try:
        try:
            remove(connection)
        except CallCancelledError:
            fresh = connection.reopen()
            try:
                remove(fresh)
            finally:
                fresh.close()
    except NotFoundError:
        pass
    except LibcontainerdError as error:
        _log.error("clean_up_failed", namespace=connection.namespace, error=str(error), **what)
