"""Refusals, word for word: the fake says what the real containerd of its version says, compared text by text."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator

import grpc
import pytest

from libcontainerd._wire.pb.services import (
    containers_pb2,
    content_pb2,
    events_pb2,
    images_pb2,
    introspection_pb2,
    leases_pb2,
    namespaces_pb2,
    sandbox_pb2,
    snapshots_pb2,
    tasks_pb2,
)
from libcontainerd._wire.pb.types.descriptor_pb2 import Descriptor
from libcontainerd._wire.pb.types.sandbox_pb2 import Sandbox
from libcontainerd._wire.pb.wellknown_pb2 import Any, FieldMask
from tests.contract import programs
from tests.contract.conftest import fake_like
from tests.contract.servers import RUNTIME, Refused, Server, Services, process_any, process_document, spec_any

Said = Iterator[Refused]

_LONG_ID = "a" * 77
_NO_DIGEST = "sha256:" + "0" * 64


def asked(services: Services, method: Callable[..., object], request: object) -> Refused:
    """What may be refused; an answer is as good as OK here."""
    try:
        return services.refused(method, request)
    except AssertionError:
        return Refused(grpc.StatusCode.OK, "")


def filters(services: Services) -> Said:
    s = services
    for text in (
        "id==",
        "id=c",
        "id=!c",
        "==",
        "id",
        "id==a b",
        "id==a,",
        "id==/a",
        'id=="a',
        "id==|a|",
        "id c",
    ):
        wanted = [text]
        for method, request in (
            (s.containers.List, containers_pb2.ListContainersRequest(filters=wanted)),
            (s.containers.ListStream, containers_pb2.ListContainersRequest(filters=wanted)),
            (s.images.List, images_pb2.ListImagesRequest(filters=wanted)),
            (s.leases.List, leases_pb2.ListRequest(filters=wanted)),
            (s.snapshots.List, snapshots_pb2.ListSnapshotsRequest(snapshotter="native", filters=wanted)),
            (s.content.List, content_pb2.ListContentRequest(filters=wanted)),
            (s.content.ListStatuses, content_pb2.ListStatusesRequest(filters=wanted)),
            (s.introspection.Plugins, introspection_pb2.PluginsRequest(filters=wanted)),
            (s.tasks.Metrics, tasks_pb2.MetricsRequest(filters=wanted)),
        ):
            yield asked(s, method, request)
        if text != "id":
            yield s.refused(s.events.Subscribe, events_pb2.SubscribeRequest(filters=wanted))


def names(services: Services) -> Said:
    s = services
    spec = spec_any({})
    runtime = containers_pb2.Container.Runtime(name="r")
    for name in ("", "a/b", "-a", "a..b", "a b", _LONG_ID):
        container = containers_pb2.Container(id=name, runtime=runtime, spec=spec)
        create = containers_pb2.CreateContainerRequest(container=container)
        yield s.refused(s.containers.Create, create)
        space = namespaces_pb2.Namespace(name=name)
        yield s.refused(s.namespaces.Create, namespaces_pb2.CreateNamespaceRequest(namespace=space))
    for name in ("", "a/b", _LONG_ID):
        for method, request in (
            (s.containers.List, containers_pb2.ListContainersRequest()),
            (s.tasks.Get, tasks_pb2.GetRequest(container_id="c")),
            (s.tasks.List, tasks_pb2.ListTasksRequest()),
            (s.content.Info, content_pb2.InfoRequest(digest=_NO_DIGEST)),
            (s.content.Delete, content_pb2.DeleteContentRequest(digest=_NO_DIGEST)),
            (s.content.Status, content_pb2.StatusRequest(ref="r")),
            (s.content.ListStatuses, content_pb2.ListStatusesRequest()),
            (s.images.List, images_pb2.ListImagesRequest()),
            (s.images.Get, images_pb2.GetImageRequest(name="i")),
            (s.leases.List, leases_pb2.ListRequest()),
            (s.leases.Create, leases_pb2.CreateRequest(id="l")),
            (s.snapshots.Stat, snapshots_pb2.StatSnapshotRequest(snapshotter="native", key="k")),
            (s.snapshots.List, snapshots_pb2.ListSnapshotsRequest(snapshotter="native")),
            (s.events.Publish, events_pb2.PublishRequest(topic="/a", event=Any(type_url="x"))),
        ):
            yield s.refused(method, request, namespace=name)


def what_is_not_served(services: Services) -> Said:
    for path in (
        "containerd.services.nothing.v1.Nothing/Do",
        "containerd.services.tasks.v1.Tasks/Nothing",
        "containerd.services.containers.v1.Containers/Nothing",
        "grpc.health.v1.Health/Nothing",
    ):
        method = services.channel.unary_unary(f"/{path}", lambda _: b"", bytes)
        yield services.refused(method, None)


def topics(services: Services) -> Said:
    for topic in ("", "a", "/", "/a/", "//", "/a b", f"/{_LONG_ID}"):
        request = events_pb2.PublishRequest(topic=topic, event=Any(type_url="x"))
        yield services.refused(services.events.Publish, request)


def containers(services: Services) -> Said:
    s = services
    spec, runtime = spec_any({}), containers_pb2.Container.Runtime(name="r")
    made = containers_pb2.Container
    for container in (
        made(id="c", spec=spec),
        made(id="c", runtime=runtime, spec=spec, labels={"k": "v" * 4096}),
        made(id="c", runtime=runtime, spec=spec, labels={"": "v"}),
        made(id="c", runtime=runtime, spec=spec, snapshot_key="k"),
        made(id="c", runtime=runtime, spec=spec, extensions={"": spec}),
    ):
        create = containers_pb2.CreateContainerRequest(container=container)
        yield s.refused(s.containers.Create, create)
    without = containers_pb2.CreateContainerRequest(container=made(id="without", runtime=runtime))
    yield asked(s, s.containers.Create, without)
    taken = s.make_container("c")
    yield s.refused(s.containers.Create, containers_pb2.CreateContainerRequest(container=taken))
    update = containers_pb2.UpdateContainerRequest
    for request in (
        update(container=made(id="d")),
        update(container=made(id="c")),
        update(container=made(id="c"), update_mask=FieldMask(paths=["runtime"])),
        update(container=made(id="c"), update_mask=FieldMask(paths=["nothing"])),
        update(container=made(id="c", labels={"k": "v" * 4096}), update_mask=FieldMask(paths=["labels"])),
    ):
        yield s.refused(s.containers.Update, request)
    for name in ("d", "", "a/b"):
        yield s.refused(s.containers.Get, containers_pb2.GetContainerRequest(id=name))
        yield s.refused(s.containers.Delete, containers_pb2.DeleteContainerRequest(id=name))


def _every_call_of(services: Services, name: str) -> list[tuple[Callable[..., object], object]]:
    t = services.tasks
    process = process_any(process_document())
    return [
        (t.Start, tasks_pb2.StartRequest(container_id=name)),
        (t.Start, tasks_pb2.StartRequest(container_id=name, exec_id="e")),
        (t.Delete, tasks_pb2.DeleteTaskRequest(container_id=name)),
        (t.DeleteProcess, tasks_pb2.DeleteProcessRequest(container_id=name, exec_id="e")),
        (t.Get, tasks_pb2.GetRequest(container_id=name, exec_id="e")),
        (t.Kill, tasks_pb2.KillRequest(container_id=name, signal=9)),
        (t.Kill, tasks_pb2.KillRequest(container_id=name, exec_id="e", signal=9)),
        (t.Exec, tasks_pb2.ExecProcessRequest(container_id=name, exec_id="f", spec=process)),
        (t.Exec, tasks_pb2.ExecProcessRequest(container_id=name, spec=process)),
        (t.Exec, tasks_pb2.ExecProcessRequest(container_id=name, exec_id="a/b", spec=process)),
        (t.Pause, tasks_pb2.PauseTaskRequest(container_id=name)),
        (t.Resume, tasks_pb2.ResumeTaskRequest(container_id=name)),
        (t.ResizePty, tasks_pb2.ResizePtyRequest(container_id=name, exec_id="e", width=1, height=1)),
        (t.CloseIO, tasks_pb2.CloseIORequest(container_id=name, exec_id="e", stdin=True)),
        (t.Wait, tasks_pb2.WaitRequest(container_id=name, exec_id="e")),
        (t.Create, tasks_pb2.CreateTaskRequest(container_id=name)),
    ]


def tasks_that_are_not_there(services: Services) -> Said:
    for method, request in _every_call_of(services, "none"):
        yield services.refused(method, request)
    services.make_container("c")
    for method, request in _every_call_of(services, "c")[:-1]:
        yield services.refused(method, request)
    others = (
        (services.tasks.ListPids, tasks_pb2.ListPidsRequest(container_id="c")),
        (services.tasks.Update, tasks_pb2.UpdateTaskRequest(container_id="c")),
        (services.tasks.Checkpoint, tasks_pb2.CheckpointTaskRequest(container_id="c")),
        (services.tasks.Wait, tasks_pb2.WaitRequest(container_id="c")),
        (services.tasks.Get, tasks_pb2.GetRequest(container_id="c")),
    )
    for method, request in others:
        yield services.refused(method, request)


def created_tasks(services: Services) -> Said:
    s = services
    s.make_container("c")
    s.make_task("c")
    yield s.refused(s.tasks.Create, tasks_pb2.CreateTaskRequest(container_id="c"))
    yield s.refused(s.tasks.Pause, tasks_pb2.PauseTaskRequest(container_id="c"))
    yield s.refused(s.tasks.Resume, tasks_pb2.ResumeTaskRequest(container_id="c"))
    yield s.refused(s.tasks.Checkpoint, tasks_pb2.CheckpointTaskRequest(container_id="c"))


def running_tasks(services: Services) -> Said:
    s = services
    s.run("c")
    for method, request in _every_call_of(s, "c"):
        if not isinstance(request, tasks_pb2.PauseTaskRequest | tasks_pb2.KillRequest) and not (
            isinstance(request, tasks_pb2.ExecProcessRequest) and request.exec_id == "f"
        ):
            yield s.refused(method, request)
    for number in (65, 99, 4_000_000_000):
        yield s.refused(s.tasks.Kill, tasks_pb2.KillRequest(container_id="c", signal=number))
    kill = tasks_pb2.KillRequest(container_id="c", exec_id="e", signal=9)
    yield s.refused(s.tasks.Kill, kill)


def paused_tasks(services: Services) -> Said:
    s = services
    s.run("c")
    s.add_exec("c", "e", *programs.TRUE)
    s.call(s.tasks.Pause, tasks_pb2.PauseTaskRequest(container_id="c"))
    for method, request in (
        (s.tasks.Pause, tasks_pb2.PauseTaskRequest(container_id="c")),
        (s.tasks.Start, tasks_pb2.StartRequest(container_id="c")),
        (s.tasks.Start, tasks_pb2.StartRequest(container_id="c", exec_id="e")),
        (s.tasks.Delete, tasks_pb2.DeleteTaskRequest(container_id="c")),
        (
            s.tasks.Exec,
            tasks_pb2.ExecProcessRequest(container_id="c", exec_id="f", spec=process_any(process_document())),
        ),
    ):
        yield s.refused(method, request)
    s.call(s.tasks.Resume, tasks_pb2.ResumeTaskRequest(container_id="c"))


def stopped_tasks(services: Services) -> Said:
    s = services
    s.run("c", *programs.TRUE)
    s.wait("c")
    for method, request in (
        (s.tasks.Start, tasks_pb2.StartRequest(container_id="c")),
        (s.tasks.Pause, tasks_pb2.PauseTaskRequest(container_id="c")),
        (s.tasks.Resume, tasks_pb2.ResumeTaskRequest(container_id="c")),
        (s.tasks.Kill, tasks_pb2.KillRequest(container_id="c", signal=9)),
        (s.tasks.Create, tasks_pb2.CreateTaskRequest(container_id="c")),
        (s.tasks.Checkpoint, tasks_pb2.CheckpointTaskRequest(container_id="c")),
        (
            s.tasks.Exec,
            tasks_pb2.ExecProcessRequest(container_id="c", exec_id="e", spec=process_any(process_document())),
        ),
    ):
        yield s.refused(method, request)


def execs(services: Services) -> Said:
    s = services
    s.run("c")
    s.add_exec("c", "e")
    again = tasks_pb2.ExecProcessRequest(container_id="c", exec_id="e", spec=process_any(process_document()))
    kill = tasks_pb2.KillRequest(container_id="c", exec_id="e", signal=9)
    start = tasks_pb2.StartRequest(container_id="c", exec_id="e")
    delete = tasks_pb2.DeleteProcessRequest(container_id="c", exec_id="e")
    yield s.refused(s.tasks.Exec, again)
    yield s.refused(s.tasks.Kill, kill)
    s.start("c", "e")
    yield s.refused(s.tasks.Exec, again)
    yield s.refused(s.tasks.Start, start)
    yield s.refused(s.tasks.DeleteProcess, delete)
    s.call(s.tasks.Kill, kill)
    s.wait("c", "e")
    yield s.refused(s.tasks.Kill, kill)
    yield s.refused(s.tasks.Start, start)
    resize = tasks_pb2.ResizePtyRequest(container_id="c", exec_id="e", width=1, height=1)
    yield s.refused(s.tasks.ResizePty, resize)
    s.call(s.tasks.DeleteProcess, delete)
    yield s.refused(s.tasks.DeleteProcess, delete)


def programs_that_do_not_start(services: Services) -> Said:
    s = services
    s.make_container("missing", *programs.MISSING)
    yield s.refused(s.tasks.Create, tasks_pb2.CreateTaskRequest(container_id="missing"))
    s.run("c")
    s.add_exec("c", "e", *programs.MISSING)
    yield s.refused(s.tasks.Start, tasks_pb2.StartRequest(container_id="c", exec_id="e"))
    for name in ("io.containerd.bogus.v1", "/no/such/shim", "bogus"):
        container = containers_pb2.Container(
            id=name.strip("/").replace("/", "-"),
            runtime=containers_pb2.Container.Runtime(name=name),
            spec=spec_any(s.spec()),
        )
        s.call(s.containers.Create, containers_pb2.CreateContainerRequest(container=container))
        yield s.refused(s.tasks.Create, tasks_pb2.CreateTaskRequest(container_id=container.id))


def stdio(services: Services) -> Said:
    s = services
    cases = (
        ("", "/no/such/out", "/no/such/err"),
        ("", "gopher://out", "gopher://out"),
        ("", "", "/dev/null"),
        ("", "/dev/null", ""),
        ("", "binary:///no/such/logger?a=b", ""),
        ("", "binary:///etc/passwd", ""),
        ("", "file:///dev/null/log", "/ignored"),
        ("", "file:///tmp", "/ignored"),
        ("", "fifo:///tmp/no-such", "fifo:///tmp/no-such"),
    )
    s.run("running")
    for number, (stdin, stdout, stderr) in enumerate(cases):
        name = f"c{number}"
        s.make_container(name)
        create = tasks_pb2.CreateTaskRequest(container_id=name, stdin=stdin, stdout=stdout, stderr=stderr)
        yield s.refused(s.tasks.Create, create)
        added = tasks_pb2.ExecProcessRequest(
            container_id="running",
            exec_id=name,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            spec=process_any(process_document()),
        )
        s.call(s.tasks.Exec, added)
        yield s.refused(s.tasks.Start, tasks_pb2.StartRequest(container_id="running", exec_id=name))


def terminals(services: Services) -> Said:
    s = services
    for number, stdout in enumerate(
        (
            "/no/such/out",
            "gopher://out",
            "file:///tmp/log",
            "binary:///no/such/logger",
            "binary:///etc/passwd",
        )
    ):
        container = containers_pb2.Container(
            id=f"c{number}",
            runtime=containers_pb2.Container.Runtime(name=RUNTIME),
            spec=spec_any(s.spec(terminal=True)),
        )
        s.create_container(container)
        create = tasks_pb2.CreateTaskRequest(container_id=container.id, stdout=stdout, terminal=True)
        yield s.refused(s.tasks.Create, create)


def content(services: Services) -> Said:
    c = services.content
    for digest in (_NO_DIGEST, "x", ""):
        for method, request in (
            (c.Info, content_pb2.InfoRequest(digest=digest)),
            (c.Read, content_pb2.ReadContentRequest(digest=digest)),
            (c.Delete, content_pb2.DeleteContentRequest(digest=digest)),
            (c.Update, content_pb2.UpdateRequest(info=content_pb2.Info(digest=digest))),
        ):
            yield services.refused(method, request)
    yield services.refused(c.Status, content_pb2.StatusRequest(ref="r"))
    yield services.refused(c.Abort, content_pb2.AbortRequest(ref="r"))


def images(services: Services) -> Said:
    i = services.images

    def image(name: str, **target: object) -> images_pb2.Image:
        fields = {"media_type": "type", "digest": _NO_DIGEST, "size": 1, **target}
        return images_pb2.Image(name=name, target=Descriptor(**fields))  # type: ignore[arg-type]  # fields that exist

    services.call(i.Create, images_pb2.CreateImageRequest(image=image("taken")))
    for made in (
        image(""),
        image("taken"),
        image("x", size=0),
        image("x", media_type=""),
        image("x", digest="z"),
        image("x", digest=""),
    ):
        yield services.refused(i.Create, images_pb2.CreateImageRequest(image=made))
    for name in ("none", ""):
        yield services.refused(i.Get, images_pb2.GetImageRequest(name=name))
        yield services.refused(i.Delete, images_pb2.DeleteImageRequest(name=name))
        yield services.refused(i.Update, images_pb2.UpdateImageRequest(image=image(name)))
    wrong = images_pb2.UpdateImageRequest(image=image("taken"), update_mask=FieldMask(paths=["x"]))
    yield services.refused(i.Update, wrong)


def leases(services: Services) -> Said:
    l = services.leases  # noqa: E741 - beside its requests it is clear
    services.call(l.Create, leases_pb2.CreateRequest(id="l"))
    yield services.refused(l.Create, leases_pb2.CreateRequest(id="l"))
    yield services.refused(l.Delete, leases_pb2.DeleteRequest(id="x"))
    yield services.refused(l.ListResources, leases_pb2.ListResourcesRequest(id="x"))
    for kind in ("bogus", "content", "snapshots", "snapshots/", "ingests/x"):
        resource = leases_pb2.Resource(id="r", type=kind)
        yield services.refused(l.AddResource, leases_pb2.AddResourceRequest(id="l", resource=resource))
    resource = leases_pb2.Resource(id="r", type="snapshots/native")
    yield services.refused(l.AddResource, leases_pb2.AddResourceRequest(id="x", resource=resource))
    yield services.refused(l.DeleteResource, leases_pb2.DeleteResourceRequest(id="x", resource=resource))
    services.call(l.Delete, leases_pb2.DeleteRequest(id="l"))


def snapshots(services: Services) -> Said:
    s = services.snapshots
    native = "native"
    make, save = snapshots_pb2.PrepareSnapshotRequest, snapshots_pb2.CommitSnapshotRequest
    services.call(s.Prepare, make(snapshotter=native, key="base"))
    services.call(s.Commit, save(snapshotter=native, key="base", name="done"))
    services.call(s.Prepare, make(snapshotter=native, key="above", parent="done"))
    for method, request in (
        (s.Prepare, make(key="k")),
        (s.Prepare, make(snapshotter="bogus", key="k")),
        (s.Prepare, make(snapshotter=native, key="above")),
        (s.Prepare, make(snapshotter=native, key="k", parent="none")),
        (s.Prepare, make(snapshotter=native, key="k", labels={"k": "v" * 4096})),
        (s.View, snapshots_pb2.ViewSnapshotRequest(snapshotter=native, key="k", parent="none")),
        (s.Commit, save(snapshotter=native, key="above", name="done")),
        (s.Commit, save(snapshotter=native, key="none", name="new")),
        (s.Mounts, snapshots_pb2.MountsRequest(snapshotter=native, key="done")),
        (s.Mounts, snapshots_pb2.MountsRequest(snapshotter=native, key="none")),
        (s.Remove, snapshots_pb2.RemoveSnapshotRequest(snapshotter=native, key="done")),
        (s.Remove, snapshots_pb2.RemoveSnapshotRequest(snapshotter=native, key="none")),
        (s.Stat, snapshots_pb2.StatSnapshotRequest(snapshotter=native, key="none")),
        (s.Usage, snapshots_pb2.UsageRequest(snapshotter=native, key="none")),
        (s.Cleanup, snapshots_pb2.CleanupRequest(snapshotter=native)),
        (
            s.Update,
            snapshots_pb2.UpdateSnapshotRequest(
                snapshotter=native,
                info=snapshots_pb2.Info(name="above"),
                update_mask=FieldMask(paths=["parent"]),
            ),
        ),
    ):
        yield services.refused(method, request)


def labels(services: Services) -> Said:
    s = services
    long = {"k" * 20: "v" * 4096}
    mask = FieldMask(paths=["labels"])
    native = "native"
    name = s.namespace
    target = Descriptor(media_type="type", digest=_NO_DIGEST, size=1)
    image = images_pb2.Image(name="i", target=target)
    labelled = images_pb2.Image(name="i", target=target, labels=long)
    s.make_container("c")
    s.call(s.images.Create, images_pb2.CreateImageRequest(image=image))
    s.call(s.snapshots.Prepare, snapshots_pb2.PrepareSnapshotRequest(snapshotter=native, key="k"))
    for method, request in (
        (s.images.Create, images_pb2.CreateImageRequest(image=labelled)),
        (s.images.Update, images_pb2.UpdateImageRequest(image=labelled, update_mask=mask)),
        (s.images.Update, images_pb2.UpdateImageRequest(image=labelled)),
        (s.leases.Create, leases_pb2.CreateRequest(id="l", labels=long)),
        (
            s.namespaces.Create,
            namespaces_pb2.CreateNamespaceRequest(
                namespace=namespaces_pb2.Namespace(name=f"{name}-2", labels=long)
            ),
        ),
        (
            s.namespaces.Update,
            namespaces_pb2.UpdateNamespaceRequest(namespace=namespaces_pb2.Namespace(name=name, labels=long)),
        ),
        (s.snapshots.Prepare, snapshots_pb2.PrepareSnapshotRequest(snapshotter=native, key="l", labels=long)),
        (
            s.snapshots.Commit,
            snapshots_pb2.CommitSnapshotRequest(snapshotter=native, key="k", name="l", labels=long),
        ),
        (
            s.snapshots.Update,
            snapshots_pb2.UpdateSnapshotRequest(
                snapshotter=native, info=snapshots_pb2.Info(name="k", labels=long), update_mask=mask
            ),
        ),
    ):
        yield asked(s, method, request)


def spaces(services: Services) -> Said:
    n = services.namespaces
    services.make_container("c")
    own = services.namespace
    made = namespaces_pb2.CreateNamespaceRequest(namespace=namespaces_pb2.Namespace(name=own))
    yield services.refused(n.Create, made)
    yield services.refused(n.Delete, namespaces_pb2.DeleteNamespaceRequest(name=own))
    yield services.refused(n.Delete, namespaces_pb2.DeleteNamespaceRequest(name=f"{own}-none"))


def sandboxes(services: Services) -> Said:
    """Since 1.7; of a record without a runtime the whole containerd would panic."""
    store = sandbox_pb2.StoreStub(services.channel)

    def sandbox(name: str, **labels: str) -> Sandbox:
        return Sandbox(sandbox_id=name, runtime=Sandbox.Runtime(name="r"), labels=labels)

    def create(name: str, **labels: str) -> sandbox_pb2.StoreCreateRequest:
        return sandbox_pb2.StoreCreateRequest(sandbox=sandbox(name, **labels))

    def update(name: str, *fields: str, **labels: str) -> sandbox_pb2.StoreUpdateRequest:
        return sandbox_pb2.StoreUpdateRequest(sandbox=sandbox(name, **labels), fields=fields)

    def look() -> Refused:
        """What there is, in the form of a refusal."""
        try:
            found = services.call(
                store.List, sandbox_pb2.StoreListRequest(filters=['labels."a"', "id==y"])
            ).list
        except grpc.RpcError as error:
            return Refused(error.code(), error.details() or "")
        told = [(each.sandbox_id, each.runtime.name, sorted(each.labels.items())) for each in found]
        return Refused(grpc.StatusCode.OK, repr(told))

    yield asked(services, store.Delete, sandbox_pb2.StoreDeleteRequest(sandbox_id="x"))
    yield asked(services, store.Get, sandbox_pb2.StoreGetRequest(sandbox_id="x"))
    yield look()
    yield asked(services, store.Create, create("x", a="1"))
    yield asked(services, store.Create, create("y"))
    yield asked(services, store.Create, create("z"))
    for name in ("x", "", "a b", _LONG_ID):
        yield asked(services, store.Create, create(name))
    yield look()
    yield asked(services, store.Update, update("x", "labels.b", b="2"))
    yield look()
    yield asked(services, store.Update, update("y", a="3"))
    yield look()
    yield asked(services, store.Update, update("none", a="3"))
    yield asked(services, store.Get, sandbox_pb2.StoreGetRequest(sandbox_id="none"))
    yield asked(services, store.List, sandbox_pb2.StoreListRequest(filters=["id=c"]))
    yield services.refused(store.List, sandbox_pb2.StoreListRequest(), namespace="")
    for name in ("x", "y", "z", "z"):
        yield asked(services, store.Delete, sandbox_pb2.StoreDeleteRequest(sandbox_id=name))
    yield look()


SITUATIONS: tuple[Callable[[Services], Said], ...] = (
    filters,
    names,
    what_is_not_served,
    topics,
    containers,
    tasks_that_are_not_there,
    created_tasks,
    running_tasks,
    paused_tasks,
    stopped_tasks,
    execs,
    programs_that_do_not_start,
    stdio,
    terminals,
    content,
    images,
    leases,
    snapshots,
    labels,
    spaces,
    sandboxes,
)


@pytest.fixture
def real(make_server: Callable[[str], Server]) -> Server:
    """The real containerd that the fake is compared with."""
    return make_server("containerd")


@pytest.mark.real
@pytest.mark.parametrize("runtime", ["scripted", "host"])
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
def test_the_fake_refuses_word_for_word(
    make_server: Callable[[str], Server],
    real: Server,
    situation: Callable[[Services], Said],
    runtime: str,
) -> None:
    fake = make_server(fake_like(real, runtime))

    assert said(fake, situation) == said(real, situation)


def said(server: Server, situation: Callable[[Services], Said]) -> list[str]:
    """What a server says in a situation, without what differs from run to run."""
    namespace = f"w-{uuid.uuid4().hex[:10]}"
    with grpc.insecure_channel(
        f"unix:{server.address}", options=(("grpc.default_authority", "localhost"),)
    ) as channel:
        services = Services(channel, namespace, server.rootfs, server.release)
        try:
            refusals = [repr(refused) for refused in situation(services)]
        finally:
            services.remove_everything()
    # A snapshot's number is in its server's own count; and runc 1.3 says more than the 1.1 before it.
    refusals = [re.sub(rf"{namespace}(/\d+/)?", "NAMESPACE", refusal) for refusal in refusals]
    return [refusal.replace("error during container init: ", "") for refusal in refusals]
