"""What a container uses: containerd's metrics as they are, and a view that needs no knowledge of the cgroup version.

Plain values, and pure functions of them; threads may share them, as long as nobody changes the messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from libcontainerd._events.decode import utc
from libcontainerd._wire import typeurl
from libcontainerd._wire.pb.cgroups import v1_pb2, v2_pb2
from libcontainerd.errors import SystemFailureError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from libcontainerd._wire.pb.types.metrics_pb2 import Metric
    from libcontainerd._wire.pb.wellknown_pb2 import Any

CgroupV1Metrics = v1_pb2.Metrics
CgroupV2Metrics = v2_pb2.Metrics

# cgroup v1 says "no limit" as the most pages that it can count, whatever their size is; v2 as the largest number.
_NO_LIMIT: Final = 0x7FFF_FFFF_0000_0000


@dataclass(frozen=True, slots=True)
class Usage:
    """What a container uses, in units that the names say, the same for both versions of cgroups.

    Counters run since the cgroup was made, which is since the task was. What the kernel does not tell, because that
    controller is not there, is None; so is a limit that there is not.

    Attributes:
        cpu_ns: Time on all processors together.
        cpu_user_ns: Of that, in user mode. Measured more coarsely, so that the parts need not make up the whole.
        cpu_system_ns: Of that, in the kernel.
        cpu_throttled_ns: Time for which it was held back by its quota.
        memory_bytes: Memory as the limit counts it, page cache included.
        memory_working_set_bytes: The same without file pages that the kernel can drop at once: what ``docker stats`` shows.
        memory_peak_bytes: The most that ``memory_bytes`` has been; None also where containerd or the kernel is too old to tell.
        memory_limit_bytes: The limit of ``memory_bytes``.
        swap_bytes: What is swapped out.
        oom_kills: How many processes the kernel has killed for want of memory.
        pids: Processes and threads.
        pids_limit: The limit of ``pids``.
        io_read_bytes: Read from block devices.
        io_write_bytes: Written to block devices.
        io_reads: Read operations.
        io_writes: Write operations.
    """

    cpu_ns: int | None = None
    cpu_user_ns: int | None = None
    cpu_system_ns: int | None = None
    cpu_throttled_ns: int | None = None
    memory_bytes: int | None = None
    memory_working_set_bytes: int | None = None
    memory_peak_bytes: int | None = None
    memory_limit_bytes: int | None = None
    swap_bytes: int | None = None
    oom_kills: int | None = None
    pids: int | None = None
    pids_limit: int | None = None
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None
    io_reads: int | None = None
    io_writes: int | None = None


@dataclass(frozen=True, slots=True)
class Stats:
    """One reading of a container's metrics.

    Attributes:
        read_at: When they were read, in UTC.
        type_url: containerd's name for what ``metrics`` is, such as ``io.containerd.cgroups.v1.Metrics``.
        metrics: The message as containerd sent it: `CgroupV1Metrics`, `CgroupV2Metrics`, or, of a type that this library does not
            know, the ``Any`` that it came in.
    """

    read_at: datetime
    type_url: str
    metrics: CgroupV1Metrics | CgroupV2Metrics | Any

    @property
    def usage(self) -> Usage:
        """The same for whoever does not care for the cgroup version; empty where the type is not known."""
        if isinstance(self.metrics, CgroupV1Metrics):
            return _usage_v1(self.metrics)
        if isinstance(self.metrics, CgroupV2Metrics):
            return _usage_v2(self.metrics)
        return Usage()


def read_stats(metric: Metric) -> Stats:
    """Read one container's metrics.

    Raises:
        SystemFailureError: they do not decode as what they say they are.
    """
    packed = metric.data
    metrics: CgroupV1Metrics | CgroupV2Metrics | Any = packed
    try:
        if typeurl.is_a(packed, CgroupV1Metrics):
            metrics = typeurl.unpack(packed, CgroupV1Metrics)
        elif typeurl.is_a(packed, CgroupV2Metrics):
            metrics = typeurl.unpack(packed, CgroupV2Metrics)
    except typeurl.DecodeError as error:
        raise SystemFailureError(f"cannot read the metrics of container {metric.id!r}: {error}") from error
    read_at = utc(metric.timestamp) if metric.HasField("timestamp") else None
    return Stats(read_at or datetime.now(UTC), typeurl.name_of(packed), metrics)


def _usage_v1(metrics: CgroupV1Metrics) -> Usage:
    cpu, memory, pids = metrics.cpu, metrics.memory, metrics.pids
    has_cpu, has_memory, has_pids = (
        metrics.HasField("cpu"),
        metrics.HasField("memory"),
        metrics.HasField("pids"),
    )
    usage = memory.usage  # with child cgroups, which of the other numbers only the totals count
    transferred = metrics.blkio.io_service_bytes_recursive if metrics.HasField("blkio") else None
    operations = metrics.blkio.io_serviced_recursive if metrics.HasField("blkio") else None
    return Usage(
        cpu_ns=cpu.usage.total if has_cpu else None,
        cpu_user_ns=cpu.usage.user if has_cpu else None,
        cpu_system_ns=cpu.usage.kernel if has_cpu else None,
        cpu_throttled_ns=cpu.throttling.throttled_time if has_cpu else None,
        memory_bytes=usage.usage if has_memory else None,
        memory_working_set_bytes=max(0, usage.usage - memory.total_inactive_file) if has_memory else None,
        memory_peak_bytes=usage.max if has_memory else None,
        memory_limit_bytes=_limit(usage.limit) if has_memory else None,
        # The kernel counts memory and swap together; and only if it was told to at boot.
        swap_bytes=max(0, memory.swap.usage - usage.usage) if memory.HasField("swap") else None,
        oom_kills=metrics.memory_oom_control.oom_kill if metrics.HasField("memory_oom_control") else None,
        pids=pids.current if has_pids else None,
        pids_limit=_limit(pids.limit) if has_pids else None,
        io_read_bytes=_sum_of(transferred, "read"),
        io_write_bytes=_sum_of(transferred, "write"),
        io_reads=_sum_of(operations, "read"),
        io_writes=_sum_of(operations, "write"),
    )


def _usage_v2(metrics: CgroupV2Metrics) -> Usage:
    cpu, memory, pids = metrics.cpu, metrics.memory, metrics.pids
    has_cpu, has_memory, has_pids = (
        metrics.HasField("cpu"),
        metrics.HasField("memory"),
        metrics.HasField("pids"),
    )
    devices = list(metrics.io.usage) if metrics.HasField("io") else None
    return Usage(
        cpu_ns=cpu.usage_usec * 1000 if has_cpu else None,
        cpu_user_ns=cpu.user_usec * 1000 if has_cpu else None,
        cpu_system_ns=cpu.system_usec * 1000 if has_cpu else None,
        cpu_throttled_ns=cpu.throttled_usec * 1000 if has_cpu else None,
        memory_bytes=memory.usage if has_memory else None,
        memory_working_set_bytes=max(0, memory.usage - memory.inactive_file) if has_memory else None,
        memory_peak_bytes=(memory.max_usage or None) if has_memory else None,
        memory_limit_bytes=_limit(memory.usage_limit) if has_memory else None,
        swap_bytes=memory.swap_usage if has_memory else None,
        oom_kills=metrics.memory_events.oom_kill if metrics.HasField("memory_events") else None,
        pids=pids.current if has_pids else None,
        pids_limit=_limit(pids.limit) if has_pids else None,
        io_read_bytes=None if devices is None else sum(each.rbytes for each in devices),
        io_write_bytes=None if devices is None else sum(each.wbytes for each in devices),
        io_reads=None if devices is None else sum(each.rios for each in devices),
        io_writes=None if devices is None else sum(each.wios for each in devices),
    )


def _limit(value: int) -> int | None:
    """A limit, or None where there is none: containerd says so by 0 for pids, and by something huge otherwise."""
    return value if 0 < value < _NO_LIMIT else None


def _sum_of(entries: Iterable[v1_pb2.BlkIOEntry] | None, operation: str) -> int | None:
    if entries is None:
        return None
    return sum(each.value for each in entries if each.op.lower() == operation)
