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
from itertools import count
from pathlib import Path

import pytest
import structlog

import libcontainerd.supervisor as supervising
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
from libcontainerd.supervisor.child import Child, Health

# Answers health checks at the address in its configuration. STATUS is what it answers; SIGTERM may be ignored. SIGUSR1 makes
# it write what containerd writes.
SERVING = """\
import os, signal, sys, threading, tomllib
if os.environ.get("IGNORE_SIGTERM"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if not os.environ.get("IGNORE_SIGUSR1"):
    signal.signal(signal.SIGUSR1, lambda *_: print("=== END goroutine stack dump ===", flush=True))
else:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
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

# Serves once, and not again.
ONCE = (
    """\
import os, sys
if os.path.exists(sys.argv[0] + ".ran"):
    sys.exit("level=error msg=\\"no space left\\"")
open(sys.argv[0] + ".ran", "w").close()
"""
    + SERVING
)

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
    deadline = time.monotonic() + 30
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
    supervisor = make(NEVER, start_timeout=4.0)  # time enough for it to say a word

    with pytest.raises(
        DeadlineExceededError, match=r"after 4 s: nobody listens there\nthe end of its log:\n  still"
    ):
        supervisor.start()

    assert supervisor.pid is None
    assert left_in(short_path / "state") == {"containerd.lock"}


def test_one_that_hangs_hits_the_deadline(make: Make, short_path: Path) -> None:
    with pytest.raises(
        DeadlineExceededError, match=r"the health check (got (DEADLINE_EXCEEDED|UNAVAILABLE)|has no answer)"
    ):
        make(DEAF, start_timeout=6.0).start()

    assert left_in(short_path / "state") == {"containerd.lock"}


def test_one_that_says_it_does_not_serve_is_not_believed_to(make: Make) -> None:
    with pytest.raises(DeadlineExceededError, match="the health check got NOT_SERVING"):
        make(SERVING, environment={"STATUS": "2"}, start_timeout=10.0).start()


def test_a_question_that_the_deadline_cuts_short_is_not_what_is_told(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "_PROBE_TIMEOUT", 1000.0)
    supervisor = make(DEAF, start_timeout=5.0)
    probe, asked = supervisor._probe, count()

    def ask(health: Health, news: threading.Event, timeout: float, child: Child | None) -> str:
        return probe(health, news, timeout, child) if next(asked) else "it says that it is not ready"

    monkeypatch.setattr(supervisor, "_probe", ask)
    with pytest.raises(DeadlineExceededError, match="it says that it is not ready"):
        supervisor.start()


@pytest.mark.parametrize("program", [NEVER, DEAF])
def test_stop_during_the_start_cancels_it(make: Make, short_path: Path, program: str) -> None:
    supervisor = make(program)
    started = in_thread(supervisor.start)
    eventually(supervisor.log_tail)

    begun = time.monotonic()
    supervisor.stop()

    assert time.monotonic() - begun < 15, "it waited for the deadline"
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

    assert 0.3 <= time.monotonic() - begun < 20
    assert [event["event"] for event in events][-2:] == ["containerd_killed", "containerd_exited"]
    assert events[-1]["exit_code"] == -signal.SIGKILL
    # It had no time to remove its socket.
    assert left_in(short_path / "state") == {"containerd.lock"}


def kill(supervisor: Supervisor, number: signal.Signals = signal.SIGKILL) -> int:
    """Send containerd a signal, and give its pid."""
    pid = supervisor.pid
    assert pid is not None
    os.kill(pid, number)
    return pid


def await_restarts(events: list[structlog.typing.EventDict], count: int) -> None:
    eventually(lambda: names(events).count("containerd_restarted") >= count)


def checks_of(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keep what each health check finds."""
    found: list[str] = []
    probe = supervisor._probe

    def kept(health: Health, news: threading.Event, timeout: float, child: Child | None) -> str:
        found.append(probe(health, news, timeout, child))
        return found[-1]

    monkeypatch.setattr(supervisor, "_probe", kept)
    return found


def names(events: list[structlog.typing.EventDict]) -> list[str]:
    return [event["event"] for event in events if event["event"] != "containerd_log"]


def test_one_that_dies_is_started_again(
    make: Make, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "_LASTING", 1000.0)
    supervisor = make(SERVING)
    with structlog.testing.capture_logs() as events:
        supervisor.start()
        for number in range(2):
            kill(supervisor)
            await_restarts(events, number + 1)
            assert (short_path / "state/containerd.pid").read_text().startswith(f"{supervisor.pid}\n")
        with pytest.raises(ConflictError, match="running already"):
            supervisor.start()
        assert supervisor.failure is None
        supervisor.stop()

    one = ["containerd_exited", "containerd_restarting", "containerd_restarted"]
    assert names(events) == [*one, *one, "containerd_exited"]
    exits = [event["log_level"] for event in events if event["event"] == "containerd_exited"]
    assert exits == ["error", "error", "info"]
    assert [event["attempt"] for event in events if event["event"] == "containerd_restarting"] == [1, 2]
    assert left_in(short_path / "state") == {"containerd.lock"}


def test_an_end_is_told_before_what_follows_from_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = make(SERVING)
    note_exit, going_on = supervisor._note_exit, threading.Event()

    def late(child: Child) -> None:
        going_on.wait(1.0)  # in which it was restarted, if nobody waited for this
        note_exit(child)

    monkeypatch.setattr(supervisor, "_note_exit", late)
    with structlog.testing.capture_logs() as events:
        supervisor.start()
        kill(supervisor)
        await_restarts(events, 1)
        going_on.set()
        supervisor.stop()

    assert names(events)[:2] == ["containerd_exited", "containerd_restarting"]


def test_waiting_lasts_through_a_restart(make: Make) -> None:
    supervisor = make(SERVING)
    supervisor.start()
    kill(supervisor, signal.SIGSTOP)
    waited = in_thread(lambda: supervisor.wait_serving(20))
    eventually(lambda: len(supervisor._waiters) == 2)
    kill(supervisor)

    assert waited() is None


@pytest.mark.parametrize("deaf", ["", "1"])
def test_one_that_hangs_says_its_stacks_and_is_started_again(
    make: Make, monkeypatch: pytest.MonkeyPatch, deaf: str
) -> None:
    monkeypatch.setattr(supervising, "_STACKS_TIMEOUT", 0.2 if deaf else 30.0)
    supervisor = make(SERVING, health_timeout=1.0, environment={"IGNORE_SIGUSR1": deaf})
    with structlog.testing.capture_logs() as events:
        supervisor.start()
        hung = kill(supervisor, signal.SIGSTOP)
        await_restarts(events, 1)
        supervisor.stop()

    assert not Path(f"/proc/{hung}").exists()
    told = [event for event in events if event.get("pid") == hung]
    assert names(told) == ["containerd_hung", "containerd_exited"]
    assert told[1]["exit_code"] == -signal.SIGKILL
    assert re.search("got DEADLINE_EXCEEDED|has no answer", told[0]["trouble"])
    stacks = [event for event in events if "END goroutine" in str(event.get("line"))]
    assert bool(stacks) is not bool(deaf)


def test_checks_that_came_late_themselves_count_for_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "_LATENESS", -1000.0)
    supervisor = make(SERVING, health_timeout=0.1, stop_timeout=0.1)
    supervisor.start()
    troubles = checks_of(supervisor, monkeypatch)
    pid = kill(supervisor, signal.SIGSTOP)
    eventually(lambda: len(list(filter(None, troubles))) > 6)

    assert supervisor.pid == pid


def test_one_that_cannot_be_started_again_is_given_up_with_the_end_of_its_log(
    make: Make, short_path: Path
) -> None:
    supervisor = make(ONCE, restart_attempts=3)
    with structlog.testing.capture_logs() as events:
        supervisor.start()
        kill(supervisor)
        eventually(lambda: supervisor.failure)
        with pytest.raises(SystemFailureError, match="given up") as caught:
            supervisor.wait_serving(20)
        assert supervisor.pid is None
        supervisor.stop()

    assert str(caught.value) == str(supervisor.failure)
    assert re.search(
        r"(?s)after 3 attempts .* exited with code 1 before .*the end of its log:\n.*no space left",
        str(caught.value),
    )
    assert [event["attempt"] for event in events if event["event"] == "containerd_restarting"] == [1, 2, 3]
    assert names(events)[-1] == "containerd_given_up"
    assert left_in(short_path / "state") == {"containerd.lock"}

    Path(supervisor._options.binary + ".ran").unlink()
    supervisor.start()
    assert supervisor.failure is None


def test_one_that_never_lasts_is_given_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervising, "_LASTING", 1000.0)
    supervisor = make(SERVING, restart_attempts=1)
    with structlog.testing.capture_logs() as events:
        supervisor.start()
        kill(supervisor)
        await_restarts(events, 1)
        kill(supervisor)
        eventually(lambda: supervisor.failure)

    assert re.search(r"after 1 attempts .*: it was killed by SIGKILL", str(supervisor.failure))


def test_one_that_has_lasted_is_started_again_as_often_as_it_takes(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "_LASTING", 0.0)
    supervisor = make(SERVING, restart_attempts=1)
    with structlog.testing.capture_logs() as events:
        supervisor.start()
        for number in range(3):
            kill(supervisor)
            await_restarts(events, number + 1)

    assert supervisor.failure is None


def test_a_stop_between_two_attempts_is_not_held_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervising, "_BACKOFF_FIRST", 1000.0)
    monkeypatch.setattr(supervising, "_BACKOFF_MOST", 1000.0)
    supervisor = make(ONCE)
    supervisor.start()
    kill(supervisor)
    eventually(lambda: any("no space left" in line for line in supervisor.log_tail()))
    supervisor.stop()

    assert (supervisor.pid, supervisor.failure) == (None, None)


def test_a_watch_that_fails_is_a_failure_too(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = make(SERVING)
    supervisor.start()

    def fail(*_: object) -> str:
        raise ZeroDivisionError("how odd")

    monkeypatch.setattr(supervisor, "_probe", fail)
    eventually(lambda: supervisor.failure)

    assert "cannot watch over containerd: ZeroDivisionError" in str(supervisor.failure)


def test_it_outlives_the_thread_that_started_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = make(SERVING)
    assert in_thread(supervisor.start)() is None
    pid = supervisor.pid
    checks = checks_of(supervisor, monkeypatch)
    eventually(lambda: checks.count("") >= 2)

    assert supervisor.pid == pid


def test_stop_from_a_signal_handler_does_not_wait_for_what_it_interrupted(make: Make) -> None:
    supervisor = make(SERVING)
    supervisor.start()
    stopped: list[bool] = []

    def stop(*_: object) -> None:
        supervisor.stop()
        stopped.append(True)

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with supervisor._changed:  # as where the signal comes in the middle of one of its methods
            os.kill(os.getpid(), signal.SIGUSR1)
            eventually(lambda: stopped)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert supervisor.pid is None


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
    first.wait_serving(20)


def test_of_two_that_start_at_once_one_wins(make: Make) -> None:
    supervisors = [make(SERVING), make(SERVING)]
    barrier = threading.Barrier(2)

    def start(supervisor: Supervisor) -> None:
        barrier.wait(20)
        supervisor.start()

    errors = [result() for result in [in_thread(lambda each=each: start(each)) for each in supervisors]]  # type: ignore[misc]

    assert sorted(type(error).__name__ for error in errors) == ["ConflictError", "NoneType"]
    supervisors[errors.index(None)].wait_serving(20)


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
        supervisor.wait_serving(20)


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
