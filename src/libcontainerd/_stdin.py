"""The end of a process's input: our writer closed when the shim's reader has come, and the shim told to let go of its own."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog

from libcontainerd._wire.connection import Deadline
from libcontainerd._wire.pb.services.tasks_pb2 import CloseIORequest
from libcontainerd._wire.shelter import CLEAN_UP_SECONDS
from libcontainerd.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    LibcontainerdError,
    NotFoundError,
    UnavailableError,
)

if TYPE_CHECKING:
    from libcontainerd._events.serial import SerialQueue
    from libcontainerd._records import Container, Process
    from libcontainerd._wire.connection import Connection
    from libcontainerd.cio.fifo import InputStream

_RETRY_SECONDS: Final = 0.5

_log = structlog.get_logger("libcontainerd")


class StdinCloser:
    """Ends the input of a client's processes. Thread-safe."""

    def __init__(self, connection: Connection, background: SerialQueue, closing: threading.Event) -> None:
        self._connection = connection
        self._background = background
        self._closing = closing

    def owner_closed(self, container: Container, process: Process, stream: InputStream) -> None:
        """The owner has closed the stream and the process is there: end its input, in the background."""
        if self._connection.inherited:
            return  # a forked child: the input goes on, and is its parent's to end
        key = container.id, process.id, "stdin"
        self._background.append(key, partial(self._end, container, process, stream))

    def close(self, container: Container, process: Process, deadline: Deadline) -> None:
        """End a process's input, and return when that is done; a process that has ended is no error.

        Raises:
            LibcontainerdError: it could not be done by the deadline.
        """
        direct = None if process.attached is None else process.attached.direct
        if direct is not None and direct.stdin is not None:
            direct.stdin.close()
            if not direct.stdin.ended.wait(min(deadline.remaining(), threading.TIMEOUT_MAX)):
                raise DeadlineExceededError(f"cannot {_doing(container, process)}: it is still under way")
            if direct.stdin.told:
                return
        self._close_io(container, process, deadline)

    def ended_before(self, container: Container, process: Process) -> None:
        """An earlier client has closed the stream, but perhaps not come to tell the shim: do that, in the background."""
        key = container.id, process.id, "stdin"
        self._background.append(key, partial(self._let_go, container, process))

    def _end(self, container: Container, process: Process, stream: InputStream) -> None:
        try:
            stream.end_input()
            stream.told = self._let_go(container, process)
        finally:
            stream.ended.set()

    def _let_go(self, container: Container, process: Process) -> bool:
        """Have the shim let go of a process's stdin, and say whether it does."""
        deadline = Deadline(CLEAN_UP_SECONDS)
        try:
            while True:
                try:
                    self._close_io(container, process, deadline)
                except (UnavailableError, DeadlineExceededError):
                    # The shim goes on while containerd is away, and the process waits for its end of input.
                    if deadline.remaining() > 0 and not self._closing.wait(_RETRY_SECONDS):
                        continue
                    raise
                return True
        except LibcontainerdError as error:
            if not self._closing.is_set():
                _log.warning(
                    "stdin_not_closed",
                    namespace=self._connection.namespace,
                    container=container.id,
                    exec=process.exec_id,
                    error=str(error),
                )
            return False

    def _close_io(self, container: Container, process: Process, deadline: Deadline) -> None:
        """Have the shim let go of the process's stdin; a process that has ended needs it no more.

        Its name may be another's by then, whose stdin is not to be closed.
        """
        if process.exit is not None:
            return
        request = CloseIORequest(container_id=container.id, exec_id=process.exec_id, stdin=True)
        doing = _doing(container, process)
        try:
            self._connection.call(self._connection.tasks.CloseIO, request, doing=doing, deadline=deadline)
        except (NotFoundError, FailedPreconditionError):
            pass
        except LibcontainerdError:
            if process.exit is None:
                raise


def _doing(container: Container, process: Process) -> str:
    return f"close the stdin of {process.id!r} in container {container.id!r}"
