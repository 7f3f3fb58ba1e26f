"""The shim's side of a process's stdio: which end is opened by whom, and when.

In the shim's order: with stdin, a writer of its own, which keeps the input from ending until CloseIO; then for stdout and
stderr each a writer, which waits for the client's reader, and a reader of its own, so that no writer ever meets a broken
pipe; and stdin's reader at last, some time after Create or Start has answered. With a terminal there is no stderr.

Without a terminal stdout may be a URI, which then counts for both: ``file://``, a file that is made and added to, or ``binary://``,
a program that gets the output. Anything else is taken as a path, and what is there but no FIFO is added to.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

from libcontainerd.cio.fifo import End
from libcontainerd.testing.logger import Logger

if TYPE_CHECKING:
    from collections.abc import Callable

_FIRST_LOOK_SECONDS: Final = 0.0005
_LAST_LOOK_SECONDS: Final = 0.01
_CHUNK: Final = 32 << 10
_INPUT_LATE_SECONDS: Final = 0.02
"""How long after the answer stdin's reader comes: clients must not count on finding it."""


class StdioError(Exception):
    """A stream cannot be opened; the text is the shim's.

    Attributes:
        late: Nobody came to read in time.
    """

    def __init__(self, text: str, *, late: bool = False) -> None:
        super().__init__(text)
        self.late = late


def _reason(error: OSError) -> str:
    return os.strerror(error.errno or errno.EIO).lower()


class StdioClosedError(Exception):
    """The shim has closed the stream."""


class _FileSink:
    """A file that is there, and that output is added to."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by `close`
        self._lock = threading.Lock()  # guards the file against being closed under a write; innermost

    def write(self, data: bytes) -> None:
        with self._lock:
            if self._file.closed:
                raise StdioClosedError
            self._file.write(data)

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def cancel(self) -> None:
        self.close()


class _FifoSink:
    """A FIFO that the client reads, with the shim's two ends; or a logger's pipe, of which the shim keeps no reader."""

    def __init__(self, writer: End, keeper: End | None) -> None:
        self._writer = writer
        self._keeper = keeper
        self._cancelled = False

    def write(self, data: bytes) -> None:
        """Write all of it, as slowly as it is read."""
        view = memoryview(data)
        while view and not self._cancelled:
            try:
                with self._writer.use() as fd:
                    try:
                        view = view[os.write(fd, view) :]
                    except BlockingIOError:
                        self._writer.poll(select.POLLOUT, None)
            except (ValueError, BrokenPipeError) as error:
                raise StdioClosedError from error
        if view:
            raise StdioClosedError

    def close(self) -> None:
        self._writer.close()
        if self._keeper is not None:
            self._keeper.close()

    def cancel(self) -> None:
        self._cancelled = True
        self._writer.interrupt()


class _NullSink:
    """Nowhere."""

    def write(self, data: bytes) -> None:
        """Forget it."""

    def close(self) -> None:
        """Nothing to close."""

    def cancel(self) -> None:
        """Nothing to wake."""


_Sink = _FileSink | _FifoSink | _NullSink


class ShimStdio:
    """The shim's ends of one process's streams. Thread-safe.

    Attributes:
        stdin: The path as the request gave it; empty for none.
        stdout: Likewise, or a URI.
        stderr: Likewise.
        terminal: The process has a terminal: its output is one stream.
        on_hang_up: Called when a terminal's input has ended for good, from a thread of the stdio's; None where whoever reads the
            input sees to it.
    """

    def __init__(
        self,
        stdin: str,
        stdout: str,
        stderr: str,
        *,
        terminal: bool,
        name: str = "",
        namespace: str = "",
    ) -> None:
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self.terminal = terminal
        self.on_hang_up: Callable[[], None] | None = None
        self._name = name
        self._namespace = namespace
        self._uri = urlsplit(stdout)
        self._sinks: dict[str, _Sink] = {}
        self._lock = (
            threading.Lock()
        )  # guards the six below; innermost, nothing that waits is called under it
        self._logger: Logger | None = None
        self._reader: End | None = None
        self._keeper: End | None = None
        self._input_begun = False
        self._input_closed = False
        self._closed = False
        self._input_ready = threading.Event()
        self._opened = threading.Event()
        self._given_up = threading.Event()
        self._cancelled = threading.Event()

    def prepare(self) -> None:
        """Before there is a process: make the file, or start the logger, that stdout's URI names.

        Raises:
            StdioError: it cannot be done, or the URI is of a kind that is not known.
        """
        if self.terminal or not (self.stdin or self.stdout or self.stderr):
            return
        scheme = self._uri.scheme
        if scheme == "file":
            self._make_file(unquote(self._uri.path))
        elif scheme == "binary":
            try:
                self._start_logger()
            except StdioError as error:
                raise StdioError(
                    f"1 error occurred:\n\t* failed to start binary process: {error}\n\n"
                ) from error
        elif scheme not in ("", "fifo"):
            raise StdioError(f"unknown STDIO scheme {scheme}")

    def _make_file(self, path: str) -> None:
        doing = f"mkdir {os.path.dirname(path)}"
        try:
            os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
            doing = f"open {path}"
            with open(path, "ab"):
                pass
        except FileExistsError as error:
            raise StdioError(f"{doing}: not a directory") from error
        except OSError as error:
            raise StdioError(f"{doing}: {_reason(error)}") from error

    def _start_logger(self) -> Logger:
        path = unquote(self._uri.path)
        try:
            logger = Logger(self.stdout, self._name, self._namespace)
        except OSError as error:
            raise StdioError(f"fork/exec {path}: {_reason(error)}") from error
        with self._lock:
            self._logger = logger
            given_up = self._closed or self._given_up.is_set()
        if given_up:
            logger.interrupt()
        logger.wait_ready()
        return logger

    def open(self, timeout: float) -> None:
        """Open the output, waiting for the client's readers.

        Args:
            timeout: Seconds that the readers may take together.

        Raises:
            StdioError: a stream cannot be opened, or nobody reads it in time.
        """
        deadline = time.monotonic() + timeout
        if self.terminal:
            self._sinks["stdout"] = self._open_terminal(deadline)
        elif not (self.stdin or self.stdout or self.stderr):
            self._sinks = {"stdout": _NullSink(), "stderr": _NullSink()}
        elif self._logger is not None:
            self._sinks = {
                "stdout": _FifoSink(self._logger.out, None),
                "stderr": _FifoSink(self._logger.err, None),
            }
        else:
            file = unquote(self._uri.path) if self._uri.scheme == "file" else ""
            for name, text in (("stdout", self.stdout), ("stderr", self.stderr)):
                self._sinks[name] = self._open_sink(file or text, deadline)
        self._opened.set()

    def _open_terminal(self, deadline: float) -> _Sink:
        if not self.stdin and not self.stdout:
            return _NullSink()
        if self._uri.scheme == "binary":
            try:
                return _FifoSink(self._start_logger().out, None)
            except StdioError as error:
                raise StdioError(f"failed to start logging binary process: {error}") from error
        try:
            return self._open_fifo(self.stdout, deadline)
        except OSError as error:
            raise StdioError(f"stat {self.stdout}: {_reason(error)}") from error

    def give_up_opening(self) -> None:
        """Wait no longer for the client's readers, nor for a logger."""
        self._given_up.set()
        with self._lock:
            logger = self._logger
        if logger is not None:
            logger.interrupt()

    def begin_input(self) -> None:
        """Open the input, soon and in the background: Create, or an exec's Start, has been answered. Idempotent."""
        with self._lock:
            begin = bool(self.stdin) and not self._input_begun and not self._closed
            self._input_begun = True
        if begin:
            threading.Thread(target=self._open_input, name="fake-containerd-stdin", daemon=True).start()

    def _open_sink(self, path: str, deadline: float) -> _Sink:
        try:
            if stat.S_ISFIFO(os.stat(path).st_mode):
                return self._open_fifo(path, deadline)
            return _FileSink(path)
        except OSError as error:
            raise StdioError(f'opening file "{path}" failed: open {path}: {_reason(error)}') from error

    def _open_fifo(self, path: str, deadline: float) -> _FifoSink:
        pause = _FIRST_LOOK_SECONDS
        while True:
            try:
                return _FifoSink(End(path, os.O_WRONLY), End(path, os.O_RDONLY))
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
            if time.monotonic() > deadline or self._given_up.wait(pause):
                raise StdioError(f'opening w/o fifo "{path}" failed: context deadline exceeded', late=True)
            pause = min(pause * 2, _LAST_LOOK_SECONDS)

    def _open_input(self) -> None:
        self._cancelled.wait(_INPUT_LATE_SECONDS)
        with suppress(OSError):  # the client has taken its FIFOs away again: there is no input
            reader = End(self.stdin, os.O_RDONLY)
            keeper = End(self.stdin, os.O_WRONLY)
            with self._lock:
                closed, input_closed = self._closed, self._input_closed
                if not closed:
                    self._reader = reader
                    self._keeper = keeper
            if closed:
                reader.close()
            if closed or input_closed:
                keeper.close()
        self._input_ready.set()
        if self.terminal and self.on_hang_up is not None and self._input_ends():
            self.on_hang_up()

    def _input_ends(self) -> bool:
        """Wait until no writer of the input is left; False if it is closed before."""
        with self._lock:
            reader = self._reader
        if reader is None:
            return False
        with suppress(ValueError), reader.use():
            while not self._cancelled.is_set():
                if reader.poll(0, None) & select.POLLHUP:
                    return True
        return False

    def write(self, stream: str, data: bytes) -> None:
        """Write to ``stdout`` or ``stderr``, waiting as long as the client does not read.

        Raises:
            StdioClosedError: the stream was closed or cancelled.
        """
        self._opened.wait()  # an exec runs before its stdio is open
        sink = self._sinks.get("stdout" if self.terminal else stream)
        if sink is None:
            raise StdioClosedError
        sink.write(data)

    def read(self, size: int = _CHUNK) -> bytes:
        """Read from stdin, waiting for data; ``b""`` is the end.

        Raises:
            StdioClosedError: the stream was closed or cancelled.
        """
        if not self.stdin:
            return b""
        self._input_ready.wait()
        reader = self._reader
        if reader is None:
            if self._cancelled.is_set():
                raise StdioClosedError
            return b""
        while not self._cancelled.is_set():
            try:
                with reader.use() as fd:
                    try:
                        if data := os.read(fd, size):
                            return data
                    except BlockingIOError:
                        reader.poll(select.POLLIN, None)
                        continue
                    if reader.poll(select.POLLIN) & select.POLLHUP:
                        if self._cancelled.is_set():
                            break  # the writer that went was our own
                        return b""
                    reader.poll(select.POLLIN, None)
            except ValueError as error:
                raise StdioClosedError from error
        raise StdioClosedError

    def close_input(self) -> None:
        """Close the shim's own writer, as CloseIO does: the input ends once the client's is closed too."""
        with self._lock:
            self._input_closed = True
            keeper = self._keeper
        if keeper is not None:
            keeper.close()

    def close_output(self, stream: str) -> None:
        """The process's side of a stream has come to its end."""
        if (sink := self._sinks.get(stream)) is not None:
            sink.close()

    def cancel(self) -> None:
        """Wake whoever is blocked in a stream, now and from now on."""
        self.give_up_opening()
        self._cancelled.set()
        self._input_ready.set()
        self._opened.set()
        for sink in self._sinks.values():
            sink.cancel()
        with self._lock:
            reader = self._reader
        if reader is not None:
            reader.interrupt()

    def close(self) -> None:
        """Close every end; idempotent."""
        self.cancel()
        with self._lock:
            self._closed = True
            ends = [self._reader, self._keeper]
            logger = self._logger
        for sink in self._sinks.values():
            sink.close()
        for end in ends:
            if end is not None:
                end.close()
        if logger is not None:
            logger.close()
