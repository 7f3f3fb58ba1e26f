"""A machine with cgroup v2 alone: containerd in a mount namespace where nothing else is at /sys/fs/cgroup."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from libcontainerd import Client, Status
from libcontainerd.backends import RecordingBackend
from libcontainerd.stats import CgroupV2Metrics
from tests.integration.containers import MakeSpec, process, run_exec, running
from tests.integration.private import private_containerd

V2_ALONE = "umount --recursive /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup"


@pytest.fixture
def client(containerd_binary: Path, namespace: str, backend: RecordingBackend) -> Iterator[Client]:
    """A client of that containerd."""
    with private_containerd(containerd_binary, V2_ALONE) as connect:
        yield connect(namespace, backend)


def test_cgroup_v2(client: Client, spec: MakeSpec) -> None:
    begun = datetime.now(UTC) - timedelta(seconds=1)
    with running(client, "c", spec("sleep", "1000")):
        stats = client.stats("c")
        assert stats.type_url == "io.containerd.cgroups.v2.Metrics"
        assert isinstance(stats.metrics, CgroupV2Metrics)
        assert begun < stats.read_at <= datetime.now(UTC)
        # Which controllers are v2's is the machine's choice; none of the numbers can be below zero.
        usage = stats.usage
        assert all(each is None or each >= 0 for each in (usage.cpu_ns, usage.memory_bytes, usage.pids))
        assert set(client.stats_all()) == {"c"}

        client.exec("c", "e", process("sleep", "1000"))
        client.pause("c")
        assert client.status("c") is Status.PAUSED
        client.resume("c")
        assert client.status("c") is Status.RUNNING
        assert run_exec(client, "c", "f", "echo", "hi").out == b"hi\n"
        client.signal_process("c", "e", signal.SIGKILL)
        assert client.wait("c", "e", timeout=30).code == 137
