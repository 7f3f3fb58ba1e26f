"""Whose directories and sockets these are: locks, pid files, and files that are there whole or not at all."""

from __future__ import annotations

import fcntl
import os
import re
import select
import socket
import stat
import tempfile
from typing import IO, Final

import structlog

from libcontainerd.errors import ConflictError

_ORPHAN_TIMEOUT: Final = 2.0  # seconds for the kernel to kill a containerd whose supervisor has just died

_logger = structlog.get_logger("libcontainerd")


class DirectoryLock:
    """A directory taken by one supervisor on this machine, for as long as it lives; the file stays when it goes.

    Raises:
        ConflictError: Another one has it.
        OSError: The file cannot be opened or locked.
    """

    def __init__(self, directory: str) -> None:
        path = os.path.join(directory, "containerd.lock")
        self._file: IO[bytes] = open(path, "ab")  # noqa: SIM115 (it is the object's to close)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            if not isinstance(error, BlockingIOError):
                raise
            raise ConflictError(
                f"cannot run containerd: another supervisor uses {directory} (it has locked {path}); stop it, use"
                " other directories, or connect to the containerd that it runs"
            ) from error

    def release(self) -> None:
        """Give the directory up. A process forked meanwhile may hold the file too; this unlocks it all the same."""
        if not self._file.closed:
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()

    def forget(self) -> None:
        """In a forked process: let go of the file without unlocking the parent's."""
        self._file.close()


def write(path: str, data: bytes, mode: int) -> None:
    """Write a file that is there whole or not at all, whatever mode or kind the one before had."""
    directory, name = os.path.split(path)
    with tempfile.NamedTemporaryFile(dir=directory, prefix=f".{name}.", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.replace(file.name, path)
        except BaseException:
            unlink(file.name)
            raise


def unlink(path: str) -> None:
    """Remove a file if it is there; what cannot be removed is said in the log."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        _logger.warning("containerd_file_left", path=path, error=str(error))


def answers(path: str) -> bool:
    """Say whether somebody listens on this socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:  # a full backlog, or not for us: somebody's all the same
            return True
        return True


def refuse_taken(path: str) -> None:
    """Refuse an address that is somebody else's: containerd unlinks whatever it finds at its own.

    Raises:
        ConflictError: Somebody listens there, or there is something that is no socket.
    """
    if os.path.lexists(path) and not _is_socket(path):
        raise ConflictError(
            f"cannot run containerd: {path} exists and is no socket; remove it, or use another address"
        )
    if answers(path):
        raise ConflictError(f"cannot run containerd: somebody serves at {path} already; use another address")


def unlink_socket(path: str) -> None:
    """Remove the socket of a containerd that has ended, but never one that somebody else has put there."""
    if _is_socket(path) and not answers(path):
        unlink(path)


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def write_pid_file(path: str, pid: int) -> None:
    """Record a process: its pid, and its start time and executable, by which it is told from a later one of that pid."""
    # One that is gone has none, and whoever waits for it will say so better.
    if started := start_time(pid):
        write(path, f"{pid}\n{started}\n{_executable(pid) or '-'}\n".encode(), 0o644)


def await_predecessor(pid_file: str, configuration_file: str) -> None:
    """Refuse where the containerd of an earlier supervisor is still alive.

    The kernel kills it with its supervisor, but not in the same instant: who restarts a crashed program at once waits
    here for a moment. A pid alone is never trusted: a process is containerd's only if it started when the file says, runs
    the executable that the file says, and was given our configuration. The caller holds the directory's lock.

    Raises:
        ConflictError: It goes on living.
        OSError: The file cannot be read.
    """
    try:
        with open(pid_file, encoding="utf-8", errors="replace") as file:
            recorded = re.fullmatch(r"([1-9]\d{0,8})\n(\d+)\n(-|\d+:\d+)\n", file.read(128), re.ASCII)
    except FileNotFoundError:
        return
    if recorded is None:
        return
    pid, started, executable = int(recorded[1]), recorded[2], recorded[3]
    try:
        process = os.pidfd_open(pid)
    except OSError:  # gone, or a thread's id by now
        return
    try:
        ours = (
            start_time(pid) == started
            and executable in ("-", _executable(pid) or executable)
            and _may_have_been_given(pid, configuration_file)
        )
        if ours and not _ends_soon(process):
            raise ConflictError(
                f"cannot run containerd: the one of an earlier supervisor, process {pid}, still runs with"
                f" {configuration_file}; stop it first"
            )
    finally:
        os.close(process)


def start_time(pid: int) -> str | None:
    """When a process started, in ticks since boot; None if there is none. See proc(5) on stat.

    Its state is no matter: a process with many threads is shown as a zombie when the first of them has ended, while the
    others still hold its sockets.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return None


def _executable(pid: int) -> str | None:
    """The device and inode of what a process runs, also when the file has been replaced since; None if it is dying."""
    try:
        file = os.stat(f"/proc/{pid}/exe")
    except OSError:
        return None
    return f"{file.st_dev}:{file.st_ino}"


def _may_have_been_given(pid: int, argument: str) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            arguments = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return False
    # One that is dying has given up its memory, and its arguments with it.
    return not arguments or argument.encode() in arguments.split(b"\0")


def _ends_soon(process: int) -> bool:
    poller = select.poll()
    poller.register(process, select.POLLIN)
    return bool(poller.poll(_ORPHAN_TIMEOUT * 1000))
