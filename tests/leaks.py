"""Counts what a piece of code leaves behind in this process: file descriptors and threads."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# grpc's core keeps an event loop per process: its descriptors of these kinds come with the first channel, grow a little
# with the calls in flight, and stay. They may not grow without limit either: 1,000 calls that leave one each are seen.
_GRPC_KINDS = ("anon_inode:[eventpoll]", "anon_inode:[eventfd]", "anon_inode:[timerfd]", "socket:[")
_GRPC_ALLOWANCE = 16
_POLL_INTERVAL = 0.02


@dataclass(frozen=True)
class Snapshot:
    """The descriptors by target, grpc's own kinds as a number, and the live threads."""

    files: Counter[str]
    grpc_kinds: int
    threads: frozenset[threading.Thread]

    @classmethod
    def take(cls) -> Snapshot:
        """Read /proc/self/fd and list the threads."""
        targets = list(_descriptor_targets())
        native = [target for target in targets if target.startswith(_GRPC_KINDS)]
        files = Counter(target for target in targets if not target.startswith(_GRPC_KINDS))
        return cls(files, len(native), frozenset(threading.enumerate()))

    def left_behind(self, now: Snapshot) -> list[str]:
        """Name everything in `now` that was not there before; empty means no leak."""
        found = [
            f"descriptor of {target} ({count} more)" for target, count in (now.files - self.files).items()
        ]
        if now.grpc_kinds > self.grpc_kinds + _GRPC_ALLOWANCE:
            found.append(f"{now.grpc_kinds - self.grpc_kinds} more descriptors of sockets and event loops")
        # A pool that was there before, such as a server's in this process, has one more thread when one more call comes.
        pools = {_pool_of(thread) for thread in self.threads} - {""}
        found += [
            f"thread {thread.name}"
            for thread in now.threads - self.threads
            if thread.is_alive() and _pool_of(thread) not in pools
        ]
        return sorted(found)


def _pool_of(thread: threading.Thread) -> str:
    """The name of the ThreadPoolExecutor that a thread is of."""
    prefix, separator, number = thread.name.rpartition("_")
    return prefix if separator and number.isdecimal() else ""


@contextmanager
def no_leaks(within: float = 30.0) -> Iterator[None]:
    """Fail if the block leaves descriptors or threads behind.

    Args:
        within: Seconds that they have to be gone after the block's end: threads that end by themselves when idle
            and connections that close in the background are no leaks.

    Raises:
        AssertionError: something is still there at the deadline; the message names it.
    """
    before = Snapshot.take()
    yield
    deadline = time.monotonic() + within
    while left := before.left_behind(Snapshot.take()):
        assert time.monotonic() < deadline, f"left behind after {within} s: " + "; ".join(left)
        time.sleep(_POLL_INTERVAL)


@contextmanager
def no_leaks_of_ours(directory: str | os.PathLike[str], within: float = 30.0) -> Iterator[None]:
    """Fail if the block leaves descriptors below a directory, or threads of the library, behind.

    For tests beside a server in this process, whose threads come and stay as calls come.

    Args:
        directory: Where the FIFOs are.
        within: As for `no_leaks`.

    Raises:
        AssertionError: something is still there at the deadline; the message names it.
    """
    before = _ours(directory)
    yield
    deadline = time.monotonic() + within
    while left := _ours(directory) - before:
        assert time.monotonic() < deadline, f"left behind after {within} s: {dict(left)}"
        time.sleep(_POLL_INTERVAL)


def _ours(directory: str | os.PathLike[str]) -> Counter[str]:
    below = os.path.join(directory, "")
    targets = (target for target in _descriptor_targets() if target.startswith(below))
    threads = (thread.name for thread in threading.enumerate() if thread.name.startswith("libcontainerd"))
    return Counter([*targets, *threads])


def _descriptor_targets() -> Iterator[str]:
    directory = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in os.listdir(directory):
            if int(name) == directory:
                continue
            try:
                yield os.readlink(name, dir_fd=directory)
            except FileNotFoundError:
                # Another thread closed it between the listing and this look.
                continue
    finally:
        os.close(directory)
