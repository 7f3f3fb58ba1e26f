"""The host runtime: processes really run, on this machine and as this user. Nothing isolates them.

A spec's command line, environment, working directory and terminal count. Its root filesystem is only a further place to look
for the program in; namespaces, mounts, limits, capabilities and users do not exist here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import struct
import subprocess
import termios
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from libcontainerd._wire.pb.cgroups.v1_pb2 import (
    CPUStat,
    CPUUsage,
    MemoryEntry,
    MemoryStat,
    Metrics,
    PidsStat,
)
from libcontainerd.testing.processes import Execution, ProcessSpec, RuntimeFailure
from libcontainerd.testing.stdio import StdioClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from libcontainerd.testing.stdio import ShimStdio

_CHUNK: Final = 32 << 10
_END_SECONDS: Final = 5.0
_SHORTEST_LIFE_SECONDS: Final = 0.03
"""No end is told sooner: runc never is that quick, and ctr lets go of FIFOs that it is still opening when the end comes."""

_SHELL: Final = "/bin/sh"
_MARKER: Final = "LIBCONTAINERD_FAKE"
# The process exists from Create on, and runs from Start on: it stops itself until then, under the pid that it keeps.
_LAUNCH: Final = 'kill -STOP $$; exec "$@"'
# The first terminal that a session's leader opens becomes the session's own.
_LAUNCH_IN_TERMINAL: Final = f'exec <>"$0" >&0 2>&0; {_LAUNCH}'


class HostRuntime:
    """Runs processes on this machine.

    Args:
        drain_seconds: How long output is waited for that a process's child still holds.

    What belongs to a container is known by a variable in its environment, which children inherit: that stands for the pid
    namespace that there is not.
    """

    def __init__(self, drain_seconds: float) -> None:
        self._id = uuid.uuid4().hex
        self._drain_seconds = drain_seconds

    def create(self, spec: ProcessSpec, stdio: ShimStdio, on_exit: Callable[[int], None]) -> HostProcess:
        """Make a process that waits to be started."""
        if not spec.args:
            raise RuntimeFailure("args must not be empty")
        # A relative one is within the bundle, where a shim makes it.
        if spec.root.startswith("/") and not spec.exec_id and not os.path.isdir(spec.root):
            raise RuntimeFailure(f"invalid rootfs: stat {spec.root}: no such file or directory")
        environment = _environment(spec)
        environment[_MARKER] = f"{self._id}/{spec.namespace}/{spec.container_id}"
        cwd = _working_directory(spec)
        program = _find_program(spec, environment, cwd)
        command = [program, *spec.args[1:]]
        return HostProcess(
            command,
            environment,
            cwd,
            stdio,
            on_exit,
            init=not spec.exec_id,
            drain_seconds=self._drain_seconds,
        )

    def metrics(self, executions: list[Execution]) -> Metrics:
        """What the processes use, as /proc tells it."""
        pids = {pid for each in executions for pid in each.pids()}
        ticks, pages = 0, 0
        for pid in pids:
            with suppress(OSError, ValueError, IndexError):
                fields = _stat(pid)
                ticks += int(fields[11]) + int(fields[12])
                pages += int(fields[21])
        rss = pages * os.sysconf("SC_PAGE_SIZE")
        return Metrics(
            pids=PidsStat(current=len(pids)),
            cpu=CPUStat(usage=CPUUsage(total=ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK"))),
            memory=MemoryStat(rss=rss, usage=MemoryEntry(usage=rss)),
        )


class HostProcess:
    """One process, what belongs to it, and the copying of its stdio. Thread-safe.

    To init belongs everything in its container; to an exec, itself alone: what it leaves behind lives as long as init.

    Attributes:
        pid: Its pid.
    """

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        cwd: str,
        stdio: ShimStdio,
        on_exit: Callable[[int], None],
        *,
        init: bool,
        drain_seconds: float,
    ) -> None:
        self._drain_seconds = drain_seconds
        self._marker = f"{_MARKER}={environment[_MARKER]}".encode()
        self._init = init
        self._stdio = stdio
        self._on_exit = on_exit
        self._began = time.monotonic()
        self._over = threading.Event()
        self._lock = (
            threading.Lock()
        )  # guards _reaped and _master against a signal or a size to what is no longer ours; innermost
        self._reaped = False
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._master = -1
        self._pipes: list[int] = []
        self._copiers: list[threading.Thread] = []
        self._released = threading.Lock()  # held for good by the one release
        if stdio.terminal:
            self._popen = self._spawn_in_terminal(command, environment, cwd)
        else:
            self._popen = self._spawn(command, environment, cwd)
        self.pid = self._popen.pid
        # Until it has stopped itself it is not the program yet, and a start would be lost.
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        for each in self._copiers:
            each.start()
        self._waiter = threading.Thread(
            target=self._wait, name=f"fake-containerd-wait-{self.pid}", daemon=True
        )
        self._waiter.start()

    # -------------------------------------------------------------------------------------------------- making it

    def _spawn(self, command: list[str], environment: dict[str, str], cwd: str) -> subprocess.Popen[bytes]:
        quiet = not self._stdio.stdout and not self._stdio.stderr
        popen = subprocess.Popen(
            [_SHELL, "-c", _LAUNCH, "sh", *command],
            stdin=subprocess.PIPE if self._stdio.stdin else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if quiet else subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else subprocess.PIPE,
            env=environment,
            cwd=cwd,
            start_new_session=True,
        )
        for name, pipe in (("stdout", popen.stdout), ("stderr", popen.stderr)):
            if pipe is not None:
                self._add_copier(self._copy_output, name, pipe.fileno())
        if popen.stdin is not None:
            self._add_copier(self._copy_input, "stdin", popen.stdin.fileno())
        return popen

    def _spawn_in_terminal(
        self, command: list[str], environment: dict[str, str], cwd: str
    ) -> subprocess.Popen[bytes]:
        self._master, slave = os.openpty()
        try:
            popen = subprocess.Popen(
                [_SHELL, "-c", _LAUNCH_IN_TERMINAL, os.ttyname(slave), *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                cwd=cwd,
                start_new_session=True,
            )
            os.waitid(os.P_PID, popen.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        finally:
            os.close(slave)
        if self._stdio.stdout:
            self._add_copier(self._copy_output, "stdout", self._master)
        if self._stdio.stdin:
            self._add_copier(self._copy_input, "stdin", self._master)
        return popen

    def _add_copier(self, copy: Callable[[str, int], None], stream: str, fd: int) -> None:
        os.set_blocking(fd, False)
        self._pipes.append(fd)
        name = f"fake-containerd-{stream}"
        self._copiers.append(threading.Thread(target=copy, args=(stream, fd), name=name, daemon=True))

    # ------------------------------------------------------------------------------------------------- copying its IO

    def _ready(self, fd: int, events: int) -> bool:
        """Wait until a descriptor can be used; False when copying is to stop."""
        poller = select.poll()
        poller.register(fd, events)
        poller.register(self._stop, select.POLLIN)
        return all(ready != self._stop for ready, _ in poller.poll())

    def _copy_output(self, stream: str, fd: int) -> None:
        try:
            while self._ready(fd, select.POLLIN):
                try:
                    data = os.read(fd, _CHUNK)
                except BlockingIOError:
                    continue
                except OSError:  # the terminal's last user is gone
                    break
                if not data:
                    break
                self._stdio.write(stream, data)
        except StdioClosedError:
            return
        finally:
            self._stdio.close_output(stream)

    def _copy_input(self, _stream: str, fd: int) -> None:
        ended = False
        with suppress(StdioClosedError, OSError):
            for data in iter(self._stdio.read, b""):
                view = memoryview(data)
                while view and self._ready(fd, select.POLLOUT):
                    with suppress(BlockingIOError):
                        view = view[os.write(fd, view) :]
                if view:
                    break
            else:
                ended = True
        if self._popen.stdin is not None:
            with suppress(OSError):
                self._popen.stdin.close()
        elif ended:
            self._hang_up()

    def _hang_up(self) -> None:
        """Close the terminal, as the shim does when the terminal's input has ended: its output ends, and SIGHUP comes."""
        os.eventfd_write(self._stop, 1)
        for each in self._copiers:
            if each is not threading.current_thread():
                each.join()  # one that a client holds up ends at the latest with the process's release
        self._close_terminal()

    def _close_terminal(self) -> None:
        with self._lock:
            master, self._master = self._master, -1
            if master >= 0:
                os.close(master)

    # --------------------------------------------------------------------------------------------------- its execution

    def start(self) -> None:
        """Let it run."""
        self._began = time.monotonic()
        self._send(self.pid, signal.SIGCONT)

    def _wait(self) -> None:
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        self._signal_all(signal.SIGKILL)  # as the end of a pid namespace's init ends the others in it
        with self._lock:
            self._reaped = True
        code = self._popen.wait()
        if not self._over.wait(self._began + _SHORTEST_LIFE_SECONDS - time.monotonic()):
            self._on_exit(128 - code if code < 0 else code)

    def _send(self, pid: int, number: int) -> None:
        with self._lock:
            if not self._reaped:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def _signal_all(self, number: int) -> None:
        for pid in self.pids():
            self._send(pid, number)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        if not 0 <= number <= signal.SIGRTMAX:
            raise OSError(22, "Invalid argument")
        self._send(self.pid, number)

    def pause(self) -> None:
        """Stop what belongs to it."""
        self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal_all(signal.SIGCONT)

    def resize(self, width: int, height: int) -> None:
        """Set its terminal's size."""
        if not self._stdio.terminal:
            return
        with self._lock:
            if self._master < 0:
                raise OSError(errno.EBADF, "Bad file descriptor")
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def pids(self) -> list[int]:
        """The pids of what belongs to it, its own first."""
        found = [] if self._reaped else [self.pid]
        if self._init:
            found += sorted(pid for pid in _pids_marked(self._marker) if pid != self.pid)
        return found

    # ----------------------------------------------------------------------------------------------------------- its end

    def checkpoint(self) -> Mapping[str, object]:
        """Nobody here can do that."""
        raise RuntimeFailure('CRIU version check failed: exec: "criu": executable file not found in $PATH')

    def drain(self) -> None:
        """Let its output to the end, for some seconds: a child that holds it longer loses it."""
        deadline = time.monotonic() + self._drain_seconds
        for each in self._copiers:
            if not each.name.endswith("stdin"):
                each.join(max(0.0, deadline - time.monotonic()))

    def release(self) -> None:
        """End it, stop the copying, and close every descriptor; idempotent."""
        if not self._released.acquire(blocking=False):
            return
        self._over.set()
        self._signal_all(signal.SIGKILL)
        if threading.current_thread() is not self._waiter:
            self._waiter.join(_END_SECONDS)
        os.eventfd_write(self._stop, 1)
        self._stdio.cancel()
        for each in self._copiers:
            each.join(_END_SECONDS)
        for pipe in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        self._close_terminal()
        os.close(self._stop)


def _pids_marked(marker: bytes) -> Iterator[int]:
    """Yield the pids of the processes that have a variable in their environment; zombies have none."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with suppress(OSError):
                if marker in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                    yield int(name)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on: what is before holds the program's own name."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _environment(spec: ProcessSpec) -> dict[str, str]:
    entries = spec.process.get("env")
    pairs = [str(each).partition("=") for each in entries] if isinstance(entries, list) else []
    return {name: value for name, separator, value in pairs if separator}


def _working_directory(spec: ProcessSpec) -> str:
    cwd = str(spec.process.get("cwd") or "/")
    for candidate in (cwd, f"{spec.root}{cwd}" if spec.root else ""):
        if candidate and os.path.isdir(candidate):
            return candidate
    raise RuntimeFailure(
        f'unable to start container process: chdir to cwd ("{cwd}") set in config.json failed: no such file or directory'
    )


def _find_program(spec: ProcessSpec, environment: dict[str, str], cwd: str) -> str:
    """Look for the program on this machine, then in the container's root."""
    name = spec.args[0]
    doing = f'unable to start container process: exec: "{name}"'
    if "/" in name:
        places = [os.path.join(cwd, name)]
    else:
        places = [os.path.join(each or ".", name) for each in environment.get("PATH", "").split(":") if each]
    candidates = places + ([f"{spec.root}/{place.lstrip('/')}" for place in places] if spec.root else [])
    for candidate in candidates:
        if os.path.isfile(candidate) and os.access(candidate, os.X_OK):
            return candidate
    if "/" not in name:
        raise RuntimeFailure(f"{doing}: executable file not found in $PATH")
    if any(os.path.exists(candidate) for candidate in candidates):
        raise RuntimeFailure(f"{doing}: permission denied")
    raise RuntimeFailure(f"{doing}: stat {name}: no such file or directory")
