"""What containerd's metrics become: typed by their name, read in UTC, and said in units for both cgroup versions alike."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from libcontainerd import Client, Stats, Usage
from libcontainerd._wire import typeurl
from libcontainerd._wire.pb.cgroups import v1_pb2, v2_pb2
from libcontainerd._wire.pb.types.metrics_pb2 import Metric
from libcontainerd._wire.pb.wellknown_pb2 import Any, Timestamp
from libcontainerd.errors import NotFoundError, SystemFailureError, UnavailableError
from libcontainerd.stats import CgroupV1Metrics, CgroupV2Metrics, read_stats
from libcontainerd.testing import FakeContainerd
from tests.unit.server import Scripted
from tests.unit.test_client import SPEC

AT = datetime(2024, 2, 29, 12, 30, 15, 250_000, UTC)
MOST = (1 << 64) - 1
NO_PAGES = 0x7FFF_FFFF_FFFF_F000
"""What cgroup v1 says where there is no limit, with pages of 4 KiB."""


def metric(data: Any, name: str = "web") -> Metric:
    return Metric(id=name, timestamp=Timestamp(seconds=int(AT.timestamp()), nanos=250_000_999), data=data)


def full_v1() -> CgroupV1Metrics:
    entries = [
        v1_pb2.BlkIOEntry(op=op, major=8, minor=minor, value=value)
        for minor, op, value in (
            (0, "Read", 1000),
            (0, "Write", 20),
            (0, "Total", 1020),
            (1, "read", 7),
            (1, "Sync", 4),
        )
    ]
    return CgroupV1Metrics(
        pids=v1_pb2.PidsStat(current=5, limit=100),
        cpu=v1_pb2.CPUStat(
            usage=v1_pb2.CPUUsage(total=9_000, user=5_000, kernel=3_000, per_cpu=[9_000]),
            throttling=v1_pb2.Throttle(periods=3, throttled_periods=2, throttled_time=700),
        ),
        memory=v1_pb2.MemoryStat(
            cache=1,
            inactive_file=2,
            total_inactive_file=300,
            usage=v1_pb2.MemoryEntry(usage=1_000, max=4_000, limit=64 << 20),
            swap=v1_pb2.MemoryEntry(usage=1_600, max=5_000, limit=NO_PAGES),
        ),
        blkio=v1_pb2.BlkIOStat(io_service_bytes_recursive=entries, io_serviced_recursive=entries[1:4]),
        memory_oom_control=v1_pb2.MemoryOomControl(oom_kill=2),
    )


def full_v2() -> CgroupV2Metrics:
    return CgroupV2Metrics(
        pids=v2_pb2.PidsStat(current=5, limit=100),
        cpu=v2_pb2.CPUStat(usage_usec=9, user_usec=5, system_usec=3, throttled_usec=1),
        memory=v2_pb2.MemoryStat(
            usage=1_000, inactive_file=300, usage_limit=64 << 20, swap_usage=600, max_usage=4_000
        ),
        io=v2_pb2.IOStat(
            usage=[
                v2_pb2.IOEntry(major=8, minor=0, rbytes=1000, wbytes=20, rios=4, wios=2),
                v2_pb2.IOEntry(major=8, minor=1, rbytes=7, rios=1),
            ]
        ),
        memory_events=v2_pb2.MemoryEvents(oom=5, oom_kill=2),
    )


# ------------------------------------------------------------------------------------------------------------- by type


@pytest.mark.parametrize("prefix", ["", "type.googleapis.com/"])
@pytest.mark.parametrize("message", [full_v1(), full_v2()], ids=["v1", "v2"])
def test_a_known_type_is_typed(message: CgroupV1Metrics | CgroupV2Metrics, prefix: str) -> None:
    name = message.DESCRIPTOR.full_name

    stats = read_stats(metric(Any(type_url=prefix + name, value=message.SerializeToString())))

    assert stats == Stats(AT, name, message)
    assert type(stats.metrics) is type(message)


def test_the_names_are_containerds() -> None:
    assert CgroupV1Metrics.DESCRIPTOR.full_name == "io.containerd.cgroups.v1.Metrics"
    assert CgroupV2Metrics.DESCRIPTOR.full_name == "io.containerd.cgroups.v2.Metrics"


def test_an_unknown_type_is_returned_raw() -> None:
    packed = Any(type_url="io.containerd.runhcs.v1.Statistics", value=b"\xff\xff")

    stats = read_stats(metric(packed))

    assert stats == Stats(AT, "io.containerd.runhcs.v1.Statistics", packed)
    assert stats.usage == Usage()


@pytest.mark.parametrize("kind", [CgroupV1Metrics, CgroupV2Metrics])
def test_metrics_that_do_not_decode_are_an_error(kind: type[CgroupV1Metrics]) -> None:
    packed = Any(type_url=kind.DESCRIPTOR.full_name, value=b"\xff")

    with pytest.raises(SystemFailureError, match="cannot read the metrics of container 'web'"):
        read_stats(metric(packed))


def test_a_reading_without_a_time_is_now() -> None:
    before = datetime.now(UTC)

    read_at = read_stats(Metric(id="web", data=typeurl.pack(full_v1()))).read_at

    assert before <= read_at <= datetime.now(UTC)


# -------------------------------------------------------------------------------------------------------------- in units


def test_the_usage_of_cgroup_v1() -> None:
    assert Stats(AT, "", full_v1()).usage == Usage(
        cpu_ns=9_000,
        cpu_user_ns=5_000,
        cpu_system_ns=3_000,
        cpu_throttled_ns=700,
        memory_bytes=1_000,
        memory_working_set_bytes=700,
        memory_peak_bytes=4_000,
        memory_limit_bytes=64 << 20,
        swap_bytes=600,
        oom_kills=2,
        pids=5,
        pids_limit=100,
        io_read_bytes=1007,
        io_write_bytes=20,
        io_reads=7,
        io_writes=20,
    )


def test_the_usage_of_cgroup_v2() -> None:
    assert Stats(AT, "", full_v2()).usage == Usage(
        cpu_ns=9_000,
        cpu_user_ns=5_000,
        cpu_system_ns=3_000,
        cpu_throttled_ns=1_000,
        memory_bytes=1_000,
        memory_working_set_bytes=700,
        memory_peak_bytes=4_000,
        memory_limit_bytes=64 << 20,
        swap_bytes=600,
        oom_kills=2,
        pids=5,
        pids_limit=100,
        io_read_bytes=1007,
        io_write_bytes=20,
        io_reads=5,
        io_writes=2,
    )


@pytest.mark.parametrize("message", [CgroupV1Metrics(), CgroupV2Metrics()], ids=["v1", "v2"])
def test_what_no_controller_tells_is_none(message: CgroupV1Metrics | CgroupV2Metrics) -> None:
    assert Stats(AT, "", message).usage == Usage()


@pytest.mark.parametrize("none", [0, NO_PAGES, 0x7FFF_FFFF_FFFF_0000, MOST], ids=hex)
def test_no_limit_is_none(none: int) -> None:
    v1 = CgroupV1Metrics(
        pids=v1_pb2.PidsStat(limit=none), memory=v1_pb2.MemoryStat(usage=v1_pb2.MemoryEntry(limit=none))
    )
    v2 = CgroupV2Metrics(
        pids=v2_pb2.PidsStat(limit=none), memory=v2_pb2.MemoryStat(usage_limit=none, usage=3)
    )

    for message in (v1, v2):
        usage = Stats(AT, "", message).usage
        assert (usage.memory_limit_bytes, usage.pids_limit) == (None, None)
        assert usage.pids == 0


def test_numbers_read_one_after_the_other_never_make_a_negative_one() -> None:
    v1 = CgroupV1Metrics(
        memory=v1_pb2.MemoryStat(
            total_inactive_file=9, usage=v1_pb2.MemoryEntry(usage=5), swap=v1_pb2.MemoryEntry(usage=4)
        )
    )
    v2 = CgroupV2Metrics(memory=v2_pb2.MemoryStat(usage=5, inactive_file=9))

    for message in (v1, v2):
        usage = Stats(AT, "", message).usage
        assert (usage.memory_working_set_bytes, usage.swap_bytes) == (0, 0)


def test_a_peak_that_is_not_told_is_none() -> None:
    usage = Stats(AT, "", CgroupV2Metrics(memory=v2_pb2.MemoryStat(usage=5))).usage

    assert usage.memory_peak_bytes is None


# ------------------------------------------------------------------------------------------------------------ the verbs


@pytest.fixture
def fake() -> Iterator[FakeContainerd]:
    with FakeContainerd() as server:
        yield server


@pytest.fixture
def client(fake: FakeContainerd, tmp_path: Path) -> Iterator[Client]:
    with Client(fake.address, namespace="unit", state_dir=tmp_path / "state", default_timeout=20.0) as made:
        yield made


@pytest.mark.parametrize("message", [full_v1(), full_v2()], ids=["v1", "v2"])
def test_the_verbs_give_what_the_server_tells(
    fake: FakeContainerd, client: Client, message: CgroupV1Metrics | CgroupV2Metrics
) -> None:
    fake.set_metrics(message)
    for name in ("web", "w-e.b_1", "idle"):
        client.create(name, SPEC)
    client.start("web")
    client.start("w-e.b_1")
    before = datetime.now(UTC) - timedelta(seconds=1)

    stats = client.stats("w-e.b_1")
    everybodys = client.stats_all()

    assert stats.metrics == message
    assert before <= stats.read_at <= datetime.now(UTC)
    assert sorted(everybodys) == ["w-e.b_1", "web"]
    assert [each.usage for each in everybodys.values()] == [stats.usage] * 2
    assert len(fake.calls.all("Tasks/Metrics")) == 2


def test_others_containers_are_not_told(fake: FakeContainerd, client: Client, tmp_path: Path) -> None:
    with Client(fake.address, namespace="unit", state_dir=tmp_path / "other") as other:
        other.create("theirs", SPEC)
        other.start("theirs")

        assert client.stats_all() == {}
        assert sorted(other.stats_all()) == ["theirs"]
        with pytest.raises(NotFoundError, match="no such container"):
            client.stats("theirs")


def test_nothing_to_tell_is_an_error(fake: FakeContainerd, client: Client) -> None:
    client.create("web", SPEC)
    with pytest.raises(NotFoundError, match="container is not running"):
        client.stats("web")
    client.start("web")
    fake.set_metrics(Any(type_url="x"))
    assert client.stats("web").type_url == "google.protobuf.Any"

    fake.kill_shim("web")
    with pytest.raises(NotFoundError):
        client.stats("web")


def test_a_running_container_without_metrics_is_an_error(tmp_path: Path) -> None:
    with Scripted() as server, Client(server.path, namespace="test", state_dir=tmp_path / "state") as client:
        client.create("web", SPEC)
        client.start("web")

        with pytest.raises(SystemFailureError, match="metrics of container 'web': containerd tells none"):
            client.stats("web")


def test_a_refusal_is_told(fake: FakeContainerd, client: Client) -> None:
    fake.fail("Tasks/Metrics", grpc.StatusCode.UNAVAILABLE, "going down", times=2)
    client.create("web", SPEC)
    client.start("web")

    with pytest.raises(UnavailableError, match="cannot read the metrics of container 'web': going down"):
        client.stats("web")
    with pytest.raises(UnavailableError, match="cannot read the metrics of all containers: going down"):
        client.stats_all()
