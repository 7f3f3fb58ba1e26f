"""What containerd is told of a container beside its spec: labels, runc's options, and whose the stdio is."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError, Message

from libcontainerd._bundle import BUNDLE_LABEL, LABEL_BYTES
from libcontainerd._records import SpecFacts
from libcontainerd._wire import typeurl
from libcontainerd._wire.identifiers import is_text
from libcontainerd._wire.pb.runc.linux_pb2 import CreateOptions, RuncOptions
from libcontainerd._wire.pb.runc.options_pb2 import Options
from libcontainerd.errors import InvalidParameterError, SystemFailureError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from libcontainerd import oci
    from libcontainerd._wire.pb.services import containers_pb2
    from libcontainerd._wire.pb.wellknown_pb2 import Any

_NO_PIVOT_ROOT: Final = "DOCKER_RAMDISK"
"""The environment variable that says the root file system is a ramdisk, which pivot_root cannot leave."""

KEEP_LABEL: Final = "libcontainerd/keep.exits"
"""On a container whose exit containerd is to keep (`_keeping`), and on the record that sees to it."""

_NO_ID: Final = (1 << 32) - 1
_SHOWN: Final = 40

_V1_LINUX: Final = "io.containerd.runtime.v1.linux"
"""containerd's first shim for runc, in its releases before 2.0: it has messages of its own for the same options."""

_RUNC: Final = re.compile(r"io\.containerd\.(runc\.v[12]|runtime\.v1\.linux)")


def check_runtime(runtime: str) -> None:
    """Refuse what is no name of a shim.

    Raises:
        InvalidParameterError: it is empty, or no string of valid Unicode.
    """
    if not runtime or not is_text(runtime):
        raise InvalidParameterError(
            f"a runtime is a shim's name, such as io.containerd.runc.v2, not {runtime!r}"
        )


def is_runc(runtime: str) -> bool:
    """Whether it is one of containerd's own shims for runc, which all keep stdio in one way."""
    return _RUNC.fullmatch(runtime) is not None


def options_for(
    runtime: str, options: Message | Mapping[str, object] | None, defaults: Options | None
) -> Options | None:
    """Read a user's runc options, on top of a client's own for containers of runc's shim.

    Raises:
        InvalidParameterError: as `read_runtime_options`.
    """
    read = read_runtime_options(options)
    if defaults is None or not is_runc(runtime):
        return read
    both = Options()
    both.CopyFrom(defaults)
    if read is not None:
        both.MergeFrom(read)
    return both


def with_own_cgroup(spec: oci.Spec, namespace: str, container_id: str, options: Options | None) -> oci.Spec:
    """Give a spec that names no cgroup one of its own: in a copy, which shares the rest with the spec.

    runc would name it by the container's id alone, and containers of one id in two namespaces would share it: their limits,
    and being paused. An empty path in the spec asks for just that; who is not root has no cgroup to give; and systemd has
    names of its own.
    """
    systemd = options is not None and options.systemd_cgroup
    if spec.linux is not None and spec.linux.cgroups_path is None and not systemd and os.geteuid() == 0:
        # No directory of the namespace's, as ctr makes one: nobody would remove it.
        linux = spec.linux.model_copy(update={"cgroups_path": f"/{container_id}@{namespace}"})
        return spec.model_copy(update={"linux": linux})
    return spec


def read_runtime_options(options: Message | Mapping[str, object] | None) -> Options | None:
    """Read a user's runc options: a message of any copy of containerd's API, or a mapping of its fields.

    Raises:
        InvalidParameterError: it is another message, an unknown field, or a value of the wrong type.
    """
    if options is None:
        return None
    if isinstance(options, Message):
        name = Options.DESCRIPTOR.full_name
        if options.DESCRIPTOR.full_name != name:
            raise InvalidParameterError(
                f"runtime_options: want a {name}, not a {options.DESCRIPTOR.full_name}"
            )
        try:
            return Options.FromString(options.SerializeToString())
        except DecodeError as error:
            raise InvalidParameterError(f"runtime_options: {error}") from error
    fields = {field.name for field in Options.DESCRIPTOR.fields}
    read = Options()
    for name, value in options.items():
        if name not in fields:
            raise InvalidParameterError(
                f"runtime_options: no field {name!r}; there are {', '.join(sorted(fields))}"
            )
        try:
            setattr(read, name, value)
        except (TypeError, ValueError) as error:
            raise InvalidParameterError(f"runtime_options: {name}: {error}") from error
    return read


def container_options(runtime: str, options: Options | None) -> Any | None:
    """A container's options as its shim reads them; None where there are none."""
    if options is None or runtime != _V1_LINUX:
        return None if options is None else typeurl.pack(options)
    return typeurl.pack(
        RuncOptions(
            runtime=options.binary_name, runtime_root=options.root, systemd_cgroup=options.systemd_cgroup
        )
    )


def task_options(options: Options | None, owner: tuple[int, int], runtime: str = "") -> Any | None:
    """The options of a task, or None where the container's own say it all.

    containerd takes a task's options instead of its container's, not on top of them. So what they have in common is
    said again.

    Args:
        options: The container's.
        owner: uid and gid of the container's root, to whom the process's pipes shall belong.
        runtime: The container's shim.
    """
    no_pivot_root = bool(os.environ.get(_NO_PIVOT_ROOT))
    if runtime == _V1_LINUX:
        return _v1_task_options(options or Options(), owner, no_pivot_root)
    if owner == (0, 0) and not no_pivot_root:
        return None
    told = Options()
    if options is not None:
        told.CopyFrom(options)
    told.io_uid, told.io_gid = owner
    told.no_pivot_root = told.no_pivot_root or no_pivot_root
    return typeurl.pack(told)


def _v1_task_options(options: Options, owner: tuple[int, int], no_pivot_root: bool) -> Any | None:
    """This shim takes some of what are a container's options elsewhere with the task alone."""
    told = CreateOptions(
        no_pivot_root=options.no_pivot_root or no_pivot_root,
        no_new_keyring=options.no_new_keyring,
        shim_cgroup=options.shim_cgroup,
        io_uid=owner[0],
        io_gid=owner[1],
        criu_image_path=options.criu_image_path,
        criu_work_path=options.criu_work_path,
    )
    # Where they can be spared: a containerd without this runtime would say that it does not know the message.
    return None if told == CreateOptions() else typeurl.pack(told)


def check_labels(labels: Mapping[str, str]) -> None:
    """Refuse labels that containerd would refuse (its ``labels.Validate``), and those that are this library's own.

    Raises:
        InvalidParameterError: one of them cannot be used.
    """
    for key, value in labels.items():
        try:
            size = len(key.encode()) + len(value.encode())
        except (AttributeError, UnicodeEncodeError) as error:
            raise InvalidParameterError(
                f"label {key!r}: keys and values are strings of valid Unicode"
            ) from error
        if not key:
            raise InvalidParameterError("a label's key must not be empty")
        if key in (BUNDLE_LABEL, KEEP_LABEL):
            raise InvalidParameterError(f"label {key!r} is this library's own")
        if size > LABEL_BYTES:
            raise InvalidParameterError(
                f"label {key[:80]!r}: key and value have more than {LABEL_BYTES} bytes together"
            )


def read_facts(container: containers_pb2.Container) -> SpecFacts:
    """Read what is to be remembered of a container that containerd has, past the spec's models, for which thousands are many.

    Raises:
        SystemFailureError: its spec or its options cannot be read.
    """
    doing = f"read the spec of container {container.id!r}"
    try:
        spec = typeurl.unpack_json(container.spec, typeurl.SPEC_URL)
        options = None
        if typeurl.is_a(container.runtime.options, Options):
            options = typeurl.unpack(container.runtime.options, Options)
        elif typeurl.is_a(container.runtime.options, RuncOptions):
            old = typeurl.unpack(container.runtime.options, RuncOptions)
            options = Options(
                binary_name=old.runtime, root=old.runtime_root, systemd_cgroup=old.systemd_cgroup
            )
    except typeurl.DecodeError as error:
        raise SystemFailureError(f"cannot {doing}: {error}") from error
    linux = _mapping(spec.get("linux"))
    owner = (0, 0)
    if any(_mapping(each).get("type") == "user" for each in _list(linux.get("namespaces"))):
        owner = (_host_root(linux.get("uidMappings"), doing), _host_root(linux.get("gidMappings"), doing))
    return SpecFacts(
        terminal=_mapping(spec.get("process")).get("terminal") is True,
        owner=owner,
        options=options,
        runtime=container.runtime.name,
        keeps_exits=KEEP_LABEL in container.labels,
    )


def _host_root(mappings: object, doing: str) -> int:
    for each in map(_mapping, _list(mappings)):
        if each.get("containerID", 0) == 0 and each.get("size", 0) != 0:
            host = each.get("hostID", 0)
            if not isinstance(host, int) or not 0 <= host < _NO_ID:
                raise SystemFailureError(f"cannot {doing}: there is no user {str(host)[:_SHOWN]}")
            return host
    return 0


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def mapped_root(spec: oci.Spec) -> tuple[int, int]:
    """The uid and gid on the host of the container's root: 0 and 0 without a user namespace."""
    if spec.linux is None or not any(each.type == "user" for each in spec.linux.namespaces or ()):
        return 0, 0
    return _host_id(spec.linux.uid_mappings), _host_id(spec.linux.gid_mappings)


def _host_id(mappings: Sequence[oci.LinuxIDMapping] | None) -> int:
    for each in mappings or ():
        first, size = each.container_id or 0, each.size or 0
        if first == 0 and size > 0:
            return each.host_id or 0
    return 0
