"""A container's life through the client: the promises of its verbs, on every server."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from libcontainerd import (
    Client,
    ConflictError,
    EventType,
    FailedPreconditionError,
    InvalidParameterError,
    LibcontainerdError,
    NotFoundError,
    Status,
)
from libcontainerd._wire import typeurl
from libcontainerd._wire.pb.cgroups.v1_pb2 import Metrics
from libcontainerd._wire.pb.services import introspection_pb2, tasks_pb2
from libcontainerd._wire.pb.types import metrics_pb2
from libcontainerd._wire.pb.wellknown_pb2 import Empty
from libcontainerd.backends import RecordingBackend
from tests import servers
from tests.contract import programs
from tests.contract.servers import Services, process_document
from tests.integration.containers import Collected, bundle_of, exit_of, wait_exec_gone, wait_until

_CLOCK = timedelta(minutes=1)  # a clock may be set meanwhile; a wrong time zone is more


def start(client: Client, services: Services, container_id: str, *args: str) -> int:
    client.create(container_id, services.spec(*args))
    return client.start(container_id)


def test_version_and_server(client: Client, services: Services) -> None:
    version = client.version()
    server = services.call(services.introspection.Server, Empty())
    plugins = services.call(services.introspection.Plugins, introspection_pb2.PluginsRequest()).plugins

    assert servers.release_of(version.version) == services.release
    assert version.revision or services.release >= (2, 0)  # which Debian builds without
    assert len(server.uuid) == 36
    assert {"io.containerd.content.v1", "io.containerd.snapshotter.v1", "io.containerd.runtime.v2"} <= {
        plugin.type for plugin in plugins
    }


def test_from_create_to_delete(client: Client, services: Services, backend: RecordingBackend) -> None:
    """Fidelity 3, 23 to 26, 42, 43; DESIGN 5, wait: also after all is deleted."""
    collected = Collected()
    before = datetime.now(UTC) - _CLOCK
    client.create("c", services.spec(*programs.SPEAK), labels={"a": "b"})
    assert services.process("c") is None
    bundle = bundle_of(services, "c")

    pid = client.start("c", attach_stdio=collected)
    waited = client.wait("c")
    deleted = client.delete_task("c")

    assert pid > 0
    assert waited == deleted
    assert (deleted.code, deleted.error) == (3, None)
    assert before < deleted.exited_at <= datetime.now(UTC) + _CLOCK
    assert (collected.out, collected.err) == (b"out\n", b"err\n")
    assert services.container("c").labels["a"] == "b"
    client.delete("c")
    assert services.container_ids() == set()
    assert not bundle.exists()
    assert exit_of(backend, "c") == 3
    assert [event.event for event in backend.events("c")] == [
        EventType.CREATE,
        EventType.START,
        EventType.EXIT,
    ]
    assert client.wait("c") == waited


def test_a_container_is_started_again_after_its_task(client: Client, services: Services) -> None:
    """Fidelity 20."""
    client.create("c", services.spec(*programs.SPEAK))
    pids = set()
    for _ in range(3):
        pids.add(client.start("c"))
        assert client.wait("c").code == 3
        assert client.delete_task("c").code == 3

    assert len(pids) == 3


def test_the_states_that_status_tells(client: Client, services: Services, backend: RecordingBackend) -> None:
    """Fidelity 16, 40, 44."""
    client.create("c", services.spec())
    with pytest.raises(NotFoundError):
        client.status("c")
    client.start("c")
    assert client.status("c") is Status.RUNNING
    client.pause("c")
    assert client.status("c") is Status.PAUSED
    with pytest.raises(FailedPreconditionError):
        client.pause("c")
    client.resume("c")
    assert client.status("c") is Status.RUNNING
    with pytest.raises(FailedPreconditionError):
        client.resume("c")
    client.signal_process("c", "init", signal.SIGKILL)
    assert client.wait("c").code == 137
    assert client.status("c") is Status.STOPPED
    client.delete_task("c")
    with pytest.raises(NotFoundError):
        client.status("c")
    backend.wait_for(EventType.EXIT, "c")
    assert [event.event for event in backend.events("c")] == [
        EventType.CREATE,
        EventType.START,
        EventType.PAUSED,
        EventType.RESUMED,
        EventType.EXIT,
    ]


def test_a_frozen_container_can_be_killed(client: Client, services: Services) -> None:
    """Fidelity 37."""
    start(client, services, "c")
    client.pause("c")

    client.signal_process("c", "init", signal.SIGKILL)

    assert client.wait("c").code == 137


def test_a_signal_that_is_caught(client: Client, services: Services) -> None:
    """Fidelity 37."""
    collected = Collected()
    client.create("c", services.spec(*programs.OBEY))
    client.start("c", attach_stdio=collected)
    collected.wait_for(b"ready\n")

    client.signal_process("c", "init", signal.SIGTERM)

    assert client.wait("c").code == 42


def test_of_two_creates_one_wins(client: Client, services: Services) -> None:
    """Fidelity 23; DESIGN 5, create."""
    begin = threading.Barrier(4)

    def create(_: int) -> LibcontainerdError | None:
        begin.wait()
        try:
            client.create("c", services.spec(*programs.TRUE))
        except LibcontainerdError as error:
            return error
        return None

    with ThreadPoolExecutor(4) as pool:
        errors = [error for error in pool.map(create, range(4)) if error is not None]

    assert [type(error) for error in errors] == [ConflictError] * 3
    client.start("c")
    assert client.wait("c").code == 0


def test_of_two_starts_one_wins(client: Client, services: Services) -> None:
    """Fidelity 24; DESIGN 5, start."""
    client.create("c", services.spec())
    begin = threading.Barrier(3)

    def start(_: int) -> int | ConflictError:
        begin.wait()
        try:
            return client.start("c", attach_stdio=Collected())
        except ConflictError as error:
            return error

    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(start, range(3)))

    pids = [answer for answer in answers if isinstance(answer, int)]
    assert len(pids) == 1
    task = services.process("c")
    assert task is not None
    assert task.pid == pids[0]


def test_a_task_keeps_its_container(client: Client, services: Services) -> None:
    """Fidelity 42, 43; DESIGN 5, delete."""
    start(client, services, "c")

    with pytest.raises(FailedPreconditionError):
        client.delete("c")
    status = client.delete_task("c")

    assert (status.code, type(status.error)) == (255, FailedPreconditionError)
    assert client.status("c") is Status.RUNNING


def test_a_program_that_is_missing_leaves_nothing(client: Client, services: Services) -> None:
    """Fidelity 26, 29, 36; DESIGN 5: a verb that fails leaves nothing behind."""
    client.create("c", services.spec(*programs.MISSING))
    start(client, services, "d")

    with pytest.raises(InvalidParameterError, match="executable file not found"):
        client.start("c", attach_stdio=Collected())
    with pytest.raises(InvalidParameterError, match="executable file not found"):
        client.exec("d", "e", process_document(*programs.MISSING), attach_stdio=Collected())

    assert services.process("c") is None
    assert services.process("d", "e") is None
    assert list(bundle_of(services, "c").iterdir()) == []
    assert list(bundle_of(services, "d").iterdir()) == []


def test_an_exec(client: Client, services: Services, backend: RecordingBackend) -> None:
    """Fidelity 12, 34; DESIGN 6.5."""
    init = start(client, services, "c")
    collected = Collected()

    pid = client.exec("c", "e", process_document(*programs.SPEAK), attach_stdio=collected)

    assert pid not in (0, init)
    assert client.wait("c", "e").code == 3
    assert exit_of(backend, "c", "e") == 3
    wait_exec_gone(client, "c", "e")
    assert (collected.out, collected.err) == (b"out\n", b"err\n")
    assert services.process("c", "e") is None
    assert list(bundle_of(services, "c").iterdir()) == []
    assert client.wait("c", "e").code == 3
    client.exec("c", "e", process_document(*programs.TRUE))  # its id is free again
    assert client.wait("c", "e").code in (0, 3)


def test_pids_and_summary(client: Client, services: Services) -> None:
    """Fidelity 40."""
    init = start(client, services, "c")
    exec_pid = client.exec("c", "e", process_document())

    assert set(client.list_pids("c")) == {init, exec_pid}
    assert sorted(client.summary("c")) == sorted([(init, "init"), (exec_pid, "e")])


def test_the_end_of_init_ends_its_execs(
    client: Client, services: Services, backend: RecordingBackend
) -> None:
    """Fidelity 1, 2; DESIGN 6.3."""
    start(client, services, "c")
    client.exec("c", "e", process_document())

    client.signal_process("c", "init", signal.SIGKILL)

    assert exit_of(backend, "c") == 137
    assert exit_of(backend, "c", "e") == 137
    exits = [event.info.process_id for event in backend.events("c") if event.event is EventType.EXIT]
    assert sorted(exits) == ["c", "e"]


def test_names_that_are_unknown(client: Client, services: Services) -> None:
    """Fidelity 24, 34, 37, 38, 43, 44."""
    client.create("made", services.spec())
    start(client, services, "c")

    for call in (
        lambda: client.start("x"),
        lambda: client.status("x"),
        lambda: client.status("made"),
        lambda: client.pause("made"),
        lambda: client.list_pids("made"),
        lambda: client.signal_process("made", "init", 9),
        lambda: client.signal_process("c", "e", 9),
        lambda: client.wait("c", "e"),
        lambda: client.delete("x"),
    ):
        with pytest.raises(NotFoundError):
            call()
    with pytest.raises(InvalidParameterError, match="container is not running"):
        client.exec("made", "e", process_document())


def test_what_has_ended_cannot_be_signalled(client: Client, services: Services) -> None:
    """Fidelity 37; DESIGN 5, signal_process."""
    start(client, services, "c", *programs.TRUE)
    client.wait("c")

    with pytest.raises(NotFoundError):
        client.signal_process("c", "init", signal.SIGTERM)


def test_metrics(services: Services) -> None:
    services.run("one")
    services.run("two")

    request = tasks_pb2.MetricsRequest(filters=["id==one"])

    def metric() -> metrics_pb2.Metric:
        (only,) = services.call(services.tasks.Metrics, request).metrics
        return only

    assert metric().id == "one"
    # Before it is its program it is runc, which has several threads.
    wait_until(lambda: typeurl.unpack(metric().data, Metrics).pids.current == 1, "one thread")


def test_a_task_that_was_never_started_can_be_deleted(services: Services) -> None:
    services.make_container("c")
    pid = services.make_task("c")

    deleted = services.call(services.tasks.Delete, tasks_pb2.DeleteTaskRequest(container_id="c"))

    assert (deleted.pid, deleted.exit_status, deleted.exited_at.seconds) == (pid, 0, -62135596800)
    assert services.process("c") is None


def test_a_task_is_out_of_reach_without_its_container(services: Services) -> None:
    services.run("c")
    container = services.container("c")
    services.delete_container("c")

    refused = services.refused(services.tasks.Get, tasks_pb2.GetRequest(container_id="c"))

    assert refused.code.name == "NOT_FOUND"
    assert list(services.tasks_by_id()) == ["c"]
    services.create_container(container)
    wait_until(lambda: services.process("c") is not None, "it is in reach again")
