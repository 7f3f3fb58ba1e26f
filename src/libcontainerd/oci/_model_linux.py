"""The linux section of the runtime-spec, without its resource limits."""

from __future__ import annotations

from typing import Annotated

from libcontainerd.oci._base import REQUIRED, Array, Int64, Map, Model, Rule, UInt32, UInt64
from libcontainerd.oci._model_resources import LinuxResources

NAMESPACE_TYPES = ("mount", "pid", "network", "uts", "ipc", "user", "cgroup", "time")
SECCOMP_ACTIONS = (
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_TRAP",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_LOG",
    "SCMP_ACT_NOTIFY",
)
SECCOMP_FLAGS = (
    "SECCOMP_FILTER_FLAG_TSYNC",
    "SECCOMP_FILTER_FLAG_LOG",
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
)
SECCOMP_ARCHITECTURES = (
    "SCMP_ARCH_X86",
    "SCMP_ARCH_X86_64",
    "SCMP_ARCH_X32",
    "SCMP_ARCH_ARM",
    "SCMP_ARCH_AARCH64",
    "SCMP_ARCH_LOONGARCH64",
    "SCMP_ARCH_M68K",
    "SCMP_ARCH_MIPS",
    "SCMP_ARCH_MIPS64",
    "SCMP_ARCH_MIPS64N32",
    "SCMP_ARCH_MIPSEL",
    "SCMP_ARCH_MIPSEL64",
    "SCMP_ARCH_MIPSEL64N32",
    "SCMP_ARCH_PPC",
    "SCMP_ARCH_PPC64",
    "SCMP_ARCH_PPC64LE",
    "SCMP_ARCH_S390",
    "SCMP_ARCH_S390X",
    "SCMP_ARCH_SH",
    "SCMP_ARCH_SHEB",
    "SCMP_ARCH_PARISC",
    "SCMP_ARCH_PARISC64",
    "SCMP_ARCH_RISCV64",
)
SECCOMP_OPERATORS = (
    "SCMP_CMP_NE",
    "SCMP_CMP_LT",
    "SCMP_CMP_LE",
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_MASKED_EQ",
)

# Go's uint has 64 bits where containers run; the schema allows 32.
_SCHEMA_UINT32 = Rule(maximum=2**32 - 1)


class LinuxIDMapping(Model):
    """`size` ids from `container_id` inside are those from `host_id` outside."""

    container_id: Annotated[UInt32 | None, REQUIRED] = None
    host_id: Annotated[UInt32 | None, REQUIRED] = None
    size: Annotated[UInt32 | None, REQUIRED] = None


class LinuxNamespace(Model):
    """A namespace to make, or to join where `path` names one."""

    type: Annotated[str | None, Rule(required=True, one_of=NAMESPACE_TYPES)] = None
    path: str | None = None


class LinuxDevice(Model):
    """A device node to make in the container; `type` is `c`, `b`, `u` or `p`."""

    path: Annotated[str | None, REQUIRED] = None
    type: Annotated[str | None, Rule(required=True, pattern=r"[cbup]")] = None
    major: Int64 | None = None
    minor: Int64 | None = None
    file_mode: Annotated[UInt32 | None, Rule(minimum=0, maximum=0o777)] = None
    uid: UInt32 | None = None
    gid: UInt32 | None = None


class LinuxNetDevice(Model):
    """A network device to move into the container, under another name if `name` is set."""

    name: str | None = None


class LinuxTimeOffset(Model):
    """The offset of one clock in a time namespace: seconds, and nanoseconds on top."""

    secs: Int64 | None = None
    nanosecs: UInt32 | None = None


class LinuxSeccompArg(Model):
    """A condition on one argument of a system call."""

    index: Annotated[UInt64 | None, Rule(required=True, maximum=2**32 - 1)] = None
    value: Annotated[UInt64 | None, REQUIRED] = None
    value_two: UInt64 | None = None
    op: Annotated[str | None, Rule(required=True, one_of=SECCOMP_OPERATORS)] = None


class LinuxSyscall(Model):
    """What happens on the named system calls."""

    names: Annotated[Array[str] | None, Rule(required=True, min_items=1)] = None
    action: Annotated[str | None, Rule(required=True, one_of=SECCOMP_ACTIONS)] = None
    errno_ret: Annotated[UInt64 | None, _SCHEMA_UINT32] = None
    args: Array[LinuxSeccompArg] | None = None


class LinuxSeccomp(Model):
    """The system call filter of seccomp(2)."""

    default_action: Annotated[str | None, Rule(required=True, one_of=SECCOMP_ACTIONS)] = None
    default_errno_ret: Annotated[UInt64 | None, _SCHEMA_UINT32] = None
    architectures: Annotated[Array[str] | None, Rule(each=Rule(one_of=SECCOMP_ARCHITECTURES))] = None
    flags: Annotated[Array[str] | None, Rule(each=Rule(one_of=SECCOMP_FLAGS))] = None
    listener_path: str | None = None
    listener_metadata: str | None = None
    syscalls: Array[LinuxSyscall] | None = None


class LinuxIntelRdt(Model):
    """Cache and memory bandwidth shares of Intel's Resource Director Technology."""

    clos_id: str | None = None
    schemata: Array[str] | None = None
    l3_cache_schema: str | None = None
    mem_bw_schema: Annotated[str | None, Rule(pattern=r"MB:[^\n]*")] = None
    enable_monitoring: bool | None = None


class LinuxMemoryPolicy(Model):
    """The NUMA policy of set_mempolicy(2); `nodes` is a list like `0-1`."""

    mode: Annotated[
        str | None,
        Rule(
            one_of=(
                "MPOL_DEFAULT",
                "MPOL_BIND",
                "MPOL_INTERLEAVE",
                "MPOL_WEIGHTED_INTERLEAVE",
                "MPOL_PREFERRED",
                "MPOL_PREFERRED_MANY",
                "MPOL_LOCAL",
            )
        ),
    ] = None
    nodes: str | None = None
    flags: Annotated[
        Array[str] | None,
        Rule(
            each=Rule(one_of=("MPOL_F_NUMA_BALANCING", "MPOL_F_RELATIVE_NODES", "MPOL_F_STATIC_NODES")),
        ),
    ] = None


class LinuxPersonality(Model):
    """The execution domain of personality(2)."""

    domain: Annotated[str | None, Rule(one_of=("LINUX", "LINUX32"))] = None
    flags: Array[str] | None = None


class Linux(Model):
    """What is particular to Linux. `sysctl` maps names to values, `net_devices` host names to settings."""

    uid_mappings: Array[LinuxIDMapping] | None = None
    gid_mappings: Array[LinuxIDMapping] | None = None
    sysctl: Map[str] | None = None
    resources: LinuxResources | None = None
    cgroups_path: str | None = None
    namespaces: Array[LinuxNamespace] | None = None
    devices: Array[LinuxDevice] | None = None
    net_devices: Map[LinuxNetDevice] | None = None
    seccomp: LinuxSeccomp | None = None
    rootfs_propagation: Annotated[str | None, Rule(one_of=("private", "shared", "slave", "unbindable"))] = (
        None
    )
    masked_paths: Array[str] | None = None
    readonly_paths: Array[str] | None = None
    mount_label: str | None = None
    intel_rdt: LinuxIntelRdt | None = None
    memory_policy: LinuxMemoryPolicy | None = None
    personality: LinuxPersonality | None = None
    time_offsets: Map[LinuxTimeOffset] | None = None
