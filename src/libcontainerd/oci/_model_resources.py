"""The resource limits of the runtime-spec: what becomes cgroup settings."""

from __future__ import annotations

from typing import Annotated

from libcontainerd.oci._base import REQUIRED, Array, Int64, Map, Model, Rule, UInt16, UInt32, UInt64


class LinuxDeviceCgroup(Model):
    """A rule of the device cgroup.

    `type` is `a`, `b` or `c`; `access` is some of `rwm`; a number that is unset is any number.
    """

    allow: Annotated[bool | None, REQUIRED] = None
    type: str | None = None
    major: Int64 | None = None
    minor: Int64 | None = None
    access: str | None = None


class LinuxMemory(Model):
    """Memory limits in bytes; -1 is unlimited. `swap` is memory and swap together."""

    limit: Int64 | None = None
    reservation: Int64 | None = None
    swap: Int64 | None = None
    kernel: Int64 | None = None
    kernel_tcp: Int64 | None = None
    swappiness: UInt64 | None = None
    disable_oom_killer: bool | None = None
    use_hierarchy: bool | None = None
    check_before_update: bool | None = None


class LinuxCPU(Model):
    """CPU limits: periods, quota and burst in microseconds; `cpus` and `mems` are lists like `0-3,7`."""

    shares: UInt64 | None = None
    quota: Int64 | None = None
    burst: UInt64 | None = None
    period: UInt64 | None = None
    realtime_runtime: Int64 | None = None
    realtime_period: UInt64 | None = None
    cpus: str | None = None
    mems: str | None = None
    idle: Int64 | None = None


class LinuxPids(Model):
    """How many tasks the cgroup may hold."""

    limit: Annotated[Int64 | None, REQUIRED] = None


class LinuxWeightDevice(Model):
    """The I/O weight of one block device."""

    major: Annotated[Int64 | None, REQUIRED] = None
    minor: Annotated[Int64 | None, REQUIRED] = None
    weight: UInt16 | None = None
    leaf_weight: UInt16 | None = None


class LinuxThrottleDevice(Model):
    """The I/O rate of one block device, in bytes or operations a second."""

    major: Annotated[Int64 | None, REQUIRED] = None
    minor: Annotated[Int64 | None, REQUIRED] = None
    rate: UInt64 | None = None


class LinuxBlockIO(Model):
    """Block I/O weights and limits."""

    weight: UInt16 | None = None
    leaf_weight: UInt16 | None = None
    weight_device: Array[LinuxWeightDevice] | None = None
    throttle_read_bps_device: Array[LinuxThrottleDevice] | None = None
    throttle_write_bps_device: Array[LinuxThrottleDevice] | None = None
    throttle_read_iops_device: Array[LinuxThrottleDevice] | None = None
    throttle_write_iops_device: Array[LinuxThrottleDevice] | None = None


class LinuxHugepageLimit(Model):
    """A limit in bytes for huge pages of one size, like `2MB`."""

    page_size: Annotated[str | None, Rule(required=True, pattern=r"[1-9][0-9]*[KMG]B")] = None
    limit: Annotated[UInt64 | None, REQUIRED] = None


class LinuxInterfacePriority(Model):
    """The priority of the traffic that leaves by one interface."""

    name: Annotated[str | None, REQUIRED] = None
    priority: Annotated[UInt32 | None, REQUIRED] = None


class LinuxNetwork(Model):
    """The network class of cgroup v1, and priorities by interface."""

    class_id: UInt32 | None = None
    priorities: Array[LinuxInterfacePriority] | None = None


class LinuxRdma(Model):
    """Limits for one RDMA device."""

    hca_handles: UInt32 | None = None
    hca_objects: UInt32 | None = None


class LinuxResources(Model):
    """Limits for the container's cgroup; `unified` holds cgroup v2 files and their values as they are."""

    devices: Array[LinuxDeviceCgroup] | None = None
    memory: LinuxMemory | None = None
    cpu: LinuxCPU | None = None
    pids: LinuxPids | None = None
    block_io: LinuxBlockIO | None = None
    hugepage_limits: Array[LinuxHugepageLimit] | None = None
    network: LinuxNetwork | None = None
    rdma: Map[LinuxRdma] | None = None
    unified: Map[str] | None = None
