"""Calls that run to their end in containerd, also when their caller has stopped waiting.

A deadline or a cancellation travels to containerd with the call, and there it cuts off the handler wherever that is. One
that is making a task then leaves a shim and a process that containerd itself no longer knows (seen on 1.6), so that no
later call can undo it. So what makes or removes a process goes over a channel of its own, which no `close` cuts while
such a call is under way: the caller's deadline ends its waiting, not the call, and what must be undone is undone after
the call's end.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, Protocol, TypeVar, cast

import grpc

from libcontainerd._wire.connection import Deadline, UnsentCancelledError, UnsentTooLateError, open_channel
from libcontainerd._wire.pb.services.containers_pb2 import ContainersStub
from libcontainerd._wire.pb.services.tasks_pb2 import TasksStub
from libcontainerd.errors import CallCancelledError, DeadlineExceededError, translate

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from libcontainerd._wire.connection import Address, Metadata

CLEAN_UP_SECONDS: Final = 45.0
"""The deadline of what undoes a failed call; never the caller's, which may be what has just passed."""

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class _UnderWay(Protocol):
    def add_done_callback(self, callback: Callable[[object], None], /) -> None: ...
    def cancel(self) -> bool: ...


class _Channel:
    """The channel with its stubs. Making them takes a millisecond, so they are made once."""

    def __init__(self, address: Address, credentials: grpc.ChannelCredentials | None) -> None:
        self._channel = open_channel(address, credentials)
        self.containers = ContainersStub(self._channel)
        self.tasks = TasksStub(self._channel)

    def close(self) -> None:
        self._channel.close()


class Shelter:
    """The channel for such calls: opened for the first, and closed after `close` when the last one is over.

    Thread-safe.
    """

    def __init__(
        self, address: Address, metadata: Metadata, credentials: grpc.ChannelCredentials | None = None
    ) -> None:
        self._address = address
        self._credentials = credentials
        self.metadata = metadata
        self._lock = threading.Lock()  # guards the four below; innermost, nothing is called while it is held
        self._channel: _Channel | None = None
        self._guests = 0
        self._waiting: set[threading.Event] = set()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def enter(self, doing: str) -> Lease:
        """Begin the calls of one verb; a context manager.

        Raises:
            CallCancelledError: it is closed.
        """
        fresh = None
        while True:
            with self._lock:
                if not self._closed and self._channel is None:
                    self._channel, fresh = fresh, None
                channel = None if self._closed else self._channel
                closed = self._closed
                if channel is not None:
                    self._guests += 1
            if closed or channel is not None:
                break
            fresh = _Channel(self._address, self._credentials)
        if fresh is not None:
            fresh.close()
        if channel is None:
            raise UnsentCancelledError(f"cannot {doing}: the client is closed")
        return Lease(self, channel)

    def leave(self) -> None:
        """One verb's calls are over."""
        with self._lock:
            self._guests -= 1
            channel = self._channel if self._closed and not self._guests else None
        if channel is not None:
            channel.close()

    def wait(self, done: threading.Event, seconds: float) -> None:
        """Wait for the end of a call, or until the time is up or `close` is called."""
        with self._lock:
            if self._closed:
                return
            self._waiting.add(done)
        try:
            done.wait(min(seconds, threading.TIMEOUT_MAX))
        finally:
            with self._lock:
                self._waiting.discard(done)

    def close(self) -> None:
        """Let nobody in any more, and nobody wait; calls under way go on. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            waiting = list(self._waiting)
            channel = self._channel if not self._guests else None
        for done in waiting:
            done.set()
        if channel is not None:
            channel.close()


class Lease:
    """The sheltered calls of one verb, one after the other, and then perhaps those that undo them. Of one thread.

    Attributes:
        containers: containerd's containers service.
        tasks: containerd's tasks service.
        namespace: Where the calls go.
    """

    def __init__(self, shelter: Shelter, channel: _Channel) -> None:
        self._shelter = shelter
        self.containers = channel.containers
        self.tasks = channel.tasks
        self.namespace = shelter.metadata[0][1]
        self._under_way: _UnderWay | None = None
        self._cleaning_up = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._under_way is None:
            self._shelter.leave()
        else:  # nobody waits for it any more, but the channel stays until it is over
            self._under_way.add_done_callback(lambda _: self._shelter.leave())

    def call(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        *,
        doing: str,
        deadline: Deadline,
    ) -> _Response:
        """Call a unary method of this lease's stubs, and wait for its answer until the deadline.

        Raises:
            LibcontainerdError: as `Connection.call`. After a deadline or a `close` the call may still be under way: `settle`
                before undoing anything.
        """
        if self._shelter.closed and not self._cleaning_up:
            raise UnsentCancelledError(f"cannot {doing}: the client is closed")
        remaining = deadline.grpc_timeout()
        if remaining is not None and remaining <= 0:
            raise UnsentTooLateError(f"cannot {doing}: the deadline has passed")
        done = threading.Event()
        call = method.future(
            request,
            timeout=None if remaining is None else remaining + CLEAN_UP_SECONDS,
            metadata=self._shelter.metadata,
            wait_for_ready=self._cleaning_up,
        )
        self._under_way = cast("_UnderWay", call)
        call.add_done_callback(lambda _: done.set())
        if self._cleaning_up:
            done.wait(min(deadline.remaining(), threading.TIMEOUT_MAX))
        else:
            self._shelter.wait(done, deadline.remaining())
        if call.done():
            self._under_way = None
            # A call that failed is its own exception. Its `result` raises it, and its traceback would then hold this frame
            # and all before it until the collector comes, with whatever the caller has in hand.
            failure = call.exception()
            if failure is None:
                return call.result()
            raise translate(cast("grpc.RpcError", failure), doing) from failure
        if deadline.remaining() > 0:
            raise CallCancelledError(f"cannot {doing}: the client was closed meanwhile")
        raise DeadlineExceededError(f"cannot {doing}: containerd has not answered in time")

    def settle(self, deadline: Deadline) -> None:
        """Turn to undoing: let a call that is still under way come to its end, and heed no `close` from here on."""
        self._cleaning_up = True
        call, self._under_way = self._under_way, None
        if call is None:
            return
        done = threading.Event()
        call.add_done_callback(lambda _: done.set())
        if not done.wait(min(deadline.remaining(), threading.TIMEOUT_MAX)):
            call.cancel()
