"""What a container uses and what it may use, on every server."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from libcontainerd import Client, EventType, FailedPreconditionError, InvalidParameterError, NotFoundError
from libcontainerd.backends import RecordingBackend
from libcontainerd.stats import CgroupV1Metrics, CgroupV2Metrics
from tests.contract import programs
from tests.contract.servers import Services
from tests.integration.containers import Collected


def test_stats_are_typed_and_of_now(client: Client, services: Services) -> None:
    client.create("c", services.spec())
    with pytest.raises(NotFoundError):
        client.stats("c")
    client.start("c")
    clock = timedelta(minutes=1)  # it may be set meanwhile; a wrong time zone is more
    before = datetime.now(UTC) - clock

    stats = client.stats("c")

    assert isinstance(stats.metrics, CgroupV1Metrics | CgroupV2Metrics)
    assert stats.type_url == stats.metrics.DESCRIPTOR.full_name
    assert before < stats.read_at <= datetime.now(UTC) + clock
    assert stats.read_at.tzinfo is UTC
    assert stats.usage.pids is not None


def test_stats_of_all_are_those_of_each(client: Client, services: Services) -> None:
    for name in ("one", "two-2.b_c", "idle"):
        client.create(name, services.spec())
    assert client.stats_all() == {}
    client.start("one")
    client.start("two-2.b_c")
    services.run("another", *programs.SLEEP)

    everybodys = client.stats_all()

    assert sorted(everybodys) == ["one", "two-2.b_c"]
    assert [each.type_url for each in everybodys.values()] == [client.stats("one").type_url] * 2


def test_stats_after_the_end_are_there_until_the_task_is_deleted(client: Client, services: Services) -> None:
    client.create("c", services.spec(*programs.TRUE))
    client.start("c")
    client.wait("c")

    assert client.stats("c").usage.pids == 0
    assert sorted(client.stats_all()) == ["c"]
    client.delete_task("c")
    assert client.stats_all() == {}
    with pytest.raises(NotFoundError):
        client.stats("c")


def test_stats_of_a_frozen_container(client: Client, services: Services) -> None:
    collected = Collected()
    client.create("c", services.spec(*programs.CAT))
    client.start("c", with_stdin=True, attach_stdio=collected)
    collected.stdin.write(b"hello\n")
    collected.wait_for(b"hello\n")  # before it is its program it is runc, which has several threads
    client.pause("c")

    assert client.stats("c").usage.pids == 1


def test_resources_are_updated_as_long_as_the_task_runs(client: Client, services: Services) -> None:
    client.create("c", services.spec())
    with pytest.raises(NotFoundError):
        client.update_resources("c", {"pids": {"limit": 64}})
    client.start("c")

    client.update_resources("c", {"pids": {"limit": 64}})
    client.update_resources("c", {"memory": {"limit": 128 << 20}, "cpu": {"shares": 512}})
    client.update_resources("c", {})
    client.pause("c")
    client.update_resources("c", {"pids": {"limit": 65}})
    client.resume("c")
    with pytest.raises(InvalidParameterError):
        client.update_resources("c", {"pids": {"limit": "many"}})

    client.signal_process("c", "init", 9)
    client.wait("c")
    with pytest.raises(FailedPreconditionError):
        client.update_resources("c", {"pids": {"limit": 64}})


def test_an_update_tells_no_event(client: Client, services: Services, backend: RecordingBackend) -> None:
    collected = Collected()
    client.create("c", services.spec(*programs.OBEY))
    client.start("c", attach_stdio=collected)
    collected.wait_for(b"ready")
    client.update_resources("c", {"pids": {"limit": 64}})
    client.signal_process("c", "init", 15)
    backend.wait_for(EventType.EXIT, "c", "init", timeout=60)

    assert [event.event for event in backend.events("c")] == [
        EventType.CREATE,
        EventType.START,
        EventType.EXIT,
    ]
