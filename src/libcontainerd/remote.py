"""Remote: one containerd, found at an address or started by us, and the clients made for it."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Final

from libcontainerd._bundle import state_directory
from libcontainerd._wire.identifiers import check_identifier
from libcontainerd.client import Client
from libcontainerd.errors import CallCancelledError, LibcontainerdError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    import grpc

    from libcontainerd.supervisor import Supervisor
    from libcontainerd.types import Backend

_BUNDLES: Final = "bundles"
_RUNC_ROOT: Final = "runc"


class Remote:
    """One containerd that clients are made for: made by `connect` or `start`, not by its constructor.

    A context manager that cleans up when it is left. All methods may be called from any thread.

    Attributes:
        address: Where containerd listens.
    """

    def __init__(
        self,
        address: str,
        state_dir: str,
        *,
        runtime: str,
        default_timeout: float,
        credentials: grpc.ChannelCredentials | None = None,
        supervisor: Supervisor | None = None,
        runtime_options: Mapping[str, object] | None = None,
        keep_exits: bool = False,
    ) -> None:
        """Use `connect` or `start` instead."""
        self.address = address
        self._state_dir = state_dir
        self._runtime = runtime
        self._default_timeout = default_timeout
        self._credentials = credentials
        self._supervisor = supervisor
        self._runtime_options = runtime_options
        self._keep_exits = keep_exits
        self._lock = threading.Lock()  # guards the two below; nothing is called while it is held
        self._clients: list[Client] = []
        self._cleaned_up = False

    @classmethod
    def connect(
        cls,
        address: str | os.PathLike[str],
        *,
        state_dir: str | os.PathLike[str],
        runtime: str = "io.containerd.runc.v2",
        default_timeout: float = 60.0,
        credentials: grpc.ChannelCredentials | None = None,
        keep_exits: bool = False,
    ) -> Remote:
        """Use a containerd that somebody else runs. `cleanup` will leave it alone.

        Nothing is asked of it before the first client is made.

        Args:
            address: As for `Client`.
            state_dir: An absolute path; each client keeps its containers' FIFOs in a directory of its own below it.
            runtime: As for `Client`.
            default_timeout: As for `Client`.
            credentials: As for `Client`.
            keep_exits: As for `Client`.

        Raises:
            InvalidParameterError: `state_dir` is not absolute.
        """
        return cls(
            os.fspath(address),
            state_directory(state_dir),
            runtime=runtime,
            default_timeout=default_timeout,
            credentials=credentials,
            keep_exits=keep_exits,
        )

    @classmethod
    def start(
        cls,
        root_dir: str | os.PathLike[str],
        state_dir: str | os.PathLike[str],
        *,
        address: str = "",
        uid: int | None = None,
        gid: int | None = None,
        log_level: str = "info",
        debug_address: str = "",
        metrics_address: str = "",
        snapshotter: str = "",
        plugins: Mapping[str, Mapping[str, object]] | None = None,
        binary: str = "containerd",
        path_prefix: str = "",
        environment: Mapping[str, str] | None = None,
        start_timeout: float = 30.0,
        stop_timeout: float = 15.0,
        health_timeout: float = 5.0,
        restart_attempts: int = 10,
        runtime: str = "io.containerd.runc.v2",
        default_timeout: float = 60.0,
        keep_exits: bool = False,
    ) -> Remote:
        """Start a private containerd and return once it serves.

        It is checked twice a second. One that has died is started again, and so is one that hangs: its goroutines' stacks
        are then in the log. Clients follow by themselves, and running containers stay. It ends with `cleanup`, or with
        this program; running containers survive that too.

        Args:
            root_dir: An absolute path for what containerd keeps: content, snapshots, metadata.
            state_dir: An absolute path for what is running: sockets, shims' and runc's state, the clients' FIFOs.
            address: The socket's path; by default ``containerd.sock`` in `state_dir`.
            uid: The socket's owner.
            gid: The socket's group.
            log_level: ``trace``, ``debug``, ``info``, ``warn``, ``error``, ``fatal`` or ``panic``.
            debug_address: A socket's path for containerd's own profiling.
            metrics_address: ``host:port`` to serve Prometheus metrics at.
            snapshotter: The snapshotter that must be there.
            plugins: Configuration by plugin, such as ``{"io.containerd.gc.v1.scheduler": {...}}``.
            binary: containerd's path, or its name in PATH.
            path_prefix: A directory put first in its PATH, for a runc and shims that belong to it.
            environment: Variables it gets beside this program's.
            start_timeout: Seconds until it must serve.
            stop_timeout: Seconds between SIGTERM and SIGKILL.
            health_timeout: Seconds that it may take to answer a health check; after three that failed it is hung.
            restart_attempts: How many starts in a row may fail, or not last for 10 s, before it is given up; the pauses
                between them double, up to 30 s. `failure` then says why.
            runtime: As for `Client`.
            default_timeout: As for `Client`.
            keep_exits: As for `Client`.

        Raises:
            InvalidParameterError: a value cannot be used, or there is no such binary. Nothing was touched.
            ConflictError: a containerd of these directories is running, under this program or another: `connect` to it.
            SystemFailureError: it ended before it served; the message holds the end of its log.
            DeadlineExceededError: it does not serve in time; likewise.
        """
        bundles_dir = state_directory(state_dir)
        # Five milliseconds of imports, for those alone who start one.
        from libcontainerd.supervisor import Options, Supervisor  # noqa: PLC0415

        supervisor = Supervisor(
            root_dir,
            state_dir,
            Options(
                address=address,
                uid=uid,
                gid=gid,
                log_level=log_level,
                debug_address=debug_address,
                metrics_address=metrics_address,
                snapshotter=snapshotter,
                plugins=plugins or {},
                binary=binary,
                path_prefix=path_prefix,
                environment=environment or {},
                start_timeout=start_timeout,
                stop_timeout=stop_timeout,
                health_timeout=health_timeout,
                restart_attempts=restart_attempts,
            ),
        )
        supervisor.start()
        return cls(
            supervisor.address,
            bundles_dir,
            runtime=runtime,
            default_timeout=default_timeout,
            supervisor=supervisor,
            # All containerds of a machine would otherwise share runc's own, and containers of one name would be one there.
            runtime_options={"root": os.path.join(bundles_dir, _RUNC_ROOT)},
            keep_exits=keep_exits,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cleanup()

    @property
    def failure(self) -> LibcontainerdError | None:
        """Why the containerd that was started here was given up, with the end of its log; None as long as it is not."""
        return self._supervisor.failure if self._supervisor else None

    def new_client(self, namespace: str, backend: Backend | None = None) -> Client:
        """Make a client for one of containerd's namespaces.

        While the containerd that was started here is being restarted, this waits for it, for ``start_timeout``.

        Raises:
            LibcontainerdError: as `Client` does; `CallCancelledError` after `cleanup`; `failure` when there is one.
        """
        check_identifier("namespace", namespace)
        with self._lock:
            late = self._cleaned_up
        if late:
            raise CallCancelledError(
                f"cannot make a client of namespace {namespace!r}: the remote was cleaned up"
            )
        if self._supervisor is not None:
            self._supervisor.wait_serving()
        client = Client(
            self.address,
            namespace=namespace,
            state_dir=os.path.join(self._state_dir, _BUNDLES, namespace),
            backend=backend,
            runtime=self._runtime,
            default_timeout=self._default_timeout,
            credentials=self._credentials,
            runtime_options=self._runtime_options,
            keep_exits=self._keep_exits,
        )
        with self._lock:
            late = self._cleaned_up
            if not late:
                self._clients = [*(each for each in self._clients if not each.closed), client]
        if late:
            client.close()
            raise CallCancelledError(
                f"cannot make a client of namespace {namespace!r}: the remote was cleaned up"
            )
        return client

    def cleanup(self) -> None:
        """Close the clients, and stop containerd if it was started here; idempotent. Containers keep running."""
        with self._lock:
            self._cleaned_up = True
            clients, self._clients = self._clients, []
        for client in clients:
            client.close()
        if self._supervisor is not None:
            self._supervisor.stop()
