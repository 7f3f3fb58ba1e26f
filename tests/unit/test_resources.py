"""What update_resources sends, and what it refuses before it sends anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from libcontainerd import Client, oci
from libcontainerd._wire.pb.services.tasks_pb2 import UpdateTaskRequest
from libcontainerd.errors import InvalidParameterError, NotFoundError
from libcontainerd.testing import FakeContainerd
from tests.unit.test_client import SPEC


@pytest.fixture
def fake() -> Iterator[FakeContainerd]:
    with FakeContainerd() as server:
        yield server


@pytest.fixture
def client(fake: FakeContainerd, tmp_path: Path) -> Iterator[Client]:
    with Client(fake.address, namespace="unit", state_dir=tmp_path / "state", default_timeout=20.0) as made:
        made.create("web", SPEC)
        yield made


@pytest.mark.parametrize(
    ("resources", "sent"),
    [
        ({"memory": {"limit": 1 << 30}}, {"memory": {"limit": 1 << 30}}),
        (oci.LinuxResources(pids=oci.LinuxPids(limit=7)), {"pids": {"limit": 7}}),
        (
            oci.LinuxResources(cpu=oci.LinuxCPU(shares=512, quota=-1)),
            {"cpu": {"shares": 512, "quota": -1}},
        ),
        ({"unified": {"memory.high": "max"}}, {"unified": {"memory.high": "max"}}),
        (oci.LinuxResources(), {}),
    ],
    ids=repr,
)
def test_only_what_is_set_is_sent(
    fake: FakeContainerd,
    client: Client,
    resources: oci.LinuxResources | Mapping[str, object],
    sent: dict[str, object],
) -> None:
    client.start("web")

    client.update_resources("web", resources)

    assert fake.updates("web") == [sent]


def test_it_goes_under_containerds_name_for_it(fake: FakeContainerd, client: Client) -> None:
    client.start("web")
    client.update_resources("web", {"pids": {"limit": 7}})

    (call,) = fake.calls.all("Tasks/Update")

    assert isinstance(call.request, UpdateTaskRequest)
    assert call.request.container_id == "web"
    assert (
        call.request.resources.type_url == "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
    )


@pytest.mark.parametrize("resources", [{"memory": {"limit": "much"}}, {"cpu": {"shares": -1}}, [], "{"])
def test_what_is_not_well_formed_is_not_sent(
    fake: FakeContainerd, client: Client, resources: Mapping[str, object]
) -> None:
    client.start("web")

    with pytest.raises(InvalidParameterError, match="invalid resources"):
        client.update_resources("web", resources)
    assert fake.calls.all("Tasks/Update") == []


def test_there_must_be_a_task(fake: FakeContainerd, client: Client) -> None:
    with pytest.raises(NotFoundError, match="container is not running"):
        client.update_resources("web", {})
    with pytest.raises(NotFoundError, match="no such container"):
        client.update_resources("other", {})
    assert fake.calls.all("Tasks/Update") == []
