"""What may be given as ``attach_stdio``: destinations, copies and the user's terminal, and what is refused."""

from __future__ import annotations

import asyncio
import io
import os
import pty
import socket
import ssl
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from libcontainerd import cio
from libcontainerd.cio import pump
from libcontainerd.errors import InvalidParameterError
from tests.unit.cio.shim import DEADLINE, Shim, eventually, pump_threads, write_all

ECHO_AND_LINES = termios.ECHO | termios.ICANON | termios.ISIG


def local_flags(fd: int) -> int:
    flags: int = termios.tcgetattr(fd)[3]
    return flags & ECHO_AND_LINES


@contextmanager
def open_pty() -> Iterator[tuple[int, int]]:
    """Give the user's side of a terminal, and the program's."""
    user, program = pty.openpty()
    try:
        yield user, program
    finally:
        os.close(user)
        os.close(program)


# ---------------------------------------------------------------------------------------------------- destinations


def test_null_io_is_empty_paths() -> None:
    assert (cio.null_io.stdout, cio.null_io.stderr) == ("", "")


@pytest.mark.parametrize(
    ("name", "uri"),
    [
        ("out.log", "out.log"),
        ("with space", "with%20space"),
        ("100%.log", "100%25.log"),
        ("a?b#c", "a%3Fb%23c"),
        ("a+b&c=d;e,f:g@h~i", "a%2Bb&c=d;e,f:g@h~i"),
        ("grün", "gr%C3%BCn"),
        ("back\\slash\"quote'", "back%5Cslash%22quote'"),
        ("new\nline", "new%0Aline"),
    ],
)
def test_log_file_is_a_file_uri_for_both_streams(name: str, uri: str, tmp_path: Path) -> None:
    destination = cio.log_file(tmp_path / name)

    assert destination.stdout == destination.stderr == f"file://{tmp_path}/{uri}"


def test_log_file_takes_a_name_that_is_no_text(tmp_path: Path) -> None:
    destination = cio.log_file(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))

    assert destination.stdout.endswith("/%FF")


@pytest.mark.parametrize("name", ["out.log", "with space", "a?b#c", "grün", "back\\slash\"quote'"])
def test_of_a_log_file_runc_is_told_two_spellings(name: str, tmp_path: Path) -> None:
    log = tmp_path / name
    destination = cio.log_file(f"/{log}")

    out, err = destination.told(runc=True)

    assert (out, err) == (str(log), f"{tmp_path}/./{name}")
    assert log.read_bytes() == b""
    log.write_text("kept")
    destination.told(runc=True)
    assert log.read_text() == "kept"


def test_of_a_log_file_other_shims_are_told_the_uri(tmp_path: Path) -> None:
    destination = cio.log_file(tmp_path / "log")

    assert destination.told(runc=False) == (destination.stdout, destination.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["100%.log", "new\nline", "\x7f", os.fsdecode(b"\xff")])
def test_of_a_log_file_with_no_plain_name_runc_is_told_the_uri(name: str, tmp_path: Path) -> None:
    destination = cio.log_file(tmp_path / name)

    assert destination.told(runc=True) == (destination.stdout, destination.stderr)
    assert not list(tmp_path.iterdir())


def test_of_what_is_no_file_to_make_runc_is_told_the_uri(tmp_path: Path) -> None:
    fifo, gone = tmp_path / "fifo", tmp_path / "gone"
    os.mkfifo(fifo)
    gone.mkdir()
    destinations = [cio.log_file(fifo), cio.log_file("/dev/null"), cio.log_file(gone / "log")]
    gone.rmdir()

    for destination in destinations:
        assert destination.told(runc=True) == (destination.stdout, destination.stderr)


def test_of_a_uri_every_shim_is_told_just_that() -> None:
    uri = "file:///var/log/web.log"

    assert cio.log_uri(uri).told(runc=True) == (uri, uri)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("relative.log", "absolute path"),
        ("", "absolute path"),
        ("{tmp}/a\0b", "absolute path"),
        ("{tmp}/", "directory"),
        ("{tmp}", "directory"),
        ("{tmp}/missing/out.log", "make the directory"),
        ("{tmp}/file/out.log", "make the directory"),
    ],
)
def test_log_file_refuses(path: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(InvalidParameterError, match=why):
        cio.log_file(path.replace("{tmp}", str(tmp_path)))


@pytest.mark.parametrize(
    "uri",
    [
        "binary:///usr/local/bin/logger?id=web&size=10",
        "file:///var/log/web.log",
        "fifo:///run/web",
        "npipe://server/pipe",
        "x-own.scheme+1://anything",
    ],
)
def test_log_uri_passes_a_uri_on_as_it_is(uri: str) -> None:
    assert cio.log_uri(uri) == cio.Destination(uri, uri)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "/var/log/web.log",
        "web.log",
        "binary:/usr/bin/logger",
        "binary://",
        "binary://usr/bin/logger",
        "binary:///",
        "file://",
        "file://host/path",
        "://x",
        "1a://x",
        "file:///with space",
        "file:///new\nline",
        "file:///gr\u00fcn",
    ],
)
def test_log_uri_refuses_what_is_no_uri(uri: str) -> None:
    with pytest.raises(InvalidParameterError, match=r"give a URI|absolute path"):
        cio.log_uri(uri)


def test_a_destination_has_no_stdin() -> None:
    with pytest.raises(InvalidParameterError, match="with_stdin"):
        cio.null_io.check(with_stdin=True, terminal=False)


def test_a_terminal_cannot_be_logged_to_a_file(tmp_path: Path) -> None:
    log = cio.log_file(tmp_path / "log")

    with pytest.raises(InvalidParameterError, match="terminal"):
        log.check(with_stdin=False, terminal=True)
    log.check(with_stdin=False, terminal=False)
    cio.log_uri("binary:///bin/logger").check(with_stdin=False, terminal=True)


# ------------------------------------------------------------------------------------------------------------ copy


async def _async_sink(_: bytes) -> None: ...


def closed_file() -> io.BytesIO:
    file = io.BytesIO()
    file.close()
    return file


def closed_socket() -> socket.socket:
    sock = socket.socket()
    sock.close()
    return sock


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (io.StringIO, "text file"),
        (lambda: io.TextIOWrapper(io.BytesIO()), "text file"),
        (lambda: io.BufferedReader(io.BytesIO()), "not writable"),
        (closed_file, "is closed"),
        (closed_socket, "is closed"),
        (lambda: _async_sink, "plain function"),
        (lambda: "path/of/a/file", "plain function"),
        (lambda: 3.5, "plain function"),
        (lambda: 99999, "not an open descriptor"),
        (lambda: -1, "not an open descriptor"),
        (lambda: 2**40, "not an open descriptor"),
        (lambda: True, "cannot be written"),
    ],
)
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_copy_refuses_a_destination_that_cannot_be_written(
    stream: str, make: Callable[[], cio.Output], why: str
) -> None:
    destination = make()
    try:
        with pytest.raises(InvalidParameterError, match=f"cannot copy {stream} .*{why}"):
            cio.copy(None, *((destination, None) if stream == "stdout" else (None, destination)))
    finally:
        if isinstance(destination, io.IOBase):
            destination.close()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (io.StringIO, "text file"),
        (lambda: "text", "give bytes"),
        (lambda: io.BufferedWriter(io.BytesIO()), "not readable"),
        (closed_file, "is closed"),
        (closed_socket, "is closed"),
        (lambda: _async_sink, "plain function"),
        (lambda: 99999, "not an open descriptor"),
        (object, "give bytes"),
    ],
)
def test_copy_refuses_a_source_that_cannot_be_read(make: Callable[[], cio.Input], why: str) -> None:
    source = make()
    try:
        with pytest.raises(InvalidParameterError, match=f"cannot copy stdin .*{why}"):
            cio.copy(source)
    finally:
        if isinstance(source, io.IOBase):
            source.close()


@pytest.mark.parametrize("flags", [os.O_PATH, os.O_DIRECTORY])
def test_copy_refuses_a_descriptor_that_carries_no_bytes(flags: int, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY | flags)
    try:
        with pytest.raises(InvalidParameterError, match="cannot be written"):
            cio.copy(stdout=fd)
        with pytest.raises(InvalidParameterError, match="cannot be read"):
            cio.copy(fd)
    finally:
        os.close(fd)


def test_copy_refuses_the_wrong_end_of_a_pipe() -> None:
    read_end, write_end = os.pipe()
    with open(read_end, "rb"), open(write_end, "wb"):
        with pytest.raises(InvalidParameterError, match="cannot be written"):
            cio.copy(stdout=read_end)
        with pytest.raises(InvalidParameterError, match="cannot be read"):
            cio.copy(write_end)


def test_copy_refuses_tls_and_says_what_to_give() -> None:
    ours, theirs = socket.socketpair()
    with (
        theirs,
        ssl.create_default_context().wrap_socket(
            ours, server_hostname="x", do_handshake_on_connect=False
        ) as tls,
    ):
        with pytest.raises(InvalidParameterError, match=r"stdout=tls\.sendall"):
            cio.copy(stdout=tls)
        with pytest.raises(InvalidParameterError, match=r"tls\.recv"):
            cio.copy(tls)


def test_the_ios_are_ios(tmp_path: Path) -> None:
    with Shim(tmp_path) as shim:
        running = cio.copy()(shim.dio)

        assert isinstance(running, cio.IO)
        assert isinstance(shim.dio, cio.IO)


def test_one_callback_serves_many_processes(tmp_path: Path) -> None:
    pieces: list[bytes] = []
    attach = cio.copy(b"same", pieces.append)
    with Shim(tmp_path, "a", with_stdin=True) as first, Shim(tmp_path, "b", with_stdin=True) as second:
        running = [attach(first.dio), attach(second.dio)]
        first.cat()
        second.cat()
        for each in running:
            each.wait()

    assert b"".join(pieces) == b"samesame"


def test_copy_goes_beside_asyncio(tmp_path: Path) -> None:
    async def main() -> bytes:
        reader, writer = socket.socketpair()
        with reader, writer:
            reader.setblocking(False)
            with Shim(tmp_path, terminal=True) as shim:
                running = cio.copy(stdout=writer)(shim.dio)
                shim.say(b"to the loop")
                got = await asyncio.get_running_loop().sock_recv(reader, 100)
                await asyncio.to_thread(running.wait)
                return got

    assert asyncio.run(main()) == b"to the loop"


# -------------------------------------------------------------------------------------------------------- terminal


def test_a_terminal_is_raw_until_the_output_ends_and_what_follows_is_left(tmp_path: Path) -> None:
    with open_pty() as (user, program), Shim(tmp_path, with_stdin=True, terminal=True) as shim:
        before = termios.tcgetattr(program)
        running = cio.terminal(program, program)(shim.dio)
        assert local_flags(program) == 0

        source, target = shim.open("stdin"), shim.open("stdout")
        os.write(user, b"\x03")
        assert os.read(source, 10) == b"\x03", "Ctrl-C is the process's"
        write_all(target, b"hello\r\n")
        assert os.read(user, 100) == b"hello\r\n"
        shim.shut(target)
        running.wait()

        assert termios.tcgetattr(program) == before
        eventually(lambda: not pump_threads(), "the end of both copies")
        os.write(user, b"next\n")
        assert os.read(program, 100) == b"next\n"


@pytest.mark.parametrize("end", ["cancel", "close"])
def test_a_terminal_is_restored_when_the_io_ends(end: str, tmp_path: Path) -> None:
    with open_pty() as (_, program), Shim(tmp_path, with_stdin=True, terminal=True) as shim:
        running = cio.terminal(program, program)(shim.dio)
        assert local_flags(program) == 0
        getattr(running, end)()

        assert local_flags(program) == ECHO_AND_LINES


def test_a_terminal_is_restored_when_the_attachment_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with open_pty() as (_, program), Shim(tmp_path, with_stdin=True, terminal=True) as shim:
        monkeypatch.setattr(pump, "_start_thread", refuse)
        with pytest.raises(RuntimeError, match="start new thread"):
            cio.terminal(program, program)(shim.dio)

        assert local_flags(program) == ECHO_AND_LINES


def test_a_terminal_that_hung_up_is_no_trouble(tmp_path: Path) -> None:
    user, program = pty.openpty()
    with Shim(tmp_path, with_stdin=True, terminal=True) as shim:
        running = cio.terminal(program, program)(shim.dio)
        os.close(user)
        shim.dio.process_is_there()
        assert os.read(shim.open("stdin"), 10) == b"", "the input's end"
        shim.say(b"to nobody")
        running.wait()
        os.close(program)


def test_without_stdin_the_terminal_stays_as_it_is(tmp_path: Path) -> None:
    with open_pty() as (user, program), Shim(tmp_path, terminal=True) as shim:
        running = cio.terminal(program, program)(shim.dio)
        shim.say(b"out")

        assert local_flags(program) == ECHO_AND_LINES
        assert os.read(user, 100) == b"out"
        running.wait()


def test_what_is_no_terminal_is_copied_as_it_is(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    with (
        open(read_end, "rb", buffering=0) as reader,
        open(write_end, "wb", buffering=0) as writer,
        open("/dev/null", "rb") as null,
        Shim(tmp_path, with_stdin=True) as shim,
    ):
        running = cio.terminal(null.fileno(), writer.fileno())(shim.dio)
        shim.dio.process_is_there()
        assert os.read(shim.open("stdin"), 10) == b""
        shim.say(b"err", "stderr")
        assert reader.read(10) == b"err"
        shim.say(b"out")
        assert reader.read(10) == b"out"
        running.wait()


def test_a_descriptor_that_is_not_open_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match="stdin"):
        cio.terminal(99999, 1)
    with pytest.raises(InvalidParameterError, match="stdout"):
        cio.terminal(0, 99999)


PROGRAM = """
import sys
from pathlib import Path
from libcontainerd import cio
from tests.unit.cio.shim import Shim
shim = Shim(Path(sys.argv[1]), with_stdin=True, terminal=True)
print("before")
cio.terminal()(shim.dio)
print("raw", file=sys.stderr, flush=True)
raise SystemExit("dies with the terminal raw")
"""


def test_a_terminal_is_restored_when_the_program_ends(tmp_path: Path) -> None:
    with open_pty() as (user, program):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path)],
            stdin=program,
            stdout=program,
            stderr=subprocess.PIPE,
            timeout=DEADLINE,
            check=False,
            text=True,
            cwd=Path(__file__).parents[3],
        )

        assert done.stderr == "raw\ndies with the terminal raw\n"
        assert os.read(user, 100) == b"before\r\n", "flushed before the terminal was made raw"
        assert local_flags(program) == ECHO_AND_LINES


def test_an_input_that_the_process_was_given_no_stdin_for_is_refused(tmp_path: Path) -> None:
    with Shim(tmp_path) as shim:
        inputs: tuple[cio.Input, ...] = (io.BytesIO(b"lost"), lambda: b"lost", b"lost")
        for stdin in inputs:
            with pytest.raises(InvalidParameterError, match="say with_stdin=True"):
                cio.copy(stdin=stdin)(shim.dio)
        shim.say(b"out")
        assert shim.dio.stdout.read() == b"out", "nothing was taken out"
