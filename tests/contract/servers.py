"""A server under contract, and the plain stubs that look past the client."""

from __future__ import annotations

import json
import queue
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, cast

import grpc

from libcontainerd._wire import typeurl
from libcontainerd._wire.connection import NAMESPACE_HEADER
from libcontainerd._wire.pb.services import (
    containers_pb2,
    content_pb2,
    events_pb2,
    images_pb2,
    introspection_pb2,
    leases_pb2,
    namespaces_pb2,
    snapshots_pb2,
    tasks_pb2,
    version_pb2,
)
from libcontainerd._wire.pb.types import event_pb2
from libcontainerd._wire.pb.wellknown_pb2 import Any
from tests.contract import programs
from tests.integration.containers import Raw, wait_until

_Response = TypeVar("_Response")

SECONDS = 60.0
RUNTIME = "io.containerd.runc.v2"


class _Cancellable(Protocol):
    """What grpc-stubs leave untyped of a call."""

    def cancel(self) -> bool: ...


@dataclass(frozen=True)
class Server:
    """A containerd that the contract holds for.

    Attributes:
        name: What it is called in test ids and in the summary.
        address: Where it listens.
        rootfs: What containers run on.
        release: Major and minor version of the containerd that it is, or is like.
        real: It is containerd itself.
    """

    name: str
    address: str
    rootfs: Path
    release: tuple[int, int]
    real: bool


class Refused:
    """How a call ended that was not answered."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self.code = code
        self.details = details

    def __repr__(self) -> str:
        return f"{self.code.name}: {self.details}"


class Services(Raw):
    """Plain stubs of every service, in one namespace."""

    def __init__(self, channel: grpc.Channel, namespace: str, rootfs: Path, release: tuple[int, int]) -> None:
        super().__init__(channel, namespace)
        self.channel = channel
        self.namespace = namespace
        self.rootfs = rootfs
        self.release = release
        self.content = content_pb2.ContentStub(channel)
        self.events = events_pb2.EventsStub(channel)
        self.images = images_pb2.ImagesStub(channel)
        self.introspection = introspection_pb2.IntrospectionStub(channel)
        self.leases = leases_pb2.LeasesStub(channel)
        self.namespaces = namespaces_pb2.NamespacesStub(channel)
        self.snapshots = snapshots_pb2.SnapshotsStub(channel)
        self.versions = version_pb2.VersionStub(channel)

    def call(
        self, method: Callable[..., _Response], request: object, namespace: str | None = None
    ) -> _Response:
        """Make a unary call."""
        return method(request, metadata=self._metadata(namespace), timeout=SECONDS)

    def _metadata(self, namespace: str | None) -> tuple[tuple[str, str], ...]:
        if namespace is None:
            return self.metadata
        return ((NAMESPACE_HEADER, namespace),) if namespace else ()

    def refused(
        self, method: Callable[..., object], request: object, namespace: str | None = None
    ) -> Refused:
        """Make a call that must be refused; an empty namespace sends none."""
        try:
            answer = method(request, metadata=self._metadata(namespace), timeout=SECONDS)
            if isinstance(answer, Iterator):
                answer = list(answer)
        except grpc.RpcError as error:
            return Refused(error.code(), error.details() or "")
        raise AssertionError(f"not refused, but answered: {answer!r}")

    # Short ways to what most tests begin with.

    def spec(self, *args: str, terminal: bool = False) -> dict[str, object]:
        """A container's spec, as small as runc takes it."""
        return {
            "ociVersion": "1.0.2",
            "process": process_document(*args, terminal=terminal),
            "root": {"path": str(self.rootfs), "readonly": True},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts"},
            ],
            "linux": {
                "namespaces": [{"type": kind} for kind in ("pid", "ipc", "mount")],
                "cgroupsPath": f"/libcontainerd-{self.namespace}-{uuid.uuid4().hex[:6]}",
            },
        }

    def make_container(self, container_id: str, *args: str, **fields: object) -> containers_pb2.Container:
        """Create a container past the client."""
        container = containers_pb2.Container(
            id=container_id,
            runtime=containers_pb2.Container.Runtime(name=RUNTIME),
            spec=spec_any(self.spec(*args)),
            **fields,  # type: ignore[arg-type]  # the caller's tests name fields that exist
        )
        request = containers_pb2.CreateContainerRequest(container=container)
        return self.call(self.containers.Create, request).container

    def make_task(self, container_id: str) -> int:
        """Create a container's task past the client, with its stdio nowhere."""
        request = tasks_pb2.CreateTaskRequest(container_id=container_id)
        return self.call(self.tasks.Create, request).pid

    def start(self, container_id: str, exec_id: str = "") -> int:
        """Start a task or an exec past the client."""
        request = tasks_pb2.StartRequest(container_id=container_id, exec_id=exec_id)
        return self.call(self.tasks.Start, request).pid

    def add_exec(self, container_id: str, exec_id: str, *args: str) -> None:
        """Add an exec past the client."""
        self.call(
            self.tasks.Exec,
            tasks_pb2.ExecProcessRequest(
                container_id=container_id, exec_id=exec_id, spec=process_any(process_document(*args))
            ),
        )

    def wait(self, container_id: str, exec_id: str = "") -> int:
        """Wait for a process's end past the client, and give its status."""
        request = tasks_pb2.WaitRequest(container_id=container_id, exec_id=exec_id)
        return self.call(self.tasks.Wait, request).exit_status

    def run(self, container_id: str, *args: str) -> int:
        """Create and start a container and its task."""
        self.make_container(container_id, *args)
        self.make_task(container_id)
        return self.start(container_id)

    def remove_everything(self) -> None:
        super().remove_everything()
        for snapshotter in ("native", "overlayfs"):
            self._remove_snapshots(snapshotter)
        for image in self.call(self.images.List, images_pb2.ListImagesRequest()).images:
            self.call(self.images.Delete, images_pb2.DeleteImageRequest(name=image.name))

    def _remove_snapshots(self, snapshotter: str) -> None:
        def left() -> list[str]:
            request = snapshots_pb2.ListSnapshotsRequest(snapshotter=snapshotter)
            answers = self.snapshots.List(request, metadata=self.metadata, timeout=SECONDS)
            return [info.name for answer in answers for info in answer.info]

        for _ in range(10):  # children before their parents
            for name in left():
                request = snapshots_pb2.RemoveSnapshotRequest(snapshotter=snapshotter, key=name)
                try:
                    self.call(self.snapshots.Remove, request)
                except grpc.RpcError:
                    continue


def label_too_long(services: Services) -> str:
    """What a containerd says of the label "k" with a value of 4096 bytes."""
    how_long = "length (4097 bytes) " if services.release >= (1, 7) else ""
    return f"label key and value {how_long}greater than maximum size (4096 bytes), key: k"


class Subscription:
    """A subscription past the client, proven to be live before a test goes on."""

    def __init__(self, services: Services, filters: Sequence[str]) -> None:
        self._services = services
        self._call = services.events.Subscribe(
            events_pb2.SubscribeRequest(filters=[*filters, 'topic=="/probe"']), metadata=services.metadata
        )
        self._queue: queue.Queue[event_pb2.Envelope] = queue.Queue()
        self.live = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

        def proven() -> bool:
            services.call(
                services.events.Publish,
                events_pb2.PublishRequest(topic="/probe", event=Any(type_url="probe")),
            )
            return self.live.wait(0.05)

        wait_until(proven, "the subscription is live")

    def _read(self) -> None:
        try:
            for envelope in self._call:
                if envelope.topic == "/probe":
                    self.live.set()
                else:
                    self._queue.put(envelope)
        except grpc.RpcError:
            return

    def next(self) -> event_pb2.Envelope:
        """The next event, waiting for it."""
        return self._queue.get(timeout=SECONDS)

    def topics(self, count: int) -> list[str]:
        """The topics of the next events."""
        return [self.next().topic for _ in range(count)]

    def close(self) -> None:
        cast("_Cancellable", self._call).cancel()
        self._thread.join(SECONDS)


def process_document(*args: str, terminal: bool = False) -> dict[str, object]:
    """An OCI process."""
    return {
        "terminal": terminal,
        "user": {"uid": 0, "gid": 0},
        "args": list(args or programs.SLEEP),
        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
        "cwd": "/",
    }


def spec_any(document: Mapping[str, object]) -> Any:
    """A spec as containerd takes it."""
    return typeurl.pack_json(typeurl.SPEC_URL, json.dumps(document).encode())


def process_any(document: Mapping[str, object]) -> Any:
    """A process as containerd takes it."""
    return typeurl.pack_json(typeurl.PROCESS_URL, json.dumps(document).encode())
