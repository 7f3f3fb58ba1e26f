"""Taking back what a failed or cancelled call has left in containerd.

Every clean-up has a deadline of its own, and is done also when the client was closed meanwhile.
"""

from __future__ import annotations

import re
import signal
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog

from libcontainerd import _keeping as keeping
from libcontainerd._records import Container, Process
from libcontainerd._wire import typeurl
from libcontainerd._wire.connection import Deadline
from libcontainerd._wire.pb.services import containers_pb2, leases_pb2, tasks_pb2
from libcontainerd._wire.shelter import CLEAN_UP_SECONDS
from libcontainerd.errors import (
    ConflictError,
    DeadlineExceededError,
    FailedPreconditionError,
    LibcontainerdError,
    NotFoundError,
    SystemFailureError,
    UnavailableError,
)
from libcontainerd.types import INIT_PROCESS_NAME

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator

    from libcontainerd._wire.pb.types import task_pb2
    from libcontainerd._wire.shelter import Lease

STAND_IN_LABEL: Final = "libcontainerd/stand-in"
"""Marks a container that `end_orphan` has made, and will remove."""

STALE_SECONDS: Final = 120.0
"""The age from which on a stand-in has nobody any more who would remove it: more than twice what its maker may take."""

_REMAINS_SECONDS: Final = 10.0
_REMAINS: Final = re.compile(
    r"failed to start shim.*(?:file exists|connection refused)|mkdir \S*/io\.containerd\.runtime\.v2\.task/\S+: file exists"
    r"|container with given ID already exists|failed to create shim task: ttrpc: closed"
)
"""In the words of 1.6 and 1.7, of 2.1, and of runc, whose remains containerd removes when it has refused; and of who was given
a shim that was about to end, or had ended and left its socket."""

_EMPTY_SECONDS: Final = 3.0
_EMPTY_SHIM: Final = re.compile(r"\bcontainer not created\b")
_STAND_IN_SECONDS: Final = 30.0
_STAND_IN_PAUSE_SECONDS: Final = 0.1
_DEATH_SECONDS: Final = 2.0
_FIRST_PAUSE_SECONDS: Final = 0.01
_MOST_PAUSE_SECONDS: Final = 2.0

_ANY_RUNTIME: Final = "io.containerd.runc.v2"
"""containerd wants one named, and a spec, and uses neither: whatever runs has its shim."""

_log = structlog.get_logger("libcontainerd")


def make_task(
    calls: Lease,
    request: tasks_pb2.CreateTaskRequest,
    *,
    cut: threading.Event,
    doing: str,
    deadline: Deadline,
) -> tasks_pb2.CreateTaskResponse:
    """Have containerd make a task; again, for ten seconds, where the remains of an earlier one are still in its way.

    Those are the directory of a shim that containerd has not yet put away; the shim of the task before, which has not quite
    ended; and a task whose shim was killed: for up to two seconds there is none of that name to be seen, and none to be made
    (seen on 1.6). A shim that has no task for three seconds is the rest of a start that was cut off, and is shut down.

    Raises:
        LibcontainerdError: it could not be made; at once when the client is closed.
    """
    patience, begun = deadline.at_most(_REMAINS_SECONDS), time.monotonic()
    for pause in _pauses():
        try:
            return calls.call(calls.tasks.Create, request, doing=doing, deadline=deadline)
        except (SystemFailureError, UnavailableError, ConflictError) as error:
            late = patience.remaining() < pause
            since = time.monotonic() - begun
            remains = not late and _in_the_way(
                calls, request, error, since=since, doing=doing, deadline=deadline
            )
            if not remains or cut.wait(pause):
                raise
    raise AssertionError  # the pauses do not end


def _in_the_way(
    calls: Lease,
    request: tasks_pb2.CreateTaskRequest,
    error: SystemFailureError | UnavailableError | ConflictError,
    *,
    since: float,
    doing: str,
    deadline: Deadline,
) -> bool:
    """Whether it is remains that a start met, and perhaps not for the first time; what can be done about them is done."""
    if not isinstance(error, ConflictError):
        return _REMAINS.search(str(error)) is not None
    look = tasks_pb2.GetRequest(container_id=request.container_id)
    try:
        calls.call(calls.tasks.Get, look, doing=doing, deadline=deadline)
    except NotFoundError as gone:
        if is_empty_shim(gone) and since > _EMPTY_SECONDS:
            deletion = tasks_pb2.DeleteTaskRequest(container_id=request.container_id)
            with suppress(LibcontainerdError):
                calls.call(calls.tasks.Delete, deletion, doing=doing, deadline=deadline)
        return True
    except LibcontainerdError:
        return False
    return False


def make_container(
    calls: Lease,
    request: containers_pb2.CreateContainerRequest,
    *,
    cut: threading.Event,
    doing: str,
    deadline: Deadline,
) -> None:
    """Have containerd make a container; again, for half a minute, while a stand-in has its id.

    Raises:
        LibcontainerdError: it could not be made.
    """
    patience = deadline.at_most(_STAND_IN_SECONDS)
    while True:
        try:
            calls.call(calls.containers.Create, request, doing=doing, deadline=deadline)
        except ConflictError:
            stand_in = _stand_in(calls, request.container.id, doing, deadline)
            if stand_in is None or not patience.remaining() or cut.wait(_STAND_IN_PAUSE_SECONDS):
                raise
            if is_stale(stand_in):
                remove_container(calls, stand_in)
        else:
            return


def _stand_in(
    calls: Lease, container_id: str, doing: str, deadline: Deadline
) -> containers_pb2.Container | None:
    """The stand-in that has an id; an empty one where nothing has it any more, None where a real container has."""
    look = containers_pb2.GetContainerRequest(id=container_id)
    try:
        found = calls.call(calls.containers.Get, look, doing=doing, deadline=deadline).container
    except NotFoundError:
        return containers_pb2.Container(id=container_id)
    except LibcontainerdError:
        return None
    return found if is_stand_in(found) else None


def is_empty_shim(error: NotFoundError) -> bool:
    """Whether there is no task because a shim has none, and not for want of a shim.

    A start that was cut off together with its containerd leaves such a shim. To delete its task fails, and shuts it down.
    """
    return _EMPTY_SHIM.search(str(error)) is not None


def is_stand_in(container: containers_pb2.Container) -> bool:
    """Whether a container was made only to reach an orphan."""
    return STAND_IN_LABEL in container.labels


def is_stale(stand_in: containers_pb2.Container) -> bool:
    """Whether whoever made a stand-in has died."""
    if not stand_in.HasField("created_at"):
        return False
    made = stand_in.created_at.seconds
    return datetime.now(UTC).timestamp() - made > STALE_SECONDS


def end_orphan(
    calls: Lease,
    container_id: str,
    is_ours: Callable[[task_pb2.Process | None], bool],
    *,
    doing: str,
    then: Callable[[], None] = lambda: None,
) -> bool:
    """End what containerd runs under an id of which it has no container, so that no call reaches it.

    All calls about a task ask for its container first. So one is made, and with it the task is killed and deleted, or a shim
    without one is shut down, which is containerd's own doing. The stand-in keeps the id from everybody else meanwhile: who
    would create a container waits (`make_container`), and where somebody was faster nothing is touched.

    Args:
        calls: Where. It is cleaning up from here on, and heeds no `close`.
        container_id: The id.
        is_ours: Told what containerd says of the task, or None where there is none, says whether to end it.
        doing: For errors' messages.
        then: Called when that is done, while nobody else can have the id.

    Returns:
        False where the id is somebody's, or what runs is not ours.

    Raises:
        LibcontainerdError: it could not be done.
    """
    deadline = Deadline(CLEAN_UP_SECONDS)
    calls.settle(deadline)
    stand_in = containers_pb2.Container(
        id=container_id,
        labels={STAND_IN_LABEL: uuid.uuid4().hex},
        runtime=containers_pb2.Container.Runtime(name=_ANY_RUNTIME),
        spec=typeurl.pack_json(typeurl.SPEC_URL, b"{}"),
    )
    creation = containers_pb2.CreateContainerRequest(container=stand_in)
    look = tasks_pb2.GetRequest(container_id=container_id)
    task = None
    try:
        calls.call(calls.containers.Create, creation, doing=doing, deadline=deadline)
        with suppress(NotFoundError):
            task = calls.call(calls.tasks.Get, look, doing=doing, deadline=deadline).process
        if not is_ours(task):
            return False
        init = Process(INIT_PROCESS_NAME)
        end_process(calls, Container(container_id), init, doing=doing, deadline=deadline)
        then()
    except ConflictError:
        return False
    finally:
        remove_container(calls, stand_in)
    return True


def remove_container(calls: Lease, sent: containers_pb2.Container) -> None:
    """Remove a container whose creation broke off, if it is there and really the one that was sent."""
    doing = f"clean up after the creation of container {sent.id!r}"
    deadline = Deadline(CLEAN_UP_SECONDS)
    calls.settle(deadline)
    look = containers_pb2.GetContainerRequest(id=sent.id)
    deletion = containers_pb2.DeleteContainerRequest(id=sent.id)

    def remove() -> None:
        with suppress(NotFoundError):
            found = calls.call(calls.containers.Get, look, doing=doing, deadline=deadline).container
            if (found.labels, found.spec) == (sent.labels, sent.spec):
                calls.call(calls.containers.Delete, deletion, doing=doing, deadline=deadline)

    _insist(calls, remove, deadline, container=sent.id)


def remove_process(calls: Lease, container: Container, process: Process) -> None:
    """Remove a process from containerd, whatever its state; what cannot be done is logged."""
    doing = f"clean up after {process.id!r} in container {container.id!r}"
    deadline = Deadline(CLEAN_UP_SECONDS)
    calls.settle(deadline)
    remove = partial(end_process, calls, container, process, doing=doing, deadline=deadline)
    _insist(calls, remove, deadline, container=container.id, exec=process.exec_id)


def remove_lease(calls: Lease, lease: str) -> None:
    """Give up a lease of containerd's, and have collected what it alone has kept."""
    doing = f"clean up lease {lease!r}"
    deadline = Deadline(CLEAN_UP_SECONDS)
    calls.settle(deadline)
    request = leases_pb2.DeleteRequest(id=lease, sync=True)

    def remove() -> None:
        with suppress(NotFoundError):
            calls.call(calls.leases.Delete, request, doing=doing, deadline=deadline)

    _insist(calls, remove, deadline, lease=lease)


def resume_task(calls: Lease, container: Container) -> None:
    """Thaw a task that was frozen for a while, unless it has ended meanwhile."""
    doing = f"resume container {container.id!r}"
    deadline = Deadline(CLEAN_UP_SECONDS)
    calls.settle(deadline)
    request = tasks_pb2.ResumeTaskRequest(container_id=container.id)

    def resume() -> None:
        with suppress(NotFoundError, FailedPreconditionError):
            calls.call(calls.tasks.Resume, request, doing=doing, deadline=deadline)

    _insist(calls, resume, deadline, container=container.id)


def _insist(calls: Lease, remove: Callable[[], None], deadline: Deadline, **what: str) -> None:
    """Remove something; again where containerd went away in the midst of it, for it will be back."""
    for pause in _pauses():
        try:
            remove()
        except LibcontainerdError as error:
            if isinstance(error, UnavailableError) and deadline.remaining() > pause:
                time.sleep(pause)
                continue
            _log.error("clean_up_failed", namespace=calls.namespace, error=str(error), **what)
        return


def _pauses() -> Iterator[float]:
    pause = _FIRST_PAUSE_SECONDS
    while True:
        yield pause
        pause = min(pause * 2, _MOST_PAUSE_SECONDS)


def end_process(
    calls: Lease, container: Container, process: Process, *, doing: str, deadline: Deadline
) -> None:
    """Kill and delete a process, whatever its state: never made, made, running, ended or gone.

    Raises:
        LibcontainerdError: it could not be done by the deadline.
    """
    with suppress(NotFoundError):
        # A task that was made and not started can be deleted, but its shim then waits for output that never comes.
        if not process.exec_id:
            _kill(calls, container, process, doing=doing, deadline=deadline)
        for pause in _pauses():
            try:
                delete_process(calls, container, process, doing=doing, deadline=deadline)
            except FailedPreconditionError:  # it runs
                _kill(calls, container, process, doing=doing, deadline=deadline)
                time.sleep(min(pause, max(0.0, deadline.remaining())))
            else:
                return


def _kill(calls: Lease, container: Container, process: Process, *, doing: str, deadline: Deadline) -> None:
    kill = tasks_pb2.KillRequest(container_id=container.id, exec_id=process.exec_id, signal=signal.SIGKILL)
    wait = tasks_pb2.WaitRequest(container_id=container.id, exec_id=process.exec_id)
    with suppress(NotFoundError, FailedPreconditionError):
        calls.call(calls.tasks.Kill, kill, doing=doing, deadline=deadline)
        with suppress(DeadlineExceededError):
            calls.call(calls.tasks.Wait, wait, doing=doing, deadline=deadline.at_most(_DEATH_SECONDS))


def delete_ended_execs(
    calls: Lease, container: Container, *, doing: str, deadline: Deadline, patience: float
) -> bool:
    """Have containerd delete the execs that have ended, before their task: with it the shim ends, which may hold what they wrote.

    The shim moves output on threads of their own, which a busy machine can keep from it while it tells of the exit. It waits
    for them in the deletion of the process concerned, and of no other.

    Args:
        calls: For the deletions.
        container: Whose execs.
        doing: For the error's message.
        deadline: For the calls.
        patience: Seconds to wait for another thread that is at one.

    Returns:
        Whether there were any.

    Raises:
        LibcontainerdError: that failed. That one is deleted already is no error.
    """
    ended = container.ended_execs()
    for process in ended:
        # Nobody is at it where the backend is still busy with its exit; who comes after it sees that it is gone.
        if container.claim_removal(process, patience):
            try:
                with suppress(NotFoundError, FailedPreconditionError):
                    delete_process(calls, container, process, doing=doing, deadline=deadline)
            finally:
                container.release_removal(process)
    return bool(ended)


def delete_process(
    calls: Lease, container: Container, process: Process, *, doing: str, deadline: Deadline
) -> tasks_pb2.DeleteResponse:
    """Have containerd delete an exec, or with init the task, and say how it ended.

    Raises:
        LibcontainerdError: it could not; `FailedPreconditionError` where the process runs.
    """
    if process.exec_id:
        exec_request = tasks_pb2.DeleteProcessRequest(container_id=container.id, exec_id=process.exec_id)
        return calls.call(calls.tasks.DeleteProcess, exec_request, doing=doing, deadline=deadline)
    task_request = tasks_pb2.DeleteTaskRequest(container_id=container.id)
    try:
        answer = calls.call(calls.tasks.Delete, task_request, doing=doing, deadline=deadline)
    except NotFoundError:
        _let_go(calls, container, doing, deadline)
        raise
    _let_go(calls, container, doing, deadline)
    return answer


def _let_go(calls: Lease, container: Container, doing: str, deadline: Deadline) -> None:
    """Delete the record that goes with a task. If that fails it is done with the container: the task is gone, and that counts."""
    with suppress(LibcontainerdError):
        keeping.let_go(calls, container, doing=doing, deadline=deadline)
