"""The tasks service: from requests to shims."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc

from libcontainerd._wire import typeurl
from libcontainerd._wire.pb.runc.linux_pb2 import CheckpointOptions as OldCheckpointOptions
from libcontainerd._wire.pb.runc.options_pb2 import CheckpointOptions
from libcontainerd._wire.pb.services import tasks_pb2
from libcontainerd._wire.pb.types.descriptor_pb2 import Descriptor
from libcontainerd._wire.pb.types.metrics_pb2 import Metric
from libcontainerd._wire.pb.wellknown_pb2 import Empty
from libcontainerd.testing.containers import find_container
from libcontainerd.testing.filters import FilterError, Filters, fields
from libcontainerd.testing.processes import Process, ProcessSpec, Runtime, State
from libcontainerd.testing.refusals import (
    Refusal,
    already_exists,
    identifier_fault,
    invalid_argument,
    lease_in,
    namespace_of,
    not_found,
    unknown,
)
from libcontainerd.testing.shim import Task
from libcontainerd.testing.timestamps import stamp

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from libcontainerd._wire.pb.services.containers_pb2 import Container
    from libcontainerd._wire.pb.wellknown_pb2 import Any
    from libcontainerd.testing.content import Content
    from libcontainerd.testing.exchange import Exchange
    from libcontainerd.testing.releases import Release
    from libcontainerd.testing.store import Store

_KILL: Final = 9
_CHECKPOINT_TYPE: Final = "application/vnd.containerd.container.criu.checkpoint.criu.tar"
_CONFIG_TYPE: Final = "application/vnd.containerd.container.checkpoint.config.v1+proto"


class Tasks(tasks_pb2.TasksServicer):
    """The tasks service, and the shims that there are.

    Args:
        store: Where the containers are.
        exchange: Where events go.
        content: Where checkpoints go.
        runtime: What runs processes.
        state_dir: The directory under which bundles are said to be.
        open_timeout: Seconds that a client may take to open its ends of stdio.
        stopping: Says whether the server is going away.
    """

    def __init__(
        self,
        store: Store,
        exchange: Exchange,
        content: Content,
        runtime: Runtime,
        *,
        state_dir: str,
        open_timeout: float,
        stopping: Callable[[], bool],
    ) -> None:
        self._stopping = stopping
        self._store = store
        self._exchange = exchange
        self._content = content
        self._runtime = runtime
        self._state_dir = state_dir
        self._open_timeout = open_timeout
        # Guards the map and the set, of which the latter's are in the map as None. Innermost; nothing is called under it.
        self._lock = threading.Lock()
        self._tasks: dict[tuple[str, str], Task | None] = {}
        self._being_made: set[Task] = set()

    # ------------------------------------------------------------------------------------------- what tests do to it

    def find(self, namespace: str | None, container_id: str) -> Task:
        """A task, in whatever namespace if None is given.

        Raises:
            Refusal: there is none.
        """
        with self._lock:
            for (space, container), task in self._tasks.items():
                if container == container_id and namespace in (None, space) and task is not None:
                    return task
        raise not_found(f"task {container_id}")

    def forget(self, task: Task) -> None:
        """The shim of a task is gone."""
        with self._lock:
            self._tasks = {key: each for key, each in self._tasks.items() if each is not task}

    def forget_stopped(self) -> list[tuple[str, str]]:
        """Lose the tasks whose init has ended, as containerd 1.7 and later do when they start, and say whose they were.

        One of whose name there is a sandbox is spared.
        """
        with self._store.lock:
            spared = {(name, each) for name, space in self._store.spaces() for each in space.sandboxes or ()}
        with self._lock:
            stopped = [
                task
                for key, task in self._tasks.items()
                if task is not None and task.init.state is State.STOPPED and key not in spared
            ]
        for task in stopped:
            self.forget(task)
            task.release()
        return [(task.init.spec.namespace, task.init.spec.container_id) for task in stopped]

    def clear(self) -> None:
        """End every process and forget every task."""
        with self._lock:
            tasks = [task for task in self._tasks.values() if task is not None]
            self._tasks.clear()
        for task in tasks:
            task.release()

    def wake(self) -> None:
        """Have those who wait look again: the server is going down."""
        with self._lock:
            tasks = [*self._being_made, *(task for task in self._tasks.values() if task is not None)]
        for task in tasks:
            task.give_up_opening()

    # ----------------------------------------------------------------------------------------------------- looking up

    def _task(self, context: grpc.ServicerContext, container_id: str) -> Task:
        namespace = namespace_of(context)
        find_container(self._store, namespace, container_id)
        with self._lock:
            task = self._tasks.get((namespace, container_id))
        if task is None:
            raise not_found_task(container_id)
        return task

    def Get(self, request: tasks_pb2.GetRequest, context: grpc.ServicerContext) -> tasks_pb2.GetResponse:
        """Describe a process."""
        task = self._task(context, request.container_id)
        return tasks_pb2.GetResponse(process=task.describe(request.exec_id))

    def List(
        self,
        request: tasks_pb2.ListTasksRequest,  # noqa: ARG002 - 1.6 does not look at the filter
        context: grpc.ServicerContext,
    ) -> tasks_pb2.ListTasksResponse:
        """Describe every task's init, also of containers that were deleted."""
        namespace = namespace_of(context)
        with self._lock:
            found = [
                task
                for (space, _), task in sorted(self._tasks.items(), key=lambda item: item[0])
                if space == namespace and task is not None
            ]
        return tasks_pb2.ListTasksResponse(tasks=[task.describe("") for task in found])

    def ListPids(
        self, request: tasks_pb2.ListPidsRequest, context: grpc.ServicerContext
    ) -> tasks_pb2.ListPidsResponse:
        """List a task's processes."""
        return tasks_pb2.ListPidsResponse(processes=self._task(context, request.container_id).pids())

    def Metrics(
        self, request: tasks_pb2.MetricsRequest, context: grpc.ServicerContext
    ) -> tasks_pb2.MetricsResponse:
        """Tell what tasks use."""
        namespace = namespace_of(context)
        try:
            filters = Filters(request.filters)
        except FilterError as error:
            raise Refusal(grpc.StatusCode.UNKNOWN, str(error)) from error
        with self._lock:
            tasks = [
                (container_id, task)
                for (space, container_id), task in self._tasks.items()
                if space == namespace and task is not None
            ]
        return tasks_pb2.MetricsResponse(
            metrics=[
                Metric(id=name, timestamp=stamp(self._store.clock()), data=typeurl.pack(task.metrics()))
                for name, task in tasks
                if filters.match(fields({"id": name, "namespace": namespace}))
            ]
        )

    # ------------------------------------------------------------------------------------------------------ beginning

    def Create(
        self, request: tasks_pb2.CreateTaskRequest, context: grpc.ServicerContext
    ) -> tasks_pb2.CreateTaskResponse:
        """Make a task: its init waits to be started."""
        namespace = namespace_of(context)
        container = find_container(self._store, namespace, request.container_id)
        key = namespace, request.container_id
        _check_runtime(container.runtime.name, self._store.release)
        spec = _spec_of(namespace, container, request)
        image = None
        if request.HasField("checkpoint"):
            image = self._read_checkpoint(namespace, request.checkpoint)
        with self._lock:
            if key in self._tasks:
                raise already_exists(f"task {request.container_id}")
            self._tasks[key] = None
        task = None
        try:
            task = Task(
                spec,
                request,
                runtime=self._runtime,
                publish=self._publisher(namespace),
                clock=self._store.clock,
                bundle=f"{self._state_dir}/io.containerd.runtime.v2.task/{namespace}/{request.container_id}",
                open_timeout=self._open_timeout,
                image=image,
            )
            with self._lock:
                self._being_made.add(task)
            if self._stopping():  # since before that, so that `wake` may have missed it
                task.give_up_opening()
            pid = task.create()
        except BaseException:
            if task is not None:
                task.release()
            with self._lock:
                self._tasks.pop(key, None)
                self._being_made -= {task}
            raise
        with self._lock:
            self._tasks[key] = task
            self._being_made.discard(task)
        if not task.restored:
            _when_answered(context, task.init.stdio.begin_input)
        return tasks_pb2.CreateTaskResponse(container_id=request.container_id, pid=pid)

    def _publisher(self, namespace: str) -> Callable[[str, Message], None]:
        return lambda topic, event: self._exchange.publish(namespace, topic, event)

    def _read_checkpoint(self, namespace: str, descriptor: Descriptor) -> dict[str, bytes]:
        if descriptor.media_type != _CHECKPOINT_TYPE:
            raise unknown(f'unsupported checkpoint type "{descriptor.media_type}"')
        try:
            data = self._content.read(namespace, descriptor.digest)
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                return {
                    member.name: file.read()
                    for member in tar
                    if (file := tar.extractfile(member)) is not None
                }
        except tarfile.TarError as error:
            raise unknown(f"failed to unpack checkpoint: {error}") from error

    def Start(
        self, request: tasks_pb2.StartRequest, context: grpc.ServicerContext
    ) -> tasks_pb2.StartResponse:
        """Let init or an exec run."""
        task = self._task(context, request.container_id)
        pid = task.start(request.exec_id, self._stopping)
        # As containerd does: an exec that has ended and was deleted meanwhile is not found any more.
        _when_answered(context, task.process(request.exec_id).stdio.begin_input)
        return tasks_pb2.StartResponse(pid=pid)

    def Exec(self, request: tasks_pb2.ExecProcessRequest, context: grpc.ServicerContext) -> Empty:
        """Keep what an exec shall be."""
        if not request.exec_id:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "exec id cannot be empty")
        task = self._task(context, request.container_id)
        if fault := identifier_fault(request.exec_id):
            raise invalid_argument(f"invalid exec id {request.exec_id}: {fault}")
        namespace = namespace_of(context)
        process = _json_of(request.spec)
        root = task.init.spec.root
        task.add_exec(ProcessSpec(namespace, request.container_id, request.exec_id, process, root), request)
        return Empty()

    # --------------------------------------------------------------------------------------------------------- ending

    def Kill(self, request: tasks_pb2.KillRequest, context: grpc.ServicerContext) -> Empty:
        """Send a signal."""
        task = self._task(context, request.container_id)
        task.kill(request.exec_id, request.signal, everyone=request.all)
        return Empty()

    def Wait(self, request: tasks_pb2.WaitRequest, context: grpc.ServicerContext) -> tasks_pb2.WaitResponse:
        """Answer when a process has ended."""
        process = self._task(context, request.container_id).wait(request.exec_id, context, self._stopping)
        return tasks_pb2.WaitResponse(exit_status=process.exit_status, exited_at=stamp(process.exited_at))

    def Delete(
        self, request: tasks_pb2.DeleteTaskRequest, context: grpc.ServicerContext
    ) -> tasks_pb2.DeleteResponse:
        """Undo a task whose init has ended or was never started."""
        task = self._task(context, request.container_id)
        process = task.delete()
        self.forget(task)
        return _deleted(process, "")

    def DeleteProcess(
        self, request: tasks_pb2.DeleteProcessRequest, context: grpc.ServicerContext
    ) -> tasks_pb2.DeleteResponse:
        """Forget an exec."""
        task = self._task(context, request.container_id)
        if not request.exec_id:
            task.check("delete")
            return _deleted(task.init, "")
        return _deleted(task.delete_exec(request.exec_id), request.exec_id)

    # -------------------------------------------------------------------------------------------------- in the middle

    def Pause(self, request: tasks_pb2.PauseTaskRequest, context: grpc.ServicerContext) -> Empty:
        """Freeze a task."""
        self._task(context, request.container_id).pause()
        return Empty()

    def Resume(self, request: tasks_pb2.ResumeTaskRequest, context: grpc.ServicerContext) -> Empty:
        """Thaw a task."""
        self._task(context, request.container_id).resume()
        return Empty()

    def ResizePty(self, request: tasks_pb2.ResizePtyRequest, context: grpc.ServicerContext) -> Empty:
        """Set a terminal's size."""
        task = self._task(context, request.container_id)
        task.resize(request.exec_id, request.width, request.height)
        return Empty()

    def CloseIO(self, request: tasks_pb2.CloseIORequest, context: grpc.ServicerContext) -> Empty:
        """Give up the shim's hold on a process's stdin."""
        task = self._task(context, request.container_id)
        process = task.process(request.exec_id)
        if request.stdin:
            process.stdio.close_input()
        return Empty()

    def Update(self, request: tasks_pb2.UpdateTaskRequest, context: grpc.ServicerContext) -> Empty:
        """Keep new limits; nothing enforces them here."""
        task = self._task(context, request.container_id)
        task.check("update")
        resources = _json_of(request.resources)
        with task.changed:
            task.updates.append(resources)
        return Empty()

    def Checkpoint(
        self, request: tasks_pb2.CheckpointTaskRequest, context: grpc.ServicerContext
    ) -> tasks_pb2.CheckpointTaskResponse:
        """Make content that a task can be made of again: it holds what a scripted process says is its memory."""
        namespace = namespace_of(context)
        container = find_container(self._store, namespace, request.container_id)
        task = self._task(context, request.container_id)
        task.check("checkpoint")
        options = CheckpointOptions()
        if typeurl.is_a(request.options, CheckpointOptions):
            options = typeurl.unpack(request.options, CheckpointOptions)
        elif typeurl.is_a(request.options, OldCheckpointOptions):
            options.exit = typeurl.unpack(request.options, OldCheckpointOptions).exit
        files = task.checkpoint()
        if options.exit:
            task.kill("", _KILL, everyone=False)
            task.wait("", context, self._stopping)
        descriptors = []
        if options.image_path:
            for name, data in files.items():
                (Path(options.image_path) / name).write_bytes(data)
        else:
            config = container.spec.SerializeToString()
            for media_type, data in ((_CHECKPOINT_TYPE, _archive(files)), (_CONFIG_TYPE, config)):
                again = media_type == _CONFIG_TYPE and self._store.release.saves_specs_again
                digest = self._content.write(namespace, data, lease_in(context), again=again)
                descriptors.append(Descriptor(media_type=media_type, digest=digest, size=len(data)))
        return tasks_pb2.CheckpointTaskResponse(descriptors=descriptors)


def _when_answered(context: grpc.ServicerContext, callback: Callable[[], None]) -> None:
    if not context.add_callback(callback):
        callback()


def not_found_task(container_id: str) -> Refusal:
    """What containerd says of a container that has no task."""
    return Refusal(grpc.StatusCode.NOT_FOUND, f"task {container_id} not found")


def _deleted(process: Process, name: str) -> tasks_pb2.DeleteResponse:
    return tasks_pb2.DeleteResponse(
        id=name,
        pid=process.pid,
        exit_status=process.exit_status,
        exited_at=stamp(process.exited_at),
    )


def _json_of(packed: Any) -> Mapping[str, object]:
    try:
        document: object = json.loads(packed.value)
    except ValueError as error:
        raise unknown("unexpected end of JSON input" if packed.value else "ttrpc: closed") from error
    if not isinstance(document, dict):
        raise unknown("json: cannot unmarshal into Go value")
    return document


def _spec_of(namespace: str, container: Container, request: tasks_pb2.CreateTaskRequest) -> ProcessSpec:
    doing = "failed to create shim task"
    try:
        document = _json_of(container.spec)
    except Refusal as refusal:
        raise refusal.within(f"{doing}: ") from refusal
    process, root = document.get("process"), document.get("root")
    path = root.get("path", "") if isinstance(root, dict) else ""
    mounted = next((mount.source for mount in request.rootfs if mount.type == "bind"), "")
    return ProcessSpec(
        namespace,
        container.id,
        "",
        process if isinstance(process, dict) else {},
        mounted or (path if isinstance(path, str) else ""),
    )


def _check_runtime(name: str, release: Release) -> None:
    doing = "failed to start shim: failed to resolve runtime path"
    if name in release.shims:
        return
    if name.startswith("/"):
        if Path(name).is_file():
            return
        raise Refusal(
            grpc.StatusCode.UNKNOWN,
            f"{doing}: invalid custom binary path: stat {name}: no such file or directory",
        )
    parts = name.split(".")
    if len(parts) < 2:
        text = (
            f"{doing}: invalid runtime name {name}, correct runtime name should be either format like"
            " `io.containerd.runc.v1` or a full path to the binary"
        )
        raise Refusal(grpc.StatusCode.UNKNOWN, text, since_2=text.replace("runc.v1", "runc.v2"))
    raise Refusal(
        grpc.StatusCode.UNKNOWN,
        f'{doing}: runtime "{name}" binary not installed "containerd-shim-{parts[-2]}-{parts[-1]}":'
        " file does not exist",
    )


def _archive(files: Mapping[str, bytes]) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return written.getvalue()
