"""What containerd says of itself: version, introspection, and health."""

from __future__ import annotations

import os
import platform
import uuid
from typing import TYPE_CHECKING, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from libcontainerd._wire.pb.services import introspection_pb2
from libcontainerd._wire.pb.services.version_pb2 import VersionResponse, VersionServicer
from libcontainerd._wire.pb.types.platform_pb2 import Platform
from libcontainerd._wire.pb.wellknown_pb2 import Empty
from libcontainerd.testing.filters import FilterError, Filters, fields
from libcontainerd.testing.refusals import Refusal

if TYPE_CHECKING:
    from libcontainerd.testing.releases import Release

REVISION: Final = "libcontainerd-fake"
_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}

# Type, id, and whether it is tied to the platform: what 1.6.20 loads, as far as it is here.
_PLUGINS: Final = (
    ("io.containerd.content.v1", "content", False),
    ("io.containerd.snapshotter.v1", "native", True),
    ("io.containerd.snapshotter.v1", "overlayfs", True),
    ("io.containerd.metadata.v1", "bolt", False),
    ("io.containerd.event.v1", "exchange", False),
    ("io.containerd.service.v1", "introspection-service", False),
    ("io.containerd.service.v1", "containers-service", False),
    ("io.containerd.service.v1", "content-service", False),
    ("io.containerd.service.v1", "images-service", False),
    ("io.containerd.service.v1", "leases-service", False),
    ("io.containerd.service.v1", "namespaces-service", False),
    ("io.containerd.service.v1", "snapshots-service", False),
    ("io.containerd.runtime.v2", "task", True),
    ("io.containerd.service.v1", "tasks-service", False),
    ("io.containerd.grpc.v1", "introspection", False),
    ("io.containerd.grpc.v1", "containers", False),
    ("io.containerd.grpc.v1", "content", False),
    ("io.containerd.grpc.v1", "events", False),
    ("io.containerd.grpc.v1", "healthcheck", False),
    ("io.containerd.grpc.v1", "images", False),
    ("io.containerd.grpc.v1", "leases", False),
    ("io.containerd.grpc.v1", "namespaces", False),
    ("io.containerd.grpc.v1", "snapshots", False),
    ("io.containerd.grpc.v1", "tasks", False),
    ("io.containerd.grpc.v1", "version", False),
)


_SINCE_1_7: Final = (
    ("io.containerd.lease.v1", "manager", False),
    ("io.containerd.warning.v1", "deprecations", False),
)
_SHIM_OF_1_7: Final = ("io.containerd.runtime.v2", "shim", False)
# The leases' service became a plugin of its own kind.
_UNTIL_1_7: Final = (("io.containerd.service.v1", "leases-service"),)


class Version(VersionServicer):
    """The version service.

    Args:
        release: The containerd whose behaviour this is.
        isolated: Whether no process of this server touches the machine.
    """

    def __init__(self, release: Release, *, isolated: bool) -> None:
        self._version = release.version
        self._revision = REVISION if isolated else f"{REVISION}-unisolated"

    def Version(self, request: Empty, context: grpc.ServicerContext) -> VersionResponse:  # noqa: ARG002 - gRPC's form
        """Tell the version whose behaviour this is, and by the revision that it is not the real one."""
        return VersionResponse(version=self._version, revision=self._revision)


class Introspection(introspection_pb2.IntrospectionServicer):
    """The introspection service."""

    def __init__(self, release: Release) -> None:
        self._release = release
        self._plugins = [
            plugin for plugin in _PLUGINS if release.number < (2, 0) or plugin[:2] not in _UNTIL_1_7
        ]
        if release.number >= (1, 7):
            self._plugins += _SINCE_1_7
        if (1, 7) <= release.number < (2, 0):
            self._plugins.append(_SHIM_OF_1_7)
        self._uuid = str(uuid.uuid4())
        architecture = _ARCHITECTURES.get(platform.machine(), platform.machine())
        self._platform = Platform(os="linux", architecture=architecture)

    def Server(self, request: Empty, context: grpc.ServicerContext) -> introspection_pb2.ServerResponse:  # noqa: ARG002 - gRPC's form
        """Tell the server's own id, and since 1.7 of its process."""
        answer = introspection_pb2.ServerResponse(uuid=self._uuid)
        if self._release.tells_process:
            answer.pid = os.getpid()
            answer.pidns = os.stat("/proc/self/ns/pid").st_ino
        return answer

    def Plugins(
        self,
        request: introspection_pb2.PluginsRequest,
        context: grpc.ServicerContext,  # noqa: ARG002 - gRPC's form
    ) -> introspection_pb2.PluginsResponse:
        """List what is loaded."""
        try:
            filters = Filters(request.filters)
        except FilterError as error:
            text = f"{error}: invalid argument"
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT, text, since_2=f"invalid argument: {error}"
            ) from error
        return introspection_pb2.PluginsResponse(
            plugins=[
                introspection_pb2.Plugin(
                    type=kind, id=name, platforms=[self._platform] if tied else [], capabilities=[]
                )
                for kind, name, tied in self._plugins
                if filters.match(fields({"type": kind, "id": name}))
            ]
        )


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc] # grpc_health has no types
    """gRPC's health service: containerd serves it for the whole server only."""

    def Check(
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.ServicerContext,  # noqa: ARG002 - gRPC's form
    ) -> health_pb2.HealthCheckResponse:
        """Say that all is well."""
        if request.service:
            raise Refusal(grpc.StatusCode.NOT_FOUND, "unknown service")
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
