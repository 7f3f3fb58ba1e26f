"""The mover of bytes: one epoll thread for the whole process, and a few workers that come and go.

A copy is a generator. It moves bytes for as long as that goes without waiting, and yields the descriptors that it must
wait for. The watcher thread holds all waiting copies in one epoll and puts those that can go on into a queue, from which
the workers take them. So a thousand silent containers cost one thread; a socket, pipe or terminal that is full costs
none; a callable or file that blocks costs the one worker that is in it, and delays nobody: when the queue has stood
still for `_STALL_SECONDS`, workers are added. A busy copy keeps its worker, and lets others have a turn where they wait.

Threads start on demand and end after a second without work, the watcher and its descriptors too. A forked child starts
afresh: the parent's copies stay the parent's.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeAlias

import structlog

if TYPE_CHECKING:
    from libcontainerd.cio.ends import Wait

_log = structlog.get_logger("libcontainerd")

_IDLE_SECONDS: Final = 1.0
_STALL_SECONDS: Final = 0.01
_EAGER_WORKERS: Final = 4
_TURNS: Final = 16
"""Chunks that a copy may move while others are queued."""

Steps: TypeAlias = "Generator[Wait, None, None]"
"""A copy's doing: yields what it must wait for, or ``()`` when it could go on at once."""


class Copy:
    """One stream being copied, from `start` until the end of its stream or `cancel`. Safe to use from any thread."""

    def __init__(self, steps: Steps, at_end: Callable[[], object] | None = None) -> None:
        """Prepare a copy.

        Args:
            steps: What it does. The first step runs in the thread that starts the copy, the others in workers.
            at_end: Called once when the copy has ended in whatever way, before `wait` returns from an end that was
                not a cancellation.
        """
        self.steps = steps
        self.at_end = at_end
        # The pump's lock guards the two.
        self.cancelled = False
        self.waiting_for: Wait | None = None
        self._over = threading.Event()
        self._pid = os.getpid()

    def start(self) -> None:
        """Set the copy going.

        Raises:
            OSError: no descriptor or no thread can be had.
        """
        _pump.start(self)

    def cancel(self) -> None:
        """Stop, and let `wait` return at once, also where a destination is still busy with the last chunk."""
        if os.getpid() == self._pid:
            _pump.cancel(self)
            self._over.set()

    def wait(self) -> None:
        """Return when the last byte was delivered, or the copy was cancelled."""
        if os.getpid() == self._pid:
            self._over.wait()

    def finish(self) -> None:
        """For the pump: end the generator, and say so."""
        self.steps.close()
        if self.at_end is not None:
            self.at_end()
        self._over.set()


class Pump:
    """The watcher, the queue and the workers. There is one per process."""

    def __init__(self) -> None:
        # Guards every field below and the two of each copy. Innermost: no other lock, no step of a copy and no callback
        # under it. Only calls that never wait for anybody else's doing are made: epoll_ctl, an eventfd, thread starts.
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._alive: set[Copy] = set()
        self._waiting: dict[int, dict[Copy, int]] = {}
        self._ready: deque[Copy] = deque()
        self._workers = 0
        self._idle = 0
        self._served = 0
        self._epoll: select.epoll | None = None
        self._wake = -1

    # ------------------------------------------------------------------------------------------ the copies' side

    def start(self, copy: Copy) -> None:
        """Take the copy's first step and wait for what it asks for."""
        try:
            wait = next(copy.steps, None)
            if wait is not None and self._take_in(copy, wait):
                return
        except BaseException:
            copy.finish()
            raise
        copy.finish()

    def _take_in(self, copy: Copy, wait: Wait) -> bool:
        with self._lock:
            if copy.cancelled:
                return False
            self._alive.add(copy)
            try:
                self._ensure_watcher()
                self._park(copy, wait)
            except BaseException:
                self._forget(copy)
                raise
            return True

    def cancel(self, copy: Copy) -> None:
        """Stop the copy: now where it waits, at its next step where a worker has it."""
        with self._lock:
            copy.cancelled = True
            waiting = copy.waiting_for is not None
            self._unpark(copy)
            if waiting:
                self._forget(copy)
        if waiting:
            copy.finish()

    def _forget(self, copy: Copy) -> None:
        self._alive.discard(copy)
        if not self._alive and self._epoll is not None:
            os.eventfd_write(self._wake, 1)  # the watcher sleeps without end while there are copies

    def _park(self, copy: Copy, wait: Wait) -> None:
        """Have the copy wait.

        Raises:
            OSError: there is a descriptor that cannot be waited for; the copy waits for none.
        """
        copy.waiting_for = wait
        try:
            for fd, events in wait:
                self._waiting.setdefault(fd, {})[copy] = events
                self._arm(fd)
        except BaseException:
            self._unpark(copy)
            raise

    def _unpark(self, copy: Copy) -> None:
        for fd, _ in copy.waiting_for or ():
            copies = self._waiting.get(fd, {})
            copies.pop(copy, None)
            if not copies:
                self._waiting.pop(fd, None)
            with suppress(OSError):
                self._arm(fd)
        copy.waiting_for = None

    def _arm(self, fd: int) -> None:
        """Tell epoll what is waited for on a descriptor.

        What the kernel has under this number may be another file's, closed without our knowing. One-shot keeps such a
        leftover from firing more than once, and a copy that is woken for nothing waits again.
        """
        epoll = self._epoll
        if epoll is None:
            return
        if not (copies := self._waiting.get(fd)):
            epoll.unregister(fd)
            return
        events = select.EPOLLONESHOT
        for mask in copies.values():
            events |= mask
        try:
            epoll.register(fd, events)
        except FileExistsError:
            epoll.modify(fd, events)

    def close_inherited(self) -> None:
        """Close, in a forked child, what it has of its parent's pump; the parent's own is not touched by that."""
        epoll, wake = self._epoll, self._wake
        if epoll is not None:
            epoll.close()
            os.close(wake)

    # --------------------------------------------------------------------------------------------- the watcher

    def _ensure_watcher(self) -> None:
        if self._epoll is not None:
            return
        epoll, wake = select.epoll(), -1
        try:
            wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            epoll.register(wake, select.EPOLLIN)
            self._epoll, self._wake = epoll, wake
            _start_thread(self._watch, "libcontainerd-pump", epoll, wake)
        except BaseException:
            self._epoll, self._wake = None, -1
            epoll.close()
            if wake >= 0:
                os.close(wake)
            raise

    def _watch(self, epoll: select.epoll, wake: int) -> None:
        idle = _IDLE_SECONDS
        timeout: float | None = idle
        served, since = 0, 0.0
        while True:
            happened = epoll.poll(timeout)
            now = time.monotonic()
            with self._lock:
                if not self._ready or served != self._served:
                    served, since = self._served, now
                for fd, mask in happened:
                    self._dispatch(fd, mask)
                short = 0
                if self._ready:
                    wanted = self._wanted(stalled=now - since >= _STALL_SECONDS)
                    since = now if wanted else since
                    short = self._hire(wanted)
                    timeout = _STALL_SECONDS
                elif self._alive:
                    timeout = None
                elif happened or timeout != idle:
                    timeout = idle
                else:
                    self._epoll, self._wake = None, -1
                    epoll.close()
                    os.close(wake)
                    return
            if short:
                _log.warning("pump_threads_not_started", missing=short)
                timeout = idle

    def _dispatch(self, fd: int, mask: int) -> None:
        """Queue the copies that waited for this."""
        if fd == self._wake:
            os.eventfd_read(fd)
            return
        copies = self._waiting.get(fd, {})
        trouble = mask & (select.EPOLLERR | select.EPOLLHUP)  # is everybody's, asked for or not
        for copy in [copy for copy, events in copies.items() if trouble or mask & events]:
            self._unpark(copy)
            self._ready.append(copy)
        if copies:
            with suppress(OSError):
                self._arm(fd)

    def _wanted(self, *, stalled: bool) -> int:
        """How many workers to add: at once while there are few, later only where all are stuck."""
        queued = len(self._ready)
        wanted = min(queued - self._idle, _EAGER_WORKERS - self._workers)
        if wanted <= 0 and stalled and not self._idle:
            wanted = min(queued, self._workers)
        return max(wanted, 0)

    def _hire(self, wanted: int) -> int:
        """Wake idle workers for the queue and add as many as are wanted; say how many could not be started."""
        self._work.notify(len(self._ready))
        for started in range(wanted):
            try:
                _start_thread(self._work_off, "libcontainerd-copy")
            except RuntimeError:
                return wanted - started
            self._workers += 1
        return 0

    # --------------------------------------------------------------------------------------------- the workers

    def _work_off(self) -> None:
        while (copy := self._next()) is not None:
            self._advance(copy)

    def _next(self) -> Copy | None:
        with self._lock:
            while not self._ready:
                notified = False
                if self._idle < _EAGER_WORKERS:
                    self._idle += 1
                    notified = self._work.wait(_IDLE_SECONDS)
                    self._idle -= 1
                if not notified and not self._ready:
                    self._workers -= 1
                    return None
            self._served += 1
            return self._ready.popleft()

    def _advance(self, copy: Copy) -> None:
        """Take the copy's steps until it waits, has ended, or has had its turn."""
        turns = 0
        wait: Wait | None = ()
        while True:
            with self._lock:
                if wait is None or copy.cancelled:
                    self._forget(copy)
                    break
                if self._put_by(copy, wait, turns):
                    return
            turns += 1
            try:
                wait = next(copy.steps, None)
            except Exception:  # noqa: BLE001 # the worker lives on for the other copies
                _log.error("copy_failed", exc_info=True)
                wait = None
        copy.finish()

    def _put_by(self, copy: Copy, wait: Wait, turns: int) -> bool:
        """Have the copy wait, or stand in the queue again after its turn; say whether it now does."""
        if wait:
            try:
                self._park(copy, wait)
            except (OSError, ValueError):
                # EPERM: such a file (a regular one, /dev/null) is always ready. EBADF, or -1: it was closed, and the
                # next step will say so. And where the kernel has no room for another watch, trying again is all there is.
                pass
            else:
                return True
        if turns < _TURNS or not self._ready:
            return False
        self._ready.append(copy)
        return True


def _start_thread(target: Callable[..., None], name: str, *args: object) -> None:
    threading.Thread(target=target, name=name, args=args, daemon=True).start()


_pump: Pump = Pump()


def _start_afresh_in_child() -> None:
    global _pump  # the child has none of the parent's threads, and its locks may be held by one of them
    inherited, _pump = _pump, Pump()
    inherited.close_inherited()


os.register_at_fork(after_in_child=_start_afresh_in_child)
