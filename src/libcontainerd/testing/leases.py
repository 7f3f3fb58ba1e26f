"""The leases service: what must not be collected. Nothing is, but at the end of a lease that is to be waited for."""

from __future__ import annotations

import base64
import secrets
from typing import TYPE_CHECKING

import grpc

from libcontainerd._wire.pb.services.leases_pb2 import (
    AddResourceRequest,
    CreateRequest,
    CreateResponse,
    DeleteRequest,
    DeleteResourceRequest,
    Lease,
    LeasesServicer,
    ListRequest,
    ListResourcesRequest,
    ListResourcesResponse,
    ListResponse,
    Resource,
)
from libcontainerd._wire.pb.wellknown_pb2 import Empty
from libcontainerd.testing.containers import parse_filters
from libcontainerd.testing.filters import fields
from libcontainerd.testing.refusals import (
    Refusal,
    already_exists,
    invalid_argument,
    is_digest,
    namespace_of,
    not_found,
    unimplemented,
)
from libcontainerd.testing.timestamps import stamp

if TYPE_CHECKING:
    from libcontainerd.testing.content import Content
    from libcontainerd.testing.store import Store


def _key(resource: Resource) -> tuple[str, str]:
    kind, separator, snapshotter = resource.type.partition("/")
    if kind in ("content", "ingests"):
        if separator:
            raise invalid_argument(f"invalid resource type {resource.type}")
        if kind == "content" and not is_digest(resource.id):
            raise invalid_argument(
                f"invalid content resource id {resource.id}: invalid checksum digest format"
            )
    elif kind == "snapshots":
        if not separator:
            raise invalid_argument(f"invalid snapshot resource type {resource.type}")
        if not snapshotter:  # the database has no bucket without a name
            raise Refusal(grpc.StatusCode.UNKNOWN, "bucket name required")
    else:
        raise unimplemented(f"resource type {resource.type} not supported yet: not implemented")
    return resource.type, resource.id


class Leases(LeasesServicer):
    """The leases service."""

    def __init__(self, store: Store, content: Content) -> None:
        self._store = store
        self._content = content

    def Create(self, request: CreateRequest, context: grpc.ServicerContext) -> CreateResponse:
        """Make a lease; one without an id gets one."""
        namespace = namespace_of(context)
        with self._store.lock:
            space = self._store.make_space(namespace)
            now = self._store.clock()
            name = (
                request.id or f"{now.microsecond}-{base64.urlsafe_b64encode(secrets.token_bytes(3)).decode()}"
            )
            if name in space.leases:
                raise already_exists(f'lease "{name}"')
            lease = Lease(id=name, created_at=stamp(now), labels=request.labels)
            space.leases[name] = lease
            space.leased[name] = set()
        return CreateResponse(lease=lease)

    def Delete(self, request: DeleteRequest, context: grpc.ServicerContext) -> Empty:
        """Give a lease up."""
        namespace = namespace_of(context)
        with self._store.lock:
            space = self._store.space(namespace)
            held = self._resources(namespace, request.id)
            del space.leases[request.id], space.leased[request.id]
            for kind, name in held:
                if kind == "ingests" and request.sync:
                    space.ingests.pop(name, None)
        if request.sync:
            self._content.collect(namespace)
        return Empty()

    def List(self, request: ListRequest, context: grpc.ServicerContext) -> ListResponse:
        """List a namespace's leases."""
        namespace = namespace_of(context)
        filters = parse_filters(request.filters)
        with self._store.lock:
            leases = sorted(self._store.space(namespace).leases.items())
        return ListResponse(
            leases=[lease for _, lease in leases if filters.match(fields({"id": lease.id}, lease.labels))]
        )

    def _resources(self, namespace: str, lease: str) -> set[tuple[str, str]]:
        resources = self._store.space(namespace).leased.get(lease)
        if resources is None:
            raise not_found(f'lease "{lease}"')
        return resources

    def AddResource(self, request: AddResourceRequest, context: grpc.ServicerContext) -> Empty:
        """Put something under a lease, whether it is there or not."""
        namespace = namespace_of(context)
        with self._store.lock:
            self._resources(namespace, request.id).add(_key(request.resource))
        return Empty()

    def DeleteResource(self, request: DeleteResourceRequest, context: grpc.ServicerContext) -> Empty:
        """Take something from under a lease."""
        namespace = namespace_of(context)
        with self._store.lock:
            self._resources(namespace, request.id).discard(_key(request.resource))
        return Empty()

    def ListResources(
        self, request: ListResourcesRequest, context: grpc.ServicerContext
    ) -> ListResourcesResponse:
        """List what is under a lease."""
        namespace = namespace_of(context)
        with self._store.lock:
            keys = sorted(self._resources(namespace, request.id))
        return ListResourcesResponse(resources=[Resource(type=kind, id=name) for kind, name in keys])
