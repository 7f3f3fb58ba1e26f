"""Bytes to and from real processes: none lost, none late, and nobody blocked by another's reader."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import random
import select
import selectors
import shutil
import signal
import socket
import termios
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from libcontainerd import (
    CallCancelledError,
    Client,
    EventType,
    FailedPreconditionError,
    InvalidParameterError,
    NotFoundError,
    Remote,
    Status,
    cio,
    oci,
)
from libcontainerd.backends import RecordingBackend
from tests.conftest import Count
from tests.integration.containers import (
    Collected,
    MakeSpec,
    Raw,
    alive,
    bundle_of,
    exit_of,
    process,
    run,
    run_exec,
    running,
    stop,
    wait_exec_gone,
    wait_until,
)
from tests.leaks import no_leaks

SLEEP = ("sleep", "1000")
MIB = 1 << 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two files of a mebibyte of noise, for containers to read."""
    directory = tmp_path_factory.mktemp("data")
    directory.chmod(0o755)
    noise = random.Random(7)
    for name in ("out", "err"):
        (directory / name).write_bytes(noise.randbytes(MIB))
    return directory


def with_data(data: Path) -> oci.SpecOption:
    return oci.with_bind(data, "/data", readonly=True)


class Streams:
    """An `attach_stdio` that keeps the streams for the test to use."""

    def __init__(self) -> None:
        self.dio: cio.DirectIO | None = None

    def __call__(self, dio: cio.DirectIO) -> cio.IO:
        self.dio = dio
        return dio

    @property
    def stdout(self) -> cio.OutputStream:
        assert self.dio is not None
        return self.dio.stdout

    @property
    def stdin(self) -> cio.InputStream:
        assert self.dio is not None
        assert self.dio.stdin is not None
        return self.dio.stdin


# --------------------------------------------------------------------------------------------------- all that is written


def test_a_mebibyte_on_both_streams_at_once_arrives_byte_for_byte(
    client: Client, spec: MakeSpec, data: Path
) -> None:
    script = "cat /data/out & cat /data/err >&2 & wait"
    result = run(client, "c", spec("sh", "-c", script, options=[with_data(data)]))
    assert result.out == (data / "out").read_bytes()
    assert result.err == (data / "err").read_bytes()
    with running(client, "d", spec(*SLEEP, options=[with_data(data)])):
        result = run_exec(client, "d", "e", "sh", "-c", script)
        assert result.out == (data / "out").read_bytes()
        assert result.err == (data / "err").read_bytes()


class Noise:
    """So many bytes of noise to read, hashed as they go."""

    def __init__(self, size: int) -> None:
        self._block = random.Random(11).randbytes(MIB)
        self.left = size
        self.digest = hashlib.blake2b()

    def __call__(self) -> bytes:
        piece = self._block[: min(len(self._block), self.left)]
        self.left -= len(piece)
        self.digest.update(piece)
        return piece


class Hashed:
    """Counts and hashes what is written to it."""

    def __init__(self) -> None:
        self.size = 0
        self.digest = hashlib.blake2b()

    def __call__(self, piece: bytes) -> None:
        self.size += len(piece)
        self.digest.update(piece)


def test_a_large_stdin_echoes_back_equal(client: Client, spec: MakeSpec, count: Count) -> None:
    size = 64 * MIB
    source, target = Noise(size), Hashed()
    client.create("c", spec("cat"))
    client.start("c", with_stdin=True, attach_stdio=cio.copy(source, target))
    assert client.wait("c", timeout=50).code == 0
    assert client.delete_task("c").code == 0
    assert (source.left, target.size) == (0, size)
    assert source.digest.digest() == target.digest.digest()
    client.delete("c")
    size = count(64, 16) * MIB
    with running(client, "d", spec(*SLEEP)):
        source, target = Noise(size), Hashed()
        client.exec("d", "e", process("cat"), with_stdin=True, attach_stdio=cio.copy(source, target))
        assert client.wait("d", "e", timeout=50).code == 0
        wait_exec_gone(client, "d", "e")
        assert (source.left, target.size) == (0, size)
        assert source.digest.digest() == target.digest.digest()


def test_output_goes_to_files_descriptors_and_sockets(client: Client, spec: MakeSpec, tmp_path: Path) -> None:
    made = spec("sh", "-c", "echo out; echo err >&2")
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        client.create("c", made)
        client.start("c", attach_stdio=cio.copy(stdout=out, stderr=err.fileno()))
        client.wait("c")
        client.delete_task("c")
        assert (tmp_path / "out").read_bytes() == b"out\n"
        assert (tmp_path / "err").read_bytes() == b"err\n"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        client.start("c", attach_stdio=cio.copy(stdout=theirs))
        client.wait("c")
        client.delete_task("c")
        ours.settimeout(10)
        assert ours.recv(100) == b"out\n"
    client.delete("c")


def test_a_destination_that_fails_blocks_nobody(client: Client, spec: MakeSpec, data: Path) -> None:
    def fail(piece: bytes) -> None:
        raise OSError("disk full")

    client.create("c", spec("sh", "-c", "cat /data/out; exit 3", options=[with_data(data)]))
    client.start("c", attach_stdio=cio.copy(stdout=fail))
    assert client.wait("c", timeout=20).code == 3
    assert client.delete_task("c").code == 3
    client.delete("c")


def test_input_that_nobody_wants_holds_up_nobody(client: Client, spec: MakeSpec) -> None:
    source = Noise(64 * MIB)
    assert run(client, "c", spec("head", "-c", "5"), stdin=source).out == Noise(5)()
    assert source.left > 60 * MIB
    gate = threading.Event()

    def silent() -> bytes:
        gate.wait(30)
        return b""

    begun = time.monotonic()
    assert run(client, "d", spec("echo", "hi"), stdin=silent).out == b"hi\n"
    assert time.monotonic() - begun < 20, "it waited for the source"
    gate.set()


# ------------------------------------------------------------------------------------------------------ the end of input


def test_closing_stdin_ends_cat(client: Client, spec: MakeSpec, raw: Raw) -> None:
    """By the stream, by the verb, by the verb when the stream was closed before; of init and of an exec."""

    def close_both(collected: Collected, container_id: str, process_id: str) -> None:
        collected.stdin.close()
        client.close_stdin(container_id, process_id)

    closes: list[Callable[[Collected, str, str], None]] = [
        lambda collected, cid, pid: collected.stdin.close(),
        lambda collected, cid, pid: client.close_stdin(cid, pid),
        close_both,
    ]
    with running(client, "d", spec(*SLEEP)):
        for number, close in enumerate(closes):
            collected = Collected()
            client.create("c", spec("cat"))
            client.start("c", with_stdin=True, attach_stdio=collected)
            collected.stdin.write(b"for init")
            close(collected, "c", "init")
            assert client.wait("c", timeout=20).code == 0
            assert client.delete_task("c").code == 0
            assert collected.out == b"for init"
            client.delete("c")

            collected = Collected()
            client.exec("d", f"e{number}", process("cat"), with_stdin=True, attach_stdio=collected)
            collected.stdin.write(b"for exec")
            close(collected, "d", f"e{number}")
            assert client.wait("d", f"e{number}", timeout=20).code == 0
            collected.wait()
            assert collected.out == b"for exec"
        wait_until(lambda: not list(bundle_of(raw, "d").iterdir()), "the execs' FIFOs are gone")


@pytest.mark.parametrize("text", [b"", b"written before the process exists"], ids=["nothing", "something"])
def test_stdin_closed_inside_attach_ends_the_process(
    client: Client, spec: MakeSpec, count: Count, text: bytes
) -> None:
    class Closing(Collected):
        def __call__(self, dio: cio.DirectIO) -> cio.IO:
            io = super().__call__(dio)
            self.stdin.write(text)
            self.stdin.close()
            return io

    with running(client, "d", spec(*SLEEP)):
        for number in range(count(50, 3)):
            collected = Closing()
            client.create("c", spec("cat"))
            client.start("c", with_stdin=True, attach_stdio=collected)
            assert client.wait("c", timeout=20).code == 0
            assert client.delete_task("c").code == 0
            assert collected.out == text
            client.delete("c")

            collected = Closing()
            client.exec("d", f"e{number}", process("cat"), with_stdin=True, attach_stdio=collected)
            assert client.wait("d", f"e{number}", timeout=20).code == 0
            collected.wait()
            assert collected.out == text


def test_a_process_without_stdin_reads_nothing(client: Client, spec: MakeSpec) -> None:
    result = run(client, "c", spec("sh", "-c", "cat; echo end"))
    assert (result.out, result.status.code) == (b"end\n", 0)
    with running(client, "d", spec(*SLEEP)):
        assert run_exec(client, "d", "e", "sh", "-c", "cat; echo end").out == b"end\n"
        with pytest.raises(InvalidParameterError, match="with_stdin"):
            client.exec("d", "f", process("cat"), with_stdin=True)


def test_closing_a_stdin_that_there_is_not(client: Client, spec: MakeSpec) -> None:
    with running(client, "c", spec(*SLEEP)):
        client.close_stdin("c", "init")
        client.close_stdin("c", "init")
        assert client.status("c") is Status.RUNNING


def test_a_write_after_the_end_is_a_broken_pipe(client: Client, spec: MakeSpec) -> None:
    streams = Streams()
    client.create("c", spec("sh", "-c", "read line; exit 0"))
    client.start("c", with_stdin=True, attach_stdio=streams)
    with ThreadPoolExecutor(1) as pool:
        # More than the FIFO, the shim and the pipe take: it is blocked when the process ends.
        blocked = pool.submit(streams.stdin.write, b"line\n" * MIB)
        assert client.wait("c", timeout=20).code == 0
        with pytest.raises(BrokenPipeError):
            blocked.result(timeout=20)
    wait_until(lambda: broken(streams.stdin), "the exit is known to the stream")
    with pytest.raises(BrokenPipeError, match="ended"):
        streams.stdin.write(b"more")
    streams.stdin.close()
    assert client.delete_task("c").code == 0
    client.delete("c")


def broken(stdin: cio.InputStream) -> bool:
    try:
        stdin.write(b"x")
    except BrokenPipeError:
        return True
    return False


# -------------------------------------------------------------------------------------------------------------- terminals


def test_a_terminal_echoes_and_resizes(client: Client, spec: MakeSpec, raw: Raw) -> None:
    collected = Collected()
    client.create("c", spec("sh", options=[oci.with_terminal(width=90, height=30)]))
    client.start("c", with_stdin=True, attach_stdio=collected)
    assert collected.dio is not None
    assert collected.dio.stderr is None
    assert sorted(path.name for path in bundle_of(raw, "c").iterdir()) == ["init-stdin", "init-stdout"]
    collected.stdin.write(b"echo on the te''rminal; stty size\n")
    collected.wait_for(b"te''rminal; stty size\r\n")  # the echo
    collected.wait_for(b"on the terminal\r\n30 90\r\n")
    client.resize_terminal("c", "init", 101, 41)
    collected.stdin.write(b"stty size; ls /no-such-file\n")
    collected.wait_for(b"\r\n41 101\r\n")
    collected.wait_for(b"No such file or directory\r\n")  # stderr is the terminal as well
    collected.stdin.write(b"exit 3\n")
    assert client.wait("c", timeout=20).code == 3
    assert client.delete_task("c").code == 3
    client.delete("c")


def test_an_execs_terminal_echoes_and_resizes(client: Client, spec: MakeSpec) -> None:
    collected = Collected()
    with running(client, "c", spec(*SLEEP)):
        client.exec("c", "e", process("sh", terminal=True), with_stdin=True, attach_stdio=collected)
        client.resize_terminal("c", "e", 102, 42)
        collected.stdin.write(b"stty size; tty\n")
        collected.wait_for(b"stty size; tty\r\n42 102\r\n/dev/pts/")
        collected.stdin.write(b"exit 5\n")
        assert client.wait("c", "e", timeout=20).code == 5
        collected.wait()


def test_resizing_what_has_no_terminal_or_has_ended(client: Client, spec: MakeSpec) -> None:
    with running(client, "c", spec(*SLEEP)):
        client.resize_terminal("c", "init", 80, 24)  # as in the original, no error
    client.create("d", spec("true", options=[oci.with_terminal()]))
    client.start("d", attach_stdio=Collected())
    client.wait("d")
    with pytest.raises(FailedPreconditionError):
        client.resize_terminal("d", "init", 80, 24)
    client.delete_task("d")
    client.delete("d")


def test_keys_reach_the_process_as_signals_and_ends(client: Client, spec: MakeSpec) -> None:
    with running(client, "c", spec(*SLEEP)):
        for key, code in ((b"\x03", 130), (b"\x04", 0)):  # Ctrl-C, Ctrl-D
            collected = Collected()
            process_id = f"key{key[0]}"
            client.exec(
                "c", process_id, process("cat", terminal=True), with_stdin=True, attach_stdio=collected
            )
            collected.stdin.write(b"hi\n")
            collected.wait_for(b"hi\r\nhi\r\n")  # the echo, and cat's answer: it is reading now
            collected.stdin.write(key)
            assert client.wait("c", process_id, timeout=20).code == code
            collected.wait()


def test_the_users_terminal_is_lent_and_given_back(client: Client, spec: MakeSpec) -> None:
    keyboard, line = os.openpty()
    try:
        before = termios.tcgetattr(line)
        client.create("c", spec("sh", "-c", "read word; echo [$word]; exit 3", options=[oci.with_terminal()]))
        client.start("c", with_stdin=True, attach_stdio=cio.terminal(line, line))
        assert termios.tcgetattr(line) != before
        os.write(keyboard, b"typed\r")
        assert client.wait("c", timeout=20).code == 3
        assert client.delete_task("c").code == 3
        assert termios.tcgetattr(line) == before
        seen = b""
        while not (b"typed\r\n" in seen and b"[typed]\r\n" in seen):
            # The kernel carries it from one side to the other when it likes, and not all of it at once.
            assert select.select([keyboard], [], [], 30)[0], seen
            seen += os.read(keyboard, 4096)
        client.delete("c")
    finally:
        os.close(keyboard)
        os.close(line)


# ------------------------------------------------------------------------------------------------------ readers that dawdle


class Dawdling:
    """An IO whose reader takes a little at a time, and a byte a second of the last part until it is told to go on."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._go_on = threading.Event()
        self.paused = threading.Event()
        self.taken = b""
        self.calls: list[str] = []
        self._dio: cio.DirectIO | None = None
        self._thread: threading.Thread | None = None

    def __call__(self, dio: cio.DirectIO) -> cio.IO:
        self._dio = dio
        self._thread = threading.Thread(target=self._read, args=(dio.stdout,))
        self._thread.start()
        return self

    def _read(self, stream: cio.OutputStream) -> None:
        while piece := stream.read(16384):
            self.taken += piece
            # What is left then fills the FIFO, and a good part of the shim's own pipe behind it.
            if len(self.taken) >= self._total - 120_000 and not self._go_on.is_set():
                self.paused.set()
                for _ in range(90):  # who takes nothing for five seconds is not waited for
                    if self._go_on.wait(1):
                        break
                    self.taken += stream.read(1)

    def go_on(self) -> None:
        self._go_on.set()

    def cancel(self) -> None:
        self.calls.append("cancel")

    def wait(self) -> None:
        self.calls.append("wait")
        assert self._thread is not None
        self._thread.join()

    def close(self) -> None:
        self.calls.append("close")
        assert self._dio is not None
        self._dio.close()


def test_a_reader_that_pauses_loses_nothing(client: Client, spec: MakeSpec, data: Path) -> None:
    """The shim throws away what is unread two seconds after a deletion: so the deletion must wait for the reader."""
    init, exec_ = Dawdling(MIB), Dawdling(MIB)
    made = spec("cat", "/data/out", options=[with_data(data)])
    with running(client, "d", spec(*SLEEP, options=[with_data(data)])), no_leaks():
        client.create("c", made)
        client.start("c", attach_stdio=init)
        client.exec("d", "e", process("cat", "/data/err"), attach_stdio=exec_)
        assert init.paused.wait(20)
        assert exec_.paused.wait(20)
        assert client.wait("c", timeout=20).code == 0
        assert client.wait("d", "e", timeout=20).code == 0
        with ThreadPoolExecutor(1) as pool:
            deleting = pool.submit(client.delete_task, "c")
            with pytest.raises(TimeoutError):
                deleting.result(timeout=3)
            assert len(init.taken) < MIB
            init.go_on()
            exec_.go_on()
            assert deleting.result(timeout=20).code == 0
        assert init.taken == (data / "out").read_bytes()
        wait_exec_gone(client, "d", "e")
        assert exec_.taken == (data / "err").read_bytes()
        client.delete("c")
    # Both were driven as the contract says.
    assert init.calls == ["cancel", "wait", "close"]
    wait_until(lambda: exec_.calls == ["cancel", "wait", "close"], "the exec's IO is closed")


def test_an_io_is_waited_for_between_cancel_and_close(client: Client, spec: MakeSpec, data: Path) -> None:
    class Copiers:
        """As a daemon's author would write it: a thread per stream, joined in wait()."""

        def __init__(self, dio: cio.DirectIO) -> None:
            self.dio = dio
            self.calls: list[str] = []
            self.parts: dict[str, bytearray] = {"out": bytearray(), "err": bytearray()}
            assert dio.stderr is not None
            streams = {"out": dio.stdout, "err": dio.stderr}
            self.threads = [
                threading.Thread(target=self.read, args=(streams[name], self.parts[name])) for name in streams
            ]
            for thread in self.threads:
                thread.start()

        def read(self, stream: cio.OutputStream, part: bytearray) -> None:
            while piece := stream.read(5000):
                part += piece

        def cancel(self) -> None:
            self.calls.append("cancel")

        def wait(self) -> None:
            for thread in self.threads:
                thread.join()
            self.calls.append("wait")

        def close(self) -> None:
            self.calls.append("close")
            self.dio.close()

    made: list[Copiers] = []

    def attach(dio: cio.DirectIO) -> cio.IO:
        made.append(Copiers(dio))
        return made[-1]

    client.create("c", spec("sh", "-c", "cat /data/out & cat /data/err >&2; wait", options=[with_data(data)]))
    for _ in range(3):
        client.start("c", attach_stdio=attach)
        client.wait("c", timeout=20)
        assert client.delete_task("c").code == 0
        assert made[-1].parts["out"] == (data / "out").read_bytes()
        assert made[-1].parts["err"] == (data / "err").read_bytes()
        assert made[-1].calls == ["cancel", "wait", "close"]
    client.delete("c")


def shim_waits(release: tuple[int, int]) -> float:
    """Seconds that a shim, asked to delete a process, waits for the end of its output."""
    return 10.0 if release >= (2, 0) else 2.0


def test_a_stdout_that_nobody_reads_holds_up_nobody_else(
    client: Client, remote: Remote, namespace: str, spec: MakeSpec, release: tuple[int, int]
) -> None:
    unread = Streams()
    backend = RecordingBackend()
    with no_leaks():
        other = remote.new_client(namespace, backend)
        other.create("c", spec("yes"))
        other.start("c", attach_stdio=unread)
        other.exec("c", "e", process("yes"), attach_stdio=Streams())
        # Neither other containers nor execs of this one are held up.
        assert run(other, "d", spec("sh", "-c", "echo hi; exit 3")).out == b"hi\n"
        assert run_exec(other, "c", "f", "echo", "hi").out == b"hi\n"
        other.signal_process("c", "init", signal.SIGKILL)
        assert other.wait("c", timeout=20).code == 137
        begun = time.monotonic()
        # Five seconds for a reader that might come to life, and what the shim waits by itself.
        assert other.delete_task("c").code == 137
        assert time.monotonic() - begun < 5 + shim_waits(release) + 20
        other.delete("c")
        assert exit_of(backend, "c") == 137
        # What is in the FIFO is still there for its reader, and then comes the end.
        assert unread.stdout.read(4) == b"y\ny\n"
        begun = time.monotonic()
        other.close()
        assert time.monotonic() - begun < 9, "it took all its time"
        assert unread.stdout.read(65536) == b""


def test_close_wakes_readers_and_writers_and_leaves_the_process(
    client: Client, remote: Remote, namespace: str, spec: MakeSpec, raw: Raw
) -> None:
    streams = Streams()
    with no_leaks():
        other = remote.new_client(namespace)
        other.create("c", spec(*SLEEP))
        pid = other.start("c", with_stdin=True, attach_stdio=streams)
        with ThreadPoolExecutor(3) as pool:
            reading = pool.submit(streams.stdout.read, 10)
            writing = pool.submit(streams.stdin.write, b"x" * MIB)
            waiting = pool.submit(other.wait, "c")
            with pytest.raises(TimeoutError):
                writing.result(timeout=0.2)
            begun = time.monotonic()
            other.close()
            assert time.monotonic() - begun < 9, "it took all its time"
            assert reading.result(timeout=30) == b""
            with pytest.raises((OSError, ValueError), match=r"given the stream up|closed"):
                writing.result(timeout=30)
            with pytest.raises(CallCancelledError, match="closed"):
                waiting.result(timeout=30)
    assert alive(pid)
    assert {path.name for path in bundle_of(raw, "c").iterdir()} == {
        "init-stdin",
        "init-stdout",
        "init-stderr",
    }


def test_a_child_left_behind_does_not_keep_the_exec(
    client: Client, backend: RecordingBackend, spec: MakeSpec, raw: Raw
) -> None:
    with running(client, "c", spec(*SLEEP)), no_leaks():
        collected = Collected()
        client.exec("c", "e", process("sh", "-c", "echo hi; sleep 1000 & exit 3"), attach_stdio=collected)
        begun = time.monotonic()
        assert exit_of(backend, "c", "e") == 3
        assert time.monotonic() - begun < 15
        collected.wait()
        assert collected.out == b"hi\n"
        wait_exec_gone(client, "c", "e")
        assert not list(bundle_of(raw, "c").iterdir())
        assert len(client.list_pids("c")) == 2  # the child goes on
        assert run_exec(client, "c", "e", "echo", "again").out == b"again\n"


def test_a_child_left_behind_does_not_keep_the_task(
    client: Client, spec: MakeSpec, release: tuple[int, int]
) -> None:
    """In a pid namespace of its own the kernel kills it with init; in the host's it lives on and holds stdout."""
    shared = spec("sh", "-c", "echo hi; sleep 30 & echo $!; exit 3", options=[oci.without_namespace("pid")])
    collected = Collected()
    client.create("c", shared)
    client.start("c", attach_stdio=collected)
    assert client.wait("c", timeout=20).code == 3
    begun = time.monotonic()
    assert client.delete_task("c").code == 3
    assert time.monotonic() - begun < shim_waits(release) + 18, "it waited for the child"
    collected.wait()
    assert collected.out.startswith(b"hi\n")
    client.delete("c")


# ---------------------------------------------------------------------------------------------------- destinations


ONE_ENDS_FIRST = "echo out; exec >/dev/null; sleep 0.3; echo err >&2; exit 3"
"""By then the shim has seen the end of stdout."""


def test_the_shim_logs_to_a_file(client: Client, spec: MakeSpec, tmp_path: Path, raw: Raw) -> None:
    """Of both streams it loses nothing, whichever ends first (containerd's issue 3118)."""
    log = tmp_path / "a log: #1?.txt"
    client.create("c", spec("sh", "-c", ONE_ENDS_FIRST))
    with no_leaks():
        client.start("c", attach_stdio=cio.log_file(log))
        assert not list(bundle_of(raw, "c").iterdir())
        assert client.wait("c").code == 3
        assert client.delete_task("c").code == 3
    # By two copiers, of which either may come first.
    assert sorted(log.read_text().split()) == ["err", "out"]
    before = log.read_text()
    client.delete("c")
    with running(client, "d", spec(*SLEEP)):
        process_ = process("sh", "-c", ONE_ENDS_FIRST.replace("out;", "exec;"))
        client.exec("d", "e", process_, attach_stdio=cio.log_file(log))
        assert client.wait("d", "e").code == 3
        wait_exec_gone(client, "d", "e")
    assert log.read_text().startswith(before)  # appended
    assert sorted(log.read_text().removeprefix(before).split()) == ["err", "exec"]


@pytest.mark.parametrize("name", ["100%.log", "new\nline", os.fsdecode(b"\xff")])
def test_the_shim_logs_to_a_file_with_no_plain_name(
    client: Client, spec: MakeSpec, tmp_path: Path, name: str
) -> None:
    log = tmp_path / name
    client.create("c", spec("sh", "-c", "echo out; exec sleep 600"))
    client.start("c", attach_stdio=cio.log_file(log))
    # While it runs: of what is written at the end, the shim may lose one stream's when the other ends.
    wait_until(lambda: log.exists() and log.read_text() == "out\n", "the shim has written it", timeout=30)
    client.signal_process("c", "init", signal.SIGKILL)
    client.wait("c")
    client.delete_task("c")
    client.delete("c")


LOGGER = """\
#!/bin/sh
cat <&3 >> {directory}/out 5>&- &
cat <&4 >> {directory}/err 5>&- &
echo "$CONTAINER_NAMESPACE $CONTAINER_ID $*" >> {directory}/facts
exec 5>&-
wait
"""


@pytest.mark.parametrize("terminal", [False, True], ids=["pipes", "terminal"])
def test_the_shim_logs_to_a_program(
    client: Client, namespace: str, spec: MakeSpec, tmp_path: Path, *, terminal: bool
) -> None:
    logger = tmp_path / "logger"
    logger.write_text(LOGGER.format(directory=tmp_path))
    logger.chmod(0o755)
    options = [oci.with_terminal()] if terminal else []
    client.create("c", spec("sh", "-c", "echo out; echo err >&2; exit 3", options=options))
    client.start("c", attach_stdio=cio.log_uri(f"binary://{logger}?level=high"))
    assert client.wait("c").code == 3
    assert client.delete_task("c").code == 3
    client.delete("c")
    expected = ("out\r\nerr\r\n", "") if terminal else ("out\n", "err\n")

    def logged() -> tuple[str, str]:
        return (tmp_path / "out").read_bytes().decode(), (tmp_path / "err").read_bytes().decode()

    wait_until(lambda: logged() == expected, "the logger has written all")
    assert (tmp_path / "facts").read_text() == f"{namespace} c level high\n"


@pytest.mark.parametrize("terminal", [False, True], ids=["no terminal", "terminal"])
def test_null_io_takes_all_output_and_opens_nothing(
    client: Client, raw: Raw, spec: MakeSpec, data: Path, *, terminal: bool
) -> None:
    options = [with_data(data), *([oci.with_terminal()] if terminal else [])]
    with no_leaks():
        client.create("c", spec("sh", "-c", "cat /data/out; cat /data/err >&2; exit 3", options=options))
        client.start("c")  # null_io is the default
        assert not list(bundle_of(raw, "c").iterdir())
        assert client.wait("c", timeout=30).code == 3
        assert client.delete_task("c").code == 3
        client.delete("c")
        client.create("d", spec(*SLEEP, options=[with_data(data)]))
        client.start("d", attach_stdio=cio.null_io)
        client.exec("d", "e", process("sh", "-c", "cat /data/out; exit 4", terminal=terminal))
        assert client.wait("d", "e", timeout=30).code == 4
        client.exec("d", "f", process(*SLEEP, terminal=terminal))
        client.resize_terminal("d", "f", 80, 24)
        client.signal_process("d", "f", signal.SIGKILL)
        assert client.wait("d", "f", timeout=30).code == 137
        wait_exec_gone(client, "d", "e")
        wait_exec_gone(client, "d", "f")
        stop(client, "d")


def test_a_terminal_cannot_be_logged_to_a_file(client: Client, spec: MakeSpec, tmp_path: Path) -> None:
    client.create("c", spec("true", options=[oci.with_terminal()]))
    with pytest.raises(InvalidParameterError, match="terminal"):
        client.start("c", attach_stdio=cio.log_file(tmp_path / "log"))
    with pytest.raises(NotFoundError):
        client.status("c")
    client.delete("c")


# ------------------------------------------------------------------------------------------------ the streams themselves


def test_selectors_read_the_streams(client: Client, spec: MakeSpec, data: Path) -> None:
    streams = Streams()
    client.create("c", spec("sh", "-c", "cat /data/out & cat /data/err >&2; wait", options=[with_data(data)]))
    client.start("c", attach_stdio=streams)
    assert streams.dio is not None
    assert streams.dio.stderr is not None
    parts = {"out": b"", "err": b""}
    with selectors.DefaultSelector() as selector:
        selector.register(streams.dio.stdout, selectors.EVENT_READ, "out")
        selector.register(streams.dio.stderr, selectors.EVENT_READ, "err")
        while selector.get_map():
            ready = selector.select(20)
            assert ready, "nothing came for 20 s"
            for key, _ in ready:
                piece = os.read(key.fd, 65536)
                parts[key.data] += piece
                if not piece:
                    selector.unregister(key.fileobj)
    assert parts["out"] == (data / "out").read_bytes()
    assert parts["err"] == (data / "err").read_bytes()
    client.wait("c")
    assert client.delete_task("c").code == 0
    streams.dio.close()
    client.delete("c")


def test_asyncio_reads_the_streams(client: Client, spec: MakeSpec, data: Path) -> None:
    streams = Streams()

    async def read() -> bytes:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), streams.stdout
        )
        try:
            return await asyncio.wait_for(reader.read(), 20)
        finally:
            transport.close()

    client.create("c", spec("cat", "/data/out", options=[with_data(data)]))
    client.start("c", attach_stdio=streams)
    assert asyncio.run(read()) == (data / "out").read_bytes()
    client.wait("c")
    assert client.delete_task("c").code == 0
    client.delete("c")


def test_the_standard_library_reads_the_streams(
    client: Client, spec: MakeSpec, data: Path, tmp_path: Path
) -> None:
    def start(*args: str) -> Streams:
        streams = Streams()
        client.create("c", spec(*args, options=[with_data(data)]))
        client.start("c", attach_stdio=streams)
        return streams

    def end() -> None:
        assert client.wait("c").code == 0
        assert client.delete_task("c").code == 0
        client.delete("c")

    streams = start("sh", "-c", "echo one; usleep 20000; echo two")
    with io.TextIOWrapper(io.BufferedReader(streams.stdout)) as text:
        assert list(text) == ["one\n", "two\n"]
    end()
    streams = start("cat", "/data/out")
    with (tmp_path / "copied").open("wb") as file:
        shutil.copyfileobj(streams.stdout, file)
    assert (tmp_path / "copied").read_bytes() == (data / "out").read_bytes()
    end()
    streams = start("cat", "/data/err")
    with (tmp_path / "spliced").open("wb") as file, selectors.DefaultSelector() as selector:
        selector.register(streams.stdout, selectors.EVENT_READ)
        while selector.select(20) and os.splice(streams.stdout.fileno(), file.fileno(), MIB):
            pass
    assert (tmp_path / "spliced").read_bytes() == (data / "err").read_bytes()
    streams.stdout.close()
    end()


def test_a_second_reader_of_an_ended_stream_gets_the_end(client: Client, spec: MakeSpec) -> None:
    streams = Streams()
    client.create("c", spec("echo", "hi"))
    client.start("c", attach_stdio=streams)
    assert streams.stdout.readall() == b"hi\n"
    client.wait("c")
    client.delete_task("c")
    assert streams.stdout.read(10) == b""
    streams.stdout.close()
    with pytest.raises(ValueError, match="closed"):
        streams.stdout.read(10)
    client.delete("c")


def test_fifos_are_there_only_as_long_as_they_are_needed(
    client: Client, spec: MakeSpec, raw: Raw, backend: RecordingBackend
) -> None:
    def names() -> set[str]:
        return {path.name for path in bundle_of(raw, "c").iterdir()}

    collected = Collected()
    client.create("c", spec(*SLEEP))
    assert not names()
    client.start("c", attach_stdio=Collected())
    assert names() == {"init-stdout", "init-stderr"}
    client.exec("c", "e.1", process("cat"), with_stdin=True, attach_stdio=collected)
    assert names() == {"init-stdout", "init-stderr", "e.1-stdin", "e.1-stdout", "e.1-stderr"}
    collected.stdin.close()
    backend.wait_for(EventType.EXIT, "c", "e.1")
    wait_exec_gone(client, "c", "e.1")
    assert names() == {"init-stdout", "init-stderr"}
    client.signal_process("c", "init", signal.SIGKILL)
    client.wait("c")
    client.delete_task("c")
    assert not names()
    client.delete("c")
