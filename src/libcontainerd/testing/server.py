"""FakeContainerd: the server, and what a test can do to it."""

from __future__ import annotations

import math
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import grpc
from grpc_health.v1 import health_pb2_grpc

from libcontainerd.errors import InvalidParameterError, NotFoundError
from libcontainerd.testing import timestamps
from libcontainerd.testing.calls import CallLog, Fault, Faults, Gate
from libcontainerd.testing.containers import Containers
from libcontainerd.testing.content import Content
from libcontainerd.testing.exchange import EventRule, Events, Exchange
from libcontainerd.testing.host import HostRuntime
from libcontainerd.testing.images import Images
from libcontainerd.testing.introspection import Health, Introspection, Version
from libcontainerd.testing.leases import Leases
from libcontainerd.testing.namespaces import Namespaces
from libcontainerd.testing.refusals import Refusal, closing
from libcontainerd.testing.releases import RELEASES
from libcontainerd.testing.sandboxes import Sandboxes
from libcontainerd.testing.scripted import Program, ScriptedProcess, ScriptedRuntime
from libcontainerd.testing.snapshots import Snapshots
from libcontainerd.testing.store import Store
from libcontainerd.testing.tasks import Tasks

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from google.protobuf.message import Message

    from libcontainerd._wire.pb.types.event_pb2 import Envelope
    from libcontainerd.testing.shim import Task

# A thread per call under way, made when it is needed: each Wait and each subscription takes one for as long as it lasts.
_MOST_CALLS: Final = 2000
_HEALTH: Final = "grpc.health.v1.Health"
_GRACE_SECONDS: Final = 0.05
_STOP_SECONDS: Final = 5.0
_MESSAGE_BYTES: Final = 16 << 20


def _socket_in(directory: Path) -> Path:
    return directory / "c.sock"


class FakeContainerd:
    r"""A containerd in this process, on a unix socket in a directory of its own.

    A context manager: entering it starts the server, leaving it ends every process, and removes every thread, descriptor and
    file. Several may run at once. All methods may be called from any thread.

    It behaves as containerd does, down to the texts of its errors.

    Args:
        runtime: What runs processes. ``"scripted"``: the test says what each does, see `script` and `process`, and nothing is
            forked. ``"host"``: they run on this machine, with its programs and files and as its user: nothing is isolated,
            no root filesystem, namespace, limit or user of a spec counts.
        version: Which containerd it behaves as, where releases differ: ``"1.6"``, ``"1.7"`` or ``"2.1"``.
        clock: What time it is; by default the real time.
        stdio_timeout: Seconds that a client may take to open its ends of a process's stdio; containerd's are 30.

    Attributes:
        calls: The record of the calls that clients have made.

    Example:
        >>> from libcontainerd.testing import FakeContainerd, prints
        >>> with FakeContainerd() as fake:
        ...     fake.script(prints(b"hello\n", exit_code=3), container_id="web")
    """

    def __init__(
        self,
        runtime: Literal["scripted", "host"] = "scripted",
        *,
        version: Literal["1.6", "1.7", "2.1"] = "1.6",
        clock: Callable[[], datetime] = timestamps.now,
        stdio_timeout: float = 30.0,
    ) -> None:
        if runtime not in ("scripted", "host"):
            raise InvalidParameterError(f'the runtime is "scripted" or "host", not {runtime!r}')
        if version not in RELEASES:
            raise InvalidParameterError(f"the version is one of {', '.join(RELEASES)}, not {version!r}")
        self.calls = CallLog()
        self._release = RELEASES[version]
        self._scripted = ScriptedRuntime() if runtime == "scripted" else None
        self._clock = clock
        self._stdio_timeout = stdio_timeout
        self._faults = Faults()
        self._store = Store(clock, self._release)
        self._exchange = Exchange(clock)
        self._content = Content(self._store, self._exchange)
        self._directory: Path | None = None
        self._lock = threading.Lock()  # makes starting and stopping one at a time; outermost
        self._server: grpc.Server | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._stopping = False
        self._tasks: Tasks | None = None
        self._snapshots: Snapshots | None = None
        self._introspection = Introspection(self._release)

    # ---------------------------------------------------------------------------------------------- starting, stopping

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """The socket's path, for `Client` and for ``ctr -a``."""
        return str(_socket_in(self.directory))

    @property
    def directory(self) -> Path:
        """The directory of its own; gone when it is stopped.

        Raises:
            NotFoundError: it was not started.
        """
        if self._directory is None:
            raise NotFoundError("this FakeContainerd was not started: enter it with 'with', or call start()")
        return self._directory

    @property
    def state_dir(self) -> str:
        """A directory under its own for a client's ``state_dir``."""
        return str(self.directory / "s")

    def start(self) -> None:
        """Start serving."""
        with self._lock:
            if self._directory is not None:
                return
            self._directory = Path(tempfile.mkdtemp(prefix="fc-"))
            self._snapshots = Snapshots(self._store, self._exchange, self._directory / "snapshots")
            self._tasks = Tasks(
                self._store,
                self._exchange,
                self._content,
                self._scripted or HostRuntime(self._release.drain_seconds),
                state_dir=str(self._directory),
                open_timeout=self._stdio_timeout,
                stopping=lambda: self._stopping,
            )
            self._serve()

    def stop(self) -> None:
        """Stop serving, end every process, and remove every file; idempotent."""
        with self._lock:
            directory, self._directory = self._directory, None
            if directory is None:
                return
            self._shut()
            self._faults.clear()
            self._clear()
            self._tasks = self._snapshots = None
            shutil.rmtree(directory, ignore_errors=True)

    def _clear(self) -> None:
        if self._tasks is not None:
            self._tasks.clear()
        if self._snapshots is not None:
            self._snapshots.clear()
        self._store.clear()
        self._content.clear()

    def _serve(self) -> None:
        tasks, snapshots = self._running_tasks(), self._snapshots
        if snapshots is None:
            raise NotFoundError("this FakeContainerd was stopped")
        self._stopping = False
        services = (
            Containers(self._store, self._exchange),
            Events(self._exchange),
            Images(self._store, self._exchange),
            Leases(self._store, self._content),
            Namespaces(self._store, self._exchange),
            Version(self._release, isolated=self._scripted is not None),
            self._introspection,
            self._content,
            snapshots,
            tasks,
            *([Sandboxes(self._store)] if self._release.keeps_sandboxes else []),
        )
        served = frozenset([_HEALTH, *(each.service.name for each in services)])
        executor = ThreadPoolExecutor(_MOST_CALLS, thread_name_prefix="fake-containerd")
        server = grpc.server(
            executor,
            interceptors=[Gate(self.calls, self._faults, lambda: self._stopping, self._release, served)],
            options=(
                ("grpc.max_receive_message_length", _MESSAGE_BYTES),
                ("grpc.max_send_message_length", _MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
            ),
        )
        server.add_generic_rpc_handlers(tuple(service.generic_handler() for service in services))
        health_pb2_grpc.add_HealthServicer_to_server(Health(), server)
        server.add_insecure_port(f"unix:{self.address}")
        server.start()
        self._server, self._executor = server, executor

    def _shut(self) -> None:
        """Stop serving.

        Calls under way are ended one by one, as a connection that breaks would: to cancel them all at once makes gRPC's core
        write about it to stderr, in every client.
        """
        server, self._server = self._server, None
        executor, self._executor = self._executor, None
        if server is None or executor is None:
            return
        self._stopping = True
        self._faults.wake()
        if self._tasks is not None:
            self._tasks.wake()
        self._exchange.drop_streams(closing())
        server.stop(_GRACE_SECONDS).wait(_STOP_SECONDS)
        executor.shutdown(wait=True)

    def go_down(self) -> None:
        """Stop serving as if containerd had been killed; shims and their processes go on. Idempotent."""
        with self._lock:
            self._exchange.go_down()
            self._shut()
            self._unlink_socket()

    def _unlink_socket(self) -> None:
        _socket_in(self.directory).unlink(missing_ok=True)

    def go_up(self, *, state: bool = True, keep_ended: bool | None = None, keep_events: bool = True) -> None:
        """Serve again.

        Args:
            state: Whether it still knows what it knew. Without, every process is ended and all is forgotten.
            keep_ended: Whether a task whose init has ended meanwhile is still known, and its exit told late. By default as
                the version does: 1.6 keeps it; 1.7 and later forget such a task, and its exit code, unless there is a sandbox of
                its name (`Client`'s ``keep_exits``).
            keep_events: Whether shims still tell what has happened meanwhile. They try for about 15 seconds, and then drop it.
        """
        with self._lock:
            if self._server is not None:
                return
            if not state:
                self._clear()
            elif not (self._release.keeps_ended if keep_ended is None else keep_ended):
                for namespace, container_id in self._running_tasks().forget_stopped():
                    self._exchange.forget_late(namespace, container_id)
            self._exchange.go_up(forget=not state or not keep_events)
            self._serve()

    def restart(
        self, *, state: bool = True, keep_ended: bool | None = None, keep_events: bool = True
    ) -> None:
        """`go_down`, then `go_up`."""
        self.go_down()
        self.go_up(state=state, keep_ended=keep_ended, keep_events=keep_events)

    def _running_tasks(self) -> Tasks:
        if self._tasks is None:
            raise NotFoundError("this FakeContainerd was stopped")
        return self._tasks

    # -------------------------------------------------------------------------------------------------- the processes

    def script(
        self,
        program: Program,
        *,
        container_id: str | None = None,
        exec_id: str | None = None,
        args: tuple[str, ...] = (),
    ) -> None:
        """Say what processes do, in the scripted runtime.

        A process that no rule fits runs until it is told to exit or is killed. Of several rules the last one counts.

        Args:
            program: A function that gets the `ScriptedProcess`, reads and writes, and returns the exit code.
            container_id: Of this container; None for any.
            exec_id: This exec, or with ``""`` the init process; None for any process.
            args: Those whose command line begins so.

        Raises:
            InvalidParameterError: processes are the host's here.
        """
        self._scripts().script(program, container_id, exec_id, args)

    def process(
        self,
        container_id: str,
        exec_id: str = "",
        *,
        namespace: str | None = None,
        timeout: float = 10.0,
    ) -> ScriptedProcess:
        """The process of that name that was started last, waiting for one.

        Raises:
            DeadlineExceededError: none was started in time (seconds).
            InvalidParameterError: processes are the host's here.
        """
        return self._scripts().find(container_id, exec_id, namespace, timeout)

    def set_metrics(self, metrics: Message) -> None:
        """Say what every task uses, in the scripted runtime.

        Args:
            metrics: A `libcontainerd.stats.CgroupV1Metrics`, a `CgroupV2Metrics`, or any other message.
        """
        self._scripts().set_metrics(metrics)

    def _scripts(self) -> ScriptedRuntime:
        if self._scripted is None:
            raise InvalidParameterError("only the scripted runtime's processes can be scripted")
        return self._scripted

    def kill_shim(self, container_id: str, *, namespace: str | None = None) -> None:
        """Kill a container's shim: its processes die, and containerd, if it is up, tells of init's end alone.

        Raises:
            NotFoundError: the container has no task.
        """
        tasks, task = self._task(container_id, namespace)
        tasks.forget(task)
        task.die(told=self._server is not None)

    def oom(self, container_id: str, *, namespace: str | None = None) -> None:
        """Have the out-of-memory killer end a container's init.

        Raises:
            NotFoundError: the container has no task.
        """
        _, task = self._task(container_id, namespace)
        task.tell_oom()
        task.kill("", 9, everyone=False)

    def updates(self, container_id: str, *, namespace: str | None = None) -> list[object]:
        """The limits that a container's task was given, as they came.

        Raises:
            NotFoundError: the container has no task.
        """
        _, task = self._task(container_id, namespace)
        with task.changed:
            return list(task.updates)

    def _task(self, container_id: str, namespace: str | None) -> tuple[Tasks, Task]:
        tasks = self._running_tasks()
        try:
            return tasks, tasks.find(namespace, container_id)
        except Refusal as refusal:
            raise NotFoundError(f"container {container_id!r} has no task here") from refusal

    # ----------------------------------------------------------------------------------------------------- the events

    def published(self) -> list[Envelope]:
        """Every event that was published, in order."""
        return self._exchange.history()

    def publish(self, namespace: str, topic: str, event: Message) -> None:
        """Publish an event of the test's own."""
        self._exchange.publish(namespace, topic, event)

    def wait_subscribed(self, count: int = 1, timeout: float = 10.0) -> bool:
        """Wait until so many clients are subscribed; False when the time (seconds) is up."""
        return self._exchange.wait_subscribed(count, timeout)

    def drop_event_streams(
        self,
        code: grpc.StatusCode | None = grpc.StatusCode.UNAVAILABLE,
        details: str = "transport is closing",
    ) -> int:
        """End every subscription, with a status or, with None, cleanly; say how many there were."""
        return self._exchange.drop_streams(None if code is None else Refusal(code, details))

    def lose_events(self, topic: str = "", times: int = 1) -> None:
        """Lose the next events of a topic, or of any."""
        self._exchange.add_rule(EventRule(topic, "lose", times))

    def duplicate_events(self, topic: str = "", times: int = 1) -> None:
        """Deliver the next events of a topic, or of any, twice."""
        self._exchange.add_rule(EventRule(topic, "duplicate", times))

    def delay_events(self, topic: str = "", times: int = 1) -> None:
        """Deliver the next events of a topic only after the event that follows them: the order is changed."""
        self._exchange.add_rule(EventRule(topic, "delay", times))

    # ----------------------------------------------------------------------------------------------------- the faults

    def fail(
        self,
        method: str,
        code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE,
        details: str = "injected",
        *,
        nth: int = 1,
        times: int | None = 1,
        after: bool = False,
        where: Callable[[Message], bool] | None = None,
    ) -> Fault:
        """Have calls of a method fail.

        Args:
            method: Service and method, such as ``Tasks/Start``.
            code: The status.
            details: Its text.
            nth: Which call is the first to fail, counted from 1.
            times: How many fail from then on; None for all.
            after: Do what was asked, and lose only the answer.
            where: Only calls whose request fulfils this.
        """
        return self._faults.add(
            Fault(method, refusal=Refusal(code, details), nth=nth, times=times, after=after, where=where)
        )

    def delay(
        self,
        method: str,
        seconds: float,
        *,
        nth: int = 1,
        times: int | None = 1,
        after: bool = False,
        where: Callable[[Message], bool] | None = None,
    ) -> Fault:
        """Have calls of a method take longer; else as `fail`."""
        return self._faults.add(
            Fault(method, seconds=seconds, nth=nth, times=times, after=after, where=where)
        )

    def hang(
        self,
        method: str,
        *,
        nth: int = 1,
        times: int | None = 1,
        after: bool = False,
        where: Callable[[Message], bool] | None = None,
    ) -> Fault:
        """Have calls of a method hang until `Fault.release`, or until the caller gives up; else as `fail`."""
        return self._faults.add(
            Fault(method, seconds=math.inf, nth=nth, times=times, after=after, where=where)
        )

    def clear_faults(self) -> None:
        """Remove all faults, and let calls go that hang."""
        self._faults.clear()
