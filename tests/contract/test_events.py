"""Events: which come, in which order, with what in them, and to whom."""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.message import Message

from libcontainerd._wire import typeurl
from libcontainerd._wire.pb.events import container_pb2, namespace_pb2, task_pb2
from libcontainerd._wire.pb.services import containers_pb2, events_pb2, namespaces_pb2, tasks_pb2
from libcontainerd._wire.pb.types import event_pb2
from libcontainerd._wire.pb.wellknown_pb2 import Any, Timestamp
from tests.contract import programs
from tests.contract.servers import Services, Subscription

Subscribe = Callable[..., Subscription]


def unpack(envelope: event_pb2.Envelope, kind: type[Message]) -> Message:
    assert envelope.event.type_url == kind.DESCRIPTOR.full_name
    return typeurl.unpack(envelope.event, kind)


def test_the_events_of_a_life(services: Services, subscribe: Subscribe) -> None:
    subscription = subscribe()
    pid = services.run("c")
    services.add_exec("c", "e", *programs.SPEAK)
    exec_pid = services.start("c", "e")
    services.wait("c", "e")
    # The shim answers the one who waits a moment before it tells the exit.
    made, created, started, added, exec_started, exec_exit = (subscription.next() for _ in range(6))
    services.call(services.tasks.DeleteProcess, tasks_pb2.DeleteProcessRequest(container_id="c", exec_id="e"))
    services.call(services.tasks.Pause, tasks_pb2.PauseTaskRequest(container_id="c"))
    services.call(services.tasks.Resume, tasks_pb2.ResumeTaskRequest(container_id="c"))
    services.kill("c")
    services.wait("c")
    paused, resumed, ended = (subscription.next() for _ in range(3))
    services.delete_task("c")
    # The shim tells it, perhaps late; of a containerd 2 it may get lost.
    deleted = subscription.next() if services.release < (2, 0) else None
    services.delete_container("c")
    removed = subscription.next()
    if deleted is None and removed.topic != "/containers/delete":
        deleted, removed = removed, subscription.next()

    assert (made.topic, unpack(made, container_pb2.ContainerCreate)) == (
        "/containers/create",
        container_pb2.ContainerCreate(
            id="c", runtime=container_pb2.ContainerCreate.Runtime(name="io.containerd.runc.v2")
        ),
    )
    create = typeurl.unpack(created.event, task_pb2.TaskCreate)
    assert created.topic == "/tasks/create"
    assert (create.container_id, create.pid, create.bundle.endswith("/c")) == ("c", pid, True)
    assert (started.topic, unpack(started, task_pb2.TaskStart)) == (
        "/tasks/start",
        task_pb2.TaskStart(container_id="c", pid=pid),
    )
    assert (added.topic, unpack(added, task_pb2.TaskExecAdded)) == (
        "/tasks/exec-added",
        task_pb2.TaskExecAdded(container_id="c", exec_id="e"),
    )
    assert (exec_started.topic, unpack(exec_started, task_pb2.TaskExecStarted)) == (
        "/tasks/exec-started",
        task_pb2.TaskExecStarted(container_id="c", exec_id="e", pid=exec_pid),
    )
    exit_of_exec = typeurl.unpack(exec_exit.event, task_pb2.TaskExit)
    assert exec_exit.topic == "/tasks/exit"
    assert (exit_of_exec.container_id, exit_of_exec.id, exit_of_exec.pid, exit_of_exec.exit_status) == (
        "c",
        "e",
        exec_pid,
        3,
    )
    assert (paused.topic, unpack(paused, task_pb2.TaskPaused)) == (
        "/tasks/paused",
        task_pb2.TaskPaused(container_id="c"),
    )
    assert (resumed.topic, unpack(resumed, task_pb2.TaskResumed)) == (
        "/tasks/resumed",
        task_pb2.TaskResumed(container_id="c"),
    )
    exit_of_init = typeurl.unpack(ended.event, task_pb2.TaskExit)
    assert (exit_of_init.id, exit_of_init.pid, exit_of_init.exit_status) == ("c", pid, 137)
    if deleted is not None:
        deletion = typeurl.unpack(deleted.event, task_pb2.TaskDelete)
        assert deleted.topic == "/tasks/delete"
        assert (deletion.container_id, deletion.id, deletion.pid, deletion.exit_status) == ("c", "", pid, 137)
        assert deletion.exited_at == exit_of_init.exited_at
    assert (removed.topic, unpack(removed, container_pb2.ContainerDelete)) == (
        "/containers/delete",
        container_pb2.ContainerDelete(id="c"),
    )
    assert all(each.namespace == services.namespace for each in (made, created, ended, removed))


def test_execs_that_do_not_start_are_only_added(services: Services, subscribe: Subscribe) -> None:
    subscription = subscribe("topic~=|^/tasks/|")  # before all: the start's event may be late
    services.run("c")
    services.add_exec("c", "bad", *programs.MISSING)
    services.refused(services.tasks.Start, tasks_pb2.StartRequest(container_id="c", exec_id="bad"))
    services.add_exec("c", "good", *programs.TRUE)
    services.start("c", "good")

    assert subscription.topics(6) == [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
    ]


def test_execs_end_before_their_init(services: Services, subscribe: Subscribe) -> None:
    services.run("c")
    services.add_exec("c", "e")
    services.start("c", "e")
    subscription = subscribe('topic=="/tasks/exit"')

    services.kill("c")

    exits = [typeurl.unpack(subscription.next().event, task_pb2.TaskExit) for _ in range(2)]
    assert sorted((each.id, each.exit_status) for each in exits) == [("c", 137), ("e", 137)]


def test_a_deleted_task_that_never_ran_ends_first(services: Services, subscribe: Subscribe) -> None:
    subscription = subscribe("topic~=|^/tasks/|")
    services.make_container("c")
    services.make_task("c")
    assert subscription.topics(1) == ["/tasks/create"]

    services.delete_task("c")

    if services.release < (1, 7):
        assert subscription.topics(2) == ["/tasks/exit", "/tasks/delete"]
        return
    # Later the two last come in either order, and may be lost with the shim, which ends at once.
    services.call(
        services.events.Publish, events_pb2.PublishRequest(topic="/tasks/after", event=Any(type_url="x"))
    )
    topics = subscription.topics(1)
    while topics[-1] != "/tasks/after":
        topics += subscription.topics(1)
    assert sorted({*topics, "/tasks/delete", "/tasks/exit"}) == [
        "/tasks/after",
        "/tasks/delete",
        "/tasks/exit",
    ]


def test_a_failed_creation_is_not_told(services: Services, subscribe: Subscribe) -> None:
    subscription = subscribe("topic~=|^/tasks/|")
    services.make_container("bad", *programs.MISSING)
    services.refused(services.tasks.Create, tasks_pb2.CreateTaskRequest(container_id="bad"))
    services.make_container("good")
    services.make_task("good")

    create = typeurl.unpack(subscription.next().event, task_pb2.TaskCreate)

    assert create.container_id == "good"


def test_filters_of_a_subscription(services: Services, subscribe: Subscribe) -> None:
    one = subscribe(f"namespace=={services.namespace},event.id==two")
    either = subscribe('topic=="/containers/create",event.id==one', 'topic=="/containers/delete"')
    for name in ("one", "two"):
        services.make_container(name)
    services.delete_container("two")

    assert one.topics(2) == ["/containers/create", "/containers/delete"]
    assert either.topics(2) == ["/containers/create", "/containers/delete"]


def test_what_is_published_arrives_as_it_was(services: Services, subscribe: Subscribe) -> None:
    subscription = subscribe("topic~=|^/mine/|", everywhere=True)
    event = Any(type_url="mine.Event", value=b"\x01\x02")
    services.call(services.events.Publish, events_pb2.PublishRequest(topic="/mine/published", event=event))
    forwarded = event_pb2.Envelope(
        timestamp=Timestamp(seconds=1), namespace="elsewhere", topic="/mine/forwarded", event=event
    )
    services.call(services.events.Forward, events_pb2.ForwardRequest(envelope=forwarded))

    published, arrived = subscription.next(), subscription.next()

    assert (published.namespace, published.topic, published.event) == (
        services.namespace,
        "/mine/published",
        event,
    )
    assert published.timestamp.seconds > 1
    assert arrived == forwarded


def test_namespaces_and_updates_are_told(services: Services, subscribe: Subscribe) -> None:
    name = f"{services.namespace}-2"
    subscription = subscribe(f"event.name=={name}", everywhere=True)
    space = namespaces_pb2.Namespace(name=name, labels={"a": "b"})
    services.call(services.namespaces.Create, namespaces_pb2.CreateNamespaceRequest(namespace=space))
    services.call(services.namespaces.Delete, namespaces_pb2.DeleteNamespaceRequest(name=name))

    created, deleted = subscription.next(), subscription.next()

    assert created.namespace == (name if services.release >= (1, 7) else services.namespace)
    assert deleted.namespace == name
    assert (created.topic, unpack(created, namespace_pb2.NamespaceCreate)) == (
        "/namespaces/create",
        namespace_pb2.NamespaceCreate(name=name, labels={"a": "b"}),
    )
    assert (deleted.topic, unpack(deleted, namespace_pb2.NamespaceDelete)) == (
        "/namespaces/delete",
        namespace_pb2.NamespaceDelete(name=name),
    )


def test_a_changed_container_is_told(services: Services, subscribe: Subscribe) -> None:
    services.make_container("c")
    subscription = subscribe('topic=="/containers/update"')
    container = services.container("c")
    container.labels["k"] = "v"
    services.call(services.containers.Update, containers_pb2.UpdateContainerRequest(container=container))

    update = typeurl.unpack(subscription.next().event, container_pb2.ContainerUpdate)

    assert update == container_pb2.ContainerUpdate(id="c", labels={"k": "v"})
