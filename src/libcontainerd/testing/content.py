"""The content service: blobs by digest, shared by all namespaces and seen only by those that wrote them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import grpc

from libcontainerd._wire.pb.events import content_pb2 as content_events
from libcontainerd._wire.pb.services import content_pb2
from libcontainerd._wire.pb.wellknown_pb2 import Empty
from libcontainerd.testing.filters import FilterError, Filters, fields
from libcontainerd.testing.objects import Blob, Ingest
from libcontainerd.testing.refusals import (
    Refusal,
    already_exists,
    check_labels,
    failed_precondition,
    invalid_argument,
    is_digest,
    lease_in,
    namespace_of,
    not_found,
)
from libcontainerd.testing.store import set_labels, set_masked_labels
from libcontainerd.testing.timestamps import stamp

if TYPE_CHECKING:
    from libcontainerd.testing.exchange import Exchange
    from libcontainerd.testing.store import Store

_ROOT_LABEL: Final = "containerd.io/gc.root"
_CONTENT_LABEL: Final = "containerd.io/gc.ref.content"
_READ_BYTES: Final = 1 << 20
_BAD_DIGEST: Final = "invalid checksum digest format"
_STAT: Final = content_pb2.WriteAction.STAT
_COMMIT: Final = content_pb2.WriteAction.COMMIT


def _filters(texts: Sequence[str]) -> Filters:
    try:
        return Filters(texts)
    except FilterError as error:
        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error


class Content(content_pb2.ContentServicer):
    """The content service."""

    def __init__(self, store: Store, exchange: Exchange) -> None:
        self._store = store
        self._exchange = exchange
        self._lock = threading.Lock()  # guards the dict; innermost, nothing is called while it is held
        self._data: dict[str, bytes] = {}

    def clear(self) -> None:
        """Forget every blob's bytes."""
        with self._lock:
            self._data.clear()

    # ---------------------------------------------------------------------------------------------- for other modules

    def write(self, namespace: str, data: bytes, lease: str, *, again: bool) -> str:
        """Keep a blob, under a lease if there is one, and give its digest.

        Raises:
            Refusal: it is there, and must not come `again`. The lease holds it all the same.
        """
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        with self._store.lock:
            space = self._store.make_space(namespace)
            if lease in space.leased:
                space.leased[lease].add(("content", digest))
            if digest in space.blobs and not again:
                raise already_exists(f"content {digest}")
        return self.add(namespace, data)

    def collect(self, namespace: str) -> None:
        """Forget a namespace's blobs that no lease, image or label leads to, as the garbage collector does."""
        with self._store.lock:
            space = self._store.space(namespace)
            reached = {name for held in space.leased.values() for kind, name in held if kind == "content"}
            reached |= {image.target.digest for image in space.images.values()}
            reached |= {digest for digest, blob in space.blobs.items() if _ROOT_LABEL in blob.labels}
            waiting = list(reached)
            while waiting:
                blob = space.blobs.get(waiting.pop())
                labels = {} if blob is None else blob.labels
                further = {digest for label, digest in labels.items() if label.startswith(_CONTENT_LABEL)}
                waiting += further - reached
                reached |= further
            gone = space.blobs.keys() - reached
            for digest in gone:
                del space.blobs[digest]
            gone -= {digest for _, each in self._store.spaces() for digest in each.blobs}
        with self._lock:
            for digest in gone:
                self._data.pop(digest, None)

    def add(self, namespace: str, data: bytes, labels: dict[str, str] | None = None) -> str:
        """Keep a blob, and give its digest."""
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        now = self._store.clock()
        with self._lock:
            self._data[digest] = data
        with self._store.lock:
            blobs = self._store.make_space(namespace).blobs
            blobs.setdefault(digest, Blob(digest, len(data), now, now, dict(labels or {})))
        if self._store.release.tells_new_content:
            self._exchange.publish(
                namespace, "/content/create", content_events.ContentCreate(digest=digest, size=len(data))
            )
        return digest

    def read(self, namespace: str, digest: str) -> bytes:
        """A blob's bytes.

        Raises:
            Refusal: the namespace has no such blob.
        """
        self._blob(namespace, digest)
        with self._lock:
            return self._data[digest]

    def _blob(self, namespace: str, digest: str) -> Blob:
        with self._store.lock:
            blob = self._store.space(namespace).blobs.get(digest)
        if blob is None:
            raise not_found(f"content digest {digest}")
        return blob

    # ------------------------------------------------------------------------------------------------------ what is there

    def Info(
        self, request: content_pb2.InfoRequest, context: grpc.ServicerContext
    ) -> content_pb2.InfoResponse:
        """Describe a blob."""
        if not is_digest(request.digest):
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f'"{request.digest}" failed validation')
        return content_pb2.InfoResponse(info=self._blob(namespace_of(context), request.digest).message())

    def Update(
        self, request: content_pb2.UpdateRequest, context: grpc.ServicerContext
    ) -> content_pb2.UpdateResponse:
        """Change a blob's labels."""
        digest = request.info.digest
        if not is_digest(digest):
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f'"{digest}" failed validation')
        namespace = namespace_of(context)
        blob = self._blob(namespace, digest)
        with self._store.lock:
            labels = dict(blob.labels)
            paths = list(request.update_mask.paths) or ["labels"]
            for path in set_masked_labels(labels, request.info.labels, paths, "info"):
                raise invalid_argument(f'cannot update "{path}" field on content info "{digest}"')
            blob.labels = labels
            blob.updated_at = self._store.clock()
            return content_pb2.UpdateResponse(info=blob.message())

    def List(
        self, request: content_pb2.ListContentRequest, context: grpc.ServicerContext
    ) -> Iterator[content_pb2.ListContentResponse]:
        """Describe the namespace's blobs."""
        namespace = namespace_of(context)
        filters = _filters(request.filters)
        with self._store.lock:
            blobs = sorted(self._store.space(namespace).blobs.items())
            found = [
                blob.message(listed=True)
                for digest, blob in blobs
                if filters.match(fields({"digest": digest}, blob.labels))
            ]
        if found:
            yield content_pb2.ListContentResponse(info=found)

    def Delete(self, request: content_pb2.DeleteContentRequest, context: grpc.ServicerContext) -> Empty:
        """Forget a blob in this namespace."""
        if not is_digest(request.digest):
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, _BAD_DIGEST)
        namespace = namespace_of(context)
        self._blob(namespace, request.digest)
        with self._store.lock:
            self._store.space(namespace).blobs.pop(request.digest, None)
            kept = any(request.digest in space.blobs for _, space in self._store.spaces())
        if not kept:
            with self._lock:
                self._data.pop(request.digest, None)
        self._exchange.publish(
            namespace, "/content/delete", content_events.ContentDelete(digest=request.digest)
        )
        return Empty()

    def Read(
        self, request: content_pb2.ReadContentRequest, context: grpc.ServicerContext
    ) -> Iterator[content_pb2.ReadContentResponse]:
        """Send a range of a blob; a size of 0 means to its end."""
        if not is_digest(request.digest):
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"{request.digest}: {_BAD_DIGEST}")
        data = self.read(namespace_of(context), request.digest)
        start = max(0, request.offset)
        if start > len(data):
            raise Refusal(grpc.StatusCode.OUT_OF_RANGE, f"read past object length {len(data)} bytes")
        end = len(data) if request.size <= 0 else min(len(data), start + request.size)
        for offset in range(start, end, _READ_BYTES):
            piece = data[offset : min(end, offset + _READ_BYTES)]
            yield content_pb2.ReadContentResponse(offset=offset - start, data=piece)

    # ------------------------------------------------------------------------------------------------ what is being written

    def Status(
        self, request: content_pb2.StatusRequest, context: grpc.ServicerContext
    ) -> content_pb2.StatusResponse:
        """Describe what is being written under a ref."""
        doing = f'could not get status for ref "{request.ref}"'
        try:
            namespace = namespace_of(context)
        except Refusal as refusal:
            raise refusal.within(f"{doing}: ") from refusal
        with self._store.lock:
            ingest = self._store.space(namespace).ingests.get(request.ref)
            if ingest is None:
                raise not_found(f"{doing}: reference {request.ref}")
            return content_pb2.StatusResponse(status=ingest.message())

    def ListStatuses(
        self, request: content_pb2.ListStatusesRequest, context: grpc.ServicerContext
    ) -> content_pb2.ListStatusesResponse:
        """Describe everything that is being written."""
        namespace = namespace_of(context)
        filters = _filters(request.filters)
        with self._store.lock:
            ingests = sorted(self._store.space(namespace).ingests.items())
            return content_pb2.ListStatusesResponse(
                statuses=[each.message() for ref, each in ingests if filters.match(fields({"ref": ref}))]
            )

    def Abort(self, request: content_pb2.AbortRequest, context: grpc.ServicerContext) -> Empty:
        """Throw away what is being written under a ref."""
        namespace = namespace_of(context)
        with self._store.lock:
            if self._store.space(namespace).ingests.pop(request.ref, None) is None:
                raise not_found(f"reference {request.ref}")
        return Empty()

    def Write(
        self, request_iterator: Iterator[content_pb2.WriteContentRequest], context: grpc.ServicerContext
    ) -> Iterator[content_pb2.WriteContentResponse]:
        """Write a blob under a ref, which is locked for as long as the stream lasts."""
        namespace = namespace_of(context)
        request = next(request_iterator, None)
        if request is None or not request.ref:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "first message must have a reference")
        held: set[tuple[str, str]] = set()
        if lease := lease_in(context):
            with self._store.lock:
                space = self._store.space(namespace)
                if lease not in space.leases:
                    raise not_found("lease does not exist")
                held = space.leased[lease]
                held.add(("ingests", request.ref))
        answer = content_pb2.WriteContentResponse()
        with self._locked(namespace, request) as ingest:
            total, expected = request.total, request.expected
            while request is not None:
                total = request.total or total
                if request.expected and request.expected != ingest.expected:
                    self._refuse_existing(namespace, ingest, request.expected)
                expected = request.expected or expected
                self._apply(namespace, ingest, request, answer, held, total=total, expected=expected)
                yield answer
                if request.action == _COMMIT:
                    break
                request = next(request_iterator, None)
        yield answer  # containerd repeats its last answer at the end

    @contextmanager
    def _locked(self, namespace: str, request: content_pb2.WriteContentRequest) -> Iterator[Ingest]:
        """Find or make the ref's ingest, and keep others from it."""
        now = self._store.clock()
        with self._store.lock:
            space = self._store.make_space(namespace)
            if request.expected and request.expected in space.blobs:
                raise already_exists(f"content {request.expected}")
            ingest = space.ingests.get(request.ref)
            if ingest is None:
                ingest = Ingest(request.ref, now, now, request.total, request.expected)
                shared = self._shared(request.expected)
                if shared is not None:  # another namespace has it: knowing its digest is enough
                    ingest.write(shared, anew=True)
                space.ingests[request.ref] = ingest
            elif ingest.locked_since is None:
                if request.total and ingest.total and request.total != ingest.total:
                    ingest.write(
                        b"", anew=True
                    )  # containerd does not resume what is to become of another size
                    ingest.total = request.total
            else:
                seconds = (now - ingest.locked_since).total_seconds()
                raise Refusal(
                    grpc.StatusCode.UNAVAILABLE,
                    f"ref {namespace}/1/{request.ref} locked for {seconds:.6f}s"
                    f" (since {ingest.locked_since}): unavailable",
                )
            ingest.locked_since = now
        try:
            yield ingest
        finally:
            with self._store.lock:
                ingest.locked_since = None

    def _shared(self, digest: str) -> bytes | None:
        with self._lock:
            return self._data.get(digest)

    def _refuse_existing(self, namespace: str, ingest: Ingest, expected: str) -> None:
        with self._store.lock:
            space = self._store.space(namespace)
            if expected in space.blobs:
                space.ingests.pop(ingest.ref, None)
                raise Refusal(grpc.StatusCode.ALREADY_EXISTS, f"blob with expected digest {expected} exists")

    def _apply(
        self,
        namespace: str,
        ingest: Ingest,
        request: content_pb2.WriteContentRequest,
        answer: content_pb2.WriteContentResponse,
        held: set[tuple[str, str]],
        *,
        total: int,
        expected: str,
    ) -> None:
        answer.action = request.action
        if request.action == _STAT:
            answer.total = total
            answer.started_at.CopyFrom(stamp(ingest.started_at))
            answer.updated_at.CopyFrom(stamp(ingest.updated_at))
        else:
            if not answer.HasField("started_at"):
                answer.started_at.CopyFrom(stamp(None))
                answer.updated_at.CopyFrom(stamp(None))
            self._take(ingest, request)
            if request.action == _COMMIT:
                self._commit(namespace, ingest, request, held, total=total, expected=expected)
        answer.offset = len(ingest.data)
        answer.digest = ingest.digest

    def _take(self, ingest: Ingest, request: content_pb2.WriteContentRequest) -> None:
        offset = len(ingest.data)
        if request.offset and request.offset != offset:
            raise Refusal(
                grpc.StatusCode.OUT_OF_RANGE,
                f"write @{request.offset} must occur at current offset {offset}",
            )
        ingest.write(request.data, anew=not request.offset)
        ingest.updated_at = self._store.clock()

    def _commit(
        self,
        namespace: str,
        ingest: Ingest,
        request: content_pb2.WriteContentRequest,
        held: set[tuple[str, str]],
        *,
        total: int,
        expected: str,
    ) -> None:
        check_labels(request.labels, "info")
        data = bytes(ingest.data)
        if total and len(data) != total:
            raise failed_precondition(f'"{ingest.ref}" failed size validation: {len(data)} != {total}')
        digest = ingest.digest
        if expected and digest != expected:
            raise failed_precondition(f"unexpected commit digest {digest}, expected {expected}")
        labels: dict[str, str] = {}
        set_labels(labels, request.labels, "info")
        with self._store.lock:
            space = self._store.make_space(namespace)
            space.ingests.pop(ingest.ref, None)
            held.discard(("ingests", ingest.ref))
            held.add(("content", digest))  # also what is there already
            if digest in space.blobs:
                raise already_exists(f"content {digest}")
        self.add(namespace, data, labels)
