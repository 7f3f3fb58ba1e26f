"""The documents of the runtime-spec: the spec itself, and the state that a runtime reports."""

from __future__ import annotations

from typing import Annotated

from libcontainerd.oci._base import REQUIRED, AnyObject, Array, Int64, Map, Model, Rule
from libcontainerd.oci._model_linux import Linux, LinuxIDMapping
from libcontainerd.oci._model_process import Hooks, Process

# Sections that a spec keeps as plain objects.
PLATFORMS = frozenset(("solaris", "windows", "vm", "zos", "freebsd"))


class Root(Model):
    """The root filesystem: a directory on the host, relative to the bundle unless absolute."""

    path: Annotated[str | None, REQUIRED] = None
    readonly: bool | None = None


class Mount(Model):
    """A mount in the container. Options are those of mount(8); id mappings are for idmapped mounts."""

    destination: Annotated[str | None, REQUIRED] = None
    type: str | None = None
    source: str | None = None
    options: Array[str] | None = None
    uid_mappings: Array[LinuxIDMapping] | None = None
    gid_mappings: Array[LinuxIDMapping] | None = None


class Spec(Model):
    """A container's configuration: the `config.json` of a bundle.

    The sections of other platforms are kept as the plain JSON objects they are.
    """

    oci_version: Annotated[str | None, REQUIRED] = None
    process: Process | None = None
    root: Root | None = None
    hostname: str | None = None
    domainname: str | None = None
    mounts: Array[Mount] | None = None
    hooks: Hooks | None = None
    annotations: Map[str] | None = None
    linux: Linux | None = None
    solaris: AnyObject | None = None
    windows: AnyObject | None = None
    vm: AnyObject | None = None
    zos: AnyObject | None = None
    freebsd: AnyObject | None = None


class State(Model):
    """What a runtime says of a container. `pid` is unset when nothing runs."""

    oci_version: Annotated[str | None, REQUIRED] = None
    id: Annotated[str | None, REQUIRED] = None
    status: Annotated[
        str | None, Rule(required=True, one_of=("creating", "created", "running", "stopped"))
    ] = None
    pid: Annotated[Int64 | None, Rule(minimum=0)] = None
    bundle: Annotated[str | None, REQUIRED] = None
    annotations: Map[str] | None = None
