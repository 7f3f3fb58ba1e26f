"""The supervisor with programs that stand in for containerd: those that die, never serve, hang, or will not stop."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import structlog

from libcontainerd.errors import (
    CallCancelledError,
    ConflictError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidParameterError,
    LibcontainerdError,
    PermissionDeniedError,
    SystemFailureError,
)
from libcontainerd.supervisor import Options, Supervisor, claim

# Answers health checks at the address in its configuration. STATUS is what it answers; SIGTERM may be ignored.
SERVING = """\
import os, signal, sys, threading, tomllib
if os.environ.get("IGNORE_SIGTERM"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
from concurrent.futures import ThreadPoolExecutor
import grpc
from grpc_health.v1 import health, health_pb2_grpc
with open(sys.argv[2], "rb") as file:
    address = tomllib.load(file)["grpc"]["address"]
server = grpc.server(ThreadPoolExecutor(2))
servicer = health.HealthServicer()
servicer.set("", int(os.environ.get("STATUS", "1")))
health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
server.add_insecure_port("unix:" + address)
server.start()
print("level=info msg=up", flush=True)
server.wait_for_termination()
"""

# Takes connections and says nothing, as a containerd that hangs.
DEAF = """\
import socket, sys, time, tomllib
with open(sys.argv[2], "rb") as file:
    address = tomllib.load(file)["grpc"]["address"]
server = socket.socket(socket.AF_UNIX)
server.bind(address)
server.listen()
print("listening", flush=True)
time.sleep(60)
"""

NEVER = "import time; print('still loading', flush=True); time.sleep(60)"
DIES = "import sys; print('level=error msg=\"no space\"', file=sys.stderr); sys.exit(3)"

Make = Callable[..., Supervisor]


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose sockets' paths are short enough, unlike those of pytest."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="lc-") as directory:
        yield Path(directory)


@pytest.fixture
def make(short_path: Path, no_leaks: None) -> Iterator[Make]:
    """Makes supervisors of a program in Python, stops them all, and sees that nothing is left of them."""
    made: list[Supervisor] = []

    def supervisor(program: str, **options: object) -> Supervisor:
        binary = short_path / "containerd"
        binary.write_text(f"#!{sys.executable}\n{program}")
        binary.chmod(0o755)
        values = {"binary": str(binary), "start_timeout": 20.0, "stop_timeout": 10.0, **options}
        made.append(Supervisor(short_path / "root", short_path / "state", Options(**values)))  # type: ignore[arg-type]
        return made[-1]

    yield supervisor
    for each in made:
        each.stop()


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def left_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {"daemon"}


def in_thread(function: Callable[[], object]) -> Callable[[], BaseException | None]:
    """Run a function in a thread; what is returned waits for its end and gives its error."""
    errors: list[BaseException | None] = []

    def run() -> None:
        try:
            function()
        except LibcontainerdError as error:
            errors.append(error)
        else:
            errors.append(None)

    thread = threading.Thread(target=run)
    thread.start()

    def result() -> BaseException | None:
        thread.join(20)
        assert errors, "it hangs"
        return errors[0]

    return result


def test_it_serves_between_start_and_stop(make: Make, short_path: Path) -> None:
    supervisor = make(SERVING)
    supervisor.stop()
    assert (supervisor.pid, supervisor.log_tail()) == (None, ())

    with structlog.testing.capture_logs() as events, supervisor as entered:
        assert entered is supervisor
        pid = supervisor.pid
        assert pid is not None
        assert supervisor.address == str(short_path / "state/containerd.sock")
        assert (short_path / "state/containerd.toml").stat().st_mode & 0o777 == 0o600
        assert (short_path / "state/containerd.pid").read_text().split("\n")[0] == str(pid)
        assert (short_path / "state").stat().st_mode & 0o777 == 0o711
        supervisor.wait_serving(10)
        eventually(lambda: supervisor.log_tail() == ("level=info msg=up",))

    assert supervisor.pid is None
    assert supervisor.log_tail() == ("level=info msg=up",)
    assert left_in(short_path / "state") == {"containerd.lock"}
    assert not Path(f"/proc/{pid}").exists()
    assert {"event": "containerd_log", "line": "level=info msg=up", "log_level": "info"} in events
    assert events[-1] == {
        "event": "containerd_exited",
        "log_level": "info",
        "pid": pid,
        "exit_code": -signal.SIGTERM,
    }


def test_it_can_be_started_again(make: Make) -> None:
    supervisor = make(SERVING)
    pids = set()
    for _ in range(2):
        with supervisor:
            pids.add(supervisor.pid)
        supervisor.stop()

    assert len(pids) == 2


def test_one_that_dies_gives_its_exit_code_and_its_log(make: Make, short_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(SystemFailureError) as caught:
        make(DIES).start()

    assert time.monotonic() - begun < 10, "it waited for the deadline"
    assert re.search(
        r"exited with code 3 before it served at .*containerd\.sock\nthe end of its log:\n  level=error msg=\"no space\"$",
        str(caught.value),
    )
    assert left_in(short_path / "state") == {"containerd.lock"}


def test_one_that_dies_silently_is_said_to(make: Make) -> None:
    with pytest.raises(SystemFailureError, match=r"was killed by SIGKILL .*; it logged nothing"):
        make("import os; os.kill(os.getpid(), 9)").start()


def test_one_that_never_serves_hits_the_deadline(make: Make, short_path: Path) -> None:
    supervisor = make(NEVER, start_timeout=0.5)

    with pytest.raises(
        DeadlineExceededError, match=r"after 0.5 s: nobody listens there\nthe end of its log:\n  still"
    ):
        supervisor.start()

    assert supervisor.pid is None
    assert left_in(short_path / "state") == {"containerd.lock"}


def test_one_that_hangs_hits_the_deadline(make: Make, short_path: Path) -> None:
    with pytest.raises(DeadlineExceededError, match=r"the health check got (DEADLINE_EXCEEDED|UNAVAILABLE)"):
        make(DEAF, start_timeout=2.0).start()

    assert left_in(short_path / "state") == {"containerd.lock"}


def test_one_that_says_it_does_not_serve_is_not_believed_to(make: Make) -> None:
    with pytest.raises(DeadlineExceededError, match="the health check got NOT_SERVING"):
        make(SERVING, environment={"STATUS": "2"}, start_timeout=3.0).start()


@pytest.mark.parametrize("program", [NEVER, DEAF])
def test_stop_during_the_start_cancels_it(make: Make, short_path: Path, program: str) -> None:
    supervisor = make(program)
    started = in_thread(supervisor.start)
    eventually(supervisor.log_tail)

    begun = time.monotonic()
    supervisor.stop()

    assert time.monotonic() - begun < 3
    assert left_in(short_path / "state") == {"containerd.lock"}
    assert isinstance(started(), CallCancelledError)


def test_stop_from_a_signal_handler_during_the_start_cancels_it(make: Make) -> None:
    supervisor = make(NEVER)
    before = signal.signal(signal.SIGUSR1, lambda *_: supervisor.stop())

    def interrupt() -> None:
        eventually(supervisor.log_tail)
        os.kill(os.getpid(), signal.SIGUSR1)

    helper = threading.Thread(target=interrupt)
    try:
        helper.start()
        with pytest.raises(CallCancelledError):
            supervisor.start()
    finally:
        helper.join()
        signal.signal(signal.SIGUSR1, before)

    assert supervisor.pid is None


def test_stop_from_the_consumer_of_its_log_does_not_hang(make: Make) -> None:
    supervisor = make(SERVING)
    stopped = threading.Event()

    def stop(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        if event.get("line") == "stop me":
            supervisor.stop()
            stopped.set()
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[stop])
    try:
        supervisor.start()
        log = supervisor._log
        assert log is not None
        log.line("stop me")
        assert stopped.wait(20)
        eventually(lambda: supervisor.pid is None)
    finally:
        structlog.configure(**before)


def test_many_may_stop_it_at_once(make: Make) -> None:
    supervisor = make(SERVING)
    supervisor.start()
    results = [in_thread(supervisor.stop) for _ in range(8)]

    assert [result() for result in results] == [None] * 8
    assert supervisor.pid is None


def test_one_that_ignores_sigterm_is_killed_after_the_grace(make: Make, short_path: Path) -> None:
    supervisor = make(SERVING, environment={"IGNORE_SIGTERM": "1"}, stop_timeout=0.3)
    supervisor.start()
    with structlog.testing.capture_logs() as events:
        begun = time.monotonic()
        supervisor.stop()

    assert 0.3 <= time.monotonic() - begun < 5
    assert [event["event"] for event in events][-2:] == ["containerd_killed", "containerd_exited"]
    assert events[-1]["exit_code"] == -signal.SIGKILL
    # It had no time to remove its socket.
    assert left_in(short_path / "state") == {"containerd.lock"}


def test_its_death_is_told_and_waiting_for_it_fails_at_once(make: Make) -> None:
    supervisor = make(SERVING)
    with structlog.testing.capture_logs() as events:
        supervisor.start()
        pid = supervisor.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: supervisor.pid is None)
        with pytest.raises(SystemFailureError, match="was killed by SIGKILL"):
            supervisor.wait_serving(20)
        with pytest.raises(ConflictError, match="running already"):
            supervisor.start()
        supervisor.stop()

    assert [event["log_level"] for event in events if event["event"] == "containerd_exited"] == ["error"]


def test_waiting_needs_a_start_and_ends_with_a_stop(make: Make) -> None:
    supervisor = make(NEVER)
    with pytest.raises(FailedPreconditionError, match="not started"):
        supervisor.wait_serving(1)
    with pytest.raises(InvalidParameterError):
        supervisor.wait_serving(0)

    started = in_thread(supervisor.start)
    eventually(supervisor.log_tail)
    waited = in_thread(supervisor.wait_serving)
    eventually(lambda: len(supervisor._waiters) == 2)
    supervisor.stop()

    assert isinstance(started(), CallCancelledError)
    assert isinstance(waited(), CallCancelledError)


def test_a_second_start_is_refused(make: Make, short_path: Path) -> None:
    first, second = make(SERVING), make(SERVING)
    first.start()
    pid = first.pid

    with pytest.raises(ConflictError, match="running already"):
        first.start()
    with pytest.raises(ConflictError, match=r"another supervisor uses .*state"):
        second.start()
    second.stop()
    elsewhere = Supervisor(short_path / "root", short_path / "other", first._options)
    with pytest.raises(ConflictError, match=r"another supervisor uses .*root"):
        elsewhere.start()

    assert first.pid == pid
    first.wait_serving(5)


def test_of_two_that_start_at_once_one_wins(make: Make) -> None:
    supervisors = [make(SERVING), make(SERVING)]
    barrier = threading.Barrier(2)

    def start(supervisor: Supervisor) -> None:
        barrier.wait(20)
        supervisor.start()

    errors = [result() for result in [in_thread(lambda each=each: start(each)) for each in supervisors]]  # type: ignore[misc]

    assert sorted(type(error).__name__ for error in errors) == ["ConflictError", "NoneType"]
    supervisors[errors.index(None)].wait_serving(5)


def test_a_missing_binary_is_refused_before_anything_is_made(short_path: Path, no_leaks: None) -> None:
    supervisor = Supervisor(
        short_path / "root", short_path / "state", Options(binary=str(short_path / "none"))
    )

    with pytest.raises(InvalidParameterError, match="is not there"):
        supervisor.start()

    assert list(short_path.iterdir()) == []


def test_without_an_interpreter_nothing_is_made(
    make: Make, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = make(SERVING)
    monkeypatch.setattr(sys, "executable", "")

    with pytest.raises(FailedPreconditionError, match=r"sys\.executable"):
        supervisor.start()

    assert [path.name for path in short_path.iterdir()] == ["containerd"]


def test_an_address_that_is_taken_is_refused_and_left_alone(make: Make, short_path: Path) -> None:
    theirs = short_path / "theirs.sock"
    with closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(str(theirs))
        server.listen()
        with pytest.raises(ConflictError, match="somebody serves at"):
            make(SERVING, address=str(theirs)).start()

    assert theirs.is_socket()
    assert left_in(short_path / "state") == {"containerd.lock"}


def test_a_state_dir_that_is_a_file_is_an_error_of_ours(make: Make, short_path: Path) -> None:
    (short_path / "state").write_text("")

    with pytest.raises(SystemFailureError, match=r"cannot prepare .*state"):
        make(SERVING).start()


def test_what_is_out_of_reach_says_so(make: Make, short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(claim, "write", refuse)
    with pytest.raises(PermissionDeniedError, match=r"cannot write in .*state.*run as root"):
        make(SERVING).start()

    assert left_in(short_path / "state") == {"containerd.lock"}


def test_no_more_threads_is_an_error_of_ours(
    make: Make, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = make(SERVING)

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(SystemFailureError, match="can't start new thread"):
            supervisor.start()

    assert left_in(short_path / "state") == {"containerd.lock"}


def test_a_stop_that_cannot_clean_up_says_so_and_lets_go_of_all_else(
    make: Make, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    supervisor = make(SERVING)
    with monkeypatch.context() as patch:
        patch.setattr(claim, "unlink_socket", refuse)
        supervisor.start()
        with pytest.raises(PermissionDeniedError, match=r"cannot clean up .*state"):
            supervisor.stop()

    assert supervisor.pid is None
    with supervisor:
        supervisor.wait_serving(5)


def test_a_stale_pid_file_is_replaced_and_its_process_left_alone(make: Make, short_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"]) as foreign:
        try:
            (short_path / "state").mkdir()
            (short_path / "state/containerd.pid").write_text(f"{foreign.pid}\n1\n")
            with make(SERVING) as supervisor:
                recorded = (short_path / "state/containerd.pid").read_text()
                assert recorded.startswith(f"{supervisor.pid}\n")
            assert foreign.poll() is None
        finally:
            foreign.kill()


def test_a_forked_process_neither_holds_nor_stops_it(make: Make, short_path: Path) -> None:
    # Its own program: this process has grpc's threads, with which one should not fork.
    make(SERVING)
    program = (
        "import os, sys\n"
        "from libcontainerd.supervisor import Options, Supervisor\n"
        "d = sys.argv[1]\n"
        "s = Supervisor(d + '/root', d + '/state', Options(binary=d + '/containerd'))\n"
        "s.start()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    assert s.pid is None and s._locks == []\n"
        "    held = [os.path.realpath(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') if n not in '012']\n"
        "    sys.exit(1 if any(name.endswith('containerd.lock') for name in held) else 7)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7\n"
        "s.wait_serving(10)\n"
        "s.stop()\n"
        "print('stopped by its parent')\n"
    )
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, short_path],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )

    assert answer.stdout.endswith("stopped by its parent\n"), answer.stderr
    assert left_in(short_path / "state") == {"containerd.lock"}


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)", "threading.Thread(target=s.start).start()"])
def test_an_interpreter_that_ends_stops_it(make: Make, short_path: Path, end: str) -> None:
    make(SERVING)
    program = (
        "import sys, threading\n"
        "from libcontainerd.supervisor import Options, Supervisor\n"
        "d = sys.argv[1]\n"
        "s = Supervisor(d + '/root', d + '/state', Options(binary=d + '/containerd'))\n"
        + ("" if "Thread" in end else "s.start()\n")
        + end
    )
    answer = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", program, short_path],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )

    assert (answer.returncode, answer.stderr) == (0, "")
    assert left_in(short_path / "state") == {"containerd.lock"}
