"""The connection: addresses, deadlines, the namespace header, errors in our words, sizes, TLS, and coming back."""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from libcontainerd._wire.connection import (
    NAMESPACE_HEADER,
    Address,
    Connection,
    Deadline,
    NotSentError,
    open_channel,
)
from libcontainerd._wire.pb.services import containers_pb2, events_pb2, tasks_pb2, version_pb2
from libcontainerd._wire.pb.wellknown_pb2 import Any, Empty
from libcontainerd.errors import (
    CallCancelledError,
    ConflictError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidParameterError,
    LibcontainerdError,
    NotFoundError,
    NotImplementedByServerError,
    PermissionDeniedError,
    SystemFailureError,
    UnavailableError,
)
from tests import leaks
from tests.certificate import make_certificate
from tests.unit.beside import DEADLINE, Beside, eventually, race
from tests.unit.server import Held, Scripted, fail

MIB = 1 << 20
VERSION = "ask for the version"
PROXIES = [f"{scheme}_proxy" for scheme in ("grpc", "https", "http", "no", "no_grpc", "all")]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as made:
        yield made


@pytest.fixture
def connection(server: Scripted) -> Iterator[Connection]:
    made = connect(server)
    yield made
    made.close()


def connect(server: Scripted, namespace: str = "test") -> Connection:
    return Connection(Address(server.path, with_credentials=False), namespace=namespace)


def ask(connection: Connection, seconds: float = DEADLINE) -> version_pb2.VersionResponse:
    return connection.call(connection.versions.Version, Empty(), doing=VERSION, deadline=Deadline(seconds))


# ------------------------------------------------------------------------------------------------------------- deadlines


@pytest.mark.parametrize("seconds", [0, -1, -0.0, math.nan, -math.inf])
def test_a_timeout_is_positive(seconds: float) -> None:
    with pytest.raises(InvalidParameterError, match="a positive number of seconds"):
        Deadline(seconds)


@pytest.mark.parametrize("seconds", ["5", None, b"1", [1]])
def test_a_timeout_is_a_number(seconds: object) -> None:
    with pytest.raises(InvalidParameterError, match="a positive number of seconds"):
        Deadline(seconds)  # type: ignore[arg-type] # which is refused


def test_a_deadline_runs_down_to_zero_and_not_below() -> None:
    long, short = Deadline(100), Deadline(1e-9)
    assert 99 < long.remaining() <= 100
    assert short.remaining() == 0
    assert short.grpc_timeout() == 0


def test_never_is_never() -> None:
    assert Deadline(math.inf).remaining() == math.inf
    assert Deadline(math.inf).grpc_timeout() is None


# ------------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "text", ["/run/containerd/containerd.sock", "unix:///run/containerd/containerd.sock"]
)
def test_a_path_is_a_unix_socket(text: str) -> None:
    address = Address(text, with_credentials=False)
    assert address.path == str(address) == "/run/containerd/containerd.sock"
    assert address.target == "unix:/run/containerd/containerd.sock"
    assert Address(Path("/run/x"), with_credentials=False).path == "/run/x"


def test_tcp_needs_credentials_and_a_socket_takes_none() -> None:
    address = Address("tcp://host:1234", with_credentials=True)
    assert (address.path, address.target, str(address)) == ("", "dns:///host:1234", "dns:///host:1234")
    address.check(Deadline(DEADLINE))
    with pytest.raises(InvalidParameterError, match=r"whoever reaches containerd is root; pass credentials="):
        Address("tcp://host:1234", with_credentials=False)
    with pytest.raises(InvalidParameterError, match="credentials are for tcp"):
        Address("/run/x", with_credentials=True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "containerd.sock",
        "./containerd.sock",
        "unix://containerd.sock",
        "unix:/run/x",
        "/run/\0x",
        "/run/x,y",
        "http://host:80",
        "tcp://",
        "tcp://host",
        "tcp://host:",
        "tcp://:80",
        "tcp://host:0",
        "tcp://host:65536",
        "tcp://host:-1",
        "tcp://host:8o",
        "tcp://host:" + "1" * 5000,
        "tcp://host:٣",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    for with_credentials in (False, True):
        with pytest.raises(InvalidParameterError, match="address "):
            Address(text, with_credentials=with_credentials)


@given(rest=st.text(max_size=130).map(lambda text: "/" + text))
@example(rest="/" + "x" * 106)
@example(rest="/" + "x" * 107)
@example(rest="/" + "é" * 53)
@example(rest="/" + "é" * 54)
@example(rest="/\ud800")
def test_a_path_is_taken_exactly_if_a_socket_can_have_it(rest: str) -> None:
    try:
        fits = 0 < len(os.fsencode(rest)) <= 107 and not {"\0", ","}.intersection(rest)
    except UnicodeEncodeError:
        fits = False
    if fits:
        assert "://" in rest or Address(rest, with_credentials=False).path == rest
        assert Address("unix://" + rest, with_credentials=False).path == rest
    else:
        with pytest.raises(InvalidParameterError):
            Address("unix://" + rest, with_credentials=False)


@settings(deadline=None)
@given(text=st.text(max_size=40) | st.from_regex(r"(unix|tcp|x)://[a-z/:\[\]0-9%.-]{0,20}", fullmatch=True))
@example(text="/\udcff")
def test_any_text_is_an_address_or_refused(text: str) -> None:
    for credentials in (None, grpc.ssl_channel_credentials()):
        try:
            address = Address(text, with_credentials=credentials is not None)
        except InvalidParameterError:
            continue
        open_channel(address, credentials).close()


def test_the_reason_for_no_connection_is_said(tmp_path: Path) -> None:
    def refused(path: Path, kind: type[LibcontainerdError], said: str) -> None:
        with pytest.raises(kind, match=said) as caught:
            Address(path, with_credentials=False).check(Deadline(DEADLINE))
        assert str(path) in str(caught.value)
        assert isinstance(caught.value.__cause__, OSError)

    refused(tmp_path / "none", UnavailableError, "there is no such file")
    file = tmp_path / "file"
    file.write_bytes(b"")
    refused(file, UnavailableError, "it is not a socket")
    refused(file / "below", UnavailableError, "Not a directory")
    dead = tmp_path / "dead"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(dead))
    refused(dead, UnavailableError, "nothing listens there; is containerd running")


def test_no_permission_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(PermissionDeniedError, match="run as root"):
        Address(tmp_path / "x", with_credentials=False).check(Deadline(DEADLINE))


def test_a_listening_socket_passes_and_its_descriptor_is_closed(server: Scripted) -> None:
    with leaks.no_leaks():
        Address(server.path, with_credentials=False).check(Deadline(DEADLINE))


@pytest.mark.parametrize("name", ["a b", "a%20b", "a%zz", "a#b", "a?b", "é", "a:b", "\udcff"])
def test_a_sockets_name_may_hold_what_a_uri_would_read_otherwise(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with socket.socket(socket.AF_UNIX) as sock:
        here = os.getcwd()
        os.chdir(tmp_path)
        try:
            sock.bind(name)
        finally:
            os.chdir(here)
        sock.listen()
        sock.settimeout(DEADLINE)
        made = Connection(Address(path, with_credentials=False), namespace="test")
        calling = Beside(lambda: ask(made, 0.5))
        sock.accept()[0].close()
        with pytest.raises(LibcontainerdError):
            calling.answer()
        made.close()


# ------------------------------------------------------------------------------------------------------------------ calls


def test_every_call_carries_the_namespace(server: Scripted) -> None:
    connection = connect(server, "other")
    assert ask(connection).version == "1.6.20"
    deadline = Deadline(DEADLINE)
    with pytest.raises(NotFoundError):
        connection.call(
            connection.tasks.Get, tasks_pb2.GetRequest(container_id="c"), doing="ask", deadline=deadline
        )
    stream = connection.events.Subscribe(events_pb2.SubscribeRequest(), metadata=connection.metadata)
    server.wait_for("Events.Subscribe")
    connection.close()
    with pytest.raises(grpc.RpcError):
        next(iter(stream))

    assert [call.method for call in server.calls] == ["Version.Version", "Tasks.Get", "Events.Subscribe"]
    assert {call.metadata[NAMESPACE_HEADER] for call in server.calls} == {"other"}


def test_the_deadline_goes_along_with_the_call(server: Scripted, connection: Connection) -> None:
    ask(connection, 30)
    connection.call(connection.versions.Version, Empty(), doing=VERSION, deadline=Deadline(math.inf))
    limited, unlimited = (call.seconds for call in server.calls)
    assert limited is not None
    assert 25 < limited <= 30.1
    assert unlimited is None or unlimited > 1e6


def test_a_deadline_that_passes_is_said(server: Scripted, connection: Connection) -> None:
    held = Held()
    server.script("Version.Version", held)
    begin = time.monotonic()
    with pytest.raises(DeadlineExceededError, match="cannot ask for the version") as caught:
        ask(connection, 1.0)
    assert 1.0 <= time.monotonic() - begin < DEADLINE
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    assert not isinstance(caught.value, NotSentError)


def test_a_deadline_that_has_passed_sends_nothing(server: Scripted, connection: Connection) -> None:
    with pytest.raises(DeadlineExceededError, match="the deadline has passed") as caught:
        ask(connection, 1e-9)
    assert isinstance(caught.value, NotSentError), "there is nothing to undo"
    assert server.calls == []


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.CANCELLED, CallCancelledError),
        (grpc.StatusCode.UNKNOWN, SystemFailureError),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidParameterError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceededError),
        (grpc.StatusCode.NOT_FOUND, NotFoundError),
        (grpc.StatusCode.ALREADY_EXISTS, ConflictError),
        (grpc.StatusCode.PERMISSION_DENIED, PermissionDeniedError),
        (grpc.StatusCode.UNAUTHENTICATED, PermissionDeniedError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, SystemFailureError),
        (grpc.StatusCode.FAILED_PRECONDITION, FailedPreconditionError),
        (grpc.StatusCode.ABORTED, SystemFailureError),
        (grpc.StatusCode.OUT_OF_RANGE, InvalidParameterError),
        (grpc.StatusCode.UNIMPLEMENTED, NotImplementedByServerError),
        (grpc.StatusCode.INTERNAL, SystemFailureError),
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.DATA_LOSS, SystemFailureError),
    ],
)
def test_every_answer_is_translated_and_chained(
    server: Scripted, connection: Connection, code: grpc.StatusCode, kind: type[LibcontainerdError]
) -> None:
    server.script("Version.Version", fail(code, "so it is"))
    with pytest.raises(LibcontainerdError, match="cannot ask for the version: so it is") as caught:
        ask(connection)
    assert type(caught.value) is kind
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    assert ask(connection).version == "1.6.20", "the connection goes on"


def test_a_service_that_is_not_there_is_said() -> None:
    with Scripted(services=("tasks",)) as server:
        connection = connect(server)
        with pytest.raises(NotImplementedByServerError, match="is this containerd's socket"):
            ask(connection)
        connection.close()


def test_many_calls_at_once(connection: Connection) -> None:
    answers = race(*[lambda: ask(connection).version] * 12)
    assert answers == ["1.6.20"] * 12


# ------------------------------------------------------------------------------------------------------------------ sizes


def big_container(size: int) -> containers_pb2.Container:
    return containers_pb2.Container(id="big", spec=Any(type_url="x", value=bytes(size)))


def test_messages_of_almost_16_mib_pass_both_ways(server: Scripted, connection: Connection) -> None:
    sent = big_container(16 * MIB - 200)
    request = containers_pb2.CreateContainerRequest(container=sent)
    deadline = Deadline(DEADLINE)
    answer = connection.call(connection.containers.Create, request, doing="create", deadline=deadline)
    assert len(answer.container.spec.value) == 16 * MIB - 200
    assert server.containers["big"] == sent


def test_a_bigger_request_fails_clearly_and_is_not_sent(server: Scripted, connection: Connection) -> None:
    request = containers_pb2.CreateContainerRequest(container=big_container(16 * MIB))
    with pytest.raises(SystemFailureError, match=r"cannot create it: .*larger than max"):
        connection.call(connection.containers.Create, request, doing="create it", deadline=Deadline(DEADLINE))
    assert server.containers == {}


def test_a_bigger_answer_fails_clearly(server: Scripted, connection: Connection) -> None:
    server.containers["big"] = big_container(16 * MIB)
    with pytest.raises(SystemFailureError, match=r"cannot look: .*larger than max"):
        connection.call(
            connection.containers.Get,
            containers_pb2.GetContainerRequest(id="big"),
            doing="look",
            deadline=Deadline(DEADLINE),
        )
    assert ask(connection).version == "1.6.20"


# ----------------------------------------------------------------------------------------------------------------- closing


def test_a_closed_connection_cancels(server: Scripted) -> None:
    connection = connect(server)
    connection.close()
    connection.close()
    with pytest.raises(CallCancelledError, match="the client is closed") as caught:
        ask(connection)
    assert isinstance(caught.value, NotSentError)
    assert server.calls == []


def test_a_forked_child_sends_nothing(
    server: Scripted, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(connection)
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)
        assert connection.inherited
        with pytest.raises(
            FailedPreconditionError, match=r"process \d+ made cannot be used in process -1, which was forked"
        ):
            ask(connection)
    ask(connection)
    assert len(server.calls) == 2, "those of the parent"


def test_close_cuts_off_calls_and_streams(server: Scripted) -> None:
    held = [Held(), Held()]
    server.script("Version.Version", *held)
    connection = connect(server)
    calls = [Beside(lambda: ask(connection, 60)), Beside(lambda: ask(connection, math.inf))]
    stream = connection.events.Subscribe(events_pb2.SubscribeRequest(), metadata=connection.metadata)
    reading = Beside(lambda: list(stream))
    for each in held:
        assert each.begun.wait(DEADLINE)
    server.wait_for("Events.Subscribe")
    connection.close()

    for call in calls:
        with pytest.raises(CallCancelledError, match="the client was closed meanwhile") as caught:
            call.answer()
        assert not isinstance(caught.value, NotSentError), "containerd may have done it"
    with pytest.raises(grpc.RpcError):
        reading.answer()
    for each in held:
        assert each.cut.wait(DEADLINE), "containerd is told"


def test_calls_beside_close_are_answered_or_cancelled(server: Scripted) -> None:
    for _ in range(10):
        connection = connect(server)
        ask(connection)

        def call(connection: Connection = connection) -> str:
            try:
                return ask(connection).version
            except CallCancelledError:
                return "cancelled"

        outcomes = race(call, call, call, lambda connection=connection: connection.close() or "closed")  # type: ignore[misc]
        assert set(outcomes) <= {"1.6.20", "cancelled", "closed"}


def test_a_value_error_of_an_open_connection_is_not_hidden(connection: Connection) -> None:
    class Method:
        def __call__(self, *_: object, **__: object) -> Empty:
            raise ValueError("a mistake of ours")

    with pytest.raises(ValueError, match="a mistake of ours"):
        connection.call(Method(), Empty(), doing="x", deadline=Deadline(1))  # type: ignore[arg-type] # as much as is used


def test_nothing_is_left_of_a_closed_connection(server: Scripted) -> None:
    ask(connection := connect(server))
    connection.close()
    with leaks.no_leaks(), Scripted() as other:  # whose threads come as they are needed
        for _ in range(5):
            connection = connect(other)
            ask(connection)
            connection.close()


# ------------------------------------------------------------------------------------------------------------ coming back


def test_it_comes_back_by_itself_when_containerd_does(server: Scripted, connection: Connection) -> None:
    ask(connection)
    server.stop()
    with pytest.raises(UnavailableError, match="is containerd running"):
        ask(connection, 5)

    server.start()
    begin = time.monotonic()

    def answered() -> bool:
        try:
            return ask(connection).version == "1.6.20"
        except UnavailableError:
            return False

    eventually(answered, "an answer")
    assert time.monotonic() - begin < 15.0, "within the back-off, which is at most two seconds and a little"


def test_a_stream_that_waits_until_ready_comes_when_containerd_does(
    server: Scripted, connection: Connection
) -> None:
    server.stop()
    stream = connection.events.Subscribe(
        events_pb2.SubscribeRequest(), metadata=connection.metadata, wait_for_ready=True
    )
    reading = Beside(lambda: next(iter(stream)).topic)
    server.start()
    server.wait_for("Events.Subscribe")
    eventually(lambda: server.streams, "the stream")
    server.publish("/tasks/x", Empty())
    assert reading.answer() == "/tasks/x"


def test_a_call_under_way_when_containerd_dies_is_unavailable(
    server: Scripted, connection: Connection
) -> None:
    held = Held()
    server.script("Version.Version", held)
    calling = Beside(lambda: ask(connection))
    assert held.begun.wait(DEADLINE)
    server.stop()
    with pytest.raises(LibcontainerdError) as caught:
        calling.answer()
    assert isinstance(caught.value, UnavailableError | CallCancelledError)
    server.start()


# ---------------------------------------------------------------------------------------------------------- TLS, proxies


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """A self-signed certificate for localhost, and its key."""
    directory = make_certificate(tmp_path_factory.mktemp("tls"))
    return (directory / "cert.pem").read_bytes(), (directory / "key.pem").read_bytes()


def test_tcp_with_credentials(certificate: tuple[bytes, bytes]) -> None:
    cert, key = certificate
    server = Scripted()
    server.credentials = grpc.ssl_server_credentials([(key, cert)])
    with server:
        address = Address(f"tcp://localhost:{server.port}", with_credentials=True)
        address.check(Deadline(DEADLINE))
        trusting = Connection(
            address, namespace="test", credentials=grpc.ssl_channel_credentials(root_certificates=cert)
        )
        assert ask(trusting).version == "1.6.20"
        assert server.calls[0].metadata[NAMESPACE_HEADER] == "test"
        trusting.close()

        wary = Connection(address, namespace="test", credentials=grpc.ssl_channel_credentials())
        with pytest.raises(UnavailableError):
            ask(wary)
        wary.close()
        assert len(server.calls) == 1


def test_a_socket_has_no_business_with_a_proxy(server: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        for name in ("grpc_proxy", "https_proxy", "http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        connection = connect(server)
        assert ask(connection).version == "1.6.20"
        connection.close()
        proxy.settimeout(0)
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_closing_from_many_threads(server: Scripted) -> None:
    connection = connect(server)
    closers: list[Callable[[], None]] = [connection.close] * 4
    assert race(*closers) == [None] * 4
    assert threading.active_count() < 100


def test_a_network_is_asked_whether_it_is_there_and_a_socket_never(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, int | str]] = []

    def opened(*_: object, options: tuple[tuple[str, int | str], ...]) -> None:
        seen.append(dict(options))

    monkeypatch.setattr(grpc, "insecure_channel", opened)
    monkeypatch.setattr(grpc, "secure_channel", opened)
    open_channel(Address("/run/socket", with_credentials=False))
    open_channel(Address("tcp://localhost:1", with_credentials=True), grpc.ssl_channel_credentials())
    local, remote = seen
    assert not [name for name in local if "keepalive" in name]
    assert remote["grpc.keepalive_time_ms"] == 300_000, "containerd allows one ping in five minutes"
    assert "grpc.keepalive_timeout_ms" in remote
