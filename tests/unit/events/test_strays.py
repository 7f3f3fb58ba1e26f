"""Tasks that have lost their container: ours are ended, and nobody else's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from libcontainerd._wire.pb.services import containers_pb2
from libcontainerd._wire.pb.types import task_pb2
from tests.unit.beside import eventually
from tests.unit.events.office import Office
from tests.unit.server import Process, Scripted, fail


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as made:
        yield made


@pytest.fixture
def office(server: Scripted, tmp_path: Path) -> Iterator[Office]:
    made = Office(server, tmp_path)
    yield made
    made.close()


def stray(server: Scripted, container_id: str, *stdio: str) -> None:
    """Have containerd run a task without a container."""
    paths = (*stdio, "", "", "")[:3]
    server.processes[container_id, ""] = Process(
        server.new_pid(), task_pb2.Status.RUNNING, stdio=(paths[0], paths[1], paths[2])
    )


def looked_round(office: Office) -> None:
    """Look, and wait until the background has nothing to do any more."""
    office.patrol.look_round()
    office.background.close(30.0)


def test_a_task_of_ours_without_a_container_is_ended(server: Scripted, office: Office) -> None:
    stray(server, "web", "", f"{office.directory}/web/init-stdout")
    office.patrol.look_round()
    eventually(lambda: not server.processes, "it is gone")
    eventually(lambda: not server.containers, "the stand-in is gone")


@pytest.mark.parametrize(
    "stdio",
    [
        (),
        ("", "/elsewhere/web/init-stdout"),
        ("", "{}x/web/init-stdout"),
        ("", "{}/../elsewhere/init-stdout"),
        ("/elsewhere/stdin", "{}/web/init-stdout"),
    ],
    ids=["no FIFOs", "elsewhere", "a neighbour's", "a way out", "half of it"],
)
def test_anothers_is_left(server: Scripted, office: Office, stdio: tuple[str, ...]) -> None:
    stray(server, "web", *(path.format(office.directory) for path in stdio))
    looked_round(office)
    assert list(server.processes) == [("web", "")]
    assert server.called("Containers.Create") == []


def test_one_that_has_a_container_is_left(server: Scripted, office: Office) -> None:
    stray(server, "web", "", f"{office.directory}/web/init-stdout")
    server.containers["web"] = containers_pb2.Container(id="web")
    looked_round(office)
    assert list(server.processes) == [("web", "")]
    assert server.called("Containers.Create") == []


def test_one_that_is_being_made_is_left(server: Scripted, office: Office) -> None:
    stray(server, "web", "", f"{office.directory}/web/init-stdout")
    office.containers.reserve("web")
    looked_round(office)
    assert server.called("Containers.Get") == []
    assert list(server.processes) == [("web", "")]


def test_one_whose_id_is_taken_meanwhile_is_left(server: Scripted, office: Office) -> None:
    stray(server, "web", "", f"{office.directory}/web/init-stdout")
    tasks = {"web": task_pb2.Process(id="web", stdout=f"{office.directory}/web/init-stdout")}
    office.containers.reserve("web")
    office.strays._end("web", tasks["web"])
    assert list(server.processes) == [("web", "")]


def test_another_run_of_that_name_is_left(server: Scripted, office: Office) -> None:
    stray(server, "web", "", f"{office.directory}/web/init-stdout")
    seen = task_pb2.Process(id="web", pid=1, stdout=f"{office.directory}/web/init-stdout")
    office.strays._end("web", seen)
    assert list(server.processes) == [("web", "")]
    assert server.containers == {}


def test_one_that_cannot_be_asked_for_is_left_for_the_next_time(server: Scripted, office: Office) -> None:
    stray(server, "web", "", f"{office.directory}/web/init-stdout")
    server.script("Containers.Get", fail(grpc.StatusCode.UNAVAILABLE))
    looked_round(office)
    assert list(server.processes) == [("web", "")]
