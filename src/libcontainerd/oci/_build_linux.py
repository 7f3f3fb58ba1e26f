"""Options for what is particular to Linux: limits, namespaces, devices, seccomp, cgroup; and annotations."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping

from libcontainerd.errors import InvalidParameterError
from libcontainerd.oci._build import (
    Option,
    SpecOption,
    absolute,
    linux_of,
    resources_of,
    text,
    text_map,
    texts,
    unset,
)
from libcontainerd.oci._model import Mount, Spec
from libcontainerd.oci._model_linux import (
    NAMESPACE_TYPES,
    LinuxDevice,
    LinuxIDMapping,
    LinuxNamespace,
    LinuxSeccomp,
)
from libcontainerd.oci._model_resources import LinuxCPU, LinuxDeviceCgroup, LinuxMemory, LinuxPids
from libcontainerd.oci._seccomp import default_seccomp_profile

# The kernel takes quotas from a millisecond up, and periods from a millisecond to a second.
_LEAST_MICROSECONDS, _MOST_MICROSECONDS = 1_000, 1_000_000


def with_memory_limit(limit: int, *, swap: int | None = None, reservation: int | None = None) -> SpecOption:
    """Limit the container's memory.

    >>> from libcontainerd import oci
    >>> oci.build(oci.default_spec(), oci.with_memory_limit(64 << 20)).linux.resources.memory
    LinuxMemory(limit=67108864)

    Args:
        limit: Bytes; -1 is no limit.
        swap: Bytes of memory and swap together, so never below `limit`; as much as the kernel has if None.
        reservation: Bytes that the kernel tries to keep it to when memory is short.

    Raises:
        InvalidParameterError: if `swap` is below `limit`, or `reservation` above it.
    """
    if swap is not None and swap != -1 and (limit == -1 or swap < limit):
        raise InvalidParameterError(
            f"with_memory_limit: swap={swap} includes memory, so it is at least {limit=}"
        )
    if reservation is not None and limit != -1 and reservation > limit:
        raise InvalidParameterError(f"with_memory_limit: {reservation=} is above {limit=}")

    def edit(spec: Spec) -> None:
        resources = resources_of(spec)
        memory = resources.memory or LinuxMemory()
        memory.limit = limit
        if swap is not None:
            memory.swap = swap
        if reservation is not None:
            memory.reservation = reservation
        resources.memory = memory

    return Option("with_memory_limit", edit)


def with_cpu_limit(cpus: float, *, period: int = 100_000) -> SpecOption:
    """Limit the container's CPU time.

    >>> from libcontainerd import oci
    >>> oci.build(oci.default_spec(), oci.with_cpu_limit(1.5)).linux.resources.cpu
    LinuxCPU(quota=150000, period=100000)

    Args:
        cpus: How many CPUs' worth of time: 0.5 is half of one.
        period: Over how many microseconds the time is measured out, from 1,000 to 1,000,000.

    Raises:
        InvalidParameterError: if the period is out of bounds, or `cpus` gives less than 1,000 microseconds in
            it.
    """
    if not _LEAST_MICROSECONDS <= period <= _MOST_MICROSECONDS:
        raise InvalidParameterError(f"with_cpu_limit: {period=} must be from 1000 to 1000000 microseconds")
    if not cpus * period >= _LEAST_MICROSECONDS or cpus == float("inf"):
        raise InvalidParameterError(
            f"with_cpu_limit: {cpus=} must give at least 1000 microseconds in {period=}"
        )

    def edit(spec: Spec) -> None:
        cpu = _cpu(spec)
        cpu.quota, cpu.period = round(cpus * period), period

    return Option("with_cpu_limit", edit)


def with_cpu_shares(shares: int) -> SpecOption:
    """Set the container's weight against others where CPUs are short: 1024 is one ordinary share.

    >>> from libcontainerd import oci
    >>> oci.build(oci.default_spec(), oci.with_cpu_shares(512)).linux.resources.cpu.shares
    512
    """

    def edit(spec: Spec) -> None:
        _cpu(spec).shares = shares

    return Option("with_cpu_shares", edit)


def with_cpuset(cpus: str, *, mems: str | None = None) -> SpecOption:
    """Keep the container on some CPUs, and on the memory of some NUMA nodes.

    >>> from libcontainerd import oci
    >>> oci.build(oci.default_spec(), oci.with_cpuset("0-1", mems="0")).linux.resources.cpu
    LinuxCPU(cpus='0-1', mems='0')

    Args:
        cpus: A list like `0-3,7`.
        mems: A list of the same kind; any node if None.
    """

    def edit(spec: Spec) -> None:
        cpu = _cpu(spec)
        cpu.cpus = cpus
        if mems is not None:
            cpu.mems = mems

    return Option("with_cpuset", edit)


def _cpu(spec: Spec) -> LinuxCPU:
    resources = resources_of(spec)
    if resources.cpu is None:
        resources.cpu = LinuxCPU()
    return resources.cpu


def with_pids_limit(limit: int) -> SpecOption:
    """Limit how many processes and threads the container may have at a time; -1 is no limit.

    >>> from libcontainerd import oci
    >>> oci.build(oci.default_spec(), oci.with_pids_limit(100)).linux.resources.pids.limit
    100

    Raises:
        InvalidParameterError: for 0, which runtimes read as no limit.
    """
    if limit == 0:
        raise InvalidParameterError(
            "with_pids_limit: 0 is read as no limit by runtimes; say -1 if that is meant"
        )

    def edit(spec: Spec) -> None:
        resources_of(spec).pids = LinuxPids(limit=limit)

    return Option("with_pids_limit", edit)


def with_namespace(kind: str, path: str | None = None) -> SpecOption:
    """Give the container a namespace of its own, or let it join one.

    >>> from libcontainerd import oci
    >>> oci.build(oci.default_spec(), oci.with_namespace("pid", "/proc/4321/ns/pid")).linux.namespaces[0]
    LinuxNamespace(type='pid', path='/proc/4321/ns/pid')

    Args:
        kind: `mount`, `pid`, `network`, `uts`, `ipc`, `user`, `cgroup` or `time`.
        path: The namespace to join, as a file; a new one is made if None.

    Raises:
        InvalidParameterError: for another kind, or a path that is not absolute.
    """
    _check_kind(kind, "with_namespace")
    if path is not None:
        absolute(path, "with_namespace", "path")

    def edit(spec: Spec) -> None:
        wanted = LinuxNamespace(type=kind)
        if path is not None:
            wanted.path = path
        _put_namespace(spec, wanted)

    return Option("with_namespace", edit)


def with_network_namespace(path: str) -> SpecOption:
    """Let the container join a network namespace that is already there, such as one made by `ip netns add`.

    >>> from libcontainerd import oci
    >>> oci.build(oci.default_spec(), oci.with_network_namespace("/run/netns/blue")).linux.namespaces[-2]
    LinuxNamespace(type='network', path='/run/netns/blue')

    Args:
        path: The namespace's file, an absolute path on the host.

    Raises:
        InvalidParameterError: if the path is not absolute.
    """
    return with_namespace("network", absolute(path, "with_network_namespace", "path"))


def without_namespace(kind: str) -> SpecOption:
    """Let the container share a namespace with the host; no error if it does already.

    >>> from libcontainerd import oci
    >>> spec = oci.build(oci.default_spec(), oci.without_namespace("network"))
    >>> [namespace.type for namespace in spec.linux.namespaces]
    ['pid', 'ipc', 'uts', 'mount', 'cgroup']

    Raises:
        InvalidParameterError: for a kind that there is not.
    """
    _check_kind(kind, "without_namespace")

    def edit(spec: Spec) -> None:
        linux = linux_of(spec)
        linux.namespaces = [item for item in linux.namespaces or () if _kind(item) != kind]

    return Option("without_namespace", edit)


def _check_kind(kind: str, function: str) -> None:
    if kind not in NAMESPACE_TYPES:
        raise InvalidParameterError(
            f"{function}: a namespace is one of {', '.join(NAMESPACE_TYPES)}, not {kind!r}"
        )


def _kind(namespace: LinuxNamespace | None) -> str | None:
    return namespace.type if namespace is not None else None


def _put_namespace(spec: Spec, wanted: LinuxNamespace) -> None:
    linux = linux_of(spec)
    present = list(linux.namespaces or ())
    for index, namespace in enumerate(present):
        if _kind(namespace) == wanted.type:
            present[index] = wanted
            break
    else:
        present.append(wanted)
    linux.namespaces = present


def with_user_namespace(
    uid_mappings: Iterable[LinuxIDMapping], gid_mappings: Iterable[LinuxIDMapping] | None = None
) -> SpecOption:
    """Give the container a user namespace, in which its users are others than outside.

    The root filesystem should belong to the mapped users, and every directory above it must let them pass.

    >>> from libcontainerd import oci
    >>> mapping = oci.LinuxIDMapping(container_id=0, host_id=100000, size=65536)
    >>> spec = oci.build(oci.default_spec(), oci.with_user_namespace([mapping]))
    >>> spec.linux.uid_mappings[0].host_id, spec.linux.namespaces[-1].type
    (100000, 'user')

    Args:
        uid_mappings: Which user ids inside are which outside.
        gid_mappings: The same for groups; as the users if None.

    Raises:
        InvalidParameterError: if there is no mapping, or one is incomplete.
    """
    uids = list(uid_mappings)
    gids = uids if gid_mappings is None else list(gid_mappings)
    if not uids or not gids:
        raise InvalidParameterError("with_user_namespace: give at least one mapping")
    for mapping in (*uids, *gids):
        if mapping.container_id is None or mapping.host_id is None or not mapping.size:
            raise InvalidParameterError(
                "with_user_namespace: a mapping needs container_id, host_id and a size above 0,"
                f" not {mapping!r}"
            )

    def edit(spec: Spec) -> None:
        _put_namespace(spec, LinuxNamespace(type="user"))
        linux = linux_of(spec)
        linux.uid_mappings = [mapping.model_copy() for mapping in uids]
        linux.gid_mappings = [mapping.model_copy() for mapping in gids]

    return Option("with_user_namespace", edit)


def with_devices(*devices: LinuxDevice | str | os.PathLike[str], access: str = "rwm") -> SpecOption:
    """Make devices in the container, and let it use them.

    >>> from libcontainerd import oci
    >>> fuse = oci.LinuxDevice(path="/dev/fuse", type="c", major=10, minor=229)
    >>> spec = oci.build(oci.default_spec(), oci.with_devices(fuse))
    >>> spec.linux.devices[-1].path, spec.linux.resources.devices[-1].minor
    ('/dev/fuse', 229)

    Args:
        *devices: Either a full description, or the path of a device of this host, which is looked at now and
            appears in the container under the same path, with the same owner and mode.
        access: What the device cgroup allows: some of `r`, `w` and `m` (mknod).

    Raises:
        InvalidParameterError: if a path is no device, a description lacks its path, type, major or minor, or
            `access` is something else.
    """
    if not access or set(access) - set("rwm"):
        raise InvalidParameterError(f"with_devices: access must be some of rwm, not {access!r}")
    wanted = [
        device.model_copy(deep=True) if isinstance(device, LinuxDevice) else _host_device(os.fspath(device))
        for device in devices
    ]
    for device in wanted:
        absolute(device.path, "with_devices", "path")
        if device.type not in ("c", "b", "u", "p"):
            raise InvalidParameterError(
                f"with_devices: {device.path}: type must be c, b, u or p, not {device.type!r}"
            )
        if device.type != "p" and (device.major is None or device.minor is None):
            raise InvalidParameterError(f"with_devices: {device.path}: give major and minor")

    def edit(spec: Spec) -> None:
        linux, resources = linux_of(spec), resources_of(spec)
        paths = {device.path for device in wanted}
        others = [device for device in linux.devices or () if _path(device) not in paths]
        linux.devices = [*others, *(device.model_copy(deep=True) for device in wanted)]
        rules = [
            LinuxDeviceCgroup(
                allow=True,
                type="b" if device.type == "b" else "c",
                major=device.major,
                minor=device.minor,
                access=access,
            )
            for device in wanted
            if device.type != "p"
        ]
        present = list(resources.devices or ())
        resources.devices = [*present, *(rule for rule in rules if rule not in present)]

    return Option("with_devices", edit)


def _path(device: LinuxDevice | None) -> str | None:
    return device.path if device is not None else None


def _host_device(path: str) -> LinuxDevice:
    absolute(path, "with_devices", "path")
    try:
        # Follows links: /dev/cdrom should become the drive that it points at.
        status = os.stat(path)
    except OSError as error:
        raise InvalidParameterError(f"with_devices: {path}: {error.strerror}") from error
    if not stat.S_ISCHR(status.st_mode) and not stat.S_ISBLK(status.st_mode):
        raise InvalidParameterError(f"with_devices: {path} is neither a character nor a block device")
    return LinuxDevice(
        path=path,
        type="b" if stat.S_ISBLK(status.st_mode) else "c",
        major=os.major(status.st_rdev),
        minor=os.minor(status.st_rdev),
        file_mode=stat.S_IMODE(status.st_mode) & 0o777,
        uid=status.st_uid,
        gid=status.st_gid,
    )


def with_annotations(annotations: Mapping[str, str]) -> SpecOption:
    """Add annotations; others stay, and one of the same name is replaced.

    >>> from libcontainerd import oci
    >>> oci.build(oci.default_spec(), oci.with_annotations({"org.example.job": "7"})).annotations
    {'org.example.job': '7'}

    Raises:
        InvalidParameterError: if a name is empty, or a value is not text.
    """
    wanted = text_map(annotations, "with_annotations")
    if "" in wanted:
        raise InvalidParameterError("with_annotations: an annotation needs a name")

    def edit(spec: Spec) -> None:
        spec.annotations = {**(spec.annotations or {}), **wanted}

    return Option("with_annotations", edit)


def with_sysctl(settings: Mapping[str, str]) -> SpecOption:
    """Set kernel parameters of the container's own namespaces; others stay.

    >>> from libcontainerd import oci
    >>> oci.build(oci.default_spec(), oci.with_sysctl({"net.ipv4.ip_forward": "1"})).linux.sysctl
    {'net.ipv4.ip_forward': '1'}
    """
    wanted = text_map(settings, "with_sysctl")

    def edit(spec: Spec) -> None:
        linux = linux_of(spec)
        linux.sysctl = {**(linux.sysctl or {}), **wanted}

    return Option("with_sysctl", edit)


def with_cgroup_path(path: str) -> SpecOption:
    """Say which cgroup the container goes into; the runtime chooses one if nobody does.

    >>> from libcontainerd import oci
    >>> oci.build(oci.default_spec(), oci.with_cgroup_path("/jobs/7")).linux.cgroups_path
    '/jobs/7'

    Args:
        path: Below the cgroup mount: absolute, or relative to a place that the runtime chooses. For the
            systemd driver it is `slice:prefix:name`.

    Raises:
        InvalidParameterError: if the path is empty, or has a `..` in it.
    """
    if not text(path, "with_cgroup_path", "path") or ".." in path.split("/"):
        raise InvalidParameterError(f"with_cgroup_path: {path!r} cannot be a cgroup path")

    def edit(spec: Spec) -> None:
        linux_of(spec).cgroups_path = path

    return Option("with_cgroup_path", edit)


def with_rootless() -> SpecOption:
    """Ask for nothing that a containerd without rights on the host, in a user namespace, cannot give.

    Put it last. It drops what cgroups would do (limits, device rules, a cgroup's path and mount), `oom_score_adj`, further
    groups, and the groups of `devpts` mounts: the user namespace may have no group but root's.

    >>> from libcontainerd import oci
    >>> spec = oci.build(oci.default_spec(), oci.with_memory_limit(64 << 20), oci.with_rootless())
    >>> spec.linux.resources, spec.linux.cgroups_path, spec.process.user.additional_gids
    (None, '', None)
    """

    def edit(spec: Spec) -> None:
        linux = linux_of(spec)
        unset(linux, "resources")
        # Empty is not unset: a client would give a container without one a cgroup of its own.
        linux.cgroups_path = ""
        if spec.process is not None:
            unset(spec.process, "oom_score_adj")
            if spec.process.user is not None:
                unset(spec.process.user, "additional_gids")
        if spec.mounts is not None:
            spec.mounts = [_without_group(mount) for mount in spec.mounts if _type(mount) != "cgroup"]

    return Option("with_rootless", edit)


def _type(mount: Mount | None) -> str | None:
    return mount.type if mount is not None else None


def _without_group(mount: Mount) -> Mount:
    if _type(mount) == "devpts" and mount.options is not None:
        mount.options = [option for option in mount.options if not (option or "").startswith("gid=")]
    return mount


def with_seccomp(profile: LinuxSeccomp | None = None) -> SpecOption:
    """Filter the container's system calls.

    Put it after what changes the capabilities: the default profile allows the calls that they are for.

    >>> from libcontainerd import oci
    >>> seccomp = oci.build(oci.default_spec(), oci.with_seccomp()).linux.seccomp
    >>> seccomp.default_action, seccomp.default_errno_ret
    ('SCMP_ACT_ERRNO', 1)

    Args:
        profile: The filter; `default_seccomp_profile` for the spec's bounding capabilities and this machine
            if None.
    """
    given = None if profile is None else profile.model_copy(deep=True)

    def edit(spec: Spec) -> None:
        if given is not None:
            linux_of(spec).seccomp = given.model_copy(deep=True)
            return
        capabilities = spec.process.capabilities if spec.process is not None else None
        bounding = texts(capabilities.bounding) if capabilities is not None else []
        linux_of(spec).seccomp = default_seccomp_profile(bounding)

    return Option("with_seccomp", edit)
