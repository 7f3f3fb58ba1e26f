"""DirectIO: a process's open ends together, what cancel and close do to them, and when output counts as drained."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from libcontainerd import cio
from libcontainerd.cio import DirectIO, FifoSet, InputStream, direct
from libcontainerd.cio.direct import drain
from tests.unit.beside import DEADLINE, Beside, eventually, race
from tests.unit.cio.shim import Shim, open_descriptors, read_all, write_all


@pytest.fixture
def shim(tmp_path: Path) -> Iterator[Shim]:
    with Shim(tmp_path, with_stdin=True) as made:
        yield made


def never(stream: InputStream) -> None:
    raise AssertionError(f"the end of input was asked for: {stream}")


def blocked(stream: cio.InputStream | cio.OutputStream) -> bool:
    return stream._end._wake >= 0 and stream._end._users > 0


# ---------------------------------------------------------------------------------------------------------- making, failing


@pytest.mark.parametrize("with_stdin", [False, True])
@pytest.mark.parametrize("terminal", [False, True])
def test_it_opens_what_the_set_names(tmp_path: Path, with_stdin: bool, terminal: bool) -> None:
    fifos = FifoSet.within(str(tmp_path), "init", with_stdin=with_stdin, terminal=terminal)
    with DirectIO(fifos, on_stdin_close=never, owner=(os.geteuid(), os.getegid())) as dio:
        assert dio.config is fifos
        assert dio.stdout.path == fifos.stdout
        assert (dio.stderr is None) is terminal
        assert (dio.stdin is not None) is with_stdin
        assert dio.outputs == tuple(each for each in (dio.stdout, dio.stderr) if each is not None)
        assert sorted(str(path) for path in tmp_path.iterdir()) == sorted(fifos.paths)
        dio.process_ended()
    assert sorted(str(path) for path in tmp_path.iterdir()) == sorted(fifos.paths), (
        "the FIFOs are the client's"
    )


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
@pytest.mark.parametrize("what", ["file", "link", "directory"])
def test_a_failure_half_way_leaves_no_descriptor_and_no_new_fifo(
    tmp_path: Path, stream: str, what: str
) -> None:
    fifos = FifoSet.within(str(tmp_path), "init", with_stdin=True, terminal=False)
    in_the_way = Path(getattr(fifos, stream))
    if what == "file":
        in_the_way.write_bytes(b"somebody's")
    elif what == "link":
        in_the_way.symlink_to("/dev/null")
    else:
        in_the_way.mkdir()
    before = open_descriptors()

    with pytest.raises(OSError, match=r"not a FIFO|symbolic links|Is a directory"):
        DirectIO(fifos, on_stdin_close=never)
    assert open_descriptors() == before
    assert list(tmp_path.iterdir()) == [in_the_way]


def test_fifos_that_were_there_survive_a_failure(tmp_path: Path) -> None:
    fifos = FifoSet.within(str(tmp_path), "init", with_stdin=False, terminal=False)
    os.mkfifo(fifos.stdout)
    Path(fifos.stderr).write_bytes(b"")

    with pytest.raises(FileExistsError):
        DirectIO(fifos, on_stdin_close=never)
    assert sorted(str(path) for path in tmp_path.iterdir()) == sorted(fifos.paths)


def test_it_opens_fifos_that_are_there(tmp_path: Path) -> None:
    fifos = FifoSet.within(str(tmp_path), "init", with_stdin=False, terminal=True)
    fifos.make()
    inode = os.stat(fifos.stdout).st_ino
    with DirectIO(fifos, on_stdin_close=never) as dio, dio.stdout.use() as fd:
        assert os.fstat(fd).st_ino == inode


# ------------------------------------------------------------------------------------------------------- cancel and close


def begin_blocked(shim: Shim) -> tuple[Beside[bytes | None], Beside[bytes | None], Beside[int]]:
    dio = shim.dio
    stdin, stderr = dio.stdin, dio.stderr
    assert stdin is not None
    assert stderr is not None
    calls = (
        Beside(lambda: dio.stdout.read(1)),
        Beside(lambda: stderr.read(1)),
        Beside(lambda: stdin.write(bytes(1 << 20))),
    )
    eventually(lambda: all((blocked(dio.stdout), blocked(stderr), blocked(stdin))), "three blocked calls")
    return calls


def test_cancel_wakes_everything_at_once(shim: Shim) -> None:
    out, err, write = begin_blocked(shim)
    shim.dio.cancel()
    shim.dio.cancel()
    assert (out.answer(), err.answer()) == (b"", b"")
    with pytest.raises(OSError, match="given the stream up") as caught:
        write.answer()
    assert caught.value.errno == errno.ECANCELED
    assert not shim.stdin_closed.is_set()


def test_close_beside_blocked_calls(shim: Shim) -> None:
    out, err, write = begin_blocked(shim)
    shim.dio.close()
    shim.dio.close()
    assert (out.answer(), err.answer()) == (b"", b"")
    with pytest.raises(OSError, match="given the stream up"):
        write.answer()
    assert shim.dio.stdout.read(1) == b""
    assert shim.dio.stdin is not None
    assert shim.dio.stdin.closed


def test_close_ends_the_input_of_a_process_that_is_there(shim: Shim) -> None:
    shim.dio.process_is_there()
    assert shim.dio.stdin is not None
    shim.dio.stdin.write(b"to the end")
    shim.dio.close()
    assert shim.stdin_closed.wait(DEADLINE)
    assert read_all(shim.open("stdin")) == b"to the end"


def test_abandon_sends_no_end_of_input(shim: Shim) -> None:
    out, err, write = begin_blocked(shim)
    shim.dio.process_is_there()
    shim.dio.abandon()
    assert (out.answer(), err.answer()) == (b"", b"")
    with pytest.raises(OSError, match="given the stream up"):
        write.answer()
    shim.dio.close()
    assert not shim.stdin_closed.is_set()
    assert all(os.path.exists(path) for path in shim.dio.config.paths), "the process goes on with them"


def test_callbacks_run_on_cancel_once_and_at_once_afterwards(shim: Shim) -> None:
    called: list[str] = []
    shim.dio.on_cancel(lambda: called.append("before"))
    assert called == []
    race(shim.dio.cancel, shim.dio.close, shim.dio.cancel)
    assert called == ["before"]
    shim.dio.on_cancel(lambda: called.append("after"))
    assert called == ["before", "after"]


def test_callbacks_run_without_a_lock(shim: Shim) -> None:
    called: list[str] = []
    shim.dio.on_cancel(lambda: shim.dio.on_cancel(lambda: called.append("nested")))
    Beside(shim.dio.cancel).answer()
    assert called == ["nested"]


def test_wait_waits_for_nothing(shim: Shim) -> None:
    Beside(shim.dio.wait).answer()
    assert isinstance(shim.dio, cio.IO)


def test_the_process_end_reaches_every_stream(shim: Shim) -> None:
    out, err, write = begin_blocked(shim)
    shim.dio.process_ended()
    assert (out.answer(), err.answer()) == (b"", b"")
    with pytest.raises(BrokenPipeError):
        write.answer()


def test_finish_returns_exactly_what_it_left_open(shim: Shim) -> None:
    stdin, stderr = shim.dio.stdin, shim.dio.stderr
    assert stdin is not None
    assert stderr is not None
    shim.shut(shim.open("stdout"))
    error = shim.open("stderr")
    write_all(error, b"unread")
    shim.shut(error)

    assert shim.dio.finish(drained=False) == [stderr]
    assert stderr.read() == b"unread"
    assert shim.dio.finish(drained=False) == []

    with pytest.raises(ValueError, match="closed FIFO"):
        stdin.use().__enter__()


def test_finish_leaves_what_the_owner_has_the_number_of(shim: Shim) -> None:
    stdin = shim.dio.stdin
    assert stdin is not None
    numbers = shim.dio.stdout.fileno(), stdin.fileno()
    shim.dio.process_ended()
    assert shim.dio.finish(drained=True) == [shim.dio.stdout, stdin]
    assert [os.fstat(number).st_ino for number in numbers]


# ----------------------------------------------------------------------------------------------------------------- draining


def in_time(ios: list[DirectIO], limit: float, stall: float, idle: float) -> tuple[bool, float]:
    begin = time.monotonic()
    complete = drain(ios, limit=limit, stall=stall, idle=idle)
    return complete, time.monotonic() - begin


LONG = 15.0


def test_nothing_to_drain_is_drained() -> None:
    assert in_time([], LONG, LONG, LONG)[0]


def test_a_reader_that_comes_to_the_end_is_waited_for(shim: Shim) -> None:
    data = bytes(300_000)
    shim.say(data)
    shim.shut(shim.open("stderr"))
    draining = Beside(lambda: in_time([shim.dio], LONG, LONG, LONG))
    assert shim.dio.stdout.readall() == data
    complete, seconds = draining.answer()
    assert complete
    assert seconds < LONG


def test_bytes_that_nobody_takes_stall_it(shim: Shim) -> None:
    fd = shim.open("stdout")
    write_all(fd, b"unread")
    shim.shut(fd, shim.open("stderr"))
    complete, seconds = in_time([shim.dio], LONG, 0.1, 0.02)
    assert not complete
    assert 0.1 <= seconds < LONG


def test_a_byte_now_and_then_is_no_stall(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    count, now, read = 30, 100.0, bytearray()
    fd = shim.open("stdout")
    write_all(fd, bytes(count))
    shim.shut(fd, shim.open("stderr"))

    def sleep(_: float) -> None:
        # Together this takes longer than the stall, and no two reads are as far apart.
        nonlocal now
        now += 0.3
        read.extend(shim.dio.stdout.read(1) or b"")

    clock = SimpleNamespace(monotonic=lambda: now, sleep=sleep)
    monkeypatch.setattr(direct, "time", clock)
    assert drain([shim.dio], limit=LONG, stall=1.0, idle=0.02)
    assert bytes(read) == bytes(count)


def test_somebody_who_waits_makes_it_hurry(shim: Shim) -> None:
    fd = shim.open("stdout")
    write_all(fd, b"unread")
    begin = time.monotonic()
    assert not drain([shim.dio], limit=LONG, stall=LONG, idle=0.1, hurry=lambda: True)
    assert time.monotonic() - begin < LONG


def test_the_limit_ends_it_whatever_is_taken(shim: Shim) -> None:
    fd = shim.open("stdout")
    write_all(fd, b"x")
    complete, seconds = in_time([shim.dio], 0.1, LONG, LONG)
    assert not complete
    assert 0.1 <= seconds < LONG


def test_an_empty_fifo_with_a_writer_left_behind_counts_as_read(shim: Shim) -> None:
    shim.open("stdout")
    shim.shut(shim.open("stderr"))
    complete, seconds = in_time([shim.dio], LONG, LONG, 0.1)
    assert complete
    assert 0.1 <= seconds < LONG


def test_a_silent_writer_is_given_its_time(shim: Shim) -> None:
    fd = shim.open("stdout")
    shim.shut(shim.open("stderr"))
    draining = Beside(lambda: in_time([shim.dio], LONG, LONG, 0.5))
    write_all(fd, b"late")
    assert shim.dio.stdout.read(10) == b"late"
    shim.shut(fd)
    assert draining.answer()[0]


def test_bytes_in_a_copiers_hand_are_not_drained(shim: Shim) -> None:
    shim.shut(shim.open("stdout"), shim.open("stderr"))
    shim.dio.stdout.in_hand = 1
    complete, seconds = in_time([shim.dio], LONG, 0.1, 0.02)
    assert not complete
    assert seconds >= 0.1
    shim.dio.stdout.in_hand = 0
    assert in_time([shim.dio], LONG, LONG, LONG)[0]


def test_an_adopted_stream_is_waited_for_until_its_copier_closes_it(shim: Shim) -> None:
    shim.shut(shim.open("stdout"), shim.open("stderr"))
    shim.dio.stdout.adopt()
    assert not in_time([shim.dio], LONG, 0.1, 0.02)[0]
    draining = Beside(lambda: in_time([shim.dio], LONG, LONG, 0.02))
    eventually(lambda: draining.running, "the drain")
    shim.dio.stdout.close()
    assert draining.answer()[0]


@pytest.mark.parametrize("how", [DirectIO.cancel, DirectIO.close, DirectIO.abandon])
def test_a_stream_that_was_given_up_is_not_waited_for(shim: Shim, how: Callable[[DirectIO], None]) -> None:
    fd = shim.open("stdout")
    write_all(fd, b"unread")
    draining = Beside(lambda: in_time([shim.dio], LONG, LONG, LONG))
    how(shim.dio)
    complete, seconds = draining.answer()
    assert complete
    assert seconds < LONG


def test_one_stuck_reader_spoils_the_answer_and_not_the_others(tmp_path: Path) -> None:
    with Shim(tmp_path, "stuck", terminal=True) as stuck, Shim(tmp_path, "read", terminal=True) as read:
        data = bytes(200_000)
        write_all(stuck.open("stdout"), b"unread")
        read.say(data)
        draining = Beside(lambda: in_time([stuck.dio, read.dio], LONG, 0.5, LONG))
        assert read.dio.stdout.readall() == data
        complete, seconds = draining.answer()
        assert not complete
        assert 0.5 <= seconds < LONG
