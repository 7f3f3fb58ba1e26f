"""One channel to one containerd, and the calls that go down it.

Everything that every call needs is here: the namespace header, a deadline, and the one place where a gRPC error
becomes one of ours.
"""

from __future__ import annotations

import errno
import math
import os
import re
import socket
import stat
import threading
import time
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import quote

import grpc
from grpc.experimental import ChannelOptions

from libcontainerd._wire.pb.services.containers_pb2 import ContainersStub
from libcontainerd._wire.pb.services.content_pb2 import ContentStub
from libcontainerd._wire.pb.services.events_pb2 import EventsStub
from libcontainerd._wire.pb.services.tasks_pb2 import TasksStub
from libcontainerd._wire.pb.services.version_pb2 import VersionStub
from libcontainerd.errors import (
    CallCancelledError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidParameterError,
    LibcontainerdError,
    PermissionDeniedError,
    SystemFailureError,
    UnavailableError,
    translate,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

NAMESPACE_HEADER: Final = "containerd-namespace"
LEASE_HEADER: Final = "containerd-lease"
Metadata = tuple[tuple[str, str], ...]

_MESSAGE_BYTES: Final = 16 << 20  # containerd's own limit, both ways
_SUN_PATH_BYTES: Final = 107
_PORT: Final = re.compile(r"[0-9]{1,5}")
_CHECK_SECONDS: Final = 5.0
_SHORTEST_SECONDS: Final = 0.001

_OPTIONS: Final[tuple[tuple[str, int | str], ...]] = (
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Its name notwithstanding, this is how long one attempt may take: a containerd that is merely slow is not dead.
    ("grpc.min_reconnect_backoff_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Channels to one address would otherwise share a connection, and one's back-off would be the other's.
    ("grpc.use_local_subchannel_pool", 1),
    # The reader of a stream then reads it itself, instead of being handed each message by a second thread.
    (ChannelOptions.SingleThreadedUnaryStream, 1),
)
# A unix socket's path makes no authority that an HTTP/2 server accepts, and a proxy has no business with it. Keepalive
# pings stay off on it: containerd allows one in five minutes, and closes the connection of who sends more.
_UNIX_OPTIONS: Final = (("grpc.enable_http_proxy", 0), ("grpc.default_authority", "localhost"))


# A network can go away without a word.
_TCP_OPTIONS: Final = (("grpc.keepalive_time_ms", 300_000), ("grpc.keepalive_timeout_ms", 20_000))


class NotSentError(LibcontainerdError):
    """Mixed into the error of a call that never left this process, so that there is nothing to undo."""


class UnsentCancelledError(CallCancelledError, NotSentError):
    """The client was closed before."""


class UnsentTooLateError(DeadlineExceededError, NotSentError):
    """The deadline had passed before."""


class UnsentFailureError(SystemFailureError, NotSentError):
    """This program lacks what it takes to make a call."""


class Deadline:
    """A point in time that several calls share; immutable."""

    __slots__ = ("_end",)

    def __init__(self, seconds: float) -> None:
        """Set it so many seconds from now; infinity is never.

        Raises:
            InvalidParameterError: the number is not positive.
        """
        try:
            positive = seconds > 0
        except TypeError:
            positive = False
        if not positive:
            raise InvalidParameterError(f"a timeout is a positive number of seconds, not {seconds!r}")
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left: 0 once it has passed, infinity where there is none."""
        return max(0.0, self._end - time.monotonic())

    def at_most(self, seconds: float) -> Deadline:
        """This deadline, or one so many seconds from now if that is earlier."""
        return Deadline(max(min(self.remaining(), seconds), _SHORTEST_SECONDS))

    def grpc_timeout(self) -> float | None:
        """What grpcio's ``timeout`` wants."""
        remaining = self.remaining()
        return None if math.isinf(remaining) else remaining


class Address:
    """Where a containerd listens: a unix socket's path, or a host and port with TLS.

    Attributes:
        path: The unix socket's absolute path; empty for TCP.
        target: grpcio's name for it.
    """

    __slots__ = ("path", "target")

    def __init__(self, address: str | os.PathLike[str], *, with_credentials: bool) -> None:
        """Read an address: a path, ``unix:///path``, or ``tcp://host:port`` with credentials.

        Raises:
            InvalidParameterError: it is none of these, or too long for a socket.
        """
        text = os.fspath(address)
        scheme, separator, rest = text.partition("://")
        if not separator:
            scheme, rest = "unix", text
        self.path = ""
        if scheme == "unix":
            if not rest.startswith("/") or "\0" in rest:
                raise InvalidParameterError(f"address {text!r}: a socket's path must be absolute")
            if "," in rest:
                raise InvalidParameterError(f"address {text!r}: gRPC takes a comma for the end of a path")
            try:
                path = os.fsencode(rest)
            except UnicodeEncodeError as error:
                raise InvalidParameterError(f"address {text!r}: that is no file's name") from error
            if len(path) > _SUN_PATH_BYTES:
                raise InvalidParameterError(
                    f"address {text!r}: the kernel takes {_SUN_PATH_BYTES} bytes for a socket"
                )
            if with_credentials:
                raise InvalidParameterError(f"address {text!r}: credentials are for tcp:// addresses")
            self.path = rest
            self.target = f"unix:{quote(path)}"
        elif scheme == "tcp":
            host, _, port = rest.rpartition(":")
            if not host or not _PORT.fullmatch(port) or not 0 < int(port) < 1 << 16:
                raise InvalidParameterError(f"address {text!r}: want tcp://host:port")
            if not with_credentials:
                raise InvalidParameterError(
                    f"address {text!r}: whoever reaches containerd is root; pass credentials="
                    "grpc.ssl_channel_credentials(...)"
                )
            self.target = f"dns:///{rest}"
        else:
            raise InvalidParameterError(f"address {text!r}: want a path, unix:///path or tcp://host:port")

    def __str__(self) -> str:
        return self.path or self.target

    def check(self, deadline: Deadline) -> None:
        """See whether anything listens there, so that the reason can be told why not.

        Raises:
            UnavailableError: no socket, or nobody behind it.
            PermissionDeniedError: this user may not connect.
        """
        if not self.path:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
            probe.settimeout(deadline.at_most(_CHECK_SECONDS).remaining())
            try:
                probe.connect(self.path)
            except PermissionError as error:
                raise PermissionDeniedError(
                    f"cannot connect to containerd at {self.path}: permission denied (run as root, or give this user"
                    " access to the socket)"
                ) from error
            except OSError as error:
                if error.errno == errno.ENOENT:
                    reason = "there is no such file; is containerd running, and is this its socket?"
                elif error.errno == errno.ECONNREFUSED and not _is_socket(self.path):
                    reason = "it is not a socket"
                elif error.errno == errno.ECONNREFUSED:
                    reason = "nothing listens there; is containerd running?"
                else:
                    reason = str(error)
                raise UnavailableError(f"cannot connect to containerd at {self.path}: {reason}") from error


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:  # gone meanwhile
        return True


def under_lease(metadata: Metadata, lease: str) -> Metadata:
    """The metadata of a call whose content a lease of containerd's shall hold; without a lease, as they were."""
    return (*metadata, (LEASE_HEADER, lease)) if lease else metadata


def open_channel(address: Address, credentials: grpc.ChannelCredentials | None = None) -> grpc.Channel:
    """Open a channel with this library's options; it connects by itself, and again after a break."""
    if credentials is None:
        return grpc.insecure_channel(address.target, options=(*_OPTIONS, *_UNIX_OPTIONS))
    return grpc.secure_channel(address.target, credentials, options=(*_OPTIONS, *_TCP_OPTIONS))


class Connection:
    """One channel, its stubs, and one way to call them.

    Safe to use from any thread. The channel outlives restarts of containerd and reconnects by itself.
    """

    def __init__(
        self, address: Address, *, namespace: str, credentials: grpc.ChannelCredentials | None = None
    ) -> None:
        self.address = address
        self.namespace = namespace
        self.metadata: Metadata = ((NAMESPACE_HEADER, namespace),)
        self._channel = open_channel(address, credentials)
        self.containers = ContainersStub(self._channel)
        self.content = ContentStub(self._channel)
        self.tasks = TasksStub(self._channel)
        self.events = EventsStub(self._channel)
        self.versions = VersionStub(self._channel)
        self._lock = threading.Lock()  # guards _closed; innermost, nothing is called while it is held
        self._closed = False
        self._process = os.getpid()

    @property
    def inherited(self) -> bool:
        """Whether this process was forked from the one that made the connection: it is that one's, and its locks' state too."""
        return os.getpid() != self._process

    def refuse_if_inherited(self) -> None:
        """Have only the process that made the connection use it.

        A forked child has a copy of the socket and none of the threads: what it sent would spoil its parent's calls, and what
        it waited for would never come.

        Raises:
            FailedPreconditionError: this is another process.
        """
        if self.inherited:
            raise FailedPreconditionError(
                f"a client that process {self._process} made cannot be used in process {os.getpid()}, which was forked"
                " from it: make a client of its own there"
            )

    def call(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        *,
        doing: str,
        deadline: Deadline,
    ) -> _Response:
        """Call a unary method and wait for its answer.

        Args:
            method: A stub's method.
            request: Its request.
            doing: What is being done to what, for the error's message: ``"pause container 'web'"``.
            deadline: When to give up.

        Raises:
            LibcontainerdError: by the answer's status code; `CallCancelledError` when the connection was closed;
                `FailedPreconditionError` in a forked child.
        """
        self.refuse_if_inherited()
        timeout = deadline.grpc_timeout()
        if timeout is not None and timeout <= 0:
            raise UnsentTooLateError(f"cannot {doing}: the deadline has passed")
        try:
            return method(request, timeout=timeout, metadata=self.metadata)
        except grpc.RpcError as error:
            raise self.error(error, doing) from error
        except ValueError as error:  # what grpcio raises on a closed channel
            if not self._closed:
                raise
            raise UnsentCancelledError(f"cannot {doing}: the client is closed") from error

    def gather(
        self,
        method: Callable[..., Iterable[_Response]],
        request: object,
        *,
        doing: str,
        deadline: Deadline,
        lease: str = "",
    ) -> list[_Response]:
        """Call a method that streams its answers, and wait for all of them: they must be few, or small.

        Args:
            method: A stub's method.
            request: Its request, or an iterator of them, which must not raise.
            doing: As for `call`.
            deadline: As for `call`.
            lease: The lease of containerd's that is to hold what the call makes.

        Raises:
            LibcontainerdError: as `call`.
        """
        self.refuse_if_inherited()
        timeout = deadline.grpc_timeout()
        if timeout is not None and timeout <= 0:
            raise UnsentTooLateError(f"cannot {doing}: the deadline has passed")
        try:
            return list(method(request, timeout=timeout, metadata=under_lease(self.metadata, lease)))
        except grpc.RpcError as error:
            raise self.error(error, doing) from error
        except ValueError as error:  # as above
            if not self._closed:
                raise
            raise UnsentCancelledError(f"cannot {doing}: the client is closed") from error

    def error(self, error: grpc.RpcError, doing: str) -> LibcontainerdError:
        """Our error for one of gRPC's; a call that we cut off ourselves says so."""
        if self._closed:
            return CallCancelledError(f"cannot {doing}: the client was closed meanwhile")
        return translate(error, doing)

    def close(self) -> None:
        """Cancel every call under way and close the channel; idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._channel.close()
