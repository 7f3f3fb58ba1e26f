"""One child process that dies with us: its log on the way to ours, its health, and the thread that watches over it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections import deque
from typing import IO, TYPE_CHECKING, Final

import grpc
import structlog
from grpc_health.v1 import health_pb2

from libcontainerd._wire.connection import Address, open_channel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Self

_logger = structlog.get_logger("libcontainerd")

_KILL_TIMEOUT: Final = 10.0  # seconds after SIGKILL: only a process stuck in the kernel needs more
_CLOSE_TIMEOUT: Final = 1.0  # seconds for a log's consumer to come to the end

_TAIL_LINES: Final = 200
_BACKLOG_LINES: Final = 10_000
_LINE_BYTES: Final = 16 * 1024
_READ_BYTES: Final = 64 * 1024

_LEVEL: Final = re.compile(r'(?:^|\s)level="?([a-z]+)')
_METHODS: Final = {
    "trace": "debug",
    "debug": "debug",
    "warning": "warning",
    "warn": "warning",
    "error": "error",
    "fatal": "critical",
    "panic": "critical",
}

# The child becomes containerd by way of this program, because what it does has to be done between fork and exec, and a
# preexec_fn may deadlock where there are threads. setpriv of util-linux would set the death signal as well, but leaves
# open the race with a parent that died before, and keeps our signal mask: a SIGTERM that our program blocks would never
# reach containerd. By the time this runs Python has made SIGPIPE and SIGXFSZ ignored, which exec would hand on.
_LAUNCHER: Final = """\
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
    sys.exit("cannot tie containerd to its supervisor: " + os.strerror(ctypes.get_errno()))
if os.getppid() != int(sys.argv[1]):
    sys.exit("the supervisor has ended")
for number in signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM, signal.SIGINT, signal.SIGHUP:
    signal.signal(number, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, ())
os.umask(0o022)
try:
    os.execv(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"cannot run {sys.argv[2]}: {error.strerror}")
"""


class Log:
    """Takes lines and never waits; a thread of its own hands them on, and a consumer that hangs stops nobody."""

    def __init__(self) -> None:
        # Guards the five below. A leaf: nothing else is taken or called while it is held.
        self._changed = threading.Condition()
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._waiting: deque[tuple[str, str, dict[str, object]]] = deque()
        self._dropped = 0
        self._closed = False
        self._awaited: tuple[str, threading.Event] | None = None
        self._thread = threading.Thread(target=self._hand_on, name="containerd-log", daemon=True)
        self._thread.start()

    def line(self, line: str) -> None:
        """Take a line of containerd's, at the level that it states."""
        level = _LEVEL.search(line)
        with self._changed:
            self._tail.append(line)
            if self._awaited and self._awaited[0] in line:
                self._awaited[1].set()
        self.event(_METHODS.get(level[1], "info") if level else "info", "containerd_log", line=line)

    def event(self, method: str, event: str, **fields: object) -> None:
        """Take an event of our own about containerd, so that it comes after the lines before it."""
        with self._changed:
            if len(self._waiting) >= _BACKLOG_LINES:
                self._waiting.popleft()
                self._dropped += 1
            self._waiting.append((method, event, fields))
            self._changed.notify()

    def expect(self, text: str) -> threading.Event:
        """Return what is set when a line with `text` comes; the next call replaces it."""
        came = threading.Event()
        with self._changed:
            self._awaited = text, came
        return came

    def tail(self) -> tuple[str, ...]:
        """Return the last lines of containerd's, 200 at most."""
        with self._changed:
            return tuple(self._tail)

    def close(self) -> None:
        """Let what waits go out, within a second; what a consumer that hangs has not taken by then is dropped."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not threading.current_thread():
            self._thread.join(_CLOSE_TIMEOUT)
        with self._changed:
            self._waiting.clear()

    def _hand_on(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                method, event, fields = self._waiting.popleft()
                dropped, self._dropped = self._dropped, 0
            # The user's processors run here; one that fails must not end the log.
            with contextlib.suppress(Exception):
                if dropped:
                    _logger.warning("containerd_log_dropped", lines=dropped)
                getattr(_logger, method)(event, **fields)


class Lines:
    """Cuts a stream of bytes into lines, and a line that gets too long into pieces."""

    def __init__(self, sink: Callable[[str], None]) -> None:
        self._sink = sink
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        for line in whole:
            self._emit(line)
        while len(self._rest) > _LINE_BYTES:
            self._emit(self._rest[:_LINE_BYTES])
            self._rest = self._rest[_LINE_BYTES:]

    def finish(self) -> None:
        """Take what is left for the last line."""
        self._emit(self._rest)
        self._rest = b""

    def _emit(self, line: bytes) -> None:
        if line := line.rstrip(b"\r"):
            self._sink(line.decode(errors="replace"))


class Child:
    """One run of a program, and the thread that starts it, reads its log and reaps it.

    The kernel kills the program when the *thread* that forked it ends (prctl(2), PR_SET_PDEATHSIG), so that thread
    stays until the program is gone. A restart makes another Child.

    Args:
        arguments: The program's absolute path, and its arguments.
        environment: Its whole environment.
        log: Where its stdout and stderr go.
        on_exit: Called once, on the thread, when it has been reaped and its log been read.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Log,
        on_exit: Callable[[Child], None],
    ) -> None:
        self._arguments = arguments
        self._environment = environment
        self._log = log
        self._on_exit = on_exit
        self._begun = threading.Event()
        self._exited = threading.Event()
        self._error: OSError | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="containerd-supervisor", daemon=True)

    @property
    def pid(self) -> int:
        """Its process id; 0 before the start."""
        return self._process.pid if self._process else 0

    @property
    def exited(self) -> bool:
        """Whether it has been reaped, and the end of its log been read."""
        return self._exited.is_set()

    @property
    def exit_code(self) -> int | None:
        """Its exit code, or minus the number of the signal that killed it; None before."""
        return self._process.returncode if self._process else None

    @property
    def ending(self) -> str:
        """How it ended, in words."""
        code = self.exit_code
        if code is None or code >= 0:
            return f"exited with code {code}"
        names = {int(number): number.name for number in signal.Signals}
        return f"was killed by {names.get(-code, f'signal {-code}')}"

    def start(self) -> None:
        """Start it.

        Raises:
            OSError: The system would not.
            RuntimeError: There can be no more threads.
        """
        self._thread.start()
        self._begun.wait()
        if self._error is not None:
            raise self._error

    def stop(self, grace: float) -> None:
        """Ask it with SIGTERM, after `grace` seconds kill it; harmless on one that never started or has ended."""
        if self._thread.ident is None:
            return
        self._begun.wait()
        try:
            self._signal(signal.SIGTERM)
            self._exited.wait(grace)
        finally:
            if not self.exited:
                self._log.event("warning", "containerd_killed", pid=self.pid, grace=grace)
                self.kill()
        if self.exited:
            self._thread.join()

    def join(self) -> None:
        """Wait for its end, and until that has been told."""
        self._thread.join()

    def ask_for_stacks(self) -> None:
        """Have it write its goroutines' stacks to its log; one that is stopped is let go on for that."""
        self._signal(signal.SIGUSR1)
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill it, and wait until it is gone; one that is stuck in the kernel is said in the log and left."""
        self._signal(signal.SIGKILL)
        if not self._exited.wait(_KILL_TIMEOUT):
            self._log.event("error", "containerd_not_killed", pid=self.pid)

    def forget(self) -> None:
        """In a forked process: it is the parent's child, and this copy must not look for it."""
        if self._process and self._process.returncode is None:
            self._process.returncode = 0

    def _signal(self, number: signal.Signals) -> None:
        # Popen has a lock that keeps this from reaching a pid that was reaped and given to another.
        if self._process:
            self._process.send_signal(number)

    def _run(self) -> None:
        try:
            with contextlib.ExitStack() as opened:
                try:
                    process, handle, output = self._spawn(opened)
                except OSError as error:
                    self._error = error
                    return
                self._process = process
                self._begun.set()
                self._follow(handle, output)
                process.wait()
        finally:
            self._exited.set()
            self._begun.set()
            self._on_exit(self)

    def _spawn(self, opened: contextlib.ExitStack) -> tuple[subprocess.Popen[bytes], int, IO[bytes]]:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *self._arguments],
            bufsize=0,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=self._environment,
            # Control-C at our terminal is for us; containerd is stopped in its turn.
            start_new_session=True,
        )
        assert process.stdout is not None  # noqa: S101 (PIPE makes it so)
        output = opened.enter_context(process.stdout)
        try:
            os.set_blocking(output.fileno(), False)
            handle = os.pidfd_open(process.pid)
        except OSError:
            process.kill()
            process.wait()
            raise
        opened.callback(os.close, handle)
        return process, handle, output

    def _follow(self, handle: int, output: IO[bytes]) -> None:
        """Read the log until the process has ended: not until EOF, for a descendant may keep the pipe for longer."""
        lines = Lines(self._log.line)
        poller = select.poll()
        poller.register(output.fileno(), select.POLLIN)
        poller.register(handle, select.POLLIN)
        # What it wrote is not more than the pipe holds once it has ended; a descendant that kept it may write for ever.
        left = fcntl.fcntl(output, fcntl.F_GETPIPE_SZ)
        while left > 0:
            ready = {descriptor for descriptor, _ in poller.poll()}
            if output.fileno() in ready:
                data = output.read(_READ_BYTES)
                lines.feed(data)
                if handle in ready:
                    left -= len(data)
                if not data:
                    poller.unregister(output.fileno())
            elif handle in ready:
                break
        lines.finish()


class Health:
    """A channel to the health service of one containerd. For use in a `with`, by one thread."""

    def __init__(self, address: str) -> None:
        self._channel = open_channel(Address(address, with_credentials=False))
        self._check = self._channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def ask(self, timeout: float, done: Callable[[], None]) -> Question:
        """Begin a check. One who is not there yet is waited for.

        Args:
            timeout: Seconds until it fails.
            done: Called on a thread of grpcio's when it has finished.
        """
        call = self._check.future(health_pb2.HealthCheckRequest(), timeout=timeout, wait_for_ready=True)
        call.add_done_callback(lambda _: done())
        return Question(call)


class Question:
    """A check under way."""

    def __init__(self, call: grpc.CallFuture[health_pb2.HealthCheckResponse]) -> None:
        self._call = call

    def finished(self) -> bool:
        """Whether it has an answer, or will have none."""
        return self._call.done()

    def trouble(self) -> str:
        """Return what is wrong, or nothing."""
        if not self._call.done():
            return "the health check has no answer"
        try:
            status = self._call.result().status
        except grpc.RpcError as error:
            return f"the health check got {error.code().name}: {error.details()}"
        if status == health_pb2.HealthCheckResponse.SERVING:
            return ""
        return f"the health check got {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}"


def watcher(watch: Callable[[], None]) -> threading.Thread:
    """Make the thread that checks the health and starts another child when one has ended."""
    return threading.Thread(target=watch, name="containerd-watcher", daemon=True)
