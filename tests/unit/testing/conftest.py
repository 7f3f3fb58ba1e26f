"""Fakes that begin and end with their test, and clients of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import grpc
import pytest

from libcontainerd import Client
from libcontainerd.backends import RecordingBackend
from libcontainerd.testing import FakeContainerd
from tests.unit.testing.specs import NAMESPACE


@pytest.fixture
def fake() -> Iterator[FakeContainerd]:
    """A fake with the scripted runtime."""
    with FakeContainerd(stdio_timeout=2.0) as made:
        yield made


@pytest.fixture
def host() -> Iterator[FakeContainerd]:
    """A fake with the host runtime."""
    with FakeContainerd("host", stdio_timeout=2.0) as made:
        yield made


@pytest.fixture
def backend() -> RecordingBackend:
    """Keeps the client's events."""
    return RecordingBackend()


@pytest.fixture
def connect(backend: RecordingBackend) -> Iterator[Callable[[FakeContainerd], Client]]:
    """Makes clients, and closes them."""
    with ExitStack() as stack:

        def make(fake: FakeContainerd) -> Client:
            client = Client(
                fake.address,
                namespace=NAMESPACE,
                state_dir=fake.state_dir,
                backend=backend,
                default_timeout=10.0,
            )
            stack.callback(client.close)
            return client

        yield make


@pytest.fixture
def client(fake: FakeContainerd, connect: Callable[[FakeContainerd], Client]) -> Client:
    """A client of `fake`."""
    return connect(fake)


@pytest.fixture
def channel(fake: FakeContainerd) -> Iterator[grpc.Channel]:
    """A channel to `fake`."""
    with grpc.insecure_channel(
        f"unix:{fake.address}", options=(("grpc.default_authority", "localhost"),)
    ) as made:
        yield made
