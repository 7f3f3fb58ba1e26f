"""Calls that run to their end in containerd, also when their caller has stopped waiting.

A deadline or a cancellation travels to containerd with the call, and there it cuts off the handler wherever that is. One
that is making a task then leaves a shim and a process that containerd itself no longer knows (seen on 1.6), so that no
later call can undo it. So what makes or removes a process goes over a channel of its own, which no `close` cuts while
such a call is under way: the caller's deadline ends its waiting, not the call, and what must be undone is undone after
the call's end.
"""

from __future__ import annotations

import threading
from functools import cached_property, partial
from typing import TYPE_CHECKING, Final, TypeVar, cast

import grpc

from libcontainerd._wire.callers import Callers, UnderWay
from libcontainerd._wire.connection import (
    Deadline,
    UnsentCancelledError,
    UnsentFailureError,
    UnsentTooLateError,
    open_channel,
    under_lease,
)
from libcontainerd._wire.pb.services.containers_pb2 import ContainersStub
from libcontainerd._wire.pb.services.leases_pb2 import LeasesStub
from libcontainerd._wire.pb.services.tasks_pb2 import TasksStub
from libcontainerd.errors import (
    CallCancelledError,
    DeadlineExceededError,
    SystemFailureError,
    translate,
)

if TYPE_CHECKING:
    from typing import Self

    from libcontainerd._wire.connection import Address, Metadata
    from libcontainerd._wire.pb.services.sandbox_pb2 import StoreStub

CLEAN_UP_SECONDS: Final = 45.0
"""The deadline of what undoes a failed call; never the caller's, which may be what has just passed."""

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class _Channel:
    """The channel with its stubs. Making them takes a millisecond, so they are made once."""

    def __init__(self, address: Address, credentials: grpc.ChannelCredentials | None) -> None:
        self._channel = open_channel(address, credentials)
        self.containers = ContainersStub(cast("grpc.Channel", self))
        self.leases = LeasesStub(cast("grpc.Channel", self))
        self.tasks = TasksStub(cast("grpc.Channel", self))

    @cached_property
    def sandboxes(self) -> StoreStub:
        """Made when it is asked for, which few do."""
        from libcontainerd._wire.pb.services.sandbox_pb2 import StoreStub  # noqa: PLC0415 - likewise

        return StoreStub(cast("grpc.Channel", self))

    def unary_unary(self, *args: object, **kwargs: object) -> object:
        """What the stubs make their methods of: here a stream of one answer, which can be cancelled while it is waited for."""
        return self._channel.unary_stream(*args, **kwargs)  # type: ignore[arg-type] # handed on as they came

    def unary_stream(self, *args: object, **kwargs: object) -> object:
        """What a stream is made of; nobody here calls one."""
        return self._channel.unary_stream(*args, **kwargs)  # type: ignore[arg-type] # likewise

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
        self._waiting: set[UnderWay[object]] = set()
        self._closed = False
        self._callers = Callers()

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

    def make(self, call: UnderWay[_Response]) -> None:
        """Have a call made, on a thread of its own.

        Raises:
            RuntimeError: no thread can be had.
        """
        self._callers.make(call)

    def wait(self, call: UnderWay[_Response], seconds: float) -> None:
        """Wait for the end of a call, or until the time is up or `close` is called."""
        with self._lock:
            if self._closed:
                return
            self._waiting.add(call)
        try:
            call.wait(seconds)
        finally:
            with self._lock:
                self._waiting.discard(call)

    def close(self) -> None:
        """Let nobody in any more, and nobody wait; calls under way go on. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            waiting = list(self._waiting)
            channel = self._channel if not self._guests else None
        for call in waiting:
            call.wake()
        self._callers.close()
        if channel is not None:
            channel.close()


class Lease:
    """The sheltered calls of one verb, one after the other, and then perhaps those that undo them. Of one thread.

    Attributes:
        containers: containerd's containers service.
        leases: containerd's leases service, whose leases are something else: they keep content.
        tasks: containerd's tasks service.
        namespace: Where the calls go.
    """

    def __init__(self, shelter: Shelter, channel: _Channel) -> None:
        self._shelter = shelter
        self._channel = channel
        self.containers = channel.containers
        self.leases = channel.leases
        self.tasks = channel.tasks
        self.namespace = shelter.metadata[0][1]
        self._under_way: UnderWay[object] | None = None
        self._cleaning_up = False

    @property
    def sandboxes(self) -> StoreStub:
        """The store of sandboxes' records; 1.6 has none."""
        return self._channel.sandboxes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._under_way is None:
            self._shelter.leave()
        else:  # nobody waits for it any more, but the channel stays until it is over
            self._under_way.when_over(self._shelter.leave)

    def call(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        *,
        doing: str,
        deadline: Deadline,
        lease: str = "",
    ) -> _Response:
        """Call a unary method of this lease's stubs, and wait for its answer until the deadline.

        Args:
            method: As for `Connection.call`, like the next three.
            request: See there.
            doing: See there.
            deadline: See there.
            lease: The lease of containerd's that is to hold what the call makes.

        Raises:
            LibcontainerdError: as `Connection.call`. After a deadline or a `close` the call may still be under way: `settle`
                before undoing anything.
        """
        if self._shelter.closed and not self._cleaning_up:
            raise UnsentCancelledError(f"cannot {doing}: the client is closed")
        remaining = deadline.grpc_timeout()
        if remaining is not None and remaining <= 0:
            raise UnsentTooLateError(f"cannot {doing}: the deadline has passed")
        call: UnderWay[_Response] = UnderWay(
            partial(
                # What the stubs of this channel have are streams.
                cast("grpc.UnaryStreamMultiCallable[_Request, _Response]", method),
                request,
                timeout=None if remaining is None else remaining + CLEAN_UP_SECONDS,
                metadata=under_lease(self._shelter.metadata, lease),
                wait_for_ready=self._cleaning_up,
            )
        )
        try:
            self._shelter.make(call)
        except RuntimeError as error:
            raise UnsentFailureError(f"cannot {doing}: {error}") from error
        self._under_way = call
        if self._cleaning_up:
            _wait(call, deadline)
        else:
            self._shelter.wait(call, deadline.remaining())
        if call.over:
            self._under_way = None
            if isinstance(call.failure, grpc.RpcError):
                raise translate(call.failure, doing) from call.failure
            if call.failure is not None:
                raise call.failure
            if call.answer is None:
                raise SystemFailureError(f"cannot {doing}: containerd gave no answer")
            return call.answer
        if deadline.remaining() > 0:
            raise CallCancelledError(f"cannot {doing}: the client was closed meanwhile")
        raise DeadlineExceededError(f"cannot {doing}: containerd has not answered in time")

    def settle(self, deadline: Deadline) -> None:
        """Turn to undoing: let a call that is still under way come to its end, and heed no `close` from here on."""
        self._cleaning_up = True
        call, self._under_way = self._under_way, None
        if call is None:
            return
        _wait(call, deadline)
        if not call.over:
            call.cancel()


def _wait(call: UnderWay[_Response], deadline: Deadline) -> None:
    """Wait for a call's end, whoever else is to be woken meanwhile."""
    while not call.over and deadline.remaining() > 0:
        call.wait(deadline.remaining())
