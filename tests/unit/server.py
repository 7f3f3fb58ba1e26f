"""A scripted containerd: the few services that a client calls, in this process, with answers, errors and delays on order.

Nothing runs. A task is a row in a table, it ends when a test says so, and each call can be made to go wrong: see
`Scripted.script`. A script is a list of steps, one for each of the next calls of a method; a step gets the call's
context and what would answer it, and may answer otherwise, later or not at all.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import TracebackType
from typing import NoReturn, Self, TypeAlias, cast

import grpc
from google.protobuf.message import Message

from libcontainerd._wire import typeurl
from libcontainerd._wire.pb.events import task_pb2 as task_events
from libcontainerd._wire.pb.services import containers_pb2, events_pb2, sandbox_pb2, tasks_pb2, version_pb2
from libcontainerd._wire.pb.types import event_pb2, task_pb2
from libcontainerd._wire.pb.types import sandbox_pb2 as sandbox_types
from libcontainerd._wire.pb.wellknown_pb2 import Empty, Timestamp
from tests.unit.beside import DEADLINE, eventually

EXIT_SECONDS = 1_700_000_000
_THREADS = 48

Context: TypeAlias = grpc.ServicerContext
Step: TypeAlias = Callable[[Context, Callable[[], Message]], Message | bytes]


# ----------------------------------------------------------------------------------------------------------------- steps


def answer(context: Context, go_on: Callable[[], Message]) -> Message:
    """Answer as usual."""
    return go_on()


def fail(code: grpc.StatusCode, text: str = "scripted") -> Step:
    """Fail and do nothing."""

    def step(context: Context, go_on: Callable[[], Message]) -> NoReturn:
        context.abort(code, text)
        raise AssertionError

    return step


def lose(code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> Step:
    """Do it, and lose the answer."""

    def step(context: Context, go_on: Callable[[], Message]) -> NoReturn:
        go_on()
        context.abort(code, "the answer got lost")
        raise AssertionError

    return step


def say(data: bytes) -> Step:
    """Do nothing, and answer with these bytes, whatever they are."""
    return lambda context, go_on: data


class Held:
    """A call that is held up until it is let go, cancelled, or its server stops."""

    def __init__(self, *, first: bool = False) -> None:
        self.begun = threading.Event()
        self.cut = threading.Event()
        self._go = threading.Event()
        self._first = first

    def __call__(self, context: Context, go_on: Callable[[], Message]) -> Message:
        """Wait; with `first`, do it before."""
        done = go_on() if self._first else None
        if not context.add_callback(self._go.set):  # given up by its caller before it came here
            self._go.set()
        self.begun.set()
        self._go.wait()
        if not context.is_active():
            self.cut.set()
            context.abort(grpc.StatusCode.CANCELLED, "nobody waits for it")
        return go_on() if done is None else done

    def release(self) -> None:
        """Let it go."""
        self._go.set()


# ---------------------------------------------------------------------------------------------------------------- state


@dataclass
class Process:
    """One process, as containerd tells of it."""

    pid: int
    status: int = task_pb2.Status.CREATED
    code: int = 0
    terminal: bool = False
    killed: bool = False
    stdio: tuple[str, str, str] = ("", "", "")


@dataclass(frozen=True)
class Call:
    """One call that came in."""

    method: str
    request: Message
    metadata: dict[str, str]
    seconds: float | None


class _Stream:
    """One subscription."""

    def __init__(self, filters: list[str]) -> None:
        self.filters = filters
        self.queue: SimpleQueue[event_pb2.Envelope | bytes | tuple[grpc.StatusCode, str] | None] = (
            SimpleQueue()
        )


@dataclass
class Scripted:
    """The server; a context manager. Its tables may be read and changed by a test at any time."""

    containers: dict[str, containers_pb2.Container] = field(default_factory=dict)
    processes: dict[tuple[str, str], Process] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    sandboxes: dict[str, sandbox_types.Sandbox] = field(default_factory=dict)
    services: tuple[str, ...] = ("containers", "tasks", "events", "version")
    namespace: str = "test"

    def __post_init__(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="lcd-")
        self.path = os.path.join(self.directory, "s")
        self.address = f"unix:{self.path}"
        self.credentials: grpc.ServerCredentials | None = None
        self.port = 0
        self.streams: list[_Stream] = []
        self.lock = threading.RLock()
        self.ended = threading.Condition(self.lock)
        self._scripts: defaultdict[str, deque[Step]] = defaultdict(deque)
        self._pids = itertools.count(1001)
        self._server: grpc.Server | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self.directory)

    def start(self) -> None:
        """Serve, on the same socket as before."""
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="scripted")
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self._server = grpc.server(self._pool, interceptors=[_Script(self)], options=options)
        servicers = {
            "containers": _Containers(self),
            "tasks": _Tasks(self),
            "events": _Events(self),
            "version": _Version(self),
            "sandboxes": _Sandboxes(self),
        }
        handlers = tuple(servicers[name].generic_handler() for name in self.services)
        self._server.add_generic_rpc_handlers(handlers)
        if self.credentials is None:
            assert self._server.add_insecure_port(self.address)
        else:
            self.port = self._server.add_secure_port("localhost:0", self.credentials)
        self._server.start()

    def stop(self) -> None:
        """Be gone: every call and stream breaks."""
        server, self._server = self._server, None
        if server is None:
            return
        stopped = server.stop(None)
        self.end_streams()
        assert stopped.wait(DEADLINE)
        self._pool.shutdown()
        if os.path.exists(self.path):
            os.unlink(self.path)

    # Scripting.

    def script(self, method: str, *steps: Step) -> None:
        """Say what becomes of the next calls of a method, such as ``Tasks.Create``; those after them are as usual."""
        with self.lock:
            self._scripts[method].extend(steps)

    def forget_scripts(self) -> None:
        """Answer every call as usual from now on."""
        with self.lock:
            self._scripts.clear()

    def next_step(self, method: str) -> Step:
        """Take the step of a call that comes in."""
        with self.lock:
            steps = self._scripts[method]
            return steps.popleft() if steps else answer

    def called(self, method: str) -> list[Message]:
        """Return the requests that came in for a method."""
        return [call.request for call in list(self.calls) if call.method == method]

    def wait_for(self, method: str, count: int = 1) -> None:
        """Wait until a method was called."""
        eventually(lambda: len(self.called(method)) >= count, f"{count} calls of {method}")

    # Processes.

    def new_pid(self) -> int:
        """Return a pid that no process had."""
        return next(self._pids)

    def exit(self, container_id: str, exec_id: str = "", code: int = 0, *, told: bool = True) -> None:
        """Let a process end, and tell or not."""
        with self.lock:
            process = self.processes[container_id, exec_id]
            process.status, process.code = task_pb2.Status.STOPPED, code
            self.ended.notify_all()
        if told:
            self.tell_exit(container_id, exec_id)

    def tell_exit(self, container_id: str, exec_id: str = "") -> None:
        """Publish a process's exit."""
        process = self.processes[container_id, exec_id]
        self.tell(
            "exit",
            task_events.TaskExit(
                container_id=container_id,
                id=exec_id or container_id,
                pid=process.pid,
                exit_status=process.code,
                exited_at=Timestamp(seconds=EXIT_SECONDS),
            ),
        )

    def get(self, context: Context, container_id: str, exec_id: str = "") -> Process:
        """Find a process, or answer that there is none."""
        with self.lock:
            process = self.processes.get((container_id, exec_id))
        if process is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"process {container_id} {exec_id} not found")
        assert process is not None
        return process

    # Events.

    def tell(self, topic: str, message: Message, *, namespace: str = "") -> None:
        """Publish a task's event."""
        self.publish(f"/tasks/{topic}", message, namespace=namespace)

    def publish(self, topic: str, message: Message | None, *, namespace: str = "") -> None:
        """Publish any event to every stream."""
        envelope = event_pb2.Envelope(
            namespace=namespace or self.namespace,
            topic=topic,
            event=None if message is None else typeurl.pack(message),
        )
        self.send(envelope)

    def send(self, envelope: event_pb2.Envelope | bytes) -> None:
        """Send an envelope, or what may be none, to every stream."""
        with self.lock:
            streams = list(self.streams)
        for stream in streams:
            stream.queue.put(envelope)

    def end_streams(self, code: grpc.StatusCode | None = None) -> None:
        """End every stream: cleanly, or with a code."""
        with self.lock:
            streams, self.streams = self.streams, []
        for stream in streams:
            stream.queue.put(None if code is None else (code, "scripted end"))


class _Script(grpc.ServerInterceptor):  # type: ignore[type-arg] # it takes none at run time
    """Notes every call, and has its script decide what becomes of it."""

    def __init__(self, server: Scripted) -> None:
        self._server = server

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Message, Message] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Message, Message] | None:
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        service, _, method = handler_call_details.method.rpartition("/")
        name = f"{service.rpartition('.')[2]}.{method}"
        metadata = {
            key: value for key, value in handler_call_details.invocation_metadata if isinstance(value, str)
        }

        def note(request: Message, context: Context) -> Step:
            self._server.calls.append(Call(name, request, metadata, context.time_remaining()))
            return self._server.next_step(name)

        if handler.unary_stream is not None:
            stream = handler.unary_stream

            def watch(request: Message, context: Context) -> Iterator[Message]:
                instead = note(request, context)(context, Empty)
                if isinstance(instead, bytes):
                    return iter([cast("Message", instead)])
                return stream(request, context)

            return grpc.unary_stream_rpc_method_handler(
                watch, handler.request_deserializer, _raw_or(handler.response_serializer)
            )
        unary = handler.unary_unary
        assert unary is not None

        def call(request: Message, context: Context) -> Message:
            # Bytes are for the serializer below, which knows of them.
            return cast("Message", note(request, context)(context, lambda: unary(request, context)))

        return grpc.unary_unary_rpc_method_handler(
            call, handler.request_deserializer, _raw_or(handler.response_serializer)
        )


def _raw_or(serializer: Callable[[Message], bytes] | None) -> Callable[[Message | bytes], bytes]:
    """Let bytes pass that a test has chosen."""
    assert serializer is not None
    return lambda message: message if isinstance(message, bytes) else serializer(message)


# -------------------------------------------------------------------------------------------------------------- services


class _Containers(containers_pb2.ContainersServicer):
    def __init__(self, server: Scripted) -> None:
        self._server = server

    def Get(  # noqa: N802 - gRPC's name
        self, request: containers_pb2.GetContainerRequest, context: Context
    ) -> containers_pb2.GetContainerResponse:
        found = self._server.containers.get(request.id)
        if found is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"container {request.id!r} in namespace: not found")
        return containers_pb2.GetContainerResponse(container=found)

    def Create(  # noqa: N802
        self, request: containers_pb2.CreateContainerRequest, context: Context
    ) -> containers_pb2.CreateContainerResponse:
        with self._server.lock:
            if request.container.id in self._server.containers:
                context.abort(
                    grpc.StatusCode.ALREADY_EXISTS, f"container {request.container.id}: already exists"
                )
            self._server.containers[request.container.id] = request.container
        return containers_pb2.CreateContainerResponse(container=request.container)

    def ListStream(  # noqa: N802
        self, request: containers_pb2.ListContainersRequest, context: Context
    ) -> Iterator[containers_pb2.ListContainerMessage]:
        for found in list(self._server.containers.values()):
            yield containers_pb2.ListContainerMessage(container=found)

    def Delete(self, request: containers_pb2.DeleteContainerRequest, context: Context) -> Empty:  # noqa: N802
        if self._server.containers.pop(request.id, None) is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"container {request.id!r}: not found")
        return Empty()


def _describe(container_id: str, exec_id: str, process: Process) -> task_pb2.Process:
    ended = process.status == task_pb2.Status.STOPPED
    return task_pb2.Process(
        container_id=container_id,
        id=exec_id or container_id,
        stdin=process.stdio[0],
        stdout=process.stdio[1],
        stderr=process.stdio[2],
        terminal=process.terminal,
        pid=process.pid,
        status=process.status,
        exit_status=process.code,
        exited_at=Timestamp(seconds=EXIT_SECONDS) if ended else None,
    )


class _Tasks(tasks_pb2.TasksServicer):
    def __init__(self, server: Scripted) -> None:
        self._server = server

    def Create(  # noqa: N802
        self, request: tasks_pb2.CreateTaskRequest, context: Context
    ) -> tasks_pb2.CreateTaskResponse:
        name = request.container_id
        with self._server.lock:
            if name not in self._server.containers:
                context.abort(grpc.StatusCode.NOT_FOUND, f"container {name!r}: not found")
            if (name, "") in self._server.processes:
                context.abort(grpc.StatusCode.ALREADY_EXISTS, f"task {name}: already exists")
            made = self._server.processes[name, ""] = Process(
                self._server.new_pid(),
                terminal=request.terminal,
                stdio=(request.stdin, request.stdout, request.stderr),
            )
        self._server.tell("create", task_events.TaskCreate(container_id=name, pid=made.pid))
        return tasks_pb2.CreateTaskResponse(container_id=name, pid=made.pid)

    def Start(self, request: tasks_pb2.StartRequest, context: Context) -> tasks_pb2.StartResponse:  # noqa: N802
        name, exec_id = request.container_id, request.exec_id
        process = self._server.get(context, name, exec_id)
        process.status = task_pb2.Status.RUNNING
        if exec_id:
            process.pid = self._server.new_pid()
            started = task_events.TaskExecStarted(container_id=name, exec_id=exec_id, pid=process.pid)
            self._server.tell("exec-started", started)
        else:
            self._server.tell("start", task_events.TaskStart(container_id=name, pid=process.pid))
        return tasks_pb2.StartResponse(pid=process.pid)

    def Exec(self, request: tasks_pb2.ExecProcessRequest, context: Context) -> Empty:  # noqa: N802
        name, exec_id = request.container_id, request.exec_id
        self._server.get(context, name)
        with self._server.lock:
            if (name, exec_id) in self._server.processes:
                context.abort(grpc.StatusCode.ALREADY_EXISTS, f"id {exec_id}: already exists")
            self._server.processes[name, exec_id] = Process(
                0, terminal=request.terminal, stdio=(request.stdin, request.stdout, request.stderr)
            )
        self._server.tell("exec-added", task_events.TaskExecAdded(container_id=name, exec_id=exec_id))
        return Empty()

    def Get(self, request: tasks_pb2.GetRequest, context: Context) -> tasks_pb2.GetResponse:  # noqa: N802
        process = self._server.get(context, request.container_id, request.exec_id)
        return tasks_pb2.GetResponse(process=_describe(request.container_id, request.exec_id, process))

    def List(  # noqa: N802
        self, request: tasks_pb2.ListTasksRequest, context: Context
    ) -> tasks_pb2.ListTasksResponse:
        with self._server.lock:
            inits = {name: each for (name, exec_id), each in self._server.processes.items() if not exec_id}
        return tasks_pb2.ListTasksResponse(
            tasks=[_describe(name, "", process) for name, process in inits.items()]
        )

    def Kill(self, request: tasks_pb2.KillRequest, context: Context) -> Empty:  # noqa: N802
        process = self._server.get(context, request.container_id, request.exec_id)
        if process.status == task_pb2.Status.STOPPED:
            context.abort(grpc.StatusCode.NOT_FOUND, "process already finished: not found")
        if request.signal == 9 and process.status == task_pb2.Status.PAUSED:
            process.killed = True  # what is frozen dies when it is thawed
        elif request.signal == 9:
            self._server.exit(request.container_id, request.exec_id, 137)
        return Empty()

    def Delete(self, request: tasks_pb2.DeleteTaskRequest, context: Context) -> tasks_pb2.DeleteResponse:  # noqa: N802
        gone = self._delete(request.container_id, "", context)
        with self._server.lock:
            for key in [key for key in self._server.processes if key[0] == request.container_id]:
                del self._server.processes[key]
        return gone

    def DeleteProcess(  # noqa: N802
        self, request: tasks_pb2.DeleteProcessRequest, context: Context
    ) -> tasks_pb2.DeleteResponse:
        return self._delete(request.container_id, request.exec_id, context)

    def _delete(self, name: str, exec_id: str, context: Context) -> tasks_pb2.DeleteResponse:
        process = self._server.get(context, name, exec_id)
        if process.status not in (task_pb2.Status.CREATED, task_pb2.Status.STOPPED):
            context.abort(
                grpc.StatusCode.UNKNOWN, "failed to delete task: cannot delete a running process: unknown"
            )
        with self._server.lock:
            self._server.processes.pop((name, exec_id), None)
        return tasks_pb2.DeleteResponse(
            id=exec_id, pid=process.pid, exit_status=process.code, exited_at=Timestamp(seconds=EXIT_SECONDS)
        )

    def CloseIO(self, request: tasks_pb2.CloseIORequest, context: Context) -> Empty:  # noqa: N802
        self._server.get(context, request.container_id, request.exec_id)
        return Empty()

    def ResizePty(self, request: tasks_pb2.ResizePtyRequest, context: Context) -> Empty:  # noqa: N802
        self._server.get(context, request.container_id, request.exec_id)
        return Empty()

    def Pause(self, request: tasks_pb2.PauseTaskRequest, context: Context) -> Empty:  # noqa: N802
        self._server.get(context, request.container_id).status = task_pb2.Status.PAUSED
        self._server.tell("paused", task_events.TaskPaused(container_id=request.container_id))
        return Empty()

    def Resume(self, request: tasks_pb2.ResumeTaskRequest, context: Context) -> Empty:  # noqa: N802
        process = self._server.get(context, request.container_id)
        process.status = task_pb2.Status.RUNNING
        self._server.tell("resumed", task_events.TaskResumed(container_id=request.container_id))
        if process.killed:
            self._server.exit(request.container_id, code=137)
        return Empty()

    def Wait(self, request: tasks_pb2.WaitRequest, context: Context) -> tasks_pb2.WaitResponse:  # noqa: N802
        process = self._server.get(context, request.container_id, request.exec_id)
        with self._server.ended:
            context.add_callback(self._wake)
            self._server.ended.wait_for(
                lambda: process.status == task_pb2.Status.STOPPED or not context.is_active()
            )
        return tasks_pb2.WaitResponse(exit_status=process.code, exited_at=Timestamp(seconds=EXIT_SECONDS))

    def _wake(self) -> None:
        with self._server.ended:
            self._server.ended.notify_all()

    def Metrics(self, request: tasks_pb2.MetricsRequest, context: Context) -> tasks_pb2.MetricsResponse:  # noqa: N802
        return tasks_pb2.MetricsResponse()  # as containerd answers where reading them fails

    def ListPids(  # noqa: N802
        self, request: tasks_pb2.ListPidsRequest, context: Context
    ) -> tasks_pb2.ListPidsResponse:
        self._server.get(context, request.container_id)
        with self._server.lock:
            mine = [
                each for (name, _), each in self._server.processes.items() if name == request.container_id
            ]
        return tasks_pb2.ListPidsResponse(processes=[task_pb2.ProcessInfo(pid=each.pid) for each in mine])


class _Events(events_pb2.EventsServicer):
    def __init__(self, server: Scripted) -> None:
        self._server = server

    def Publish(self, request: events_pb2.PublishRequest, context: Context) -> Empty:  # noqa: N802
        self._server.send(
            event_pb2.Envelope(namespace=self._server.namespace, topic=request.topic, event=request.event)
        )
        return Empty()

    def Subscribe(  # noqa: N802
        self, request: events_pb2.SubscribeRequest, context: Context
    ) -> Iterator[event_pb2.Envelope]:
        stream = _Stream(list(request.filters))
        with self._server.lock:
            self._server.streams.append(stream)
        if not context.add_callback(lambda: stream.queue.put(None)):
            return  # given up, or its server stopped, before it came here
        while (item := stream.queue.get()) is not None:
            if isinstance(item, event_pb2.Envelope | bytes):
                yield cast("event_pb2.Envelope", item)
            else:
                code, text = item
                context.abort(code, text)


class _Version(version_pb2.VersionServicer):
    def __init__(self, server: Scripted) -> None:
        self._server = server

    def Version(self, request: Empty, context: Context) -> version_pb2.VersionResponse:  # noqa: N802
        return version_pb2.VersionResponse(version="1.6.20", revision="scripted")


class _Sandboxes(sandbox_pb2.StoreServicer):
    def __init__(self, server: Scripted) -> None:
        self._server = server

    def Get(  # noqa: N802
        self, request: sandbox_pb2.StoreGetRequest, context: Context
    ) -> sandbox_pb2.StoreGetResponse:
        found = self._server.sandboxes.get(request.sandbox_id)
        if found is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"sandbox {request.sandbox_id}: not found")
        return sandbox_pb2.StoreGetResponse(sandbox=found)
