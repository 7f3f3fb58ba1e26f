"""Events: the exchange that everything publishes to, and the service that subscribers read from."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Final

import grpc

from libcontainerd._wire import typeurl
from libcontainerd._wire.pb.events import (
    container_pb2,
    content_pb2,
    image_pb2,
    namespace_pb2,
    sandbox_pb2,
    snapshot_pb2,
    task_pb2,
)
from libcontainerd._wire.pb.services.events_pb2 import (
    EventsServicer,
    ForwardRequest,
    PublishRequest,
    SubscribeRequest,
)
from libcontainerd._wire.pb.types.event_pb2 import Envelope
from libcontainerd._wire.pb.wellknown_pb2 import Any, Empty
from libcontainerd.testing.filters import FilterError, Filters
from libcontainerd.testing.refusals import (
    Refusal,
    failed_precondition,
    identifier_fault,
    invalid_argument,
    namespace_in,
)
from libcontainerd.testing.timestamps import stamp

if TYPE_CHECKING:
    from google.protobuf.message import Message

_KINDS: Final = {
    kind.DESCRIPTOR.full_name: kind
    for module in (
        container_pb2,
        content_pb2,
        image_pb2,
        namespace_pb2,
        sandbox_pb2,
        snapshot_pb2,
        task_pb2,
    )
    for kind in vars(module).values()
    if hasattr(kind, "FromString")
}


class EventRule:
    """What becomes of the next events of a topic.

    Attributes:
        topic: The topic; empty for every one.
        times: How many events it still takes.
    """

    def __init__(self, topic: str, action: str, times: int) -> None:
        self.topic = topic
        self.action = action
        self.times = times


class _Subscriber:
    def __init__(self, filters: Filters) -> None:
        self.filters = filters
        self.queue: deque[Envelope] = deque()
        self.end: Refusal | None = None
        self.ended = False


class Exchange:
    """Hands each event to every subscriber whose filters it passes, in one order for all. Thread-safe."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        # Guards everything below. Innermost: nothing but filters is called under it.
        self._changed = threading.Condition(threading.Lock())
        self._subscribers: list[_Subscriber] = []
        self._rules: list[EventRule] = []
        self._withheld: list[Envelope] = []
        self._late: list[Envelope] = []
        self._history: list[Envelope] = []
        self._serving = True

    def publish(self, namespace: str, topic: str, event: Message) -> None:
        """Publish an event of containerd's own."""
        self.send(namespace, topic, typeurl.pack(event))

    def send(self, namespace: str, topic: str, event: Any) -> None:
        """Publish whatever an Any holds, at the time now."""
        self.forward(Envelope(timestamp=stamp(self._clock()), namespace=namespace, topic=topic, event=event))

    def forward(self, envelope: Envelope) -> None:
        """Publish an event as it is; while the server is down it waits, as in a shim that tries again."""
        with self._changed:
            if not self._serving:
                self._late.append(envelope)
                return
            for each in self._ruled(envelope):
                self._deliver(each)

    def _ruled(self, envelope: Envelope) -> list[Envelope]:
        rule = next((each for each in self._rules if each.topic in ("", envelope.topic)), None)
        released, self._withheld = self._withheld, []
        if rule is None:
            return [envelope, *released]
        rule.times -= 1
        if rule.times <= 0:
            self._rules.remove(rule)
        if rule.action == "lose":
            return released
        if rule.action == "duplicate":
            return [envelope, envelope, *released]
        self._withheld = [*released, envelope]
        return []

    def _deliver(self, envelope: Envelope) -> None:
        self._history.append(envelope)
        look_up = _fields_of(envelope)
        for subscriber in self._subscribers:
            if subscriber.filters.match(look_up):
                subscriber.queue.append(envelope)
        self._changed.notify_all()

    def history(self) -> list[Envelope]:
        """Every event that was delivered, in order."""
        with self._changed:
            return list(self._history)

    def add_rule(self, rule: EventRule) -> None:
        """Let the next events be lost, doubled or put after their successors."""
        with self._changed:
            self._rules.append(rule)

    def drop_streams(self, end: Refusal | None) -> int:
        """End every subscription, with an error or without, and say how many there were."""
        with self._changed:
            for subscriber in self._subscribers:
                subscriber.end, subscriber.ended = end, True
            self._changed.notify_all()
            return len(self._subscribers)

    def go_down(self) -> None:
        """The server stops: what shims publish from now on waits."""
        with self._changed:
            self._serving = False

    def go_up(self, *, forget: bool) -> None:
        """The server is back; shims try again when somebody listens."""
        with self._changed:
            self._serving = True
            if forget:
                self._late.clear()

    def forget_late(self, namespace: str, container_id: str) -> None:
        """What a shim still had to tell of a container is lost with the shim."""

        def of_it(envelope: Envelope) -> bool:
            kind = _KINDS.get(envelope.event.type_url)
            found = "" if kind is None else getattr(kind.FromString(envelope.event.value), "container_id", "")
            return (envelope.namespace, found) == (namespace, container_id)

        with self._changed:
            self._late = [envelope for envelope in self._late if not of_it(envelope)]

    def wait_subscribed(self, count: int, timeout: float) -> bool:
        """Wait until there are at least that many subscriptions; False when the time (seconds) is up."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._subscribers) >= count, timeout)

    def subscribe(self, filters: Filters, context: grpc.ServicerContext) -> Iterator[Envelope]:
        """Yield the events from now on until the caller goes away or the streams are dropped."""
        subscriber = _Subscriber(filters)
        if not context.add_callback(self._wake):
            return
        with self._changed:
            self._subscribers.append(subscriber)
            late, self._late = self._late, []
            for envelope in late:
                self._deliver(envelope)
            self._changed.notify_all()
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(
                        lambda: subscriber.queue or subscriber.ended or not context.is_active()
                    )
                    if subscriber.ended or not context.is_active():
                        break
                    envelope = subscriber.queue.popleft()
                yield envelope
        finally:
            with self._changed:
                self._subscribers.remove(subscriber)
                self._changed.notify_all()
        if subscriber.end is not None:
            raise subscriber.end

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _fields_of(envelope: Envelope) -> Callable[[Sequence[str]], str | None]:
    def look_up(path: Sequence[str]) -> str | None:
        if path[0] == "namespace":
            return envelope.namespace or None
        if path[0] == "topic":
            return envelope.topic or None
        if path[0] != "event" or len(path) < 2:
            return None
        kind = _KINDS.get(envelope.event.type_url)
        field = None if kind is None else kind.DESCRIPTOR.fields_by_name.get(path[1])
        if kind is None or field is None or len(path) > 2:
            return None
        value = getattr(kind.FromString(envelope.event.value), path[1])
        return value or None if isinstance(value, str) else None

    return look_up


def check_topic(topic: str) -> None:
    """Refuse a topic that containerd would not publish to.

    Raises:
        Refusal: it is none.
    """
    if not topic:
        raise invalid_argument('envelope topic "": must not be empty')
    if not topic.startswith("/"):
        raise invalid_argument(f"envelope topic \"{topic}\": must start with '/'")
    if topic == "/":
        raise invalid_argument('envelope topic "/": must have at least one component')
    for component in topic[1:].split("/"):
        if fault := identifier_fault(component):
            raise invalid_argument(
                f'envelope topic "{topic}": failed validation on component "{component}": {fault}'
            )


class Events(EventsServicer):
    """The events service."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def Publish(self, request: PublishRequest, context: grpc.ServicerContext) -> Empty:
        """Publish in the caller's namespace."""
        namespace = namespace_in(context)
        if not namespace:
            raise failed_precondition("failed publishing event: namespace is required")
        if fault := identifier_fault(namespace):
            raise invalid_argument(f"failed publishing event: namespace validation: {fault}")
        check_topic(request.topic)
        self._exchange.send(namespace, request.topic, request.event)
        return Empty()

    def Forward(self, request: ForwardRequest, context: grpc.ServicerContext) -> Empty:  # noqa: ARG002 - gRPC's form
        """Publish an envelope as it is."""
        envelope = request.envelope
        if fault := identifier_fault(envelope.namespace):
            raise invalid_argument(f"event envelope has invalid namespace: {fault}")
        check_topic(envelope.topic)
        if not envelope.HasField("timestamp"):
            raise invalid_argument("timestamp must be set on forwarded event")
        self._exchange.forward(envelope)
        return Empty()

    def Subscribe(self, request: SubscribeRequest, context: grpc.ServicerContext) -> Iterator[Envelope]:
        """Yield what passes the filters, from every namespace unless they say otherwise."""
        try:
            filters = Filters(request.filters)
        except FilterError as error:
            raise Refusal(
                grpc.StatusCode.UNKNOWN,
                f"subscription error: failed parsing subscription filters: {error}",
            ) from error
        yield from self._exchange.subscribe(filters, context)
