"""The sections of other platforms, as far as Go's decoder and the schema have an opinion of them.

A spec keeps these sections as the plain objects they are; these models only check them. They are imported
when a spec has such a section, which on Linux is next to never.
"""

from __future__ import annotations

from typing import Annotated

from libcontainerd.oci._base import (
    REQUIRED,
    AnyJSON,
    Array,
    Int64,
    Model,
    Rule,
    UInt16,
    UInt32,
    UInt64,
)


class SolarisCappedCPU(Model):
    """A cap on CPUs."""

    ncpus: str | None = None


class SolarisCappedMemory(Model):
    """A cap on memory."""

    physical: str | None = None
    swap: str | None = None


class SolarisAnet(Model):
    """A network interface that the zone gets by itself."""

    linkname: str | None = None
    lower_link: str | None = None
    allowed_address: str | None = None
    configure_allowed_address: str | None = None
    defrouter: str | None = None
    link_protection: str | None = None
    mac_address: str | None = None


class Solaris(Model):
    """The solaris section."""

    milestone: str | None = None
    limitpriv: str | None = None
    max_shm_memory: str | None = None
    anet: Array[SolarisAnet] | None = None
    capped_cpu: SolarisCappedCPU | None = None
    capped_memory: SolarisCappedMemory | None = None


class WindowsDevice(Model):
    """A device to share with the container."""

    id: Annotated[str | None, REQUIRED] = None
    id_type: Annotated[str | None, Rule(required=True, one_of=("class",))] = None


class WindowsMemory(Model):
    """A memory limit in bytes."""

    limit: UInt64 | None = None


class WindowsCPU(Model):
    """CPU limits."""

    count: UInt64 | None = None
    shares: UInt16 | None = None
    maximum: UInt16 | None = None
    # An object in the schema but an array in Go's type, so neither is held against it.
    affinity: AnyJSON = None


class WindowsStorage(Model):
    """Storage limits."""

    iops: UInt64 | None = None
    bps: UInt64 | None = None
    sandbox_size: UInt64 | None = None


class WindowsResources(Model):
    """Resource limits."""

    memory: WindowsMemory | None = None
    cpu: WindowsCPU | None = None
    storage: WindowsStorage | None = None


class WindowsNetwork(Model):
    """Network settings."""

    endpoint_list: Array[str] | None = None
    allow_unqualified_dns_query: bool | None = None
    dns_search_list: Array[str] | None = None
    network_shared_container_name: str | None = None
    network_namespace: str | None = None


class WindowsHyperV(Model):
    """Settings of Hyper-V isolation."""

    utility_vm_path: str | None = None


class Windows(Model):
    """The windows section."""

    layer_folders: Annotated[Array[str] | None, Rule(required=True, min_items=1)] = None
    devices: Array[WindowsDevice] | None = None
    resources: WindowsResources | None = None
    credential_spec: AnyJSON = None
    servicing: bool | None = None
    ignore_flushes_during_boot: bool | None = None
    hyperv: WindowsHyperV | None = None
    network: WindowsNetwork | None = None


class VMHypervisor(Model):
    """The hypervisor to run."""

    path: Annotated[str | None, REQUIRED] = None
    parameters: Array[str] | None = None


class VMKernel(Model):
    """The kernel to boot."""

    path: Annotated[str | None, REQUIRED] = None
    parameters: Array[str] | None = None
    initrd: str | None = None


class VMImage(Model):
    """The image of the root disk."""

    path: Annotated[str | None, REQUIRED] = None
    format: Annotated[str | None, Rule(required=True, one_of=("raw", "qcow2", "vdi", "vmdk", "vhd"))] = None


class VMIOMem(Model):
    """A range of I/O memory given to the machine."""

    first_gfn: UInt64 | None = None
    first_mfn: Annotated[UInt64 | None, REQUIRED] = None
    nr_mfns: Annotated[UInt64 | None, REQUIRED] = None


class VMHWConfig(Model):
    """The machine's hardware."""

    device_tree: str | None = None
    vcpus: UInt32 | None = None
    memory: UInt64 | None = None
    dtdevs: Array[str] | None = None
    iomems: Array[VMIOMem] | None = None
    irqs: Array[UInt32] | None = None


class VM(Model):
    """The vm section."""

    hypervisor: VMHypervisor | None = None
    kernel: Annotated[VMKernel | None, REQUIRED] = None
    image: VMImage | None = None
    hw_config: VMHWConfig | None = None


class ZOSNamespace(Model):
    """A namespace to make or join."""

    type: Annotated[str | None, Rule(required=True, one_of=("mount", "pid", "uts", "ipc"))] = None
    path: str | None = None


class ZOS(Model):
    """The zos section."""

    namespaces: Array[ZOSNamespace] | None = None


class FreeBSDDevice(Model):
    """A device to show in the jail."""

    path: str | None = None
    mode: Annotated[UInt32 | None, Rule(minimum=0, maximum=0o777)] = None


class FreeBSDJailAllow(Model):
    """What the jail may do."""

    set_hostname: bool | None = None
    raw_sockets: bool | None = None
    chflags: bool | None = None
    mount: Array[str] | None = None
    quotas: bool | None = None
    socket_af: bool | None = None
    mlock: bool | None = None
    reserved_ports: bool | None = None
    suser: bool | None = None


_SHARING = Rule(one_of=("disable", "new", "inherit"))
_NEW_OR_INHERIT = Rule(one_of=("new", "inherit"))


class FreeBSDJail(Model):
    """The jail's settings."""

    parent: str | None = None
    host: Annotated[str | None, _NEW_OR_INHERIT] = None
    ip4: Annotated[str | None, _SHARING] = None
    ip4_addr: Array[str] | None = None
    ip6: Annotated[str | None, _SHARING] = None
    ip6_addr: Array[str] | None = None
    vnet: Annotated[str | None, _NEW_OR_INHERIT] = None
    interface: str | None = None
    vnet_interfaces: Array[str] | None = None
    sysvmsg: Annotated[str | None, _SHARING] = None
    sysvsem: Annotated[str | None, _SHARING] = None
    sysvshm: Annotated[str | None, _SHARING] = None
    enforce_statfs: Annotated[Int64 | None, Rule(minimum=0, maximum=255)] = None
    allow: FreeBSDJailAllow | None = None


class FreeBSD(Model):
    """The freebsd section."""

    devices: Array[FreeBSDDevice] | None = None
    jail: FreeBSDJail | None = None


SECTIONS: dict[str, type[Model]] = {
    "solaris": Solaris,
    "windows": Windows,
    "vm": VM,
    "zos": ZOS,
    "freebsd": FreeBSD,
}
