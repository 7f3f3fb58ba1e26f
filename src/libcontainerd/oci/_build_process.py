"""Options for the process, and for what it sees of its surroundings: root filesystem, mounts, host name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from libcontainerd.errors import InvalidParameterError
from libcontainerd.oci._build import (
    Option,
    SpecOption,
    absolute,
    process_of,
    set_env,
    text,
    text_map,
    texts,
    unset,
)
from libcontainerd.oci._model import Mount, Root, Spec
from libcontainerd.oci._model_process import Box, LinuxCapabilities, POSIXRlimit, Process, User

# capabilities(7), up to Linux 6.18. The order is the kernel's.
_CAPABILITIES = tuple(
    f"CAP_{name}"
    for name in [
        "CHOWN",
        "DAC_OVERRIDE",
        "DAC_READ_SEARCH",
        "FOWNER",
        "FSETID",
        "KILL",
        "SETGID",
        "SETUID",
        "SETPCAP",
        "LINUX_IMMUTABLE",
        "NET_BIND_SERVICE",
        "NET_BROADCAST",
        "NET_ADMIN",
        "NET_RAW",
        "IPC_LOCK",
        "IPC_OWNER",
        "SYS_MODULE",
        "SYS_RAWIO",
        "SYS_CHROOT",
        "SYS_PTRACE",
        "SYS_PACCT",
        "SYS_ADMIN",
        "SYS_BOOT",
        "SYS_NICE",
        "SYS_RESOURCE",
        "SYS_TIME",
        "SYS_TTY_CONFIG",
        "MKNOD",
        "LEASE",
        "AUDIT_WRITE",
        "AUDIT_CONTROL",
        "SETFCAP",
        "MAC_OVERRIDE",
        "MAC_ADMIN",
        "SYSLOG",
        "WAKE_ALARM",
        "BLOCK_SUSPEND",
        "AUDIT_READ",
        "PERFMON",
        "BPF",
        "CHECKPOINT_RESTORE",
    ]
)

# setrlimit(2).
_RLIMITS = tuple(
    f"RLIMIT_{name}"
    for name in [
        "AS",
        "CORE",
        "CPU",
        "DATA",
        "FSIZE",
        "LOCKS",
        "MEMLOCK",
        "MSGQUEUE",
        "NICE",
        "NOFILE",
        "NPROC",
        "RSS",
        "RTPRIO",
        "RTTIME",
        "SIGPENDING",
        "STACK",
    ]
)


def with_args(*args: str) -> SpecOption:
    """Set the program and its arguments.

    >>> from libcontainerd import oci
    >>> oci.build(oci.default_spec(), oci.with_args("echo", "hello")).process.args
    ['echo', 'hello']

    Raises:
        InvalidParameterError: if there are none.
    """
    if not args:
        raise InvalidParameterError("with_args: name a program to run")

    def edit(spec: Spec) -> None:
        process_of(spec).args = list(args)

    return Option("with_args", edit)


def with_env(variables: Mapping[str, str]) -> SpecOption:
    """Set environment variables; others stay, and one of the same name keeps its place.

    >>> from libcontainerd import oci
    >>> oci.build(oci.default_spec(), oci.with_env({"PATH": "/bin", "LANG": "C.UTF-8"})).process.env
    ['PATH=/bin', 'LANG=C.UTF-8']

    Raises:
        InvalidParameterError: if a name is empty or has `=` in it, or a name or value is not text or holds a
            NUL.
    """
    wanted = text_map(variables, "with_env")
    for name in wanted:
        if not name or "=" in name:
            raise InvalidParameterError(f"with_env: {name!r} cannot be the name of a variable")

    def edit(spec: Spec) -> None:
        set_env(process_of(spec), [f"{name}={value}" for name, value in wanted.items()])

    return Option("with_env", edit)


def without_env(*names: str) -> SpecOption:
    """Take environment variables away; one that is not there is no error.

    >>> from libcontainerd import oci
    >>> oci.build(oci.default_spec(), oci.without_env("PATH")).process.env
    []
    """

    def edit(spec: Spec) -> None:
        process = process_of(spec)
        process.env = [entry for entry in texts(process.env) if entry.partition("=")[0] not in names]

    return Option("without_env", edit)


def with_cwd(path: str) -> SpecOption:
    """Set the working directory, an absolute path in the container. The runtime makes it if it is not there.

    >>> from libcontainerd import oci
    >>> oci.build(oci.default_spec(), oci.with_cwd("/srv")).process.cwd
    '/srv'

    Raises:
        InvalidParameterError: if the path is not absolute.
    """
    absolute(path, "with_cwd", "path")

    def edit(spec: Spec) -> None:
        process_of(spec).cwd = path

    return Option("with_cwd", edit)


def with_user(
    uid: int, gid: int = 0, *, additional_gids: Iterable[int] = (), umask: int | None = None
) -> SpecOption:
    """Run the process as this user, by number as seen in the container.

    A user other than 0 has none of the capabilities, unless `with_capabilities` makes them ambient.

    >>> from libcontainerd import oci
    >>> oci.build(oci.default_spec(), oci.with_user(1000, 1000, additional_gids=[44])).process.user
    User(uid=1000, gid=1000, additional_gids=[1000, 44])

    Args:
        uid: User id.
        gid: Group id.
        additional_gids: Further groups. `gid` is always one of them, as it is after a login: without it, a
            program with a set-group-id bit sheds the group, and with it what the group is denied
            (CVE-2022-36109).
        umask: File mode creation mask; the runtime's own if None.
    """
    groups = [gid, *(group for group in additional_gids if group != gid)]

    def edit(spec: Spec) -> None:
        user = User(uid=uid, gid=gid, additional_gids=list(groups))
        if umask is not None:
            user.umask = umask
        process_of(spec).user = user

    return Option("with_user", edit)


def with_rootfs(path: str | os.PathLike[str], *, readonly: bool = False) -> SpecOption:
    """Set the directory that becomes the container's root filesystem.

    >>> from libcontainerd import oci
    >>> oci.build(oci.default_spec(), oci.with_rootfs("/var/lib/app/rootfs", readonly=True)).root
    Root(path='/var/lib/app/rootfs', readonly=True)

    Args:
        path: The directory on the host, absolute. (A relative one is taken from the bundle that containerd keeps, where
            nothing is.)
        readonly: Mount it read-only; mounts on top, such as `/dev` and `/run`, stay as they are.
    """
    directory = os.fspath(path)

    def edit(spec: Spec) -> None:
        spec.root = Root(path=directory, readonly=readonly)

    return Option("with_rootfs", edit)


def with_hostname(name: str) -> SpecOption:
    """Set the host name. The spec needs a `uts` namespace of its own for it, as the default one has.

    >>> from libcontainerd import oci
    >>> oci.build(oci.default_spec(), oci.with_hostname("worker-1")).hostname
    'worker-1'

    Raises:
        InvalidParameterError: if the name is empty or longer than the kernel's 64 bytes.
    """
    if not 0 < len(text(name, "with_hostname", "name").encode()) <= 64:
        raise InvalidParameterError(f"with_hostname: a host name has 1 to 64 bytes, and {name!r} has not")

    def edit(spec: Spec) -> None:
        spec.hostname = name

    return Option("with_hostname", edit)


def with_mounts(*mounts: Mount) -> SpecOption:
    """Add mounts, in this order after those that are there; one on the same destination takes its place.

    >>> from libcontainerd import oci
    >>> options = ["nosuid", "size=16m"]
    >>> scratch = oci.Mount(destination="/scratch", type="tmpfs", source="tmpfs", options=options)
    >>> oci.build(oci.default_spec(), oci.with_mounts(scratch)).mounts[-1].options
    ['nosuid', 'size=16m']

    Raises:
        InvalidParameterError: if a destination is not an absolute path.
    """
    for mount in mounts:
        absolute(mount.destination, "with_mounts", "destination")
    wanted = [mount.model_copy(deep=True) for mount in mounts]

    def edit(spec: Spec) -> None:
        merged: dict[object, Mount] = {}
        for index, mount in enumerate(spec.mounts or ()):
            # The same destination may be mounted on more than once: those of the spec all stay.
            place = _destination(mount)
            merged[place if place not in merged else index] = mount
        for mount in wanted:
            merged[_destination(mount)] = mount.model_copy(deep=True)
        spec.mounts = list(merged.values())

    return Option("with_mounts", edit)


def with_bind(
    source: str | os.PathLike[str], destination: str, *, readonly: bool = False, recursive: bool = True
) -> SpecOption:
    """Show a file or directory of the host in the container, private to it.

    >>> from libcontainerd import oci
    >>> oci.build(oci.default_spec(), oci.with_bind("/srv/data", "/data", readonly=True)).mounts[-1]
    Mount(destination='/data', type='bind', source='/srv/data', options=['rbind', 'rprivate', 'ro'])

    Args:
        source: An absolute path on the host, which must be there when the container starts.
        destination: An absolute path in the container.
        readonly: Mount it read-only. What is mounted below the source stays writable, where `recursive`
            brings it in.
        recursive: Bring in what is mounted below the source.

    Raises:
        InvalidParameterError: if a path is not absolute.
    """
    options = ["rbind" if recursive else "bind", "rprivate", "ro" if readonly else "rw"]
    absolute(destination, "with_bind", "destination")
    path = absolute(os.fspath(source), "with_bind", "source")
    return with_mounts(Mount(destination=destination, type="bind", source=path, options=options))


def without_mounts(*destinations: str) -> SpecOption:
    """Take away the mounts on these destinations; one that is not there is no error.

    >>> from libcontainerd import oci
    >>> spec = oci.build(oci.default_spec(), oci.without_mounts("/sys/fs/cgroup", "/run"))
    >>> [mount.destination for mount in spec.mounts]
    ['/proc', '/dev', '/dev/pts', '/dev/shm', '/dev/mqueue', '/sys']
    """
    unwanted = {os.path.normpath(destination) for destination in destinations}

    def edit(spec: Spec) -> None:
        spec.mounts = [mount for mount in spec.mounts or () if _destination(mount) not in unwanted]

    return Option("without_mounts", edit)


def _destination(mount: Mount | None) -> str:
    destination = mount.destination if mount is not None else None
    return os.path.normpath(destination) if destination else ""


def with_terminal(*, width: int | None = None, height: int | None = None) -> SpecOption:
    """Give the process a terminal: input and output are one stream, and there is no separate standard error.

    `TERM` becomes `xterm` unless it is set.

    >>> from libcontainerd import oci
    >>> process = oci.build(oci.default_spec(), oci.with_terminal(width=80, height=24)).process
    >>> process.terminal, process.console_size, process.env[-1]
    (True, Box(height=24, width=80), 'TERM=xterm')

    Args:
        width: Columns at the start; give both sizes or neither.
        height: Rows at the start.

    Raises:
        InvalidParameterError: if one size is given without the other.
    """
    if (width is None) != (height is None):
        raise InvalidParameterError("with_terminal: give width and height, or neither")

    def edit(spec: Spec) -> None:
        process = process_of(spec)
        process.terminal = True
        if width is not None and height is not None:
            process.console_size = Box(height=height, width=width)
        environment = texts(process.env)
        if not any(entry.startswith("TERM=") for entry in environment):
            process.env = [*environment, "TERM=xterm"]

    return Option("with_terminal", edit)


def with_capabilities(
    *, add: Iterable[str] = (), drop: Iterable[str] = (), ambient: bool = False
) -> SpecOption:
    """Add and drop capabilities.

    A name by itself counts more than `ALL`, and a name that is added more than the same one dropped.

    >>> from libcontainerd import oci
    >>> option = oci.with_capabilities(drop=["ALL"], add=["NET_BIND_SERVICE", "cap_chown"])
    >>> oci.build(oci.default_spec(), option).process.capabilities.bounding
    ['CAP_CHOWN', 'CAP_NET_BIND_SERVICE']

    Args:
        add: Names as in capabilities(7), with or without `CAP_`, in any case; `ALL` is every one that there
            is. They go to the bounding, permitted and effective sets. A runtime that lacks one itself, as
            in a container, cannot give it.
        drop: Names in the same way; they go from all five sets.
        ambient: Put what is added into the inheritable and ambient sets as well, so that a user other than
            root has it too.

    Raises:
        InvalidParameterError: for a name that Linux does not know: the runtime would only log it.
    """
    add_all, added = _capabilities(add)
    drop_all, dropped = _capabilities(drop)
    raised = added | (set(_CAPABILITIES) - dropped if add_all else set())
    lowered = set(_CAPABILITIES) if drop_all else dropped

    def edit(spec: Spec) -> None:
        process = process_of(spec)
        capabilities = process.capabilities or LinuxCapabilities()
        for name in ("bounding", "effective", "permitted", "inheritable", "ambient"):
            present: list[str] | None = getattr(capabilities, name)
            more = raised if ambient or name in ("bounding", "effective", "permitted") else set()
            if present is not None or more:
                setattr(capabilities, name, sorted(set(texts(present)) - lowered | more))
        process.capabilities = capabilities

    return Option("with_capabilities", edit)


def _capabilities(names: Iterable[str]) -> tuple[bool, set[str]]:
    """Give whether ALL is among the names, and the full names of the others."""
    if isinstance(names, str):
        raise InvalidParameterError(f"with_capabilities: give a list of names, not the string {names!r}")
    everything = False
    found: set[str] = set()
    for name in names:
        full = str(name).upper()
        if full == "ALL":
            everything = True
            continue
        full = full if full.startswith("CAP_") else f"CAP_{full}"
        if full not in _CAPABILITIES:
            raise InvalidParameterError(f"with_capabilities: Linux has no capability {name!r}")
        found.add(full)
    return everything, found


def with_no_new_privileges(enabled: bool = True) -> SpecOption:
    """Say whether programs in the container may gain privileges by set-user-id bits and file capabilities.

    `default_spec` forbids it. Where `sudo` or `su` must work in the container, pass False.

    >>> from libcontainerd import oci
    >>> oci.build(oci.default_spec(), oci.with_no_new_privileges(False)).process.no_new_privileges
    False
    """

    def edit(spec: Spec) -> None:
        process_of(spec).no_new_privileges = enabled

    return Option("with_no_new_privileges", edit)


def with_rlimit(kind: str, soft: int, hard: int | None = None) -> SpecOption:
    """Set a resource limit of the process.

    >>> from libcontainerd import oci
    >>> oci.build(oci.default_spec(), oci.with_rlimit("NOFILE", 4096)).process.rlimits
    [POSIXRlimit(type='RLIMIT_NOFILE', hard=4096, soft=4096)]

    Args:
        kind: A name as in setrlimit(2), with or without `RLIMIT_`, in any case.
        soft: The limit in force, in the unit of its kind; 2**64-1 is none.
        hard: How far the process may raise it; as `soft` if None.

    Raises:
        InvalidParameterError: for a kind that Linux does not know, or a soft limit above the hard one.
    """
    name = str(kind).upper()
    name = name if name.startswith("RLIMIT_") else f"RLIMIT_{name}"
    if name not in _RLIMITS:
        raise InvalidParameterError(f"with_rlimit: Linux has no resource limit {kind!r}")
    ceiling = soft if hard is None else hard
    if soft > ceiling:
        raise InvalidParameterError(f"with_rlimit: the soft limit {soft} is above the hard limit {ceiling}")

    def edit(spec: Spec) -> None:
        process = process_of(spec)
        others = [limit for limit in process.rlimits or () if _kind(limit) != name]
        process.rlimits = [*others, POSIXRlimit(type=name, hard=ceiling, soft=soft)]

    return Option("with_rlimit", edit)


def _kind(limit: POSIXRlimit | None) -> str | None:
    return limit.type if limit is not None else None


def exec_process(spec: Spec, *args: str) -> Process:
    """Make the process of an exec: as the container's own, but for the program.

    >>> from libcontainerd import oci
    >>> spec = oci.build(oci.default_spec(), oci.with_terminal(), oci.with_cwd("/srv"))
    >>> process = oci.exec_process(spec, "ps", "-o", "pid")
    >>> process.args, process.cwd, process.terminal
    (['ps', '-o', 'pid'], '/srv', False)

    Args:
        spec: The container's spec.
        *args: The program and its arguments.

    Returns:
        A new process without a terminal, for the caller to change further.

    Raises:
        InvalidParameterError: if there are no arguments, or the spec is not valid.
    """
    process = process_of(with_args(*args)(spec))
    process.terminal = False
    # Only a terminal has a size, and one that is asked for later should not begin with another's.
    unset(process, "console_size")
    return process
