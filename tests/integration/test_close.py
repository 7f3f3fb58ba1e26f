"""What `Client.close` leaves: nothing here, everything in containerd; and what it may not wait for."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest

from libcontainerd import (
    CallCancelledError,
    Client,
    DeadlineExceededError,
    ExitStatus,
    Remote,
    UnavailableError,
    cio,
    oci,
)
from libcontainerd._wire.pb.services import tasks_pb2
from libcontainerd._wire.pb.types.task_pb2 import Status as TaskStatus
from libcontainerd.backends import CallbackBackend, RecordingBackend
from libcontainerd.types import Backend, EventInfo, EventType
from tests import leaks
from tests.conftest import Count
from tests.integration.containers import Collected, MakeSpec, Raw, bundle_of, process, shims_of, wait_until
from tests.integration.proxy import Proxy

PROMPT = 8.0  # less than the ten seconds that `close` may take
"""Seconds that a close with nothing to wait for may take on a busy machine."""


@contextmanager
def prompt(limit: float = PROMPT) -> Iterator[None]:
    """Fail if the block takes longer."""
    begun = time.monotonic()
    yield
    took = time.monotonic() - begun
    assert took < limit, f"took {took:.1f} s"


class Held:
    """An `attach_stdio` that keeps the streams for the test to use."""

    def __init__(self) -> None:
        self.dio: cio.DirectIO | None = None

    def __call__(self, dio: cio.DirectIO) -> cio.IO:
        self.dio = dio
        return dio

    @property
    def stdin(self) -> cio.InputStream:
        assert self.dio is not None
        assert self.dio.stdin is not None
        return self.dio.stdin

    @property
    def stdout(self) -> cio.OutputStream:
        assert self.dio is not None
        return self.dio.stdout


NewClient = Callable[..., Client]


@pytest.fixture
def new_client(remote: Remote, namespace: str, raw: Raw) -> Iterator[NewClient]:
    """Makes clients that the test closes: nothing of them may be left in this process in the end."""
    made: list[Client] = []

    def make(backend: Backend | None = None) -> Client:
        made.append(remote.new_client(namespace, backend))
        return made[-1]

    raw.container_ids()
    with leaks.no_leaks():
        yield make
        for client in made:
            client.close()
    raw.remove_everything()


def is_running(raw: Raw, container_id: str = "c") -> bool:
    """Whether containerd says so; where it says that it does not know, its shim is late, and it is asked again."""
    found = None

    def known() -> bool:
        nonlocal found
        found = raw.process(container_id)
        return found is None or found.status != TaskStatus.UNKNOWN

    wait_until(known, f"it is known whether {container_id!r} runs", timeout=60)
    return found is not None and found.status == TaskStatus.RUNNING


def start(client: Client, spec: MakeSpec, *args: str, container_id: str = "c") -> Held:
    """Run a container whose streams the test holds."""
    held = Held()
    client.create(container_id, spec(*args))
    client.start(container_id, with_stdin=True, attach_stdio=held)
    return held


# ------------------------------------------------------------------------------------------------------- hung calls


class Freezer:
    """A containerd of the test's own that can be stopped and continued."""

    def __init__(self, remote: Remote, raw: Raw, pid: int) -> None:
        self.remote = remote
        self.raw = raw
        self._pid = pid

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Have containerd answer nothing during the block."""
        os.kill(self._pid, signal.SIGSTOP)
        wait_until(self._stands_still, "each of its threads has stopped")
        try:
            yield
        finally:
            os.kill(self._pid, signal.SIGCONT)

    def _stands_still(self) -> bool:
        threads = Path(f"/proc/{self._pid}/task").iterdir()
        try:
            return all((each / "stat").read_text().rpartition(")")[2].split()[0] == "T" for each in threads)
        except (FileNotFoundError, ProcessLookupError):  # one has ended meanwhile
            return False


@pytest.fixture
def freezer(containerd_binary: Path, namespace: str) -> Iterator[Freezer]:
    """A containerd to freeze; sees that no shim of it is left."""
    directory = Path(tempfile.mkdtemp(prefix="lcd-"))
    directory.chmod(0o755)
    try:
        with Remote.start(directory / "root", directory / "state", binary=str(containerd_binary)) as remote:
            options = (("grpc.default_authority", "localhost"),)
            with grpc.insecure_channel(f"unix:{remote.address}", options=options) as channel:
                raw = Raw(channel, namespace)
                raw.container_ids()
                yield Freezer(remote, raw, int((directory / "state/containerd.pid").read_text().split()[0]))
                raw.remove_everything()
            wait_until(lambda: not shims_of(remote.address), "all shims have ended")
    finally:
        shutil.rmtree(directory)


def test_close_does_not_wait_for_a_containerd_that_hangs(
    freezer: Freezer, namespace: str, spec: MakeSpec
) -> None:
    with leaks.no_leaks(), ThreadPoolExecutor(16) as executor:
        client = freezer.remote.new_client(namespace, RecordingBackend())
        start(client, spec, "cat")
        start(client, spec, "cat", container_id="d")
        client.create("idle", spec("true"))
        with freezer.frozen():
            asking: list[Future[object]] = [
                executor.submit(client.version),
                executor.submit(client.wait, "c"),
                executor.submit(client.status, "c"),
                executor.submit(client.summary, "c"),
                executor.submit(client.pause, "c"),
                executor.submit(client.delete, "idle"),
            ]
            deleting = executor.submit(client.delete_task, "d")
            changing: list[Future[object]] = [
                executor.submit(client.create, "new", spec("true")),
                executor.submit(client.exec, "c", "e", process("cat"), True, Held()),
            ]
            wait_until(lambda: all(each.running() for each in (*asking, *changing)), "calls are made")
            with prompt():
                client.close()
                for each in asking:
                    assert isinstance(each.exception(PROMPT), CallCancelledError)
                assert isinstance(deleting.result(PROMPT).error, CallCancelledError)
        for each in changing:
            assert isinstance(each.exception(50), CallCancelledError)
    # What was under way has been undone, and the rest is as it was.
    assert freezer.raw.container_ids() - {"idle"} == {"c", "d"}
    assert freezer.raw.process("c", "e") is None
    assert is_running(freezer.raw, "d")
    assert freezer.raw.process("c") is not None


def slow_runc(directory: Path, step: str) -> dict[str, str]:
    """Runtime options with a runc that says when it comes to a step, and waits there until told to go on."""
    reached, go_on, runc = directory / "reached", directory / "go-on", directory / "runc"
    os.mkfifo(reached)
    os.mkfifo(go_on)
    real = shutil.which("runc", path=f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin")
    runc.write_text(
        f"""#!/bin/sh
case " $* " in *" {step} "*) echo reached > {reached}; read go_on < {go_on};; esac
exec {real} "$@"
"""
    )
    runc.chmod(0o755)
    return {"binary_name": str(runc)}


@pytest.mark.parametrize("step", ["create", "start", "exec"])
def test_a_start_that_close_cuts_short_is_undone_in_containerd(
    new_client: NewClient, raw: Raw, spec: MakeSpec, tmp_path: Path, step: str
) -> None:
    client = new_client(RecordingBackend())
    held = Held()
    client.create("c", spec("sleep", "1000"), slow_runc(tmp_path, step))
    bundle = bundle_of(raw, "c")
    with ThreadPoolExecutor(1) as executor:
        if step == "exec":
            client.start("c")
            under_way = executor.submit(client.exec, "c", "e", process("cat"), True, held)
        else:
            under_way = executor.submit(client.start, "c", None, True, held)
        (tmp_path / "reached").read_bytes()
        with prompt():
            client.close()
        (tmp_path / "go-on").write_bytes(b"go on\n")
        assert isinstance(under_way.exception(50), CallCancelledError)
    assert (raw.process("c") is not None) == (step == "exec")
    assert raw.process("c", "e") is None
    assert list(bundle.iterdir()) == []
    assert held.stdout.read(1) == b""
    with pytest.raises((OSError, ValueError)):
        held.stdin.write(b"nobody reads this")


@pytest.mark.parametrize("state", ["refused", "hung", "hung after a break"])
def test_close_while_the_connection_is_down(
    remote: Remote, raw: Raw, spec: MakeSpec, tmp_path: Path, state: str
) -> None:
    with leaks.no_leaks(), Proxy(remote.address) as proxy, ThreadPoolExecutor(1) as executor:
        client = Client(proxy.path, namespace=raw.metadata[0][1], state_dir=tmp_path / "bundles")
        start(client, spec, "sleep", "1000")
        waiting = executor.submit(client.wait, "c")
        if state == "refused":
            proxy.cut(stay_broken=True)
        else:
            proxy.hold()
            if state == "hung after a break":
                proxy.cut()
        with pytest.raises((UnavailableError, DeadlineExceededError)):
            client.status("c", timeout=0.5)
        with prompt():
            client.close()
        assert isinstance(waiting.exception(PROMPT), CallCancelledError)
    assert is_running(raw)
    raw.remove_everything()


# ------------------------------------------------------------------------------------------------------------- FIFOs


def test_close_wakes_readers_and_writers_and_leaves_the_containers_alone(
    new_client: NewClient, raw: Raw, spec: MakeSpec
) -> None:
    client = new_client(RecordingBackend())
    silent = start(client, spec, "sleep", "1000", container_id="silent")
    start(client, spec, "yes", container_id="full")
    blocked = threading.Event()
    release = threading.Event()

    def block(data: bytes) -> None:
        blocked.set()
        release.wait(50)

    client.create("copied", spec("yes"))
    client.start("copied", attach_stdio=cio.copy(stdout=block))
    client.exec("silent", "e", process("yes"), attach_stdio=Held())

    with ThreadPoolExecutor(4) as executor:
        reading = executor.submit(silent.stdout.read, 1)
        writing = executor.submit(silent.stdin.write, b"x" * (1 << 20))
        waiting = executor.submit(client.wait, "silent")
        assert blocked.wait(30)
        wait_until(lambda: reading.running() and writing.running() and waiting.running(), "all are blocked")
        try:
            with prompt():
                client.close()
                assert reading.result(PROMPT) == b""
                assert isinstance(writing.exception(PROMPT), OSError)
                assert isinstance(waiting.exception(PROMPT), CallCancelledError)
        finally:
            release.set()
    assert all(is_running(raw, each) for each in ("silent", "full", "copied"))
    assert silent.stdout.read(1) == b""


def test_a_stdout_that_nobody_reads_blocks_neither_deletion_nor_close(
    new_client: NewClient, remote: Remote, raw: Raw, spec: MakeSpec
) -> None:
    client = new_client(RecordingBackend())
    full = start(client, spec, "yes")
    client.exec("c", "e", process("yes"), attach_stdio=Held())
    client.signal_process("c", "init", signal.SIGKILL)
    assert client.wait("c").code == 137
    with ThreadPoolExecutor(1) as executor:
        deleting = executor.submit(client.delete_task, "c")
        with prompt():
            client.close()
        status = deleting.result(30)
        assert status.code in (137, 255)
    assert full.stdout.read(1) == b""
    raw.remove_everything()
    wait_until(lambda: not shims_of(remote.address), "the shim has ended")


# ------------------------------------------------------------------------------------------------- events and backends


@pytest.mark.timeout(240)
def test_close_while_events_flow_and_calls_are_made(
    new_client: NewClient, raw: Raw, spec: MakeSpec, count: Count
) -> None:
    keeper = new_client()
    for number in range(4):
        start(keeper, spec, "sleep", "1000", container_id=f"c{number}")
    keeper.close()
    for each in range(count(12, 3)):
        record = RecordingBackend()
        client = new_client(record)
        ids = [f"r{each}-{number}" for number in range(4)]
        for container_id in ids:
            start(client, spec, "sleep", "1000", container_id=container_id)

        one_is_done = threading.Event()

        def work(number: int, one_is_done: threading.Event = one_is_done) -> int:
            done = 0
            while True:
                collected = Collected(b"input")
                name = f"e{number}-{done}"
                try:
                    client.exec(ids[number % 4], name, process("cat"), True, collected)  # noqa: B023
                    assert client.wait(ids[number % 4], name).code == 0  # noqa: B023
                except CallCancelledError:
                    return done
                done += 1
                one_is_done.set()

        with ThreadPoolExecutor(8) as executor:
            working = [executor.submit(work, number) for number in range(8)]
            record.wait_for(EventType.EXIT)
            assert one_is_done.wait(30)
            with prompt(10):
                client.close()
            assert sum(future.result(30) for future in working) > 0
        assert all(is_running(raw, container_id) for container_id in ids)
        told = len(record.events())
        raw.kill(ids[0])
        wait_until(lambda: not is_running(raw, ids[0]), "it ends")  # noqa: B023
        assert len(record.events()) == told
        raw.remove_everything()


def test_close_does_not_outwait_a_backend_that_blocks(new_client: NewClient, spec: MakeSpec) -> None:
    entered, release, left = threading.Event(), threading.Event(), threading.Event()

    def block(container_id: str, event: EventType, info: EventInfo) -> None:
        entered.set()
        assert release.wait(50)
        left.set()

    client = new_client(CallbackBackend(block))
    start(client, spec, "sleep", "1000")
    assert entered.wait(30)
    try:
        with prompt(0.5 + PROMPT):
            client.close(timeout=0.5)
        assert not left.is_set()
        with pytest.raises(CallCancelledError):
            client.version()
    finally:
        release.set()
    assert left.wait(30)


def test_close_lets_queued_events_finish(new_client: NewClient, spec: MakeSpec) -> None:
    entered, release = threading.Event(), threading.Event()
    record = RecordingBackend()

    def block(container_id: str, event: EventType, info: EventInfo) -> None:
        if container_id == "c":
            entered.set()
            assert release.wait(50)
        record.process_event(container_id, event, info)

    client = new_client(CallbackBackend(block))
    start(client, spec, "true")
    assert entered.wait(30)
    assert client.wait("c").code == 0
    # Who waits may hear of the exit before it is queued; but what comes after it in the stream is queued after it.
    start(client, spec, "true", container_id="later")
    record.wait_for(EventType.START, "later")
    with ThreadPoolExecutor(1) as executor:
        closing = executor.submit(client.close, 30)
        wait_until(lambda: client.closed, "close has begun")
        release.set()
        with prompt():
            closing.result()
    told = [each.event for each in record.events("c")]
    assert told == [EventType.CREATE, EventType.START, EventType.EXIT]


def test_close_cuts_a_verb_that_a_backend_is_in(new_client: NewClient, spec: MakeSpec) -> None:
    entered = threading.Event()
    said: Future[ExitStatus] = Future()

    def wait(container_id: str, event: EventType, info: EventInfo) -> None:
        entered.set()
        try:
            said.set_result(client.wait(container_id))
        except Exception as error:  # noqa: BLE001 - told to the test
            said.set_exception(error)

    client = new_client(CallbackBackend(on={EventType.START: wait}))
    start(client, spec, "sleep", "1000")
    assert entered.wait(30)
    with prompt(0.5 + PROMPT):
        client.close(timeout=0.5)
    assert isinstance(said.exception(PROMPT), CallCancelledError)


# ----------------------------------------------------------------------------------------------------- closed is closed


def test_close_twice_and_from_two_threads(new_client: NewClient, spec: MakeSpec) -> None:
    client = new_client()
    start(client, spec, "sleep", "1000")
    with ThreadPoolExecutor(4) as executor, prompt():
        for closing in [executor.submit(client.close) for _ in range(4)]:
            closing.result()
    client.close()
    assert client.closed


def test_close_from_inside_process_event(new_client: NewClient, raw: Raw, spec: MakeSpec) -> None:
    took: Future[float] = Future()

    def close(container_id: str, event: EventType, info: EventInfo) -> None:
        begun = time.monotonic()
        client.close()
        took.set_result(time.monotonic() - begun)

    client = new_client(CallbackBackend(on={EventType.START: close}))
    client.create("c", spec("sleep", "1000"))
    with suppress(CallCancelledError):  # the answer and the event come in either order
        client.start("c")
    assert took.result(20) < PROMPT
    client.close()


def test_close_from_inside_process_event_while_another_thread_is_closing(
    new_client: NewClient, spec: MakeSpec
) -> None:
    entered = threading.Event()
    done: Future[None] = Future()

    def close(container_id: str, event: EventType, info: EventInfo) -> None:
        entered.set()
        wait_until(lambda: client.closed, "the other close has begun")
        client.close()
        done.set_result(None)

    client = new_client(CallbackBackend(on={EventType.CREATE: close}))
    with ThreadPoolExecutor(1) as executor:
        starting = executor.submit(start, client, spec, "sleep", "1000")
        assert entered.wait(30)
        with prompt():
            client.close()
        done.result(PROMPT)
        assert isinstance(starting.exception(30), CallCancelledError | None)


@pytest.mark.parametrize("where", ["attach_stdio", "a destination of cio.copy"])
def test_close_from_inside_a_callback_of_the_stdio(new_client: NewClient, spec: MakeSpec, where: str) -> None:
    closed = threading.Event()
    client = new_client(RecordingBackend())
    client.create("c", spec("sh", "-c", "echo hi; exec sleep 1000"))

    def close(*_: object) -> None:
        with prompt():
            client.close()
        closed.set()

    def attach(dio: cio.DirectIO) -> cio.IO:
        close()
        return dio

    attach_stdio = attach if where == "attach_stdio" else cio.copy(stdout=close)
    with suppress(CallCancelledError):
        client.start("c", attach_stdio=attach_stdio)
        assert where != "attach_stdio"
    assert closed.wait(30)


def test_leaving_the_with_block_closes(new_client: NewClient, raw: Raw, spec: MakeSpec) -> None:
    with new_client() as client:
        start(client, spec, "sleep", "1000")
    assert client.closed
    assert is_running(raw)


VERBS: dict[str, Callable[[Client, MakeSpec], object]] = {
    "version": lambda client, spec: client.version(),
    "create": lambda client, spec: client.create("new", spec("true")),
    "create again": lambda client, spec: client.create("c", spec("true")),
    "start": lambda client, spec: client.start("idle"),
    "exec": lambda client, spec: client.exec("c", "e", process("true")),
    "signal_process": lambda client, spec: client.signal_process("c", "init", signal.SIGKILL),
    "resize_terminal": lambda client, spec: client.resize_terminal("c", "init", 80, 24),
    "close_stdin": lambda client, spec: client.close_stdin("c", "init"),
    "pause": lambda client, spec: client.pause("c"),
    "resume": lambda client, spec: client.resume("c"),
    "status": lambda client, spec: client.status("c"),
    "list_pids": lambda client, spec: client.list_pids("c"),
    "summary": lambda client, spec: client.summary("c"),
    "wait": lambda client, spec: client.wait("c"),
    "delete_task": lambda client, spec: client.delete_task("c"),
    "delete": lambda client, spec: client.delete("idle"),
    "a verb for an unknown container": lambda client, spec: client.status("unknown"),
}


def test_verbs_after_close_are_cancelled_and_touch_nothing(
    new_client: NewClient, raw: Raw, spec: MakeSpec
) -> None:
    client = new_client()
    start(client, spec, "sleep", "1000")
    client.create("idle", spec("sleep", "1000"))
    bundles = bundle_of(raw, "c").parent
    client.close()
    before = sorted(bundles.rglob("*"))
    for name, verb in VERBS.items():
        with pytest.raises(CallCancelledError):
            pytest.fail(f"{name} returned {verb(client, spec)!r}")
    assert sorted(bundles.rglob("*")) == before
    assert raw.container_ids() == {"c", "idle"}
    assert is_running(raw)


def test_a_start_after_close_does_not_harm_what_another_client_runs(
    new_client: NewClient, raw: Raw, spec: MakeSpec
) -> None:
    client = new_client()
    client.create("c", spec("sleep", "1000"))
    client.close()
    raw.tasks.Create(tasks_pb2.CreateTaskRequest(container_id="c"), metadata=raw.metadata, timeout=20)
    raw.tasks.Start(tasks_pb2.StartRequest(container_id="c"), metadata=raw.metadata, timeout=20)
    with pytest.raises(CallCancelledError):
        client.start("c")
    assert is_running(raw)


# ------------------------------------------------------------------------------------------------- programs that end

PROGRAM = """\
import json, sys, threading
from contextlib import suppress
from libcontainerd import CallCancelledError, Client, cio

def wait():
    with suppress(CallCancelledError):
        client.wait("c")

client = Client(sys.argv[1], namespace=sys.argv[2], state_dir=sys.argv[3])
client.create("c", json.loads(sys.argv[4]))
ends = []
pid = client.start("c", None, True, lambda dio: ends.append(dio) or dio)
threading.Thread(target=ends[0].stdout.read, daemon=True).start()
threading.Thread(target=wait, daemon=True).start()
client.exec("c", "e", {"args": ["/bin/yes"], "cwd": "/"}, False, cio.copy(stdout=lambda data: None))
client.exec("c", "f", {"args": ["/bin/yes"], "cwd": "/"}, False, lambda dio: ends.append(dio) or dio)
print("running", flush=True)
"""


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise SystemExit(4)", "client.close()"])
def test_a_program_that_ends_does_so_at_once_and_leaves_its_containers(
    remote: Remote, raw: Raw, spec: MakeSpec, tmp_path: Path, end: str
) -> None:
    program = PROGRAM + end
    document = oci.dump(spec("sleep", "1000")).decode()
    arguments = [remote.address, raw.metadata[0][1], str(tmp_path / "bundles"), document]
    try:
        running = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with running:
            assert running.stdout is not None
            said = running.stdout.readline()
            with prompt(9):
                _, complaints = running.communicate(timeout=30)
            assert (said, complaints) == ("running\n", "")
            assert running.returncode == {"sys.exit(3)": 3, "raise SystemExit(4)": 4}.get(end, 0)
        assert is_running(raw)
    finally:
        raw.remove_everything()


# ---------------------------------------------------------------------------------------------------------- at the end


@pytest.mark.timeout(240)
def test_after_many_execs_close_leaves_nothing(new_client: NewClient, spec: MakeSpec, count: Count) -> None:
    client = new_client(RecordingBackend())
    number = count(1000, 60)
    start(client, spec, "sleep", "1000")

    def run(each: int) -> bytes:
        collected = Collected(b"%d" % each)
        client.exec("c", f"e{each}", process("cat"), True, collected)
        assert client.wait("c", f"e{each}").code == 0
        collected.wait()
        return collected.out

    with ThreadPoolExecutor(16) as executor:
        assert list(executor.map(run, range(number))) == [b"%d" % each for each in range(number)]
    with prompt(10):
        client.close()
