"""The thread that reads containerd's events: subscribe, prove it live, hand on, come back after a gap.

containerd does not acknowledge a subscription. So this one asks for a private topic as well, publishes to it until it
sees it, and only then is live: what happens from then on is not missed. A stream that ends, in whatever way, is begun
again until `close`; what was missed in between is for `on_live` to find out.
"""

from __future__ import annotations

import math
import random
import threading
import uuid
from typing import TYPE_CHECKING, Final, cast

import grpc
import structlog

from libcontainerd._wire.connection import Deadline
from libcontainerd._wire.pb.services.events_pb2 import PublishRequest, SubscribeRequest
from libcontainerd._wire.pb.wellknown_pb2 import Any
from libcontainerd.errors import (
    CallCancelledError,
    DeadlineExceededError,
    InvalidParameterError,
    LibcontainerdError,
    NotImplementedByServerError,
    PermissionDeniedError,
    SystemFailureError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from libcontainerd._wire.connection import Connection
    from libcontainerd._wire.pb.types.event_pb2 import Envelope

_BACKOFF_FIRST: Final = 0.1
_BACKOFF_MOST: Final = 2.0
_PROBE_FIRST: Final = 0.005
_PROBE_MOST: Final = 1.0

_HOPELESS: Final = (InvalidParameterError, NotImplementedByServerError, PermissionDeniedError)
"""What trying again does not mend: the other side is no containerd, or will not have us."""

_log = structlog.get_logger("libcontainerd")


class Subscriber:
    """One live subscription to a namespace's task events.

    `on_event` is called on the reading thread and must only decode and enqueue. `on_live` is called on the proving
    thread each time a subscription has been proven live again after a gap.
    """

    def __init__(
        self, connection: Connection, *, on_event: Callable[[Envelope], None], on_live: Callable[[], None]
    ) -> None:
        self._connection = connection
        self._on_event = on_event
        self._on_live = on_live
        self._log = _log.bind(namespace=connection.namespace)
        self._topic = f"/libcontainerd/subscription/{uuid.uuid4().hex}"
        namespace = connection.namespace
        # Two filters are alternatives; the terms of one, joined by a comma, must all hold.
        self._filters = (
            f"namespace=={namespace},topic~=|^/tasks/|",
            f'namespace=={namespace},topic=="{self._topic}"',
        )
        self._lock = threading.Lock()  # guards _failure and _prover; innermost, nothing is called under it
        self._failure: LibcontainerdError | None = None
        self._prover: threading.Thread | None = None
        self._closed = threading.Event()
        self._live = threading.Event()
        self._reader = threading.Thread(
            target=self._run, name=f"libcontainerd-events-{namespace}", daemon=True
        )

    def open(self, deadline: Deadline) -> None:
        """Start reading, and return once the subscription is proven.

        Raises:
            LibcontainerdError: containerd refuses, or is not there in time. `stop` is still to be called.
        """
        self._reader.start()
        self._prove(deadline)

    @property
    def live(self) -> bool:
        """Whether the subscription is proven and not interrupted."""
        return self._live.is_set()

    def stop(self) -> None:
        """Hand on no more events. The stream itself ends when its channel is closed; idempotent.

        It is not cancelled: grpcio keeps the connection of a single-threaded stream that was cancelled before its channel
        was closed (seen with 1.85: a socket is left for each).
        """
        self._closed.set()

    def join(self, timeout: float) -> bool:
        """Wait for the threads to end, after `stop` and the end of the channel; False when the time (seconds) is up."""
        deadline = Deadline(max(timeout, 0.001))
        with self._lock:
            threads = [self._reader, *filter(None, [self._prover])]
        for thread in threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(min(deadline.remaining(), threading.TIMEOUT_MAX))
        return not any(thread.is_alive() for thread in threads)

    def _run(self) -> None:
        backoff = _BACKOFF_FIRST
        while not self._closed.is_set():
            try:
                failure = self._read()
            except Exception as error:  # noqa: BLE001 - the thread outlives whatever grpcio does; it is logged below
                failure = SystemFailureError(f"cannot read events: {error!r}")
            if self._closed.is_set():
                return
            if self._live.is_set():
                self._live.clear()
                backoff = _BACKOFF_FIRST
                self._log.warning("events_interrupted", error=str(failure))
                self._start_prover()
            with self._lock:
                self._failure = failure
            self._closed.wait(backoff * random.uniform(0.5, 1.0))  # noqa: S311 - jitter is no secret
            backoff = min(backoff * 2, _BACKOFF_MOST)

    def _start_prover(self) -> None:
        while not self._closed.is_set():
            prover = threading.Thread(target=self._recover, name="libcontainerd-events-prover", daemon=True)
            with self._lock:
                self._prover = prover
            try:
                prover.start()
            except RuntimeError as error:
                # No thread can be had now, and without one nobody learns what was missed.
                self._log.warning("events_not_resumed", error=str(error))
                self._closed.wait(_BACKOFF_MOST)
            else:
                return

    def _recover(self) -> None:
        try:
            self._prove(Deadline(math.inf))
        except CallCancelledError:
            return
        self._log.info("events_resumed")
        self._on_live()

    def _prove(self, deadline: Deadline) -> None:
        """Publish to the private topic until it is seen.

        Raises:
            LibcontainerdError: the deadline passed, `close` was called, or containerd will never do it.
        """
        doing = f"subscribe to the events of namespace {self._connection.namespace!r} at {self._connection.address}"
        pause = _PROBE_FIRST
        failure: LibcontainerdError | None = None
        while not self._live.is_set():
            if self._closed.is_set():
                raise CallCancelledError(f"cannot {doing}: the client is closed")
            if deadline.remaining() <= 0:
                kind = UnavailableError if isinstance(failure, UnavailableError) else DeadlineExceededError
                raise kind(f"cannot {doing}: containerd does not answer") from failure
            try:
                self._connection.call(
                    self._connection.events.Publish,
                    PublishRequest(topic=self._topic, event=Any(type_url="libcontainerd.Probe")),
                    doing=doing,
                    deadline=deadline.at_most(_PROBE_MOST),
                )
                with self._lock:
                    failure = self._failure
            except LibcontainerdError as error:
                # What the last attempt, which the deadline cuts short, tells is less than what the one before it told.
                cut = isinstance(error, DeadlineExceededError) and deadline.remaining() <= 0
                failure = failure if cut and failure is not None else error
            if isinstance(failure, _HOPELESS) and math.isfinite(deadline.remaining()):
                raise failure
            self._live.wait(min(pause, deadline.remaining()))
            pause = min(pause * 2, _PROBE_MOST)

    def _read(self) -> LibcontainerdError:
        """Read one stream to its end, and say how it ended."""
        doing = f"read the events of namespace {self._connection.namespace!r}"
        try:
            call = cast(
                "Iterator[Envelope]",
                self._connection.events.Subscribe(
                    SubscribeRequest(filters=self._filters),
                    metadata=self._connection.metadata,
                    wait_for_ready=True,
                ),
            )
        except ValueError as error:  # what grpcio raises on a closed channel
            return UnavailableError(f"cannot {doing}: {error}")
        try:
            for envelope in call:
                if envelope.topic == self._topic:
                    self._live.set()
                elif not self._closed.is_set():
                    self._hand_on(envelope)
        except grpc.RpcError as error:
            return self._connection.error(error, doing)
        return UnavailableError(f"cannot {doing}: containerd ended the stream")

    def _hand_on(self, envelope: Envelope) -> None:
        try:
            self._on_event(envelope)
        except Exception:  # noqa: BLE001 - the thread outlives whatever one event does; it is logged
            self._log.exception("event_failed", topic=envelope.topic)
