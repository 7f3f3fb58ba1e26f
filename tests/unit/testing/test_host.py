"""The host runtime: processes that really run, and what is left of them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from libcontainerd import Client, InvalidParameterError, Status, SystemFailureError
from libcontainerd._wire import typeurl
from libcontainerd._wire.pb.cgroups.v1_pb2 import Metrics
from libcontainerd._wire.pb.services import tasks_pb2
from libcontainerd.testing import FakeContainerd
from tests.integration.containers import Collected, alive, wait_until
from tests.leaks import no_leaks
from tests.unit.testing.specs import METADATA, process, spec

Connect = Callable[[FakeContainerd], Client]


@pytest.fixture
def client(host: FakeContainerd, connect: Connect) -> Client:
    return connect(host)


def test_a_process_has_its_pid_before_it_runs(host: FakeContainerd, client: Client, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    client.create("c", spec("sh", "-c", f"echo $$ > {mark}; sleep 1000"))
    with grpc.insecure_channel(
        f"unix:{host.address}", options=(("grpc.default_authority", "localhost"),)
    ) as channel:
        stub = tasks_pb2.TasksStub(channel)
        created = stub.Create(tasks_pb2.CreateTaskRequest(container_id="c"), metadata=METADATA, timeout=20)
        assert alive(created.pid)
        assert not mark.exists()
        started = stub.Start(tasks_pb2.StartRequest(container_id="c"), metadata=METADATA, timeout=20)

    assert started.pid == created.pid
    wait_until(lambda: mark.exists() and mark.read_text() == f"{created.pid}\n", "it runs")


def test_a_paused_process_is_stopped(client: Client) -> None:
    client.create("c", spec())
    pid = client.start("c")

    def state() -> str:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

    client.pause("c")
    wait_until(lambda: state() == "T", "it is stopped")
    client.resume("c")
    wait_until(lambda: state() != "T", "it goes on")


def test_children_are_listed_and_end_with_init(client: Client) -> None:
    collected = Collected()
    client.create("c", spec("sh", "-c", "sleep 1000 & sleep 1000 & echo ready; wait"))
    init = client.start("c", attach_stdio=collected)
    collected.wait_for(b"ready")
    wait_until(lambda: len(client.list_pids("c")) == 3, "its children are there")
    pids = client.list_pids("c")
    assert pids[0] == init

    client.signal_process("c", "init", signal.SIGKILL)
    client.wait("c")

    wait_until(lambda: not any(alive(pid) for pid in pids), "all are gone")


def test_environment_and_working_directory(client: Client, tmp_path: Path) -> None:
    document = process("sh", "-c", "pwd; echo $NAME; echo $HOME")
    document["env"] = ["PATH=/usr/bin:/bin", "NAME=a=b"]
    document["cwd"] = str(tmp_path)
    collected = Collected()
    client.create("c", {**spec(), "process": document})
    client.start("c", attach_stdio=collected)

    client.wait("c")
    client.delete_task("c")
    assert collected.out.decode().splitlines() == [str(tmp_path), "a=b", ""]


def test_a_program_of_the_containers_root(client: Client, tmp_path: Path) -> None:
    program = tmp_path / "root/opt/tool"
    program.parent.mkdir(parents=True)
    (tmp_path / "root/workplace").mkdir()
    program.write_text("#!/bin/sh\npwd\n")
    program.chmod(0o755)
    collected = Collected()
    client.create("c", spec("/opt/tool", root=str(tmp_path / "root"), cwd="/workplace"))
    client.start("c", attach_stdio=collected)

    assert client.wait("c").code == 0
    client.delete_task("c")
    assert collected.out.decode() == f"{tmp_path}/root/workplace\n"


@pytest.mark.parametrize(
    ("args", "changes", "error", "reason"),
    [
        (("no-such-program",), {}, InvalidParameterError, "executable file not found in \\$PATH"),
        (
            ("/no/such/program",),
            {},
            InvalidParameterError,
            "stat /no/such/program: no such file or directory",
        ),
        (("/etc",), {}, InvalidParameterError, 'exec: "/etc": permission denied'),
        (("true",), {"cwd": "/no/such/place"}, InvalidParameterError, "chdir to cwd"),
        (("true",), {"root": "/no/such/root"}, SystemFailureError, "invalid rootfs: stat /no/such/root"),
    ],
)
def test_what_cannot_be_run(
    client: Client,
    args: tuple[str, ...],
    changes: dict[str, str],
    error: type[Exception],
    reason: str,
) -> None:
    client.create("c", spec(*args, **changes))  # type: ignore[arg-type]  # the names are spec's own

    with pytest.raises((error, InvalidParameterError), match=reason):
        client.start("c")


def test_a_command_line_that_is_empty(client: Client) -> None:
    client.create("c", {**spec(), "process": {"cwd": "/", "args": []}})

    with pytest.raises(SystemFailureError, match="args must not be empty"):
        client.start("c")


def test_output_that_a_child_holds_is_given_up_after_two_seconds(client: Client, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tasks = client._connection.tasks
    client.create("c", spec())
    client.start("c")
    tasks.Exec(
        tasks_pb2.ExecProcessRequest(
            container_id="c",
            exec_id="e",
            stdout=f"file://{out}",
            stderr=f"file://{out}",
            spec=typeurl.pack_json(
                typeurl.PROCESS_URL, json.dumps(process("sh", "-c", "setsid sleep 1000 & echo done")).encode()
            ),
        ),
        metadata=METADATA,
        timeout=20,
    )
    tasks.Start(tasks_pb2.StartRequest(container_id="c", exec_id="e"), metadata=METADATA, timeout=20)
    tasks.Wait(tasks_pb2.WaitRequest(container_id="c", exec_id="e"), metadata=METADATA, timeout=20)
    begin = time.monotonic()

    tasks.DeleteProcess(
        tasks_pb2.DeleteProcessRequest(container_id="c", exec_id="e"), metadata=METADATA, timeout=10
    )

    assert 1.5 < time.monotonic() - begin < 15
    assert out.read_bytes() == b"done\n"
    init, child = client.list_pids("c")  # which lives on, as long as init
    client.signal_process("c", "init", signal.SIGKILL)
    client.wait("c")
    wait_until(lambda: not alive(init) and not alive(child), "both are gone")


def test_a_terminal_is_a_real_one(client: Client) -> None:
    collected = Collected()
    client.create("c", spec("sh", "-c", "tty; read x < /dev/tty; stty size; cat", terminal=True))
    client.start("c", with_stdin=True, attach_stdio=collected)
    collected.wait_for(b"/dev/pts/")
    client.resize_terminal("c", "init", 100, 30)
    collected.stdin.write(b"\n")
    collected.wait_for(b"30 100\r\n")
    collected.stdin.write(b"typed\n")
    collected.wait_for(b"typed\r\ntyped\r\n")
    client.signal_process("c", "init", signal.SIGKILL)

    assert client.wait("c").code == 137


def test_metrics_are_of_the_processes(host: FakeContainerd, client: Client) -> None:
    client.create("c", spec("sh", "-c", "while :; do :; done"))
    client.start("c")

    def usage() -> Metrics:
        answer = client._connection.tasks.Metrics(
            tasks_pb2.MetricsRequest(filters=["id==c"]), metadata=METADATA, timeout=5
        )
        return typeurl.unpack(answer.metrics[0].data, Metrics)

    wait_until(lambda: usage().cpu.usage.total > 0, "it has used the processor")
    assert usage().memory.rss > 0
    assert usage().pids.current == 1


def test_nothing_is_left_of_processes(connect: Connect) -> None:
    pids = []
    with no_leaks():
        with (
            FakeContainerd("host") as fake,
            Client(fake.address, namespace="n", state_dir=fake.state_dir) as client,
        ):
            for name, terminal in (("a", False), ("b", True)):
                client.create(name, spec("sh", "-c", "sleep 1000 & cat", terminal=terminal))
                pids.append(client.start(name, with_stdin=True, attach_stdio=Collected()))
                pids.append(client.exec(name, "e", process(), attach_stdio=Collected()))
            assert client.status("a") is Status.RUNNING
        assert not any(alive(pid) for pid in pids)
        assert not os.path.exists(fake._directory or "/no/such")


def test_it_says_that_nothing_is_isolated(client: Client) -> None:
    assert client.version().revision == "libcontainerd-fake-unisolated"


def test_a_signal_that_there_is_not(client: Client) -> None:
    client.create("c", spec())
    client.start("c")

    with pytest.raises(grpc.RpcError) as caught:
        client._connection.tasks.Kill(
            tasks_pb2.KillRequest(container_id="c", signal=99), metadata=METADATA, timeout=5
        )
    assert "invalid argument" in (caught.value.details() or "")
