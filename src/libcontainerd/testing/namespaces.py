"""The namespaces service."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from libcontainerd._wire.pb.events import namespace_pb2 as namespace_events
from libcontainerd._wire.pb.services.namespaces_pb2 import (
    CreateNamespaceRequest,
    CreateNamespaceResponse,
    DeleteNamespaceRequest,
    GetNamespaceRequest,
    GetNamespaceResponse,
    ListNamespacesRequest,
    ListNamespacesResponse,
    Namespace,
    NamespacesServicer,
    UpdateNamespaceRequest,
    UpdateNamespaceResponse,
)
from libcontainerd._wire.pb.wellknown_pb2 import Empty
from libcontainerd.testing.refusals import (
    Refusal,
    already_exists,
    check_labels,
    failed_precondition,
    identifier_fault,
    invalid_argument,
    namespace_in,
    not_found,
)
from libcontainerd.testing.store import set_labels, set_masked_labels

if TYPE_CHECKING:
    from libcontainerd.testing.exchange import Exchange
    from libcontainerd.testing.store import Store


def _publisher_in(context: grpc.ServicerContext) -> str:
    """The namespace in which a change is told: the caller's, not the one that is changed.

    Raises:
        Refusal: the caller names none. The change was made all the same.
    """
    namespace = namespace_in(context)
    if not namespace:
        text = "failed publishing event: namespace is required: failed precondition"
        raise Refusal(grpc.StatusCode.UNKNOWN, text)
    return namespace


def _check_name(name: str) -> None:
    if fault := identifier_fault(name):
        raise invalid_argument(fault)


class Namespaces(NamespacesServicer):
    """The namespaces service. What is only asked needs no namespace in the header."""

    def __init__(self, store: Store, exchange: Exchange) -> None:
        self._store = store
        self._exchange = exchange

    def Get(self, request: GetNamespaceRequest, context: grpc.ServicerContext) -> GetNamespaceResponse:  # noqa: ARG002 - gRPC's form
        """Give a namespace's labels; one that does not exist has none."""
        with self._store.lock:
            return GetNamespaceResponse(
                namespace=Namespace(name=request.name, labels=self._store.space(request.name).labels)
            )

    def List(self, request: ListNamespacesRequest, context: grpc.ServicerContext) -> ListNamespacesResponse:  # noqa: ARG002 - gRPC's form
        """List the namespaces; 1.6 does not look at the filter."""
        with self._store.lock:
            return ListNamespacesResponse(
                namespaces=[Namespace(name=name, labels=space.labels) for name, space in self._store.spaces()]
            )

    def Create(
        self,
        request: CreateNamespaceRequest,
        context: grpc.ServicerContext,
    ) -> CreateNamespaceResponse:
        """Make a namespace."""
        namespace = request.namespace
        _check_name(namespace.name)
        check_labels(namespace.labels, "namespace")
        with self._store.lock:
            if self._store.has_space(namespace.name):
                raise already_exists(f'namespace "{namespace.name}"')
            set_labels(self._store.make_space(namespace.name).labels, namespace.labels, "namespace")
        self._exchange.publish(
            self._told_in(namespace.name, context),
            "/namespaces/create",
            namespace_events.NamespaceCreate(name=namespace.name, labels=namespace.labels),
        )
        return CreateNamespaceResponse(namespace=namespace)

    def _told_in(self, changed: str, context: grpc.ServicerContext) -> str:
        return changed if self._store.release.spaces_tell_themselves else _publisher_in(context)

    def Update(
        self,
        request: UpdateNamespaceRequest,
        context: grpc.ServicerContext,
    ) -> UpdateNamespaceResponse:
        """Change labels, one by one with a field mask or all of them without. 1.6 answers with nothing in it."""
        source = request.namespace
        paths = list(request.update_mask.paths)
        for path in paths:
            if not path.startswith("labels."):
                raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f'cannot update "{path}" field')
        with self._store.lock:
            if not self._store.has_space(source.name):
                raise not_found(f'namespace "{source.name}"')
            labels = self._store.space(source.name).labels
            try:
                set_masked_labels(labels, source.labels, paths or ["labels"], "namespace")
            except Refusal as refusal:  # of this call alone containerd does not translate the error
                raise refusal.within("", grpc.StatusCode.UNKNOWN) from refusal
        self._exchange.publish(
            self._told_in(source.name, context),
            "/namespaces/update",
            namespace_events.NamespaceUpdate(name=source.name, labels=source.labels),
        )
        return UpdateNamespaceResponse(namespace=Namespace())

    def Delete(self, request: DeleteNamespaceRequest, context: grpc.ServicerContext) -> Empty:  # noqa: ARG002 - gRPC's form
        """Remove a namespace that is empty."""
        with self._store.lock:
            _check_name(request.name)
            if not self._store.has_space(request.name):
                raise not_found(f'namespace "{request.name}"')
            if left := self._store.space(request.name).contents():
                raise failed_precondition(
                    f'namespace "{request.name}" must be empty, but it still has {", ".join(left)}'
                )
            self._store.drop_space(request.name)
        self._exchange.publish(
            request.name, "/namespaces/delete", namespace_events.NamespaceDelete(name=request.name)
        )
        return Empty()
