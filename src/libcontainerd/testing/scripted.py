"""The scripted runtime: a process is what a test says it is. Nothing is forked, and no time passes."""

from __future__ import annotations

import errno
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from libcontainerd._wire.pb.cgroups.v1_pb2 import MemoryEntry, MemoryStat, Metrics, PidsStat
from libcontainerd.errors import DeadlineExceededError, InvalidParameterError
from libcontainerd.testing.processes import Execution, ProcessSpec, RuntimeFailure
from libcontainerd.testing.stdio import StdioClosedError

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from libcontainerd.testing.stdio import ShimStdio

_FIRST_PID: Final = 10_000_000  # beyond what Linux gives, so that no mistake can hit a real process
_IGNORED: Final = frozenset({signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH, signal.SIGSTOP})
_UNWIND_SECONDS: Final = 5.0


class ProcessEndedError(BaseException):
    """Unwinds a program whose process has ended: like a kill, it is not for programs to catch."""


Program = Callable[["ScriptedProcess"], "int | None"]
"""What a process does: reads, writes, and returns its exit code (None is 0).

It runs on a thread of its own. What it raises goes to the process's stderr, with exit code 1.
"""


class ScriptedProcess:
    """A process that a test plays. Thread-safe.

    Without a program it runs until it is told to `exit` or killed; with one, that program plays it.

    Attributes:
        spec: What it was asked to run.
        pid: Its pid, which no real process has.
        handled: Signals that do not end it; `wait_signal` gives them. None can be SIGKILL.
        signals: Every signal that it was sent.
        size: Its terminal's size, as last set: width and height.
        memory: What a checkpoint keeps of it, values as JSON has them: the process that is restored has it again.
    """

    def __init__(
        self,
        spec: ProcessSpec,
        stdio: ShimStdio,
        on_exit: Callable[[int], None],
        *,
        pid: int,
        program: Program | None,
    ) -> None:
        self.spec = spec
        self.pid = pid
        self.handled: set[int] = set()
        self.signals: list[int] = []
        self.size: tuple[int, int] | None = None
        self.memory: dict[str, object] = dict(spec.memory)
        self._stdio = stdio
        self._on_exit = on_exit
        self._program = program
        self._thread: threading.Thread | None = None
        # Guards the state below; innermost, nothing is called under it. Waiters wait on it.
        self._changed = threading.Condition(threading.Lock())
        self._caught: deque[int] = deque()
        self._started = False
        self._paused = False
        self._hung_up = False
        self._ended = False
        stdio.on_hang_up = self._hang_up

    def __repr__(self) -> str:
        name = self.spec.exec_id or "init"
        return f"<ScriptedProcess {name!r} of container {self.spec.container_id!r}, pid {self.pid}>"

    # What a program, or a test in its place, does.

    def write(self, data: bytes, stream: str = "stdout") -> None:
        """Write, and wait until all is in the FIFO: a client that does not read holds it up.

        Raises:
            ProcessEndedError: it has ended.
        """
        self._run_on()
        try:
            self._stdio.write(stream, data)
        except StdioClosedError as error:
            raise ProcessEndedError from error

    def read(self, size: int = 32768) -> bytes:
        """Read what is there on stdin, waiting for something; ``b""`` is the end.

        Raises:
            ProcessEndedError: it has ended.
        """
        self._run_on()
        try:
            data = self._stdio.read(size)
        except StdioClosedError as error:
            raise ProcessEndedError from error
        self._run_on()
        return data

    def read_all(self) -> bytes:
        """Read stdin to its end."""
        return b"".join(iter(self.read, b""))

    def close(self, stream: str) -> None:
        """Close ``stdout`` or ``stderr``."""
        self._stdio.close_output(stream)

    def wait_signal(self, timeout: float | None = None) -> int:
        """Give the next of the signals in `handled`, waiting for one.

        Raises:
            DeadlineExceededError: none came in time (seconds).
            ProcessEndedError: it has ended.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._caught or self._ended, timeout):
                raise DeadlineExceededError(f"{self!r} got no signal in {timeout} s")
            if self._ended:
                raise ProcessEndedError
            return self._caught.popleft()

    def wait_killed(self) -> int:
        """Do nothing until it is killed: never returns."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended)
        raise ProcessEndedError

    def exit(self, code: int = 0) -> None:
        """End with an exit code. Called by the program itself, this does not return.

        Raises:
            InvalidParameterError: the code is not 0 to 255.
        """
        if not 0 <= code <= 255:
            raise InvalidParameterError(f"an exit code is 0 to 255, not {code!r}")
        self._end(code)
        if threading.current_thread() is self._thread:
            raise ProcessEndedError

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._ended

    def wait_started(self, timeout: float) -> bool:
        """Wait until it was started; False when the time (seconds) is up."""
        with self._changed:
            return self._changed.wait_for(lambda: self._started, timeout)

    def _run_on(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._paused or self._ended)
            if self._ended:
                raise ProcessEndedError

    # What the shim does with it.

    def start(self) -> None:
        """Let it run."""
        with self._changed:
            self._started = True
            self._changed.notify_all()
        if self._program is not None:
            name = f"fake-containerd-{self.spec.container_id}-{self.spec.exec_id or 'init'}"
            self._thread = threading.Thread(target=self._play, name=name, daemon=True)
            self._thread.start()

    def _play(self) -> None:
        if self._program is None:
            return
        try:
            code = self._program(self)
        except ProcessEndedError:
            return
        except Exception:  # noqa: BLE001 - as a program's uncaught exception: told on stderr, exit code 1
            code = 1
            try:
                self.write(traceback.format_exc().encode(), "stderr")
            except ProcessEndedError:
                return
        try:
            self._run_on()  # what is frozen does not end
        except ProcessEndedError:
            return
        self._end(code or 0)

    def _end(self, status: int) -> None:
        with self._changed:
            if self._ended:
                return
            self._ended = True
            self._changed.notify_all()
        self._stdio.cancel()
        self._stdio.close_output("stdout")
        self._stdio.close_output("stderr")
        self._on_exit(status)

    def signal(self, number: int) -> None:
        """Take a signal: ignore, note or die of it, as a process would."""
        if number == 0:
            return
        if not 0 < number <= signal.SIGRTMAX:
            raise OSError(errno.EINVAL, "Invalid argument")
        with self._changed:
            if self._ended:
                return
            self.signals.append(number)
            if number in self.handled and number != signal.SIGKILL:
                self._caught.append(number)
                self._changed.notify_all()
                return
        if number not in _IGNORED:
            self._end(128 + number)

    def _hang_up(self) -> None:
        """Its terminal's input has ended: as the shim closes the terminal, its output ends too, and it is told by SIGHUP."""
        with self._changed:
            self._hung_up = True
            deaf = signal.SIGHUP not in self.handled and not self.spec.exec_id
        self._stdio.close_output("stdout")
        if not deaf:  # the first process of a pid namespace gets no signal that it does not handle
            self.signal(signal.SIGHUP)

    def pause(self) -> None:
        """Freeze it: whatever it does next waits."""
        with self._changed:
            self._paused = True

    def resume(self) -> None:
        """Thaw it."""
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def resize(self, width: int, height: int) -> None:
        """Note its terminal's size."""
        with self._changed:
            if self._hung_up:
                raise OSError(errno.EBADF, "Bad file descriptor")
            self.size = (width, height)
            self._changed.notify_all()

    def wait_size(self, timeout: float) -> tuple[int, int] | None:
        """Wait until its terminal was given a size; None when the time (seconds) is up."""
        with self._changed:
            self._changed.wait_for(lambda: self.size is not None, timeout)
            return self.size

    def pids(self) -> list[int]:
        """Its pid."""
        return [self.pid]

    def checkpoint(self) -> Mapping[str, object]:
        """Its memory."""
        return dict(self.memory)

    def drain(self) -> None:
        """All that it wrote is in the FIFO."""

    def release(self) -> None:
        """End it without a report, and wait until its program has unwound."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._stdio.cancel()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_UNWIND_SECONDS)


# ----------------------------------------------------------------------------------------------- ready-made programs


def prints(stdout: bytes = b"", *, stderr: bytes = b"", exit_code: int = 0) -> Program:
    """A program that writes and ends."""

    def program(process: ScriptedProcess) -> int:
        if stdout:
            process.write(stdout)
        if stderr:
            process.write(stderr, "stderr")
        return exit_code

    return program


def echoes(*, exit_code: int = 0) -> Program:
    """A program like ``cat``: writes what it reads, until its input ends."""

    def program(process: ScriptedProcess) -> int:
        for data in iter(process.read, b""):
            process.write(data)
        return exit_code

    return program


def fails_to_start(reason: str = "") -> Program:
    """A program that the runtime cannot start.

    Args:
        reason: What runc says; by default that there is no such executable.
    """

    def program(process: ScriptedProcess) -> int:
        name = process.spec.args[0] if process.spec.args else ""
        raise RuntimeFailure(
            reason or f'unable to start container process: exec: "{name}": executable file not found in $PATH'
        )

    program.__dict__["cannot_start"] = True
    return program


# ---------------------------------------------------------------------------------------------------------- runtime


class _Rule:
    def __init__(
        self, program: Program, container_id: str | None, exec_id: str | None, args: tuple[str, ...]
    ) -> None:
        self.program = program
        self.container_id = container_id
        self.exec_id = exec_id
        self.args = args

    def matches(self, spec: ProcessSpec) -> bool:
        return (
            self.container_id in (None, spec.container_id)
            and self.exec_id in (None, spec.exec_id)
            and tuple(spec.args[: len(self.args)]) == self.args
        )


class ScriptedRuntime:
    """Makes the processes that a test plays."""

    def __init__(self) -> None:
        # Guards the four below; innermost. `process` waits on it.
        self._changed = threading.Condition(threading.Lock())
        self._rules: list[_Rule] = []
        self._processes: dict[tuple[str, str, str], ScriptedProcess] = {}
        self._metrics: Message | None = None
        self._next_pid = _FIRST_PID

    def script(
        self, program: Program, container_id: str | None, exec_id: str | None, args: tuple[str, ...]
    ) -> None:
        """Say what processes do; a later rule comes before an earlier one."""
        with self._changed:
            self._rules.insert(0, _Rule(program, container_id, exec_id, args))

    def set_metrics(self, metrics: Message) -> None:
        """Say what tasks use."""
        with self._changed:
            self._metrics = metrics

    def create(self, spec: ProcessSpec, stdio: ShimStdio, on_exit: Callable[[int], None]) -> ScriptedProcess:
        """Make a process that waits to be started."""
        with self._changed:
            program = next((rule.program for rule in self._rules if rule.matches(spec)), None)
            pid = self._next_pid
            self._next_pid += 1
        if not spec.args:
            raise RuntimeFailure("args must not be empty")
        process = ScriptedProcess(spec, stdio, on_exit, pid=pid, program=program)
        if program is not None and getattr(program, "cannot_start", False):
            program(process)
        with self._changed:
            self._processes[(spec.namespace, spec.container_id, spec.exec_id)] = process
            self._changed.notify_all()
        return process

    def find(self, container_id: str, exec_id: str, namespace: str | None, timeout: float) -> ScriptedProcess:
        """The last process of that name, waiting for one that was started.

        Raises:
            DeadlineExceededError: there is none in time (seconds).
        """

        def look() -> ScriptedProcess | None:
            found = None
            for (space, container, process_id), process in self._processes.items():
                if (container, process_id) == (container_id, exec_id) and namespace in (None, space):
                    found = process
            return found

        with self._changed:
            self._changed.wait_for(look, timeout)
            process = look()
        if process is None or not process.wait_started(timeout):
            raise DeadlineExceededError(
                f"no process {exec_id or 'init'!r} of container {container_id!r} was started in {timeout:g} s"
            )
        return process

    def metrics(self, executions: list[Execution]) -> Message:
        """What was set, or something plausible."""
        with self._changed:
            if self._metrics is not None:
                return self._metrics
        return Metrics(
            pids=PidsStat(current=len(executions)),
            memory=MemoryStat(rss=1 << 20, usage=MemoryEntry(usage=1 << 20, limit=1 << 30)),
        )
