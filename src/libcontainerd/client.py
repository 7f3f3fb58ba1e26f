"""Client: the verbs over the container map.

Where the three ways of this library meet: calls go down (`_wire`), events come up (`_events`), bytes go across (`cio`).
What they agree on is in `_records`. A verb first reserves what it is about to make, then talks to containerd without any
lock, then publishes or takes back.
"""

from __future__ import annotations

import atexit
import os
import signal as signals
import threading
import time
import weakref
from contextlib import suppress
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Final, TypeVar

import structlog

from libcontainerd import _cleanup as cleanup
from libcontainerd._bundle import state_directory
from libcontainerd._creating import Creator
from libcontainerd._events import catchup
from libcontainerd._events.delivery import Delivery
from libcontainerd._events.patrol import Patrol
from libcontainerd._events.serial import SerialQueue
from libcontainerd._events.strays import Strays
from libcontainerd._events.subscriber import Subscriber
from libcontainerd._records import Container, ContainerMap, Process
from libcontainerd._restore import Restorer
from libcontainerd._runtime import check_runtime, read_runtime_options
from libcontainerd._starting import Starter
from libcontainerd._stdin import StdinCloser
from libcontainerd._wire import typeurl
from libcontainerd._wire.connection import Address, Connection, Deadline
from libcontainerd._wire.identifiers import check_identifier
from libcontainerd._wire.pb.services import tasks_pb2
from libcontainerd._wire.pb.types import task_pb2
from libcontainerd._wire.pb.wellknown_pb2 import Empty
from libcontainerd._wire.shelter import Shelter
from libcontainerd.cio import null_io
from libcontainerd.errors import (
    CallCancelledError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidParameterError,
    LibcontainerdError,
    NotFoundError,
    SystemFailureError,
)
from libcontainerd.types import (
    INIT_PROCESS_NAME,
    ExitStatus,
    Restored,
    Status,
    Summary,
    Version,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    import grpc
    from google.protobuf.message import Message

    from libcontainerd import oci
    from libcontainerd._checkpoint import Checkpoints
    from libcontainerd._restore import AttachExecStdio
    from libcontainerd.cio import AttachStdio
    from libcontainerd.stats import Stats
    from libcontainerd.types import Backend

_CONNECT_SECONDS: Final = 10.0
_DELETE_RESERVE_SECONDS: Final = 15.0
"""What is kept of a deletion's deadline for containerd, whose shim may wait 10 s for output of its own."""

_LATE_EXECS_SECONDS: Final = 1.0
"""In which the exits of execs follow that of their init, which ends them."""

_JOIN_SECONDS: Final = 1.0
_WIND_UP_SECONDS: Final = 1.0
_ASK_AGAIN_SECONDS: Final = 5.0

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

_log = structlog.get_logger("libcontainerd")
_live_clients: weakref.WeakSet[Client] = weakref.WeakSet()


class Client:
    """One namespace of one containerd: its containers that this program looks after, and their events.

    A context manager: leaving it closes the client; containers keep running. Every method may be called from any thread,
    and from inside the backend's ``process_event``, also for the same container. ``timeout`` is in seconds and defaults to
    the client's ``default_timeout``; ``math.inf`` waits for ever. When it passes, the outcome is unknown
    (`DeadlineExceededError`); every blocking call also ends, with `CallCancelledError`, when the client is closed.

    Beside what each method says it raises, any may raise `UnavailableError`, `DeadlineExceededError`,
    `CallCancelledError`, `PermissionDeniedError`, `NotImplementedByServerError` and `SystemFailureError`.

    A client is of the process that made it. In a child that was forked from it every method raises
    `FailedPreconditionError`, and `close` does nothing; the child can make a client of its own. Programs that are started
    with `subprocess` inherit nothing of it.
    """

    def __init__(
        self,
        address: str | os.PathLike[str],
        *,
        namespace: str,
        state_dir: str | os.PathLike[str],
        backend: Backend | None = None,
        runtime: str = "io.containerd.runc.v2",
        default_timeout: float = 60.0,
        credentials: grpc.ChannelCredentials | None = None,
        runtime_options: Message | Mapping[str, object] | None = None,
        keep_exits: bool = False,
    ) -> None:
        """Connect, and return once no event of the namespace can be missed any more.

        Args:
            address: containerd's socket: a path, ``unix:///path``, or ``tcp://host:port`` with credentials.
            namespace: containerd's namespace to work in. It need not exist.
            state_dir: An absolute path under which each container gets a directory for its FIFOs.
            backend: Receives the events; None drops them.
            runtime: The shim's name for containers that name none, or the absolute path of a shim.
            default_timeout: Seconds for a call that names none.
            credentials: grpcio's channel credentials, for TCP.
            runtime_options: runc's options for containers of runc's shim, under those that `create` is given.
            keep_exits: Have containerd 1.7 and later keep the exit code of an init that ends while containerd is down, as 1.6 does;
                otherwise it is 255. For the containers that this client creates, at two calls more for each life. It rests on
                a side effect of containerd's store of sandboxes, where each task then has a record with the label
                ``libcontainerd/keep.exits``. Not for the namespace ``k8s.io``, where containerd itself removes such records.

        Raises:
            InvalidParameterError: an argument cannot be used.
            UnavailableError: no containerd answers there within ``min(default_timeout, 10)`` seconds.
            DeadlineExceededError: something takes the connection and does not answer in that time.
            PermissionDeniedError: this user may not connect.
        """
        check_identifier("namespace", namespace)
        if backend is not None and not callable(getattr(backend, "process_event", None)):
            raise InvalidParameterError(
                f"a backend has a method process_event; {type(backend).__name__} has none"
            )
        check_runtime(runtime)
        Deadline(default_timeout)
        self._state_dir = state_directory(state_dir)
        parsed = Address(address, with_credentials=credentials is not None)
        patience = Deadline(min(default_timeout, _CONNECT_SECONDS))
        parsed.check(patience)

        self._namespace = namespace
        self._default_timeout = default_timeout
        self._log = _log.bind(namespace=namespace)
        self._containers = ContainerMap()
        self._background = SerialQueue("background")
        self._closing = threading.Event()  # `close` has begun; what is queued may still finish
        self._cut = threading.Event()  # from here on verbs are refused, and those that wait are cut short
        self._closed = threading.Event()  # `close` is done
        # Lets one call of close be the first; innermost, nothing is called while it is held.
        self._lock = threading.Lock()
        self._connection = Connection(parsed, namespace=namespace, credentials=credentials)
        self._stdin = StdinCloser(self._connection, self._background, self._closing)
        self._shelter = Shelter(parsed, self._connection.metadata, credentials)
        self._creator = Creator(
            self._connection,
            self._shelter,
            self._containers,
            state_dir=self._state_dir,
            runtime=runtime,
            runtime_options=read_runtime_options(runtime_options),
            keep_exits=keep_exits,
            end_task=self._end_task,
            cut=self._cut,
        )
        self._starter = Starter(
            self._shelter, self._containers, self._stdin, lambda: self._checkpoints, self._cut
        )
        self._delivery = Delivery(
            self._connection, self._shelter, self._containers, backend, self._background
        )
        strays = Strays(self._connection, self._shelter, self._containers, self._background, self._state_dir)
        self._patrol = Patrol(self._connection, self._containers, self._delivery, self._background, strays)
        self._restorer = Restorer(
            self._connection,
            self._shelter,
            self._containers,
            self._delivery,
            self._stdin,
            state_dir=self._state_dir,
            keep_exits=keep_exits,
            look_again=self._patrol.catch_up,
            strays=strays,
            cut=self._cut,
        )
        self._subscriber = Subscriber(
            self._connection, on_event=self._delivery.receive, on_live=self._patrol.catch_up
        )
        try:
            self._subscriber.open(patience)
            self._patrol.start()
        except BaseException:
            self._subscriber.stop()
            self._connection.close()
            self._subscriber.join(_JOIN_SECONDS)
            raise
        _live_clients.add(self)
        # Last registered, first called: before the containerd that this one talks to is stopped.
        atexit.unregister(_close_at_exit)
        atexit.register(_close_at_exit)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._connection.inherited:
            state = "of another process"
        else:
            state = "closed" if self._closing.is_set() else f"{len(self._containers.all())} containers"
        return f"<Client of namespace {self._namespace!r} at {self._connection.address}: {state}>"

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closing.is_set()

    @cached_property
    def _checkpoints(self) -> Checkpoints:
        from libcontainerd._checkpoint import Checkpoints  # noqa: PLC0415 - for those who use it

        return Checkpoints(self._connection, self._shelter)

    # ------------------------------------------------------------------------------------------------- containers

    def version(self, *, timeout: float | None = None) -> Version:
        """Ask containerd for its version."""
        answer = self._connection.call(
            self._connection.versions.Version,
            Empty(),
            doing="ask for the version",
            deadline=self._deadline(timeout),
        )
        return Version(answer.version, answer.revision)

    def create(
        self,
        container_id: str,
        spec: oci.Spec | Mapping[str, object],
        runtime_options: Message | Mapping[str, object] | None = None,
        *,
        runtime: str | None = None,
        labels: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> None:
        """Make a container: its metadata in containerd, and its bundle directory. Nothing runs yet.

        Args:
            container_id: By containerd's rule: 76 characters at most, alphanumeric groups joined by single ``.``, ``_``
                or ``-``.
            spec: An OCI runtime spec, or a mapping that validates as one. Its ``root.path`` should be absolute: a relative one
                is taken from containerd's own bundle. A ``cgroupsPath`` that is not set becomes ``/ID@NAMESPACE`` for root;
                an empty one is left to runc.
            runtime_options: runc's options, as a message or as a mapping of its fields (``binary_name``, ``root``,
                ``systemd_cgroup`` and so on).
            runtime: The shim for this container.
            labels: Kept in containerd with the container.
            timeout: See the class.

        Raises:
            InvalidParameterError: an argument cannot be used. Nothing was touched.
            ConflictError: the id is taken, here or in containerd. Of two creations at once one wins, unharmed.
        """
        self._creator.create(
            container_id,
            spec,
            runtime_options,
            runtime=runtime,
            labels=labels,
            deadline=self._deadline(timeout),
        )

    def delete(self, container_id: str, *, timeout: float | None = None) -> None:
        """Remove a container from containerd, then its bundle, and free its id.

        With ``LIBCONTAINERD_NOCLEAN=1`` in the environment the bundle stays.

        Raises:
            NotFoundError: there is no such container.
            FailedPreconditionError: its task exists; call `delete_task` first. (containerd itself would accept it, and
                leave a process that nobody can reach.)
            ConflictError: another call is deleting it.
        """
        self._creator.delete(container_id, self._deadline(timeout))

    def replace(
        self,
        container_id: str,
        spec: oci.Spec | Mapping[str, object],
        runtime_options: Message | Mapping[str, object] | None = None,
        *,
        runtime: str | None = None,
        labels: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> None:
        """Make a container, after removing one of the same id that is in the way, with its task.

        For what an earlier run of a program has left behind, in containerd or here. Each step of the removal takes it well
        if there is nothing to remove any more.

        Args:
            container_id: As for `create`, like all others.
            spec: See `create`.
            runtime_options: See `create`.
            runtime: See `create`.
            labels: See `create`.
            timeout: See the class; for all steps together.

        Raises:
            InvalidParameterError: an argument cannot be used. The old container is still there.
            ConflictError: another call is making or deleting a container of that id.
        """
        deadline = self._deadline(timeout)
        self._creator.replace(
            container_id,
            spec,
            runtime_options,
            runtime=runtime,
            labels=labels,
            deadline=deadline,
        )

    def _end_task(self, container_id: str, deadline: Deadline, doing: str) -> None:
        """Kill and delete a task of ours; that it is gone already is no error."""
        with suppress(NotFoundError):
            self._containers.get(container_id, doing).require_task(doing)
            with suppress(NotFoundError):
                self.signal_process(
                    container_id, INIT_PROCESS_NAME, signals.SIGKILL, timeout=_left(deadline, doing)
                )
            self.wait(container_id, timeout=_left(deadline, doing))
            ended = self.delete_task(container_id, timeout=_left(deadline, doing))
            if isinstance(ended.error, LibcontainerdError) and not isinstance(ended.error, NotFoundError):
                raise ended.error

    # --------------------------------------------------------------------------------------- after a program's restart

    def restore(
        self,
        container_id: str,
        attach_stdio: AttachStdio = null_io,
        *,
        attach_exec_stdio: AttachExecStdio | None = None,
        timeout: float | None = None,
    ) -> Restored:
        """Take back a container that an earlier client has left: its record, task and execs, and their stdio.

        What ended while no client was there: init's end is told by ``alive=False``, by `wait`, and by `delete_task`, without
        an event; an exec's by an exit event with its real code, after which it is cleaned up like any other. The execs that
        ended with a task that containerd no longer knows are not told. An exec that was never started is deleted.

        Stdio is attached to the same FIFOs, and nothing that a process wrote meanwhile is missing: it waits when the FIFO is
        full. What had ended by then, with its output unread, may have lost it. Where FIFOs are gone, a process is restored
        without stdio, which is logged. A container whose task is gone can be started again.

        Args:
            container_id: A container that containerd has and this client does not.
            attach_stdio: What becomes of init's stdio; see `start`. A destination opens nothing: right for a process that was
                started with one, while one that was started with FIFOs then waits for a reader when they are full.
            attach_exec_stdio: The same for execs: a callback gets the exec's id first. None reads output and discards it,
                and leaves stdin open for `close_stdin`.
            timeout: See the class.

        Returns:
            Whether the task is alive, its pid, and the execs that run.

        Raises:
            NotFoundError: containerd has no such container.
            ConflictError: the id is in use here: created, restored, or just about to be.
            InvalidParameterError: an argument cannot be used.
            Exception: what a callback raised. After any error, no record, task or IO of this restore is left here, and
                processes go on.
        """
        deadline = self._deadline(timeout)
        return self._restorer.restore(container_id, attach_stdio, attach_exec_stdio, deadline)

    def restore_all(
        self,
        attach_stdio: AttachStdio,
        *,
        attach_exec_stdio: AttachExecStdio | None = None,
        timeout: float | None = None,
    ) -> dict[str, Restored | Exception]:
        """Restore every container of the namespace that a client of this library has made, for a daemon's start.

        For thousands, with a few calls together: only an exec costs calls of its own. Containers that are in use here
        already are left out. Empty directories below ``state_dir`` that belong to none are removed: a program that was killed
        while it made or removed a container has left them. Callbacks may be called from several threads; ``DirectIO.container_id`` says for which container.

        Args:
            attach_stdio: As for `restore`, like the others.
            attach_exec_stdio: See `restore`.
            timeout: See the class; for all of them together. A container of its own gets 20 seconds at most.

        Returns:
            For each container what `restore` would return, or raise: one that is broken spoils no other.

        Raises:
            InvalidParameterError: an argument cannot be used.
        """
        deadline = self._deadline(timeout)
        return self._restorer.restore_all(attach_stdio, attach_exec_stdio, deadline)

    # ------------------------------------------------------------------------------------------- starting processes

    def start(
        self,
        container_id: str,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        with_stdin: bool = False,
        attach_stdio: AttachStdio = null_io,
        *,
        timeout: float | None = None,
    ) -> int:
        """Create and start the container's task.

        Args:
            container_id: A container that has no task.
            checkpoint_dir: A directory that `create_checkpoint` has filled: the process goes on from there, instead of being
                begun anew. The spec and the root file system must be what they were. Needs criu.
            with_stdin: Give the process an stdin; otherwise its input is empty.
            attach_stdio: What becomes of its stdio: a callback that gets the open ends before the process exists and
                must return at once, or a destination; see `libcontainerd.cio`. What it raises aborts the start.
            timeout: See the class.

        Returns:
            The pid of the init process, in the host's pid namespace.

        Raises:
            NotFoundError: there is no such container.
            ConflictError: it is started already, or just being started.
            InvalidParameterError: an argument cannot be used, or the program is not there. After any error no task, FIFO,
                record, descriptor or content of this start is left.
            SystemFailureError: criu cannot restore the checkpoint; the message holds its reason, where it can be read.
        """
        deadline = self._deadline(timeout)
        return self._starter.start(
            container_id,
            checkpoint_dir=None if checkpoint_dir is None else os.path.abspath(checkpoint_dir),
            with_stdin=with_stdin,
            attach_stdio=attach_stdio,
            deadline=deadline,
        )

    def exec(
        self,
        container_id: str,
        process_id: str,
        process: oci.Process | Mapping[str, object],
        with_stdin: bool = False,
        attach_stdio: AttachStdio = null_io,
        *,
        timeout: float | None = None,
    ) -> int:
        """Start a further process in a running container.

        After its exit was delivered to the backend, its output is let to its end, it is deleted in containerd, its FIFOs
        are removed, and its id is free again.

        Args:
            container_id: A container whose task runs.
            process_id: The exec's id, by containerd's rule; unique among the container's execs.
            process: What to run, as the spec's ``process``, or a mapping that validates as one.
            with_stdin: As for `start`, like the rest.
            attach_stdio: See `start`.
            timeout: See the class.

        Returns:
            The pid, in the host's pid namespace.

        Raises:
            NotFoundError: there is no such container.
            InvalidParameterError: the container is not running, an argument cannot be used, or the program is not there.
            ConflictError: the exec's id is taken.
        """
        deadline = self._deadline(timeout)
        return self._starter.exec(
            container_id,
            process_id,
            process,
            with_stdin=with_stdin,
            attach_stdio=attach_stdio,
            deadline=deadline,
        )

    # ------------------------------------------------------------------------------------------- running processes

    def signal_process(
        self, container_id: str, process_id: str, signal: int, *, timeout: float | None = None
    ) -> None:
        """Send a signal to init (``"init"``) or an exec.

        A paused container gets a SIGKILL when it is thawed, so after a SIGKILL to its init it is resumed.

        Raises:
            NotFoundError: no such container or exec, the container is not running, or the process has ended.
            InvalidParameterError: that is no signal.
        """
        if signal not in range(1, signals.NSIG):
            raise InvalidParameterError(f"{signal!r} is no signal: want 1 to {signals.NSIG - 1}")
        deadline = self._deadline(timeout)
        doing = f"send signal {int(signal)} to {process_id!r} in container {container_id!r}"
        container = self._containers.get(container_id, doing)
        process = container.require_process(process_id, doing)
        self._connection.call(
            self._connection.tasks.Kill,
            tasks_pb2.KillRequest(container_id=container_id, exec_id=process.exec_id, signal=signal),
            doing=doing,
            deadline=deadline,
        )
        if signal == signals.SIGKILL and process.id == INIT_PROCESS_NAME and container.is_paused():
            with suppress(LibcontainerdError):  # it may be gone already, which is what was wanted
                self.resume(container_id, timeout=timeout)

    def resize_terminal(
        self, container_id: str, process_id: str, width: int, height: int, *, timeout: float | None = None
    ) -> None:
        """Set the size of a process's terminal, in columns and rows.

        Raises:
            NotFoundError: no such container or exec, or the container is not running.
            FailedPreconditionError: the process has ended.
            InvalidParameterError: a side is not 0 to 65535.
        """
        for side in (width, height):
            if side not in range(1 << 16):
                raise InvalidParameterError(f"a terminal's width and height are 0 to 65535, not {side!r}")
        deadline = self._deadline(timeout)
        doing = f"resize the terminal of {process_id!r} in container {container_id!r}"
        process = self._containers.get(container_id, doing).require_process(process_id, doing)
        if process.exit is not None:
            raise FailedPreconditionError(f"cannot {doing}: the process has ended")
        self._connection.call(
            self._connection.tasks.ResizePty,
            tasks_pb2.ResizePtyRequest(
                container_id=container_id, exec_id=process.exec_id, width=width, height=height
            ),
            doing=doing,
            deadline=deadline,
        )

    def close_stdin(self, container_id: str, process_id: str, *, timeout: float | None = None) -> None:
        """Let a process's input end after what has been written to it.

        The same as closing ``DirectIO.stdin``, but returns when it is done. A process that has ended is no error.

        Raises:
            NotFoundError: no such container or exec, or the container is not running.
        """
        deadline = self._deadline(timeout)
        doing = f"close the stdin of {process_id!r} in container {container_id!r}"
        container = self._containers.get(container_id, doing)
        process = container.require_process(process_id, doing)
        self._stdin.close(container, process, deadline)

    def pause(self, container_id: str, *, timeout: float | None = None) -> None:
        """Freeze a container's processes.

        Raises:
            NotFoundError: no such container, or it is not running.
            FailedPreconditionError: it is not in a state to be paused.
        """
        self._task_call(
            container_id,
            "pause",
            self._connection.tasks.Pause,
            tasks_pb2.PauseTaskRequest(container_id=container_id),
            timeout,
        )

    def resume(self, container_id: str, *, timeout: float | None = None) -> None:
        """Thaw a container's processes.

        Raises:
            NotFoundError: no such container, or it is not running.
            FailedPreconditionError: it is not paused.
        """
        self._task_call(
            container_id,
            "resume",
            self._connection.tasks.Resume,
            tasks_pb2.ResumeTaskRequest(container_id=container_id),
            timeout,
        )

    def status(self, container_id: str, *, timeout: float | None = None) -> Status:
        """The state of a container's task, as containerd sees it now.

        `Status.UNKNOWN` is containerd's answer where the container's shim is silent for two seconds (seen on 1.6): it may be fine a
        moment later.

        Raises:
            NotFoundError: no such container, or it has no task.
        """
        answer = self._task_call(
            container_id,
            "ask for the status of",
            self._connection.tasks.Get,
            tasks_pb2.GetRequest(container_id=container_id),
            timeout,
        )
        return catchup.status_of(answer.process)

    def list_pids(self, container_id: str, *, timeout: float | None = None) -> list[int]:
        """The pids of all of a container's processes, in the host's pid namespace.

        Raises:
            NotFoundError: no such container, or it is not running.
        """
        return [info.pid for info in self._list_pids(container_id, timeout)]

    def summary(self, container_id: str, *, timeout: float | None = None) -> list[Summary]:
        """A container's processes, with the names of those that this API started.

        Raises:
            NotFoundError: no such container, or it is not running.
        """
        processes = self._list_pids(container_id, timeout)
        doing = f"list the processes of container {container_id!r}"
        init = self._containers.get(container_id, doing).require_task(doing).pid
        return [Summary(info.pid, catchup.process_name(info, init)) for info in processes]

    def _list_pids(self, container_id: str, timeout: float | None) -> list[task_pb2.ProcessInfo]:
        answer = self._task_call(
            container_id,
            "list the processes of",
            self._connection.tasks.ListPids,
            tasks_pb2.ListPidsRequest(container_id=container_id),
            timeout,
        )
        return list(answer.processes)

    def stats(self, container_id: str, *, timeout: float | None = None) -> Stats:
        """What a container uses: processor time, memory, processes, block I/O.

        Also after its end, until its task is deleted.

        Raises:
            NotFoundError: no such container, or it has no task.
            SystemFailureError: containerd has no metrics of it, or they cannot be read.
        """
        from libcontainerd.stats import read_stats  # noqa: PLC0415 - for those who read metrics

        # The quotes are for the filter: an id can have signs that it would take for its own.
        request = tasks_pb2.MetricsRequest(filters=[f'id=="{container_id}"'])
        verb = "read the metrics of"
        answer = self._task_call(container_id, verb, self._connection.tasks.Metrics, request, timeout)
        for metric in answer.metrics:
            if metric.id == container_id:
                return read_stats(metric)
        self.status(container_id, timeout=timeout)  # raises where the task is gone
        raise SystemFailureError(f"cannot {verb} container {container_id!r}: containerd tells none")

    def stats_all(self, *, timeout: float | None = None) -> dict[str, Stats]:
        """What each of this client's containers uses, by id, with one question to containerd.

        A container without a task is left out, and so is one of which containerd has nothing to tell.

        Raises:
            SystemFailureError: what containerd tells cannot be read.
        """
        from libcontainerd.stats import read_stats  # noqa: PLC0415 - for those who read metrics

        deadline = self._deadline(timeout)
        answer = self._connection.call(
            self._connection.tasks.Metrics,
            tasks_pb2.MetricsRequest(),
            doing="read the metrics of all containers",
            deadline=deadline,
        )
        ours = {container.id for container in self._containers.all() if container.has_task()}
        return {metric.id: read_stats(metric) for metric in answer.metrics if metric.id in ours}

    def update_resources(
        self,
        container_id: str,
        resources: oci.LinuxResources | Mapping[str, object],
        *,
        timeout: float | None = None,
    ) -> None:
        """Change the limits of a container's task, while it runs.

        Args:
            container_id: A container whose task is there.
            resources: As the spec's ``linux.resources``. Only what is set in it is changed. The container's spec stays as
                it is, so its next task begins with the limits of that.
            timeout: See the class.

        Raises:
            NotFoundError: no such container, or it is not running.
            InvalidParameterError: the resources are not well-formed.
            FailedPreconditionError: the container uses more memory than the new limit, or its task has ended.
            SystemFailureError: the kernel or the runtime refuses a value.
        """
        from libcontainerd import oci  # noqa: PLC0415 - pydantic's 80 ms are for those who make containers

        document = oci.dump(oci.parse_resources(resources))
        self._task_call(
            container_id,
            "update the resources of",
            self._connection.tasks.Update,
            tasks_pb2.UpdateTaskRequest(
                container_id=container_id,
                resources=typeurl.pack_json(typeurl.LINUX_RESOURCES_URL, document),
            ),
            timeout,
        )

    def create_checkpoint(
        self,
        container_id: str,
        checkpoint_dir: str | os.PathLike[str],
        exit: bool = False,  # noqa: A002 - Go's name
        *,
        timeout: float | None = None,
    ) -> None:
        """Write the state of a container's processes into a directory, for `start` to go on from. Needs criu.

        The container is frozen meanwhile (``paused`` and ``resumed`` are told), unless it is paused already; then it stays so.
        Execs are not part of a checkpoint, and nor is what the container has written to its root file system. The archive
        that containerd makes of it is removed from containerd in any case.

        Args:
            container_id: A container whose task runs, or is paused.
            checkpoint_dir: A directory that is empty or, in one that is there, not there yet. What is written is as secret as the
                processes' memory: a new directory, and every file, is for its owner alone.
            exit: End the task; it has then exited with code 137, and `delete_task` is to follow. Without it, it goes on.
            timeout: See the class. When it passes, the outcome is as unknown as always, and with `exit` the processes may be
                gone without a checkpoint: better give it time.

        Raises:
            NotFoundError: no such container, or it is not running.
            FailedPreconditionError: its task is not started yet, or has ended.
            InvalidParameterError: the directory cannot be used. Nothing was touched.
            SystemFailureError: criu cannot do it, and then says why, as far as its log can be read; or what containerd made of it
                is no checkpoint, or its archive is not to be trusted; or the disk is full. The directory is as it was.
        """
        deadline = self._deadline(timeout)
        container = self._containers.get(container_id, f"checkpoint container {container_id!r}")
        directory = os.path.abspath(checkpoint_dir)
        self._checkpoints.create(container, directory, leave=not exit, deadline=deadline)
        if exit and deadline.remaining() > 0:
            # It has ended, but who deletes it now should not have to be told that its exit is not known yet.
            with suppress(DeadlineExceededError, NotFoundError):
                self.wait(container_id, timeout=deadline.remaining())

    def _task_call(
        self,
        container_id: str,
        verb: str,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout: float | None,
    ) -> _Response:
        deadline = self._deadline(timeout)
        doing = f"{verb} container {container_id!r}"
        self._containers.get(container_id, doing).require_task(doing)
        return self._connection.call(method, request, doing=doing, deadline=deadline)

    # ------------------------------------------------------------------------------------------------ their ends

    def wait(
        self, container_id: str, process_id: str = INIT_PROCESS_NAME, *, timeout: float | None = None
    ) -> ExitStatus:
        """Wait until a process has ended, and say how.

        For many callers, as often as they like: an exit that is known is answered at once, also after the process, or its
        whole container, was deleted (a bounded number is remembered). The exit's event may still be on its way to the
        backend, and output to its reader.

        Raises:
            NotFoundError: no such container or exec, or the container was never started.
            DeadlineExceededError: it goes on. A broken connection is not an exit either: it is waited through.
        """
        deadline = self._deadline(timeout)
        doing = f"wait for {process_id!r} in container {container_id!r}"
        container = self._containers.find(container_id) or self._containers.deleted(container_id)
        if container is None:
            raise NotFoundError(f"cannot {doing}: no such container")
        try:
            process = container.require_process(process_id, doing)
        except NotFoundError:
            if (status := container.last_exit(process_id)) is not None:
                return status
            raise
        while True:
            status = container.wait_exit(
                process, min(deadline.remaining(), _ASK_AGAIN_SECONDS), self._cut.is_set
            )
            if status is not None:
                return status
            if self._cut.is_set():
                raise CallCancelledError(f"cannot {doing}: the client was closed meanwhile")
            if container.is_gone(process):
                raise NotFoundError(f"cannot {doing}: it never came to run")
            if deadline.remaining() <= 0:
                raise DeadlineExceededError(f"cannot {doing}: it has not ended in time")
            if container.claim_question(process, _ASK_AGAIN_SECONDS):
                self._delivery.look(
                    container, process, deadline=deadline
                )  # an event can get lost between the shim and containerd

    def delete_task(self, container_id: str, *, timeout: float | None = None) -> ExitStatus:
        """Delete the task of a container whose init has ended, and say how it ended.

        Output that was written before the exit has reached the attached IO when this returns, as long as its reader takes
        at least a byte in five seconds, and there is time.

        Like the original's, this raises nothing of what can go wrong between here and containerd: the code is then 255, the
        time now, ``error`` says why, and the call can be repeated unless containerd no longer knows the task.
        """
        deadline = self._deadline(timeout)
        try:
            doing = f"delete the task of container {container_id!r}"
            container = self._containers.get(container_id, doing)
            return self._delete_task(container, container.require_task(doing), doing, deadline)
        except LibcontainerdError as error:
            self._log.warning("task_not_deleted", container=container_id, error=str(error))
            return ExitStatus(255, datetime.now(UTC), error)

    def _delete_task(self, container: Container, task: Process, doing: str, deadline: Deadline) -> ExitStatus:
        if not container.claim_removal(task, _finite(deadline.remaining())):
            if task.exit is not None and container.is_gone(task):
                return task.exit
            raise DeadlineExceededError(f"cannot {doing}: another call is deleting it")
        had_execs = False
        try:
            if task.exit is None and not self._delivery.ask(container, task, deadline):
                raise FailedPreconditionError(f"cannot {doing}: it has not ended; signal it and wait first")
            container.wait_execs(min(_LATE_EXECS_SECONDS, deadline.remaining()), self._cut.is_set)
            for attached in container.attached():
                attached.process_ended()
            drained = self._delivery.drain(container, container.attached(), _before_the_shim(deadline))
            try:
                with self._shelter.enter(doing) as calls:
                    patience = _finite(_before_the_shim(deadline))
                    had_execs = cleanup.delete_ended_execs(
                        calls, container, doing=doing, deadline=deadline, patience=patience
                    )
                    answer = cleanup.delete_process(calls, container, task, doing=doing, deadline=deadline)
                container.note_exit(task, catchup.exit_status(answer.exit_status, answer.exited_at))
            except NotFoundError:
                pass  # deleted by another hand, or by a call of ours whose answer got lost: the exit is known
        except BaseException:
            container.release_removal(task)
            raise
        try:
            # The exit's event is before the deletion's answer in time, but comes on another stream.
            self._delivery.settle(container, task)
            if had_execs and drained:
                # What their deletions have brought is read before this returns, like the task's own.
                self._delivery.drain(container, container.attached(), deadline.remaining())
            self._delivery.finish(container, task, drained=drained)
        finally:
            container.forget(task)
        return task.exit or catchup.unknown_exit(None)

    # ------------------------------------------------------------------------------------------------------- closing

    def close(self, timeout: float = 10.0) -> None:
        """Stop: no more events, calls and IO; containers keep running. Idempotent.

        Reads no further events, lets those that are queued finish as long as there is time, cancels calls that are under
        way and IO that is attached, and closes the channel. Calls from other threads return when the first has done so.
        In a forked child it does nothing.

        Args:
            timeout: Seconds after which this returns in any case. A backend that is still blocked then keeps its thread.
        """
        if self._connection.inherited:
            return  # its parent's, as the containers are; and a lock that was held at the fork is held for ever
        deadline = time.monotonic() + timeout

        def left() -> float:
            return max(0.0, deadline - time.monotonic())

        with self._lock:
            first = not self._closing.is_set()
            self._closing.set()
        if not first:
            if not self._delivery.runs_caller():
                self._closed.wait(left())
            return
        _live_clients.discard(self)
        self._subscriber.stop()
        self._patrol.stop()
        self._delivery.close(left())
        self._background.close(min(left() / 2, _WIND_UP_SECONDS))
        self._cut.set()
        for container in self._containers.with_deleted():
            # A start that is under way is undone by its own thread; until then the shim waits for a reader.
            for attached in container.attached_and_started():
                with suppress(OSError):  # one that fails must not keep the others from their end
                    attached.abandon()
            container.wake()
        self._delivery.shut_leftovers()
        self._connection.close()
        self._shelter.close()
        self._background.close(left())
        self._subscriber.join(left())
        self._patrol.join(left())
        self._closed.set()

    def _deadline(self, timeout: float | None) -> Deadline:
        """The deadline of a verb that begins.

        Raises:
            CallCancelledError: the client is closed.
            FailedPreconditionError: this process was forked from the one that made the client.
        """
        self._connection.refuse_if_inherited()
        if self._cut.is_set():
            raise CallCancelledError("the client is closed")
        return Deadline(self._default_timeout if timeout is None else timeout)


def _close_at_exit() -> None:
    """A program that ends without closing its clients must not hang in gRPC's threads."""
    for client in list(_live_clients):
        client.close(timeout=1.0)


def _left(deadline: Deadline, doing: str) -> float:
    """The timeout of one step out of several."""
    seconds = deadline.remaining()
    if seconds <= 0:
        raise DeadlineExceededError(f"cannot {doing}: the deadline has passed")
    return seconds


def _before_the_shim(deadline: Deadline) -> float:
    """The seconds of a deletion's deadline that may go by before containerd is asked, which is then left some."""
    left = deadline.remaining()
    return left - min(_DELETE_RESERVE_SECONDS, left / 3)


def _finite(seconds: float) -> float:
    return min(seconds, threading.TIMEOUT_MAX)
