"""Bytes across: what becomes of a process's stdin, stdout and stderr.

``start``, ``exec`` and ``restore`` take an ``attach_stdio``. It is either a callback that receives the open ends of the
process's FIFOs, a `DirectIO`, and returns the `IO` that looks after them; or a `Destination`, and then no FIFO is opened
and containerd's shim sees to the output itself.

Ready-made callbacks are `copy` and `terminal`, and `DirectIO` is itself an `IO`, so ``lambda dio: dio`` is one too.
Ready-made destinations are `null_io`, `log_file` and `log_uri`.

Everything here is safe to use from any thread.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import termios
import tty
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias, runtime_checkable
from urllib.parse import quote, unquote_to_bytes, urlsplit

from libcontainerd.cio.copying import copy_input, copy_output
from libcontainerd.cio.direct import DirectIO
from libcontainerd.cio.ends import Input, Output, open_sink, open_source
from libcontainerd.cio.fifo import FifoSet, InputStream, OutputStream
from libcontainerd.cio.pump import Copy
from libcontainerd.errors import InvalidParameterError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "AttachStdio",
    "Destination",
    "DirectIO",
    "FifoSet",
    "IO",
    "Input",
    "InputStream",
    "Output",
    "OutputStream",
    "StdioCallback",
    "copy",
    "log_file",
    "log_uri",
    "null_io",
    "terminal",
]


@runtime_checkable
class IO(Protocol):
    """**Protocol**: whoever looks after one process's open streams.

    An `attach_stdio` callback returns it, and the client drives it: `cancel`, then `wait`, then `close`, when the process
    is deleted, when its start failed, and when the client itself is closed. Before a deletion the client lets attached
    readers come to the end of the output.

    The three may be called repeatedly, from any thread and side by side, and raise nothing: a start that fails at a late
    point ends one IO more than once. `cancel` is always called before `close`.
    """

    def cancel(self) -> None:
        """Stop at once: wake whatever is blocked. Must not block."""

    def wait(self) -> None:
        """Return when copying has ended and what was read is delivered; after `cancel`, at once."""

    def close(self) -> None:
        """Give the streams back. Must not block."""


StdioCallback: TypeAlias = Callable[[DirectIO], IO]
"""Receives a process's open ends before the process is there, and must return at once; copying is for the background.

An exception from it aborts the start.
"""


@dataclass(frozen=True, slots=True)
class Destination:
    """Where the shim shall put a process's output by itself. There is no FIFO, so nothing to read and no stdin.

    The output then goes on without us, also when this program ends.

    Attributes:
        stdout: As containerd is told it: empty for nowhere, or a URI.
        stderr: Likewise. The shim wants both or neither.
    """

    stdout: str
    stderr: str

    def told(self, *, runc: bool) -> tuple[str, str]:
        """What the shim is told of stdout and of stderr.

        Args:
            runc: It is one of runc's shims.
        """
        del runc
        return self.stdout, self.stderr

    def check(self, *, with_stdin: bool, terminal: bool) -> None:
        """Refuse what a destination cannot do.

        Raises:
            InvalidParameterError: there is to be an stdin, or a terminal's output is to go to a file: the shim
                takes a terminal's output to a program (``binary://``) or not at all.
        """
        if with_stdin:
            raise InvalidParameterError(
                f"with_stdin needs an attach_stdio that feeds it, such as cio.copy(stdin=...): {self} has no stdin"
            )
        if terminal and self.stdout.startswith("file:"):
            raise InvalidParameterError(
                f"the shim cannot log a terminal to {self.stdout}: use cio.copy(stdout=...), or no terminal"
            )


@dataclass(frozen=True, slots=True)
class _LogFile(Destination):
    path: str

    def told(self, *, runc: bool) -> tuple[str, str]:
        """As `Destination.told`; makes the file.

        Where both streams go to one file, runc's shim closes it at the end of the first, and the rest of the other is lost
        (containerd's issue 3118). By two spellings of its path they are two files to it, which it opens as they are. What it cannot
        be told as a path, and what is no file of ours to make, stays a URI; as it does for other shims, which may know nothing else.
        """
        if not runc or not _UNAMBIGUOUS.fullmatch(self.path) or not _make_file(self.path):
            return self.stdout, self.stderr
        directory, name = os.path.split("/" + self.path.lstrip("/"))
        return os.path.join(directory, name), os.path.join(directory, ".", name)


AttachStdio: TypeAlias = StdioCallback | Destination
"""What ``attach_stdio=`` takes."""

null_io: Final = Destination("", "")
"""No input, and output goes nowhere."""

_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_PATH_SAFE: Final = "/!$&'()*,;=:@~"
_UNAMBIGUOUS: Final = re.compile(r"[^\0-\x1f\x7f%\ud800-\udfff]+")
"""A path that the shim, which takes it for a URI of no scheme, finds no fault with."""


def log_file(path: str | os.PathLike[str]) -> Destination:
    """Have the shim append a process's stdout and stderr to a file.

    The shim writes to it also while nobody of us is there. A file that is missing is made when the process is started. The shim
    does not take a file for a process with a terminal.

    With a ``%`` or a control character in its path, or one that is not UTF-8, and where the file is not ours to make, containerd's
    shim may lose the end of one stream when the other ends, as it does with ``file://``.

    Args:
        path: An absolute path. It is the shim's view that counts: the machine that containerd runs on.

    Raises:
        InvalidParameterError: the path is not absolute, is a directory, or its directory is not there.
    """
    name = os.fsdecode(path)
    if not os.path.isabs(name) or "\0" in name:
        raise InvalidParameterError(f"cannot log to {name!r}: give an absolute path")
    if name.endswith("/") or os.path.isdir(name):
        raise InvalidParameterError(f"cannot log to {name!r}: it is a directory")
    if not os.path.isdir(os.path.dirname(name)):
        raise InvalidParameterError(
            f"cannot log to {name!r}: make the directory {os.path.dirname(name)!r} first"
        )
    uri = "file://" + quote(os.fsencode(name), safe=_PATH_SAFE)
    return _LogFile(uri, uri, name)


def log_uri(uri: str) -> Destination:
    """Have the shim hand a process's stdout and stderr to what a URI names.

    containerd's runc shim knows ``file:///path`` and ``binary:///path/of/program?name=value``: it runs
    the program with the output on its descriptors 3 and 4, and the arguments from the query. Other shims know others, so
    any scheme is let through, as it is. Of ``file://`` runc's shim may lose the end of one stream when the other ends: use `log_file`.

    Raises:
        InvalidParameterError: it is not a URI with a scheme, or names nothing.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator or not _SCHEME.fullmatch(scheme) or not rest or not _printable(uri):
        raise InvalidParameterError(
            f"cannot log to {uri!r}: give a URI such as binary:///usr/local/bin/logger"
        )
    if scheme in ("binary", "file", "fifo"):
        parts = urlsplit(uri)
        if parts.netloc or not unquote_to_bytes(parts.path).startswith(b"/") or parts.path == "/":
            raise InvalidParameterError(f"cannot log to {uri!r}: after {scheme}:// comes an absolute path")
    return Destination(uri, uri)


def _make_file(path: str) -> bool:
    """Make a file where there is none, as the shim would; False if what is there is none, or it cannot be made."""
    try:
        with suppress(FileExistsError):
            os.mknod(path, stat.S_IFREG | 0o644)
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _printable(uri: str) -> bool:
    return uri.isascii() and uri.isprintable() and " " not in uri


def copy(
    stdin: Input | None = None, stdout: Output | None = None, stderr: Output | None = None
) -> StdioCallback:
    """Make a callback that copies a process's streams to and from what is given, in the background.

    All copies of a program share one pump: one thread that waits, and a few that come and go.

    Output goes to a callable, which receives each piece as `bytes`; to a binary file object, which is flushed when the
    stream is idle and at its end; to a socket; or to a descriptor. None discards it. A slow destination slows its own
    process and nothing else. One that raises is logged once (``destination_failed``), and the rest of that stream is
    discarded, so that the process is never blocked by it. One that is given for both streams is called from two threads.

    Input comes from bytes; from a callable, whose ``b""`` is the end; from a binary file object; from a socket; or from
    a descriptor. At its end the process's input ends; but not with a terminal, where that would be a hang-up: there, send what
    a user would type (Ctrl-D is byte 4), or close ``DirectIO.stdin`` to hang up. None leaves ``DirectIO.stdin`` open and yours
    to use; for an empty input, give ``b""``. Sockets and descriptors are waited for without a thread. A callable, a buffered reader that
    something has been read of, and a file object without a descriptor keep a thread until their call returns, also
    after `IO.cancel`.

    Nothing that is given is closed, nor are its flags changed: sockets and descriptors may be blocking or not. It must stay
    open until the IO has been waited for or closed. The callback may be used for any number of processes.

    The IO's `wait` returns when stdout and stderr have ended and every byte is delivered; it does not wait for stdin.

    Raises:
        InvalidParameterError: something given cannot be copied to or from, such as a text file or a closed one.
    """
    open_sink(stdout, "stdout")
    open_sink(stderr, "stderr")
    if stdin is not None:
        open_source(stdin)

    def attach(dio: DirectIO) -> IO:
        return CopyIO(dio, *_copies(dio, stdin, stdout, stderr))

    return attach


def terminal(stdin: int | None = None, stdout: int | None = None) -> StdioCallback:
    """Make a callback that connects a process to the user's terminal.

    Where `stdin` is a terminal, it is put into raw mode until the process's output ends, the IO is cancelled or closed,
    or this program exits; keys such as Ctrl-C then go to the process. What is typed after the output's end is left for
    others to read.

    The size is yours to pass on, because only the program may install a handler for SIGWINCH::

        def resize(*_: object) -> None:
            client.resize_terminal("web", "init", *os.get_terminal_size())

        signal.signal(signal.SIGWINCH, resize)

    Args:
        stdin: The descriptor to read from, by default this program's standard input.
        stdout: The descriptor to write to, by default this program's standard output.

    Raises:
        InvalidParameterError: one of them is not open, or not open that way.
    """
    source = 0 if stdin is None else stdin
    target = 1 if stdout is None else stdout
    open_sink(target, "stdout")
    open_source(source)

    def attach(dio: DirectIO) -> IO:
        if stdout is None and sys.stdout is not None:
            with suppress(OSError, ValueError):
                sys.stdout.flush()  # what was printed before comes before
        raw = _RawMode(source) if dio.stdin is not None and os.isatty(source) else None
        try:
            feed = source if dio.stdin is not None else None
            return CopyIO(dio, *_copies(dio, feed, target, target, hang_up=True), raw=raw)
        except BaseException:
            if raw is not None:
                raw.restore()
            raise

    return attach


def _copies(
    dio: DirectIO,
    stdin: Input | None,
    stdout: Output | None,
    stderr: Output | None,
    *,
    hang_up: bool = False,
) -> tuple[Copy | None, list[Copy]]:
    """Prepare the copies of stdin, and of the outputs; with `hang_up` the end of the source is that of a terminal."""
    feed = None
    if stdin is not None:
        if dio.stdin is None:
            raise InvalidParameterError(
                "there is an stdin to copy, and the process was given none: say with_stdin=True"
            )
        feed = Copy(copy_input(dio.stdin, open_source(stdin), stays_open=dio.config.terminal and not hang_up))
    outputs = [_output(dio.stdout, stdout, "stdout")]
    if dio.stderr is not None:
        outputs.append(_output(dio.stderr, stderr, "stderr"))
    return feed, outputs


def _output(stream: OutputStream, destination: Output | None, name: str) -> Copy:
    copy = Copy(copy_output(stream, open_sink(destination, name), name))
    stream.on_close = copy.cancel  # after the copy's own end this does nothing
    return copy


class CopyIO:
    """The IO of running copies."""

    def __init__(
        self, dio: DirectIO, feed: Copy | None, outputs: Sequence[Copy], raw: _RawMode | None = None
    ) -> None:
        self._dio = dio
        self._outputs = outputs
        self._copies = [*outputs, *((feed,) if feed is not None else ())]
        self._raw = raw
        if raw is not None:
            outputs[0].at_end = self._leave_terminal
        try:
            for each in self._copies:
                each.start()
        except BaseException:
            self._stop()
            raise
        dio.on_cancel(self._stop)

    def _leave_terminal(self) -> None:
        for each in self._copies[len(self._outputs) :]:
            each.cancel()
        if self._raw is not None:
            self._raw.restore()

    def _stop(self) -> None:
        for each in self._copies:
            each.cancel()
        if self._raw is not None:
            self._raw.restore()

    def cancel(self) -> None:
        self._dio.cancel()
        self._stop()

    def wait(self) -> None:
        for each in self._outputs:
            each.wait()

    def close(self) -> None:
        self.cancel()
        self._dio.close()


class _RawMode:
    """A terminal in raw mode, until `restore` or the program's end."""

    def __init__(self, fd: int) -> None:
        before = termios.tcgetattr(fd)
        self._restore = weakref.finalize(self, _set_mode, fd, before)
        tty.setraw(fd, termios.TCSANOW)

    def restore(self) -> None:
        """Put the terminal's mode back; idempotent."""
        self._restore()


def _set_mode(fd: int, mode: list[int | list[bytes | int]]) -> None:
    with suppress(termios.error, OSError):  # the terminal is gone
        termios.tcsetattr(fd, termios.TCSANOW, mode)
