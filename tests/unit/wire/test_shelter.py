"""Sheltered calls: a deadline or a close ends the waiting and not the call, and what must be undone still can be."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress

import grpc
import pytest

from libcontainerd._wire import shelter as shelter_module
from libcontainerd._wire.connection import NAMESPACE_HEADER, Address, Deadline, NotSentError
from libcontainerd._wire.pb.services import containers_pb2
from libcontainerd._wire.shelter import Lease, Shelter
from libcontainerd.errors import CallCancelledError, DeadlineExceededError, NotFoundError, UnavailableError
from tests import leaks
from tests.unit.beside import DEADLINE, Beside, eventually, race
from tests.unit.server import Held, Scripted, fail

DOING = "look at container 'web'"
GET = "Containers.Get"


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as made:
        made.containers["web"] = containers_pb2.Container(id="web")
        yield made


@pytest.fixture
def shelter(server: Scripted) -> Iterator[Shelter]:
    made = Shelter(Address(server.path, with_credentials=False), ((NAMESPACE_HEADER, "test"),))
    yield made
    made.close()


def look(lease: Lease, seconds: float = DEADLINE, container_id: str = "web") -> str:
    request = containers_pb2.GetContainerRequest(id=container_id)
    answer = lease.call(lease.containers.Get, request, doing=DOING, deadline=Deadline(seconds))
    return answer.container.id


def test_a_call_is_answered(server: Scripted, shelter: Shelter) -> None:
    with shelter.enter(DOING) as lease:
        assert look(lease) == "web"
        assert look(lease, math.inf) == "web"
        assert lease.namespace == "test"
        with pytest.raises(NotFoundError, match="cannot look at container 'web'") as caught:
            look(lease, container_id="none")
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    assert {call.metadata[NAMESPACE_HEADER] for call in server.calls} == {"test"}


def test_a_deadline_ends_the_waiting_and_not_the_call(server: Scripted, shelter: Shelter) -> None:
    held = Held()
    server.script(GET, held)
    with shelter.enter(DOING) as lease:
        with pytest.raises(DeadlineExceededError, match="has not answered in time") as caught:
            look(lease, 0.5)  # time enough to be sent
        assert not isinstance(caught.value, NotSentError)
        assert not held.cut.is_set()
        settling = Beside(lambda: lease.settle(Deadline(DEADLINE)))
        assert held.begun.wait(DEADLINE)
        held.release()
        settling.answer()
        assert not held.cut.is_set(), "it ran to its end"
        assert look(lease) == "web"


def test_what_does_not_settle_is_cut_off(server: Scripted, shelter: Shelter) -> None:
    held = Held()
    server.script(GET, held)
    with shelter.enter(DOING) as lease:
        with pytest.raises(DeadlineExceededError):
            look(lease, 0.5)  # time enough to be sent
        assert held.begun.wait(DEADLINE)
        lease.settle(Deadline(0.05))
        assert held.cut.wait(DEADLINE)


def test_a_deadline_that_has_passed_sends_nothing(server: Scripted, shelter: Shelter) -> None:
    with shelter.enter(DOING) as lease:
        with pytest.raises(DeadlineExceededError) as caught:
            look(lease, 1e-9)
        assert isinstance(caught.value, NotSentError)
        lease.settle(Deadline(1))
    assert server.calls == []


def test_close_ends_the_waiting_and_not_the_call(server: Scripted, shelter: Shelter) -> None:
    held = Held()
    server.script(GET, held)
    with shelter.enter(DOING) as lease:
        calling = Beside(lambda: look(lease, math.inf))
        assert held.begun.wait(DEADLINE)
        shelter.close()
        with pytest.raises(CallCancelledError, match="closed meanwhile") as caught:
            calling.answer()
        assert not isinstance(caught.value, NotSentError)
        with pytest.raises(CallCancelledError) as caught:
            look(lease)
        assert isinstance(caught.value, NotSentError)

        settling = Beside(lambda: lease.settle(Deadline(DEADLINE)))
        held.release()
        settling.answer()
        assert not held.cut.is_set()
        assert look(lease) == "web", "what must be undone can be"


def test_nobody_comes_in_after_close(shelter: Shelter) -> None:
    assert not shelter.closed
    shelter.close()
    shelter.close()
    with pytest.raises(CallCancelledError, match="the client is closed") as caught:
        shelter.enter(DOING)
    assert isinstance(caught.value, NotSentError)


def test_undoing_waits_for_a_containerd_that_is_away(server: Scripted, shelter: Shelter) -> None:
    with shelter.enter(DOING) as lease:
        assert look(lease) == "web"
        server.stop()
        with pytest.raises(UnavailableError):
            look(lease, 5)
        lease.settle(Deadline(1))
        undoing = Beside(lambda: look(lease))
        server.start()
        assert undoing.answer() == "web"


def test_one_channel_serves_all_and_is_closed_after_the_last(server: Scripted, shelter: Shelter) -> None:
    leases: list[Lease] = []
    enter: Callable[[], None] = lambda: leases.append(shelter.enter(DOING))  # noqa: E731 - six times the same
    assert race(*[enter] * 6) == [None] * 6
    assert shelter._channel is not None
    assert [look(lease) for lease in leases] == ["web"] * 6
    shelter.close()
    for lease in leases[1:]:
        with lease:
            pass
    leases[0].settle(Deadline(1))
    assert look(leases[0]) == "web"
    with leases[0] as last:
        pass
    with pytest.raises(ValueError, match=r"closed channel|Channel closed"):
        look(last)


def test_nothing_is_left_behind(server: Scripted, shelter: Shelter) -> None:
    with shelter.enter(DOING) as lease:
        look(lease)
    with leaks.no_leaks(), Scripted() as fresh:  # whose threads come as they are needed
        fresh.containers["web"] = server.containers["web"]
        for _ in range(3):
            other = Shelter(Address(fresh.path, with_credentials=False), shelter.metadata)
            with other.enter(DOING) as lease:
                look(lease)
            other.close()


def test_errors_are_translated(server: Scripted, shelter: Shelter) -> None:
    server.script(GET, fail(grpc.StatusCode.UNAVAILABLE))
    with shelter.enter(DOING) as lease, pytest.raises(UnavailableError):
        look(lease)
    assert shelter_module.CLEAN_UP_SECONDS == 45.0
    eventually(lambda: shelter._guests == 0, "the end of the visit")


def test_a_call_that_failed_leaves_no_cycle(server: Scripted, shelter: Shelter) -> None:
    lease = shelter.enter(DOING)
    gc.collect()
    gc.disable()
    try:
        with lease:
            for code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE):
                server.script(GET, fail(code))
                with suppress(NotFoundError, UnavailableError):
                    look(lease)
        gone = weakref.ref(lease)
        del lease
        eventually(lambda: gone() is None, "the lease's end without the collector")
    finally:
        gc.enable()
