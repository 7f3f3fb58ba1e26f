"""The other ends of copied streams: what a caller may give, and how bytes go in and out of it without waiting.

An end takes or gives what it can at once. Where it cannot, it says which descriptor to wait for, so that no thread
waits for a socket, a pipe or a terminal. Callables and file objects may block: that is theirs to do, and holds one
worker thread of the pump.
"""

from __future__ import annotations

import errno
import fcntl
import inspect
import io
import os
import select
import socket
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from libcontainerd.errors import InvalidParameterError

if TYPE_CHECKING:
    from typing_extensions import Buffer

CHUNK: Final = 65536
"""Bytes moved at once: what a FIFO holds by default."""

# A blocking pipe or terminal that poll calls writable takes this much (PIPE_BUF) without blocking, and no more for sure.
_SURE_TO_FIT: Final = select.PIPE_BUF

_NOWAIT_UNKNOWN: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ESPIPE)

Chunk: TypeAlias = bytes | memoryview
Wait: TypeAlias = tuple[tuple[int, int], ...]
"""Descriptors and the epoll events of each that are waited for; any of them is enough."""


class Writable(Protocol):
    """**Protocol**: a binary file that can be written."""

    def write(self, data: bytes, /) -> object:
        """Take the data; a raw file says how many bytes it took, or None for none."""


class Readable(Protocol):
    """**Protocol**: a binary file that can be read."""

    def read(self, size: int, /) -> bytes | None:
        """Give at most `size` bytes; ``b""`` is the end."""


class ReadableInto(Protocol):
    """**Protocol**: a binary file that reads into a buffer."""

    def readinto(self, buffer: bytearray, /) -> int | None:
        """Fill the buffer from its start and say how far; 0 is the end."""


Output: TypeAlias = Callable[[bytes], object] | Writable | socket.socket | int
"""Where output may go: a callable, a binary file object, a socket, or a descriptor."""

Input: TypeAlias = (
    bytes | bytearray | memoryview | Callable[[], bytes] | Readable | ReadableInto | socket.socket | int
)
"""Where input may come from: bytes, a callable (``b""`` ends), a binary file object, a socket, or a descriptor."""


class Sink(Protocol):
    """**Protocol**: where output goes. Used by one thread at a time."""

    def write(self, data: Chunk) -> int:
        """Take what fits, at least a byte; 0 when `room` must be waited for first."""

    def flush(self) -> bool:
        """Pass on what is held back; False when `room` must be waited for first."""

    def room(self) -> Wait:
        """What to wait for after a 0 or a False."""


class Source(Protocol):
    """**Protocol**: where input comes from. Used by one thread at a time."""

    def read(self) -> Chunk | None:
        """Give what is there; empty is the end, None says that `ready` must be waited for first."""

    def ready(self) -> Wait:
        """What to wait for after a None."""


def open_sink(destination: Output | None, stream: str) -> Sink:
    """Make the sink for a destination; None discards.

    Nothing is written yet, and the destination stays the caller's to close.

    Raises:
        InvalidParameterError: it cannot be written, or takes text.
    """
    wrong = f"cannot copy {stream} to {destination!r}: "
    if destination is None:
        return _Discard()
    if isinstance(destination, socket.socket):
        _check_socket(destination, wrong, f"{stream}=tls.sendall")
        return _SocketSink(destination)
    if isinstance(destination, int):
        return _DescriptorSink(destination, seekable=_check_descriptor(destination, os.O_RDONLY, wrong))
    if hasattr(destination, "write"):
        _check_file(destination, "writable", wrong)
        return _FileSink(destination)
    if _is_plain_function(destination):
        return _CallableSink(destination)
    raise InvalidParameterError(
        f"{wrong}give a plain function that takes bytes, a binary file object, a socket, a descriptor or None"
    )


def open_source(source: Input) -> Source:
    """Make the source for what shall become a process's stdin.

    Nothing is read yet, and what was given stays the caller's to close.

    Raises:
        InvalidParameterError: it cannot be read, or gives text.
    """
    wrong = f"cannot copy stdin from {type(source).__name__}: "
    if isinstance(source, bytes | bytearray | memoryview):
        return _BytesSource(source)
    if isinstance(source, socket.socket):
        _check_socket(source, wrong, "stdin=lambda: tls.recv(65536)")
        return _SocketSource(source)
    if isinstance(source, int):
        _check_descriptor(source, os.O_WRONLY, wrong)
        return _DescriptorSource(source)
    if hasattr(source, "read") or hasattr(source, "readinto"):
        _check_file(source, "readable", wrong)
        return _FileSource(source)
    if _is_plain_function(source):
        return _CallableSource(source)
    raise InvalidParameterError(
        f"{wrong}give bytes, a plain function that returns bytes, a binary file object, a socket or a descriptor"
    )


def _is_plain_function(value: object) -> bool:
    return callable(value) and not inspect.iscoroutinefunction(value)


def _check_file(file: object, ability: str, wrong: str) -> None:
    if isinstance(file, io.TextIOBase) or hasattr(file, "encoding"):
        raise InvalidParameterError(f"{wrong}it is a text file; open it in binary mode, or give its .buffer")
    if getattr(file, "closed", False) is True:
        raise InvalidParameterError(f"{wrong}it is closed")
    able = getattr(file, ability, None)
    if isinstance(file, io.IOBase) and callable(able) and not able():
        raise InvalidParameterError(f"{wrong}it is not {ability}")


def _check_socket(sock: socket.socket, wrong: str, instead: str) -> None:
    if type(sock).send is not socket.socket.send:
        raise InvalidParameterError(f"{wrong}it is more than a plain socket, such as TLS; give {instead}")
    if sock.fileno() < 0:
        raise InvalidParameterError(f"{wrong}it is closed")


def _check_descriptor(fd: int, unfit: int, wrong: str) -> bool:
    """Refuse a descriptor that is closed, a directory or open the other way; say whether it is a regular file."""
    try:
        mode = os.fstat(fd).st_mode
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    except (OSError, OverflowError) as error:
        raise InvalidParameterError(f"{wrong}{fd} is not an open descriptor") from error
    if isinstance(fd, bool) or stat.S_ISDIR(mode) or flags & os.O_ACCMODE == unfit or flags & os.O_PATH:
        ability = "written" if unfit == os.O_RDONLY else "read"
        raise InvalidParameterError(f"{wrong}descriptor {fd} cannot be {ability}")
    return stat.S_ISREG(mode)


def _settled(fd: int, event: int) -> bool:
    """Whether the event is there, or something is wrong that the next call will say."""
    poller = select.poll()
    poller.register(fd, event)
    return bool(poller.poll(0))


def _descriptor_of(file: object) -> int:
    """The descriptor that decides whether a raw stream, or a buffered one right above it, can go on; else -1.

    Other file objects may hold bytes that their descriptor knows nothing of.
    """
    if isinstance(file, io.BufferedReader | io.BufferedWriter):
        file = file.raw
    if not isinstance(file, io.RawIOBase):
        return -1
    try:
        return file.fileno()
    except (OSError, ValueError):  # none, or closed
        return -1


# ------------------------------------------------------------------------------------------------------------- sinks


class _Discard:
    def write(self, data: Chunk) -> int:
        return len(data)

    def flush(self) -> bool:
        return True

    def room(self) -> Wait:
        return ()


class _CallableSink(_Discard):
    def __init__(self, function: Callable[[bytes], object]) -> None:
        self._function = function

    def write(self, data: Chunk) -> int:
        self._function(bytes(data))  # bytes of bytes are no copy
        return len(data)


class _FileSink:
    def __init__(self, file: Writable) -> None:
        self._file = file
        self._flush: Callable[[], object] | None = getattr(file, "flush", None)
        self._dirty = False

    def write(self, data: Chunk) -> int:
        self._dirty = True
        try:
            count = self._file.write(bytes(data))
        except BlockingIOError as error:  # a buffered file on a non-blocking descriptor
            return error.characters_written if hasattr(error, "characters_written") else 0
        if count is None:
            return 0 if isinstance(self._file, io.RawIOBase) else len(data)
        if not isinstance(count, int):
            return len(data)
        if count <= 0:
            raise OSError(errno.EIO, "write() took nothing")
        return min(count, len(data))

    def flush(self) -> bool:
        if self._dirty and self._flush is not None:
            try:
                self._flush()
            except BlockingIOError:
                return False
        self._dirty = False
        return True

    def room(self) -> Wait:
        fd = _descriptor_of(self._file)
        if fd < 0:
            raise OSError(errno.EAGAIN, "the file would block and has no descriptor to wait for")
        return ((fd, select.EPOLLOUT),)


class _SocketSink(_Discard):
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def write(self, data: Chunk) -> int:
        try:
            if self._sock.gettimeout():
                # Python would wait for as long as the timeout; underneath, such a socket is non-blocking.
                return os.write(self._sock.fileno(), data)
            return self._sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0

    def room(self) -> Wait:
        return ((self._sock.fileno(), select.EPOLLOUT),)


class _DescriptorSink(_Discard):
    def __init__(self, fd: int, *, seekable: bool) -> None:
        self._fd = fd
        self._seekable = seekable
        self._nowait = True

    def write(self, data: Chunk) -> int:
        # O_NONBLOCK belongs to everybody who shares the descriptor, other processes too: it is looked at, never set.
        try:
            if self._seekable or not os.get_blocking(self._fd):
                return os.write(self._fd, data)
            return self._write_without_waiting(data)
        except BlockingIOError:
            return 0

    def _write_without_waiting(self, data: Chunk) -> int:
        if self._nowait:
            try:
                return os.pwritev(self._fd, [data], -1, os.RWF_NOWAIT)
            except OSError as error:
                if error.errno not in _NOWAIT_UNKNOWN:
                    raise
                self._nowait = False  # terminals; pipes before Linux 6.5
        if not _settled(self._fd, select.POLLOUT):
            return 0
        return os.write(self._fd, memoryview(data)[:_SURE_TO_FIT])

    def room(self) -> Wait:
        return ((self._fd, select.EPOLLOUT),)


# ----------------------------------------------------------------------------------------------------------- sources


class _BytesSource:
    def __init__(self, data: Buffer) -> None:
        self._rest: Chunk = memoryview(data).cast("B")

    def read(self) -> Chunk:
        data, self._rest = self._rest, b""
        return data

    def ready(self) -> Wait:
        return ()


class _CallableSource:
    def __init__(self, function: Callable[[], bytes]) -> None:
        self._function = function

    def read(self) -> Chunk:
        return memoryview(self._function()).cast("B")

    def ready(self) -> Wait:
        return ()


class _FileSource:
    def __init__(self, file: Readable | ReadableInto) -> None:
        self._file = file
        # What a buffered reader holds already cannot be seen from its descriptor, so the first read does not ask. A
        # terminal gives whole lines, and asking spares a thread that would wait for the user's first.
        self._ask = not isinstance(file, io.BufferedReader) or file.isatty()

    def read(self) -> Chunk | None:
        fd = _descriptor_of(self._file)
        if self._ask and fd >= 0 and not _settled(fd, select.POLLIN):
            return None
        self._ask = True
        for name in ("read1", "read"):
            if read := getattr(self._file, name, None):
                data: bytes | None = read(CHUNK)
                break
        else:
            buffer = bytearray(CHUNK)
            count: int | None = getattr(self._file, "readinto")(buffer)  # noqa: B009 # the type is narrowed by nothing
            data = None if count is None else bytes(buffer[:count])
        if data is None and fd < 0:
            raise OSError(errno.EAGAIN, "the file would block and has no descriptor to wait for")
        return None if data is None else memoryview(data).cast("B")

    def ready(self) -> Wait:
        return ((_descriptor_of(self._file), select.EPOLLIN),)


class _SocketSource:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def read(self) -> Chunk | None:
        try:
            if self._sock.gettimeout():
                return os.read(self._sock.fileno(), CHUNK)
            return self._sock.recv(CHUNK, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None

    def ready(self) -> Wait:
        return ((self._sock.fileno(), select.EPOLLIN),)


class _DescriptorSource:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self) -> Chunk | None:
        if not _settled(self._fd, select.POLLIN):
            return None
        try:
            return os.read(self._fd, CHUNK)
        except BlockingIOError:
            return None

    def ready(self) -> Wait:
        return ((self._fd, select.EPOLLIN),)
