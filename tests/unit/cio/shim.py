"""A stand-in for the shim: the other ends of a process's FIFOs, and what the client does around them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from libcontainerd.cio import DirectIO, FifoSet, InputStream

DEADLINE = 20.0


def eventually(condition: Callable[[], object], what: str) -> None:
    """Wait until a condition holds; fail after a deadline that no healthy run comes near."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"never came: {what}"
        time.sleep(0.002)


def write_all(fd: int, data: bytes) -> None:
    """Write to a blocking descriptor until all is taken."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def read_all(fd: int) -> bytes:
    """Read a blocking descriptor to its end."""
    return b"".join(iter(lambda: os.read(fd, 65536), b""))


def pump_threads() -> list[str]:
    """Return the names of the pump's threads that are there."""
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("libcontainerd-"))


class Shim:
    """One process's FIFOs with both sides: `dio` is ours, and `open` gives the process's blocking descriptors."""

    def __init__(
        self, directory: Path, name: str = "init", *, with_stdin: bool = False, terminal: bool = False
    ) -> None:
        fifos = FifoSet.within(str(directory), name, with_stdin=with_stdin, terminal=terminal)
        self.stdin_closed = threading.Event()
        self.dio = DirectIO(fifos, on_stdin_close=self._end_input)
        self._fds: set[int] = set()
        self._threads: list[threading.Thread] = []

    def _end_input(self, stream: InputStream) -> None:
        self.stdin_closed.set()
        self.run(stream.end_input)

    def run(self, target: Callable[..., object], *args: object) -> threading.Thread:
        """Run something beside the test; it is joined at the end."""
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def open(self, stream: str) -> int:
        """Open the process's end of ``stdin``, ``stdout`` or ``stderr``."""
        flags = os.O_RDONLY if stream == "stdin" else os.O_WRONLY
        fd = os.open(getattr(self.dio.config, stream), flags)
        self._fds.add(fd)
        return fd

    def shut(self, *fds: int) -> None:
        """Close ends of the process."""
        for fd in fds:
            self._fds.discard(fd)
            os.close(fd)

    def say(self, data: bytes, stream: str = "stdout") -> threading.Thread:
        """Have the process write something, and close that stream."""
        fd = self.open(stream)

        def speak() -> None:
            write_all(fd, data)
            self.shut(fd)

        return self.run(speak)

    def cat(self) -> threading.Thread:
        """Have the process echo its input on stdout and then end; stderr stays empty."""
        source, target, silent = self.open("stdin"), self.open("stdout"), self.open("stderr")
        self.dio.process_is_there()

        def echo() -> None:
            with suppress(BrokenPipeError):
                for data in iter(lambda: os.read(source, 65536), b""):
                    write_all(target, data)
            self.shut(source, target, silent)

        return self.run(echo)

    def exit(self) -> None:
        """Close every end of the process, and have its exit known."""
        self.shut(*tuple(self._fds))
        self.dio.process_ended()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.dio.process_ended()
        self.dio.cancel()
        self.dio.close()
        for thread in self._threads:
            thread.join(DEADLINE if kind is None else 0.1)
            assert kind or not thread.is_alive(), "something beside the test hangs"
        self.shut(*tuple(self._fds))
        self.dio.config.unlink()


def open_descriptors() -> set[str]:
    """Return the numbers of this program's descriptors."""
    return set(os.listdir("/proc/self/fd"))


def chunks(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    """Cut data into pieces of the sizes, over and over."""
    start = turn = 0
    while start < len(data):
        size = sizes[turn % len(sizes)]
        yield data[start : start + size]
        start, turn = start + size, turn + 1
