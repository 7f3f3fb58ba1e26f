"""What fails on a real containerd fails with a clear error, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import structlog

from libcontainerd import (
    CallCancelledError,
    Client,
    ConflictError,
    DeadlineExceededError,
    EventType,
    FailedPreconditionError,
    InvalidParameterError,
    LibcontainerdError,
    NotFoundError,
    NotImplementedByServerError,
    Remote,
    SystemFailureError,
    UnavailableError,
    cio,
    oci,
)
from libcontainerd._wire.pb.services import containers_pb2
from libcontainerd._wire.pb.types import task_pb2
from libcontainerd.backends import RecordingBackend
from tests.conftest import Count
from tests.integration.containers import (
    Collected,
    MakeSpec,
    Raw,
    bundle_of,
    process,
    run,
    run_exec,
    run_task,
    running,
    stop,
    wait_until,
)
from tests.leaks import no_leaks

SLEEP = ("sleep", "1000")


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="lcf-") as path:
        yield Path(path)


def assert_never_started(client: Client, raw: Raw, container_id: str) -> None:
    """A container whose start failed: it exists, and nothing of the start does."""
    assert raw.process(container_id) is None
    assert not list(bundle_of(raw, container_id).iterdir())
    with pytest.raises(NotFoundError, match="container is not running"):
        client.status(container_id)
    with pytest.raises(NotFoundError):
        client.wait(container_id)


# --------------------------------------------------------------------------------------------- programs that are not there


UNUSABLE_PROGRAMS = ["/bin/no-such-program", "no-such-program", "/etc/passwd", "/etc"]


def test_a_program_that_cannot_be_run_fails_the_start_by_name(
    client: Client, raw: Raw, spec: MakeSpec
) -> None:
    with no_leaks():
        for program in UNUSABLE_PROGRAMS:
            client.create("c", spec(program))
            bundle = bundle_of(raw, "c")
            for _ in range(2):
                with pytest.raises(InvalidParameterError, match=program) as caught:
                    client.start("c", with_stdin=True, attach_stdio=Collected(b"never read"))
                assert "'c'" in str(caught.value)
                assert isinstance(caught.value.__cause__, grpc.RpcError)
                assert_never_started(client, raw, "c")
            client.delete("c")
            assert not bundle.exists()
            assert not raw.container_ids()
    assert run(client, "c", spec("sh", "-c", "exit 3")).status.code == 3


def test_a_program_that_cannot_be_run_fails_the_exec_by_name(
    client: Client, backend: RecordingBackend, raw: Raw, spec: MakeSpec
) -> None:
    with running(client, "c", spec(*SLEEP)), no_leaks():
        for program in UNUSABLE_PROGRAMS:
            with pytest.raises(InvalidParameterError, match=program) as caught:
                client.exec(
                    "c", "e", process(program), with_stdin=True, attach_stdio=Collected(b"never read")
                )
            assert "'e'" in str(caught.value)
            assert "'c'" in str(caught.value)
            assert raw.process("c", "e") is None
            assert not list(bundle_of(raw, "c").iterdir())
            with pytest.raises(NotFoundError, match="no such exec"):
                client.signal_process("c", "e", signal.SIGTERM)
            assert len(client.list_pids("c")) == 1
        assert run_exec(client, "c", "e", "sh", "-c", "exit 3").status.code == 3
        backend.wait_for(EventType.EXIT, "c", "e")
    exits = [each.info for each in backend.events("c") if each.event is EventType.EXIT]
    assert [each.exit_code for each in exits if each.process_id == "e"] == [3]


def test_failed_starts_and_execs_leave_nothing_however_many(
    client: Client, raw: Raw, spec: MakeSpec, count: Count
) -> None:
    client.create("bad", spec("/bin/no-such-program"))
    with running(client, "c", spec(*SLEEP)), no_leaks():
        for number in range(count(200, 5)):
            with pytest.raises(InvalidParameterError):
                client.start("bad", attach_stdio=Collected())
            with pytest.raises(InvalidParameterError):
                client.exec("c", f"e{number}", process("/bin/no-such-program"), attach_stdio=Collected())
        assert not list(bundle_of(raw, "bad").iterdir())
        assert not list(bundle_of(raw, "c").iterdir())
    client.delete("bad")


def test_a_root_filesystem_that_is_not_there(client: Client, raw: Raw, spec: MakeSpec) -> None:
    with no_leaks():
        client.create("c", spec("true", options=[oci.with_rootfs("/no/such/rootfs")]))
        with pytest.raises(LibcontainerdError, match="/no/such/rootfs") as caught:
            client.start("c", attach_stdio=Collected())
        assert isinstance(caught.value, InvalidParameterError | NotFoundError | SystemFailureError)
        assert_never_started(client, raw, "c")
        client.delete("c")


def test_a_working_directory_that_is_not_there(client: Client, raw: Raw, spec: MakeSpec) -> None:
    with running(client, "c", spec(*SLEEP)):
        lost = oci.Process(args=["true"], cwd="/no/such/directory", env=["PATH=/bin"])
        with pytest.raises(LibcontainerdError, match="/no/such/directory"):
            client.exec("c", "e", lost, attach_stdio=Collected())
        assert raw.process("c", "e") is None
        assert not list(bundle_of(raw, "c").iterdir())


# --------------------------------------------------------------------------------------------------- callbacks that fail


def raising(dio: cio.DirectIO) -> cio.IO:
    raise RuntimeError("the callback's own trouble")


def returning_nothing(dio: cio.DirectIO) -> cio.IO:
    return None  # type: ignore[return-value]


def closing_first(dio: cio.DirectIO) -> cio.IO:
    dio.close()
    raise RuntimeError("the callback's own trouble")


def returning_what_is_no_io(dio: cio.DirectIO) -> cio.IO:
    return object()  # type: ignore[return-value]


FAILING_CALLBACKS = [
    (raising, RuntimeError, "own trouble"),
    (closing_first, RuntimeError, "own trouble"),
    (returning_nothing, InvalidParameterError, "NoneType"),
    (returning_what_is_no_io, InvalidParameterError, "object"),
]


def test_a_callback_that_fails_aborts(
    client: Client, backend: RecordingBackend, raw: Raw, spec: MakeSpec
) -> None:
    with no_leaks():
        for attach, error, says in FAILING_CALLBACKS:
            client.create("c", spec(*SLEEP))
            with pytest.raises(error, match=says):
                client.start("c", with_stdin=True, attach_stdio=attach)
            assert_never_started(client, raw, "c")
            assert not backend.events("c")
            client.start("c")
            with pytest.raises(error, match=says):
                client.exec("c", "e", process("true"), with_stdin=True, attach_stdio=attach)
            assert raw.process("c", "e") is None
            assert not list(bundle_of(raw, "c").iterdir())
            stop(client, "c")
            backend.wait_for(EventType.EXIT, "c")
            assert [each.event.value for each in backend.events("c")] == ["create", "start", "exit"]
            backend.clear()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_callback_that_closes_an_output_is_refused(
    client: Client, raw: Raw, spec: MakeSpec, stream: str
) -> None:
    """The shim would wait half a minute for a reader of it."""

    def closing(dio: cio.DirectIO) -> cio.IO:
        getattr(dio, stream).close()
        return dio

    client.create("c", spec(*SLEEP))
    with pytest.raises(InvalidParameterError, match="closed an output"):
        client.start("c", attach_stdio=closing)
    assert_never_started(client, raw, "c")
    client.start("c")
    with pytest.raises(InvalidParameterError, match="closed an output"):
        client.exec("c", "e", process("true"), attach_stdio=closing)
    assert len(client.list_pids("c")) == 1
    stop(client, "c")


def test_an_io_that_fails_keeps_nobody_from_the_end(client: Client, raw: Raw, spec: MakeSpec) -> None:
    class Failing:
        def __init__(self, dio: cio.DirectIO) -> None:
            self.dio = dio

        def cancel(self) -> None:
            raise RuntimeError("in cancel")

        def wait(self) -> None:
            raise RuntimeError("in wait")

        def close(self) -> None:
            raise RuntimeError("in close")

    with no_leaks(), structlog.testing.capture_logs() as logs:
        client.create("c", spec("true"))
        client.start("c", attach_stdio=Failing)
        assert client.wait("c").code == 0
        assert client.delete_task("c").error is None
        client.delete("c")
    assert [log["step"] for log in logs if log["event"] == "io_failed"] == ["cancel", "wait", "close"]


# ------------------------------------------------------------------------------------------------------------- bad ids

BAD_IDS = [
    "",
    "../x",
    "..",
    ".",
    "a/b",
    "/a",
    "a" * 77,
    "a\0b",
    "a\nb",
    "a\x1bb",
    "a b",
    "ä",
    "a..b",
    "-a",
    "a-",
]


def test_an_id_that_is_none_is_refused_before_anything_is_touched(
    client: Client, raw: Raw, remote: Remote, spec: MakeSpec
) -> None:
    def files() -> set[Path]:
        while True:
            with contextlib.suppress(FileNotFoundError):  # what earlier tests have left may go just now
                return set(Path(remote.address).parent.rglob("*"))

    client.create("good", spec("true"))
    before = files()
    for bad in BAD_IDS:
        with pytest.raises(InvalidParameterError):
            client.create(bad, spec("true"))
        with pytest.raises(InvalidParameterError):
            remote.new_client(bad)
    assert raw.container_ids() == {"good"}
    assert files() <= before
    assert bundle_of(raw, "good").is_dir()


def test_an_execs_id_that_is_none_is_refused_before_anything_is_touched(
    client: Client, raw: Raw, spec: MakeSpec
) -> None:
    with running(client, "c", spec(*SLEEP)):
        for bad in [*BAD_IDS, "init", "c"]:
            with pytest.raises(InvalidParameterError):
                client.exec("c", bad, process("true"), attach_stdio=Collected())
        assert not list(bundle_of(raw, "c").iterdir())
        assert len(client.list_pids("c")) == 1


def test_an_id_of_76_characters_is_good(client: Client, spec: MakeSpec) -> None:
    name = "a" * 76
    client.create(name, spec(*SLEEP))
    client.start(name)
    assert run_exec(client, name, "e" * 76, "sh", "-c", "echo 1; exit 3").out == b"1\n"
    stop(client, name)


# -------------------------------------------------------------------------------------------------- other bad arguments


@pytest.mark.parametrize(
    "labels",
    [
        {"": "x"},
        {"k": "v" * 4096},
        {"libcontainerd/bundle.path": "/etc"},
        {"k": 7},
        {7: "v"},
        {"k": "\udcff"},
    ],
    ids=["no key", "too long", "our own", "number", "number key", "surrogate"],
)
def test_a_label_that_containerd_would_refuse(
    client: Client, raw: Raw, spec: MakeSpec, labels: dict[str, str]
) -> None:
    with pytest.raises(InvalidParameterError, match="label"):
        client.create("c", spec("true"), labels=labels)
    assert not raw.container_ids()
    with pytest.raises(NotFoundError):
        client.delete("c")


@pytest.mark.parametrize(
    "bad",
    [{"no_such_field": 1}, {"shim_cgroup": 5}, containers_pb2.Container()],
    ids=["field", "type", "message"],
)
def test_runtime_options_that_are_none(
    client: Client, raw: Raw, spec: MakeSpec, bad: dict[str, object]
) -> None:
    with pytest.raises(InvalidParameterError, match="runtime_options"):
        client.create("c", spec("true"), bad)
    assert not raw.container_ids()


def test_a_spec_that_is_none(client: Client, raw: Raw) -> None:
    for bad in ({"ociVersion": 7}, {"ociVersion": "1.0.2", "process": {"args": "sh"}}):
        with pytest.raises(InvalidParameterError):
            client.create("c", bad)
    assert not raw.container_ids()


def test_numbers_that_are_no_signals_sizes_or_timeouts(client: Client, spec: MakeSpec) -> None:
    with running(client, "c", spec(*SLEEP)):
        for number in (0, -9, signal.NSIG, 1 << 40):
            with pytest.raises(InvalidParameterError, match="signal"):
                client.signal_process("c", "init", number)
        for width, height in ((-1, 24), (80, 1 << 16)):
            with pytest.raises(InvalidParameterError, match="65535"):
                client.resize_terminal("c", "init", width, height)
        for seconds in (0, -1, float("nan")):
            with pytest.raises(InvalidParameterError, match="timeout"):
                client.status("c", timeout=seconds)


def test_stdin_for_a_destination_that_feeds_none(client: Client, raw: Raw, spec: MakeSpec) -> None:
    client.create("c", spec(*SLEEP))
    with pytest.raises(InvalidParameterError, match="with_stdin"):
        client.start("c", with_stdin=True)
    assert_never_started(client, raw, "c")
    client.delete("c")


def test_an_attach_stdio_that_is_none(client: Client, raw: Raw, spec: MakeSpec) -> None:
    client.create("c", spec(*SLEEP))
    for bad in (None, "file:///tmp/log", 1):
        with pytest.raises(InvalidParameterError, match="attach_stdio"):
            client.start("c", attach_stdio=bad)  # type: ignore[arg-type]
    assert_never_started(client, raw, "c")
    client.delete("c")


def test_a_bundle_that_others_have_spoilt(client: Client, raw: Raw, spec: MakeSpec) -> None:
    client.create("c", spec(*SLEEP))
    bundle = bundle_of(raw, "c")
    with no_leaks():
        (bundle / "init-stdout").write_text("somebody's file")
        with pytest.raises(SystemFailureError, match="init-stdout"):
            client.start("c", attach_stdio=Collected())
        assert (bundle / "init-stdout").read_text() == "somebody's file"
        assert [path.name for path in bundle.iterdir()] == ["init-stdout"]
        (bundle / "init-stdout").unlink()
        bundle.rmdir()
        # A directory that is gone is made again.
        collected = Collected()
        client.start("c", with_stdin=True, attach_stdio=collected)
        assert run_exec(client, "c", "e", "echo", "hi").out == b"hi\n"
        stop(client, "c")
    assert not bundle.exists()
    assert not raw.container_ids()


# ------------------------------------------------------------------------------------------------------------- conflicts


def test_a_container_of_another_client_is_left_alone(
    client: Client, remote: Remote, namespace: str, raw: Raw, spec: MakeSpec
) -> None:
    collected = Collected()
    client.create("c", spec("sh", "-c", "read line; echo $line; exit 3"), labels={"whose": "first"})
    bundle = bundle_of(raw, "c")
    client.start("c", with_stdin=True, attach_stdio=collected)
    fifos = sorted(bundle.iterdir())
    with remote.new_client(namespace) as other:
        with pytest.raises(ConflictError, match="'c'"):
            other.create("c", spec("true"))
        with pytest.raises(NotFoundError, match="no such container"):
            other.start("c")
    assert raw.container("c").labels["whose"] == "first"
    assert sorted(bundle.iterdir()) == fifos
    collected.stdin.write(b"unharmed\n")
    assert client.wait("c").code == 3
    assert client.delete_task("c").code == 3
    assert collected.out == b"unharmed\n"
    client.delete("c")


def test_a_container_made_past_us_is_a_conflict_and_stays(client: Client, raw: Raw, spec: MakeSpec) -> None:
    theirs = containers_pb2.Container(
        id="c",
        labels={"whose": "theirs"},
        runtime=containers_pb2.Container.Runtime(name="io.containerd.runc.v2"),
    )
    theirs.spec.type_url = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
    theirs.spec.value = oci.dump(spec("true"))
    raw.create_container(theirs)
    with pytest.raises(ConflictError, match="'c'"):
        client.create("c", spec("true"))
    assert raw.container("c").labels["whose"] == "theirs"
    raw.delete_container("c")
    assert run(client, "c", spec("sh", "-c", "exit 3")).status.code == 3


def test_a_task_made_past_us_is_a_conflict_and_stays(client: Client, raw: Raw, spec: MakeSpec) -> None:
    client.create("c", spec("sh", "-c", "exit 3"))
    raw.create_task("c")
    with no_leaks():
        with pytest.raises(ConflictError, match="'c'"):
            client.start("c", with_stdin=True, attach_stdio=Collected())
        assert not list(bundle_of(raw, "c").iterdir())
    assert raw.process("c") is not None
    raw.start_task("c")
    wait_until(lambda: stopped(raw, "c"), "their task has ended")
    raw.delete_task("c")
    assert run_task(client, "c").status.code == 3
    client.delete("c")


def test_a_container_whose_task_was_made_past_us_is_not_deleted(
    client: Client, raw: Raw, spec: MakeSpec
) -> None:
    client.create("c", spec(*SLEEP))
    raw.create_task("c")
    raw.start_task("c")
    with pytest.raises(FailedPreconditionError, match="cannot delete container 'c': a task exists"):
        client.delete("c")
    raw.kill("c")
    wait_until(lambda: stopped(raw, "c"), "its end")
    with pytest.raises(FailedPreconditionError):
        client.delete("c")
    raw.delete_task("c")
    client.delete("c")
    assert not raw.container_ids()


def test_a_task_made_past_us_while_we_start_is_a_conflict_and_stays(
    client: Client, backend: RecordingBackend, raw: Raw, spec: MakeSpec
) -> None:
    """Its events come while our own start is under way, and must not be taken for ours."""

    def attach(dio: cio.DirectIO) -> cio.IO:
        raw.create_task("c")
        backend.wait_for(EventType.CREATE, "c")
        return dio

    client.create("c", spec(*SLEEP))
    with pytest.raises(ConflictError, match="'c'"):
        client.start("c", attach_stdio=attach)
    assert not list(bundle_of(raw, "c").iterdir())
    assert raw.process("c") is not None


def stopped(raw: Raw, container_id: str) -> bool:
    found = raw.process(container_id)
    return found is not None and found.status == task_pb2.Status.STOPPED


def test_of_two_creations_at_once_one_wins(client: Client, raw: Raw, spec: MakeSpec, count: Count) -> None:
    made = spec("sh", "-c", "echo hi")
    with futures.ThreadPoolExecutor(2) as pool:
        for number in range(count(200, 10)):
            barrier = threading.Barrier(2)

            def create(name: str = f"c{number}", barrier: threading.Barrier = barrier) -> bool:
                barrier.wait(60)
                try:
                    client.create(name, made)
                except ConflictError:
                    return False
                return True

            both = [pool.submit(create), pool.submit(create)]
            assert sorted(each.result(timeout=30) for each in both) == [False, True]
            assert bundle_of(raw, f"c{number}").is_dir()
            if number % 5 == 0:
                assert run_task(client, f"c{number}").out == b"hi\n"
            client.delete(f"c{number}")
    assert not raw.container_ids()


# ------------------------------------------------------------------------------------------- what is no containerd

_CONNECT_SECONDS = 1.0


def refusal(address: str | Path, directory: Path, *errors: type[LibcontainerdError]) -> str:
    """Fail to make a client for an address: in time, with such an error, leaving nothing; gives the message."""
    with no_leaks():
        begun = time.monotonic()
        with pytest.raises(errors) as caught:
            Client(
                str(address), namespace="n", state_dir=directory / "bundles", default_timeout=_CONNECT_SECONDS
            )
        # What is above the timeout is the machine's slowness, not a wait.
        assert time.monotonic() - begun < _CONNECT_SECONDS + 8
    assert not (directory / "bundles").exists()
    assert str(address) in str(caught.value)
    return str(caught.value)


@contextmanager
def listening(path: Path, answer: bytes | None) -> Iterator[None]:
    """A unix socket that takes connections; answers with some bytes, or keeps silent."""
    ended = threading.Event()
    accepted: list[socket.socket] = []

    def serve() -> None:
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                accepted.append(connection)
                if answer is not None:
                    with contextlib.suppress(OSError):
                        connection.sendall(answer)
                    connection.close()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(0.05)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            for each in accepted:
                each.close()


def test_no_socket(directory: Path) -> None:
    assert "no such file" in refusal(directory / "nothing.sock", directory, UnavailableError)
    assert "no such file" in refusal(directory / "no/such/place.sock", directory, UnavailableError)


def test_a_socket_that_nobody_listens_at(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(directory / "dead.sock"))
        assert "nothing listens" in refusal(directory / "dead.sock", directory, UnavailableError)
    assert "nothing listens" in refusal(directory / "dead.sock", directory, UnavailableError)


def test_what_is_no_socket(directory: Path) -> None:
    (directory / "file.sock").write_text("no socket")
    (directory / "directory.sock").mkdir()
    for name in ("file.sock", "directory.sock"):
        assert "not a socket" in refusal(directory / name, directory, UnavailableError)


def test_a_socket_that_does_not_answer(directory: Path) -> None:
    with listening(directory / "silent.sock", None):
        refusal(directory / "silent.sock", directory, UnavailableError, DeadlineExceededError)


def test_a_socket_that_speaks_another_language(directory: Path) -> None:
    with listening(directory / "http.sock", b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"):
        refusal(directory / "http.sock", directory, UnavailableError, DeadlineExceededError)


def test_a_grpc_server_that_is_no_containerd(directory: Path) -> None:
    with futures.ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        server.add_insecure_port(f"unix:{directory / 'other.sock'}")
        server.start()
        try:
            said = refusal(directory / "other.sock", directory, NotImplementedByServerError)
        finally:
            server.stop(None).wait()
    assert "containerd" in said


AS_NOBODY = """\
import os, sys
from libcontainerd import Client, PermissionDeniedError
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    Client(sys.argv[1], namespace="n", state_dir=sys.argv[2])
except PermissionDeniedError as error:
    assert isinstance(error, PermissionError)
    print(error)
"""


def test_a_user_who_may_not_connect(remote: Remote, directory: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, remote.address, str(directory / "bundles")],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert remote.address in answer.stdout
    assert "root" in answer.stdout


@pytest.mark.parametrize(
    "address",
    [
        "",
        "relative/containerd.sock",
        "tcp://127.0.0.1:5000",
        "tcp://127.0.0.1",
        "http://127.0.0.1:5000",
        "/" + "long" * 30,
        "unix://relative",
    ],
)
def test_an_address_that_is_none(directory: Path, address: str) -> None:
    refusal(address, directory, InvalidParameterError)


def test_a_closed_client_says_so(client: Client, remote: Remote, namespace: str, spec: MakeSpec) -> None:
    client.create("c", spec("true"))
    other = remote.new_client(namespace)
    other.close()
    other.close()
    assert other.closed
    with pytest.raises(CallCancelledError):
        other.version()
    with pytest.raises(CallCancelledError):
        other.create("d", spec("true"))
    client.delete("c")
