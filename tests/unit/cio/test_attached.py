"""One process's IO from its attachment to its end: who is called when, what is closed, and what is left to its owner."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from libcontainerd import cio
from libcontainerd.cio import DirectIO, FifoSet, InputStream, attached
from libcontainerd.cio.attached import Attached
from libcontainerd.errors import InvalidParameterError, SystemFailureError
from tests.unit.beside import DEADLINE, Beside, eventually
from tests.unit.cio.shim import open_descriptors, pump_threads, read_all, write_all

ME = (os.geteuid(), os.getegid())


class RecordingIO:
    """An IO that says how it was driven, and fails or hangs where it is told to."""

    def __init__(self, dio: DirectIO, *, failing: str = "", hanging: threading.Event | None = None) -> None:
        self.dio = dio
        self.calls: list[str] = []
        self._failing = failing
        self._hanging = hanging

    def _called(self, step: str) -> None:
        self.calls.append(step)
        if step == self._failing:
            raise RuntimeError(f"{step} fails")

    def cancel(self) -> None:
        self._called("cancel")

    def wait(self) -> None:
        self._called("wait")
        if self._hanging is not None:
            self._hanging.wait()

    def close(self) -> None:
        self._called("close")


class Process:
    """FIFOs, and what became of stdin."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.fifos = FifoSet.within(str(directory), "init", with_stdin=True, terminal=False)
        self.stdin_closes: list[InputStream] = []
        self.io: RecordingIO | None = None

    def attach(self, attach_stdio: cio.AttachStdio) -> Attached:
        return Attached.attach(attach_stdio, self.fifos, owner=ME, on_stdin_close=self.stdin_closes.append)

    def attach_recording(
        self, *, failing: str = "", hanging: threading.Event | None = None
    ) -> tuple[Attached, RecordingIO]:
        made: list[RecordingIO] = []

        def callback(dio: DirectIO) -> cio.IO:
            made.append(RecordingIO(dio, failing=failing, hanging=hanging))
            return made[0]

        return self.attach(callback), made[0]

    def files(self) -> list[Path]:
        return sorted(self.directory.iterdir())

    def say(self, data: bytes) -> None:
        """Write to stdout, and let both outputs end."""
        for path, words in ((self.fifos.stdout, data), (self.fifos.stderr, b"")):
            fd = os.open(path, os.O_WRONLY)
            try:
                write_all(fd, words)
            finally:
                os.close(fd)


@pytest.fixture
def process(tmp_path: Path) -> Process:
    return Process(tmp_path)


@pytest.fixture
def before() -> set[str]:
    return open_descriptors()


def direct_of(made: Attached) -> DirectIO:
    assert made.direct is not None
    return made.direct


# ------------------------------------------------------------------------------------------------------------- attaching


def test_containerd_is_told_the_fifos(process: Process) -> None:
    made = process.attach(lambda dio: dio)
    assert (made.stdin, made.stdout, made.stderr) == process.fifos.paths
    assert [str(path) for path in process.files()] == sorted(process.fifos.paths)
    made.discard()


def test_a_destination_opens_nothing(tmp_path: Path, before: set[str]) -> None:
    fifos = FifoSet.within(str(tmp_path), "init", with_stdin=False, terminal=False)
    target = cio.log_file(tmp_path / "log")
    made = Attached.attach(target, fifos, owner=ME, on_stdin_close=print)

    assert (made.stdin, made.stdout, made.stderr) == ("", target.stdout, target.stderr)
    assert made.direct is None
    assert open_descriptors() == before
    made.process_is_there()
    made.process_ended()
    made.discard()
    made.abandon()
    made.unlink()
    assert made.finish(drained=True) == []
    assert list(tmp_path.iterdir()) == []


def test_a_destination_without_stdin_is_refused_one(process: Process) -> None:
    with pytest.raises(InvalidParameterError, match="with_stdin"):
        process.attach(cio.null_io)
    assert process.files() == []


def test_the_callback_gets_open_ends_and_its_error_comes_out(process: Process, before: set[str]) -> None:
    class MineError(Exception):
        pass

    kept: list[DirectIO] = []

    def callback(dio: DirectIO) -> cio.IO:
        kept.append(dio)
        assert dio.stdout.fileno() >= 0
        raise MineError

    with pytest.raises(MineError):
        process.attach(callback)
    assert open_descriptors() == before
    assert process.files() == []
    assert kept[0].stdout.read() == b""
    assert process.stdin_closes == []


def test_what_is_no_io_is_refused(process: Process, before: set[str]) -> None:
    with pytest.raises(InvalidParameterError, match="returned NoneType: it must return an IO"):
        process.attach(lambda dio: None)  # type: ignore[arg-type, return-value] # that is the mistake
    assert open_descriptors() == before
    assert process.files() == []


def test_fifos_that_cannot_be_made_are_said_in_our_words(process: Process, before: set[str]) -> None:
    Path(process.fifos.stderr).write_bytes(b"in the way")
    with pytest.raises(SystemFailureError, match="cannot open the FIFOs") as caught:
        process.attach(lambda dio: dio)
    assert isinstance(caught.value.__cause__, OSError)
    assert process.fifos.stderr in str(caught.value)
    assert open_descriptors() == before
    assert [str(path) for path in process.files()] == [process.fifos.stderr]


# ------------------------------------------------------------------------------------------------------------ their ends


def test_discard_cancels_closes_and_removes(process: Process, before: set[str]) -> None:
    made, io = process.attach_recording()
    reading = Beside(io.dio.stdout.read)
    eventually(lambda: io.dio.stdout._end._wake >= 0, "a blocked read")
    made.discard()
    assert reading.answer() == b""
    assert io.calls == ["cancel", "close"]
    assert open_descriptors() == before
    assert process.files() == []
    assert process.stdin_closes == []

    made.discard()
    assert io.calls.index("cancel") < io.calls.index("close")


def test_discard_before_the_process_is_there_ends_a_stdin_that_was_closed(process: Process) -> None:
    made, io = process.attach_recording()
    assert io.dio.stdin is not None
    io.dio.stdin.close()
    made.discard()
    assert io.dio.stdin.ended.is_set()
    assert process.stdin_closes == []


def test_the_gate_of_stdin_is_passed_on(process: Process) -> None:
    made, io = process.attach_recording()
    assert io.dio.stdin is not None
    io.dio.stdin.close()
    made.process_is_there()
    assert process.stdin_closes == [io.dio.stdin]
    made.discard()
    io.dio.stdin.end_input()
    assert io.dio.stdin._end.closed


@pytest.mark.parametrize("failing", ["cancel", "wait", "close"])
def test_an_io_that_raises_is_logged_and_keeps_nothing_open(
    process: Process, failing: str, before: set[str]
) -> None:
    made, io = process.attach_recording(failing=failing)
    process.say(b"")
    io.dio.stdout.read()
    with capture_logs() as logs:
        made.process_ended()
        assert made.finish(drained=True) == []
    assert [(log["event"], log["step"]) for log in logs] == [("io_failed", failing)]
    assert f"{failing} fails" in logs[0]["error"]
    assert io.calls == ["cancel", "wait", "close"]
    assert open_descriptors() == before


def test_finish_drives_the_io_after_the_last_byte(process: Process, before: set[str]) -> None:
    made, io = process.attach_recording()
    process.say(b"last words")
    made.process_ended()
    finishing = Beside(lambda: made.finish(drained=True))
    assert io.dio.stdout.read(100) == b"last words"
    assert finishing.answer() == []
    assert io.calls == ["cancel", "wait", "close"]
    assert process.files() == []
    assert open_descriptors() == before


def test_finish_leaves_unread_bytes_and_takes_away_the_rest(process: Process) -> None:
    made, io = process.attach_recording()
    process.say(b"unread")
    made.process_ended()
    left = made.finish(drained=False)
    assert left == [io.dio.stdout]
    assert process.files() == [], "the name is gone, the stream lives on"
    assert io.dio.stdout.read() == b"unread"
    assert io.dio.stdin is not None
    assert io.dio.stdin._end.closed
    io.dio.stdout.close()


def test_finish_does_not_wait_for_a_stuck_reader_twice(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attached, "_WAIT_SECONDS", 60.0)
    made, io = process.attach_recording()
    process.say(b"unread")
    made.process_ended()
    assert Beside(lambda: made.finish(drained=False)).answer() == [io.dio.stdout]
    io.dio.stdout.close()


def test_bytes_that_come_with_the_deletion_are_left_when_nobody_reads_them(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attached, "_WAIT_SECONDS", 0.3)
    made, io = process.attach_recording()
    process.say(b"sent while it was deleted")
    made.process_ended()
    assert made.finish(drained=True) == [io.dio.stdout]
    assert io.dio.stdout.read() == b"sent while it was deleted"
    io.dio.stdout.close()


def test_an_io_whose_wait_hangs_is_said_and_left(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attached, "_WAIT_SECONDS", 0.3)
    hanging = threading.Event()
    made, io = process.attach_recording(hanging=hanging)
    process.say(b"")
    made.process_ended()
    with capture_logs() as logs:
        assert made.finish(drained=True) == []
    assert [log["event"] for log in logs] == ["io_wait_hangs"]
    eventually(lambda: "wait" in io.calls, "the beginning of the wait, on its own thread")
    assert [each for each in io.calls if each != "wait"] == ["cancel", "close"]
    hanging.set()
    eventually(lambda: "libcontainerd-io-wait" not in pump_threads(), "the end of the waiting thread")


def test_finish_leaves_a_descriptor_that_its_owner_has(process: Process) -> None:
    made = process.attach(lambda dio: dio)
    direct = direct_of(made)
    number = direct.stdout.fileno()
    process.say(b"")
    made.process_ended()
    assert made.finish(drained=True) == [direct.stdout]
    assert os.read(number, 1) == b""
    direct.stdout.close()


def test_abandon_closes_our_ends_and_leaves_the_process_its_fifos(process: Process, before: set[str]) -> None:
    ios: list[cio.IO] = []

    class ClosingIO(RecordingIO):
        def close(self) -> None:
            super().close()
            self.dio.close()

    def callback(dio: DirectIO) -> cio.IO:
        ios.append(ClosingIO(dio))
        return ios[0]

    made = process.attach(callback)
    made.process_is_there()
    made.abandon()
    assert isinstance(ios[0], ClosingIO)
    assert ios[0].calls == ["cancel", "close"]
    assert [str(path) for path in process.files()] == sorted(process.fifos.paths)
    assert open_descriptors() == before
    assert process.stdin_closes == [], "the process keeps its input"
    process.fifos.unlink()


def test_an_unlink_that_fails_is_no_error(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    made = process.attach(lambda dio: dio)

    def refuse(path: str) -> None:
        raise PermissionError(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", refuse)
        made.unlink()
    assert len(process.files()) == 3
    made.discard()


# --------------------------------------------------------------------------------------------------------- with real copies


def test_a_copy_delivers_everything_before_finish_returns(process: Process) -> None:
    received: list[bytes] = []
    made = process.attach(cio.copy(stdout=received.append))
    data = bytes(range(256)) * 2000
    process.say(data)
    made.process_ended()
    assert made.finish(drained=True) == []
    assert b"".join(received) == data


def test_a_stuck_copy_ends_when_what_was_left_is_closed(process: Process) -> None:
    # Nobody reads the other side of the socket, so the copy waits for room in it.
    ours, theirs = socket.socketpair()
    with ours, theirs:
        made = process.attach(cio.copy(stdout=ours))
        speaking = Beside(lambda: process.say(bytes(2_000_000)))
        eventually(lambda: direct_of(made).stdout.in_hand, "a copy that waits for room")
        made.process_ended()
        left = made.finish(drained=False)
        assert direct_of(made).stdout in left
        for stream in left:
            stream.shut()
        with pytest.raises(BrokenPipeError):
            speaking.answer()
        eventually(lambda: not pump_threads(), f"the end of the copy: {pump_threads()}")


def test_stdin_is_fed_from_a_copy(process: Process) -> None:
    made = Attached.attach(
        cio.copy(stdin=b"fed"), process.fifos, owner=ME, on_stdin_close=InputStream.end_input
    )
    with open(process.fifos.stdin, "rb", opener=lambda path, _: os.open(path, os.O_RDONLY)) as reader:
        made.process_is_there()
        assert Beside(lambda: read_all(reader.fileno())).answer(DEADLINE) == b"fed"
    made.process_ended()
    made.discard()


def wait_for_nothing(call: Callable[[], object]) -> None:
    Beside(call).answer()


def test_every_step_may_be_repeated(process: Process) -> None:
    made, _ = process.attach_recording()
    process.say(b"")
    for step in (made.process_is_there, made.process_ended, made.discard, made.abandon, made.unlink):
        wait_for_nothing(step)
        wait_for_nothing(step)
    assert made.finish(drained=True) == []
    assert made.finish(drained=False) == []


def test_discard_removes_the_fifos_whatever_goes_wrong(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, io = process.attach_recording()

    def fail() -> None:
        raise OSError(24, "too many open files")

    with monkeypatch.context() as broken:
        broken.setattr(io.dio, "process_ended", fail)
        with pytest.raises(OSError, match="too many open files"):
            made.discard()
    assert process.files() == []
    made.discard()


def test_the_end_of_a_copy_costs_no_thread(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    made = process.attach(cio.copy(stdout=lambda data: None))
    for path in (made.stdout, made.stderr):
        os.close(os.open(path, os.O_WRONLY))
    made.process_ended()
    direct = direct_of(made)
    eventually(lambda: all(each.drained() for each in direct.outputs), "the end of the copies")
    monkeypatch.setattr(attached.Attached, "_wait_for_users_io", lambda _: pytest.fail("waited for a copy"))
    assert made.finish(drained=True) == []


def test_what_was_left_to_its_reader_is_closed_when_he_has_come_to_the_end(process: Process) -> None:
    made, io = process.attach_recording()
    for path in (made.stdout, made.stderr):
        fd = os.open(path, os.O_WRONLY)
        os.write(fd, b"unread")
        os.close(fd)
    made.process_ended()
    assert len(made.finish(drained=False)) == 2
    assert not made.finish_late()
    assert io.dio.stdout.read() == b"unread"
    assert not made.finish_late()
    assert io.calls == []
    assert io.dio.stderr is not None
    assert io.dio.stderr.read() == b"unread"
    assert made.finish_late()
    assert io.calls == ["cancel", "close"]
