"""The pump moves every byte, delays nobody for another, stops when told, and leaves nothing behind."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import resource
import select
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from libcontainerd import cio
from libcontainerd.cio import copying, ends, pump
from libcontainerd.cio.fifo import End, OutputStream
from libcontainerd.cio.pump import Copy, Pump
from tests.unit.beside import Beside
from tests.unit.cio.shim import (
    DEADLINE,
    Shim,
    chunks,
    eventually,
    pump_threads,
    read_all,
    write_all,
)

MIB = 1 << 20
PATTERN = bytes(range(251)) * 4177  # a prime period, so that a lost or doubled block shows


def pattern(size: int) -> bytes:
    return (PATTERN * (size // len(PATTERN) + 1))[:size]


def returns(call: Callable[[], object]) -> None:
    """Check that a call returns."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(DEADLINE)
    assert not thread.is_alive(), f"{call} hangs"


class Trickle(io.RawIOBase):
    """A raw file that takes a few bytes at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: object, /) -> int:
        piece = bytes(memoryview(data)[:7001])  # type: ignore[arg-type] # the base class's Buffer
        self.data += piece
        return len(piece)


class Plain:
    """A file by its methods alone, whose write says nothing."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes, /) -> None:
        self.data += data


# ---------------------------------------------------------------------------------------------------- where bytes arrive


@contextmanager
def to_callable() -> Iterator[tuple[cio.Output, Callable[[], bytes]]]:
    pieces: list[bytes] = []
    yield pieces.append, lambda: b"".join(pieces)


@contextmanager
def to_plain() -> Iterator[tuple[cio.Output, Callable[[], bytes]]]:
    file = Plain()
    yield file, lambda: bytes(file.data)


@contextmanager
def to_trickle() -> Iterator[tuple[cio.Output, Callable[[], bytes]]]:
    file = Trickle()
    yield file, lambda: bytes(file.data)


@contextmanager
def to_memory() -> Iterator[tuple[cio.Output, Callable[[], bytes]]]:
    file = io.BytesIO()
    yield file, file.getvalue


@contextmanager
def to_file() -> Iterator[tuple[cio.Output, Callable[[], bytes]]]:
    with tempfile.NamedTemporaryFile() as named, open(named.name, "wb") as file:
        yield file, Path(named.name).read_bytes


@contextmanager
def to_file_descriptor() -> Iterator[tuple[cio.Output, Callable[[], bytes]]]:
    with tempfile.NamedTemporaryFile(buffering=0) as file:
        yield file.fileno(), Path(file.name).read_bytes


@contextmanager
def _read_beside(fd: int, close: Callable[[], object]) -> Iterator[Callable[[], bytes]]:
    """Read a descriptor to its end in a thread; the result is there after `close` of the other side."""
    pieces: list[bytes] = []
    reader = threading.Thread(target=lambda: pieces.append(read_all(fd)), daemon=True)
    reader.start()

    def result() -> bytes:
        close()
        reader.join(DEADLINE)
        return b"".join(pieces)

    yield result
    close()
    reader.join(DEADLINE)


@contextmanager
def to_pipe(*, blocking: bool = True) -> Iterator[tuple[cio.Output, Callable[[], bytes]]]:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, blocking)
    with (
        open(read_end, "rb", buffering=0),
        open(write_end, "wb", buffering=0) as target,
        _read_beside(read_end, target.close) as result,
    ):
        yield write_end, result


@contextmanager
def to_non_blocking_file() -> Iterator[tuple[cio.Output, Callable[[], bytes]]]:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with (
        open(read_end, "rb", buffering=0),
        open(write_end, "wb") as target,
        _read_beside(read_end, target.close) as result,
    ):
        yield target, result


@contextmanager
def to_socket(timeout: float | None = None) -> Iterator[tuple[cio.Output, Callable[[], bytes]]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        ours.settimeout(timeout)
        with _read_beside(theirs.fileno(), ours.close) as result:
            yield ours, result


DESTINATIONS: dict[str, Callable[[], AbstractContextManager[tuple[cio.Output, Callable[[], bytes]]]]] = {
    "callable": to_callable,
    "plain": to_plain,
    "trickle": to_trickle,
    "memory": to_memory,
    "file": to_file,
    "file descriptor": to_file_descriptor,
    "pipe": to_pipe,
    "non-blocking pipe": lambda: to_pipe(blocking=False),
    "non-blocking file": to_non_blocking_file,
    "socket": to_socket,
    "non-blocking socket": lambda: to_socket(0),
    "socket with a timeout": lambda: to_socket(0.01),
}


def test_64_mib_echo_back_equal(tmp_path: Path) -> None:
    data = pattern(64 * MIB)
    with Shim(tmp_path, with_stdin=True) as shim, to_callable() as (stdout, result):
        running = cio.copy(data, stdout)(shim.dio)
        shim.cat()
        running.wait()

        assert result() == data
        assert shim.stdin_closed.is_set()


@pytest.mark.parametrize("kind", DESTINATIONS)
def test_every_byte_arrives(kind: str, tmp_path: Path) -> None:
    out, err = pattern(3 * MIB + 1), pattern(MIB)[::-1]
    with Shim(tmp_path) as shim, DESTINATIONS[kind]() as (stdout, result), to_callable() as (stderr, errors):
        running = cio.copy(stdout=stdout, stderr=stderr)(shim.dio)
        shim.say(out)
        shim.say(err, "stderr")
        running.wait()

        assert result() == out
        assert errors() == err
        assert shim.dio.stdout.taken == len(out)
        assert shim.dio.stdout.drained()


@settings(max_examples=25, deadline=None)
@given(
    data=st.binary(max_size=5000).map(lambda block: block * 40),
    sizes=st.lists(st.integers(1, 70000), min_size=1, max_size=5),
    kind=st.sampled_from(sorted(DESTINATIONS)),
)
def test_it_does_not_matter_how_the_process_writes(data: bytes, sizes: list[int], kind: str) -> None:
    with (
        tempfile.TemporaryDirectory() as directory,
        Shim(Path(directory), terminal=True) as shim,
        DESTINATIONS[kind]() as (stdout, result),
    ):
        running = cio.copy(stdout=stdout)(shim.dio)
        fd = shim.open("stdout")
        for piece in chunks(data, [max(size, len(data) // 50) for size in sizes]):
            write_all(fd, piece)
        shim.shut(fd)
        running.wait()

        assert result() == data


def test_a_busy_stream_is_let_gather_and_a_quiet_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(copying, "sleep", pauses.append)
    monkeypatch.setattr(OutputStream, "widen", lambda stream: stream.path.endswith("-stdout"))
    full = pattern(ends.CHUNK)
    with Shim(tmp_path) as shim:
        quiet, busy, narrow = bytearray(), bytearray(), bytearray()
        with Shim(tmp_path, "other") as other:
            running = cio.copy(stdout=quiet.extend)(other.dio)
            other.say(b"a few words").join(DEADLINE)
            other.say(b"", "stderr").join(DEADLINE)
            running.wait()
        assert (bytes(quiet), pauses) == (b"a few words", [])
        fds = shim.open("stdout"), shim.open("stderr")
        for fd in fds:  # before anybody reads: the first look finds all of it, and the second nothing
            write_all(fd, full)
        running = cio.copy(stdout=busy.extend, stderr=narrow.extend)(shim.dio)
        eventually(lambda: pauses and bytes(busy) == bytes(narrow) == full, "all that was written")
        shim.shut(*fds)
        running.wait()
        assert pauses == [copying._GATHER_SECONDS]


def test_output_that_nobody_wants_is_drained(tmp_path: Path) -> None:
    with Shim(tmp_path) as shim:
        running = cio.copy()(shim.dio)
        shim.say(pattern(MIB)).join(DEADLINE)
        shim.say(pattern(MIB), "stderr").join(DEADLINE)
        running.wait()

        assert shim.dio.stdout.taken == shim.dio.stderr.taken == MIB  # type: ignore[union-attr] # no terminal


def test_nothing_before_the_first_writer_is_not_the_end(tmp_path: Path) -> None:
    with Shim(tmp_path, terminal=True) as shim, to_callable() as (stdout, result):
        running = cio.copy(stdout=stdout)(shim.dio)
        eventually(lambda: pump_threads() == ["libcontainerd-pump"], "the pump")
        shim.say(b"late")
        running.wait()

        assert result() == b"late"


def test_a_copy_woken_for_nothing_before_the_first_writer_waits_again(tmp_path: Path) -> None:
    with Shim(tmp_path, terminal=True) as shim:
        steps = copying.copy_output(shim.dio.stdout, ends.open_sink(None, "stdout"), "stdout")
        first = next(steps)

        assert next(steps) == first
        steps.close()


def test_a_process_that_never_opened_its_streams_ends_them_too(tmp_path: Path) -> None:
    with Shim(tmp_path) as shim:
        running = cio.copy()(shim.dio)
        shim.dio.process_ended()

        returns(running.wait)


def test_wait_returns_after_the_last_byte_was_delivered(tmp_path: Path) -> None:
    gate, got = threading.Event(), bytearray()

    def slow(data: bytes) -> None:
        gate.wait(DEADLINE)
        got.extend(data)

    with Shim(tmp_path) as shim:
        running = cio.copy(stdout=slow)(shim.dio)
        waiter = threading.Thread(target=running.wait)
        shim.say(b"last words").join(DEADLINE)
        shim.say(b"", "stderr").join(DEADLINE)
        waiter.start()
        eventually(lambda: shim.dio.stdout.in_hand == 10, "the read")

        assert waiter.is_alive()
        assert not shim.dio.stdout.drained()
        gate.set()
        waiter.join(DEADLINE)
        assert got == b"last words"
        assert shim.dio.stdout.drained()


def test_a_buffered_file_is_flushed_when_the_stream_is_idle(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Shim(tmp_path, terminal=True) as shim, log.open("wb") as file:
        running = cio.copy(stdout=file)(shim.dio)
        fd = shim.open("stdout")
        write_all(fd, b"a line\n")

        eventually(lambda: log.read_bytes() == b"a line\n", "the flush")
        write_all(fd, b"the last\n")
        shim.shut(fd)
        running.wait()
        assert log.read_bytes() == b"a line\nthe last\n"
        assert not file.closed


def test_a_file_without_flush_will_do(tmp_path: Path) -> None:
    with Shim(tmp_path, terminal=True) as shim, to_plain() as (stdout, result), capture_logs() as logs:
        running = cio.copy(stdout=stdout)(shim.dio)
        shim.say(b"x")
        running.wait()

        assert result() == b"x"
        assert logs == []


@pytest.mark.parametrize("kind", ["pipe", "socket", "non-blocking pipe", "non-blocking socket"])
def test_flags_are_left_alone(kind: str, tmp_path: Path) -> None:
    with Shim(tmp_path, terminal=True) as shim, DESTINATIONS[kind]() as (stdout, _):
        assert isinstance(stdout, int | socket.socket)
        before = fcntl.fcntl(stdout, fcntl.F_GETFL)
        running = cio.copy(stdout=stdout)(shim.dio)
        shim.say(pattern(MIB))
        running.wait()

        assert fcntl.fcntl(stdout, fcntl.F_GETFL) == before


# ----------------------------------------------------------------------------------------------------- nobody delays


def test_blocked_callables_delay_no_other_stream(tmp_path: Path) -> None:
    gate, inside = threading.Event(), threading.Semaphore(0)

    def stuck(_: bytes) -> None:
        inside.release()
        gate.wait(DEADLINE)

    with ExitStack() as stack:
        stack.callback(gate.set)
        blocked = [stack.enter_context(Shim(tmp_path, f"b{i}", terminal=True)) for i in range(20)]
        for shim in blocked:
            cio.copy(stdout=stuck)(shim.dio)
            shim.say(b"x")
        for _ in blocked:
            assert inside.acquire(timeout=DEADLINE), "a blocked callable delays another"
        shim = stack.enter_context(Shim(tmp_path, "free", terminal=True))
        stdout, result = stack.enter_context(to_callable())
        running = cio.copy(stdout=stdout)(shim.dio)
        shim.say(b"free")
        returns(running.wait)

        assert result() == b"free"
        gate.set()


def test_copies_that_never_pause_let_others_have_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pump, "_STALL_SECONDS", 1000.0)  # no worker is added for them
    read_end, write_end = os.pipe()

    def busy() -> pump.Steps:
        yield ((write_end, select.EPOLLOUT),)
        while True:
            yield ()

    def modest() -> pump.Steps:
        yield ((write_end, select.EPOLLOUT),)

    with open(read_end, "rb"), open(write_end, "wb"):
        copies = [Copy(busy()) for _ in range(pump._EAGER_WORKERS)]
        for copy in copies:
            copy.start()
        other = Copy(modest())
        other.start()

        returns(other.wait)
        for copy in copies:
            copy.cancel()


def test_a_full_socket_holds_no_worker(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with Shim(tmp_path, terminal=True) as shim, ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        running = cio.copy(stdout=ours)(shim.dio)
        shim.say(pattern(MIB))
        eventually(
            lambda: shim.dio.stdout.in_hand and pump_threads() == ["libcontainerd-pump"], "a full socket"
        )

        got = bytearray()
        while len(got) < MIB:
            got += theirs.recv(65536)
        running.wait()
        assert got == pattern(MIB)


def _no_such_flag(*_: object) -> int:
    raise OSError(errno.EOPNOTSUPP, "as Linux before 6.5 says of a pipe")


@pytest.mark.parametrize("kind", ["blocking", "blocking on an older kernel", "non-blocking"])
def test_a_full_pipe_holds_no_worker(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "older" in kind:
        monkeypatch.setattr(os, "pwritev", _no_such_flag)
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, kind.startswith("blocking"))
    with open(read_end, "rb") as reader, open(write_end, "wb") as writer:
        with Shim(tmp_path, terminal=True) as shim:
            running = cio.copy(stdout=write_end)(shim.dio)
            shim.say(pattern(MIB))
            eventually(
                lambda: shim.dio.stdout.in_hand and pump_threads() == ["libcontainerd-pump"], "a full pipe"
            )

            assert reader.read(MIB) == pattern(MIB)
            running.wait()
        writer.close()
        assert reader.read() == b""


def test_one_full_pipe_for_many_streams_holds_no_worker(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    with ExitStack() as stack:
        reader = stack.enter_context(open(read_end, "rb"))
        stack.enter_context(open(write_end, "wb"))
        shims = [stack.enter_context(Shim(tmp_path, f"p{number}")) for number in range(10)]
        running = [cio.copy(stdout=write_end, stderr=write_end)(shim.dio) for shim in shims]
        for shim in shims:
            shim.say(b"o" * 100_000)
            shim.say(b"e" * 100_000, "stderr")
        outputs = [stream for shim in shims for stream in shim.dio.outputs]
        eventually(lambda: all(stream.in_hand for stream in outputs), "a chunk of each")
        eventually(lambda: pump_threads() == ["libcontainerd-pump"], "the workers' end")

        got = reader.read(2_000_000)
        for each in running:
            returns(each.wait)
        assert (got.count(b"o"), got.count(b"e")) == (1_000_000, 1_000_000)


def test_one_socket_for_all_three_streams(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with Shim(tmp_path, with_stdin=True) as shim, ours, theirs:
        running = cio.copy(ours, ours, ours)(shim.dio)
        source, out, err = shim.open("stdin"), shim.open("stdout"), shim.open("stderr")
        theirs.sendall(b"question")
        assert os.read(source, 100) == b"question"
        write_all(out, b"answer")
        assert theirs.recv(100) == b"answer"
        write_all(err, b"complaint")
        assert theirs.recv(100) == b"complaint"
        theirs.sendall(b"more")
        assert os.read(source, 100) == b"more"
        shim.dio.process_is_there()
        theirs.shutdown(socket.SHUT_WR)
        assert os.read(source, 100) == b""
        shim.shut(source, out, err)

        returns(running.wait)


def test_1000_silent_streams_share_one_thread(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with ExitStack() as stack:
            shims = [stack.enter_context(Shim(tmp_path, f"p{number}")) for number in range(500)]
            pieces: list[bytes] = []
            for shim in shims:
                cio.copy(stdout=pieces.append)(shim.dio)
            assert pump_threads() == ["libcontainerd-pump"]

            shims[321].say(b"one of them speaks")
            eventually(lambda: pieces == [b"one of them speaks"], "its delivery")
            eventually(lambda: pump_threads() == ["libcontainerd-pump"], "silence")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_200_short_streams_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A machine that lets none of the workers run for a hundredth of a second looks like workers that are stuck.
    monkeypatch.setattr(pump, "_STALL_SECONDS", 1000.0)
    results = [bytearray() for _ in range(200)]
    most = 0
    with ExitStack() as stack:
        shims = [stack.enter_context(Shim(tmp_path, f"p{number}", terminal=True)) for number in range(200)]
        running = [cio.copy(stdout=got.extend)(shim.dio) for shim, got in zip(shims, results, strict=True)]
        start = threading.Barrier(201)

        def speak(shim: Shim, number: int) -> None:
            fd = shim.open("stdout")
            start.wait(DEADLINE)
            write_all(fd, b"%d" % number * 100)
            shim.shut(fd)

        for number, shim in enumerate(shims):
            shim.run(speak, shim, number)
        start.wait(DEADLINE)
        for each in running:
            returns(each.wait)
            most = max(most, len(pump_threads()))

    assert [bytes(got) for got in results] == [b"%d" % number * 100 for number in range(200)]
    assert most <= pump._EAGER_WORKERS + 1, "a thread for each stream"


# ------------------------------------------------------------------------------------------ destinations that fail


def _raise(error: BaseException) -> Callable[[bytes], object]:
    def write(_: bytes) -> object:
        raise error

    return write


class NoFlush(io.BytesIO):
    def flush(self) -> None:
        raise OSError(errno.EIO, "no flush")


class TakesNothing(io.RawIOBase):
    def __init__(self, answer: int | None) -> None:
        super().__init__()
        self.answer = answer

    def writable(self) -> bool:
        return True

    def write(self, _: object, /) -> int | None:
        return self.answer


def broken_pipe(stack: ExitStack) -> cio.Output:
    read_end, write_end = os.pipe()
    os.close(read_end)
    return stack.enter_context(open(write_end, "wb", buffering=0)).fileno()


def broken_socket(stack: ExitStack) -> cio.Output:
    ours, theirs = socket.socketpair()
    theirs.close()
    return stack.enter_context(ours)


FAILURES: dict[str, Callable[[ExitStack], cio.Output]] = {
    "exception": lambda _: _raise(OSError(errno.ENOSPC, "full")),
    "exit": lambda _: _raise(SystemExit(3)),
    "pipe": broken_pipe,
    "socket": broken_socket,
    "flush": lambda _: NoFlush(),
    "nothing taken": lambda _: TakesNothing(0),
    "would block for ever": lambda _: TakesNothing(None),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_destination_that_fails_is_logged_once_and_drained_on(kind: str, tmp_path: Path) -> None:
    with ExitStack() as stack, capture_logs() as logs:
        destination = FAILURES[kind](stack)
        shim = stack.enter_context(Shim(tmp_path, terminal=True))
        running = cio.copy(stdout=destination)(shim.dio)
        fd = shim.open("stdout")
        for _ in range(3):
            write_all(fd, pattern(MIB))
        shim.shut(fd)

        returns(running.wait)
    (event,) = logs
    assert event["event"] == "destination_failed"
    assert (event["stream"], event["path"]) == ("stdout", shim.dio.config.stdout)


def test_a_destination_that_fails_midway_keeps_what_came_before(tmp_path: Path) -> None:
    pieces: list[bytes] = []

    def third_time_unlucky(data: bytes) -> None:
        if len(pieces) == 2:
            raise RuntimeError("third")
        pieces.append(data)

    with Shim(tmp_path, terminal=True) as shim, capture_logs() as logs:
        running = cio.copy(stdout=third_time_unlucky)(shim.dio)
        shim.say(pattern(MIB))
        running.wait()

        assert b"".join(pieces) == pattern(MIB)[: sum(map(len, pieces))]
        assert len(pieces) == 2
        assert len(logs) == 1


def test_a_socket_closed_by_its_owner_fails_like_any(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with Shim(tmp_path, terminal=True) as shim, theirs, capture_logs() as logs:
        running = cio.copy(stdout=ours)(shim.dio)
        fd = shim.open("stdout")
        ours.close()
        write_all(fd, pattern(MIB))
        shim.shut(fd)
        running.wait()

        assert [event["event"] for event in logs] == ["destination_failed"]


# ---------------------------------------------------------------------------------------------------------- cancel


def test_cancel_leaves_what_was_not_read_in_the_fifo(tmp_path: Path) -> None:
    gate, inside = threading.Event(), threading.Event()

    def stuck(_: bytes) -> None:
        inside.set()
        gate.wait(DEADLINE)

    with Shim(tmp_path, terminal=True) as shim:
        running = cio.copy(stdout=stuck)(shim.dio)
        with open(os.open(shim.dio.config.stdout, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as second:
            fd = shim.open("stdout")
            write_all(fd, b"taken")
            assert inside.wait(DEADLINE)
            write_all(fd, b"left")

            running.cancel()
            returns(running.wait)
            gate.set()
            eventually(lambda: pump_threads() in ([], ["libcontainerd-pump"]), "the worker's end")
            assert second.read() == b"left"


@pytest.mark.parametrize("end", ["cancel", "close", "direct cancel", "direct close"])
@pytest.mark.parametrize("state", ["silent", "in a callable", "full socket", "source waits", "stdin full"])
def test_cancel_wakes_whatever_is_blocked(state: str, end: str, tmp_path: Path) -> None:
    gate, inside = threading.Event(), threading.Event()

    def stuck(_: bytes) -> None:
        inside.set()
        gate.wait(DEADLINE)

    ours, theirs = socket.socketpair()
    with Shim(tmp_path, with_stdin=True) as shim, ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # less than the process says
        stdin: cio.Input | None = None
        stdout: cio.Output | None = None
        if state == "in a callable":
            stdout = stuck
        elif state == "full socket":
            stdout = ours
        elif state == "source waits":
            stdin = ours
        elif state == "stdin full":
            stdin = bytes(MIB)
        running = cio.copy(stdin, stdout)(shim.dio)
        if state in ("in a callable", "full socket"):
            shim.run(shim.say, bytes(60000))
            if state == "full socket":
                eventually(lambda: shim.dio.stdout.in_hand, "the read")
            else:
                assert inside.wait(DEADLINE)

        returns(getattr(shim.dio if "direct" in end else running, end.removeprefix("direct ")))
        returns(running.wait)
        gate.set()
        running.cancel()
        running.close()
        running.close()


def test_an_io_that_was_cancelled_before_it_began_copies_nothing(tmp_path: Path) -> None:
    with Shim(tmp_path, terminal=True) as shim:
        shim.dio.cancel()
        running = cio.copy(stdout=_raise(AssertionError("called")))(shim.dio)

        returns(running.wait)


def test_attaching_closed_streams_ends_at_once(tmp_path: Path) -> None:
    with Shim(tmp_path, with_stdin=True) as shim:
        shim.dio.close()
        running = cio.copy(b"x", lambda _: None)(shim.dio)

        returns(running.wait)


# ----------------------------------------------------------------------------------------------------------- stdin


@contextmanager
def from_bytes(data: bytes) -> Iterator[cio.Input]:
    yield data


@contextmanager
def from_view(data: bytes) -> Iterator[cio.Input]:
    yield memoryview(bytearray(data))


@contextmanager
def from_callable(data: bytes) -> Iterator[cio.Input]:
    pieces = chunks(data, [1000, 70000])
    yield lambda: next(pieces, b"")


@contextmanager
def from_memory(data: bytes) -> Iterator[cio.Input]:
    yield io.BytesIO(data)


@contextmanager
def from_file(data: bytes) -> Iterator[cio.Input]:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        yield file


@contextmanager
def from_file_descriptor(data: bytes) -> Iterator[cio.Input]:
    with from_file(data) as file:
        assert isinstance(file, io.BufferedRandom)
        yield file.fileno()


class OnlyInto:
    """A source with readinto and nothing else."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def readinto(self, buffer: bytearray, /) -> int:
        return self._file.readinto(buffer)


@contextmanager
def from_into(data: bytes) -> Iterator[cio.Input]:
    yield OnlyInto(data)


@contextmanager
def from_pipe(data: bytes, form: str = "descriptor", *, blocking: bool = True) -> Iterator[cio.Input]:
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, blocking)

    def feed() -> None:
        with open(write_end, "wb", buffering=0) as file:
            for piece in chunks(data, [1000, 70000]):
                write_all(file.fileno(), piece)

    with open(read_end, "rb", buffering=0 if form == "raw" else -1) as reader:
        feeder = threading.Thread(target=feed, daemon=True)
        feeder.start()
        yield read_end if form == "descriptor" else reader
        feeder.join(DEADLINE)


@contextmanager
def from_socket(data: bytes, timeout: float | None = None) -> Iterator[cio.Input]:
    ours, theirs = socket.socketpair()

    def feed() -> None:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)

    with ours, theirs:
        ours.settimeout(timeout)
        feeder = threading.Thread(target=feed, daemon=True)
        feeder.start()
        yield ours
        feeder.join(DEADLINE)


SOURCES: dict[str, Callable[[bytes], AbstractContextManager[cio.Input]]] = {
    "bytes": from_bytes,
    "view": from_view,
    "callable": from_callable,
    "memory": from_memory,
    "file": from_file,
    "file descriptor": from_file_descriptor,
    "into": from_into,
    "pipe": from_pipe,
    "non-blocking pipe": lambda data: from_pipe(data, blocking=False),
    "buffered pipe": lambda data: from_pipe(data, "buffered"),
    "raw pipe": lambda data: from_pipe(data, "raw"),
    "raw non-blocking pipe": lambda data: from_pipe(data, "raw", blocking=False),
    "socket": from_socket,
    "non-blocking socket": lambda data: from_socket(data, 0),
    "socket with a timeout": lambda data: from_socket(data, 0.01),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_byte_of_a_source_arrives_and_then_its_end(kind: str, tmp_path: Path) -> None:
    data = pattern(2 * MIB + 7)
    with SOURCES[kind](data) as stdin, Shim(tmp_path, with_stdin=True) as shim:
        running = cio.copy(stdin)(shim.dio)
        shim.dio.process_is_there()
        fd = shim.open("stdin")

        assert read_all(fd) == data
        assert shim.stdin_closed.is_set()
        running.cancel()


def test_what_a_buffered_reader_holds_already_comes_first(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    with open(read_end, "rb") as reader, open(write_end, "wb", buffering=0) as writer:
        writer.write(b"header\nbody")
        assert reader.readline() == b"header\n"
        with Shim(tmp_path, with_stdin=True) as shim:
            running = cio.copy(reader)(shim.dio)
            fd = shim.open("stdin")

            assert os.read(fd, 100) == b"body"
            writer.close()
            running.cancel()


@pytest.mark.parametrize("kind", ["pipe", "raw pipe", "socket", "buffered pipe"])
def test_a_source_that_waits_holds_no_worker(kind: str, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    read_end, write_end = os.pipe()
    with (
        ours,
        theirs,
        open(read_end, "rb", buffering=0 if "raw" in kind else -1) as reader,
        open(write_end, "wb", buffering=0) as writer,
        Shim(tmp_path, with_stdin=True) as shim,
    ):
        stdin: cio.Input = ours if kind == "socket" else read_end if kind == "pipe" else reader
        writer.write(b"first")
        theirs.sendall(b"first")
        cio.copy(stdin)(shim.dio)
        fd = shim.open("stdin")
        assert os.read(fd, 100) == b"first"

        eventually(lambda: pump_threads() == ["libcontainerd-pump"], "the worker's end")
        writer.write(b"second")
        theirs.sendall(b"second")
        assert os.read(fd, 100) == b"second"


def test_a_source_that_fails_is_logged_and_ends_the_input(tmp_path: Path) -> None:
    def fail() -> bytes:
        raise RuntimeError("no more")

    with Shim(tmp_path, with_stdin=True) as shim, capture_logs() as logs:
        cio.copy(fail)(shim.dio)
        shim.dio.process_is_there()

        assert read_all(shim.open("stdin")) == b""
    assert [(event["event"], event["stream"]) for event in logs] == [("source_failed", "stdin")]


def test_a_process_that_ends_ends_the_copy_of_its_stdin_quietly(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with Shim(tmp_path, with_stdin=True) as shim, ours, theirs, capture_logs() as logs:
        cio.copy(ours)(shim.dio)
        shim.open("stdin")
        shim.open("stdout")
        shim.open("stderr")
        shim.exit()

        eventually(lambda: not pump_threads(), "the end of all copies")
        theirs.sendall(b"for others")
        assert ours.recv(100) == b"for others"
        assert logs == []


def test_a_process_that_ends_while_its_stdin_is_full_ends_the_copy_quietly(tmp_path: Path) -> None:
    with Shim(tmp_path, with_stdin=True) as shim, capture_logs() as logs:
        cio.copy(bytes(MIB))(shim.dio)
        fd = shim.open("stdin")
        assert os.read(fd, 10) == bytes(10)
        shim.exit()

        eventually(lambda: shim.stdin_closed.is_set() or not pump_threads(), "the end of the copy")
        assert logs == []


def test_without_a_source_stdin_stays_the_callers(tmp_path: Path) -> None:
    with Shim(tmp_path, with_stdin=True) as shim:
        cio.copy()(shim.dio)
        fd = shim.open("stdin")
        assert shim.dio.stdin is not None
        shim.dio.stdin.write(b"by hand")

        assert os.read(fd, 100) == b"by hand"


def test_a_stream_that_closes_under_a_copy_is_not_given_its_end_of_input(tmp_path: Path) -> None:
    with Shim(tmp_path, with_stdin=True) as shim:
        shim.dio.process_is_there()
        assert shim.dio.stdin is not None
        steps = copying.copy_input(shim.dio.stdin, ends.open_source(b"x"))
        next(steps)
        shim.dio.stdin.shut()

        assert list(steps) == []
        assert not shim.stdin_closed.is_set()


def test_the_end_of_the_input_is_not_sent_for_a_stream_that_the_library_gave_up(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with Shim(tmp_path, with_stdin=True) as shim, ours, theirs:
        running = cio.copy(ours)(shim.dio)
        shim.dio.process_is_there()
        shim.open("stdin")
        shim.dio.abandon()
        theirs.sendall(b"x")
        theirs.close()

        returns(running.wait)
        eventually(lambda: not pump_threads(), "the end of all copies")
        assert not shim.stdin_closed.is_set()


def test_devices_that_cannot_be_waited_for(tmp_path: Path) -> None:
    with Shim(tmp_path, with_stdin=True) as shim, open("/dev/null", "r+b", buffering=0) as null:
        running = cio.copy(null.fileno(), null.fileno())(shim.dio)
        shim.cat()

        returns(running.wait)


# ------------------------------------------------------------------------------------------------------- the engine


def test_a_thread_that_cannot_be_started_fails_the_attachment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with Shim(tmp_path, with_stdin=True) as shim:
        monkeypatch.setattr(pump, "_start_thread", refuse)

        with pytest.raises(RuntimeError, match="start new thread"):
            cio.copy(b"x")(shim.dio)


def test_a_worker_that_cannot_be_started_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, refused = pump._start_thread, threading.Event()

    def refuse_once(target: Callable[..., None], name: str, *args: object) -> None:
        if name == "libcontainerd-copy" and not refused.is_set():
            refused.set()
            raise RuntimeError("can't start new thread")
        original(target, name, *args)

    monkeypatch.setattr(pump, "_start_thread", refuse_once)
    with Shim(tmp_path, terminal=True) as shim, to_callable() as (stdout, result), capture_logs() as logs:
        running = cio.copy(stdout=stdout)(shim.dio)
        shim.say(b"in the end")
        returns(running.wait)

        assert result() == b"in the end"
        assert refused.is_set()
        assert [event["event"] for event in logs] == ["pump_threads_not_started"]


def test_a_step_that_raises_ends_its_copy_and_no_other() -> None:
    read_end, write_end = os.pipe()

    def faulty() -> pump.Steps:
        yield ((write_end, select.EPOLLOUT),)
        raise RuntimeError("a bug")

    with open(read_end, "rb"), open(write_end, "wb"), capture_logs() as logs:
        copy = Copy(faulty())
        copy.start()
        returns(copy.wait)

    assert [event["event"] for event in logs] == ["copy_failed"]


def test_a_leftover_of_a_closed_descriptor_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    first_read, first_write = os.pipe()
    spare = os.dup(first_read)  # keeps the file alive, and with it what epoll knows under the old number
    woken = threading.Event()

    def steps(fd: int) -> pump.Steps:
        yield ((fd, select.EPOLLIN),)
        woken.set()

    old = Copy(steps(first_read))
    old.start()
    os.close(first_read)
    second_read, second_write = os.pipe()
    assert second_read == first_read, "the number was not used again"
    new = Copy(steps(second_read))
    new.start()
    os.write(second_write, b"x")

    assert woken.wait(DEADLINE)
    returns(new.wait)
    old.cancel()

    fired: list[int] = []
    original = Pump._dispatch

    def count(self: Pump, fd: int, mask: int) -> None:
        fired.append(fd)
        original(self, fd, mask)

    monkeypatch.setattr(Pump, "_dispatch", count)
    os.write(first_write, b"x")
    os.read(second_read, 1)
    for _ in range(20):
        next_one = Copy(steps(second_read))
        next_one.start()
        os.write(second_write, b"x")
        returns(next_one.wait)
        os.read(second_read, 1)
    assert fired.count(second_read) <= 22, "the leftover keeps the watcher busy"
    for fd in (spare, first_write, second_read, second_write):
        os.close(fd)


def test_a_copy_may_be_cancelled_before_it_starts_and_after_it_ended() -> None:
    ended: list[str] = []
    copy = Copy(iter_steps(), lambda: ended.append("end"))
    copy.cancel()
    copy.start()
    copy.cancel()

    returns(copy.wait)
    assert ended == ["end"]


def iter_steps() -> pump.Steps:
    yield ()


def test_a_pump_that_fell_asleep_wakes_for_the_next_copy(tmp_path: Path) -> None:
    for number in range(3):
        with Shim(tmp_path, f"p{number}", terminal=True) as shim, to_callable() as (stdout, result):
            running = cio.copy(stdout=stdout)(shim.dio)
            shim.say(b"again")
            returns(running.wait)
            assert result() == b"again"
        eventually(lambda: not pump_threads(), "the pump's sleep")


FORK = """
import os, sys, warnings
from pathlib import Path
from tests.unit.cio.shim import Shim
from libcontainerd import cio
warnings.simplefilter("ignore")
directory = Path(sys.argv[1])
parent = Shim(directory, "parent", terminal=True)
heard = []
running = cio.copy(stdout=heard.append)(parent.dio)
pid = os.fork()
if pid == 0:
    running.wait()
    with Shim(directory, "child", terminal=True) as child:
        got = []
        mine = cio.copy(stdout=got.append)(child.dio)
        child.say(b"from the child")
        mine.wait()
    os._exit(0 if got == [b"from the child"] else 1)
assert os.waitpid(pid, 0)[1] == 0, "the child"
parent.say(b"from the parent")
running.wait()
assert heard == [b"from the parent"], heard
"""


def test_a_forked_child_starts_afresh(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(tmp_path)],
        timeout=DEADLINE,
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )

    assert done.returncode == 0, done.stderr


def test_the_collector_may_strike_under_the_pumps_lock(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    streams = [OutputStream(End(str(tmp_path / "fifo"), os.O_RDONLY)) for _ in range(2)]
    for stream in streams:
        stream.on_close = Copy(iter_nothing()).cancel
    streams[0].shut()
    del stream

    def collect() -> None:
        with pump._pump._lock:
            streams.clear()

    Beside(collect).answer()


def iter_nothing() -> Generator[ends.Wait, None, None]:
    yield ()
