"""Who has a directory, a socket or a pid: only what is really ours is trusted, and nothing else is touched."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from libcontainerd.errors import ConflictError
from libcontainerd.supervisor import claim


@contextmanager
def listening(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        yield


@contextmanager
def process_given(*arguments: str, seconds: float = 60.0) -> Iterator[subprocess.Popen[bytes]]:
    command = [
        sys.executable,
        "-S",
        "-c",
        f"import time; print(flush=True); time.sleep({seconds})",
        *arguments,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process
        finally:
            process.kill()


def test_a_directory_has_one_owner(tmp_path: Path, no_leaks: None) -> None:
    first = claim.DirectoryLock(str(tmp_path))
    with pytest.raises(ConflictError, match=str(tmp_path)):
        claim.DirectoryLock(str(tmp_path))
    first.release()
    first.release()

    claim.DirectoryLock(str(tmp_path)).release()


def test_a_file_that_is_forgotten_leaves_the_parents_lock(tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "from libcontainerd.supervisor import claim\n"
        "lock = claim.DirectoryLock(sys.argv[1])\n"
        "if os.fork() == 0:\n"
        "    lock.forget()\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "try:\n"
        "    claim.DirectoryLock(sys.argv[1])\n"
        "except claim.ConflictError:\n"
        "    print('kept')\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=30, check=True
    )

    assert answer.stdout == "kept\n"


def test_a_file_is_written_whole_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "file"
    other = tmp_path / "other"
    other.write_text("theirs")
    path.symlink_to(other)

    claim.write(str(path), b"ours", 0o600)

    assert path.read_bytes() == b"ours"
    assert path.lstat().st_mode == 0o100600
    assert other.read_text() == "theirs"
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", "other"}


def test_a_file_that_cannot_be_put_in_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()

    with pytest.raises(IsADirectoryError):
        claim.write(str(tmp_path / "file"), b"ours", 0o600)

    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_an_address_that_somebody_has_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listening(path):
        with pytest.raises(ConflictError, match="somebody serves"):
            claim.refuse_taken(str(path))
        claim.unlink_socket(str(path))
        assert path.is_socket()

    # Nobody listens any more: what is left of it may be replaced.
    claim.refuse_taken(str(path))
    claim.unlink_socket(str(path))
    assert not path.exists()
    claim.unlink_socket(str(path))
    claim.refuse_taken(str(path))


def test_a_full_backlog_is_somebody(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as waiting:
        server.bind(path)
        server.listen(0)
        waiting.connect(path)

        assert claim.answers(path)


def test_a_file_at_the_address_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("data")

    with pytest.raises(ConflictError, match="is no socket"):
        claim.refuse_taken(str(path))
    claim.unlink_socket(str(path))

    assert path.read_text() == "data"


def test_an_earlier_containerd_that_lives_on_is_refused_and_not_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "_ORPHAN_TIMEOUT", 0.05)
    pid_file, configuration = str(tmp_path / "pid"), str(tmp_path / "containerd.toml")
    with process_given("--config", configuration) as process:
        claim.write_pid_file(pid_file, process.pid)

        with pytest.raises(ConflictError, match=f"process {process.pid}"):
            claim.await_predecessor(pid_file, configuration)
        assert process.poll() is None


def test_an_earlier_containerd_that_is_about_to_die_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "_ORPHAN_TIMEOUT", 30.0)
    pid_file, configuration = str(tmp_path / "pid"), str(tmp_path / "containerd.toml")
    with process_given("--config", configuration, seconds=0.3) as process:
        claim.write_pid_file(pid_file, process.pid)

        claim.await_predecessor(pid_file, configuration)

        assert process.wait(10) == 0


@pytest.mark.parametrize(
    "recorded",
    [
        *("", "x", "0\n1\n-\n", "-1\n1\n-\n", "99999999999\n1\n-\n"),
        *("{pid}\n", "{pid}\n{started}\n", "{pid}\n1\n-\n", "{pid}\n{started}\n1:1\n"),
    ],
)
def test_a_pid_file_that_names_no_containerd_of_ours_is_not_believed(tmp_path: Path, recorded: str) -> None:
    configuration = str(tmp_path / "containerd.toml")
    # The last four name a live process, but lack when it started or what it runs, or say it wrongly.
    with process_given("--config", configuration) as process:
        started = claim.start_time(process.pid)
        (tmp_path / "pid").write_text(recorded.format(pid=process.pid, started=started))

        claim.await_predecessor(str(tmp_path / "pid"), configuration)

        assert process.poll() is None


def test_a_foreign_process_is_not_believed_whatever_its_start_time(tmp_path: Path) -> None:
    with process_given("--config", "/elsewhere/containerd.toml") as process:
        claim.write_pid_file(str(tmp_path / "pid"), process.pid)

        claim.await_predecessor(str(tmp_path / "pid"), str(tmp_path / "containerd.toml"))

        assert process.poll() is None


def test_a_process_of_which_only_the_first_thread_has_ended_is_still_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "_ORPHAN_TIMEOUT", 0.05)
    program = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "print(flush=True)\n"
        "ctypes.CDLL(None).pthread_exit(None)\n"
    )
    pid_file, configuration = str(tmp_path / "pid"), str(tmp_path / "containerd.toml")
    command = [sys.executable, "-S", "-c", program, "--config", configuration]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            claim.write_pid_file(pid_file, process.pid)
            status = Path(f"/proc/{process.pid}/status")
            deadline = time.monotonic() + 20
            while "State:\tZ" not in status.read_text():
                assert time.monotonic() < deadline, "its first thread does not end"
                time.sleep(0.005)

            with pytest.raises(ConflictError, match=f"process {process.pid}"):
                claim.await_predecessor(pid_file, configuration)
        finally:
            process.kill()


def test_a_process_that_has_ended_is_no_hindrance_reaped_or_not(tmp_path: Path) -> None:
    pid_file, configuration = str(tmp_path / "pid"), str(tmp_path / "containerd.toml")
    with process_given("--config", configuration) as process:
        claim.write_pid_file(pid_file, process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

        claim.await_predecessor(pid_file, configuration)

    claim.await_predecessor(pid_file, configuration)


def test_a_process_that_is_gone_gets_no_pid_file(tmp_path: Path) -> None:
    with process_given() as process:
        pass

    claim.write_pid_file(str(tmp_path / "pid"), process.pid)

    assert not (tmp_path / "pid").exists()
