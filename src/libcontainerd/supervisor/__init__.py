"""A containerd of our own: its configuration, start, wait for serving, and stop.

A `Supervisor` runs one containerd in two directories, and writes nothing outside of them:

- ``state_dir``: ``containerd.toml`` (0600), ``containerd.pid``, ``containerd.lock``, ``containerd.sock`` and its
  ``.ttrpc`` twin unless the options name another address, and ``daemon/`` (what containerd calls state);
- ``root_dir``: ``containerd.lock`` and ``daemon/`` (what containerd calls root: content, snapshots, metadata).

containerd's shims and clients do: sockets, FIFOs and runc's state in ``/run/containerd``, the cgroups ``/NAMESPACE/ID``.
These are shared by every containerd of a machine, so give each one namespaces of its own.

Two threads, both daemons: one starts the child, reads its log and reaps it; one hands the log on, so that a consumer
that is slow never fills the pipe and so blocks containerd. Needs Linux 5.3 (pidfd).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import weakref
from enum import Enum
from typing import TYPE_CHECKING, Final

import grpc
from grpc_health.v1 import health_pb2

from libcontainerd._wire.connection import Address, Deadline, open_channel
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
from libcontainerd.supervisor.child import Child, Log
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

if TYPE_CHECKING:
    from collections.abc import Callable
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
_LINES_IN_ERROR: Final = 30


class _Phase(Enum):
    IDLE = "idle"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"


class Supervisor:
    """Runs a private containerd: starts it, waits until it serves, stops it.

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
        # Guards all below. A leaf, but for the setting of events. Re-entrant, because a signal handler that calls stop()
        # may interrupt the thread that is inside.
        self._changed = threading.Condition(threading.RLock())
        self._phase = _Phase.IDLE
        self._actor = 0  # the thread that starts or stops it just now
        self._cancelled = False
        self._undo = contextlib.ExitStack()  # what ends a running one, last first
        self._locks: list[claim.DirectoryLock] = []
        self._child: Child | None = None
        self._log: Log | None = None
        self._waiters: set[threading.Event] = set()

    @property
    def address(self) -> str:
        """The path of containerd's socket."""
        return self._address

    @property
    def pid(self) -> int | None:
        """The process id of containerd, or None while it does not run."""
        with self._changed:
            child = self._child
        return child.pid or None if child and not child.exited else None

    def log_tail(self) -> tuple[str, ...]:
        """Return the last lines of containerd's log, 200 at most; after its end too, until the next start."""
        with self._changed:
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
            SystemFailureError: containerd ended; the message has its exit code and the end of its log.
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
        """Wait until containerd answers a health check; fails at once when it ends.

        Args:
            timeout: Seconds; None: the option ``start_timeout``.

        Raises:
            FailedPreconditionError: It has not been started.
            SystemFailureError: containerd ended; the message has its exit code and the end of its log.
            DeadlineExceededError: It did not serve in time; the message has the end of its log.
            CallCancelledError: ``stop()`` was called.
        """
        timeout = self._options.start_timeout if timeout is None else timeout
        deadline = Deadline(timeout)
        news = threading.Event()
        with self._changed:
            if self._phase is _Phase.IDLE:
                raise FailedPreconditionError(
                    f"cannot wait for containerd at {self._address}: it is not started"
                )
            self._waiters.add(news)
        try:
            trouble, attempt = "nobody listens there", 0
            while trouble:
                pause = _PROBE_PAUSES[min(attempt, len(_PROBE_PAUSES) - 1)]
                attempt += 1
                self._wait(news, min(pause, deadline.remaining()))
                if not (left := deadline.remaining()):
                    raise DeadlineExceededError(
                        f"containerd does not serve at {self._address} after {timeout:g} s: {trouble}"
                        f"{self._log_in_error()}"
                    )
                # A channel that finds no socket waits before it tries again, longer than containerd takes to start.
                if claim.answers(self._address):
                    trouble = self._probe(news, min(left, _PROBE_TIMEOUT))
        finally:
            with self._changed:
                self._waiters.discard(news)

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
            child = Child([binary, "--config", self._configuration_file], variables, log, self._note_exit)
            undo.callback(child.stop, self._options.stop_timeout)
            with self._changed:
                self._log, self._child = log, child
            undo.callback(atexit.unregister, atexit.register(self.stop))
            child.start()
            doing = f"write {self._pid_file}"
            claim.write_pid_file(self._pid_file, child.pid)
        except (
            OSError,
            RuntimeError,
        ) as error:  # RuntimeError is what threading raises where no thread can be made
            raise _failure(doing, error) from error
        self.wait_serving()

    def _claim(self, undo: contextlib.ExitStack) -> None:
        """Make the directories and take them, and see that nobody has the sockets."""
        for directory in (self._state_dir, self._root_dir, *map(os.path.dirname, self._sockets)):
            os.makedirs(directory, mode=0o711, exist_ok=True)
        _supervisors.add(self)
        for directory in (self._state_dir, self._root_dir):
            lock = claim.DirectoryLock(directory)
            undo.callback(lock.release)
            with self._changed:
                self._locks.append(lock)
        claim.await_predecessor(self._pid_file, self._configuration_file)
        for path in self._sockets:
            claim.refuse_taken(path)

    def _become_idle(self) -> None:
        with self._changed:
            self._phase, self._actor = _Phase.IDLE, 0
            self._child = None
            self._locks = []
            self._announce()
            self._changed.notify_all()

    def _note_exit(self, child: Child) -> None:
        with self._changed:
            expected = self._cancelled or self._phase is not _Phase.RUNNING
            log = self._log
            self._announce()
        if log and child.pid:
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

    # ---------------------------------------------------------------------------------------------------- waiting

    def _announce(self) -> None:
        """Wake everybody in `wait_serving`. The caller holds the lock."""
        for news in self._waiters:
            news.set()

    def _refuse_cancelled(self) -> None:
        """Raise once `stop` has been called, or `start` has failed. The caller holds the lock."""
        if self._cancelled or self._phase is _Phase.IDLE:
            raise CallCancelledError(f"containerd at {self._address} was stopped while it was waited for")

    def _wait(self, news: threading.Event, seconds: float) -> None:
        """Wait for news or for so long, then raise if there is nothing to wait for any more."""
        news.wait(seconds)
        # Cleared before the look: what happens after it sets the event again.
        news.clear()
        with self._changed:
            self._refuse_cancelled()
            child = self._child
        if child and child.exited:
            raise SystemFailureError(
                f"containerd (process {child.pid}) {child.ending} before it served at {self._address}"
                f"{self._log_in_error()}"
            )

    def _probe(self, news: threading.Event, timeout: float) -> str:
        """Ask once, and return what is wrong, or nothing."""
        check = _HealthCheck(self._address, timeout, news.set)
        try:
            # The call ends by its own timeout; a second more is for its end to reach us.
            deadline = Deadline(timeout + 1.0)
            while not check.finished():
                if not deadline.remaining():
                    return "the health check has no answer"
                self._wait(news, deadline.remaining())
            return check.trouble()
        finally:
            check.close()

    def _log_in_error(self) -> str:
        lines = self.log_tail()[-_LINES_IN_ERROR:]
        return "\nthe end of its log:\n  " + "\n  ".join(lines) if lines else "; it logged nothing"


class _HealthCheck:
    """One health check under way. `done` is called on a thread of grpcio's when it has its answer."""

    def __init__(self, address: str, timeout: float, done: Callable[[], None]) -> None:
        self._channel = open_channel(Address(address, with_credentials=False))
        check = self._channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        self._call = check.future(health_pb2.HealthCheckRequest(), timeout=timeout)
        self._call.add_done_callback(lambda _: done())

    def finished(self) -> bool:
        return self._call.done()

    def trouble(self) -> str:
        """Return what is wrong, or nothing. Only for one that has finished."""
        try:
            status = self._call.result().status
        except grpc.RpcError as error:
            return f"the health check got {error.code().name}: {error.details()}"
        if status == health_pb2.HealthCheckResponse.SERVING:
            return ""
        return f"the health check got {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}"

    def close(self) -> None:
        self._channel.close()


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
