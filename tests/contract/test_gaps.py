"""Gaps in the stream of events, and events that are lost, doubled or late: each exit is told once, with its real code.

On the fake alone, which can be told what shall go wrong; tests/integration/test_outages.py does it to a real containerd.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from libcontainerd import Client, EventType, NotFoundError, Status
from libcontainerd._events import patrol as patrol_module
from libcontainerd._wire.pb.events.task_pb2 import TaskExit
from libcontainerd.backends import RecordingBackend
from libcontainerd.testing import FakeContainerd
from tests import leaks
from tests.contract.servers import process_document
from tests.integration.containers import Collected, alive, exit_of, wait_exec_gone, wait_until

NAMESPACE = "gaps"
SPEC = {"ociVersion": "1.0.2", "process": {"args": ["sleep"], "cwd": "/"}, "root": {"path": "/"}}
PROCESS = {"args": ["sleep"], "cwd": "/"}
ENDS = [
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    None,
]


@pytest.fixture(autouse=True)
def _no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patrol_module, "_LATE_EVENT_SECONDS", 0.05)
    # Questions are counted here: none may be of a patrol that a slow test meets.
    monkeypatch.setattr(patrol_module, "_INTERVAL_SECONDS", 3600.0)


@pytest.fixture
def fake() -> Iterator[FakeContainerd]:
    with FakeContainerd() as made:
        yield made


@pytest.fixture
def backend() -> RecordingBackend:
    return RecordingBackend()


@pytest.fixture
def client(fake: FakeContainerd, backend: RecordingBackend, tmp_path: Path) -> Iterator[Client]:
    with Client(fake.address, namespace=NAMESPACE, state_dir=tmp_path / "state", backend=backend) as made:
        yield made


def run(client: Client, container_id: str, *execs: str) -> None:
    """Have a container and execs run until the test ends them."""
    client.create(container_id, SPEC)
    client.start(container_id)
    for exec_id in execs:
        client.exec(container_id, exec_id, PROCESS)


def exits(backend: RecordingBackend) -> list[tuple[str, str, int]]:
    """Whose exits were told, and the codes."""
    return sorted(
        (each.container_id, each.info.process_id, each.info.exit_code)
        for each in backend.events()
        if each.event is EventType.EXIT
    )


def told(backend: RecordingBackend, container_id: str, event: EventType) -> int:
    return len([each for each in backend.events(container_id) if each.event is event])


def settle(client: Client, fake: FakeContainerd, backend: RecordingBackend) -> None:
    """Wait until the stream is read again, and all that was published before has been delivered."""
    assert fake.wait_subscribed()
    name = f"last-{len(backend.events())}"
    client.create(name, SPEC)
    wait_until(lambda: client._subscriber.live, "the subscription is live", 30)
    client.start(name)
    fake.process(name).exit(0)
    exit_of(backend, name)


def others(backend: RecordingBackend) -> list[tuple[str, str, int]]:
    """The exits but those of `settle`."""
    return [each for each in exits(backend) if not each[0].startswith("last-")]


# ------------------------------------------------------------------------------------------------------------------- gaps


@pytest.mark.parametrize("end", ENDS)
def test_what_happens_in_a_gap_is_told_when_it_is_over(
    client: Client, fake: FakeContainerd, backend: RecordingBackend, end: grpc.StatusCode | None
) -> None:
    for name in ("over", "lives", "frozen"):
        run(client, name, "ends", "lasts")
    away = fake.hang("Events/Subscribe", times=None)
    assert fake.drop_event_streams(end) == 1
    away.wait_hit()

    fake.process("over", "ends").exit(3)
    fake.process("over").exit(5)
    fake.process("lives", "ends").exit(4)
    client.pause("frozen")
    assert others(backend) == []
    assert told(backend, "frozen", EventType.PAUSED) == 0
    away.release()

    for container_id, process_id, code in (
        ("over", "ends", 3),
        ("over", "init", 5),
        ("over", "lasts", 137),
        ("lives", "ends", 4),
    ):
        assert exit_of(backend, container_id, process_id) == code
    backend.wait_for(EventType.PAUSED, "frozen", timeout=30)
    settle(client, fake, backend)
    assert others(backend) == [
        ("lives", "ends", 4),
        ("over", "ends", 3),
        ("over", "lasts", 137),
        ("over", "over", 5),
    ]
    assert told(backend, "frozen", EventType.PAUSED) == 1
    assert client.status("frozen") is Status.PAUSED
    client.resume("frozen")
    backend.wait_for(EventType.RESUMED, "frozen", timeout=30)


def test_gap_after_gap_is_told_once(client: Client, fake: FakeContainerd, backend: RecordingBackend) -> None:
    names = [f"c{number}" for number in range(8)]
    for name in names:
        run(client, name, "e")
    for number, name in enumerate(names):
        fake.drop_event_streams(ENDS[number % len(ENDS)])
        fake.process(name, "e").exit(number)
        fake.drop_event_streams(None)
        fake.process(name).exit(number)
    for number, name in enumerate(names):
        assert exit_of(backend, name, "e") == number
        assert exit_of(backend, name) == number
    settle(client, fake, backend)
    expected = [(name, who, number) for number, name in enumerate(names) for who in (name, "e")]
    assert others(backend) == sorted(expected)


def test_a_thousand_containers_are_caught_up_with_one_question(
    client: Client, fake: FakeContainerd, backend: RecordingBackend
) -> None:
    names = [f"c{number}" for number in range(1000)]

    def make(name: str) -> None:
        run(client, name)

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(make, names))
    away = fake.hang("Events/Subscribe", times=None)
    fake.drop_event_streams()
    away.wait_hit()
    for name in names[::10]:
        fake.process(name).exit(5)
    fake.calls.clear()
    away.release()

    for name in names[::10]:
        assert exit_of(backend, name) == 5
    assert len(exits(backend)) == 100
    assert len(fake.calls.all("Tasks/List")) == 1
    assert fake.calls.all("Tasks/Get") == []


def test_a_question_that_fails_is_asked_again(
    client: Client, fake: FakeContainerd, backend: RecordingBackend
) -> None:
    run(client, "c", "e")
    away = fake.hang("Events/Subscribe", times=None)
    before = fake.fail("Tasks/List", times=2)
    after = fake.fail("Tasks/List", nth=1, times=2, after=True)
    one = fake.fail("Tasks/Get", grpc.StatusCode.UNKNOWN, "ttrpc: closed")
    fake.drop_event_streams()
    away.wait_hit()
    fake.process("c", "e").exit(4)
    fake.process("c").exit(5)
    away.release()

    assert exit_of(backend, "c", "e") == 4
    assert exit_of(backend, "c") == 5
    assert (before.hits, after.hits, one.hits) == (2, 2, 1)
    settle(client, fake, backend)
    assert others(backend) == [("c", "c", 5), ("c", "e", 4)]


def test_what_is_being_started_in_a_gap_is_asked_for_after_it(
    client: Client, fake: FakeContainerd, backend: RecordingBackend
) -> None:
    run(client, "c")
    client.create("new", SPEC)
    started = fake.hang("Tasks/Start", after=True)
    with ThreadPoolExecutor(1) as executor:
        starting = executor.submit(client.start, "new")
        process = fake.process("new")
        started.wait_hit()
        away = fake.hang("Events/Subscribe", times=None)
        fake.drop_event_streams()
        away.wait_hit()
        process.exit(6)
        away.release()
        fake.calls.wait_for("Tasks/List")
        started.release()
        assert starting.result(30) == process.pid

    assert exit_of(backend, "new") == 6
    settle(client, fake, backend)
    assert others(backend) == [("new", "new", 6)]


# -------------------------------------------------------------------------------------------------------------- restarts


def publish_exit(fake: FakeContainerd, container_id: str, process_id: str, pid: int, code: int) -> None:
    """Tell an exit as a shim does that was not heard the first time."""
    event = TaskExit(container_id=container_id, id=process_id, pid=pid, exit_status=code)
    fake.publish(NAMESPACE, "/tasks/exit", event)


def test_what_ends_while_containerd_is_down_is_told_with_its_code(
    client: Client, fake: FakeContainerd, backend: RecordingBackend
) -> None:
    run(client, "c", "e")
    init, process = fake.process("c"), fake.process("c", "e")
    fake.go_down()
    process.exit(4)
    init.exit(5)
    fake.go_up()

    assert exit_of(backend, "c", "e") == 4
    assert exit_of(backend, "c") == 5
    settle(client, fake, backend)
    publish_exit(fake, "c", "e", process.pid, 4)
    publish_exit(fake, "c", "c", init.pid, 137)
    settle(client, fake, backend)
    assert others(backend) == [("c", "c", 5), ("c", "e", 4)]
    assert client.delete_task("c").code == 5


@pytest.mark.parametrize("state", [True, False])
def test_what_a_containerd_has_forgotten_has_ended_somehow(
    client: Client, fake: FakeContainerd, backend: RecordingBackend, state: bool
) -> None:
    run(client, "c", "e")
    run(client, "other")
    init, process = fake.process("c"), fake.process("c", "e")
    fake.go_down()
    init.exit(5)  # and its exec with it
    fake.go_up(state=state, keep_ended=False)

    assert exit_of(backend, "c", "e") == 255
    assert exit_of(backend, "c") == 255
    for name in ("init", "e"):
        status = client.wait("c", name, timeout=60)
        assert status.code == 255
        assert isinstance(status.error, NotFoundError)
    if state:
        assert client.status("other") is Status.RUNNING
    else:
        assert exit_of(backend, "other") == 255
    # What comes after all is of a run that is over for us.
    publish_exit(fake, "c", "c", init.pid, 5)
    publish_exit(fake, "c", "e", process.pid, 137)
    settle(client, fake, backend)
    rest = [] if state else [("other", "other", 255)]
    assert others(backend) == [("c", "c", 255), ("c", "e", 255), *rest]
    assert isinstance(client.delete_task("c").error, NotFoundError)
    if state:
        client.delete("c")
    client.create("again", SPEC)


def test_an_exit_that_was_concluded_wrongly_does_not_become_two(
    client: Client, fake: FakeContainerd, backend: RecordingBackend
) -> None:
    run(client, "c", "e")
    wrong = fake.fail("Tasks/Get", grpc.StatusCode.NOT_FOUND, "process does not exist e")
    process = fake.process("c", "e")
    deletion = fake.hang("Tasks/DeleteProcess")  # what runs cannot be deleted
    fake.drop_event_streams()
    assert exit_of(backend, "c", "e") == 255
    assert wrong.hits == 1

    process.exit(4)
    deletion.release()
    wait_exec_gone(client, "c", "e")
    settle(client, fake, backend)
    assert others(backend) == [("c", "e", 255)]
    # The next of its name is another run.
    client.exec("c", "e", PROCESS)
    publish_exit(fake, "c", "e", process.pid, 4)
    fake.process("c", "e").exit(6)
    backend.wait_for(
        lambda each: each.event is EventType.EXIT and each.info.exit_code == 6, "c", "e", timeout=30
    )
    assert others(backend) == [("c", "e", 6), ("c", "e", 255)]


def test_close_in_a_gap_is_quick_and_leaves_nothing(backend: RecordingBackend, tmp_path: Path) -> None:
    with leaks.no_leaks(), FakeContainerd() as fake:
        client = Client(fake.address, namespace=NAMESPACE, state_dir=tmp_path / "state", backend=backend)
        run(client, "c", "e")
        asked = fake.hang("Tasks/List", times=None)
        fake.drop_event_streams()
        asked.wait_hit()
        client.close(timeout=30)
        asked.release()


# ------------------------------------------------------------------------------------------- lost, doubled, out of order


def test_an_exit_whose_event_got_lost_without_a_gap_is_found(
    client: Client, fake: FakeContainerd, backend: RecordingBackend
) -> None:
    run(client, "c", "e")
    run(client, "other")
    init, process = fake.process("c"), fake.process("c", "e")
    fake.lose_events("/tasks/exit", 2)
    process.exit(4)
    client._patrol.look_round()
    assert exit_of(backend, "c", "e") == 4
    init.exit(5)
    client._patrol.look_round()
    assert exit_of(backend, "c") == 5
    client._patrol.look_round()
    publish_exit(fake, "c", "e", process.pid, 4)
    publish_exit(fake, "c", "c", init.pid, 5)
    settle(client, fake, backend)
    assert others(backend) == [("c", "c", 5), ("c", "e", 4)]


def test_a_freeze_whose_event_got_lost_is_found(
    client: Client, fake: FakeContainerd, backend: RecordingBackend
) -> None:
    run(client, "c")
    fake.lose_events("/tasks/paused")
    client.pause("c")
    client._patrol.look_round()
    backend.wait_for(EventType.PAUSED, "c", timeout=30)
    fake.lose_events("/tasks/resumed")
    client.resume("c")
    client._patrol.look_round()
    backend.wait_for(EventType.RESUMED, "c", timeout=30)
    settle(client, fake, backend)
    assert (told(backend, "c", EventType.PAUSED), told(backend, "c", EventType.RESUMED)) == (1, 1)


def test_events_that_come_twice_are_told_once(
    client: Client, fake: FakeContainerd, backend: RecordingBackend
) -> None:
    for topic in ("create", "start", "exec-added", "exec-started", "exit"):
        fake.duplicate_events(f"/tasks/{topic}", 2)
    run(client, "c", "e")
    fake.process("c", "e").exit(4)
    wait_exec_gone(client, "c", "e")
    fake.process("c").exit(5)
    assert exit_of(backend, "c") == 5
    settle(client, fake, backend)
    assert others(backend) == [("c", "c", 5), ("c", "e", 4)]
    assert sorted(each.event for each in backend.events("c")) == sorted(
        [
            EventType.CREATE,
            EventType.START,
            EventType.EXEC_ADDED,
            EventType.EXEC_STARTED,
            EventType.EXIT,
            EventType.EXIT,
        ]
    )


def test_events_out_of_order_end_what_they_are_about(
    client: Client, fake: FakeContainerd, backend: RecordingBackend
) -> None:
    run(client, "c")
    fake.delay_events("/tasks/exec-started")
    client.exec("c", "e", PROCESS)
    fake.process("c", "e").exit(4)
    assert exit_of(backend, "c", "e") == 4
    wait_exec_gone(client, "c", "e")
    run_again = client.exec("c", "e", PROCESS)
    assert run_again
    fake.delay_events("/tasks/exit")
    fake.process("c", "e").exit(6)
    fake.process("c").exit(5)  # its exit comes before the exec's
    backend.wait_for(
        lambda each: each.event is EventType.EXIT and each.info.exit_code == 6, "c", "e", timeout=30
    )
    assert exit_of(backend, "c") == 5
    settle(client, fake, backend)
    assert others(backend) == [("c", "c", 5), ("c", "e", 4), ("c", "e", 6)]


# ----------------------------------------------------------------------------------------------------------- on the host


def test_real_processes_that_end_in_an_outage(backend: RecordingBackend, tmp_path: Path) -> None:
    with (
        FakeContainerd("host") as fake,
        Client(fake.address, namespace=NAMESPACE, state_dir=tmp_path / "state", backend=backend) as client,
    ):
        held = Collected()
        waits = process_document("sh", "-c", "read line; exit 7")
        client.create("c", {**SPEC, "process": waits})
        client.start("c", with_stdin=True, attach_stdio=held)
        pid = client.list_pids("c")[0]
        fake.go_down()
        held.stdin.write(b"\n")
        wait_until(lambda: not alive(pid), "its end")
        fake.go_up()
        assert exit_of(backend, "c") == 7
        assert exits(backend) == [("c", "c", 7)]
        assert client.delete_task("c").code == 7
