"""A containerd of our own: its configuration, start, health, restart and stop.

A `Supervisor` runs one containerd in two directories, and writes nothing outside of them:

- ``state_dir``: ``containerd.toml`` (0600), ``containerd.pid``, ``containerd.lock``, ``containerd.sock`` and its
  ``.ttrpc`` twin unless the options name another address, and ``daemon/`` (what containerd calls state);
- ``root_dir``: ``containerd.lock`` and ``daemon/`` (what containerd calls root: content, snapshots, metadata).

containerd's shims and clients do: sockets, FIFOs and runc's state in ``/run/containerd``, the cgroups ``/NAMESPACE/ID``.
These are shared by every containerd of a machine, so give each one namespaces of its own.

Four threads, all daemons: one starts the child, reads its log and reaps it; one hands the log on, so that a consumer
that is slow never fills the pipe and so blocks containerd; one checks its health and starts it again; one looks for shims
that containerd has lost (`orphans`). Needs Linux 5.3 (pidfd).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Final

from libcontainerd._wire.connection import Deadline
from libcontainerd.errors import (
    CallCancelledError,
    ConflictError,
    DeadlineExceededError,
    FailedPreconditionError,
    LibcontainerdError,
    PermissionDeniedError,
    SystemFailureError,
)
from libcontainerd.supervisor import claim
from libcontainerd.supervisor.child import Child, Health, Log, watcher
from libcontainerd.supervisor.options import (
    TTRPC_SUFFIX,
    Options,
    absolute,
    configuration,
    environment,
    find_binary,
    invalid,
    socket_path,
)
from libcontainerd.supervisor.orphans import Sweeper

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

__all__ = ["Options", "Supervisor"]

_PROBE_TIMEOUT: Final = 3.0  # seconds for one health check, as in the original
_PROBE_PAUSES: Final = (
    0.0,
    0.01,
    0.01,
    0.02,
    0.02,
    0.05,
    0.1,
    0.2,
)  # seconds before each; the last one repeats
_SILENCE: Final = "nobody listens there"
_LINES_IN_ERROR: Final = 30

_CHECK_INTERVAL: Final = 0.5
_CHECKS_UNTIL_HUNG: Final = 3
_LATENESS: Final = 2.0
"""Seconds by which a check may be late. Later ones count for nothing: it was this program that did not get to run."""
_STACKS_END: Final = "END goroutine stack dump"
_STACKS_TIMEOUT: Final = 3.0

_LASTING: Final = 10.0  # seconds that a containerd must have served for its start to have been a good one
_BACKOFF_FIRST: Final = 0.1
_BACKOFF_MOST: Final = 30.0


class _Phase(Enum):
    IDLE = "idle"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"


class Supervisor:
    """Runs a private containerd: starts it, waits until it serves, keeps it running, stops it.

    One that dies, or that hangs, is started again in the same directories, by `Options.restart_attempts` at most, until
    ``stop()``. Of one that hangs the goroutines' stacks are asked for first; they are in the log.

    A context manager that starts it on entry and stops it on exit. All methods may be called from any thread. One that
    was stopped can be started again. One that is left running is stopped when the interpreter exits; should this
    process die without that, the kernel kills containerd (SIGKILL). Running containers survive both: their shims are
    in sessions of their own.

    In a process forked from this one, the copy is inert: it neither holds the directories nor stops containerd.

    Args:
        root_dir: Where containerd keeps what lasts. Made (0711) where missing.
        state_dir: Where the socket, the configuration and containerd's state are. Made (0711) where missing. Nobody
            else may be able to write there.
        options: How it is run; None: the defaults.

    Raises:
        InvalidParameterError: The directories or options cannot be used. Nothing has been touched.
    """

    def __init__(
        self,
        root_dir: str | os.PathLike[str],
        state_dir: str | os.PathLike[str],
        options: Options | None = None,
    ) -> None:
        self._options = options = Options() if options is None else options
        self._root_dir = absolute("root_dir", root_dir)
        self._state_dir = absolute("state_dir", state_dir)
        if self._root_dir == self._state_dir:
            raise invalid(f"root_dir and state_dir are both {self._root_dir}; containerd needs two")
        address = options.address or os.path.join(self._state_dir, "containerd.sock")
        self._address = socket_path("address", address, longest_suffix=TTRPC_SUFFIX)
        self._sockets = [self._address, self._address + TTRPC_SUFFIX]
        debug_address = options.debug_address and socket_path("debug_address", options.debug_address)
        if debug_address in self._sockets:
            raise invalid(f"debug_address {debug_address} is one of containerd's other sockets")
        if debug_address:
            self._sockets.append(debug_address)
        self._configuration = configuration(
            options,
            root=os.path.join(self._root_dir, "daemon"),
            state=os.path.join(self._state_dir, "daemon"),
            address=self._address,
            debug_address=debug_address,
        )
        self._configuration_file = os.path.join(self._state_dir, "containerd.toml")
        self._pid_file = os.path.join(self._state_dir, "containerd.pid")
        self._reset()

    def _reset(self) -> None:
        # Guards the phase and whose it is. A leaf, but for the setting of events. Re-entrant, because a signal handler that
        # calls stop() may interrupt the thread that is inside; and because that one then waits for our threads, they never
        # take it: what they write is one attribute, and is read whole.
        self._changed = threading.Condition(threading.RLock())
        self._phase = _Phase.IDLE
        self._actor = 0  # the thread that starts or stops it just now
        self._cancelled = False
        self._undo = contextlib.ExitStack()  # what ends a running one, last first
        self._locks: list[claim.DirectoryLock] = []
        self._child: Child | None = None
        self._log: Log | None = None
        self._failure: LibcontainerdError | None = None
        self._waiters: set[threading.Event] = set()

    @property
    def address(self) -> str:
        """The path of containerd's socket."""
        return self._address

    @property
    def pid(self) -> int | None:
        """The process id of containerd, or None while it does not run."""
        child = self._child
        return child.pid or None if child and not child.exited else None

    @property
    def failure(self) -> LibcontainerdError | None:
        """Why it was given up, with the end of its log; None before that, and after the next ``start()``."""
        return self._failure

    def log_tail(self) -> tuple[str, ...]:
        """Return the last lines of containerd's log, 200 at most; after its end too, until the next start."""
        log = self._log
        return log.tail() if log else ()

    def start(self) -> None:
        """Start containerd and wait until it serves, for ``start_timeout`` seconds at most.

        When this fails, what it made is gone again: process, sockets, configuration, pid file, threads, descriptors. The
        directories and their lock files stay.

        Raises:
            ConflictError: It is started already; another supervisor has one of the directories; the containerd of an
                earlier one is still alive; or the address is taken.
            InvalidParameterError: The binary is not there or not executable. Nothing has been touched.
            SystemFailureError: containerd ended; the message has its exit code and the end of its log. A first start is
                tried once: what is wrong with it is wrong with the next one too.
            DeadlineExceededError: It did not serve in time; the message has the end of its log.
            CallCancelledError: ``stop()`` was called meanwhile.
            PermissionDeniedError: A directory or file is out of this user's reach.
            FailedPreconditionError: This program does not know its Python interpreter (``sys.executable``), which is
                needed to tie containerd's life to its own.
        """
        with self._changed:
            if self._phase is not _Phase.IDLE:
                raise ConflictError(
                    f"cannot start containerd at {self._address}: it is {self._phase.value} already"
                )
            self._phase, self._actor, self._cancelled = _Phase.STARTING, threading.get_ident(), False
            self._failure = None
        try:
            with contextlib.ExitStack() as undo:
                self._bring_up(undo)
                with self._changed:
                    self._refuse_cancelled()
                    self._undo = undo.pop_all()
                    self._phase, self._actor = _Phase.RUNNING, 0
        except BaseException:
            self._become_idle()
            raise

    def wait_serving(self, timeout: float | None = None) -> None:
        """Wait until containerd answers a health check, also through its restarts; fails at once when it is given up.

        Args:
            timeout: Seconds; None: the option ``start_timeout``.

        Raises:
            FailedPreconditionError: It has not been started.
            SystemFailureError: It ended in its start, or was given up; the message has the end of its log.
            DeadlineExceededError: It did not serve in time; the message has the end of its log.
            CallCancelledError: ``stop()`` was called.
        """
        seconds = self._options.start_timeout if timeout is None else timeout
        deadline = Deadline(seconds)
        if self._phase is _Phase.IDLE:
            raise FailedPreconditionError(f"cannot wait for containerd at {self._address}: it is not started")
        with self._news() as news:
            self._await_serving(news, deadline, f"{seconds:g} s", child=None)

    def stop(self) -> None:
        """Stop containerd: SIGTERM, after ``stop_timeout`` seconds SIGKILL. Its containers go on running.

        Its pid file, sockets and configuration are removed. Idempotent. During a ``start()`` it makes that fail, and
        returns when all is undone; called by a signal handler that interrupted ``start()``, it returns at once.

        Raises:
            SystemFailureError: Something could not be cleaned up; all else has been, and containerd has ended.
            PermissionDeniedError: Likewise, for want of rights.
        """
        with self._changed:
            if self._phase is _Phase.IDLE:
                return
            self._cancelled = True
            self._announce()
            if self._phase is not _Phase.RUNNING:
                if self._actor != threading.get_ident():
                    self._changed.wait_for(lambda: self._phase is _Phase.IDLE)
                return
            self._phase, self._actor = _Phase.STOPPING, threading.get_ident()
            undo = self._undo
        try:
            undo.close()
        except OSError as error:
            raise _failure(f"clean up {self._state_dir}", error) from error
        finally:
            self._become_idle()

    def __enter__(self) -> Self:
        """Start it."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop it."""
        self.stop()

    # ------------------------------------------------------------------------------------------------- up and down

    def _bring_up(self, undo: contextlib.ExitStack) -> None:
        variables = environment(self._options)
        binary = find_binary(self._options.binary, variables["PATH"])
        if not sys.executable:
            raise FailedPreconditionError(
                "cannot run containerd: sys.executable is empty, so no Python can launch it"
            )
        doing = f"prepare {self._state_dir} and {self._root_dir}"
        try:
            self._claim(undo)
            doing = f"write in {self._state_dir}"
            undo.callback(claim.unlink, self._configuration_file)
            claim.write(self._configuration_file, self._configuration, 0o600)
            undo.callback(claim.unlink, self._pid_file)
            for path in self._sockets:
                undo.callback(claim.unlink_socket, path)
            doing = f"start {binary}"
            log = Log()
            undo.callback(log.close)
            undo.callback(atexit.unregister, atexit.register(self.stop))
            self._log = log
        except (
            OSError,
            RuntimeError,
        ) as error:  # RuntimeError is what threading raises where no thread can be made
            raise _failure(doing, error) from error
        undo.callback(self._end_child)
        command = _Command([binary, "--config", self._configuration_file], variables, log)
        with self._news() as news:
            self._launch(command, news)
        sweeper = Sweeper(self._address, log)
        thread = watcher(partial(self._watch, command, sweeper))
        undo.callback(self._end_watcher, thread)
        undo.callback(sweeper.stop)
        try:
            thread.start()
            sweeper.start()
        except RuntimeError as error:
            raise _failure("watch over containerd", error) from error

    def _claim(self, undo: contextlib.ExitStack) -> None:
        """Make the directories and take them, and see that nobody has the sockets."""
        for directory in (self._state_dir, self._root_dir, *map(os.path.dirname, self._sockets)):
            os.makedirs(directory, mode=0o711, exist_ok=True)
        _supervisors.add(self)
        for directory in (self._state_dir, self._root_dir):
            lock = claim.DirectoryLock(directory)
            undo.callback(lock.release)
            self._locks.append(lock)
        claim.await_predecessor(self._pid_file, self._configuration_file)
        for path in self._sockets:
            claim.refuse_taken(path)

    def _launch(self, command: _Command, news: threading.Event) -> None:
        """Run containerd and wait until it serves; one that does not is ended."""
        self._refuse_cancelled()
        self._child = child = Child(command.arguments, command.environment, command.log, self._note_exit)
        timeout = self._options.start_timeout
        doing = f"start {command.arguments[0]}"
        try:
            child.start()
            doing = f"write {self._pid_file}"
            claim.write_pid_file(self._pid_file, child.pid)
            self._await_serving(news, Deadline(timeout), f"{timeout:g} s", child)
            # Until now it may have been what launches containerd, and no more.
            claim.write_pid_file(self._pid_file, child.pid)
        except BaseException as error:
            child.stop(self._options.stop_timeout)
            if isinstance(error, OSError | RuntimeError) and not isinstance(error, LibcontainerdError):
                raise _failure(doing, error) from error
            raise

    def _end_watcher(self, thread: threading.Thread) -> None:
        self._cancelled = True
        self._announce()
        if thread.ident is not None:
            thread.join()

    def _end_child(self) -> None:
        if self._child:
            self._child.stop(self._options.stop_timeout)

    def _become_idle(self) -> None:
        with self._changed:
            self._phase, self._actor = _Phase.IDLE, 0
            self._child = None
            self._locks = []
            self._announce()
            self._changed.notify_all()

    def _note_exit(self, child: Child) -> None:
        expected = self._cancelled or self._phase is not _Phase.RUNNING
        self._announce()
        if (log := self._log) and child.pid:
            log.event(
                "info" if expected else "error", "containerd_exited", pid=child.pid, exit_code=child.exit_code
            )

    def _forget(self) -> None:
        """In a forked process: let go of what is the parent's."""
        for lock in self._locks:
            lock.forget()
        if self._child:
            self._child.forget()
        self._undo.pop_all()
        self._reset()

    # ------------------------------------------------------------------------------------------------ kept running

    def _watch(self, command: _Command, sweeper: Sweeper) -> None:
        """Keep it running until it is stopped or given up; on a thread of its own."""
        reason = ""
        with self._news() as news:
            try:
                self._keep_running(command, news, sweeper)
            except CallCancelledError:
                return
            except LibcontainerdError as error:
                reason = str(error)
            except Exception as error:  # noqa: BLE001 - whatever it is, nobody watches any more, and that is to be told
                reason = f"cannot watch over containerd: {error!r}"
        command.log.event("error", "containerd_given_up", error=reason)
        self._failure = SystemFailureError(reason)
        self._announce()

    def _keep_running(self, command: _Command, news: threading.Event, sweeper: Sweeper) -> None:
        attempt = 0
        while True:
            served_since = time.monotonic()
            self._check_until_it_ends(command.log, news)
            if time.monotonic() - served_since >= _LASTING:
                attempt = 0
            trouble = f"it {self._child.ending}{self._log_in_error()}" if self._child else ""
            while trouble:
                self._wait(news, min(_BACKOFF_FIRST * (2**attempt - 1), _BACKOFF_MOST))
                if attempt >= self._options.restart_attempts:
                    raise SystemFailureError(
                        f"containerd at {self._address} is given up after {attempt} attempts to start it again: {trouble}"
                    )
                attempt += 1
                command.log.event("warning", "containerd_restarting", attempt=attempt)
                try:
                    self._launch(command, news)
                except CallCancelledError:
                    raise
                except LibcontainerdError as error:
                    trouble = str(error)
                else:
                    trouble = ""
            command.log.event("info", "containerd_restarted", pid=self.pid)
            sweeper.soon()

    def _check_until_it_ends(self, log: Log, news: threading.Event) -> None:
        """Check its health twice a second, and end it when it hangs."""
        child = self._child
        failures = 0
        with Health(self._address) as health:
            while child and not child.exited:
                begun = time.monotonic()
                timeout = self._options.health_timeout
                trouble = self._probe(health, news, timeout, child)
                if not trouble:
                    failures = 0
                elif time.monotonic() - begun < timeout + _LATENESS:
                    failures += 1
                if failures >= _CHECKS_UNTIL_HUNG and not child.exited:
                    self._end_hung(child, log, news, trouble)
                elif not child.exited:
                    self._wait(news, _CHECK_INTERVAL)
        if child:
            child.join()  # its end is in the log before what follows from it

    def _end_hung(self, child: Child, log: Log, news: threading.Event, trouble: str) -> None:
        log.event("error", "containerd_hung", pid=child.pid, trouble=trouble)
        told = log.expect(_STACKS_END)
        child.ask_for_stacks()
        deadline = Deadline(_STACKS_TIMEOUT)
        while deadline.remaining() and not told.is_set() and not child.exited:
            self._wait(news, 0.02)
        child.kill()
        while (
            not child.exited
        ):  # stuck in the kernel, with our files and sockets: there can be no other beside it
            self._wait(news, _CHECK_INTERVAL)

    # ---------------------------------------------------------------------------------------------------- waiting

    @contextlib.contextmanager
    def _news(self) -> Iterator[threading.Event]:
        """An event that is set when a child has ended, when it is given up, and when it is stopped."""
        news = threading.Event()
        self._waiters.add(news)
        try:
            yield news
        finally:
            self._waiters.discard(news)

    def _announce(self) -> None:
        """Wake everybody who waits for news."""
        for news in list(self._waiters):
            news.set()

    def _refuse_cancelled(self) -> None:
        """Raise once `stop` has been called, or `start` has failed."""
        if self._cancelled or self._phase is _Phase.IDLE:
            raise CallCancelledError(f"containerd at {self._address} was stopped while it was waited for")

    def _wait(self, news: threading.Event, seconds: float) -> None:
        """Wait for news or for so long, then raise if there is nothing to wait for any more."""
        news.wait(seconds)
        # Cleared before the look: what happens after it sets the event again.
        news.clear()
        self._refuse_cancelled()

    def _await_serving(
        self, news: threading.Event, deadline: Deadline, timeout: str, child: Child | None
    ) -> None:
        """Wait until it serves: this run of it, or, without a child, whichever comes to.

        Raises:
            SystemFailureError: The run has ended, or it was given up.
            DeadlineExceededError: The deadline has passed.
            CallCancelledError: It was stopped.
        """
        trouble, attempt = _SILENCE, 0
        while trouble:
            pause = _PROBE_PAUSES[min(attempt, len(_PROBE_PAUSES) - 1)]
            attempt += 1
            self._wait(news, min(pause, deadline.remaining()))
            self._refuse_ended(child)
            if not (left := deadline.remaining()):
                raise DeadlineExceededError(
                    f"containerd does not serve at {self._address} after {timeout}: {trouble}{self._log_in_error()}"
                )
            # A channel that finds no socket waits before it tries again, longer than containerd takes to start.
            if claim.answers(self._address):
                with Health(self._address) as health:
                    found = self._probe(health, news, min(left, _PROBE_TIMEOUT), child)
                # A question that the deadline cuts short tells less than the one before it.
                if not found or trouble == _SILENCE or deadline.remaining():
                    trouble = found
                self._refuse_ended(child)

    def _refuse_ended(self, child: Child | None) -> None:
        if child and child.exited:
            raise SystemFailureError(
                f"containerd (process {child.pid}) {child.ending} before it served at {self._address}"
                f"{self._log_in_error()}"
            )
        if child is None and self._failure:
            raise SystemFailureError(str(self._failure))

    def _probe(self, health: Health, news: threading.Event, timeout: float, child: Child | None) -> str:
        """Ask once, and return what is wrong, or nothing; returns early when the child has ended."""
        question = health.ask(timeout, news.set)
        # The question ends by its own timeout; a second more is for its end to reach us.
        deadline = Deadline(timeout + 1.0)
        while not question.finished() and deadline.remaining() and not (child and child.exited):
            self._wait(news, deadline.remaining())
        return question.trouble()

    def _log_in_error(self) -> str:
        lines = self.log_tail()[-_LINES_IN_ERROR:]
        return "\nthe end of its log:\n  " + "\n  ".join(lines) if lines else "; it logged nothing"


@dataclass(frozen=True)
class _Command:
    """What runs containerd."""

    arguments: list[str]
    environment: dict[str, str]
    log: Log


def _failure(doing: str, error: Exception) -> LibcontainerdError:
    if isinstance(error, PermissionError):
        return PermissionDeniedError(f"cannot run containerd: cannot {doing}: {error} (run as root)")
    return SystemFailureError(f"cannot run containerd: cannot {doing}: {error}")


_supervisors: weakref.WeakSet[Supervisor] = weakref.WeakSet()


def _forget_all() -> None:
    # A forked process that kept the locks' files would keep the directories taken after our death.
    for supervisor in _supervisors:
        supervisor._forget()  # noqa: SLF001 (this module's own)


os.register_at_fork(after_in_child=_forget_all)
