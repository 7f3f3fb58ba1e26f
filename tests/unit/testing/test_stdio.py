"""The shim's side of stdio, apart from any server."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from libcontainerd.testing.stdio import ShimStdio, StdioClosedError, StdioError
from tests.integration.containers import wait_until
from tests.leaks import no_leaks


def fifo(path: Path) -> str:
    os.mkfifo(path)
    return str(path)


def test_files_are_added_to(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"before\n")
    stdio = ShimStdio("", f"file://{log}", str(log), terminal=False)
    stdio.open(1)

    stdio.write("stdout", b"out\n")
    stdio.write("stderr", b"err\n")
    stdio.close()

    assert log.read_bytes() == b"before\nout\nerr\n"
    with pytest.raises(StdioClosedError):
        stdio.write("stdout", b"late")
    assert stdio.read() == b""


def test_a_terminal_has_one_output(tmp_path: Path) -> None:
    log = tmp_path / "log"
    stdio = ShimStdio("", f"file://{log}", "", terminal=True)
    stdio.open(1)
    stdio.write("stderr", b"same")
    stdio.close()

    assert log.read_bytes() == b"same"


def test_a_fifo_by_its_uri(tmp_path: Path) -> None:
    path = fifo(tmp_path / "out put")
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    stdio = ShimStdio("", f"fifo://{path.replace(' ', '%20')}", "", terminal=True)
    stdio.check()
    stdio.open(1)
    stdio.write("stdout", b"x")

    assert os.read(reader, 10) == b"x"
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
    stdio = ShimStdio(source, "", "", terminal=False)
    stdio.open(1)
    stdio.close_input()
    stdio.begin_input()

    assert stdio.read() == b""
    stdio.close()


def test_input_whose_fifo_is_gone_is_empty(tmp_path: Path) -> None:
    stdio = ShimStdio(str(tmp_path / "in"), "", "", terminal=False)
    stdio.open(1)
    stdio.begin_input()

    assert stdio.read() == b""
    stdio.close()


def test_input_that_is_closed_while_it_opens(tmp_path: Path) -> None:
    with no_leaks():
        stdio = ShimStdio(fifo(tmp_path / "in"), "", "", terminal=False)
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
    stdio = ShimStdio(source, "", "", terminal=False)
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
        ShimStdio("", "gopher://x", "", terminal=False).check()
