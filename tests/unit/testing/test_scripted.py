"""The scripted runtime: a process is what the test says."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from libcontainerd import (
    Client,
    DeadlineExceededError,
    InvalidParameterError,
    Status,
    SystemFailureError,
)
from libcontainerd.testing import (
    FakeContainerd,
    ProcessEndedError,
    ScriptedProcess,
    echoes,
    fails_to_start,
    prints,
)
from tests.integration.containers import Collected
from tests.unit.testing.specs import process, spec

Connect = Callable[[FakeContainerd], Client]


def test_without_a_program_the_test_plays_it(fake: FakeContainerd, client: Client) -> None:
    collected = Collected()
    client.create("c", spec("server", "--port", "80"))
    pid = client.start("c", with_stdin=True, attach_stdio=collected)
    played = fake.process("c")

    played.write(b"ready\n")
    collected.wait_for(b"ready\n")
    played.write(b"oh\n", "stderr")
    collected.stdin.write(b"input")
    assert played.read() == b"input"
    assert played.spec.args == ["server", "--port", "80"]
    assert (played.pid, played.ended) == (pid, False)
    assert "'init' of container 'c'" in repr(played)
    played.exit(9)

    assert client.wait("c").code == 9
    client.delete_task("c")
    assert (collected.out, collected.err) == (b"ready\n", b"oh\n")
    assert played.ended
    for call in (lambda: played.write(b"x"), played.read, played.wait_signal, played.wait_killed):
        with pytest.raises(ProcessEndedError):
            call()
    played.exit(1)
    played.signal(signal.SIGTERM)
    assert client.wait("c").code == 9


def test_the_last_rule_that_fits_counts(fake: FakeContainerd, client: Client) -> None:
    fake.script(prints(exit_code=1))
    fake.script(prints(exit_code=2), container_id="b")
    fake.script(prints(exit_code=3), args=("tool", "-x"))
    fake.script(prints(exit_code=4), exec_id="e")
    fake.script(lambda process: process.wait_killed(), container_id="d", exec_id="")

    for name, args, code in (("a", ("x",), 1), ("b", ("x",), 2), ("c", ("tool", "-x", "y"), 3)):
        client.create(name, spec(*args))
        client.start(name)
        assert client.wait(name).code == code
    client.create("d", spec())
    client.start("d")
    client.exec("d", "e", process())
    assert client.wait("d", "e").code == 4
    assert client.status("d") is Status.RUNNING


def test_an_uncaught_exception_is_told_on_stderr(fake: FakeContainerd, client: Client) -> None:
    def breaks(_: ScriptedProcess) -> int:
        raise RuntimeError("out of paper")

    fake.script(breaks)
    collected = Collected()
    client.create("c", spec())
    client.start("c", attach_stdio=collected)

    assert client.wait("c").code == 1
    client.delete_task("c")
    assert b"RuntimeError: out of paper" in collected.err


def test_exit_ends_a_program(fake: FakeContainerd, client: Client) -> None:
    after = threading.Event()

    def program(process: ScriptedProcess) -> None:
        process.write(b"before")
        process.exit(5)
        after.set()

    fake.script(program)
    collected = Collected()
    client.create("c", spec())
    client.start("c", attach_stdio=collected)

    assert client.wait("c").code == 5
    assert not after.is_set()
    with pytest.raises(InvalidParameterError, match="0 to 255"):
        fake.process("c").exit(256)


def test_signals(fake: FakeContainerd, client: Client) -> None:
    client.create("c", spec())
    client.start("c")
    played = fake.process("c")
    played.handled.add(signal.SIGHUP)

    for number in (signal.SIGHUP, signal.SIGWINCH, signal.SIGCHLD):
        client.signal_process("c", "init", number)
    assert played.wait_signal(5) == signal.SIGHUP
    with pytest.raises(DeadlineExceededError, match="no signal"):
        played.wait_signal(0.01)
    client.signal_process("c", "init", signal.SIGTERM)

    assert client.wait("c").code == 143
    assert played.signals == [signal.SIGHUP, signal.SIGWINCH, signal.SIGCHLD, signal.SIGTERM]


def test_sigkill_cannot_be_handled(fake: FakeContainerd, client: Client) -> None:
    client.create("c", spec())
    client.start("c")
    fake.process("c").handled.add(signal.SIGKILL)

    client.signal_process("c", "init", signal.SIGKILL)

    assert client.wait("c").code == 137


def test_what_is_frozen_does_nothing(fake: FakeContainerd, client: Client) -> None:
    go = threading.Event()

    def program(process: ScriptedProcess) -> int:
        go.wait(10)
        process.write(b"thawed")
        return 0

    fake.script(program, container_id="c")
    fake.script(lambda _: 0 if go.wait(10) else 1, container_id="d")
    collected = Collected()
    for name in ("c", "d"):
        client.create(name, spec())
    client.start("c", attach_stdio=collected)
    client.start("d")
    for name in ("c", "d"):
        client.pause(name)
    go.set()
    with pytest.raises(DeadlineExceededError):
        client.wait("c", timeout=0.1)
    assert client.status("d") is Status.PAUSED
    assert collected.out == b""

    for name in ("c", "d"):
        client.resume(name)
        assert client.wait(name).code == 0
    client.delete_task("c")
    assert collected.out == b"thawed"


def test_what_is_frozen_can_be_killed(fake: FakeContainerd, client: Client) -> None:
    go = threading.Event()
    fake.script(lambda _: 0 if go.wait(10) else 1)
    client.create("c", spec())
    client.start("c")
    client.pause("c")
    go.set()

    client.signal_process("c", "init", signal.SIGKILL)

    assert client.wait("c").code == 137


def test_a_terminals_size(fake: FakeContainerd, client: Client) -> None:
    client.create("c", spec(terminal=True))
    client.start("c", attach_stdio=Collected())
    played = fake.process("c")
    assert played.wait_size(0.01) is None

    client.resize_terminal("c", "init", 80, 25)

    assert played.wait_size(5) == (80, 25)


def test_a_stream_that_is_closed_early(fake: FakeContainerd, client: Client) -> None:
    def program(process: ScriptedProcess) -> None:
        process.write(b"all")
        process.close("stdout")
        process.wait_killed()

    fake.script(program)
    collected = Collected()
    client.create("c", spec())
    client.start("c", attach_stdio=collected)
    assert collected.dio is not None
    collected.wait_for(b"all")
    client.signal_process("c", "init", signal.SIGKILL)
    assert client.wait("c").code == 137


def test_a_process_that_does_not_come(fake: FakeContainerd, client: Client) -> None:
    with pytest.raises(DeadlineExceededError, match="no process 'init' of container 'c' was started"):
        fake.process("c", timeout=0.01)


def test_a_process_can_be_waited_for(fake: FakeContainerd, client: Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(fake.process, "c", namespace="test")
        client.create("c", spec())
        pid = client.start("c")
        assert found.result(10).pid == pid


def test_programs_that_cannot_be_started(fake: FakeContainerd, client: Client) -> None:
    fake.script(fails_to_start("rootfs is on fire"), container_id="c")
    client.create("c", spec())
    client.create("d", {**spec(), "process": {"cwd": "/", "args": []}})

    with pytest.raises(SystemFailureError, match="runc create failed: rootfs is on fire"):
        client.start("c")
    with pytest.raises(SystemFailureError, match="args must not be empty"):
        client.start("d")


def test_programs_of_the_host_cannot_be_scripted(host: FakeContainerd) -> None:
    for call in (lambda: host.script(echoes()), lambda: host.process("c")):
        with pytest.raises(InvalidParameterError, match="only the scripted runtime"):
            call()


def test_limits_are_kept(fake: FakeContainerd, client: Client) -> None:
    from libcontainerd._wire import typeurl
    from libcontainerd._wire.pb.services.tasks_pb2 import UpdateTaskRequest

    client.create("c", spec())
    client.start("c")

    client._connection.tasks.Update(
        UpdateTaskRequest(
            container_id="c",
            resources=typeurl.pack_json(typeurl.LINUX_RESOURCES_URL, b'{"memory":{"limit":5}}'),
        ),
        metadata=client._connection.metadata,
        timeout=20,
    )

    assert fake.updates("c") == [{"memory": {"limit": 5}}]
