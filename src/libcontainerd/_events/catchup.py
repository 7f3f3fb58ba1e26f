"""Records against containerd: what has become of a process whose exit event is missing."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from libcontainerd._events.decode import utc
from libcontainerd._wire import typeurl
from libcontainerd._wire.pb.runc import linux_pb2, options_pb2
from libcontainerd._wire.pb.services.tasks_pb2 import GetRequest, ListTasksRequest
from libcontainerd._wire.pb.types import task_pb2
from libcontainerd.errors import NotFoundError, SystemFailureError
from libcontainerd.types import INIT_PROCESS_NAME, ExitStatus, Status

if TYPE_CHECKING:
    from libcontainerd._wire.connection import Connection, Deadline
    from libcontainerd._wire.pb.wellknown_pb2 import Timestamp

UNKNOWN_EXIT_CODE: Final = 255

_STATUS: Final = {
    task_pb2.Status.CREATED: Status.CREATED,
    task_pb2.Status.RUNNING: Status.RUNNING,
    task_pb2.Status.STOPPED: Status.STOPPED,
    task_pb2.Status.PAUSED: Status.PAUSED,
    task_pb2.Status.PAUSING: Status.PAUSING,
}


def status_of(process: task_pb2.Process) -> Status:
    """Say containerd's state of a process in our word."""
    return _STATUS.get(process.status, Status.UNKNOWN)


def exit_status(code: int, exited_at: Timestamp) -> ExitStatus:
    """An exit as containerd tells it; a time that it does not tell is now."""
    return ExitStatus(code, utc(exited_at) or datetime.now(UTC))


def unknown_exit(reason: Exception | None) -> ExitStatus:
    """An exit of which nothing is known but that it was."""
    return ExitStatus(UNKNOWN_EXIT_CODE, datetime.now(UTC), reason)


def ask(
    connection: Connection, container_id: str, exec_id: str, *, doing: str, deadline: Deadline, pid: int = 0
) -> tuple[ExitStatus, int] | None:
    """Ask containerd how a process has ended.

    Args:
        connection: Where to ask.
        container_id: The process's container.
        exec_id: The exec, or empty for init.
        doing: For the error's message.
        deadline: When to give up.
        pid: The process's, where it is known: one of another pid that runs under its name is another.

    Returns:
        None while it has not ended; otherwise how, and the pid if it is known. The code is 255, with the reason, where
        containerd no longer knows the process.

    Raises:
        LibcontainerdError: there was no answer. That says nothing about the process.
    """
    try:
        process = connection.call(
            connection.tasks.Get,
            GetRequest(container_id=container_id, exec_id=exec_id),
            doing=doing,
            deadline=deadline,
        ).process
    except NotFoundError as error:
        return unknown_exit(error), 0
    if process.status == task_pb2.Status.STOPPED:
        return exit_status(process.exit_status, process.exited_at), process.pid
    if is_another(process, pid):
        return unknown_exit(NotFoundError(f"cannot {doing}: another process has its name")), 0
    return None


def ask_for_all(connection: Connection, deadline: Deadline) -> dict[str, task_pb2.Process]:
    """Ask containerd for the init of every task of the namespace, by container.

    What is not among them may be there all the same: containerd leaves out a task whose shim does not answer.

    Raises:
        LibcontainerdError: there was no answer. That says nothing about any process.
    """
    doing = f"list the tasks of namespace {connection.namespace!r}"
    answer = connection.call(connection.tasks.List, ListTasksRequest(), doing=doing, deadline=deadline)
    return {task.id: task for task in answer.tasks}


def is_another(process: task_pb2.Process, pid: int) -> bool:
    """Whether what runs under a process's name has another pid. One that has ended need not have its pid any more."""
    alive = process.status in (
        task_pb2.Status.CREATED,
        task_pb2.Status.RUNNING,
        task_pb2.Status.PAUSED,
        task_pb2.Status.PAUSING,
    )
    return alive and bool(pid and process.pid) and pid != process.pid


def process_name(info: task_pb2.ProcessInfo, init: int) -> str:
    """Say which process of ours a pid is: ``"init"``, an exec's id, or nothing.

    Raises:
        SystemFailureError: what containerd says of it cannot be read.
    """
    if info.pid == init:
        return INIT_PROCESS_NAME
    if not info.HasField("info"):
        return ""
    try:
        if typeurl.is_a(info.info, options_pb2.ProcessDetails):
            return typeurl.unpack(info.info, options_pb2.ProcessDetails).exec_id
        if typeurl.is_a(info.info, linux_pb2.ProcessDetails):  # the old v1 runtime's
            return typeurl.unpack(info.info, linux_pb2.ProcessDetails).exec_id
    except typeurl.DecodeError as error:
        raise SystemFailureError(
            f"cannot read what containerd says of process {info.pid}: {error}"
        ) from error
    return ""
