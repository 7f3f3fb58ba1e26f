"""One child process: its log never blocks it, its end is always seen, and it inherits nothing it should not."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from libcontainerd.supervisor.child import _LAUNCHER, Child, Lines, Log

Script = Callable[[str], list[str]]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Turns lines of sh into a program."""

    def make(text: str) -> list[str]:
        path = tmp_path / "program"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return [str(path)]

    return make


class Run:
    """A child with its log, and the queue on which its end is told."""

    def __init__(self, arguments: list[str]) -> None:
        self.ended: queue.Queue[Child] = queue.Queue()
        self.log = Log()
        self.child = Child(arguments, dict(os.environ), self.log, self.ended.put)

    def to_end(self) -> tuple[int | None, tuple[str, ...]]:
        self.child.start()
        assert self.ended.get(timeout=20) is self.child
        self.child.stop(1)
        self.log.close()
        return self.child.exit_code, self.log.tail()


def lines_until(log: Log, wanted: str) -> tuple[str, ...]:
    deadline = time.monotonic() + 20
    while wanted not in log.tail():
        assert time.monotonic() < deadline, f"no line {wanted!r} in {log.tail()}"
        time.sleep(0.005)
    return log.tail()


@pytest.mark.parametrize(
    ("pieces", "lines"),
    [
        ([b"a\nb\n"], ["a", "b"]),
        ([b"a", b"b\nc"], ["ab", "c"]),
        ([b"\n\na\r\n"], ["a"]),
        ([b"\xff\n"], ["�"]),
        ([b"x" * 40_000], ["x" * 16384, "x" * 16384, "x" * 7232]),
        ([], []),
    ],
)
def test_bytes_become_lines(pieces: list[bytes], lines: list[str]) -> None:
    found: list[str] = []
    cutter = Lines(found.append)
    for piece in pieces:
        cutter.feed(piece)
    cutter.finish()

    assert found == lines


def test_both_streams_and_the_last_words_reach_the_log(script: Script, no_leaks: None) -> None:
    run = Run(script("echo out; echo err >&2; printf last; exit 3"))

    assert run.to_end() == (3, ("out", "err", "last"))
    assert run.child.ending == "exited with code 3"


def test_a_signal_is_named(script: Script, no_leaks: None) -> None:
    run = Run(script("kill -SEGV $$"))

    assert run.to_end()[0] == -signal.SIGSEGV
    assert run.child.ending == "was killed by SIGSEGV"


def test_lines_are_logged_at_the_level_they_state(script: Script) -> None:
    with structlog.testing.capture_logs() as events:
        Run(
            script(
                """echo 'time="x" level=warning msg="a"'; echo 'level=fatal msg=b'; echo 'time=x level=debug msg=c'
                echo 'plain words'; echo 'level=error msg=d'"""
            )
        ).to_end()

    assert {event["event"] for event in events} == {"containerd_log"}
    assert [event["log_level"] for event in events] == ["warning", "critical", "debug", "info", "error"]
    assert events[0]["line"] == 'time="x" level=warning msg="a"'


def test_only_the_end_of_a_long_log_is_kept(script: Script) -> None:
    _, tail = Run(script("i=0; while [ $i -lt 500 ]; do echo $i; i=$((i+1)); done")).to_end()

    assert tail == tuple(str(number) for number in range(300, 500))


def test_a_consumer_that_hangs_blocks_neither_the_child_nor_the_stop(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("libcontainerd.supervisor.child._CLOSE_TIMEOUT", 1.0)
    hung, release = threading.Event(), threading.Event()

    def hang(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        hung.set()
        release.wait(30)
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[hang])
    try:
        # Far more than a pipe holds, and more lines than the backlog.
        run = Run(script("yes | head -n 200000; echo done"))
        code, tail = run.to_end()
        assert hung.is_set()
    finally:
        release.set()
        structlog.configure(**before)

    assert (code, tail[-1]) == (0, "done")
    # What waited is dropped, and its thread goes when the consumer comes back.
    monkeypatch.setattr("libcontainerd.supervisor.child._CLOSE_TIMEOUT", 30.0)
    with structlog.testing.capture_logs() as events:
        run.log.close()
    assert events == []


def test_lines_that_nobody_took_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("libcontainerd.supervisor.child._BACKLOG_LINES", 3)
    first, release = threading.Event(), threading.Event()
    seen: list[structlog.typing.EventDict] = []

    def slow(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        seen.append(dict(event))
        first.set()
        release.wait(30)
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[slow])
    try:
        log = Log()
        log.line("0")
        assert first.wait(20)
        for number in range(1, 8):
            log.line(str(number))
        release.set()
        log.close()
    finally:
        structlog.configure(**before)

    assert [event.get("line", event["event"]) for event in seen] == [
        "0",
        "containerd_log_dropped",
        "5",
        "6",
        "7",
    ]
    assert seen[1]["lines"] == 4


def test_a_consumer_that_fails_does_not_end_the_log(no_leaks: None) -> None:
    seen: list[object] = []

    def fail(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        seen.append(event["line"])
        raise ZeroDivisionError

    before = structlog.get_config()
    structlog.configure(processors=[fail])
    try:
        log = Log()
        log.line("a")
        log.line("b")
        log.close()
    finally:
        structlog.configure(**before)

    assert seen == ["a", "b"]


def test_a_descendant_that_keeps_the_log_open_does_not_hide_the_end(script: Script, no_leaks: None) -> None:
    run = Run(script("sleep 30 & echo $!; exit 0"))
    code, tail = run.to_end()
    os.kill(int(tail[0]), signal.SIGKILL)

    assert code == 0


def test_a_descendant_that_writes_for_ever_does_not_hide_the_end(script: Script, no_leaks: None) -> None:
    run = Run(script("yes & exit 0"))
    code, _ = run.to_end()

    # Nobody reads any more: yes ends by SIGPIPE.
    assert code == 0


def test_one_that_closes_its_log_lives_on(script: Script, no_leaks: None) -> None:
    run = Run(script("echo up; exec >&- 2>&-; exec sleep 30"))
    run.child.start()
    lines_until(run.log, "up")
    assert not run.child.exited

    run.child.stop(10)
    run.log.close()
    assert run.child.exit_code == -signal.SIGTERM


def test_one_that_ignores_sigterm_is_killed_after_the_grace(script: Script, no_leaks: None) -> None:
    run = Run(script("trap '' TERM; echo up; exec sleep 30"))
    run.child.start()
    lines_until(run.log, "up")

    begun = time.monotonic()
    with structlog.testing.capture_logs() as events:
        run.child.stop(0.2)
        run.log.close()

    assert 0.2 <= time.monotonic() - begun < 10
    assert run.child.exit_code == -signal.SIGKILL
    # What it has printed may be logged only now.
    assert [each["event"] for each in events if each["event"] != "containerd_log"] == ["containerd_killed"]


def test_stop_is_harmless_before_the_start_and_after_the_end(script: Script, no_leaks: None) -> None:
    run = Run(script("exit 0"))
    run.child.stop(1)
    assert run.child.pid == 0
    run.to_end()
    run.child.stop(1)


def test_it_starts_with_a_clean_slate(script: Script, no_leaks: None) -> None:
    run = Run(script("umask; exec cat /proc/self/status"))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    mask = os.umask(0o077)
    try:
        _, tail = run.to_end()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.umask(mask)

    status = dict(re.split(r":\s*", line, maxsplit=1) for line in tail[1:])
    assert tail[0] == "0022"
    assert int(status["SigBlk"], 16) == 0
    ignored = int(status["SigIgn"], 16)
    assert not any(ignored >> number - 1 & 1 for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM))


def test_it_leads_a_session_and_holds_no_descriptor_of_ours(script: Script, no_leaks: None) -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    try:
        run = Run(script("echo $$; cut -d' ' -f6 /proc/$$/stat; ls /proc/self/fd"))
        _, (pid, session, *descriptors) = run.to_end()
    finally:
        os.close(reader)
        os.close(writer)

    assert pid == session
    # 3 is what ls reads.
    assert descriptors == ["0", "1", "2", "3"]


def test_a_file_that_is_no_program_says_so_in_the_log(tmp_path: Path, no_leaks: None) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF nothing of the kind")
    program.chmod(0o755)
    code, tail = Run([str(program)]).to_end()

    assert code == 1
    assert tail == (f"cannot run {program}: Exec format error",)


def test_a_system_that_cannot_start_it_is_reported(
    script: Script, monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    run = Run(script("exit 0"))
    with pytest.raises(FileNotFoundError):
        run.child.start()
    run.child.stop(1)
    run.log.close()


def test_a_kernel_without_pidfd_leaves_no_child(
    script: Script, monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    asked: list[int] = []

    def refuse(pid: int) -> int:
        asked.append(pid)
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    run = Run(script("exec sleep 30"))
    with pytest.raises(OSError, match="not implemented"):
        run.child.start()
    run.log.close()

    with pytest.raises(ProcessLookupError):
        os.kill(asked[0], 0)


def test_one_whose_parent_died_before_it_was_tied_to_it_does_not_run(script: Script) -> None:
    # As after that death: the parent that it sees is not the one that it was told of.
    command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, "1", *script("echo runs")]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)

    assert (answer.returncode, answer.stdout, answer.stderr) == (1, "", "the supervisor has ended\n")
