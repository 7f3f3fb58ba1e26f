"""The features document of the runtime-spec: what a runtime says it can do."""

from __future__ import annotations

from typing import Annotated

from libcontainerd.oci._base import REQUIRED, Array, Map, Model, Rule
from libcontainerd.oci._model_linux import (
    NAMESPACE_TYPES,
    SECCOMP_ACTIONS,
    SECCOMP_ARCHITECTURES,
    SECCOMP_FLAGS,
    SECCOMP_OPERATORS,
)


class FeaturesCgroup(Model):
    """Which cgroup versions and drivers the runtime was built with; unset is unknown."""

    v1: bool | None = None
    v2: bool | None = None
    systemd: bool | None = None
    systemd_user: bool | None = None
    rdma: bool | None = None


class FeaturesSeccomp(Model):
    """What the runtime knows of seccomp; unset is unknown."""

    enabled: bool | None = None
    actions: Annotated[Array[str] | None, Rule(each=Rule(one_of=SECCOMP_ACTIONS))] = None
    operators: Annotated[Array[str] | None, Rule(each=Rule(one_of=SECCOMP_OPERATORS))] = None
    archs: Annotated[Array[str] | None, Rule(each=Rule(one_of=SECCOMP_ARCHITECTURES))] = None
    known_flags: Annotated[Array[str] | None, Rule(each=Rule(one_of=SECCOMP_FLAGS))] = None
    supported_flags: Annotated[Array[str] | None, Rule(each=Rule(one_of=SECCOMP_FLAGS))] = None


class FeaturesEnabled(Model):
    """Whether the runtime was built with a feature; unset is unknown."""

    enabled: bool | None = None


class FeaturesMountExtensions(Model):
    """Extensions of mounts that the runtime knows."""

    idmap: FeaturesEnabled | None = None


class FeaturesLinux(Model):
    """What a runtime can do on Linux."""

    namespaces: Annotated[Array[str] | None, Rule(each=Rule(one_of=NAMESPACE_TYPES))] = None
    capabilities: Annotated[Array[str] | None, Rule(each=Rule(pattern=r"CAP_[A-Z_]+"))] = None
    cgroup: FeaturesCgroup | None = None
    seccomp: FeaturesSeccomp | None = None
    apparmor: FeaturesEnabled | None = None
    selinux: FeaturesEnabled | None = None
    intel_rdt: FeaturesEnabled | None = None
    mount_extensions: FeaturesMountExtensions | None = None
    net_devices: FeaturesEnabled | None = None


class Features(Model):
    """What a runtime can do, and the versions of the specification that it reads."""

    oci_version_min: Annotated[str | None, REQUIRED] = None
    oci_version_max: Annotated[str | None, REQUIRED] = None
    hooks: Array[str] | None = None
    mount_options: Array[str] | None = None
    linux: FeaturesLinux | None = None
    annotations: Map[str] | None = None
    potentially_unsafe_config_annotations: Array[str] | None = None
