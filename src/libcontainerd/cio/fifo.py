"""FIFO sets and their ends: the only module that opens descriptors.

What Linux does here, and what this module builds on:

- A reader opened ``O_NONBLOCK`` before any writer reads ``b""``, and ``poll`` reports neither data nor hang-up until a
  first writer has come and gone. So ``b""`` is the end only together with a hang-up.
- A writer opened ``O_NONBLOCK`` without a reader fails with ``ENXIO``, and succeeds while somebody holds the FIFO
  ``O_RDWR``; what is written then waits for the reader that comes later.
- A writer's ``poll`` reports ``POLLERR`` while there is no reader.
- ``close`` does not wake a thread that is blocked on the descriptor, and gives the number away at once. So nobody
  blocks on a descriptor alone, and its number is given back only by the last of its users.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import select
import stat
import struct
import termios
import threading
import time
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from libcontainerd.errors import InvalidParameterError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Buffer

_FIFO_MODE: Final = 0o700
_PATH_MAX: Final = 4096
_OPEN_FLAGS: Final = os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW

_WIDE_BYTES: Final = 1 << 20

_READER_WAIT_SECONDS: Final = 10.0
"""How long the end of stdin waits for the shim's reader, which comes some milliseconds after Create or Start."""


@dataclass(frozen=True, slots=True)
class FifoSet:
    """The paths of one process's FIFOs, as containerd is told them; empty where there is none.

    containerd's shim wants stdout and stderr both or neither, and with a terminal it never opens stderr.
    """

    stdin: str
    stdout: str
    stderr: str
    terminal: bool

    @classmethod
    def within(cls, directory: str, process_id: str, *, with_stdin: bool, terminal: bool) -> FifoSet:
        """Name the FIFOs of a process in its container's bundle.

        Raises:
            InvalidParameterError: a path would be longer than the kernel takes.
        """

        def path(stream: str) -> str:
            full = os.path.join(directory, f"{process_id}-{stream}")
            if len(os.fsencode(full)) >= _PATH_MAX:
                raise InvalidParameterError(
                    f"the FIFO path {full[:80]}... has {len(full)} characters and the kernel takes {_PATH_MAX - 1}:"
                    " choose a shorter state_dir"
                )
            return full

        return cls(
            stdin=path("stdin") if with_stdin else "",
            stdout=path("stdout"),
            stderr="" if terminal else path("stderr"),
            terminal=terminal,
        )

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths that are there."""
        return tuple(path for path in (self.stdin, self.stdout, self.stderr) if path)

    def make(self, owner: tuple[int, int] | None = None) -> list[str]:
        """Make the FIFOs that are missing, and say which.

        Args:
            owner: uid and gid they shall belong to; None, and root's, leave them ours.
        """
        made: list[str] = []
        try:
            for path in self.paths:
                with suppress(FileExistsError):
                    os.mkfifo(path, _FIFO_MODE)
                    made.append(path)
                    os.chmod(path, _FIFO_MODE)  # whatever the umask says
                    if owner is not None and owner != (0, 0):
                        os.chown(path, *owner)
        except BaseException:
            unlink(made)
            raise
        return made

    def there(self) -> bool:
        """Whether every path is a FIFO that somebody has made."""
        return all(_is_fifo(path) for path in self.paths)

    def unlink(self) -> None:
        """Remove the FIFOs that are there."""
        unlink(self.paths)


def _is_fifo(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.lstat(path).st_mode)
    except OSError:
        return False


def make_mark(path: str) -> None:
    """Make an empty file that says by its name that a process without FIFOs is there.

    Raises:
        OSError: it cannot be made.
    """
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600))


def unlink(paths: Sequence[str]) -> None:
    """Remove the paths that are there."""
    for path in paths:
        with suppress(FileNotFoundError):
            os.unlink(path)


class End:
    """One open end of a FIFO that several threads may use while another closes it."""

    def __init__(self, path: str, flags: int) -> None:
        self.path = path
        self._lock = threading.Lock()  # guards the four below; innermost, nothing is called while it is held
        self._fd = self._wake = -1  # the latter an eventfd, made when somebody first blocks
        self._users = 0
        self._closed = False
        self._interrupted = False
        self._fd = _open_fifo(path, flags)

    def __del__(self) -> None:
        for fd in (self._fd, self._wake):  # nobody uses them: the last reference is gone
            if fd >= 0:
                os.close(fd)

    @property
    def closed(self) -> bool:
        """Whether `close` was called; the last of its users may still have the descriptor."""
        return self._closed

    def fileno(self) -> int:
        """The descriptor, for as long as nobody closes it."""
        if self._closed:
            raise ValueError(f"I/O operation on closed FIFO {self.path}")
        return self._fd

    def acquire(self) -> int:
        """Borrow the descriptor; it stays open until `release`."""
        with self._lock:
            if self._closed:
                raise ValueError(f"I/O operation on closed FIFO {self.path}")
            self._users += 1
            return self._fd

    def release(self) -> None:
        """Give the descriptor back; the last user of a closed end closes it."""
        with self._lock:
            self._users -= 1
            if not self._closed or self._users:
                return
            fds = self._fd, self._wake
            self._fd = self._wake = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    @contextmanager
    def use(self) -> Iterator[int]:
        """Borrow the descriptor for a block."""
        fd = self.acquire()
        try:
            yield fd
        finally:
            self.release()

    def poll(self, events: int, timeout: float | None = 0.0) -> int:
        """What the kernel says of this end; 0 when the time is up or `interrupt` or `close` cut it short.

        The caller has borrowed the descriptor. It must look at its own state before it blocks again: an interrupt
        stays in force.
        """
        poller = select.poll()
        poller.register(self._fd, events)
        if timeout != 0.0:
            poller.register(self._wake_descriptor(), select.POLLIN)
        for fd, mask in poller.poll(None if timeout is None else timeout * 1000):
            if fd == self._fd:
                return mask
        return 0

    def _wake_descriptor(self) -> int:
        if self._wake >= 0:
            return self._wake
        fresh = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        with self._lock:
            spare = fresh if self._wake >= 0 else -1
            if spare < 0:
                self._wake = fresh
            over = self._closed or self._interrupted
        if spare >= 0:
            os.close(spare)
        if over:
            os.eventfd_write(self._wake, 1)
        return self._wake

    def interrupt(self) -> None:
        """Wake every thread that is blocked in `poll`, now and from now on. Needs no descriptor: they may have run out."""
        with self._lock:
            self._interrupted = True
            if self._closed or self._wake < 0:
                return
            self._users += 1
        os.eventfd_write(self._wake, 1)
        self.release()

    def close(self) -> None:
        """Wake whoever is blocked, and close as soon as nobody uses the descriptor; idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._users += 1
            wake = self._wake
        if wake >= 0:
            os.eventfd_write(wake, 1)
        self.release()


def _open_fifo(path: str, flags: int) -> int:
    fd = os.open(path, flags | _OPEN_FLAGS)
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileExistsError(errno.EEXIST, "is there and is not a FIFO", path)
    return fd


class OutputStream(io.RawIOBase):
    """What a process writes: our read end of its stdout or stderr.

    A raw, binary, readable stream. `read` and its kin block until there is something, or the end (``b""``). The
    descriptor behind `fileno` is non-blocking, for `selectors`, asyncio's reading side and `os.splice`; whoever reads
    from it directly must take ``b""`` for the end only together with a hang-up. After the library has closed the
    stream, reads return ``b""``; after its owner has, they raise ValueError.

    Safe to close while another thread reads.

    Attributes:
        taken: Bytes that have been taken out so far.
        in_hand: Bytes that a copier has taken out and not yet delivered.
        cancelled: The library has given the stream up.
        on_close: Called when somebody closes the stream, just before: for a copier that waits for something else.
    """

    def __init__(self, end: End) -> None:
        super().__init__()
        self._end = end
        self._adopted = False
        self._exposed = False
        self._end_seen = False
        self.taken = 0
        self.in_hand = 0
        self.cancelled = False
        self.on_close: Callable[[], None] | None = None
        self._wide: bool | None = None

    @property
    def path(self) -> str:
        """The FIFO's path."""
        return self._end.path

    def readable(self) -> bool:
        """Always true."""
        return True

    def fileno(self) -> int:
        """The non-blocking descriptor.

        Raises:
            ValueError: the stream is closed.
        """
        self._exposed = True
        return self._end.fileno()

    def use(self) -> AbstractContextManager[int]:
        """Borrow the descriptor: it is not closed, and its number not given away, before the block ends.

        Raises:
            ValueError: the stream is closed.
        """
        return self._end.use()

    def readinto(self, buffer: Buffer, /) -> int:
        """Read what is there, waiting until something is; 0 is the end.

        Raises:
            ValueError: the owner has closed the stream.
        """
        view = memoryview(buffer).cast("B")
        while not self.cancelled:
            try:
                fd = self._end.acquire()
            except ValueError:
                break
            try:
                count = self._read_once(fd, view)
                if count is None:
                    self._end.poll(select.POLLIN, None)
                    continue
            finally:
                self._end.release()
            self.taken += count
            self._end_seen = self._end_seen or (not count and view.nbytes > 0)
            return count
        if self.closed:
            raise ValueError(f"I/O operation on closed FIFO {self.path}")
        return 0

    def _read_once(self, fd: int, view: memoryview) -> int | None:
        """Bytes read, 0 at the end, None when there is nothing yet."""
        if not view:
            return 0
        try:
            if count := os.readv(fd, [view]):
                return count
        except BlockingIOError:
            return None
        return 0 if self.at_end() else None

    def at_end(self) -> bool:
        """Whether a ``b""`` that was just read was the end. The caller has borrowed the descriptor."""
        mask = self._end.poll(select.POLLIN)
        if mask & select.POLLIN:
            return False
        return bool(mask & select.POLLHUP)

    def widen(self) -> bool:
        """Have the FIFO hold a mebibyte instead of 64 KiB, and say whether it does; done at the first call.

        For root alone: a user's pipes may hold 64 MiB in all, and past that each new one holds a page.
        """
        if self._wide is None:
            self._wide = False
            with suppress(
                OSError, ValueError
            ):  # EPERM within a container, ValueError when it was just closed
                if os.geteuid() == 0:
                    with self._end.use() as fd:
                        self._wide = fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _WIDE_BYTES) >= _WIDE_BYTES
        return self._wide

    def note_taken(self, count: int) -> None:
        """Count bytes that were read from the descriptor rather than through this object."""
        self.taken += count

    def adopt(self) -> None:
        """Say that a copier has this stream: it counts as drained when the copier has closed it, not before."""
        self._adopted = True

    def close(self) -> None:
        """Close our end; idempotent. A blocked read in another thread raises ValueError."""
        if not self.closed:
            super().close()
            self._tell_copier()
            self._end.close()

    def __del__(self) -> None:
        # The collector may strike anywhere, also while the pump's lock is held that a copier's callback takes.
        self.on_close = None
        super().__del__()

    def _tell_copier(self) -> None:
        callback, self.on_close = self.on_close, None
        if callback is not None:
            callback()

    # The library's side.

    def process_ended(self) -> None:
        """No writer will come any more: the stream ends here, also where none has ever come."""
        with suppress(ValueError, OSError), self._end.use() as fd:
            if self._end.poll(0) & select.POLLHUP:
                return  # and a writer that comes now would take the end away from who has just been told of it
            # A writer that comes and goes is what makes the kernel report the hang-up; the path may be gone already.
            os.close(os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))

    def cancel(self) -> None:
        """Give the stream up: blocked reads return ``b""`` at once."""
        self.cancelled = True
        self._end.interrupt()

    def shut(self) -> None:
        """Close the descriptor without the owner: later reads return ``b""``."""
        self.cancelled = True
        self._tell_copier()
        self._end.close()

    def finish(self, *, drained: bool) -> bool:
        """Close the descriptor, and say whether that was done.

        It is left to the owner where its number was given out and the end was not seen yet, because the owner may be about
        to use it; and, unless the stream is known to be drained, where it holds bytes.
        """
        owned = self._exposed and not self._end_seen and not self._end.closed
        if owned or not (drained or self.drained()):
            return False
        self.shut()
        return True

    def pending(self) -> tuple[int, bool]:
        """Bytes that nobody has taken or that a copier holds, and whether all writers are gone."""
        try:
            with self._end.use() as fd:
                (unread,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"))
                hung_up = bool(self._end.poll(0) & select.POLLHUP)
        except ValueError:
            return 0, True
        return unread + self.in_hand, hung_up

    def drained(self) -> bool:
        """Whether the reader has come to the end."""
        if self.cancelled or self._end.closed:
            return True
        unread, hung_up = self.pending()
        return hung_up and not unread and not self._adopted


class _Gate(Enum):
    """What stands between the owner's close of stdin and the end of the process's input."""

    PENDING = "the process is not there yet"
    OPEN = "the process is there"
    SHUT = "the process has ended, or never came to be"


class InputStream(io.RawIOBase):
    """What a process reads: our write end of its stdin.

    A raw, binary, writable stream. `write` blocks until the FIFO has taken everything. ``BrokenPipeError`` means that
    the process has ended, never that the shim is late: a holder of our own keeps the FIFO open until stdin is closed
    or the process's exit is known. The descriptor behind `fileno` is non-blocking.

    `close` returns at once. The end of the process's input follows in the background, once the process is there and
    its reader has come. Safe to close while another thread writes.

    Attributes:
        ended: Set when the sending of the end of input is over, whether it succeeded or not.
        told: containerd was told of the end of input.
    """

    def __init__(self, end: End, holder: End, on_close: Callable[[InputStream], None]) -> None:
        super().__init__()
        self._end = end
        self._holder = holder
        self._on_close = on_close
        self.ended = threading.Event()
        self.told = False
        self._lock = threading.Lock()  # guards the gate and the two flags; nothing is called while it is held
        self._gate = _Gate.PENDING
        self._owner_closed = False
        self._finishing = False
        self._shut = threading.Event()
        self._cancelled = False
        self._exposed = False

    @property
    def path(self) -> str:
        """The FIFO's path."""
        return self._end.path

    def writable(self) -> bool:
        """Always true."""
        return True

    def fileno(self) -> int:
        """The non-blocking descriptor.

        Raises:
            ValueError: the stream is closed.
        """
        if self.closed:
            raise ValueError(f"I/O operation on closed FIFO {self.path}")
        self._exposed = True
        return self._end.fileno()

    def use(self) -> AbstractContextManager[int]:
        """Borrow the descriptor: it is not closed, and its number not given away, before the block ends.

        Raises:
            ValueError: the stream is closed.
        """
        return self._end.use()

    def write(self, data: Buffer, /) -> int:
        """Write all of it, waiting as long as the process does not read.

        Raises:
            BrokenPipeError: the process has ended.
            OSError: ``ECANCELED``, the library has given the stream up while the process goes on.
            ValueError: the stream is closed.
        """
        view = memoryview(data).cast("B")
        written = 0
        while True:
            self._check()
            try:
                with self._end.use() as fd:
                    try:
                        written += os.write(fd, view[written:])
                    except BlockingIOError:
                        self._end.poll(select.POLLOUT, None)
            except ValueError:  # closed between the look and the use
                self._check()
                raise
            if written == len(view):
                return written

    def _check(self) -> None:
        if self._gate is _Gate.SHUT and not self.closed:
            raise BrokenPipeError(errno.EPIPE, "the process has ended", self.path)
        if self._cancelled and self._gate is not _Gate.SHUT:
            raise OSError(errno.ECANCELED, "the library has given the stream up", self.path)
        if self.closed:
            raise ValueError(f"I/O operation on closed FIFO {self.path}")

    def close(self) -> None:
        """Let the process's input end after what has been written; idempotent, and back at once."""
        if self.closed:
            return
        super().close()
        self._end.interrupt()
        self._settle(owner_closed=True)

    # The library's side.

    def process_is_there(self) -> None:
        """The process can be sent its end of input: init is created, or the exec started."""
        self._settle(gate=_Gate.OPEN)

    def process_ended(self) -> None:
        """Nobody will read any more: writes raise BrokenPipeError from now on, blocked ones too."""
        self._settle(gate=_Gate.SHUT)
        self._shut.set()
        self._end.interrupt()
        self._holder.close()

    def _settle(self, *, gate: _Gate | None = None, owner_closed: bool = False) -> None:
        with self._lock:
            if gate is not None and self._gate is not _Gate.SHUT:
                self._gate = gate
            self._owner_closed = self._owner_closed or owner_closed
            finish = self._owner_closed and self._gate is not _Gate.PENDING and not self._finishing
            self._finishing = self._finishing or finish
            ended = self._gate is _Gate.SHUT
        if finish and ended:
            self.shut()
        elif finish:
            self._on_close(self)

    def end_input(self) -> None:
        """Close the FIFO in such a way that what was written and the end both reach the process.

        Blocks until the shim's reader has come, for ten seconds at most. The end of input needs a CloseIO as well,
        because the shim holds a writer of its own. The FIFO's name goes: a later client that opened it for the process would
        take the end of input back.
        """
        self._holder.close()
        deadline = time.monotonic() + _READER_WAIT_SECONDS
        pause = 0.0005
        while not self._has_reader() and time.monotonic() < deadline and not self._shut.wait(pause):
            pause = min(pause * 2, 0.02)
        # Of a process that has ended the name is removed with the others, and may then be a successor's.
        if self._has_reader() and self._gate is not _Gate.SHUT:
            with suppress(OSError):
                os.unlink(self.path)
        self._end.close()

    def _has_reader(self) -> bool:
        try:
            with self._end.use():
                return not self._end.poll(0) & select.POLLERR
        except ValueError:
            return True

    def finish(self) -> bool:
        """Close the descriptors unless the owner may be about to use one; say whether they are closed."""
        if self._exposed and not self.closed:
            return False
        self.shut()
        return True

    def cancel(self) -> None:
        """Give the stream up: blocked writes raise at once."""
        self._cancelled = True
        self._end.interrupt()

    def shut(self) -> None:
        """Close both descriptors without an end of input for the process, now or when the owner closes."""
        with self._lock:
            self._finishing = True
        self._cancelled = True
        self._holder.close()
        self._end.close()
        self.ended.set()
