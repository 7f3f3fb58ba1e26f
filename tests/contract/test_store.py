"""What is kept without being run: content, images, leases, namespaces, snapshots."""

from __future__ import annotations

import hashlib
import os
import queue
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from libcontainerd._wire.pb.services import (
    content_pb2,
    images_pb2,
    leases_pb2,
    namespaces_pb2,
    snapshots_pb2,
)
from libcontainerd._wire.pb.types.descriptor_pb2 import Descriptor
from libcontainerd._wire.pb.wellknown_pb2 import FieldMask
from tests.contract.servers import SECONDS, Services, label_too_long
from tests.contract.test_refusals import EXISTS, INVALID, NOT_FOUND, PRECONDITION, UNKNOWN, check

STAT = content_pb2.WriteAction.STAT
WRITE = content_pb2.WriteAction.WRITE
COMMIT = content_pb2.WriteAction.COMMIT
OUT_OF_RANGE = grpc.StatusCode.OUT_OF_RANGE

Write = content_pb2.WriteContentRequest


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def fresh() -> bytes:
    return b"blob " + os.urandom(16)


def write(services: Services, *requests: Write) -> list[content_pb2.WriteContentResponse]:
    return list(services.content.Write(iter(requests), metadata=services.metadata, timeout=SECONDS))


def write_refused(services: Services, *requests: Write) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        write(services, *requests)
    return caught.value


def check_error(error: grpc.RpcError, code: grpc.StatusCode, text: str) -> None:
    assert error.code() is code, error
    assert text in (error.details() or ""), error


def put(services: Services, data: bytes, ref: str = "ref", **labels: str) -> str:
    write(
        services,
        Write(action=WRITE, ref=ref, data=data),
        Write(action=COMMIT, offset=len(data), total=len(data), expected=digest_of(data), labels=labels),
    )
    return digest_of(data)


def read(services: Services, digest: str, offset: int = 0, size: int = 0) -> bytes:
    request = content_pb2.ReadContentRequest(digest=digest, offset=offset, size=size)
    answers = services.content.Read(request, metadata=services.metadata, timeout=SECONDS)
    return b"".join(answer.data for answer in answers)


def listed(services: Services, *filters: str) -> list[str]:
    request = content_pb2.ListContentRequest(filters=filters)
    answers = services.content.List(request, metadata=services.metadata, timeout=SECONDS)
    return [info.digest for answer in answers for info in answer.info]


# ------------------------------------------------------------------------------------------------------------ content


def test_content_is_written_and_read(services: Services) -> None:
    data = fresh()

    digest = put(services, data, label="value")

    info = services.call(services.content.Info, content_pb2.InfoRequest(digest=digest)).info
    assert (info.digest, info.size, dict(info.labels)) == (digest, len(data), {"label": "value"})
    assert read(services, digest) == data
    assert read(services, digest, 3) == data[3:]
    assert read(services, digest, 3, 4) == data[3:7]
    assert read(services, digest, len(data)) == b""
    assert read(services, digest, 0, len(data) + 10) == data
    refused = services.refused(
        services.content.Read, content_pb2.ReadContentRequest(digest=digest, offset=len(data) + 1)
    )
    check(refused, OUT_OF_RANGE, f"read past object length {len(data)} bytes")
    assert listed(services) == [digest]
    assert listed(services, "labels.label==value") == [digest]
    assert listed(services, f'digest=="{digest}"') == [digest]
    assert listed(services, "labels.label==other") == []


def test_big_content_comes_in_pieces(services: Services) -> None:
    data = os.urandom(2_500_000)

    digest = put(services, data)

    request = content_pb2.ReadContentRequest(digest=digest)
    pieces = list(services.content.Read(request, metadata=services.metadata, timeout=SECONDS))
    assert [len(piece.data) for piece in pieces] == [1 << 20, 1 << 20, 2_500_000 - (2 << 20)]
    assert b"".join(piece.data for piece in pieces) == data


def test_a_write_tells_how_far_it_is(services: Services) -> None:
    data = fresh()

    answers = write(
        services,
        Write(action=STAT, ref="r", total=len(data)),
        Write(action=WRITE, data=data[:5]),
        Write(action=WRITE, offset=5, data=data[5:]),
    )
    status = services.call(services.content.Status, content_pb2.StatusRequest(ref="r")).status
    resumed = write(services, Write(action=STAT, ref="r"))

    assert [(answer.action, answer.offset) for answer in answers[:3]] == [
        (STAT, 0),
        (WRITE, 5),
        (WRITE, len(data)),
    ]
    assert answers[2].digest == digest_of(data)
    assert (status.ref, status.offset, status.total) == ("r", len(data), len(data))
    assert resumed[0].offset == len(data)
    statuses = services.call(
        services.content.ListStatuses, content_pb2.ListStatusesRequest(filters=["ref==r"])
    ).statuses
    assert [each.ref for each in statuses] == ["r"]
    services.call(services.content.Abort, content_pb2.AbortRequest(ref="r"))
    missing = services.refused(services.content.Status, content_pb2.StatusRequest(ref="r"))
    check(missing, NOT_FOUND, 'could not get status for ref "r": reference r: not found')
    check(
        services.refused(services.content.Abort, content_pb2.AbortRequest(ref="r")),
        NOT_FOUND,
        "reference r: not found",
    )


def test_writes_that_are_refused(services: Services) -> None:
    data = fresh()
    size = len(data)
    body = Write(action=WRITE, ref="r", data=data)

    check_error(write_refused(services, Write(action=STAT)), INVALID, "first message must have a reference")
    check_error(
        write_refused(services, Write(action=WRITE, ref="o", offset=3, data=data)),
        OUT_OF_RANGE,
        "write @3 must occur at current offset 0",
    )
    check_error(
        write_refused(services, body, Write(action=COMMIT, offset=size, total=size + 1)),
        PRECONDITION,
        f'"r" failed size validation: {size} != {size + 1}',
    )
    wrong = digest_of(b"other")
    check_error(
        write_refused(services, body, Write(action=COMMIT, offset=size, expected=wrong)),
        PRECONDITION,
        f"unexpected commit digest {digest_of(data)}, expected {wrong}",
    )
    check_error(
        write_refused(services, body, Write(action=COMMIT, offset=size, labels={"k": "v" * 4096})),
        INVALID,
        label_too_long(services),
    )


def test_content_that_is_there_already(services: Services) -> None:
    data = fresh()
    digest = put(services, data)

    opened = write_refused(services, Write(action=STAT, ref="a", total=len(data), expected=digest))
    later = write_refused(
        services, Write(action=STAT, ref="b"), Write(action=WRITE, data=data, expected=digest)
    )
    committed = write_refused(
        services, Write(action=WRITE, ref="c", data=data), Write(action=COMMIT, offset=len(data))
    )

    check_error(opened, EXISTS, f"content {digest}: already exists")
    check_error(later, EXISTS, f"blob with expected digest {digest} exists")
    check_error(committed, EXISTS, f"content {digest}: already exists")
    for ref in ("b", "c"):
        missing = services.refused(services.content.Status, content_pb2.StatusRequest(ref=ref))
        check(missing, NOT_FOUND, f"reference {ref}")


def test_a_ref_is_locked_while_it_is_written(services: Services) -> None:
    requests: queue.Queue[Write | None] = queue.Queue()
    requests.put(Write(action=STAT, ref="r", total=4))

    def sent() -> Iterator[Write]:
        yield from iter(requests.get, None)

    first = services.content.Write(sent(), metadata=services.metadata, timeout=SECONDS)
    assert next(iter(first)).total == 4
    locked = write_refused(services, Write(action=STAT, ref="r"))
    other = write(services, Write(action=STAT, ref="s"))
    requests.put(None)
    list(first)

    check_error(locked, grpc.StatusCode.UNAVAILABLE, "r locked for ")
    assert other[0].offset == 0
    assert write(services, Write(action=STAT, ref="r"))[0].offset == 0


def test_labels_of_content(services: Services) -> None:
    digest = put(services, fresh(), a="1", b="2")

    def update(*paths: str, **labels: str) -> content_pb2.UpdateRequest:
        return content_pb2.UpdateRequest(
            info=content_pb2.Info(digest=digest, labels=labels), update_mask=FieldMask(paths=paths)
        )

    one = services.call(services.content.Update, update("labels.a", a="9")).info
    gone = services.call(services.content.Update, update("labels.b")).info
    every = services.call(services.content.Update, update("labels", z="1")).info

    assert dict(one.labels) == {"a": "9", "b": "2"}
    assert dict(gone.labels) == {"a": "9"}
    assert dict(every.labels) == {"z": "1"}
    refused = services.refused(services.content.Update, update("size"))
    check(refused, INVALID, f'cannot update "size" field on content info "{digest}"')


def test_content_is_seen_by_who_wrote_it(services: Services) -> None:
    data = fresh()
    digest = put(services, data)
    other = f"{services.namespace}-2"

    missing = services.refused(services.content.Info, content_pb2.InfoRequest(digest=digest), namespace=other)
    answers = list(
        services.content.Write(
            iter([Write(action=STAT, ref="r", total=len(data), expected=digest)]),
            metadata=services._metadata(other),
            timeout=SECONDS,
        )
    )

    check(missing, NOT_FOUND, f"content digest {digest}: not found")
    assert answers[0].offset == len(data)  # knowing its digest is enough to have it
    services.call(services.content.Abort, content_pb2.AbortRequest(ref="r"), namespace=other)


def test_content_that_is_not_there(services: Services) -> None:
    digest = digest_of(b"nothing")
    content = services.content

    for method, request in (
        (content.Info, content_pb2.InfoRequest(digest=digest)),
        (content.Read, content_pb2.ReadContentRequest(digest=digest)),
        (content.Delete, content_pb2.DeleteContentRequest(digest=digest)),
        (content.Update, content_pb2.UpdateRequest(info=content_pb2.Info(digest=digest))),
    ):
        check(services.refused(method, request), NOT_FOUND, f"content digest {digest}: not found")
    for method, request in (
        (content.Info, content_pb2.InfoRequest(digest="x")),
        (content.Read, content_pb2.ReadContentRequest(digest="x")),
        (content.Delete, content_pb2.DeleteContentRequest(digest="x")),
        (content.Update, content_pb2.UpdateRequest(info=content_pb2.Info(digest="x"))),
    ):
        check(services.refused(method, request), INVALID, "failed validation|invalid checksum digest format")
    check(
        services.refused(content.List, content_pb2.ListContentRequest(filters=["="])),
        INVALID,
        "filters: parse error",
    )


def test_deleted_content_is_gone(services: Services) -> None:
    digest = put(services, fresh())

    services.call(services.content.Delete, content_pb2.DeleteContentRequest(digest=digest))

    assert listed(services) == []


# ------------------------------------------------------------------------------------------------------------- images


def image(name: str, **labels: str) -> images_pb2.Image:
    target = Descriptor(media_type="type", digest=digest_of(b"x"), size=1)
    return images_pb2.Image(name=name, target=target, labels=labels)


def test_images(services: Services) -> None:
    images = services.images
    made = services.call(images.Create, images_pb2.CreateImageRequest(image=image("one", a="b"))).image
    services.call(images.Create, images_pb2.CreateImageRequest(image=image("two")))

    def names(*filters: str) -> list[str]:
        answer = services.call(images.List, images_pb2.ListImagesRequest(filters=filters))
        return [each.name for each in answer.images]

    assert services.call(images.Get, images_pb2.GetImageRequest(name="one")).image == made
    assert names() == ["one", "two"]
    assert names("name==one") == ["one"]
    assert names("labels.a==b") == ["one"]
    assert names("target.mediatype==type", "name==none") == ["one", "two"]
    changed = services.call(
        images.Update,
        images_pb2.UpdateImageRequest(
            # With its target, whatever the mask: without one, containerd 1.7 and later end with a Go panic.
            image=image("one", c="d"),
            update_mask=FieldMask(paths=["labels.c"]),
        ),
    ).image
    assert dict(changed.labels) == {"a": "b", "c": "d"}
    whole = services.call(images.Update, images_pb2.UpdateImageRequest(image=image("one", e="f"))).image
    assert dict(whole.labels) == {"e": "f"}
    services.call(images.Delete, images_pb2.DeleteImageRequest(name="one"))
    assert names() == ["two"]


def test_images_that_are_refused(services: Services) -> None:
    images = services.images
    services.call(images.Create, images_pb2.CreateImageRequest(image=image("taken")))
    no_size = image("x")
    no_size.target.size = 0
    no_type = image("x")
    no_type.target.media_type = ""
    no_digest = image("x")
    no_digest.target.digest = "z"

    for made, code, pattern in (
        (image(""), INVALID, "Image.Name required"),
        (image("taken"), EXISTS, 'image "taken": already exists'),
        (no_size, INVALID, "Target.Size must be greater than zero"),
        (no_type, INVALID, "Target.MediaType must be set"),
        (no_digest, INVALID, 'Target.Digest "z" invalid: invalid checksum digest format'),
    ):
        check(services.refused(images.Create, images_pb2.CreateImageRequest(image=made)), code, pattern)
    for method, request in (
        (images.Get, images_pb2.GetImageRequest(name="none")),
        (images.Delete, images_pb2.DeleteImageRequest(name="none")),
        (images.Update, images_pb2.UpdateImageRequest(image=image("none"))),
    ):
        check(services.refused(method, request), NOT_FOUND, 'image "none": not found')
    wrong = images_pb2.UpdateImageRequest(image=image("taken"), update_mask=FieldMask(paths=["x"]))
    check(services.refused(images.Update, wrong), INVALID, 'cannot update "x" field on image "taken"')


# ------------------------------------------------------------------------------------------------------------- leases


def test_leases(services: Services) -> None:
    leases = services.leases
    content = leases_pb2.Resource(id=digest_of(b"x"), type="content")
    snapshot = leases_pb2.Resource(id="s", type="snapshots/overlayfs")
    made = services.call(leases.Create, leases_pb2.CreateRequest(id="l", labels={"a": "b"})).lease
    named = services.call(leases.Create, leases_pb2.CreateRequest()).lease

    assert made.labels == {"a": "b"}
    assert named.id
    answer = services.call(leases.List, leases_pb2.ListRequest(filters=["labels.a==b"]))
    assert [each.id for each in answer.leases] == ["l"]
    for resource in (content, snapshot, content):
        services.call(leases.AddResource, leases_pb2.AddResourceRequest(id="l", resource=resource))
    held = services.call(leases.ListResources, leases_pb2.ListResourcesRequest(id="l")).resources
    assert list(held) == [content, snapshot]
    services.call(leases.DeleteResource, leases_pb2.DeleteResourceRequest(id="l", resource=content))
    held = services.call(leases.ListResources, leases_pb2.ListResourcesRequest(id="l")).resources
    assert list(held) == [snapshot]
    for lease in (made, named):
        services.call(leases.Delete, leases_pb2.DeleteRequest(id=lease.id))
    assert not services.call(leases.List, leases_pb2.ListRequest()).leases


def test_leases_that_are_refused(services: Services) -> None:
    leases = services.leases
    services.call(leases.Create, leases_pb2.CreateRequest(id="l"))
    add = leases_pb2.AddResourceRequest
    resource = leases_pb2.Resource

    for method, request, code, pattern in (
        (leases.Create, leases_pb2.CreateRequest(id="l"), EXISTS, 'lease "l": already exists'),
        (leases.Delete, leases_pb2.DeleteRequest(id="x"), NOT_FOUND, 'lease "x": not found'),
        (leases.ListResources, leases_pb2.ListResourcesRequest(id="x"), NOT_FOUND, 'lease "x": not found'),
        (
            leases.AddResource,
            add(id="l", resource=resource(id="r", type="bogus")),
            grpc.StatusCode.UNIMPLEMENTED,
            "resource type bogus not supported yet",
        ),
        (
            leases.AddResource,
            add(id="l", resource=resource(id="r", type="content")),
            INVALID,
            "invalid content resource id r",
        ),
        (
            leases.AddResource,
            add(id="l", resource=resource(id="r", type="snapshots")),
            INVALID,
            "invalid snapshot resource type snapshots",
        ),
    ):
        check(services.refused(method, request), code, pattern)
    services.call(leases.Delete, leases_pb2.DeleteRequest(id="l"))


def test_content_under_a_lease_that_is_not_there(services: Services) -> None:
    metadata = (*services.metadata, ("containerd-lease", "none"))

    with pytest.raises(grpc.RpcError) as caught:
        list(
            services.content.Write(
                iter([Write(action=WRITE, ref="r", data=b"x")]), metadata=metadata, timeout=SECONDS
            )
        )

    check_error(caught.value, NOT_FOUND, "lease does not exist")


# --------------------------------------------------------------------------------------------------------- namespaces


def test_namespaces(services: Services) -> None:
    spaces = services.namespaces
    name = f"{services.namespace}-2"
    space = namespaces_pb2.Namespace(name=name, labels={"a": "b"})
    services.call(spaces.Create, namespaces_pb2.CreateNamespaceRequest(namespace=space))

    def labels() -> dict[str, str]:
        answer = services.call(spaces.Get, namespaces_pb2.GetNamespaceRequest(name=name), namespace="")
        return dict(answer.namespace.labels)

    assert labels() == {"a": "b"}
    names = services.call(spaces.List, namespaces_pb2.ListNamespacesRequest(), namespace="").namespaces
    assert name in [each.name for each in names]
    changed = namespaces_pb2.Namespace(name=name, labels={"c": "d"})
    services.call(
        spaces.Update,
        namespaces_pb2.UpdateNamespaceRequest(namespace=changed, update_mask=FieldMask(paths=["labels.c"])),
    )
    assert labels() == {"a": "b", "c": "d"}
    services.call(spaces.Update, namespaces_pb2.UpdateNamespaceRequest(namespace=changed))
    assert labels() == {"c": "d"}
    services.call(spaces.Delete, namespaces_pb2.DeleteNamespaceRequest(name=name))
    assert labels() == {}


def test_namespaces_that_are_refused(services: Services) -> None:
    spaces = services.namespaces
    services.make_container("c")

    def create(name: str) -> namespaces_pb2.CreateNamespaceRequest:
        return namespaces_pb2.CreateNamespaceRequest(namespace=namespaces_pb2.Namespace(name=name))

    for method, request, code, pattern in (
        (spaces.Create, create(""), INVALID, "identifier must not be empty"),
        (spaces.Create, create("a/b"), INVALID, 'identifier "a/b" must match'),
        (
            spaces.Create,
            create(services.namespace),
            EXISTS,
            f'namespace "{services.namespace}": already exists',
        ),
        (
            spaces.Delete,
            namespaces_pb2.DeleteNamespaceRequest(name=services.namespace),
            PRECONDITION,
            "must be empty, but it still has containers",
        ),
        (
            spaces.Delete,
            namespaces_pb2.DeleteNamespaceRequest(name=f"{services.namespace}-3"),
            NOT_FOUND,
            "not found",
        ),
    ):
        check(services.refused(method, request), code, pattern)


# ---------------------------------------------------------------------------------------------------------- snapshots

NATIVE = "native"


def prepare(services: Services, key: str, parent: str = "") -> Path:
    request = snapshots_pb2.PrepareSnapshotRequest(snapshotter=NATIVE, key=key, parent=parent)
    (mount,) = services.call(services.snapshots.Prepare, request).mounts
    assert (mount.type, sorted(mount.options)) == ("bind", ["rbind", "rw"])
    return Path(mount.source)


def commit(services: Services, key: str, name: str) -> None:
    request = snapshots_pb2.CommitSnapshotRequest(snapshotter=NATIVE, key=key, name=name)
    services.call(services.snapshots.Commit, request)


def test_snapshots_are_real_directories(services: Services) -> None:
    directory = prepare(services, "base")
    (directory / "file").write_text("below")
    (directory / "link").symlink_to("file")
    commit(services, "base", "done")

    above = prepare(services, "above", "done")
    view = services.call(
        services.snapshots.View,
        snapshots_pb2.ViewSnapshotRequest(snapshotter=NATIVE, key="view", parent="done"),
    )

    assert (above / "file").read_text() == "below"
    assert (above / "link").is_symlink()
    (above / "file").write_text("above")
    assert (Path(view.mounts[0].source) / "file").read_text() == "below"
    assert sorted(view.mounts[0].options) == ["rbind", "ro"]
    mounts = services.call(
        services.snapshots.Mounts, snapshots_pb2.MountsRequest(snapshotter=NATIVE, key="above")
    ).mounts
    assert mounts[0].source == str(above)
    usage = services.call(
        services.snapshots.Usage, snapshots_pb2.UsageRequest(snapshotter=NATIVE, key="above")
    )
    assert usage.inodes >= 2
    services.call(
        services.snapshots.Remove, snapshots_pb2.RemoveSnapshotRequest(snapshotter=NATIVE, key="above")
    )
    gone = snapshots_pb2.StatSnapshotRequest(snapshotter=NATIVE, key="above")
    check(services.refused(services.snapshots.Stat, gone), NOT_FOUND, "snapshot above does not exist")


def test_what_is_told_of_snapshots(services: Services) -> None:
    prepare(services, "base")
    commit(services, "base", "done")
    prepare(services, "above", "done")

    def stat(key: str) -> snapshots_pb2.Info:
        request = snapshots_pb2.StatSnapshotRequest(snapshotter=NATIVE, key=key)
        return services.call(services.snapshots.Stat, request).info

    def names(*filters: str) -> list[str]:
        request = snapshots_pb2.ListSnapshotsRequest(snapshotter=NATIVE, filters=filters)
        answers = services.snapshots.List(request, metadata=services.metadata, timeout=SECONDS)
        return [info.name for answer in answers for info in answer.info]

    assert (stat("done").kind, stat("done").parent) == (snapshots_pb2.Kind.COMMITTED, "")
    assert (stat("above").kind, stat("above").parent) == (snapshots_pb2.Kind.ACTIVE, "done")
    assert sorted(names()) == ["above", "done"]
    assert names("kind==active") == ["above"]
    assert names("parent==done") == ["above"]
    changed = services.call(
        services.snapshots.Update,
        snapshots_pb2.UpdateSnapshotRequest(
            snapshotter=NATIVE,
            info=snapshots_pb2.Info(name="above", labels={"a": "b"}),
            update_mask=FieldMask(paths=["labels.a"]),
        ),
    )
    assert dict(changed.info.labels) == {"a": "b"}


def test_snapshots_that_are_refused(services: Services) -> None:
    prepare(services, "base")
    commit(services, "base", "done")
    prepare(services, "above", "done")
    snapshots = services.snapshots
    make = snapshots_pb2.PrepareSnapshotRequest
    save = snapshots_pb2.CommitSnapshotRequest

    for method, request, code, pattern in (
        (snapshots.Prepare, make(key="k"), INVALID, "snapshotter argument missing"),
        (snapshots.Prepare, make(snapshotter="bogus", key="k"), INVALID, "snapshotter not loaded: bogus"),
        (
            snapshots.Prepare,
            make(snapshotter=NATIVE, key="above"),
            EXISTS,
            'snapshot "above": already exists',
        ),
        (
            snapshots.Prepare,
            make(snapshotter=NATIVE, key="k", parent="none"),
            NOT_FOUND,
            "parent snapshot none does not exist",
        ),
        (
            snapshots.Prepare,
            make(snapshotter=NATIVE, key="k", parent="above"),
            INVALID,
            'parent ".*/above" is not committed snapshot',
        ),
        (
            snapshots.Commit,
            save(snapshotter=NATIVE, key="above", name="done"),
            EXISTS,
            'snapshot "done": already exists',
        ),
        (
            snapshots.Commit,
            save(snapshotter=NATIVE, key="done", name="new"),
            PRECONDITION,
            'snapshot ".*/done" is not active',
        ),
        (
            snapshots.Mounts,
            snapshots_pb2.MountsRequest(snapshotter=NATIVE, key="done"),
            PRECONDITION,
            "not active or view",
        ),
        (
            snapshots.Remove,
            snapshots_pb2.RemoveSnapshotRequest(snapshotter=NATIVE, key="done"),
            PRECONDITION,
            "cannot remove snapshot with child",
        ),
        (
            snapshots.Stat,
            snapshots_pb2.StatSnapshotRequest(snapshotter=NATIVE, key="none"),
            NOT_FOUND,
            "snapshot none does not exist",
        ),
        (
            snapshots.Update,
            snapshots_pb2.UpdateSnapshotRequest(
                snapshotter=NATIVE,
                info=snapshots_pb2.Info(name="above"),
                update_mask=FieldMask(paths=["parent"]),
            ),
            INVALID,
            'cannot update "parent" field on snapshot "above"',
        ),
        (
            snapshots.Cleanup,
            snapshots_pb2.CleanupRequest(snapshotter=NATIVE),
            grpc.StatusCode.UNIMPLEMENTED,
            "snapshotter does not implement Cleanup method",
        ),
    ):
        check(services.refused(method, request), code, pattern)
    nowhere = services.refused(
        snapshots.List, snapshots_pb2.ListSnapshotsRequest(snapshotter=NATIVE), namespace=""
    )
    check(nowhere, UNKNOWN, "namespace is required")
