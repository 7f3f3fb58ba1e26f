"""The subscription: proven before it counts, begun again after every kind of end, never spinning, and stopped at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import grpc
import pytest
from google.protobuf.message import Message
from structlog.testing import capture_logs

from libcontainerd._events import subscriber as subscriber_module
from libcontainerd._events.subscriber import Subscriber
from libcontainerd._wire.connection import NAMESPACE_HEADER, Address, Connection, Deadline
from libcontainerd._wire.pb.events import task_pb2 as task_events
from libcontainerd._wire.pb.services.events_pb2 import SubscribeRequest
from libcontainerd._wire.pb.types.event_pb2 import Envelope
from libcontainerd._wire.pb.wellknown_pb2 import Empty
from libcontainerd.errors import (
    CallCancelledError,
    DeadlineExceededError,
    InvalidParameterError,
    LibcontainerdError,
    NotImplementedByServerError,
    PermissionDeniedError,
    UnavailableError,
)
from tests import leaks
from tests.unit.beside import DEADLINE, Beside, eventually
from tests.unit.server import Context, Held, Scripted, fail

SUBSCRIBE, PUBLISH = "Events.Subscribe", "Events.Publish"


def swallow(context: Context, go_on: Callable[[], Message]) -> Message:
    """Take a publication, and lose it."""
    return Empty()


class Watch:
    """A subscriber, and what it has handed on."""

    def __init__(self, server: Scripted) -> None:
        self.server = server
        self.connection = Connection(Address(server.path, with_credentials=False), namespace="test")
        self.received: list[Envelope] = []
        self.resumed = 0
        self.on_event: Callable[[Envelope], None] = self.received.append
        self.on_live: Callable[[], None] = self._count
        self.subscriber = Subscriber(self.connection, on_event=self._hand_on, on_live=self._on_live)

    def _hand_on(self, envelope: Envelope) -> None:
        self.on_event(envelope)

    def _on_live(self) -> None:
        self.on_live()

    def _count(self) -> None:
        self.resumed += 1

    def open(self) -> Subscriber:
        self.subscriber.open(Deadline(DEADLINE))
        return self.subscriber

    def topics(self) -> list[str]:
        return [each.topic for each in list(self.received)]

    def close(self) -> None:
        self.subscriber.stop()
        self.connection.close()
        assert self.subscriber.join(DEADLINE)


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as made:
        yield made


@pytest.fixture
def watch(server: Scripted) -> Iterator[Watch]:
    made = Watch(server)
    yield made
    made.close()


def tell(server: Scripted, topic: str) -> None:
    server.tell(topic, task_events.TaskOOM(container_id="web"))


# ---------------------------------------------------------------------------------------------------------------- proving


def test_it_is_live_when_open_returns(server: Scripted, watch: Watch) -> None:
    watch.open()
    assert watch.subscriber.live
    for number in range(100):
        tell(server, str(number))
    eventually(lambda: len(watch.received) == 100, "all events")
    assert watch.topics() == [f"/tasks/{number}" for number in range(100)], "in order, and none of our own"
    assert watch.resumed == 0


def test_it_asks_for_the_namespaces_tasks_and_its_private_topic(server: Scripted, watch: Watch) -> None:
    watch.open()
    (request,) = server.called(SUBSCRIBE)
    assert isinstance(request, SubscribeRequest)
    tasks, private = request.filters
    assert tasks == "namespace==test,topic~=|^/tasks/|"
    topic = watch.subscriber._topic
    assert topic.startswith("/libcontainerd/")
    assert private == f'namespace==test,topic=="{topic}"'
    assert {call.metadata[NAMESPACE_HEADER] for call in server.calls} == {"test"}
    assert Watch(server).subscriber._topic != topic


def test_a_publication_that_is_not_seen_is_repeated(server: Scripted, watch: Watch) -> None:
    # As when containerd has taken the call and not yet subscribed.
    server.script(PUBLISH, *[swallow] * 4)
    watch.open()
    assert len(server.called(PUBLISH)) >= 5


def test_a_containerd_that_is_not_ready_is_given_its_time(server: Scripted, watch: Watch) -> None:
    server.script(PUBLISH, *[fail(grpc.StatusCode.UNAVAILABLE)] * 2)
    server.script(SUBSCRIBE, fail(grpc.StatusCode.UNAVAILABLE))
    watch.open()
    assert watch.subscriber.live
    assert watch.resumed == 0, "nothing was missed: it was never live before"


# -------------------------------------------------------------------------------------------------------------- refusals


class AfterFailures(Deadline):
    """A deadline that passes when the attempts to publish have failed in such ways, one after the other."""

    def __init__(self, watch: Watch, *wanted: type[LibcontainerdError]) -> None:
        super().__init__(DEADLINE)
        self._wanted = list(wanted)
        call = watch.connection.call

        def watched(*args: object, **kwargs: object) -> object:
            try:
                return call(*args, **kwargs)  # type: ignore[arg-type] # handed on as they came
            except LibcontainerdError as error:
                if self._wanted and isinstance(error, self._wanted[0]):
                    del self._wanted[0]
                raise

        watch.connection.call = watched  # type: ignore[method-assign, assignment]

    def remaining(self) -> float:
        return super().remaining() if self._wanted else 0.0


def refused(
    watch: Watch, kind: type[LibcontainerdError], said: str, within: float | Deadline = DEADLINE
) -> float:
    """Check that `open` fails, and that no thread stays; say how long it took."""
    begin = time.monotonic()
    deadline = within if isinstance(within, Deadline) else Deadline(within)
    with pytest.raises(kind, match=said) as caught:
        watch.subscriber.open(deadline)
    took = time.monotonic() - begin
    assert type(caught.value) is kind
    assert not watch.subscriber.live
    watch.close()
    assert not [each for each in threading.enumerate() if each.name.startswith("libcontainerd-events")]
    return took


def test_a_server_without_events_is_refused_at_once() -> None:
    with Scripted(services=("tasks",)) as server:
        watch = Watch(server)
        assert refused(watch, NotImplementedByServerError, "is this containerd's socket") < DEADLINE / 2


@pytest.mark.parametrize(
    ("method", "code", "kind"),
    [
        (PUBLISH, grpc.StatusCode.PERMISSION_DENIED, PermissionDeniedError),
        (SUBSCRIBE, grpc.StatusCode.INVALID_ARGUMENT, InvalidParameterError),
        (SUBSCRIBE, grpc.StatusCode.UNIMPLEMENTED, NotImplementedByServerError),
    ],
)
def test_what_trying_again_does_not_mend_is_refused_at_once(
    server: Scripted, watch: Watch, method: str, code: grpc.StatusCode, kind: type[LibcontainerdError]
) -> None:
    server.script(method, *[fail(code, "so it is")] * 20)
    assert refused(watch, kind, "so it is") < DEADLINE / 2


def test_a_silent_server_takes_the_deadline(server: Scripted, watch: Watch) -> None:
    server.script(PUBLISH, *[Held() for _ in range(9)])
    took = refused(watch, DeadlineExceededError, "containerd does not answer", 0.3)
    assert 0.3 <= took < DEADLINE / 2


def test_publications_that_are_never_seen_take_the_deadline(server: Scripted, watch: Watch) -> None:
    server.script(PUBLISH, *[swallow] * 100)
    refused(watch, DeadlineExceededError, "containerd does not answer", 0.2)


def test_a_server_that_is_gone_is_unavailable(server: Scripted, watch: Watch) -> None:
    server.stop()
    passing = AfterFailures(watch, UnavailableError)
    refused(watch, UnavailableError, "containerd does not answer", passing)


def test_an_attempt_that_the_deadline_cuts_short_is_not_what_is_told(server: Scripted, watch: Watch) -> None:
    server.script(PUBLISH, fail(grpc.StatusCode.UNAVAILABLE), *[Held() for _ in range(9)])
    server.script(SUBSCRIBE, *[fail(grpc.StatusCode.UNAVAILABLE)] * 100)
    passing = AfterFailures(watch, UnavailableError, DeadlineExceededError)
    refused(watch, UnavailableError, "containerd does not answer", passing)


def test_close_beside_open(server: Scripted, watch: Watch) -> None:
    server.script(PUBLISH, *[swallow] * 100)
    opening = Beside(watch.open)
    server.wait_for(PUBLISH, 2)
    watch.subscriber.stop()
    with pytest.raises(CallCancelledError, match="the client is closed"):
        opening.answer()


# ------------------------------------------------------------------------------------------------------------------- gaps

ENDS = [
    None,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.DEADLINE_EXCEEDED,
]


@pytest.mark.parametrize("end", ENDS)
def test_a_stream_that_ends_is_begun_again(
    server: Scripted, watch: Watch, end: grpc.StatusCode | None
) -> None:
    watch.open()
    tell(server, "before")
    eventually(lambda: watch.topics() == ["/tasks/before"], "the first event")
    with capture_logs() as logs:
        server.end_streams(end)
        eventually(lambda: watch.resumed == 1, "the subscription's return")
    assert [log["event"] for log in logs] == ["events_interrupted", "events_resumed"]
    assert {log["namespace"] for log in logs} == {"test"}
    assert watch.subscriber.live
    tell(server, "after")
    eventually(lambda: watch.topics() == ["/tasks/before", "/tasks/after"], "the second event")


def test_it_follows_a_containerd_that_restarts(server: Scripted, watch: Watch) -> None:
    watch.open()
    for number in range(1, 3):
        server.stop()
        eventually(lambda: not watch.subscriber.live, "the gap")
        server.start()
        eventually(lambda number=number: watch.resumed == number, "the subscription's return")  # type: ignore[misc]
    tell(server, "after")
    eventually(lambda: watch.topics() == ["/tasks/after"], "an event")


def test_there_is_one_stream_at_a_time(server: Scripted, watch: Watch) -> None:
    watch.open()
    for number, end in enumerate(ENDS, 1):
        server.end_streams(end)
        eventually(lambda number=number: watch.resumed == number, "the subscription's return")  # type: ignore[misc]
    assert len(server.streams) == 1
    assert len(server.called(SUBSCRIBE)) == len(ENDS) + 1


def test_after_a_gap_even_the_hopeless_is_tried_again(server: Scripted, watch: Watch) -> None:
    watch.open()
    server.script(SUBSCRIBE, fail(grpc.StatusCode.UNIMPLEMENTED), fail(grpc.StatusCode.PERMISSION_DENIED))
    server.script(PUBLISH, fail(grpc.StatusCode.UNIMPLEMENTED), fail(grpc.StatusCode.INVALID_ARGUMENT))
    server.end_streams()
    eventually(lambda: watch.resumed == 1, "the subscription's return")


def test_it_is_not_live_before_it_is_proven_again(server: Scripted, watch: Watch) -> None:
    watch.open()
    held = Held()
    server.script(PUBLISH, held)
    server.end_streams()
    assert held.begun.wait(DEADLINE)
    server.wait_for(SUBSCRIBE, 2)
    assert not watch.subscriber.live
    assert watch.resumed == 0
    held.release()
    eventually(lambda: watch.resumed == 1, "the subscription's return")


class Pauses(threading.Event):
    """An event that notes how long it is waited for, and does not let anybody wait."""

    def __init__(self, enough: int) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._enough = enough

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(0.0 if timeout is None else timeout)
        if len(self.seconds) >= self._enough:
            return super().wait(DEADLINE)
        return self.is_set()


def test_the_pauses_double_up_to_two_seconds(server: Scripted, watch: Watch) -> None:
    watch.open()
    pauses = Pauses(enough=10)
    watch.subscriber._closed = pauses
    server.script(SUBSCRIBE, *[fail(grpc.StatusCode.UNAVAILABLE)] * 20)
    server.end_streams()
    eventually(lambda: len(pauses.seconds) == 10, "ten pauses")
    nominal = [min(0.1 * 2**number, 2.0) for number in range(10)]
    for seconds, most in zip(pauses.seconds, nominal, strict=True):
        assert most / 2 <= seconds <= most
    assert len({seconds / most for seconds, most in zip(pauses.seconds, nominal, strict=True)}) > 1, "jitter"
    assert all(after > before for before, after in pairwise(nominal[:5]))


def test_a_subscription_that_lived_begins_with_the_shortest_pause(server: Scripted, watch: Watch) -> None:
    watch.open()
    pauses = Pauses(enough=99)
    watch.subscriber._closed = pauses
    for number in range(1, 4):
        server.end_streams()
        eventually(lambda number=number: watch.resumed == number, "the subscription's return")  # type: ignore[misc]
    assert len(pauses.seconds) == 3
    assert max(pauses.seconds) <= 0.1


# ---------------------------------------------------------------------------------------------------------------- closing


def test_a_stop_is_prompt_and_idempotent(server: Scripted, watch: Watch) -> None:
    watch.open()
    begin = time.monotonic()
    watch.subscriber.stop()
    watch.subscriber.stop()
    tell(server, "late")
    watch.close()
    watch.close()
    assert time.monotonic() - begin < DEADLINE / 2
    assert watch.received == []


def test_a_stop_in_a_gap(server: Scripted, watch: Watch) -> None:
    watch.open()
    server.stop()
    eventually(lambda: not watch.subscriber.live, "the gap")
    begin = time.monotonic()
    watch.close()
    assert time.monotonic() - begin < DEADLINE
    assert watch.resumed == 0


def test_a_stop_before_it_is_open(watch: Watch) -> None:
    watch.close()


def test_a_stop_from_inside_an_event(server: Scripted, watch: Watch) -> None:
    left: list[bool] = []

    def close(_: Envelope) -> None:
        watch.subscriber.stop()
        watch.connection.close()
        left.append(watch.subscriber.join(DEADLINE))

    watch.on_event = close
    watch.open()
    tell(server, "last")
    eventually(lambda: left, "the return of a thread that does not wait for itself")
    assert left == [False], "it is that thread which is still at work"
    watch.close()


def test_a_stop_from_inside_the_catching_up(server: Scripted, watch: Watch) -> None:
    stopped = threading.Event()

    def close() -> None:
        watch.subscriber.stop()
        watch.connection.close()
        watch.subscriber.join(DEADLINE)
        stopped.set()

    watch.on_live = close
    watch.open()
    server.end_streams()
    assert stopped.wait(DEADLINE)


def test_join_says_when_an_event_is_still_worked_on(server: Scripted, watch: Watch) -> None:
    busy, go = threading.Event(), threading.Event()

    def block(_: Envelope) -> None:
        busy.set()
        go.wait()

    watch.on_event = block
    watch.open()
    tell(server, "slow")
    assert busy.wait(DEADLINE)
    watch.subscriber.stop()
    watch.connection.close()
    assert not watch.subscriber.join(0.05)
    go.set()
    assert watch.subscriber.join(DEADLINE)


def test_an_event_that_fails_is_logged_and_the_next_is_handed_on(server: Scripted, watch: Watch) -> None:
    handed: list[str] = []

    def fail_once(envelope: Envelope) -> None:
        handed.append(envelope.topic)
        if len(handed) == 1:
            raise RuntimeError("a mistake")

    watch.on_event = fail_once
    watch.open()
    with capture_logs() as logs:
        tell(server, "one")
        tell(server, "two")
        eventually(lambda: len(handed) == 2, "both events")
    assert [(log["event"], log["topic"]) for log in logs] == [("event_failed", "/tasks/one")]


def test_nothing_is_left_behind(server: Scripted) -> None:
    first = Watch(server)
    first.open()
    first.close()
    with leaks.no_leaks(), Scripted() as other:  # whose threads come as they are needed
        for _ in range(3):
            watch = Watch(other)
            watch.open()
            other.end_streams()
            eventually(lambda watch=watch: watch.resumed == 1, "the subscription's return")  # type: ignore[misc]
            watch.close()


# ------------------------------------------------------------------------------------------------------------ it outlives


def test_it_goes_on_whatever_grpcio_raises(
    server: Scripted, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch.open()
    read = watch.subscriber._read
    failures = [AttributeError("grpcio's own"), RuntimeError("cannot start new thread")]

    def read_or_fail() -> LibcontainerdError:
        if failures:
            raise failures.pop()
        return read()

    with capture_logs() as logs:
        monkeypatch.setattr(watch.subscriber, "_read", read_or_fail)
        server.end_streams()
        eventually(lambda: watch.resumed == 1, "the stream is read again")
    assert [each["event"] for each in logs] == ["events_interrupted", "events_resumed"]
    tell(server, "oom")
    eventually(lambda: watch.topics() == ["/tasks/oom"], "an event")


def test_it_goes_on_when_no_thread_can_be_had(
    server: Scripted, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriber_module, "_BACKOFF_MOST", 0.01)
    watch.open()
    start = threading.Thread.start
    refused: list[str] = []

    def start_or_fail(thread: threading.Thread) -> None:
        if thread.name == "libcontainerd-events-prover" and len(refused) < 2:
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_or_fail)
    with capture_logs() as logs:
        server.end_streams()
        eventually(lambda: watch.resumed == 1, "what was missed is asked for")
    assert [each["event"] for each in logs] == [
        "events_interrupted",
        "events_not_resumed",
        "events_not_resumed",
        "events_resumed",
    ]
    tell(server, "oom")
    eventually(lambda: watch.topics() == ["/tasks/oom"], "an event")
