"""The spec that a container gets when nobody says otherwise."""

from __future__ import annotations

from libcontainerd.oci._document import validated
from libcontainerd.oci._model import Spec

# Nothing below needs a later version, and crun 1.8 refuses every version that has no "1.0" in it.
OCI_VERSION = "1.0.2"

DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# The fourteen that Docker and containerd leave to root in a container.
DEFAULT_CAPABILITIES = (
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)

# destination, type, source, options
_MOUNTS = (
    ("/proc", "proc", "proc", "nosuid noexec nodev"),
    # Without a mount of its own on /dev, runc makes the device nodes in the root filesystem and leaves them
    # there.
    ("/dev", "tmpfs", "tmpfs", "nosuid strictatime mode=755 size=65536k"),
    ("/dev/pts", "devpts", "devpts", "nosuid noexec newinstance ptmxmode=0666 mode=0620 gid=5"),
    ("/dev/shm", "tmpfs", "shm", "nosuid noexec nodev mode=1777 size=65536k"),  # noqa: S108
    ("/dev/mqueue", "mqueue", "mqueue", "nosuid noexec nodev"),
    ("/sys", "sysfs", "sysfs", "nosuid noexec nodev ro"),
    ("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid noexec nodev relatime ro"),
    ("/run", "tmpfs", "tmpfs", "nosuid strictatime mode=755 size=65536k"),
)

_NAMESPACES = ("pid", "ipc", "uts", "mount", "network", "cgroup")

_MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)

_READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

# type, major, minor, access; None is any. After a rule that denies everything.
_DEVICE_RULES = (
    ("c", None, None, "m"),
    ("b", None, None, "m"),
    ("c", 1, 3, "rwm"),  # null
    ("c", 1, 5, "rwm"),  # zero
    ("c", 1, 7, "rwm"),  # full
    ("c", 1, 8, "rwm"),  # random
    ("c", 1, 9, "rwm"),  # urandom
    ("c", 5, 0, "rwm"),  # tty
    ("c", 5, 1, "rwm"),  # console
    ("c", 5, 2, "rwm"),  # ptmx
    ("c", 136, None, "rwm"),  # pts/*
)


def default_spec() -> Spec:
    """Give the spec of an ordinary container: what `ctr run` and the Docker daemon agree on, on Linux.

    It runs `sh` as root in the directory `rootfs` of the bundle, with namespaces of its own (all but user and
    time), a `/dev` of its own, fourteen capabilities, no new privileges, 1024 open files, the common devices,
    and the kernel's tell-tale files masked or read-only. It needs no file on the host, and does not depend on
    the machine that it is made on.

    Where those two differ: no new privileges, the open-files limit and `/run` are `ctr`'s; the cgroup mount
    is Docker's, and its private cgroup namespace is Docker's on cgroup v2. There is no seccomp filter
    (`with_seccomp` adds one) and no cgroup path (`with_cgroup_path`): without one the runtime chooses.

    Returns:
        A new spec each time.
    """
    return validated(_document(), Spec, "spec")


def _document() -> dict[str, object]:
    rules: list[object] = [{"allow": False, "access": "rwm"}]
    for kind, major, minor, access in _DEVICE_RULES:
        rule: dict[str, object] = {"allow": True, "type": kind, "access": access}
        if major is not None:
            rule["major"] = major
        if minor is not None:
            rule["minor"] = minor
        rules.append(rule)
    capabilities = list(DEFAULT_CAPABILITIES)
    return {
        "ociVersion": OCI_VERSION,
        "process": {
            "user": {"uid": 0, "gid": 0, "additionalGids": [0]},
            "args": ["sh"],
            "env": [DEFAULT_PATH],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities,
                "effective": capabilities,
                "permitted": capabilities,
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": destination, "type": kind, "source": source, "options": options.split()}
            for destination, kind, source, options in _MOUNTS
        ],
        "linux": {
            "resources": {"devices": rules},
            "namespaces": [{"type": kind} for kind in _NAMESPACES],
            "maskedPaths": list(_MASKED_PATHS),
            "readonlyPaths": list(_READONLY_PATHS),
        },
    }
