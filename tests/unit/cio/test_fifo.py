"""FIFO sets and their ends: what Linux does with FIFOs, and what the streams make of it."""

from __future__ import annotations

import array
import asyncio
import errno
import fcntl
import gc
import itertools
import os
import select
import selectors
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libcontainerd.cio import fifo
from libcontainerd.cio.fifo import End, FifoSet, InputStream, OutputStream, unlink
from libcontainerd.errors import InvalidParameterError
from tests.unit.beside import DEADLINE, Beside, eventually, race
from tests.unit.cio.shim import open_descriptors, read_all, write_all

ME = (os.geteuid(), os.getegid())
PIPE_BYTES = 65536


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A FIFO."""
    name = str(tmp_path / "fifo")
    os.mkfifo(name)
    return name


@pytest.fixture
def output(path: str) -> Iterator[OutputStream]:
    stream = OutputStream(End(path, os.O_RDONLY))
    yield stream
    stream.close()


class Stdin:
    """An InputStream and what became of it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.closes: list[InputStream] = []
        holder = End(path, os.O_RDWR)
        self.end = End(path, os.O_WRONLY)
        self.stream = InputStream(self.end, holder, self.closes.append)

    def reader(self) -> int:
        """Open the process's end."""
        return os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)

    def fill(self) -> None:
        """Write until the FIFO is full."""
        with self.stream.use() as fd, suppress(BlockingIOError):
            while True:
                os.write(fd, bytes(PIPE_BYTES))


@pytest.fixture
def stdin(path: str) -> Iterator[Stdin]:
    made = Stdin(path)
    yield made
    made.stream.shut()
    made.stream.close()


@contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def blocked(end: End) -> bool:
    """Whether some thread has gone into `End.poll` to wait."""
    return end._wake >= 0 and end._users > 0


def blocked_read(stream: OutputStream) -> Beside[bytes | None]:
    """Begin a read that finds nothing."""
    reading = Beside(lambda: stream.read(10))
    eventually(lambda: blocked(stream._end), "a blocked read")
    return reading


def blocked_write(stdin: Stdin) -> Beside[int]:
    """Begin a write that finds no room."""
    stdin.fill()
    writing = Beside(lambda: stdin.stream.write(b"x"))
    eventually(lambda: blocked(stdin.end), "a blocked write")
    return writing


# ------------------------------------------------------------------------------------------------------------ FIFO sets


@pytest.mark.parametrize("with_stdin", [False, True])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_set_names_what_containerd_is_told(with_stdin: bool, terminal: bool) -> None:
    fifos = FifoSet.within("/run/bundle", "init", with_stdin=with_stdin, terminal=terminal)

    assert fifos.stdin == ("/run/bundle/init-stdin" if with_stdin else "")
    assert fifos.stdout == "/run/bundle/init-stdout"
    assert fifos.stderr == ("" if terminal else "/run/bundle/init-stderr")
    assert fifos.terminal is terminal
    assert fifos.paths == tuple(path for path in (fifos.stdin, fifos.stdout, fifos.stderr) if path)


@given(
    length=st.integers(4070, 4110),
    letter=st.sampled_from(["a", "é", "\udcff"]),
    with_stdin=st.booleans(),
    terminal=st.booleans(),
)
def test_a_path_is_refused_exactly_where_the_kernel_would_refuse_it(
    length: int, letter: str, with_stdin: bool, terminal: bool
) -> None:
    directory = "/" + letter * (length // len(os.fsencode(letter)))
    longest = (
        len(os.fsencode(directory)) + len("/init-") + len("stdout")
    )  # as long as stderr, longer than stdin

    if longest >= 4096:
        with pytest.raises(InvalidParameterError, match="4095: choose a shorter state_dir"):
            FifoSet.within(directory, "init", with_stdin=with_stdin, terminal=terminal)
    else:
        FifoSet.within(directory, "init", with_stdin=with_stdin, terminal=terminal)


def test_fifos_are_made_with_mode_0700_whatever_the_umask(tmp_path: Path) -> None:
    fifos = FifoSet.within(str(tmp_path), "init", with_stdin=True, terminal=False)
    before = os.umask(0o777)
    try:
        made = fifos.make(ME)
    finally:
        os.umask(before)

    assert made == list(fifos.paths)
    for path in made:
        found = os.stat(path)
        assert stat.S_ISFIFO(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o700
        assert (found.st_uid, found.st_gid) == ME


def test_new_fifos_get_their_owner_and_old_ones_keep_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners: dict[str, tuple[int, int]] = {}
    monkeypatch.setattr(os, "chown", lambda path, uid, gid: owners.update({path: (uid, gid)}))
    fifos = FifoSet.within(str(tmp_path), "init", with_stdin=True, terminal=False)
    os.mkfifo(fifos.stdin, 0o600)

    assert fifos.make((1000, 1001)) == [fifos.stdout, fifos.stderr]
    assert owners == {fifos.stdout: (1000, 1001), fifos.stderr: (1000, 1001)}
    assert stat.S_IMODE(os.stat(fifos.stdin).st_mode) == 0o600


@pytest.mark.parametrize("failing", [1, 2, 3])
@pytest.mark.parametrize("error", [OSError(errno.EPERM, "no"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_no_new_fifo_and_takes_no_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, error: BaseException
) -> None:
    calls = itertools.count(1)

    def chmod(*_: object) -> None:
        if next(calls) == failing:
            raise error

    monkeypatch.setattr(os, "chmod", chmod)
    fifos = FifoSet.within(str(tmp_path), "init", with_stdin=True, terminal=False)
    other = tmp_path / "other-stdout"
    os.mkfifo(other)

    with pytest.raises(type(error)):
        fifos.make(ME)
    assert list(tmp_path.iterdir()) == [other]


def test_unlink_removes_what_is_there(tmp_path: Path) -> None:
    fifos = FifoSet.within(str(tmp_path), "init", with_stdin=True, terminal=True)
    os.mkfifo(fifos.stdout)

    fifos.unlink()
    fifos.unlink()
    unlink([str(tmp_path / "never")])

    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------------ ends


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
def test_only_a_fifo_is_opened(tmp_path: Path, flags: int) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"precious")
    link = tmp_path / "link"
    os.mkfifo(tmp_path / "real")
    link.symlink_to(tmp_path / "real")
    before = open_descriptors()

    with pytest.raises(FileExistsError, match="not a FIFO"):
        End(str(file), flags)
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        End(str(link), flags)
    with pytest.raises(FileNotFoundError):
        End(str(tmp_path / "none"), flags)
    with pytest.raises(OSError, match=r"not a FIFO|Is a directory"):
        End(str(tmp_path), flags)
    assert open_descriptors() == before
    assert file.read_bytes() == b"precious"


def test_a_write_end_needs_a_reader_or_a_holder(path: str) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
        End(path, os.O_WRONLY)

    holder = End(path, os.O_RDWR)
    writer = End(path, os.O_WRONLY)
    writer.close()
    holder.close()


def test_descriptors_are_non_blocking_and_not_inherited(path: str) -> None:
    end = End(path, os.O_RDONLY)

    assert not os.get_blocking(end.fileno())
    assert not os.get_inheritable(end.fileno())
    end.close()


def test_a_closed_end_has_no_descriptor(path: str) -> None:
    end = End(path, os.O_RDONLY)
    states = [end.closed]
    end.close()
    end.close()
    states.append(end.closed)

    assert states == [False, True]
    with pytest.raises(ValueError, match="closed FIFO"):
        end.fileno()
    with pytest.raises(ValueError, match="closed FIFO"):
        end.acquire()
    end.interrupt()


def test_the_last_user_closes_the_descriptor(path: str) -> None:
    end = End(path, os.O_RDONLY)
    first, second = end.acquire(), end.acquire()
    end.close()
    end.release()
    with opened("/dev/null", os.O_RDONLY) as other:
        assert other != first == second
    assert stat.S_ISFIFO(os.fstat(first).st_mode)

    end.release()
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(first)


def test_a_descriptors_number_never_changes_its_meaning_under_a_user(tmp_path: Path) -> None:
    # Readers borrow, a closer closes, and another thread takes every number that becomes free.
    stop = threading.Event()
    wrong: list[str] = []
    inode = 0
    names = itertools.count()

    def take_numbers() -> None:
        while not stop.is_set():
            with opened("/dev/null", os.O_RDONLY):
                pass

    def use(end: End, barrier: threading.Barrier) -> None:
        barrier.wait(DEADLINE)
        with suppress(ValueError):
            while True:
                with end.use() as fd:
                    end.poll(0)
                    if os.fstat(fd).st_ino != inode:
                        wrong.append(f"{fd} became {os.readlink(f'/proc/self/fd/{fd}')}")

    taker = Beside(take_numbers)
    for _ in range(60):
        name = str(tmp_path / f"fifo{next(names)}")
        os.mkfifo(name)
        inode = os.stat(name).st_ino
        end = End(name, os.O_RDONLY)
        barrier = threading.Barrier(3)
        users = [Beside(lambda end=end, barrier=barrier: use(end, barrier)) for _ in range(2)]  # type: ignore[misc]
        barrier.wait(DEADLINE)
        end.close()
        for user in users:
            user.answer()
    stop.set()
    taker.answer()
    assert wrong == []


def test_poll_tells_what_the_kernel_says(path: str) -> None:
    end = End(path, os.O_RDONLY)
    with end.use():
        assert end.poll(select.POLLIN) == 0
        with opened(path, os.O_WRONLY) as writer:
            os.write(writer, b"x")
            assert end.poll(select.POLLIN, None) == select.POLLIN
        assert end.poll(select.POLLIN) == select.POLLIN | select.POLLHUP
    end.close()


def test_poll_comes_back_when_its_time_is_up(path: str) -> None:
    end = End(path, os.O_RDONLY)
    with end.use():
        begin = time.monotonic()
        assert end.poll(select.POLLIN, 0.02) == 0
        assert time.monotonic() - begin >= 0.02
    end.close()


def poll_for_ever(end: End) -> int:
    with end.use():
        return end.poll(select.POLLIN, None)


@pytest.mark.parametrize("wake", [End.interrupt, End.close])
def test_whoever_is_blocked_wakes_up(path: str, wake: Callable[[End], None]) -> None:
    end = End(path, os.O_RDONLY)
    blocked_ones = [Beside(lambda: poll_for_ever(end)) for _ in range(3)]
    eventually(lambda: blocked(end) and end._users == 3, "three blocked polls")

    wake(end)
    assert [each.answer() for each in blocked_ones] == [0, 0, 0]
    end.close()


def test_an_interrupt_stays_in_force(path: str) -> None:
    end = End(path, os.O_RDONLY)
    end.interrupt()
    assert Beside(lambda: poll_for_ever(end)).answer() == 0
    assert Beside(lambda: poll_for_ever(end)).answer() == 0
    end.close()


def test_a_close_between_borrowing_and_blocking_is_not_slept_through(path: str) -> None:
    end = End(path, os.O_RDONLY)
    end.acquire()
    end.close()
    assert Beside(lambda: end.poll(select.POLLIN, None)).answer() == 0
    end.release()


def test_threads_that_block_at_once_share_one_wake_up_descriptor(tmp_path: Path) -> None:
    # More than one made at once must leave only one: the check for leaks after each test counts them.
    for number in range(30):
        name = str(tmp_path / str(number))
        os.mkfifo(name)
        end = End(name, os.O_RDONLY)
        with end.use():
            assert len(set(race(*[end._wake_descriptor] * 4))) == 1
        end.close()


def test_close_beside_interrupt_leaks_nothing(tmp_path: Path) -> None:
    for number in range(30):
        name = str(tmp_path / str(number))
        os.mkfifo(name)
        end = End(name, os.O_RDONLY)
        assert race(end.close, end.interrupt, end.close) == [None, None, None]


# --------------------------------------------------------------------------------------------------------- output streams


def test_nothing_before_the_first_writer_is_not_the_end(output: OutputStream) -> None:
    with output.use() as fd:
        assert os.read(fd, 10) == b""
        assert not output.at_end()
    reading = blocked_read(output)

    with opened(output.path, os.O_WRONLY) as writer:
        assert reading.running
        os.write(writer, b"late")
        assert reading.answer() == b"late"


def test_the_end_comes_when_the_last_writer_has_gone(output: OutputStream) -> None:
    with opened(output.path, os.O_WRONLY) as first:
        with opened(output.path, os.O_WRONLY) as second:
            os.write(second, b"b")
        os.write(first, b"a")
        assert output.read(10) == b"ba"
        reading = blocked_read(output)
        assert reading.running
    assert reading.answer() == b""
    assert output.read(10) == b""


def test_a_writer_that_comes_and_goes_without_a_word_is_the_end(output: OutputStream) -> None:
    reading = blocked_read(output)
    with opened(output.path, os.O_WRONLY):
        pass
    assert reading.answer() == b""


def test_what_was_written_comes_before_the_end(output: OutputStream) -> None:
    with opened(output.path, os.O_WRONLY) as writer:
        os.write(writer, b"0123456789")
    with output.use() as fd:
        os.read(fd, 1)
        assert not output.at_end()

    assert output.read(4) == b"1234"
    assert output.readall() == b"56789"
    assert output.readall() == b""


def test_a_stream_that_no_writer_ever_opened_ends_with_its_process(output: OutputStream) -> None:
    reading = blocked_read(output)
    output.process_ended()
    assert reading.answer() == b""
    assert output.pending() == (0, True)
    assert output.drained()


def test_a_process_may_end_after_its_fifo_was_removed_or_closed(output: OutputStream) -> None:
    os.unlink(output.path)
    output.process_ended()
    assert output.read() == b""
    output.close()
    output.process_ended()


def test_the_process_end_takes_nothing_away(output: OutputStream) -> None:
    with opened(output.path, os.O_WRONLY) as writer:
        os.write(writer, b"last words")
        output.process_ended()
        assert output.read(5) == b"last "
        assert output.pending() == (5, False), "the shim has the FIFO open still"
        os.write(writer, b" and more")
    assert output.readall() == b"words and more"


def test_it_is_a_raw_binary_readable_stream(output: OutputStream) -> None:
    assert output.readable()
    assert not output.writable()
    assert not output.seekable()
    with opened(output.path, os.O_WRONLY) as writer:
        os.write(writer, b"a line\nanother\n\x01\0\0\0")
    numbers = array.array("I", [0])

    assert output.readline() == b"a line\n"
    assert output.readline() == b"another\n"
    assert output.readinto(numbers) == 4
    assert list(numbers) == [1]
    assert list(output) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's FIFOs are widened")
def test_a_fifo_is_widened_once(output: OutputStream, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fcntl.fcntl(output.fileno(), fcntl.F_GETPIPE_SZ) == PIPE_BYTES
    assert output.widen()
    assert fcntl.fcntl(output.fileno(), fcntl.F_GETPIPE_SZ) == 1 << 20
    monkeypatch.setattr(fifo, "_WIDE_BYTES", 1 << 21)
    assert output.widen()
    assert fcntl.fcntl(output.fileno(), fcntl.F_GETPIPE_SZ) == 1 << 20


def test_a_fifo_that_cannot_be_widened_stays_as_it_is(
    output: OutputStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert not output.widen()
    monkeypatch.undo()
    assert not output.widen(), "it was asked for once"


def test_a_closed_fifo_cannot_be_widened(output: OutputStream) -> None:
    output.close()
    assert not output.widen()


def test_it_counts_what_was_taken(output: OutputStream) -> None:
    with opened(output.path, os.O_WRONLY) as writer:
        os.write(writer, b"12345")
        output.read(2)
        output.note_taken(10)
        assert output.taken == 12
        output.read(3)
    output.read()
    assert output.taken == 15


def test_cancel_ends_reads_at_once_and_for_ever(output: OutputStream) -> None:
    with opened(output.path, os.O_WRONLY) as writer:
        readings = [Beside(lambda: output.read(10)) for _ in range(3)]
        eventually(lambda: blocked(output._end) and output._end._users == 3, "three blocked reads")
        output.cancel()
        assert [reading.answer() for reading in readings] == [b"", b"", b""]
        os.write(writer, b"nobody wants this")
        assert output.read(10) == b""
        assert output.cancelled
        assert output.drained()
    assert output.fileno() >= 0


def test_a_close_by_the_owner_raises_in_blocked_and_later_reads(output: OutputStream) -> None:
    reading = blocked_read(output)
    output.close()
    output.close()

    with pytest.raises(ValueError, match="closed FIFO"):
        reading.answer()
    for call in (output.read, output.readall, output.fileno, output.use().__enter__):
        with pytest.raises(ValueError, match="closed"):
            call()
    assert output.closed
    assert output.drained()
    assert output.pending() == (0, True)


def test_a_close_by_the_library_is_an_end(output: OutputStream) -> None:
    with opened(output.path, os.O_WRONLY):
        reading = blocked_read(output)
        output.shut()
        assert reading.answer() == b""
    assert output.read(10) == b""
    assert output.readall() == b""
    assert not output.closed
    with pytest.raises(ValueError, match="closed FIFO"):
        output.fileno()
    output.close()
    with pytest.raises(ValueError, match="closed"):
        output.read(10)


@pytest.mark.parametrize("drained", [False, True])
def test_finish_closes_a_stream_that_came_to_its_end(output: OutputStream, drained: bool) -> None:
    output.process_ended()
    assert output.finish(drained=drained)
    assert output.read() == b""
    assert output.finish(drained=drained)


def test_finish_leaves_unread_bytes_unless_it_is_known_to_be_drained(output: OutputStream) -> None:
    with opened(output.path, os.O_WRONLY) as writer:
        os.write(writer, b"unread")
        assert not output.finish(drained=False)
    assert not output.finish(drained=False)
    assert output.read() == b"unread"
    with opened(output.path, os.O_WRONLY):  # a process left behind in the background
        assert not output.finish(drained=False)
        assert output.finish(drained=True)
        assert output.read() == b""


@pytest.mark.parametrize("drained", [False, True])
def test_finish_leaves_a_stream_whose_descriptor_its_owner_has(output: OutputStream, drained: bool) -> None:
    with opened(output.path, os.O_WRONLY) as writer:
        fd = output.fileno()
        os.write(writer, b"unread")
        assert not output.finish(drained=drained)
        assert os.read(fd, 10) == b"unread"
    assert not output.finish(drained=drained), "the owner has not been told the end yet"
    assert output.read() == b""
    assert output.finish(drained=drained)


@pytest.mark.parametrize("drained", [False, True])
def test_finish_counts_a_stream_that_its_owner_has_closed(output: OutputStream, drained: bool) -> None:
    output.fileno()
    output.close()
    assert output.finish(drained=drained)


def test_reading_nothing_is_not_reading_the_end(output: OutputStream) -> None:
    with opened(output.path, os.O_WRONLY) as writer:
        output.fileno()
        os.write(writer, b"unread")
        assert output.read(0) == b""
        assert output.readinto(bytearray()) == 0
        assert not output.finish(drained=True)
        assert output.read(10) == b"unread"


def test_pending_counts_the_fifo_and_the_copiers_hands(output: OutputStream) -> None:
    assert output.pending() == (0, False)
    with opened(output.path, os.O_WRONLY) as writer:
        os.write(writer, b"12345")
        assert output.pending() == (5, False)
        output.in_hand = 7
        assert output.pending() == (12, False)
    assert output.pending() == (12, True)
    assert not output.drained()
    output.read()
    assert not output.drained()
    output.in_hand = 0
    assert output.drained()


def test_an_adopted_stream_is_drained_when_its_copier_has_closed_it(output: OutputStream) -> None:
    output.adopt()
    output.process_ended()
    assert output.read() == b""
    assert not output.drained()
    output.close()
    assert output.drained()


def test_selectors_and_shutil_can_read_it(output: OutputStream) -> None:
    target = BytesIO()
    with selectors.DefaultSelector() as selector, opened(output.path, os.O_WRONLY) as writer:
        selector.register(output, selectors.EVENT_READ)
        assert selector.select(0) == []
        os.write(writer, b"data")
        ((key, _),) = selector.select(DEADLINE)
        assert key.fileobj is output
    shutil.copyfileobj(output, target)
    assert target.getvalue() == b"data"


def test_splice_can_read_it(output: OutputStream) -> None:
    source, target = os.pipe()
    try:
        with opened(output.path, os.O_WRONLY) as writer:
            os.write(writer, b"spliced")
        with output.use() as fd:
            assert os.splice(fd, target, 100) == 7
        assert os.read(source, 10) == b"spliced"
    finally:
        os.close(source)
        os.close(target)


def test_asyncio_can_read_it(path: str) -> None:
    stream = OutputStream(End(path, os.O_RDONLY))

    async def collect() -> bytes:
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), stream)
        with opened(path, os.O_WRONLY) as writer:
            os.write(writer, b"one ")
            assert await reader.readexactly(4) == b"one "
            os.write(writer, b"two")
        rest = await reader.read()
        transport.close()
        return rest

    assert asyncio.run(asyncio.wait_for(collect(), DEADLINE)) == b"two"
    assert stream.closed


def test_an_end_that_was_told_is_not_taken_back(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A reader that was told of the hang-up reads; were there a writer just then, it would get EAGAIN for the end.
    stream = OutputStream(End(path, os.O_RDONLY))
    with opened(path, os.O_WRONLY):
        pass

    def refuse(*_: object) -> int:
        raise AssertionError("a writer came")

    monkeypatch.setattr(os, "open", refuse)
    stream.process_ended()
    assert stream.read() == b""
    stream.close()


def test_a_dropped_stream_closes_its_descriptor(path: str) -> None:
    before = open_descriptors()
    stream = OutputStream(End(path, os.O_RDONLY))
    stream._end._wake_descriptor()  # so that there is an eventfd too
    assert len(open_descriptors() - before) == 2
    del stream
    gc.collect()
    assert open_descriptors() == before


@settings(deadline=None, max_examples=25)
@given(
    pieces=st.lists(st.binary(max_size=9000), max_size=12),
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=5),
)
def test_every_byte_arrives_once_and_in_order(pieces: list[bytes], sizes: list[int]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        name = os.path.join(directory, "fifo")
        os.mkfifo(name)
        stream = OutputStream(End(name, os.O_RDONLY))

        def speak() -> None:
            with opened(name, os.O_WRONLY) as writer:
                for piece in pieces:
                    write_all(writer, piece)

        speaking = Beside(speak)
        received = b""
        for size in itertools.cycle(sizes):
            data = stream.read(size)
            assert data is not None
            assert len(data) <= size
            if not data:
                break
            received += data
        speaking.answer()
        assert received == b"".join(pieces)
        assert stream.taken == len(received)
        stream.close()


# ---------------------------------------------------------------------------------------------------------- input streams


def test_a_write_needs_no_reader_and_waits_for_the_one_that_comes_later(stdin: Stdin) -> None:
    assert stdin.stream.write(b"early ") == 6
    assert stdin.stream.write(b"words") == 5
    assert stdin.stream.write(b"") == 0
    reader = stdin.reader()
    assert os.read(reader, 100) == b"early words"
    os.close(reader)


def test_a_reader_that_goes_and_comes_back_is_no_broken_pipe(stdin: Stdin) -> None:
    os.close(stdin.reader())
    stdin.stream.write(b"still here")
    reader = stdin.reader()
    assert os.read(reader, 100) == b"still here"
    os.close(reader)


def test_a_write_blocks_until_all_is_taken(stdin: Stdin) -> None:
    data = bytes(range(256)) * 4096
    writing = Beside(lambda: stdin.stream.write(data))
    eventually(lambda: blocked(stdin.end), "a blocked write")
    received = b""
    reader = stdin.reader()
    while len(received) < len(data):
        with suppress(BlockingIOError):
            received += os.read(reader, 100_000)
    os.close(reader)
    assert writing.answer() == len(data)
    assert received == data


def test_it_is_a_raw_binary_writable_stream(stdin: Stdin) -> None:
    assert stdin.stream.writable()
    assert not stdin.stream.readable()
    assert stdin.stream.path == stdin.path
    stdin.stream.writelines([b"a", memoryview(b"b")])
    assert stdin.stream.write(array.array("I", [1])) == 4
    stdin.stream.flush()
    reader = stdin.reader()
    assert os.read(reader, 10) == b"ab\x01\0\0\0"
    os.close(reader)


def test_the_process_end_breaks_the_pipe(stdin: Stdin) -> None:
    writing = blocked_write(stdin)
    stdin.stream.process_ended()
    with pytest.raises(BrokenPipeError):
        writing.answer()
    with pytest.raises(BrokenPipeError) as caught:
        stdin.stream.write(b"x")
    assert caught.value.filename == stdin.path


def test_cancel_is_told_from_the_process_end(stdin: Stdin) -> None:
    writing = blocked_write(stdin)
    stdin.stream.cancel()
    calls: list[Callable[[], object]] = [writing.answer, lambda: stdin.stream.write(b"x")]
    for call in calls:
        with pytest.raises(OSError, match="given the stream up") as caught:
            call()
        assert caught.value.errno == errno.ECANCELED
        assert not isinstance(caught.value, BrokenPipeError)
    stdin.stream.process_ended()
    with pytest.raises(BrokenPipeError):
        stdin.stream.write(b"x")


def test_a_closed_stdin_takes_nothing(stdin: Stdin) -> None:
    writing = blocked_write(stdin)
    stdin.stream.close()
    stdin.stream.close()
    calls: list[Callable[[], object]] = [
        writing.answer,
        lambda: stdin.stream.write(b"x"),
        stdin.stream.fileno,
    ]
    for call in calls:
        with pytest.raises(ValueError, match="closed FIFO"):
            call()
    assert stdin.stream.closed


def test_close_before_the_process_is_there_waits_for_it(stdin: Stdin) -> None:
    stdin.stream.write(b"x")
    stdin.stream.close()
    assert stdin.closes == []
    assert not stdin.stream.ended.is_set()

    stdin.stream.process_is_there()
    stdin.stream.process_is_there()
    assert stdin.closes == [stdin.stream]
    assert not stdin.stream.ended.is_set(), "the end of input is the callback's to send"


def test_close_after_the_process_is_there_begins_the_end_once(stdin: Stdin) -> None:
    stdin.stream.process_is_there()
    assert stdin.closes == []
    assert race(*[stdin.stream.close] * 4) == [None] * 4
    stdin.stream.process_is_there()
    stdin.stream.process_ended()
    assert stdin.closes == [stdin.stream]


@pytest.mark.parametrize("there", [False, True])
def test_close_after_the_process_ended_needs_no_end_of_input(stdin: Stdin, there: bool) -> None:
    if there:
        stdin.stream.process_is_there()
    stdin.stream.process_ended()
    stdin.stream.process_is_there()  # an answer that comes late brings nobody back to life
    with pytest.raises(BrokenPipeError):
        stdin.stream.write(b"x")
    stdin.stream.close()
    assert stdin.closes == []
    assert stdin.stream.ended.is_set()
    assert stdin.end.closed


def test_a_start_that_fails_ends_a_close_that_was_waiting(stdin: Stdin) -> None:
    stdin.stream.close()
    stdin.stream.process_ended()
    assert stdin.closes == []
    assert stdin.stream.ended.is_set()
    assert stdin.end.closed


def test_the_end_of_input_waits_for_the_reader(stdin: Stdin) -> None:
    stdin.stream.process_is_there()
    stdin.stream.write(b"all of it")
    stdin.stream.close()
    ending = Beside(stdin.stream.end_input)
    eventually(lambda: stdin.stream._holder.closed, "the holder's end")
    assert ending.running
    assert not stdin.end.closed

    with opened(stdin.path, os.O_RDONLY) as reader:
        assert read_all(reader) == b"all of it"
    ending.answer()
    assert stdin.end.closed


def test_the_end_of_input_does_not_wait_for_a_process_that_has_ended(stdin: Stdin) -> None:
    stdin.stream.process_is_there()
    stdin.stream.close()
    ending = Beside(stdin.stream.end_input)
    eventually(lambda: stdin.stream._holder.closed, "the holder's end")
    stdin.stream.process_ended()
    ending.answer(within=15)
    assert stdin.end.closed


def test_the_end_of_input_of_a_process_that_has_ended_leaves_the_name_to_a_successor(stdin: Stdin) -> None:
    stdin.stream.process_is_there()
    stdin.stream.close()
    stdin.stream.process_ended()
    assert stdin.stream.finish()
    stdin.stream.end_input()
    assert os.path.exists(stdin.path)


def test_the_end_of_input_does_not_wait_for_ever(stdin: Stdin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fifo, "_READER_WAIT_SECONDS", 0.05)
    stdin.stream.close()
    Beside(stdin.stream.end_input).answer(within=15)
    assert stdin.end.closed


def test_the_end_of_input_after_the_streams_end_does_nothing(stdin: Stdin) -> None:
    stdin.stream.shut()
    stdin.stream.end_input()
    assert stdin.end.closed
    assert stdin.stream.ended.is_set()


@pytest.mark.parametrize("exposed", [False, True])
@pytest.mark.parametrize("closed", [False, True])
def test_finish_leaves_stdin_only_to_an_owner_who_has_its_number(
    stdin: Stdin, exposed: bool, closed: bool
) -> None:
    if exposed:
        assert stdin.stream.fileno() >= 0
    if closed:
        stdin.stream.close()
    left = exposed and not closed
    assert stdin.stream.finish() is not left
    assert stdin.end.closed is not left


def test_shut_sends_no_end_of_input(stdin: Stdin) -> None:
    writing = blocked_write(stdin)
    stdin.stream.shut()
    stdin.stream.shut()
    with pytest.raises(OSError, match="given the stream up"):
        writing.answer()
    assert stdin.stream.ended.is_set()
    stdin.stream.close()
    stdin.stream.process_is_there()
    assert stdin.stream.closed
    assert stdin.closes == []


def test_a_stdin_that_is_dropped_before_its_process_came_closes_its_descriptors(path: str) -> None:
    before = open_descriptors()
    made = Stdin(path)
    made.end._wake_descriptor()
    assert len(open_descriptors() - before) == 3
    del made
    gc.collect()
    assert open_descriptors() == before


def test_a_stdin_that_is_dropped_while_its_process_runs_ends_the_input(path: str) -> None:
    before = open_descriptors()
    holder = End(path, os.O_RDWR)
    stream = InputStream(End(path, os.O_WRONLY), holder, InputStream.end_input)
    stream.process_is_there()
    stream.write(b"the last word")
    with opened(path, os.O_RDONLY | os.O_NONBLOCK) as reader:
        del stream
        gc.collect()
        os.set_blocking(reader, True)
        assert read_all(reader) == b"the last word"
    assert open_descriptors() == before


_STEPS = ("there", "ended", "close", "cancel", "shut", "write")


@settings(deadline=None)
@given(steps=st.lists(st.sampled_from(_STEPS), max_size=8))
def test_stdins_steps_may_come_in_any_order(steps: list[str]) -> None:
    with tempfile.TemporaryDirectory() as directory, ExitStack() as after:
        name = os.path.join(directory, "fifo")
        os.mkfifo(name)
        made = Stdin(name)
        stream = made.stream
        after.callback(stream.shut)
        done: list[str] = []
        for step in steps:
            if step == "write":
                expected = _error_after(done)
                if expected is None:
                    assert stream.write(b"x") == 1
                else:
                    with pytest.raises(expected):
                        stream.write(b"x")
                continue
            act = {
                "there": stream.process_is_there,
                "ended": stream.process_ended,
                "close": stream.close,
                "cancel": stream.cancel,
                "shut": stream.shut,
            }
            act[step]()
            done.append(step)
            assert stream.closed is ("close" in done)
            assert len(made.closes) == _asked_for_the_end(done)
            over = "shut" in done or ("close" in done and "ended" in done and not made.closes)
            assert stream.ended.is_set() is over
            assert made.end.closed is over


def _error_after(done: list[str]) -> type[Exception] | None:
    if "ended" in done:
        return ValueError if "close" in done else BrokenPipeError
    if "cancel" in done or "shut" in done:
        return OSError
    return ValueError if "close" in done else None


def _asked_for_the_end(done: list[str]) -> int:
    """Whether closing and being there have both come before the stream's end."""
    ends = [done.index(step) for step in ("ended", "shut") if step in done]
    before = done[: min(ends, default=len(done))]
    return int("close" in before and "there" in before)


# ------------------------------------------------------------------------------------------- collected, and out of descriptors


def test_a_copier_is_told_once_of_a_stream_that_is_shut(path: str) -> None:
    told: list[int] = []
    for first, second in ((OutputStream.shut, OutputStream.close), (OutputStream.close, OutputStream.shut)):
        stream = OutputStream(End(path, os.O_RDONLY))
        stream.on_close = lambda: told.append(1)
        first(stream)
        assert told == [1]
        second(stream)
        first(stream)
        assert told == [1]
        told.clear()


@pytest.mark.parametrize("end", [lambda _: None, OutputStream.shut, OutputStream.cancel])
def test_the_collector_calls_nobody_and_closes_the_descriptor(
    path: str, end: Callable[[OutputStream], None]
) -> None:
    before = open_descriptors()
    stream = OutputStream(End(path, os.O_RDONLY))
    end(stream)
    told: list[int] = []
    stream.on_close = lambda: told.append(1)  # which may take the very lock that the collected thread holds
    del stream
    gc.collect()
    assert told == []
    assert open_descriptors() == before


def out_of_descriptors(*_: object) -> int:
    raise OSError(errno.EMFILE, "too many open files")


def test_giving_up_needs_no_descriptor(output: OutputStream, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as full:
        full.setattr(os, "eventfd", out_of_descriptors)
        output._end.interrupt()
    # It stays in force for whoever blocks from now on.
    assert Beside(lambda: output._end.poll(select.POLLIN, None)).answer() == 0
    with monkeypatch.context() as full:
        full.setattr(os, "eventfd", out_of_descriptors)
        output.cancel()
        assert output.read(1) == b""


def test_an_stdin_is_given_up_without_a_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "stdin")
    os.mkfifo(path)
    monkeypatch.setattr(os, "eventfd", out_of_descriptors)
    holder = End(path, os.O_RDWR)
    stream = InputStream(End(path, os.O_WRONLY), holder, lambda _: None)
    stream.cancel()
    stream.process_ended()
    with pytest.raises(BrokenPipeError):
        stream.write(b"x")
    stream.close()
    assert stream.ended.is_set()
