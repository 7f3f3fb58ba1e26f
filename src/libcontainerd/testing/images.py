"""The images service: names for content."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from libcontainerd._wire.pb.events import image_pb2 as image_events
from libcontainerd._wire.pb.services.images_pb2 import (
    CreateImageRequest,
    CreateImageResponse,
    DeleteImageRequest,
    GetImageRequest,
    GetImageResponse,
    Image,
    ImagesServicer,
    ListImagesRequest,
    ListImagesResponse,
    UpdateImageRequest,
    UpdateImageResponse,
)
from libcontainerd._wire.pb.wellknown_pb2 import Empty
from libcontainerd.testing.containers import parse_filters
from libcontainerd.testing.filters import fields
from libcontainerd.testing.refusals import (
    Refusal,
    already_exists,
    check_labels,
    invalid_argument,
    is_digest,
    namespace_of,
    not_found,
)
from libcontainerd.testing.store import set_masked_labels
from libcontainerd.testing.timestamps import stamp

if TYPE_CHECKING:
    from libcontainerd.testing.exchange import Exchange
    from libcontainerd.testing.store import Store


def _check(image: Image) -> None:
    check_labels(image.labels, "image")
    if not is_digest(image.target.digest):
        raise invalid_argument(
            f'Target.Digest "{image.target.digest}" invalid: invalid checksum digest format'
        )
    if image.target.size <= 0:
        raise invalid_argument("Target.Size must be greater than zero")
    if not image.target.media_type:
        raise invalid_argument("Target.MediaType must be set")


def _require_name(name: str) -> None:
    if not name:
        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "Image.Name required")


class Images(ImagesServicer):
    """The images service."""

    def __init__(self, store: Store, exchange: Exchange) -> None:
        self._store = store
        self._exchange = exchange

    def Get(self, request: GetImageRequest, context: grpc.ServicerContext) -> GetImageResponse:
        """Look an image up."""
        namespace = namespace_of(context)
        with self._store.lock:
            image = self._store.space(namespace).images.get(request.name)
        if image is None:
            raise not_found(f'image "{request.name}"')
        return GetImageResponse(image=image)

    def List(self, request: ListImagesRequest, context: grpc.ServicerContext) -> ListImagesResponse:
        """List a namespace's images."""
        namespace = namespace_of(context)
        filters = parse_filters(request.filters)
        with self._store.lock:
            images = sorted(self._store.space(namespace).images.items())
        return ListImagesResponse(
            images=[
                image
                for _, image in images
                if filters.match(
                    fields(
                        {
                            "name": image.name,
                            "target.digest": image.target.digest,
                            "target.mediatype": image.target.media_type,
                        },
                        image.labels,
                    )
                )
            ]
        )

    def Create(self, request: CreateImageRequest, context: grpc.ServicerContext) -> CreateImageResponse:
        """Name some content, which need not be there."""
        _require_name(request.image.name)
        namespace = namespace_of(context)
        image = Image()
        image.CopyFrom(request.image)
        _check(image)
        with self._store.lock:
            space = self._store.make_space(namespace)
            if image.name in space.images:
                raise already_exists(f'image "{image.name}"')
            image.created_at.CopyFrom(stamp(self._store.clock()))
            image.updated_at.CopyFrom(image.created_at)
            space.images[image.name] = image
        self._exchange.publish(
            namespace, "/images/create", image_events.ImageCreate(name=image.name, labels=image.labels)
        )
        return CreateImageResponse(image=image)

    def Update(self, request: UpdateImageRequest, context: grpc.ServicerContext) -> UpdateImageResponse:
        """Change what a field mask names, or everything."""
        source = request.image
        _require_name(source.name)
        namespace = namespace_of(context)
        with self._store.lock:
            space = self._store.space(namespace)
            if source.name not in space.images:
                raise not_found(f'image "{source.name}"')
            image = Image()
            image.CopyFrom(space.images[source.name])
            paths = list(request.update_mask.paths) or ["labels", "target"]
            for path in set_masked_labels(image.labels, source.labels, paths, "image"):
                if path != "target":
                    raise invalid_argument(f'cannot update "{path}" field on image "{source.name}"')
                image.target.CopyFrom(source.target)
            _check(image)
            image.updated_at.CopyFrom(stamp(self._store.clock()))
            space.images[image.name] = image
        self._exchange.publish(
            namespace, "/images/update", image_events.ImageUpdate(name=image.name, labels=image.labels)
        )
        return UpdateImageResponse(image=image)

    def Delete(self, request: DeleteImageRequest, context: grpc.ServicerContext) -> Empty:
        """Forget a name."""
        namespace = namespace_of(context)
        with self._store.lock:
            if self._store.space(namespace).images.pop(request.name, None) is None:
                raise not_found(f'image "{request.name}"')
        self._exchange.publish(namespace, "/images/delete", image_events.ImageDelete(name=request.name))
        return Empty()
