"""The program that a ``binary://`` URI names: it gets a process's output, and the shim starts and ends it.

As the shim of containerd does: stdout on its descriptor 3, stderr on 4, and on 5 a pipe whose closing (or a byte on it) says that
it is ready; the URI's query is its command line; its environment is two variables, the process's id and its namespace.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import tempfile
import threading
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

from libcontainerd.cio.fifo import End, FifoSet

_END_SECONDS: Final = 12.0
"""How long it may take to end after SIGTERM."""
_FREE_DESCRIPTORS: Final = 10  # from here on: 3, 4 and 5 are the child's own


class Logger:
    """A logger that runs. Thread-safe.

    Args:
        uri: The program, and its arguments in the query.
        name: The process whose output it gets: the container's id, or the exec's.
        namespace: The containerd namespace.

    Attributes:
        out: Where stdout is written to.
        err: Where stderr is written to.

    Raises:
        OSError: the program cannot be started.
    """

    def __init__(self, uri: str, name: str, namespace: str) -> None:
        parts = urlsplit(uri)
        # Of equal names the first counts.
        arguments = dict(reversed(parse_qsl(parts.query, keep_blank_values=True)))
        words = [word for pair in reversed(arguments.items()) for word in pair]
        environment = {"CONTAINER_ID": name, "CONTAINER_NAMESPACE": namespace}
        path = unquote(parts.path)
        self._lock = threading.Lock()  # guards whether it is closed; innermost
        self._closed = False
        with tempfile.TemporaryDirectory(prefix="fc-log-") as directory:
            out, self.out = _pipe(directory, "out")
            err, self.err = _pipe(directory, "err")
            self._ready, ready = _pipe(directory, "ready")
        theirs = (out, err, ready)
        moved = [fcntl.fcntl(end.fileno(), fcntl.F_DUPFD_CLOEXEC, _FREE_DESCRIPTORS) for end in theirs]
        for fd in moved:
            os.set_blocking(fd, True)
        nowhere = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
        given = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(moved, 3)]
        try:
            self.pid = os.posix_spawn(
                path,
                [path, *words],
                environment,
                file_actions=[*nowhere, *given],
                setsigdef=[signal.SIGPIPE],  # Python ignores it, and children inherit that
            )
        except OSError:
            self._close_ends()
            raise
        finally:
            for fd in moved:
                os.close(fd)
            for end in theirs:
                end.close()

    def wait_ready(self) -> None:
        """Wait until it says that it is ready, or until `interrupt`."""
        with self._ready.use():
            self._ready.poll(select.POLLIN, None)

    def interrupt(self) -> None:
        """Have nobody wait for it any longer."""
        self._ready.interrupt()

    def close(self) -> None:
        """End its input and it: with SIGTERM, and when that does not help in time with SIGKILL. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self.out.close()
        self.err.close()
        pidfd = os.pidfd_open(self.pid)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            poller = select.poll()
            poller.register(pidfd, select.POLLIN)
            if not poller.poll(_END_SECONDS * 1000):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)
        os.waitpid(self.pid, 0)
        self._close_ends()

    def _close_ends(self) -> None:
        for end in (self.out, self.err, self._ready):
            end.close()


def _pipe(directory: str, name: str) -> tuple[End, End]:
    """A FIFO's two ends, for reading and for writing: with the directory gone, it is a pipe."""
    path = os.path.join(directory, name)
    FifoSet(stdin="", stdout=path, stderr="", terminal=True).make()
    return End(path, os.O_RDONLY), End(path, os.O_WRONLY)
