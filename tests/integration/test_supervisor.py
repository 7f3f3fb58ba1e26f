"""The supervisor with a real containerd: it serves, dies with us and only with us, and its containers outlive it."""

from __future__ import annotations

import os
import select
import signal
import stat
import subprocess
import sys
import tempfile
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog

from libcontainerd import Client, EventType, Remote, Status
from libcontainerd import supervisor as supervisor_module
from libcontainerd.backends import RecordingBackend
from libcontainerd.errors import ConflictError, InvalidParameterError, SystemFailureError, UnavailableError
from libcontainerd.supervisor import Options, Supervisor, claim
from tests.integration.containers import Collected, MakeSpec, process, run_exec, wait_until

# Runs a supervisor until it is told to end by a line on stdin; says containerd's pid.
PROGRAM = """\
import sys
from libcontainerd.supervisor import Options, Supervisor
supervisor = Supervisor(sys.argv[1] + "/root", sys.argv[1] + "/state", Options(binary=sys.argv[2]))
supervisor.start()
print("pid", supervisor.pid, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="lc-") as path:
        yield Path(path)


Make = Callable[..., Supervisor]


@pytest.fixture
def make(containerd_binary: Path, directory: Path, no_leaks: None) -> Iterator[Make]:
    """Makes supervisors, stops them all, and sees that nothing is left of them."""
    made: list[Supervisor] = []

    def supervisor(**options: object) -> Supervisor:
        values = Options(**{"binary": str(containerd_binary), **options})  # type: ignore[arg-type]
        made.append(Supervisor(directory / "root", directory / "state", values))
        return made[-1]

    yield supervisor
    for each in made:
        each.stop()


def ctr(supervisor: Supervisor, *arguments: str) -> str:
    command = ["ctr", "--address", supervisor.address, *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def left_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {"daemon"}


def has_ended(pid: int, within: float) -> bool:
    """Whether a process that is no child of ours ends in time."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poller = select.poll()
        poller.register(process, select.POLLIN)
        return bool(poller.poll(within * 1000))
    finally:
        os.close(process)


def test_it_serves_within_seconds_and_stops_without_a_trace(
    make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/somebody/notify")
    supervisor = make(uid=1234, gid=5678, environment={"MARK": "1"})
    with structlog.testing.capture_logs() as events:
        begun = time.monotonic()
        supervisor.start()
        assert time.monotonic() - begun < 10

        pid = supervisor.pid
        assert pid is not None
        assert "Server:" in ctr(supervisor, "version")
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert b"MARK=1" in environment
        assert not any(variable.startswith(b"NOTIFY_SOCKET=") for variable in environment)
        owner = os.stat(supervisor.address)
        assert (owner.st_uid, owner.st_gid, stat.S_ISSOCK(owner.st_mode)) == (1234, 5678, True)
        assert os.getsid(pid) == pid

        begun = time.monotonic()
        supervisor.stop()
        assert time.monotonic() - begun < 10

    assert not Path(f"/proc/{pid}").exists()
    assert left_in(directory / "state") == {"containerd.lock"}
    lines = [event["line"] for event in events if event["event"] == "containerd_log"]
    assert any("containerd successfully booted" in line for line in lines)
    assert tuple(lines[-200:]) == supervisor.log_tail()
    # It ended by itself, in good order.
    assert (events[-1]["event"], events[-1]["exit_code"], events[-1]["log_level"]) == (
        "containerd_exited",
        0,
        "info",
    )


def test_the_configuration_is_private_and_is_the_one_in_force(make: Make, directory: Path) -> None:
    scheduler = "io.containerd.gc.v1.scheduler"
    debug = directory / "d/debug.sock"
    supervisor = make(
        plugins={scheduler: {"pause_threshold": 0.03, "schedule_delay": "1s"}},
        log_level="debug",
        debug_address=str(debug),
        snapshotter="native",
        metrics_address="127.0.0.1:0",
    )
    with supervisor:
        file = directory / "state/containerd.toml"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        document = tomllib.loads(file.read_text())
        assert document["plugins"] == {scheduler: {"pause_threshold": 0.03, "schedule_delay": "1s"}}
        assert document["root"] == str(directory / "root/daemon")
        assert (directory / "root/daemon/io.containerd.metadata.v1.bolt").is_dir()
        assert (directory / "state/daemon").is_dir()
        assert debug.is_socket()
        plugins = ctr(supervisor, "plugins", "ls")
        rows = {tuple(line.split()[:2]): line.split()[-1] for line in plugins.splitlines()[1:] if line}
        assert rows["io.containerd.snapshotter.v1", "native"] == "ok"
        assert ("io.containerd.grpc.v1", "cri") not in rows
        assert ("io.containerd.internal.v1", "opt") not in rows
        assert any("level=debug" in line for line in supervisor.log_tail())
    assert not debug.exists()


def test_a_path_with_odd_characters_works(containerd_binary: Path, directory: Path) -> None:
    odd = directory / "a b%41#?é'\""

    # Past ctr, which from 1.7 on takes a percent sign in its address for an escape.
    with (
        Supervisor(odd / "root", odd / "state", Options(binary=str(containerd_binary))) as supervisor,
        Client(supervisor.address, namespace="odd", state_dir=directory / "bundles") as client,
    ):
        assert client.version().version


def test_a_snapshotter_that_cannot_work_is_told_with_the_log(make: Make, directory: Path) -> None:
    with pytest.raises(
        SystemFailureError, match=r"(?s)exited with code 1 .*load required plugin io.containerd.snapshotter"
    ):
        make(snapshotter="devmapper").start()

    assert left_in(directory / "state") == {"containerd.lock"}


def test_a_second_one_is_refused_and_the_first_goes_on(
    make: Make, directory: Path, containerd_binary: Path
) -> None:
    first, second = make(), make()
    first.start()
    with pytest.raises(ConflictError, match="another supervisor"):
        second.start()
    # Another process as well.
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, directory, containerd_binary],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert "ConflictError" in answer.stderr
    second.stop()

    assert "Server:" in ctr(first, "version")


def test_the_address_of_another_containerd_is_refused(make: Make, directory: Path) -> None:
    first = make()
    first.start()
    other = Supervisor(
        directory / "root2",
        directory / "state2",
        Options(binary=first._options.binary, address=first.address),
    )

    with pytest.raises(ConflictError, match="somebody serves"):
        other.start()

    assert "Server:" in ctr(first, "version")


def test_an_address_that_is_too_long_is_refused_untouched(directory: Path) -> None:
    with pytest.raises(InvalidParameterError, match="107"):
        Supervisor(directory / "root", directory / ("x" * 100))

    assert list(directory.iterdir()) == []


def test_it_dies_with_its_parent_and_can_be_started_at_once_again(
    make: Make, directory: Path, containerd_binary: Path
) -> None:
    command = [sys.executable, "-c", PROGRAM, str(directory), str(containerd_binary)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        # structlog, which nobody has configured, prints there too.
        pid = next(int(line.split()[1]) for line in parent.stdout if line.startswith("pid "))
        parent.kill()
        parent.wait()

        supervisor = make()
        supervisor.start()

        assert has_ended(pid, 10)
        assert supervisor.pid != pid
        assert "Server:" in ctr(supervisor, "version")


def test_it_is_stopped_by_an_interpreter_that_ends(directory: Path, containerd_binary: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", PROGRAM, directory, containerd_binary],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )

    assert (answer.returncode, answer.stderr) == (0, "")
    assert left_in(directory / "state") == {"containerd.lock"}


def test_a_stale_pid_file_kills_nobody(make: Make, directory: Path) -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"]) as foreign:
        try:
            (directory / "state").mkdir()
            (directory / "state/containerd.pid").write_text(f"{foreign.pid}\n1\n")
            with make() as supervisor:
                recorded = (directory / "state/containerd.pid").read_text()
                assert recorded.startswith(f"{supervisor.pid}\n")
            assert foreign.poll() is None
        finally:
            foreign.kill()


def test_a_frozen_one_is_killed_after_the_grace(make: Make, directory: Path) -> None:
    supervisor = make(stop_timeout=0.3)
    supervisor.start()
    pid = supervisor.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)

    begun = time.monotonic()
    supervisor.stop()

    assert 0.3 <= time.monotonic() - begun < 10
    assert left_in(directory / "state") == {"containerd.lock"}


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_its_containers_outlive_it(make: Make, rootfs: Path, end: str) -> None:
    namespace = f"supervisor-{uuid.uuid4().hex[:8]}"
    supervisor = make()
    supervisor.start()
    ctr(supervisor, "-n", namespace, "run", "-d", "--rootfs", str(rootfs), "one", "/bin/sleep", "300")
    try:
        before = ctr(supervisor, "-n", namespace, "task", "ls")
        task = int(before.splitlines()[1].split()[1])
        if end == "kill":
            pid = supervisor.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        supervisor.stop()
        assert not has_ended(task, 0)

        supervisor.start()
        assert ctr(supervisor, "-n", namespace, "task", "ls") == before
    finally:
        if supervisor.pid is None:
            supervisor.start()
        ctr(supervisor, "-n", namespace, "task", "rm", "--force", "one")
        ctr(supervisor, "-n", namespace, "container", "rm", "one")
    assert has_ended(task, 10)


@pytest.fixture
def remote(
    request: pytest.FixtureRequest,
    containerd_binary: Path,
    directory: Path,
    no_leaks: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[Remote, list[structlog.typing.EventDict]]]:
    """A remote of a containerd that shall hang or die, and what is logged; its parameter is the health check's timeout."""
    monkeypatch.setattr(supervisor_module, "_STACKS_TIMEOUT", 60.0)  # however slow it is
    # A link, so that a test can put something else in its place.
    (directory / "containerd").symlink_to(containerd_binary)
    with (
        structlog.testing.capture_logs() as events,
        Remote.start(
            directory / "root",
            directory / "state",
            binary=str(directory / "containerd"),
            health_timeout=getattr(request, "param", 30.0),
            restart_attempts=2,
        ) as started,
    ):
        yield started, events


def kill(remote: Remote, number: signal.Signals) -> int:
    """Send containerd a signal, and give its pid."""
    assert remote._supervisor is not None
    pid = remote._supervisor.pid
    assert pid is not None
    os.kill(pid, number)
    return pid


@pytest.mark.parametrize(
    ("remote", "number"), [(30.0, signal.SIGKILL), (2.0, signal.SIGSTOP)], indirect=["remote"]
)
def test_clients_and_containers_go_on_when_it_died_or_hung(
    remote: tuple[Remote, list[structlog.typing.EventDict]], spec: MakeSpec, number: signal.Signals
) -> None:
    made, events = remote
    backend = RecordingBackend()
    client = made.new_client(f"supervisor-{uuid.uuid4().hex[:8]}", backend)
    out = Collected()
    client.create("c", spec("sh", "-c", "read line; echo $line; exit 7"))
    client.start("c", with_stdin=True, attach_stdio=out)
    client.exec("c", "e", process("sleep", "1000"))
    old = kill(made, number)
    wait_until(
        lambda: any(event["event"] == "containerd_restarted" for event in events), "it is restarted", 30
    )
    assert has_ended(old, 0)

    def answers() -> bool:
        try:
            return client.status("c") is Status.RUNNING
        except UnavailableError:  # the channel is still on its way
            return False

    wait_until(answers, "the client has followed", 30)
    assert {each.process_id for each in client.summary("c")} == {"init", "e"}
    client.signal_process("c", "e", signal.SIGKILL)
    assert client.wait("c", "e", timeout=30).code == 137
    backend.wait_for(EventType.EXIT, "c", "e", timeout=30)
    assert run_exec(client, "c", "after", "sh", "-c", "exit 5").status.code == 5
    other = made.new_client(client._namespace + "-too")
    other.close()
    out.stdin.write(b"still here\n")
    assert client.wait("c", timeout=30).code == 7
    assert client.delete_task("c").code == 7
    assert out.out == b"still here\n"
    client.delete("c")

    assert made.failure is None
    lines = [str(event.get("line")) for event in events]
    stacks = [line for line in lines if "goroutine stack dump" in line]
    assert bool(stacks) is (number is signal.SIGSTOP)
    Path(tempfile.gettempdir(), f"containerd.{old}.stacks.log").unlink(missing_ok=True)


def test_one_that_cannot_come_back_is_told_with_the_end_of_its_log(
    remote: tuple[Remote, list[structlog.typing.EventDict]], directory: Path
) -> None:
    made, _ = remote
    client = made.new_client("supervisor")
    (directory / "containerd").unlink()
    (directory / "containerd").write_text("#!/bin/sh\necho level=fatal msg=broken >&2\nexit 9\n")
    (directory / "containerd").chmod(0o755)
    kill(made, signal.SIGKILL)
    wait_until(lambda: made.failure, "it is given up", 30)

    message = str(made.failure)
    assert "given up after 2 attempts" in message
    assert "exited with code 9" in message
    assert message.endswith("level=fatal msg=broken")
    with pytest.raises(SystemFailureError, match="given up after 2 attempts"):
        made.new_client("supervisor")
    with pytest.raises(UnavailableError):
        client.version(timeout=5)


def test_a_process_that_has_the_pid_of_an_earlier_one_is_left_alone(make: Make, directory: Path) -> None:
    configuration = directory / "state/containerd.toml"
    command = [sys.executable, "-S", "-c", "import time; time.sleep(60)", "--config", str(configuration)]
    with subprocess.Popen(command) as foreign:
        try:
            (directory / "state").mkdir()
            claim.write_pid_file(str(directory / "state/containerd.pid"), foreign.pid)
            pid_file = directory / "state/containerd.pid"
            pid, started, _ = pid_file.read_text().split()
            # All is as it was told but the executable.
            pid_file.write_text(f"{pid}\n{started}\n1:1\n")
            with make() as supervisor:
                assert pid_file.read_text().startswith(f"{supervisor.pid}\n")
            assert foreign.poll() is None
        finally:
            foreign.kill()


def test_many_starts_leave_nothing(make: Make, directory: Path) -> None:
    supervisor = make()
    for _ in range(5):
        with supervisor:
            assert supervisor.pid is not None

    assert left_in(directory / "state") == {"containerd.lock"}
