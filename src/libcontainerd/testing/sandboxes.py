"""The sandbox store: records of sandboxes, which containerd has since 1.7. Nothing here runs any."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from libcontainerd._wire.pb.services.sandbox_pb2 import (
    StoreCreateRequest,
    StoreCreateResponse,
    StoreDeleteRequest,
    StoreDeleteResponse,
    StoreGetRequest,
    StoreGetResponse,
    StoreListRequest,
    StoreListResponse,
    StoreServicer,
    StoreUpdateRequest,
    StoreUpdateResponse,
)
from libcontainerd._wire.pb.types.sandbox_pb2 import Sandbox
from libcontainerd.testing.containers import parse_filters
from libcontainerd.testing.filters import fields
from libcontainerd.testing.refusals import (
    Refusal,
    already_exists,
    identifier_fault,
    invalid_argument,
    namespace_of,
    not_found,
)
from libcontainerd.testing.store import set_masked_labels
from libcontainerd.testing.timestamps import stamp

if TYPE_CHECKING:
    from libcontainerd.testing.store import Store


def _check(record: Sandbox) -> None:
    """Refuse what makes the real one panic, which ends it for everybody (1.7.24 and 2.1.9)."""
    if not record.HasField("runtime"):
        raise Refusal(grpc.StatusCode.UNAVAILABLE, "Socket closed")


def _find(records: dict[str, Sandbox], name: str) -> Sandbox:
    record = records.get(name)
    if record is None:
        raise not_found(f'bucket "{name}" not found')
    return record


class Sandboxes(StoreServicer):
    """The sandbox store's service."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def Create(self, request: StoreCreateRequest, context: grpc.ServicerContext) -> StoreCreateResponse:
        """Keep a record."""
        namespace = namespace_of(context)
        _check(request.sandbox)
        name = request.sandbox.sandbox_id
        if fault := identifier_fault(name):
            raise invalid_argument(f"failed to validate sandbox: invalid sandbox ID: {fault}")
        with self._store.lock:
            space = self._store.make_space(namespace)
            if space.sandboxes is None:
                space.sandboxes = {}
            if name in space.sandboxes:
                raise already_exists(f'write error: sandbox bucket "{name}" already exists')
            now = stamp(self._store.clock())
            record = Sandbox()
            record.CopyFrom(request.sandbox)
            record.created_at.CopyFrom(now)
            record.updated_at.CopyFrom(now)
            space.sandboxes[name] = record
        return StoreCreateResponse(sandbox=record)

    def Update(self, request: StoreUpdateRequest, context: grpc.ServicerContext) -> StoreUpdateResponse:
        """Change a record: the labels that are named, or all of it that can be changed."""
        _check(request.sandbox)
        with self._store.lock:
            records = self._records(context)
            record = Sandbox()
            record.CopyFrom(_find(records, request.sandbox.sandbox_id))
            labels = dict(record.labels)
            set_masked_labels(labels, request.sandbox.labels, request.fields or ["labels"], "sandboxes")
            record.labels.clear()
            record.labels.update(labels)
            record.updated_at.CopyFrom(stamp(self._store.clock()))
            records[record.sandbox_id] = record
        return StoreUpdateResponse(sandbox=record)

    def Delete(self, request: StoreDeleteRequest, context: grpc.ServicerContext) -> StoreDeleteResponse:
        """Forget a record."""
        with self._store.lock:
            records = self._records(context)
            if records.pop(request.sandbox_id, None) is None:
                name = f'failed to delete sandbox "{request.sandbox_id}"'
                if self._store.release.number < (2, 0):
                    raise Refusal(grpc.StatusCode.UNKNOWN, f"{name}: bucket not found")
                raise not_found(name)
        return StoreDeleteResponse()

    def List(self, request: StoreListRequest, context: grpc.ServicerContext) -> StoreListResponse:
        """List a namespace's records."""
        namespace = namespace_of(context)
        filters = parse_filters(request.filters)
        with self._store.lock:
            records = sorted((self._store.space(namespace).sandboxes or {}).items())
        return StoreListResponse(
            list=[each for name, each in records if filters.match(fields({"id": name}, each.labels))]
        )

    def Get(self, request: StoreGetRequest, context: grpc.ServicerContext) -> StoreGetResponse:
        """Give a record."""
        with self._store.lock:
            return StoreGetResponse(sandbox=_find(self._records(context), request.sandbox_id))

    def _records(self, context: grpc.ServicerContext) -> dict[str, Sandbox]:
        records = self._store.space(namespace_of(context)).sandboxes
        if records is None:
            raise not_found("no sandbox buckets")
        return records
