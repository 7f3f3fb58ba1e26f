"""The fake's store of sandboxes; that it says what the real one says is compared in tests/contract/test_words.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from libcontainerd._events.decode import utc
from libcontainerd._wire.pb.services.sandbox_pb2 import (
    StoreCreateRequest,
    StoreDeleteRequest,
    StoreGetRequest,
    StoreListRequest,
    StoreStub,
    StoreUpdateRequest,
)
from libcontainerd._wire.pb.types.sandbox_pb2 import Sandbox
from libcontainerd.testing import FakeContainerd
from tests.unit.beside import DEADLINE

METADATA = (("containerd-namespace", "test"),)
BEGINNING = datetime(2001, 2, 3, 4, 5, 6, tzinfo=UTC)


@pytest.fixture
def now() -> list[datetime]:
    """The time, to be changed."""
    return [BEGINNING]


@pytest.fixture(params=["1.7", "2.1"])
def store(request: pytest.FixtureRequest, now: list[datetime]) -> Iterator[StoreStub]:
    options = (("grpc.default_authority", "localhost"),)
    with (
        FakeContainerd(version=request.param, clock=lambda: now[0]) as fake,
        grpc.insecure_channel(f"unix:{fake.address}", options=options) as channel,
    ):
        yield StoreStub(channel)


def sandbox(name: str, **labels: str) -> Sandbox:
    return Sandbox(sandbox_id=name, runtime=Sandbox.Runtime(name="r"), labels=labels)


def create(store: StoreStub, name: str, **labels: str) -> Sandbox:
    request = StoreCreateRequest(sandbox=sandbox(name, **labels))
    return store.Create(request, metadata=METADATA, timeout=DEADLINE).sandbox


def names(store: StoreStub, *filters: str) -> list[str]:
    answer = store.List(StoreListRequest(filters=filters), metadata=METADATA, timeout=DEADLINE)
    return [each.sandbox_id for each in answer.list]


def test_what_is_stored_is_found(store: StoreStub, now: list[datetime]) -> None:
    assert names(store) == []
    made = create(store, "b", a="1")
    create(store, "a")

    assert utc(made.created_at) == utc(made.updated_at) == BEGINNING
    assert names(store) == ["a", "b"]
    assert names(store, 'labels."a"==1') == ["b"]
    found = store.Get(StoreGetRequest(sandbox_id="b"), metadata=METADATA, timeout=DEADLINE).sandbox
    assert found == made

    now[0] += timedelta(days=1)
    one = StoreUpdateRequest(sandbox=sandbox("b", c="2"), fields=["labels.c"])
    changed = store.Update(one, metadata=METADATA, timeout=DEADLINE).sandbox
    assert dict(changed.labels) == {"a": "1", "c": "2"}
    assert utc(changed.created_at) == BEGINNING
    assert utc(changed.updated_at) == now[0]
    every = StoreUpdateRequest(sandbox=sandbox("b", d="3"))
    assert dict(store.Update(every, metadata=METADATA, timeout=DEADLINE).sandbox.labels) == {"d": "3"}

    store.Delete(StoreDeleteRequest(sandbox_id="b"), metadata=METADATA, timeout=DEADLINE)
    assert names(store) == ["a"]


def test_what_is_not_there_and_what_is_there_already(store: StoreStub) -> None:
    def code(call: object, request: object) -> grpc.StatusCode:
        assert callable(call)
        with pytest.raises(grpc.RpcError) as caught:
            call(request, metadata=METADATA, timeout=DEADLINE)
        return caught.value.code()

    assert code(store.Get, StoreGetRequest(sandbox_id="a")) is grpc.StatusCode.NOT_FOUND
    create(store, "a")
    assert code(store.Get, StoreGetRequest(sandbox_id="b")) is grpc.StatusCode.NOT_FOUND
    assert code(store.Update, StoreUpdateRequest(sandbox=sandbox("b"))) is grpc.StatusCode.NOT_FOUND
    assert code(store.Create, StoreCreateRequest(sandbox=sandbox("a"))) is grpc.StatusCode.ALREADY_EXISTS
    assert code(store.Create, StoreCreateRequest(sandbox=sandbox("a b"))) is grpc.StatusCode.INVALID_ARGUMENT
    gone = code(store.Delete, StoreDeleteRequest(sandbox_id="b"))
    assert gone in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.NOT_FOUND)  # 1.7, and later


def test_what_ends_the_real_one_is_refused(store: StoreStub) -> None:
    unnamed = Sandbox(sandbox_id="a")
    calls: tuple[Callable[[], object], ...] = (
        lambda: store.Create(StoreCreateRequest(sandbox=unnamed), metadata=METADATA, timeout=DEADLINE),
        lambda: store.Update(StoreUpdateRequest(sandbox=unnamed), metadata=METADATA, timeout=DEADLINE),
    )
    for call in calls:
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert names(store) == []
