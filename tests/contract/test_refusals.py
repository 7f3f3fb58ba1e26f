"""What containerd refuses, and in which words: the fake refuses the same in the same."""

from __future__ import annotations

import re
from collections.abc import Callable

import grpc
import pytest

from libcontainerd._wire.pb.services import containers_pb2, events_pb2, tasks_pb2
from libcontainerd._wire.pb.types import event_pb2
from libcontainerd._wire.pb.wellknown_pb2 import Any, FieldMask
from tests.contract import programs
from tests.contract.servers import Refused, Services, label_too_long, process_any, process_document, spec_any

UNKNOWN = grpc.StatusCode.UNKNOWN
NOT_FOUND = grpc.StatusCode.NOT_FOUND
INVALID = grpc.StatusCode.INVALID_ARGUMENT
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
EXISTS = grpc.StatusCode.ALREADY_EXISTS

_RULE = re.escape("must match ^[A-Za-z0-9]+(?:[._-](?:[A-Za-z0-9]+))*$")


def check(refused: Refused, code: grpc.StatusCode, pattern: str) -> None:
    """Compare a refusal with the words that 1.6 says; later ones leave out the last of them."""
    assert refused.code is code, refused
    assert re.search(pattern, refused.details), refused


# ---------------------------------------------------------------------------------------------------- namespaces, ids

ID_CALLS: dict[str, Callable[[Services], tuple[Callable[..., object], object]]] = {
    "Containers/Get": lambda s: (s.containers.Get, containers_pb2.GetContainerRequest(id="c")),
    "Containers/List": lambda s: (s.containers.List, containers_pb2.ListContainersRequest()),
    "Containers/ListStream": lambda s: (s.containers.ListStream, containers_pb2.ListContainersRequest()),
    "Containers/Delete": lambda s: (s.containers.Delete, containers_pb2.DeleteContainerRequest(id="c")),
    "Tasks/Create": lambda s: (s.tasks.Create, tasks_pb2.CreateTaskRequest(container_id="c")),
    "Tasks/Start": lambda s: (s.tasks.Start, tasks_pb2.StartRequest(container_id="c")),
    "Tasks/Get": lambda s: (s.tasks.Get, tasks_pb2.GetRequest(container_id="c")),
    "Tasks/List": lambda s: (s.tasks.List, tasks_pb2.ListTasksRequest()),
    "Tasks/Kill": lambda s: (s.tasks.Kill, tasks_pb2.KillRequest(container_id="c", signal=9)),
    "Tasks/Wait": lambda s: (s.tasks.Wait, tasks_pb2.WaitRequest(container_id="c")),
    "Tasks/Delete": lambda s: (s.tasks.Delete, tasks_pb2.DeleteTaskRequest(container_id="c")),
    "Tasks/DeleteProcess": lambda s: (
        s.tasks.DeleteProcess,
        tasks_pb2.DeleteProcessRequest(container_id="c", exec_id="e"),
    ),
    "Tasks/Exec": lambda s: (
        s.tasks.Exec,
        tasks_pb2.ExecProcessRequest(container_id="c", exec_id="e", spec=process_any(process_document())),
    ),
    "Tasks/Pause": lambda s: (s.tasks.Pause, tasks_pb2.PauseTaskRequest(container_id="c")),
    "Tasks/Resume": lambda s: (s.tasks.Resume, tasks_pb2.ResumeTaskRequest(container_id="c")),
    "Tasks/ListPids": lambda s: (s.tasks.ListPids, tasks_pb2.ListPidsRequest(container_id="c")),
    "Tasks/ResizePty": lambda s: (s.tasks.ResizePty, tasks_pb2.ResizePtyRequest(container_id="c")),
    "Tasks/CloseIO": lambda s: (s.tasks.CloseIO, tasks_pb2.CloseIORequest(container_id="c", stdin=True)),
    "Tasks/Update": lambda s: (s.tasks.Update, tasks_pb2.UpdateTaskRequest(container_id="c")),
    "Tasks/Checkpoint": lambda s: (s.tasks.Checkpoint, tasks_pb2.CheckpointTaskRequest(container_id="c")),
}


def test_every_call_wants_a_namespace(services: Services) -> None:
    for make in ID_CALLS.values():
        check(services.refused(*make(services), namespace=""), PRECONDITION, "namespace is required")
        check(
            services.refused(*make(services), namespace="a/b"),
            INVALID,
            f'namespace validation: identifier "a/b" {_RULE}',
        )


def test_a_container_that_is_not_there(services: Services) -> None:
    for name, make in ID_CALLS.items():
        if name.rpartition("/")[2] in ("List", "ListStream"):
            continue
        pattern = 'container "c" in namespace "t-.*": not found|container c: not found'
        check(services.refused(*make(services)), NOT_FOUND, pattern)


def test_a_container_that_has_no_task(services: Services) -> None:
    services.make_container("c")
    for name, make in ID_CALLS.items():
        if name.startswith("Tasks/") and name not in ("Tasks/Create", "Tasks/List"):
            check(services.refused(*make(services)), NOT_FOUND, "task c not found|not found")


@pytest.mark.parametrize(
    ("container_id", "pattern"),
    [
        ("", "create container failed validation: container.ID: identifier must not be empty"),
        ("a/b", f'container.ID: identifier "a/b" {_RULE}'),
        ("-a", f'container.ID: identifier "-a" {_RULE}'),
        ("a..b", _RULE),
        ("a" * 77, r"greater than maximum length \(76 characters\)"),
    ],
)
def test_a_malformed_container_id(services: Services, container_id: str, pattern: str) -> None:
    container = containers_pb2.Container(
        id=container_id, runtime=containers_pb2.Container.Runtime(name="r"), spec=spec_any({})
    )

    refused = services.refused(
        services.containers.Create, containers_pb2.CreateContainerRequest(container=container)
    )

    check(refused, INVALID, pattern)


def test_what_a_container_must_have(services: Services) -> None:
    runtime = containers_pb2.Container.Runtime(name="r")
    spec = spec_any({})
    for container, pattern in (
        (containers_pb2.Container(id="c", spec=spec), "container.Runtime.Name must be set"),
        (containers_pb2.Container(id="c", runtime=runtime), "container.Spec must be set"),
        (
            containers_pb2.Container(id="c", runtime=runtime, spec=spec, labels={"k": "v" * 4096}),
            re.escape(label_too_long(services)),
        ),
        (
            containers_pb2.Container(id="c", runtime=runtime, spec=spec, snapshot_key="k"),
            "container.Snapshotter must be set if container.SnapshotKey is set",
        ),
        (
            containers_pb2.Container(id="c", runtime=runtime, spec=spec, extensions={"": spec}),
            "container.Extension keys must not be zero-length",
        ),
    ):
        if services.release >= (1, 7) and pattern == "container.Spec must be set":
            continue  # since sandboxes, a container may be without
        request = containers_pb2.CreateContainerRequest(container=container)
        check(services.refused(services.containers.Create, request), INVALID, pattern)


def test_a_taken_container_id(services: Services) -> None:
    container = services.make_container("c")

    refused = services.refused(
        services.containers.Create, containers_pb2.CreateContainerRequest(container=container)
    )

    check(refused, EXISTS, 'container "c": already exists')


def test_what_of_a_container_may_change(services: Services) -> None:
    services.make_container("c", labels={"a": "1", "b": "2"})

    def update(*paths: str, **fields: object) -> containers_pb2.UpdateContainerRequest:
        return containers_pb2.UpdateContainerRequest(
            container=containers_pb2.Container(id="c", **fields),  # type: ignore[arg-type]  # fields that exist
            update_mask=FieldMask(paths=paths),
        )

    one = services.call(services.containers.Update, update("labels.a", labels={"a": "9"})).container
    gone = services.call(services.containers.Update, update("labels.b")).container
    image = services.call(services.containers.Update, update("image", image="i")).container
    every = services.call(services.containers.Update, update("labels", labels={"z": "1"})).container

    assert dict(one.labels) == {"a": "9", "b": "2"}
    assert dict(gone.labels) == {"a": "9"}
    assert image.image == "i"
    assert dict(every.labels) == {"z": "1"}
    check(
        services.refused(services.containers.Update, update("runtime")),
        INVALID,
        'cannot update "runtime" field on "c"',
    )
    check(services.refused(services.containers.Update, update()), INVALID, "Runtime.Name field is immutable")
    missing = containers_pb2.UpdateContainerRequest(container=containers_pb2.Container(id="d"))
    check(services.refused(services.containers.Update, missing), NOT_FOUND, 'container "d": not found')
    if services.release < (1, 7):  # a later containerd ends of it, with a Go panic
        check(
            services.refused(services.containers.Update, containers_pb2.UpdateContainerRequest()),
            INVALID,
            "Container.ID required",
        )


# ------------------------------------------------------------------------------------------------------------ filters


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", ["one", "two"]),
        ("id==one", ["one"]),
        ("id!=one", ["two"]),
        ("id~=^t", ["two"]),
        ("id~=|^t|", ["two"]),
        ("id~=/^t/", ["two"]),
        ("id~=(", []),
        ('id=="one"', ["one"]),
        ("id == one", ["one"]),
        ("labels.kind==first", ["one"]),
        ('labels."kind"==first', ["one"]),
        ("labels.kind", ["one"]),
        ("id==one,labels.kind==second", []),
        ("runtime.name==io.containerd.runc.v2", ["one", "two"]),
        ("bogus==1", []),
    ],
)
def test_filters_select(services: Services, text: str, found: list[str]) -> None:
    services.make_container("one", labels={"kind": "first"})
    services.make_container("two")

    answer = services.call(services.containers.List, containers_pb2.ListContainersRequest(filters=[text]))

    assert sorted(container.id for container in answer.containers) == found


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("id==", r"\[id==\]: expected value or quoted"),
        ("id=c", r'\[id >\|=\|< c\]: unsupported operator "="'),
        ("==", r"\[ >\|=\|< =\]: expected field or quoted"),
        ("id==a b", r"\[id==a >\| \|< b\]: unexpected input:  "),
        ("id==a,", "expected field or quoted"),
        ("id==/a", r"\[id== >\|/\|< a\]: quoted literal not terminated"),
        ('id=="a', "quoted literal not terminated"),
        ("id==|a|", "invalid quote encountered"),
    ],
)
def test_filters_that_do_not_parse(services: Services, text: str, reason: str) -> None:
    listed = services.refused(services.containers.List, containers_pb2.ListContainersRequest(filters=[text]))
    subscribed = services.refused(services.events.Subscribe, events_pb2.SubscribeRequest(filters=[text]))

    check(listed, INVALID, f"filters: parse error: .*{reason}")
    assert subscribed.code in (UNKNOWN, INVALID)
    assert re.search(f"failed parsing subscription filters: .*{reason}", subscribed.details), subscribed


# ------------------------------------------------------------------------------------------------------------- events


@pytest.mark.parametrize(
    ("topic", "reason"),
    [
        ("", 'envelope topic "": must not be empty'),
        ("a", "must start with '/'"),
        ("/", "must have at least one component"),
        ("/a/", 'failed validation on component "": identifier must not be empty'),
        ("/a b", f'failed validation on component "a b": identifier "a b" {_RULE}'),
    ],
)
def test_topics(services: Services, topic: str, reason: str) -> None:
    request = events_pb2.PublishRequest(topic=topic, event=Any(type_url="x"))

    check(services.refused(services.events.Publish, request), INVALID, reason)


def test_what_is_published_needs_a_namespace(services: Services) -> None:
    request = events_pb2.PublishRequest(topic="/a", event=Any(type_url="x"))
    nowhere = events_pb2.ForwardRequest(envelope=event_pb2.Envelope(topic="/a", event=Any(type_url="x")))
    never = events_pb2.ForwardRequest(
        envelope=event_pb2.Envelope(namespace="n", topic="/a", event=Any(type_url="x"))
    )

    check(
        services.refused(services.events.Publish, request, namespace=""),
        PRECONDITION,
        "namespace is required",
    )
    check(
        services.refused(services.events.Forward, nowhere), INVALID, "invalid namespace: identifier must not"
    )
    if services.release < (1, 7):  # later it counts as the year 1970
        check(services.refused(services.events.Forward, never), INVALID, "timestamp must be set")


# ------------------------------------------------------------------------------------------------------- tasks' states


def test_what_a_created_task_refuses(services: Services) -> None:
    services.make_container("c")
    services.make_task("c")
    tasks = services.tasks

    for method, request, code, pattern in (
        (tasks.Create, tasks_pb2.CreateTaskRequest(container_id="c"), EXISTS, "task c: already exists"),
        (
            tasks.Pause,
            tasks_pb2.PauseTaskRequest(container_id="c"),
            UNKNOWN,
            "cannot pause task in created state",
        ),
        (
            tasks.Resume,
            tasks_pb2.ResumeTaskRequest(container_id="c"),
            UNKNOWN,
            "cannot resume task in created state",
        ),
    ):
        check(services.refused(method, request), code, pattern)


def test_what_a_running_task_refuses(services: Services) -> None:
    services.run("c")
    tasks = services.tasks

    for method, request, code, pattern in (
        (tasks.Start, tasks_pb2.StartRequest(container_id="c"), UNKNOWN, "cannot start a running process"),
        (
            tasks.Delete,
            tasks_pb2.DeleteTaskRequest(container_id="c"),
            UNKNOWN,
            "failed to delete task: cannot delete a running process",
        ),
        (
            tasks.Resume,
            tasks_pb2.ResumeTaskRequest(container_id="c"),
            UNKNOWN,
            "cannot resume a running process",
        ),
        (tasks.Kill, tasks_pb2.KillRequest(container_id="c", signal=99), UNKNOWN, "invalid argument"),
        (
            tasks.Get,
            tasks_pb2.GetRequest(container_id="c", exec_id="e"),
            NOT_FOUND,
            "process does not exist e",
        ),
        (
            tasks.Kill,
            tasks_pb2.KillRequest(container_id="c", exec_id="e", signal=9),
            NOT_FOUND,
            "process does not exist e",
        ),
        (tasks.Exec, tasks_pb2.ExecProcessRequest(container_id="c"), INVALID, "exec id cannot be empty"),
        (
            tasks.Exec,
            tasks_pb2.ExecProcessRequest(
                container_id="c", exec_id="a/b", spec=process_any(process_document())
            ),
            INVALID,
            f'invalid exec id a/b: identifier "a/b" {_RULE}',
        ),
    ):
        check(services.refused(method, request), code, pattern)
    services.call(tasks.Kill, tasks_pb2.KillRequest(container_id="c", signal=0))


def test_what_a_paused_task_refuses(services: Services) -> None:
    services.run("c")
    services.add_exec("c", "e", *programs.TRUE)
    tasks = services.tasks
    services.call(tasks.Pause, tasks_pb2.PauseTaskRequest(container_id="c"))

    for method, request, pattern in (
        (tasks.Pause, tasks_pb2.PauseTaskRequest(container_id="c"), "cannot pause a paused container"),
        (tasks.Start, tasks_pb2.StartRequest(container_id="c"), "cannot start a paused process"),
        (tasks.Delete, tasks_pb2.DeleteTaskRequest(container_id="c"), "cannot delete a paused process"),
        (
            tasks.Start,
            tasks_pb2.StartRequest(container_id="c", exec_id="e"),
            "cannot exec in a paused container",
        ),
        (
            tasks.Exec,
            tasks_pb2.ExecProcessRequest(container_id="c", exec_id="f", spec=process_any(process_document())),
            "cannot exec in a paused state",
        ),
    ):
        check(services.refused(method, request), UNKNOWN, pattern)
    services.call(tasks.Resume, tasks_pb2.ResumeTaskRequest(container_id="c"))


def test_what_a_stopped_task_refuses(services: Services) -> None:
    services.run("c", *programs.TRUE)
    assert services.wait("c") == 0
    tasks = services.tasks

    for method, request, code, pattern in (
        (tasks.Start, tasks_pb2.StartRequest(container_id="c"), UNKNOWN, "cannot start a stopped process"),
        (
            tasks.Pause,
            tasks_pb2.PauseTaskRequest(container_id="c"),
            UNKNOWN,
            "cannot pause a stopped container",
        ),
        (
            tasks.Resume,
            tasks_pb2.ResumeTaskRequest(container_id="c"),
            UNKNOWN,
            "cannot resume a stopped container",
        ),
        (
            tasks.Kill,
            tasks_pb2.KillRequest(container_id="c", signal=9),
            NOT_FOUND,
            "process already finished: not found",
        ),
        (
            tasks.Exec,
            tasks_pb2.ExecProcessRequest(container_id="c", exec_id="e", spec=process_any(process_document())),
            UNKNOWN,
            "cannot exec in a stopped state",
        ),
        (tasks.Create, tasks_pb2.CreateTaskRequest(container_id="c"), EXISTS, "task c: already exists"),
    ):
        check(services.refused(method, request), code, pattern)
    assert not services.call(tasks.ListPids, tasks_pb2.ListPidsRequest(container_id="c")).processes
    services.call(tasks.Kill, tasks_pb2.KillRequest(container_id="c", signal=9, all=True))


def test_what_an_exec_refuses(services: Services) -> None:
    services.run("c")
    services.add_exec("c", "e")
    tasks = services.tasks
    again = tasks_pb2.ExecProcessRequest(container_id="c", exec_id="e", spec=process_any(process_document()))
    kill = tasks_pb2.KillRequest(container_id="c", exec_id="e", signal=9)
    start = tasks_pb2.StartRequest(container_id="c", exec_id="e")
    delete = tasks_pb2.DeleteProcessRequest(container_id="c", exec_id="e")

    check(services.refused(tasks.Exec, again), EXISTS, "id e: already exists")
    check(services.refused(tasks.Kill, kill), PRECONDITION, "process not created")
    services.start("c", "e")
    check(services.refused(tasks.Start, start), UNKNOWN, "cannot start a running process")
    check(services.refused(tasks.DeleteProcess, delete), UNKNOWN, "cannot delete a running process")
    services.call(tasks.Kill, kill)
    assert services.wait("c", "e") == 137
    check(services.refused(tasks.Kill, kill), NOT_FOUND, "process already finished: not found")
    check(services.refused(tasks.Start, start), UNKNOWN, "cannot start a stopped process")
    resize = tasks_pb2.ResizePtyRequest(container_id="c", exec_id="e", width=1, height=1)
    check(services.refused(tasks.ResizePty, resize), UNKNOWN, "cannot resize a stopped container")
    assert services.call(tasks.DeleteProcess, delete).exit_status == 137
    check(services.refused(tasks.DeleteProcess, delete), NOT_FOUND, "process does not exist e")


def test_a_program_that_is_not_there(services: Services) -> None:
    services.make_container("missing", *programs.MISSING)
    services.run("c")
    services.add_exec("c", "e", *programs.MISSING)
    # runc 1.3 says where in the start it was, for init.
    where = "(error during container init: )?" if services.release >= (2, 0) else ""
    nothing = f'unable to start container process: {where}exec: "no-such-program": executable file not found in \\$PATH'

    init = services.refused(services.tasks.Create, tasks_pb2.CreateTaskRequest(container_id="missing"))
    started = services.refused(services.tasks.Start, tasks_pb2.StartRequest(container_id="c", exec_id="e"))

    check(
        init, UNKNOWN, f"failed to create shim task: OCI runtime create failed: runc create failed: {nothing}"
    )
    check(started, UNKNOWN, f"OCI runtime exec failed: exec failed: {nothing}")
    assert services.process("missing") is None
    kept = services.process("c", "e")
    assert kept is not None
    assert (kept.status, kept.pid) == (1, 0)
    deleted = services.call(
        services.tasks.DeleteProcess, tasks_pb2.DeleteProcessRequest(container_id="c", exec_id="e")
    )
    assert deleted.pid == 0


def test_a_shim_that_is_not_there(services: Services) -> None:
    for name, pattern in (
        ("io.containerd.bogus.v1", 'binary not installed "containerd-shim-bogus-v1": file does not exist'),
        ("/no/such/shim", "invalid custom binary path: stat /no/such/shim: no such file or directory"),
    ):
        container = containers_pb2.Container(
            id=name.strip("/").replace("/", "-"),
            runtime=containers_pb2.Container.Runtime(name=name),
            spec=spec_any(services.spec()),
        )
        services.call(services.containers.Create, containers_pb2.CreateContainerRequest(container=container))
        request = tasks_pb2.CreateTaskRequest(container_id=container.id)
        check(services.refused(services.tasks.Create, request), UNKNOWN, pattern)


@pytest.mark.parametrize(
    ("stdout", "stderr", "pattern"),
    [
        (
            "/no/such/out",
            "/no/such/err",
            'opening file "/no/such/out" failed: open /no/such/out: no such file',
        ),
        ("gopher://out", "gopher://out", "unknown STDIO scheme gopher"),
    ],
)
def test_stdio_that_cannot_be_opened(services: Services, stdout: str, stderr: str, pattern: str) -> None:
    services.make_container("c")
    request = tasks_pb2.CreateTaskRequest(container_id="c", stdout=stdout, stderr=stderr)

    check(services.refused(services.tasks.Create, request), UNKNOWN, pattern)
    assert services.process("c") is None
