"""The examples, run as a user runs them: they do what they say, and leave nothing behind."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from libcontainerd import Client, Remote, oci
from libcontainerd._wire.pb.events.task_pb2 import TaskExit
from libcontainerd._wire.pb.types.task_pb2 import Status
from libcontainerd.testing import FakeContainerd
from tests.integration.containers import Raw, alive, wait_until

EXAMPLES = Path(__file__).parents[2] / "examples"
_RUNC_STATE = Path("/run/containerd/runc")


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run one of the examples to its end."""
    return subprocess.run(
        [sys.executable, "-W", "error", *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env={**os.environ, **variables},
    )


def processes_with(text: str) -> list[str]:
    """Return the command lines of live processes that have `text` in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(FileNotFoundError, ProcessLookupError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if text in line:
                found.append(line)
    return found


# ------------------------------------------------------------------------------------------------------------ demo


def test_the_demo_shows_a_life_and_leaves_nothing() -> None:
    began = time.monotonic()
    ran = run(EXAMPLES / "demo.py")
    took = time.monotonic() - began

    assert (ran.returncode, ran.stderr) == (0, "")
    steps = re.findall(r"^ +\d+\.\d\d s  (\w[\w ,]*?) +\d+ ms", ran.stdout, re.MULTILINE)
    assert [step.split()[0].rstrip(",") for step in steps] == [
        *("make", "start", "connect"),
        *("create", "start", "write", "exec", "exec", "pause", "resume", "kill", "delete", "wait"),
        *("look", "stop"),
    ]
    events = re.findall(r"event: demo (.+)$", ran.stdout, re.MULTILINE)
    assert events == [
        *("create", "start"),
        *("exec-added of greeting", "exec-started of greeting", "exit of greeting, code 7"),
        *("exec-added of shell", "exec-started of shell", "exit of shell, code 0"),
        *("paused", "resumed", "exit, code 137"),
    ]
    assert took < 30  # alone on two cores it is about one second
    directory = re.search(r", in (/\S+)$", ran.stdout, re.MULTILINE)
    namespace = re.search(r"namespace (\S+)$", ran.stdout, re.MULTILINE)
    assert directory is not None
    assert namespace is not None
    assert not Path(directory[1]).exists()
    assert not (_RUNC_STATE / namespace[1]).exists()
    wait_until(lambda: not processes_with(directory[1]), "containerd and its shim have ended")


def test_a_demo_that_is_interrupted_leaves_nothing() -> None:
    # A pipe that holds a single write, so that the demo is never more than one line ahead of who reads it.
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_DIRECT)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    with (
        open(reader, "rb", buffering=0) as lines,
        subprocess.Popen(
            [sys.executable, EXAMPLES / "demo.py"], stdout=writer, stderr=subprocess.DEVNULL
        ) as demo,
    ):
        os.close(writer)
        directory = ""
        while line := lines.read(4096).decode():
            directory = directory or "".join(re.findall(r", in (/\S+)$", line))
            if "write to its stdin" in line:
                demo.send_signal(signal.SIGINT)
                break
        while lines.read(4096):
            pass
        assert demo.wait(30) != 0

    assert directory
    assert not Path(directory).exists()
    wait_until(lambda: not processes_with(directory), "containerd and its shim have ended")


def test_a_demo_without_containerd_says_what_is_missing_and_runs_on_the_fake(tmp_path: Path) -> None:
    ran = run(EXAMPLES / "demo.py", PATH=str(tmp_path))

    assert (ran.returncode, ran.stderr) == (0, "")
    assert re.match(r"No real container \(no containerd, .*busybox.*\):\na FakeContainerd", ran.stdout)


# --------------------------------------------------------------------------------------------------------- minimal


@pytest.fixture
def minimal(remote: Remote, rootfs: Path, tmp_path: Path) -> Iterator[list[str | Path]]:
    """The command that runs the minimal example, but for the program."""
    yield [EXAMPLES / "minimal.py", remote.address, tmp_path / "state", rootfs]
    with suppress(OSError):  # what runc leaves of a namespace
        (_RUNC_STATE / "minimal").rmdir()


@pytest.fixture
def namespace() -> str:
    """The one that the example works in."""
    return "minimal"


def test_the_minimal_daemon_runs_a_program_and_cleans_up(
    minimal: list[str | Path], raw: Raw, tmp_path: Path
) -> None:
    ran = run(*minimal, "sh", "-c", "echo out; echo err >&2; exit 5")

    assert (ran.returncode, ran.stdout, ran.stderr) == (5, "out\n", "err\n")
    assert raw.container_ids() == set()
    assert raw.tasks_by_id() == {}
    assert list((tmp_path / "state").iterdir()) == []


def test_the_minimal_daemon_leaves_nothing_of_a_program_that_is_not_there(
    minimal: list[str | Path], raw: Raw, tmp_path: Path
) -> None:
    ran = run(*minimal, "no-such-program")

    assert ran.returncode == 1
    assert "InvalidParameterError" in ran.stderr.splitlines()[-1]
    assert raw.container_ids() == set()
    assert raw.tasks_by_id() == {}
    assert list((tmp_path / "state").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------- runner


class RunnerProcess:
    """The runner, with what it says."""

    def __init__(self, *command: str | Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", EXAMPLES / "runner.py", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[dict[str, object]] = []
        self.await_line(event="ready")

    def send(self, **command: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def await_line(self, **fields: object) -> dict[str, object]:
        """Read up to a line that has these fields; one that has been read already counts."""
        assert self._process.stdout is not None
        at = 0
        while True:
            while at < len(self.lines):
                if fields.items() <= self.lines[at].items():
                    return self.lines[at]
                at += 1
            line = self._process.stdout.readline()
            assert line, f"it ended, and never said {fields}, but {self.lines}"
            self.lines.append(json.loads(line))

    def output(self, job: str, step: str | None) -> str:
        key = {"event": "output", "job": job, "step": step}
        return "".join(str(line["text"]) for line in self.lines if key.items() <= line.items())

    def end(self, number: signal.Signals | None) -> tuple[int, str]:
        """End it by a signal or by the end of its input; gives its code and its log."""
        if number is not None:
            self._process.send_signal(number)
        rest, log = self._process.communicate(timeout=50)
        self.lines += [json.loads(line) for line in rest.splitlines()]
        return self._process.returncode, log


@pytest.fixture
def runner(remote: Remote, rootfs: Path, tmp_path: Path) -> Iterator[Callable[[], RunnerProcess]]:
    """Starts runners on one directory and namespace, one after the other."""
    made: list[RunnerProcess] = []
    name = f"runner-{uuid.uuid4().hex[:8]}"

    def start() -> RunnerProcess:
        made.append(RunnerProcess(remote.address, tmp_path / "state", name, rootfs))
        return made[-1]

    yield start
    for each in made:
        if each._process.poll() is None:
            each.end(signal.SIGKILL)
    with suppress(OSError):
        (_RUNC_STATE / name).rmdir()


def test_the_runner_runs_jobs_with_steps_and_ends_with_its_input(
    runner: Callable[[], RunnerProcess], tmp_path: Path
) -> None:
    one = runner()
    one.send(do="run", job="a", args=["sh", "-c", "echo up; exec sleep 1000"])
    pid = one.await_line(event="started", job="a", step=None)["pid"]
    one.await_line(event="output", job="a", step=None)
    one.send(do="exec", job="a", step="s", args=["sh", "-c", "echo out; echo err >&2; exit 3"])
    step = one.await_line(event="started", job="a", step="s")["pid"]
    ended = one.await_line(event="exit", job="a", step="s")
    assert (ended["code"], ended["pid"]) == (3, step)
    one.send(do="kill", job="a", signal=9)
    ended = one.await_line(event="exit", job="a", step=None)
    assert (ended["code"], ended["pid"]) == (137, pid)
    one.await_line(event="removed", job="a")
    one.send(do="run", job="a", args=["sh", "-c", "exit 4"])  # the name is free again
    code, log = one.end(None)

    assert (code, log) == (0, "")
    assert [line["code"] for line in one.lines if line["event"] == "exit"] == [3, 137, 4]
    assert one.lines[-1] == {"event": "removed", "job": "a"}
    assert one.output("a", None) == "up\n"
    assert sorted(one.output("a", "s").split()) == ["err", "out"]
    assert list((tmp_path / "state").iterdir()) == []


def test_the_runner_says_what_it_cannot_do(runner: Callable[[], RunnerProcess]) -> None:
    one = runner()
    one.send(do="run", job="a", args=["no-such-program"])
    assert "no-such-program" in str(one.await_line(event="failed")["error"])
    one.send(do="exec", job="b", step="s", args=["true"])
    assert "no job 'b'" in str(
        one.await_line(event="failed", command={"do": "exec", "job": "b", "step": "s", "args": ["true"]})[
            "error"
        ]
    )
    one.send(do="dance")
    assert one.await_line(event="failed", command={"do": "dance"})["error"] == "that is no command"
    assert one.end(None)[0] == 0


def test_the_runner_begins_a_start_anew_whose_place_another_task_takes(tmp_path: Path) -> None:
    # As that of an earlier runner's start does, which was cut off: it comes to light when it likes.
    refused = threading.Event()

    def refuse(_request: object) -> bool:
        refused.set()
        return True

    with FakeContainerd("host") as fake:
        one = RunnerProcess(fake.address, tmp_path / "state", "runner", "/")
        fake.fail("Tasks/Create", grpc.StatusCode.ALREADY_EXISTS, "task a: already exists", where=refuse)
        # So that it does not see that there is none in truth.
        fake.fail("Tasks/Get", where=lambda _: refused.is_set())
        one.send(do="run", job="a", args=["sh", "-c", "exit 4"])
        one.await_line(event="removed", job="a")
        assert one.end(None)[0] == 0
    assert [line["code"] for line in one.lines if line["event"] == "exit"] == [4]
    assert list((tmp_path / "state").iterdir()) == []


def test_the_runner_removes_a_task_that_comes_to_light_after_the_restore(tmp_path: Path) -> None:
    came = threading.Event()

    with FakeContainerd("host") as fake:
        with Client(fake.address, namespace="runner", state_dir=tmp_path / "state") as earlier:
            earlier.create(
                "a", oci.build(oci.default_spec(), oci.with_rootfs("/"), oci.with_args("sleep", "1000"))
            )

        def carry_out_the_start_of_an_earlier_runner(_request: object) -> bool:
            if not came.is_set():
                came.set()
                with grpc.insecure_channel(f"unix:{fake.address}") as channel:
                    Raw(channel, "runner").create_task("a")
            return False

        fake.fail("Tasks/Get", where=carry_out_the_start_of_an_earlier_runner)
        one = RunnerProcess(fake.address, tmp_path / "state", "runner", "/")
        one.await_line(event="restored", job="a")
        one.await_line(event="removed", job="a")
        assert one.end(None)[0] == 0
    assert came.is_set()
    assert list((tmp_path / "state").iterdir()) == []


def test_the_runner_removes_what_it_could_not_start_when_containerd_is_back(tmp_path: Path) -> None:
    with FakeContainerd("host") as fake:
        one = RunnerProcess(fake.address, tmp_path / "state", "runner", "/")
        fake.fail("Containers/Delete", grpc.StatusCode.UNAVAILABLE, "away")
        one.send(do="run", job="a", args=["no-such-program"])
        assert "no-such-program" in str(one.await_line(event="failed")["error"])
        assert one.end(None)[0] == 0
    assert list((tmp_path / "state").iterdir()) == []


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_runner_takes_back_the_jobs_of_an_earlier_one(
    runner: Callable[[], RunnerProcess], end: signal.Signals, tmp_path: Path
) -> None:
    first = runner()
    for job in ("lives", "ends"):
        first.send(do="run", job=job, args=["sh", "-c", "echo up; exec sleep 1000"])
        first.await_line(event="started", job=job)
    first.send(do="exec", job="lives", step="s", args=["sleep", "1000"])
    pids = {job: first.await_line(event="started", job=job, step=None)["pid"] for job in ("lives", "ends")}
    step = first.await_line(event="started", job="lives", step="s")["pid"]
    code, log = first.end(end)
    assert (code, log) == ((0, "") if end is signal.SIGTERM else (-signal.SIGKILL, ""))
    assert not [line for line in first.lines if line["event"] == "exit"]
    os.kill(int(str(pids["ends"])), signal.SIGKILL)
    wait_until(lambda: not alive(int(str(pids["ends"]))), "it has ended")

    second = runner()
    told = second.await_line(event="restored", job="lives")
    assert (told["alive"], told["pid"], told["steps"]) == (True, pids["lives"], {"s": step})
    assert second.await_line(event="exit", job="ends")["code"] == 137
    removed = second.await_line(event="removed", job="ends")
    ended = second.await_line(event="exit", job="ends")
    assert second.lines.index(ended) < second.lines.index(removed), "who is killed between has a successor"
    second.send(do="kill", job="lives", step="s", signal=9)
    assert second.await_line(event="exit", job="lives", step="s")["code"] == 137
    second.send(do="exec", job="lives", step="t", args=["sh", "-c", "exit 6"])
    assert second.await_line(event="exit", job="lives", step="t")["code"] == 6
    second.send(do="kill", job="lives", signal=9)
    assert second.await_line(event="exit", job="lives", step=None)["code"] == 137
    assert second.end(None) == (0, "")
    assert list((tmp_path / "state").iterdir()) == []


# --------------------------------------------------------------------------------------------- the runner's journal


@pytest.fixture
def fake() -> Iterator[FakeContainerd]:
    with FakeContainerd("host") as made:
        yield made


@pytest.fixture
def on_fake(fake: FakeContainerd, tmp_path: Path) -> Iterator[Callable[[], RunnerProcess]]:
    """Starts runners on a fake, one after the other."""
    made: list[RunnerProcess] = []

    def start() -> RunnerProcess:
        made.append(RunnerProcess(fake.address, tmp_path / "state", "runner", "/"))
        return made[-1]

    yield start
    for each in made:
        if each._process.poll() is None:
            each.end(signal.SIGKILL)


def exits(*lives: RunnerProcess) -> list[tuple[object, object, object]]:
    """Step, pid and code of all exits that were said, in order."""
    return [
        (line["step"], line["pid"], line["code"])
        for life in lives
        for line in life.lines
        if line["event"] == "exit"
    ]


def journal_of(tmp_path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (tmp_path / "state.journal").read_text().splitlines()]


def test_a_runner_does_not_tell_again_what_an_earlier_one_has_told(
    fake: FakeContainerd, on_fake: Callable[[], RunnerProcess], tmp_path: Path
) -> None:
    first = on_fake()
    first.send(do="run", job="a", args=["sleep", "1000"])
    first.await_line(event="started", job="a")
    fake.fail("Tasks/Delete", times=None)  # so that it is not removed
    first.send(do="kill", job="a", signal=9)
    first.await_line(event="exit", job="a")
    first.end(signal.SIGKILL)
    told = [line for line in first.lines if line["event"] != "ready"]
    assert journal_of(tmp_path) == told
    fake.clear_faults()

    second = on_fake()
    assert second.await_line(event="restored", job="a")["alive"] is False
    second.await_line(event="removed", job="a")
    assert second.end(None) == (0, "")
    assert exits(second) == []
    rest = [line for line in second.lines if line["event"] != "ready"]
    assert journal_of(tmp_path) == told + rest
    assert on_fake().end(None) == (0, "")
    assert journal_of(tmp_path) == [], "what is removed is left out"


def test_a_runner_tells_an_exit_that_it_finds_in_the_journal_alone_no_more(
    on_fake: Callable[[], RunnerProcess], tmp_path: Path
) -> None:
    # As one that was killed between the journal and stdout has left it.
    run = {"job": "a", "step": None, "pid": 77}
    lines = [{"event": "started", **run}, {"event": "exit", **run, "code": 3, "at": None}]
    (tmp_path / "state.journal").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event')
    one = on_fake()
    assert one.end(None) == (0, "")
    assert one.lines == [{"event": "removed", "job": "a"}, {"event": "ready"}]


@pytest.mark.parametrize("all_of_it", [False, True], ids=["task", "container"])
def test_what_containerd_does_not_know_any_more_is_told_with_255(
    fake: FakeContainerd, on_fake: Callable[[], RunnerProcess], all_of_it: bool
) -> None:
    first = on_fake()
    first.send(do="run", job="a", args=["sleep", "1000"])
    pid = first.await_line(event="started", job="a", step=None)["pid"]
    first.send(do="exec", job="a", step="s", args=["sleep", "1000"])
    step = first.await_line(event="started", job="a", step="s")["pid"]
    first.end(signal.SIGKILL)
    with grpc.insecure_channel(f"unix:{fake.address}") as channel:
        raw = Raw(channel, "runner")
        raw.kill("a", "s")
        raw.kill("a")
        wait_until(lambda: (task := raw.process("a")) and task.status == Status.STOPPED, "it has ended")
        raw.delete_task("a")
        if all_of_it:
            raw.delete_container("a")

    second = on_fake()
    second.await_line(event="removed", job="a")
    assert second.end(None)[0] == 0  # its log says that there is no task
    assert sorted(exits(second), key=str) == sorted([(None, pid, 255), ("s", step, 255)], key=str)
    assert [line["event"] for line in second.lines if line["event"] not in ("restored", "ready")] == [
        *("exit", "exit", "removed")
    ]
    assert all(line["at"] for line in second.lines if line["event"] == "exit")


def test_a_step_that_ended_while_there_was_no_runner_is_told_once(
    on_fake: Callable[[], RunnerProcess], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    first = on_fake()
    first.send(do="run", job="a", args=["sleep", "1000"])
    pid = first.await_line(event="started", job="a", step=None)["pid"]
    first.send(
        do="exec",
        job="a",
        step="s",
        args=["sh", "-c", f"until test -e {go}; do sleep 0.02; done; exit 5"],
    )
    step = first.await_line(event="started", job="a", step="s")["pid"]
    first.end(signal.SIGKILL)
    go.touch()
    wait_until(lambda: not alive(int(str(step))), "it has ended")

    second = on_fake()
    second.await_line(event="exit", job="a", step="s")
    second.send(do="kill", job="a", signal=9)
    second.await_line(event="removed", job="a")
    assert second.end(None) == (0, "")
    assert exits(second) == [("s", step, 5), (None, pid, 137)]


def test_the_end_of_a_start_that_was_begun_anew_is_not_told(
    fake: FakeContainerd, on_fake: Callable[[], RunnerProcess]
) -> None:
    one = on_fake()
    fake.fail("Tasks/Start", after=True)
    one.send(do="run", job="a", args=["sh", "-c", "echo up; exit 4"])
    one.await_line(event="removed", job="a")
    assert one.end(None) == (0, "")
    events = [line["event"] for line in one.lines]
    assert [each for each in events if each != "output"] == ["ready", "started", "exit", "removed"]
    begun = one.await_line(event="started")
    assert begun["attempt"] == 2
    assert exits(one) == [(None, begun["pid"], 4)]
    assert (
        "".join(str(line["text"]) for line in one.lines if line.get("attempt") == 2 and "text" in line)
        == "up\n"
    )


def test_the_end_of_a_start_that_never_came_to_run_is_not_told(
    fake: FakeContainerd, on_fake: Callable[[], RunnerProcess], tmp_path: Path
) -> None:
    # containerd clears away a shim in which nothing was made yet, and tells of an exit without a pid.
    with Client(fake.address, namespace="runner", state_dir=tmp_path / "state") as earlier:
        earlier.create("a", oci.build(oci.default_spec(), oci.with_args("true")))
    removal = fake.hang("Containers/Delete")
    one = on_fake()
    removal.wait_hit(timeout=30)
    fake.publish("runner", "/tasks/exit", TaskExit(container_id="a", id="a", exit_status=255))
    one.send(do="run", job="b", args=["sh", "-c", "exit 4"])
    one.await_line(event="removed", job="b")
    removal.release()
    one.await_line(event="removed", job="a")
    assert one.end(None)[0] == 0
    assert [line["job"] for line in one.lines if line["event"] == "exit"] == ["b"]


def test_the_end_of_a_step_that_failed_is_not_told(
    fake: FakeContainerd, on_fake: Callable[[], RunnerProcess]
) -> None:
    one = on_fake()
    one.send(do="run", job="a", args=["sleep", "1000"])
    pid = one.await_line(event="started", job="a")["pid"]
    fake.fail("Tasks/Start", after=True)
    one.send(do="exec", job="a", step="s", args=["sh", "-c", "exit 4"])
    one.await_line(event="failed")
    one.send(do="kill", job="a", signal=9)
    one.await_line(event="removed", job="a")
    assert one.end(None) == (0, "")
    assert exits(one) == [(None, pid, 137)]
