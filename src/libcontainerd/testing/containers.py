"""The containers service: metadata and specs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import grpc

from libcontainerd._wire.pb.events import container_pb2 as container_events
from libcontainerd._wire.pb.services.containers_pb2 import (
    Container,
    ContainersServicer,
    CreateContainerRequest,
    CreateContainerResponse,
    DeleteContainerRequest,
    GetContainerRequest,
    GetContainerResponse,
    ListContainerMessage,
    ListContainersRequest,
    ListContainersResponse,
    UpdateContainerRequest,
    UpdateContainerResponse,
)
from libcontainerd._wire.pb.wellknown_pb2 import Empty
from libcontainerd.testing.filters import FilterError, Filters, fields
from libcontainerd.testing.refusals import (
    Refusal,
    already_exists,
    check_labels,
    identifier_fault,
    invalid_argument,
    namespace_of,
    not_found,
)
from libcontainerd.testing.store import check_label_keys, set_masked_labels
from libcontainerd.testing.timestamps import stamp

if TYPE_CHECKING:
    from libcontainerd.testing.exchange import Exchange
    from libcontainerd.testing.releases import Release
    from libcontainerd.testing.store import Store

_ALL_PATHS: Final = ("labels", "image", "spec", "extensions", "snapshotkey")


def parse_filters(texts: Sequence[str]) -> Filters:
    """Parse a list request's filters.

    Raises:
        Refusal: one does not parse.
    """
    try:
        return Filters(texts)
    except FilterError as error:
        raise invalid_argument(str(error)) from error


def find_container(store: Store, namespace: str, container_id: str) -> Container:
    """A container's record.

    Raises:
        Refusal: there is none.
    """
    with store.lock:
        container = store.space(namespace).containers.get(container_id)
        if container is None:
            raise not_found(f'container "{container_id}" in namespace "{namespace}"')
        return container


def _check(container: Container, doing: str, release: Release) -> None:
    if fault := identifier_fault(container.id):
        raise invalid_argument(f"{doing} failed validation: container.ID: {fault}")
    if "" in container.extensions:
        raise invalid_argument(f"{doing} failed validation: container.Extension keys must not be zero-length")
    try:
        check_labels(container.labels, "containers")
    except Refusal as refusal:
        raise refusal.within(f"{doing} failed validation: ") from refusal
    if not container.runtime.name:
        raise invalid_argument(f"{doing} failed validation: container.Runtime.Name must be set")
    if release.wants_spec and not container.HasField("spec"):
        raise invalid_argument(f"{doing} failed validation: container.Spec must be set")
    if container.snapshot_key and not container.snapshotter:
        raise invalid_argument(
            f"{doing} failed validation: container.Snapshotter must be set if container.SnapshotKey is set"
        )


class Containers(ContainersServicer):
    """The containers service."""

    def __init__(self, store: Store, exchange: Exchange) -> None:
        self._store = store
        self._exchange = exchange

    def Create(
        self, request: CreateContainerRequest, context: grpc.ServicerContext
    ) -> CreateContainerResponse:
        """Keep a container's metadata."""
        namespace = namespace_of(context)
        container = Container()
        container.CopyFrom(request.container)
        _check(container, "create container", self._store.release)
        check_label_keys(container.labels, f'failed to write container "{container.id}"')
        with self._store.lock:
            space = self._store.make_space(namespace)
            if container.id in space.containers:
                raise already_exists(f'container "{container.id}"')
            container.created_at.CopyFrom(stamp(self._store.clock()))
            container.updated_at.CopyFrom(container.created_at)
            space.containers[container.id] = container
        self._exchange.publish(
            namespace,
            "/containers/create",
            container_events.ContainerCreate(
                id=container.id,
                image=container.image,
                runtime=container_events.ContainerCreate.Runtime(
                    name=container.runtime.name,
                    options=container.runtime.options if container.runtime.HasField("options") else None,
                ),
            ),
        )
        return CreateContainerResponse(container=container)

    def Get(self, request: GetContainerRequest, context: grpc.ServicerContext) -> GetContainerResponse:
        """Look a container up."""
        return GetContainerResponse(container=find_container(self._store, namespace_of(context), request.id))

    def _list(self, request: ListContainersRequest, context: grpc.ServicerContext) -> list[Container]:
        namespace = namespace_of(context)
        filters = parse_filters(request.filters)
        with self._store.lock:
            containers = sorted(self._store.space(namespace).containers.items())
        return [
            container
            for _, container in containers
            if filters.match(
                fields(
                    {"id": container.id, "image": container.image, "runtime.name": container.runtime.name},
                    container.labels,
                )
            )
        ]

    def List(self, request: ListContainersRequest, context: grpc.ServicerContext) -> ListContainersResponse:
        """List a namespace's containers."""
        return ListContainersResponse(containers=self._list(request, context))

    def ListStream(
        self, request: ListContainersRequest, context: grpc.ServicerContext
    ) -> Iterator[ListContainerMessage]:
        """List a namespace's containers, one by one."""
        for container in self._list(request, context):
            yield ListContainerMessage(container=container)

    def Update(
        self, request: UpdateContainerRequest, context: grpc.ServicerContext
    ) -> UpdateContainerResponse:
        """Change what a field mask names, or everything that may change."""
        namespace = namespace_of(context)
        source = request.container
        if not source.id:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "Container.ID required")
        with self._store.lock:
            space = self._store.space(namespace)
            if source.id not in space.containers:
                raise not_found(f'container "{source.id}"')
            target = Container()
            target.CopyFrom(space.containers[source.id])
            paths = list(request.update_mask.paths)
            if not paths:
                _check_immutable(target, source)
                paths = list(_ALL_PATHS)
            for path in set_masked_labels(
                target.labels, source.labels, paths, "update failed validation: containers"
            ):
                _set(target, source, path)
            _check(target, "update", self._store.release)
            target.updated_at.CopyFrom(stamp(self._store.clock()))
            space.containers[source.id] = target
        self._exchange.publish(
            namespace,
            "/containers/update",
            container_events.ContainerUpdate(
                id=target.id, image=target.image, labels=target.labels, snapshot_key=target.snapshot_key
            ),
        )
        return UpdateContainerResponse(container=target)

    def Delete(self, request: DeleteContainerRequest, context: grpc.ServicerContext) -> Empty:
        """Forget a container, also one whose task runs: that task is then out of reach."""
        namespace = namespace_of(context)
        with self._store.lock:
            if self._store.space(namespace).containers.pop(request.id, None) is None:
                raise not_found(f"container {request.id}")
        self._exchange.publish(
            namespace, "/containers/delete", container_events.ContainerDelete(id=request.id)
        )
        return Empty()


def _check_immutable(target: Container, source: Container) -> None:
    if source.snapshotter != target.snapshotter:
        raise invalid_argument("container.Snapshotter field is immutable")
    if source.runtime.name != target.runtime.name:
        raise invalid_argument("container.Runtime.Name field is immutable")


def _set(target: Container, source: Container, path: str) -> None:
    if path == "image":
        target.image = source.image
    elif path == "spec":
        target.ClearField("spec")
        if source.HasField("spec"):
            target.spec.CopyFrom(source.spec)
    elif path == "snapshotkey":
        target.snapshot_key = source.snapshot_key
    elif path == "extensions":
        target.extensions.clear()
        for key, value in source.extensions.items():
            target.extensions[key].CopyFrom(value)
    elif path.startswith("extensions."):
        key = path.removeprefix("extensions.")
        target.extensions[key].CopyFrom(source.extensions[key])
    else:
        raise invalid_argument(f'cannot update "{path}" field on "{target.id}"')
