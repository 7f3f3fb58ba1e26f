"""The process section of the runtime-spec, and the hooks."""

from __future__ import annotations

from typing import Annotated

from libcontainerd.oci._base import REQUIRED, Array, Int32, Int64, Model, Rule, UInt32, UInt64

_CPU_LIST = Rule(pattern=r"[0-9, -]*")


class Box(Model):
    """The size of a console, in character cells."""

    height: Annotated[UInt64 | None, REQUIRED] = None
    width: Annotated[UInt64 | None, REQUIRED] = None


class User(Model):
    """Who the process runs as, in ids of the container. `username` is for Windows."""

    uid: UInt32 | None = None
    gid: UInt32 | None = None
    umask: UInt32 | None = None
    additional_gids: Array[UInt32] | None = None
    username: str | None = None


class LinuxCapabilities(Model):
    """The five capability sets of capabilities(7), as names like `CAP_KILL`."""

    bounding: Array[str] | None = None
    effective: Array[str] | None = None
    inheritable: Array[str] | None = None
    permitted: Array[str] | None = None
    ambient: Array[str] | None = None


class POSIXRlimit(Model):
    """One resource limit of setrlimit(2); `type` is a name like `RLIMIT_NOFILE`."""

    type: Annotated[str | None, Rule(required=True, pattern=r"RLIMIT_[A-Z]+")] = None
    hard: Annotated[UInt64 | None, REQUIRED] = None
    soft: Annotated[UInt64 | None, REQUIRED] = None


class Scheduler(Model):
    """Scheduling attributes of sched_setattr(2). `runtime`, `deadline` and `period` are nanoseconds."""

    policy: Annotated[
        str | None,
        Rule(
            required=True,
            one_of=(
                "SCHED_OTHER",
                "SCHED_FIFO",
                "SCHED_RR",
                "SCHED_BATCH",
                "SCHED_ISO",
                "SCHED_IDLE",
                "SCHED_DEADLINE",
            ),
        ),
    ] = None
    nice: Int32 | None = None
    priority: Int32 | None = None
    flags: Annotated[
        Array[str] | None,
        Rule(
            each=Rule(
                one_of=(
                    "SCHED_FLAG_RESET_ON_FORK",
                    "SCHED_FLAG_RECLAIM",
                    "SCHED_FLAG_DL_OVERRUN",
                    "SCHED_FLAG_KEEP_POLICY",
                    "SCHED_FLAG_KEEP_PARAMS",
                    "SCHED_FLAG_UTIL_CLAMP_MIN",
                    "SCHED_FLAG_UTIL_CLAMP_MAX",
                )
            )
        ),
    ] = None
    runtime: UInt64 | None = None
    deadline: UInt64 | None = None
    period: UInt64 | None = None


class LinuxIOPriority(Model):
    """The I/O priority of ioprio_set(2)."""

    class_: Annotated[
        str | None, Rule(required=True, one_of=("IOPRIO_CLASS_RT", "IOPRIO_CLASS_BE", "IOPRIO_CLASS_IDLE"))
    ] = None
    priority: Annotated[Int64 | None, Rule(minimum=-(2**31), maximum=2**31 - 1)] = None


class CPUAffinity(Model):
    """CPU lists (`0-3,7`) for an exec: before the move into the container's cgroup, and after it."""

    initial: Annotated[str | None, _CPU_LIST] = None
    final: Annotated[str | None, _CPU_LIST] = None


class Process(Model):
    """A process of the container: init in a spec, or what an exec starts."""

    terminal: bool | None = None
    console_size: Box | None = None
    user: User | None = None
    args: Array[str] | None = None
    command_line: str | None = None
    env: Array[str] | None = None
    cwd: Annotated[str | None, REQUIRED] = None
    capabilities: LinuxCapabilities | None = None
    rlimits: Array[POSIXRlimit] | None = None
    no_new_privileges: bool | None = None
    apparmor_profile: str | None = None
    oom_score_adj: Int64 | None = None
    scheduler: Scheduler | None = None
    selinux_label: str | None = None
    io_priority: LinuxIOPriority | None = None
    exec_cpu_affinity: CPUAffinity | None = None


class Hook(Model):
    """A program that the runtime runs at a point of the container's life. `timeout` is in seconds."""

    path: Annotated[str | None, REQUIRED] = None
    args: Array[str] | None = None
    env: Array[str] | None = None
    timeout: Annotated[Int64 | None, Rule(minimum=1)] = None


class Hooks(Model):
    """The hooks by the point at which they run. `prestart` is deprecated by the specification."""

    prestart: Array[Hook] | None = None
    create_runtime: Array[Hook] | None = None
    create_container: Array[Hook] | None = None
    start_container: Array[Hook] | None = None
    poststart: Array[Hook] | None = None
    poststop: Array[Hook] | None = None
