"""What the client promises about events and stdio, held on every server: order, independence, and no surprise at the edges."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from libcontainerd import Client, EventInfo, EventType, NotFoundError, Status, cio
from libcontainerd._wire import typeurl
from libcontainerd._wire.pb.events.task_pb2 import TaskExit, TaskOOM, TaskStart
from libcontainerd._wire.pb.services.events_pb2 import PublishRequest
from libcontainerd._wire.pb.wellknown_pb2 import Any
from libcontainerd.backends import CallbackBackend, RecordingBackend
from tests.contract import programs
from tests.contract.servers import Server, Services, process_document
from tests.integration.containers import Collected, bundle_of, exit_of, wait_until

Connect = Callable[[CallbackBackend], Client]


@pytest.fixture
def connect(server: Server, services: Services, tmp_path: Path) -> Iterator[Connect]:
    """Makes clients with a backend of the test's own, and closes them when the namespace was cleared."""
    with ExitStack() as stack:

        def make(backend: CallbackBackend) -> Client:
            client = Client(
                server.address,
                namespace=services.namespace,
                state_dir=tmp_path / "state",
                backend=backend,
                default_timeout=60.0,
            )
            stack.callback(client.close)
            stack.callback(services.remove_everything)
            return client

        yield make


def publish(services: Services, topic: str, event: Any) -> None:
    services.call(services.events.Publish, PublishRequest(topic=topic, event=event))


# ------------------------------------------------------------------------------------------------------------- events


def test_events_name_init_by_its_container(
    client: Client, services: Services, backend: RecordingBackend
) -> None:
    """Fidelity 1, 2, 4, 18: in events, init goes by its container's id and an exec by its own."""
    client.create("c", services.spec())
    pid = client.start("c")
    exec_pid = client.exec("c", "e", process_document(*programs.SPEAK))
    exit_of(backend, "c", "e")
    client.signal_process("c", "init", signal.SIGKILL)
    exit_of(backend, "c")

    facts = [
        (event.event, event.info.process_id, event.info.pid, event.info.exit_code)
        for event in backend.events("c")
    ]

    assert facts == [
        (EventType.CREATE, "c", pid, 0),
        (EventType.START, "c", pid, 0),
        (EventType.EXEC_ADDED, "e", 0, 0),
        (EventType.EXEC_STARTED, "e", exec_pid, 0),
        (EventType.EXIT, "e", exec_pid, 3),
        (EventType.EXIT, "c", pid, 137),
    ]
    exits = [event.info for event in backend.events("c") if event.event is EventType.EXIT]
    assert all(info.exited_at is not None for info in exits)


def test_out_of_memory_is_remembered_until_the_next_task(
    client: Client, services: Services, backend: RecordingBackend
) -> None:
    """Fidelity 5, 17, and DESIGN 6.6, which ends it with the task."""
    client.create("c", services.spec())
    client.start("c")
    publish(services, "/tasks/oom", typeurl.pack(TaskOOM(container_id="c")))
    oom = backend.wait_for(EventType.OOM, "c").info
    client.signal_process("c", "init", signal.SIGKILL)
    exited = backend.wait_for(EventType.EXIT, "c").info
    client.delete_task("c")
    backend.clear()
    client.start("c")
    started = backend.wait_for(EventType.START, "c").info

    assert (oom.oom_killed, oom.process_id) == (True, "")
    assert exited.oom_killed
    assert not started.oom_killed


def test_events_that_make_no_sense_are_skipped(
    client: Client, services: Services, backend: RecordingBackend
) -> None:
    """Fidelity 7; DESIGN 6.8."""
    client.create("c", services.spec())
    client.start("c")
    broken = Any(type_url="containerd.events.TaskExit", value=b"\xff\xff\xff")
    strange = Any(type_url="somebody.Else", value=b"1")
    foreign = typeurl.pack(TaskStart(container_id="of-others", pid=1))
    old = typeurl.pack(TaskExit(container_id="c", id="c", pid=4_000_000_000, exit_status=9))
    for topic, event in (
        ("/tasks/exit", broken),
        ("/tasks/odd", strange),
        ("/tasks/start", foreign),
        ("/tasks/exit", old),
    ):
        publish(services, topic, event)
    client.signal_process("c", "init", signal.SIGKILL)

    assert exit_of(backend, "c") == 137
    assert {event.container_id for event in backend.events()} == {"c"}


def test_a_backend_that_blocks_delays_its_own_container_only(connect: Connect, services: Services) -> None:
    """Fidelity 10; DESIGN 6.1."""
    go, blocked = threading.Event(), threading.Event()
    seen = RecordingBackend()

    def take(container_id: str, event: EventType, info: EventInfo) -> None:
        if container_id == "slow" and event is EventType.CREATE:
            blocked.set()
            go.wait(60)
        seen.process_event(container_id, event, info)

    client = connect(CallbackBackend(take))
    for name in ("slow", "fast"):
        client.create(name, services.spec(*programs.TRUE))
        client.start(name)
    assert blocked.wait(60)

    assert exit_of(seen, "fast") == 0
    assert seen.events("slow") == []
    go.set()
    assert exit_of(seen, "slow") == 0
    assert [event.event for event in seen.events("slow")] == [
        EventType.CREATE,
        EventType.START,
        EventType.EXIT,
    ]


def test_a_backend_may_do_everything_from_inside(connect: Connect, services: Services) -> None:
    """Fidelity 11, 13, 19, 20."""
    runs: list[int] = []
    over = threading.Event()

    def again(container_id: str, _event: EventType, info: EventInfo) -> None:
        status = client.delete_task(container_id)
        client.delete(container_id)
        runs.append(status.code)
        if len(runs) == 3:
            over.set()
            return
        client.create(container_id, services.spec(*programs.SPEAK))
        client.start(container_id)

    client = connect(CallbackBackend(on={EventType.EXIT: again}))
    client.create("c", services.spec(*programs.SPEAK))
    client.start("c")

    assert over.wait(60)
    assert runs == [3, 3, 3]
    assert services.container_ids() == set()


def test_a_backend_that_raises_gets_the_next_event(connect: Connect, services: Services) -> None:
    """Fidelity 9; DESIGN 6.4."""
    seen = RecordingBackend()

    def take(container_id: str, event: EventType, info: EventInfo) -> None:
        seen.process_event(container_id, event, info)
        raise RuntimeError("a backend's mistake")

    client = connect(CallbackBackend(take))
    client.create("c", services.spec(*programs.TRUE))
    client.start("c")

    assert exit_of(seen, "c") == 0
    assert len(seen.events("c")) == 3


# -------------------------------------------------------------------------------------------------------------- verbs


def test_an_exit_is_told_to_all_who_wait(client: Client, services: Services) -> None:
    """DESIGN 5, wait."""
    client.create("c", services.spec())
    client.start("c")
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(client.wait, "c") for _ in range(8)]
        client.signal_process("c", "init", signal.SIGKILL)
        codes = {each.result(60).code for each in waiting}

    assert codes == {137}
    assert client.wait("c").code == 137
    client.delete_task("c")
    assert client.wait("c").code == 137


def test_the_bundle_stays_where_that_is_asked_for(
    client: Client, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fidelity 43."""
    client.create("c", services.spec())
    bundle = bundle_of(services, "c")
    monkeypatch.setenv("LIBCONTAINERD_NOCLEAN", "1")

    client.delete("c")

    assert bundle.is_dir()
    assert services.container_ids() == set()


def test_replace_clears_what_is_stale(client: Client, services: Services) -> None:
    """DESIGN 4, replace."""
    services.run("c")

    client.replace("c", services.spec(*programs.SPEAK))
    client.start("c")

    assert client.wait("c").code == 3


def test_containers_outlive_their_client(connect: Connect, services: Services) -> None:
    """DESIGN 4, close."""
    client = connect(CallbackBackend(lambda *_: None))
    client.create("c", services.spec())
    pid = client.start("c", attach_stdio=Collected())
    assert client.status("c") is Status.RUNNING

    client.close()

    task = services.process("c")
    assert task is not None
    assert (task.pid, task.status) == (pid, 2)


def test_what_another_hand_has_deleted_is_not_found(client: Client, services: Services) -> None:
    """Fidelity 42, 44."""
    client.create("c", services.spec(*programs.TRUE))
    client.start("c")
    client.wait("c")
    services.delete_task("c")

    with pytest.raises(NotFoundError):
        client.status("c")
    assert client.delete_task("c").code == 0
    client.delete("c")


# -------------------------------------------------------------------------------------------------------------- stdio


def test_a_write_right_after_the_start_is_never_too_early(client: Client, services: Services) -> None:
    """Fidelity 35; DESIGN 5, stdin."""
    client.create("c", services.spec())
    client.start("c")
    for number in range(5):
        collected = Collected()
        name = f"e{number}"
        client.exec("c", name, process_document(*programs.CAT), with_stdin=True, attach_stdio=collected)
        collected.stdin.write(b"at once")
        collected.stdin.close()
        assert client.wait("c", name).code == 0
        collected.wait()
        assert collected.out == b"at once"


def test_a_write_after_the_end_is_a_broken_pipe(
    client: Client, services: Services, backend: RecordingBackend
) -> None:
    """DESIGN 5, stdin."""
    collected = Collected()
    client.create("c", services.spec())
    client.start("c", with_stdin=True, attach_stdio=collected)
    collected.stdin.write(b"nobody reads it")
    client.signal_process("c", "init", signal.SIGKILL)
    exit_of(backend, "c")

    def broken() -> bool:
        try:
            collected.stdin.write(b"x")
        except BrokenPipeError:
            return True
        return False

    wait_until(broken, "writes fail")


def test_cancelling_wakes_a_reader(client: Client, services: Services) -> None:
    """Fidelity 50; DESIGN 7."""
    taken: list[cio.DirectIO] = []

    def attach(dio: cio.DirectIO) -> cio.IO:
        taken.append(dio)
        return dio

    client.create("c", services.spec())
    client.start("c", attach_stdio=attach)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(taken[0].stdout.read, 1)
        taken[0].cancel()
        assert reading.result(60) == b""
    taken[0].close()
    assert client.status("c") is Status.RUNNING


def test_an_attach_that_fails_leaves_nothing(client: Client, services: Services) -> None:
    """Fidelity 46; DESIGN 7."""

    def attach(_: cio.DirectIO) -> cio.IO:
        raise RuntimeError("no")

    client.create("c", services.spec())

    with pytest.raises(RuntimeError, match="no"):
        client.start("c", attach_stdio=attach)

    assert services.process("c") is None
    assert list(bundle_of(services, "c").iterdir()) == []
    client.start("c")
    assert client.status("c") is Status.RUNNING
