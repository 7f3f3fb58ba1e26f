"""The shim's side of stdio, apart from any server."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest

from libcontainerd.testing.stdio import ShimStdio, StdioClosedError, StdioError
from tests.integration.containers import wait_until
from tests.leaks import no_leaks


def fifo(path: Path) -> str:
    os.mkfifo(path)
    return str(path)


def test_a_file_is_made_and_added_to(tmp_path: Path) -> None:
    log = tmp_path / "of its own" / "log"
    uri = f"file://{quote(str(log))}"
    stdio = ShimStdio("", "", "", terminal=False)
    for text in (b"first\n", b"second\n"):
        stdio = ShimStdio("", uri, "/ignored", terminal=False)
        stdio.prepare()
        stdio.open(1)
        stdio.write("stdout", text)
        stdio.write("stderr", b"err\n")
        stdio.close()

    assert log.read_bytes() == b"first\nerr\nsecond\nerr\n"
    with pytest.raises(StdioClosedError):
        stdio.write("stdout", b"late")
    assert stdio.read() == b""


def test_a_file_that_is_there_is_added_to(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"before\n")
    stdio = ShimStdio("", str(log), str(log), terminal=False)
    stdio.prepare()
    stdio.open(1)
    stdio.write("stdout", b"out\n")
    stdio.write("stderr", b"err\n")
    stdio.close()

    assert log.read_bytes() == b"before\nout\nerr\n"


def test_a_terminal_has_one_output(tmp_path: Path) -> None:
    path = fifo(tmp_path / "out")
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    stdio = ShimStdio("", path, "", terminal=True)
    stdio.prepare()
    stdio.open(1)
    stdio.write("stderr", b"same")

    assert os.read(reader, 10) == b"same"
    stdio.close()
    os.close(reader)


@pytest.mark.parametrize("terminal", [False, True])
def test_nowhere(terminal: bool) -> None:
    stdio = ShimStdio("", "", "", terminal=terminal)
    stdio.prepare()
    stdio.open(1)
    stdio.write("stdout", b"x")
    stdio.close()


# A logger that keeps what it gets beside the directory it is given, and ends with its input and not by SIGTERM.
LOGGER = """#!/bin/sh
trap '' TERM
exec 5>&-
echo "$CONTAINER_NAMESPACE $CONTAINER_ID $*" >"$2/words"
cat <&3 >"$2/out" &
cat <&4 >"$2/err"
wait
"""


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("terminal", [False, True])
def test_a_logger(tmp_path: Path, terminal: bool) -> None:
    with no_leaks():
        logger = program(tmp_path / "log ger", LOGGER)
        uri = f"binary://{quote(str(logger))}?-d={tmp_path}&-d=again&--empty="
        stdio = ShimStdio("", uri, "", terminal=terminal, name="c", namespace="n")
        stdio.prepare()
        stdio.open(1)
        stdio.write("stdout", b"out" * 50_000)
        stdio.write("stderr", b"err")
        stdio.close()
        stdio.close()

    out, err = (tmp_path / "out").read_bytes(), (tmp_path / "err").read_bytes()
    assert (tmp_path / "words").read_text() == f"n c -d {tmp_path} --empty \n"
    assert (out, err) == ((b"out" * 50_000 + b"err", b"") if terminal else (b"out" * 50_000, b"err"))


def test_a_logger_that_has_ended_takes_nothing(tmp_path: Path) -> None:
    with no_leaks():
        logger = program(tmp_path / "logger", "#!/bin/sh\nexit 0\n")
        stdio = ShimStdio("", f"binary://{logger}", "", terminal=False)
        stdio.prepare()
        stdio.open(1)

        def closed() -> bool:
            try:
                stdio.write("stdout", b"x")
            except StdioClosedError:
                return True
            return False

        wait_until(closed, "its end is closed")
        stdio.close()


def test_a_logger_that_never_says_it_is_ready_does_not_hold_the_end_up(tmp_path: Path) -> None:
    with no_leaks():
        logger = program(tmp_path / "logger", f"#!/bin/sh\n: >{tmp_path}/here\nexec sleep 1000\n")
        stdio = ShimStdio("", f"binary://{logger}", "", terminal=False)
        with ThreadPoolExecutor(1) as pool:
            preparing = pool.submit(stdio.prepare)
            wait_until((tmp_path / "here").exists, "it runs")
            stdio.give_up_opening()
            preparing.result(10)
        stdio.close()


def test_a_logger_is_killed_if_nothing_else_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("libcontainerd.testing.logger._END_SECONDS", 0.01)
    with no_leaks():
        logger = program(tmp_path / "logger", "#!/bin/sh\ntrap '' TERM\nexec 5>&-\nexec sleep 1000\n")
        stdio = ShimStdio("", f"binary://{logger}", "", terminal=False)
        stdio.prepare()
        stdio.close()


def test_the_end_of_a_terminals_input_is_told(tmp_path: Path) -> None:
    source, out = fifo(tmp_path / "in"), fifo(tmp_path / "out")
    reader = os.open(out, os.O_RDONLY | os.O_NONBLOCK)
    with no_leaks():
        stdio = ShimStdio(source, out, "", terminal=True)
        hung_up = threading.Event()
        stdio.on_hang_up = hung_up.set
        stdio.open(1)
        stdio.begin_input()
        with open(source, "wb", buffering=0):
            stdio.close_input()
            assert not hung_up.is_set()
        assert hung_up.wait(10)
        stdio.close()
    os.close(reader)


def test_a_reader_that_comes_late(tmp_path: Path) -> None:
    path = fifo(tmp_path / "out")
    stdio = ShimStdio("", path, "", terminal=True)
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(stdio.open, 10)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        opened.result(10)
    stdio.close()
    os.close(reader)


def test_an_opening_that_is_cut_short(tmp_path: Path) -> None:
    stdio = ShimStdio("", fifo(tmp_path / "out"), "", terminal=True)
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(stdio.open, 30)
        stdio.cancel()
        with pytest.raises(StdioError, match="context deadline exceeded"):
            opened.result(10)
    stdio.close()


def test_blocked_writers_and_readers_are_woken(tmp_path: Path) -> None:
    with no_leaks():
        out, source = fifo(tmp_path / "out"), fifo(tmp_path / "in")
        reader = os.open(out, os.O_RDONLY | os.O_NONBLOCK)
        stdio = ShimStdio(source, out, "", terminal=True)
        stdio.open(1)
        stdio.begin_input()
        stdio.begin_input()
        with ThreadPoolExecutor(2) as pool:
            writing = pool.submit(stdio.write, "stdout", bytes(1 << 20))
            reading = pool.submit(stdio.read)
            stdio.close()
            for blocked in (writing, reading):
                with pytest.raises(StdioClosedError):
                    blocked.result(10)
        os.close(reader)


def test_input_that_is_closed_before_it_is_open_ends(tmp_path: Path) -> None:
    source = fifo(tmp_path / "in")
    stdio = ShimStdio(source, os.devnull, os.devnull, terminal=False)
    stdio.open(1)
    stdio.close_input()
    stdio.begin_input()

    assert stdio.read() == b""
    stdio.close()


def test_input_whose_fifo_is_gone_is_empty(tmp_path: Path) -> None:
    stdio = ShimStdio(str(tmp_path / "in"), os.devnull, os.devnull, terminal=False)
    stdio.open(1)
    stdio.begin_input()

    assert stdio.read() == b""
    stdio.close()


def test_input_that_is_closed_while_it_opens(tmp_path: Path) -> None:
    with no_leaks():
        stdio = ShimStdio(fifo(tmp_path / "in"), os.devnull, os.devnull, terminal=False)
        stdio.open(1)
        stdio.begin_input()
        stdio.close()
        with pytest.raises(StdioClosedError):
            stdio.read()
        wait_until(
            lambda: not [each for each in threading.enumerate() if each.name == "fake-containerd-stdin"],
            "its thread has ended",
        )


def test_input_ends_with_its_last_writer(tmp_path: Path) -> None:
    source = fifo(tmp_path / "in")
    stdio = ShimStdio(source, os.devnull, os.devnull, terminal=False)
    stdio.open(1)
    stdio.begin_input()
    with open(source, "wb", buffering=0) as writer:
        writer.write(b"data")
        assert stdio.read() == b"data"
        stdio.close_input()
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(stdio.read)
            assert not reading.done()
            writer.close()
            assert reading.result(10) == b""
    stdio.close()


def test_an_unknown_scheme(tmp_path: Path) -> None:
    with pytest.raises(StdioError, match="unknown STDIO scheme gopher"):
        ShimStdio("", "gopher://x", "", terminal=False).prepare()
