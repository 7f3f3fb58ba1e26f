"""Restoring on a real containerd: the program that started the containers is killed, and the next one takes over."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import grpc
import pytest

from libcontainerd import Client, EventType, NotFoundError, Remote, Restored, Status, cio, oci
from libcontainerd._wire import typeurl
from libcontainerd._wire.pb.services import tasks_pb2
from libcontainerd._wire.pb.types import task_pb2
from libcontainerd.backends import RecordingBackend
from tests.integration.containers import (
    Collected,
    MakeSpec,
    Raw,
    alive,
    bundle_of,
    exit_of,
    kill_shims,
    process,
    shims_of,
    stop,
    wait_exec_gone,
    wait_until,
)
from tests.leaks import no_leaks

LINES = 30_000
WRITE = f"i=0; while [ $i -lt {LINES} ]; do echo line $i; i=$((i+1)); done; echo end >&2; exec sleep 1000"
SLEEP = ("sleep", "1000")

# A program as users write them, but that it reads nothing of what it is given. It says when all runs, and waits.
PROGRAM = """
import json, sys
from libcontainerd import Client

address, namespace, state_dir, plan = sys.argv[1:]
client = Client(address, namespace=namespace, state_dir=state_dir)
kept = []

def attach(dio):
    kept.append(dio)
    return dio

for container_id, what in json.loads(plan).items():
    client.create(container_id, what["spec"])
    client.start(container_id, with_stdin=True, attach_stdio=attach)
    for exec_id, process in what["execs"].items():
        client.exec(container_id, exec_id, process, with_stdin=True, attach_stdio=attach)
print("ready", flush=True)
sys.stdin.read()
"""

Plan = Mapping[str, tuple[oci.Spec, Mapping[str, oci.Process]]]
Leave = Callable[[Plan], None]


def state_dir(remote: Remote, namespace: str) -> Path:
    """Where a remote's clients of a namespace have their bundles."""
    with remote.new_client(namespace) as client:
        return Path(client._state_dir)


def run_and_kill(remote: Remote, namespace: str, plan: Plan) -> None:
    """Have a program of its own start containers and execs, and kill it."""
    told = {
        container_id: {
            "spec": json.loads(oci.dump(spec)),
            "execs": {exec_id: json.loads(oci.dump(each)) for exec_id, each in execs.items()},
        }
        for container_id, (spec, execs) in plan.items()
    }
    arguments = [remote.address, namespace, str(state_dir(remote, namespace)), json.dumps(told)]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        try:
            said = program.stdout.readline()
        finally:
            program.kill()
        assert said == b"ready\n", program.stderr.read().decode()


@pytest.fixture
def leave(remote: Remote, namespace: str) -> Leave:
    """Leaves containers and execs behind, as a program that is killed does."""
    return lambda plan: run_and_kill(remote, namespace, plan)


def exits(backend: RecordingBackend, container_id: str) -> list[tuple[str, int]]:
    """The exits that were told."""
    return [
        (event.info.process_id, event.info.exit_code)
        for event in backend.events(container_id)
        if event.event is EventType.EXIT
    ]


def test_a_killed_programs_containers_go_on_and_nothing_is_missing(
    client: Client, leave: Leave, raw: Raw, spec: MakeSpec, backend: RecordingBackend
) -> None:
    leave(
        {
            "writes": (spec("sh", "-c", WRITE), {"e": process("sh", "-c", WRITE)}),
            "reads": (spec("cat"), {"e": process("cat"), "ended": process("sh", "-c", "read x; exit 7")}),
        }
    )
    wait = tasks_pb2.WaitRequest(container_id="reads", exec_id="ended")
    (bundle_of(raw, "reads") / "ended-stdin").write_bytes(b"\n")
    assert raw.tasks.Wait(wait, metadata=raw.metadata, timeout=20).exit_status == 7
    stdio: dict[tuple[str, str], Collected] = {}

    def attach(dio: cio.DirectIO) -> cio.IO:
        kept = stdio[dio.container_id, dio.process_id] = Collected()
        return kept(dio)

    with no_leaks():
        restored = client.restore_all(attach, attach_exec_stdio=lambda _, dio: attach(dio))

        assert {key: each.alive for key, each in restored.items() if isinstance(each, Restored)} == {
            "writes": True,
            "reads": True,
        }
        assert exit_of(backend, "reads", "ended") == 7
        wait_exec_gone(client, "reads", "ended")
        for exec_id in ("e", "init"):
            of = stdio["reads", exec_id]
            of.stdin.write(b"after\n")
            of.wait_for(b"after\n")
            of.stdin.close()
            assert client.wait("reads", exec_id).code == 0
            of.wait()
            assert of.out == b"after\n"
        expected = b"".join(b"line %d\n" % number for number in range(LINES))
        for exec_id in ("init", "e"):
            of = stdio["writes", exec_id]
            of.wait_for(b"line %d\n" % (LINES - 1), timeout=30)
            wait_until(lambda of=of: of.err, "the other stream has come too", timeout=30)  # type: ignore[misc] # mypy cannot infer it
            assert of.err == b"end\n"
            assert of.out == expected
        stop(client, "writes")
        stop(client, "reads")
    assert sorted(exits(backend, "reads")) == [("e", 0), ("ended", 7), ("reads", 0)]
    assert sorted(exits(backend, "writes")) == [("e", 137), ("writes", 137)]


def test_a_start_that_was_under_way_is_let_go_on(
    client: Client, leave: Leave, raw: Raw, spec: MakeSpec, backend: RecordingBackend
) -> None:
    leave({"c": (spec(*SLEEP), {})})
    bundle = bundle_of(raw, "c")
    out, err = str(bundle / "e-stdout"), str(bundle / "e-stderr")
    for path in (out, err):
        os.mkfifo(path, 0o700)
    mark = f": {raw.metadata[0][1]}"
    document = oci.dump(process("sh", "-c", f"echo hi; sleep 1000; {mark}"))
    request = tasks_pb2.ExecProcessRequest(
        container_id="c",
        exec_id="e",
        stdout=out,
        stderr=err,
        spec=typeurl.pack_json(typeurl.PROCESS_URL, document),
    )
    raw.tasks.Exec(request, metadata=raw.metadata, timeout=20)
    collected = Collected()
    with ThreadPoolExecutor(1) as executor:
        # It waits for readers, and its shim for it: that is how the death of a client leaves it.
        starting = executor.submit(
            raw.tasks.Start,
            tasks_pb2.StartRequest(container_id="c", exec_id="e"),
            metadata=raw.metadata,
            timeout=60,
        )
        wait_until(lambda: runs_somewhere(mark), "the exec's process is there")
        assert not starting.done()

        restored = client.restore("c", attach_exec_stdio=lambda _, dio: collected(dio))

        assert restored.execs == {"e": starting.result().pid}
    collected.wait_for(b"hi\n")
    client.signal_process("c", "e", signal.SIGKILL)
    assert exit_of(backend, "c", "e") == 137
    wait_exec_gone(client, "c", "e")
    stop(client, "c")


def runs_somewhere(mark: str) -> bool:
    """Whether there is a process with that in its command line; its shim could not be asked."""
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if mark.encode() in each.read_bytes() and alive(int(each.parent.name)):
                return True
    return False


def test_a_terminal(client: Client, leave: Leave, spec: MakeSpec) -> None:
    shell = spec("sh", "-c", "stty -echo; while read x; do stty size; done", options=[oci.with_terminal()])
    leave({"c": (shell, {})})
    collected = Collected()
    client.restore("c", collected)

    client.resize_terminal("c", "init", 71, 13)
    collected.stdin.write(b"\n")

    collected.wait_for(b"13 71")
    stop(client, "c")


def test_a_user_namespaces_container(
    client: Client, leave: Leave, raw: Raw, spec: MakeSpec, backend: RecordingBackend
) -> None:
    mapping = oci.LinuxIDMapping(container_id=0, host_id=100_000, size=65_536)
    mapped = spec("cat", options=[oci.with_user_namespace([mapping])])
    leave({"c": (mapped, {"e": process("cat")})})
    bundle = bundle_of(raw, "c")
    collected, of_exec = Collected(), Collected()

    assert client.restore("c", collected, attach_exec_stdio=lambda _, dio: of_exec(dio)).alive

    for each in (collected, of_exec):
        each.stdin.write(b"after\n")
        each.wait_for(b"after\n")
    of_exec.stdin.close()
    assert exit_of(backend, "c", "e") == 0
    collected.stdin.close()
    assert client.wait("c").code == 0
    client.delete_task("c")
    client.start("c", with_stdin=True, attach_stdio=Collected(b""))
    assert client.wait("c").code == 0
    assert client.delete_task("c").code == 0
    client.delete("c")
    assert not bundle.exists()


def test_a_task_whose_shim_was_killed(
    client: Client, remote: Remote, leave: Leave, raw: Raw, spec: MakeSpec
) -> None:
    leave({"c": (spec("cat"), {"e": process("cat")})})
    pid = raw.tasks_by_id()["c"].pid
    namespace = raw.metadata[0][1]
    (shim,) = (each for each, words in shims_of(remote.address).items() if f" {namespace} " in words)
    os.kill(shim, signal.SIGKILL)
    wait_until(lambda: not raw.tasks_by_id() and not alive(pid), "the task is gone", timeout=30)

    assert client.restore("c", lambda dio: dio) == Restored(False, 0, {})

    assert list(bundle_of(raw, "c").iterdir()) == []
    assert isinstance(client.delete_task("c").error, NotFoundError)
    client.start("c", with_stdin=True, attach_stdio=Collected(b""))
    assert client.wait("c", timeout=30).code == 0
    client.delete_task("c")
    client.delete("c")


@pytest.mark.parametrize("of_all", [False, True], ids=["one", "all"])
def test_a_shim_that_answers_late(
    client: Client, remote: Remote, namespace: str, spec: MakeSpec, *, of_all: bool
) -> None:
    """Of a task whose shim is silent for two seconds, containerd 1.6 tells neither pid nor FIFOs."""
    with remote.new_client(namespace) as earlier:
        earlier.create("c", spec("cat"))
        pid = earlier.start("c", with_stdin=True, attach_stdio=Collected())
    (shim,) = (each for each, words in shims_of(remote.address).items() if f" {namespace} " in words)
    collected = Collected()
    os.kill(shim, signal.SIGSTOP)
    going_on = threading.Timer(3.5, os.kill, (shim, signal.SIGCONT))
    going_on.start()
    try:
        restored = client.restore_all(collected)["c"] if of_all else client.restore("c", collected)
    finally:
        going_on.join()
    assert restored == Restored(True, pid, {})
    collected.stdin.write(b"after\n")
    collected.wait_for(b"after\n")
    stop(client, "c")


# ----------------------------------------------------------------------------------------- containerd restarted as well


@pytest.fixture
def start_containerd(containerd_binary: Path) -> Iterator[Callable[[], Remote]]:
    """Starts containerd in one directory, as often as a test likes; sees that no shim of it is left."""
    directory = Path(tempfile.mkdtemp(prefix="lcd-"))
    directory.chmod(0o755)
    address = str(directory / "state/containerd.sock")
    try:
        with ExitStack() as stack:

            def start() -> Remote:
                return stack.enter_context(
                    Remote.start(directory / "root", directory / "state", binary=str(containerd_binary))
                )

            yield start
        try:
            wait_until(lambda: not shims_of(address), "all shims have ended")
        finally:
            kill_shims(address)
    finally:
        shutil.rmtree(directory)


def is_over(raw: Raw, container_id: str, exec_id: str) -> bool:
    """Whether a process has ended as containerd sees it, which may have forgotten it by now."""
    found = raw.process(container_id, exec_id)
    return found is None or found.status == task_pb2.Status.STOPPED


@contextmanager
def raw_of(remote: Remote, namespace: str) -> Iterator[Raw]:
    """A look past the library; leaves nothing in the namespace."""
    options = (("grpc.default_authority", "localhost"),)
    with grpc.insecure_channel(f"unix:{remote.address}", options=options) as channel:
        raw = Raw(channel, namespace)
        try:
            yield raw
        finally:
            raw.remove_everything()


def test_containerd_was_down_as_well(
    start_containerd: Callable[[], Remote], namespace: str, spec: MakeSpec, backend: RecordingBackend
) -> None:
    first = start_containerd()
    wait_for_input = ("sh", "-c", "read x; exit 7")
    plan = {
        "goes-on": (spec("cat"), {"e": process("cat"), "ends": process(*wait_for_input)}),
        "ends": (spec(*wait_for_input), {}),
    }
    run_and_kill(first, namespace, plan)
    with raw_of(first, namespace) as raw:
        bundles = {name: bundle_of(raw, name) for name in plan}
        pids = {name: task.pid for name, task in raw.tasks_by_id().items()}
        ends = tasks_pb2.GetRequest(container_id="goes-on", exec_id="ends")
        exec_pid = raw.tasks.Get(ends, metadata=raw.metadata, timeout=20).process.pid
        first.cleanup()
        for container_id, stream in (("goes-on", "ends-stdin"), ("ends", "init-stdin")):
            (bundles[container_id] / stream).write_bytes(b"\n")
        wait_until(lambda: not alive(pids["ends"]) and not alive(exec_pid), "they have ended")
        second = start_containerd()
        with raw_of(second, namespace) as now, second.new_client(namespace, backend) as client:
            # Their shims may learn of it late.
            for process_ in (("ends", ""), ("goes-on", "ends")):
                wait_until(lambda it=process_: is_over(now, *it), "containerd knows")  # type: ignore[misc] # mypy cannot infer it
            collected = Collected()

            ended = client.restore("ends")
            restored = client.restore("goes-on", collected)

            assert restored.alive
            assert restored.execs.keys() == {"e"}
            assert exit_of(backend, "goes-on", "ends") == 7
            assert not ended.alive
            status = client.delete_task("ends")
            if ended.pid:  # from 1.7 on containerd forgets a task that ended while it was down, and its code
                assert (status.code, status.error) == (7, None)
            assert client.status("goes-on") is Status.RUNNING
            collected.stdin.write(b"after\n")
            collected.wait_for(b"after\n")
            stop(client, "goes-on")
            client.delete("ends")
            # The shims tell the exits once more, up to 15 s later; a later run must not be taken for one.
            client.create("ends", spec("sh", "-c", "exit 3"))
            client.start("ends")
            assert exit_of(backend, "ends") == 3
            stop(client, "ends")
        told = sorted(exits(backend, "goes-on"))
        assert told == [("e", 137), ("ends", 7), ("goes-on", 137)]
        assert exits(backend, "ends") == [("ends", 3)]
