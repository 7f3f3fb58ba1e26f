"""Exits that containerd is made to keep, by a record in its store of sandboxes, and that no record is left over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import grpc
import pytest
from structlog.testing import capture_logs

from libcontainerd import Client, InvalidParameterError, NotFoundError, Remote, UnavailableError
from libcontainerd._wire.pb.services import sandbox_pb2
from libcontainerd._wire.pb.types.sandbox_pb2 import Sandbox
from libcontainerd.backends import RecordingBackend
from libcontainerd.testing import FakeContainerd
from libcontainerd.types import EventType
from tests.unit.beside import DEADLINE

SPEC = {"ociVersion": "1.0.2", "process": {"args": ["/bin/true"], "cwd": "/"}, "root": {"path": "/"}}
METADATA = (("containerd-namespace", "test"),)
LABEL = "libcontainerd/keep.exits"

Versions = Literal["1.6", "1.7", "2.1"]


@pytest.fixture(params=["1.7", "2.1"])
def version(request: pytest.FixtureRequest) -> Versions:
    chosen: Versions = request.param
    return chosen


@pytest.fixture
def fake(version: Versions) -> Iterator[FakeContainerd]:
    with FakeContainerd(version=version) as made:
        yield made


@pytest.fixture
def store(fake: FakeContainerd) -> Iterator[sandbox_pb2.StoreStub]:
    options = (("grpc.default_authority", "localhost"),)
    with grpc.insecure_channel(f"unix:{fake.address}", options=options) as channel:
        yield sandbox_pb2.StoreStub(channel)


@pytest.fixture
def records(store: sandbox_pb2.StoreStub) -> Callable[[], list[str]]:
    """Lists whose records there are."""

    def names() -> list[str]:
        found = store.List(sandbox_pb2.StoreListRequest(), metadata=METADATA, timeout=DEADLINE).list
        return [each.sandbox_id for each in found]

    return names


@pytest.fixture
def backend() -> RecordingBackend:
    return RecordingBackend()


def connect(
    fake: FakeContainerd, backend: RecordingBackend | None = None, *, keep_exits: bool = True
) -> Client:
    return Client(
        fake.address,
        namespace="test",
        state_dir=fake.state_dir,
        backend=backend,
        default_timeout=DEADLINE,
        keep_exits=keep_exits,
    )


@pytest.fixture
def client(fake: FakeContainerd, backend: RecordingBackend) -> Iterator[Client]:
    with connect(fake, backend) as made:
        yield made


def test_an_exit_is_kept_through_an_outage(
    client: Client, fake: FakeContainerd, backend: RecordingBackend, records: Callable[[], list[str]]
) -> None:
    client.create("c", SPEC)
    client.start("c")
    assert records() == ["c"]

    fake.go_down()
    fake.process("c").exit(5)
    fake.go_up(keep_events=False)

    assert backend.wait_for(EventType.EXIT, "c", timeout=DEADLINE).info.exit_code == 5
    assert client.delete_task("c").code == 5
    assert records() == []
    client.delete("c")


def test_without_being_asked_for_it_is_not(
    fake: FakeContainerd, backend: RecordingBackend, records: Callable[[], list[str]]
) -> None:
    with connect(fake, backend, keep_exits=False) as client:
        client.create("c", SPEC)
        client.start("c")
        assert records() == []
        fake.restart()  # nothing has ended: all goes on
        fake.go_down()
        fake.process("c").exit(5)
        fake.go_up(keep_events=False)

        assert backend.wait_for(EventType.EXIT, "c", timeout=DEADLINE).info.exit_code == 255


def test_an_exit_is_kept_while_the_client_is_gone_too(
    fake: FakeContainerd, records: Callable[[], list[str]]
) -> None:
    with connect(fake) as earlier:
        earlier.create("c", SPEC)
        earlier.start("c")
    fake.go_down()
    fake.process("c").exit(5)
    fake.go_up(keep_events=False)

    with connect(fake, keep_exits=False) as client:  # what was created so stays so
        assert not client.restore("c").alive
        assert client.wait("c").code == 5
        assert client.delete_task("c").code == 5
        assert records() == []


def test_the_record_names_the_runtime_and_says_whose_it_is(client: Client, fake: FakeContainerd) -> None:
    client.create("c", SPEC)
    client.start("c")

    (call,) = fake.calls.all("Store/Create")

    assert isinstance(call.request, sandbox_pb2.StoreCreateRequest)
    # Without the runtime, fields 2 and 1 there, the real containerd panics.
    assert call.request.sandbox.SerializeToString(deterministic=True) == (
        b"\x0a\x01c"
        b"\x12\x17\x0a\x15io.containerd.runc.v2"
        b"\x22\x1d\x0a\x18" + LABEL.encode() + b"\x12\x011"
    )  # fmt: skip


def test_each_life_costs_two_calls_more(client: Client, fake: FakeContainerd) -> None:
    before = len(fake.calls.all())
    client.create("c", SPEC)
    client.start("c")
    fake.process("c").exit(0)
    client.wait("c")
    client.delete_task("c")
    client.delete("c")

    assert [call.method for call in fake.calls.all()[before:]] == [
        "Containers/Create",
        "Tasks/Create",
        "Store/Create",
        "Tasks/Start",
        "Tasks/Delete",
        "Store/Delete",
        "Tasks/Get",
        "Containers/Delete",
    ]


@pytest.mark.parametrize("version", ["1.6"], indirect=True)
def test_an_older_containerd_needs_none(client: Client, fake: FakeContainerd) -> None:
    client.create("c", SPEC)
    client.start("c")
    fake.go_down()
    fake.process("c").exit(5)
    fake.go_up(keep_events=False)

    assert client.wait("c").code == 5
    assert client.delete_task("c").code == 5
    client.delete("c")
    assert not client.restore_all(lambda dio: dio)


@pytest.mark.parametrize("method", ["Tasks/Create", "Store/Create", "Tasks/Start"])
def test_a_start_that_fails_leaves_no_record(
    client: Client, fake: FakeContainerd, records: Callable[[], list[str]], method: str
) -> None:
    client.create("c", SPEC)
    fake.fail(method, grpc.StatusCode.INTERNAL, "no", after=method != "Tasks/Create")

    with pytest.raises(Exception, match="no"):
        client.start("c")

    assert records() == []
    client.start("c")
    assert records() == ["c"]


def test_a_record_that_is_there_already_is_as_good(
    client: Client, store: sandbox_pb2.StoreStub, records: Callable[[], list[str]]
) -> None:
    left = Sandbox(sandbox_id="c", runtime=Sandbox.Runtime(name="r"))
    store.Create(sandbox_pb2.StoreCreateRequest(sandbox=left), metadata=METADATA, timeout=DEADLINE)
    client.create("c", SPEC)
    client.start("c")
    assert records() == ["c"]


def test_a_record_that_could_not_be_deleted_goes_with_its_container(
    client: Client, fake: FakeContainerd, records: Callable[[], list[str]]
) -> None:
    client.create("c", SPEC)
    client.start("c")
    fake.process("c").exit(5)
    client.wait("c")
    fake.fail("Store/Delete", times=2)

    assert client.delete_task("c").error is None
    assert records() == ["c"]
    with pytest.raises(UnavailableError):
        client.delete("c")
    client.delete("c")
    assert records() == []


def test_a_task_that_vanished_leaves_no_record(
    client: Client, fake: FakeContainerd, records: Callable[[], list[str]]
) -> None:
    client.create("c", SPEC)
    client.start("c")
    fake.kill_shim("c")
    client.wait("c")

    assert client.delete_task("c").code == 137
    assert records() == []


def test_one_that_vanished_while_no_client_was_there_goes_with_its_container(
    fake: FakeContainerd, records: Callable[[], list[str]]
) -> None:
    with connect(fake) as earlier:
        earlier.create("c", SPEC)
        earlier.start("c")
    fake.kill_shim("c")
    with connect(fake) as client:
        assert not client.restore("c").alive
        client.delete("c")
        assert records() == []


def test_a_replaced_container_leaves_no_record(
    fake: FakeContainerd, records: Callable[[], list[str]]
) -> None:
    with connect(fake) as earlier:
        earlier.create("c", SPEC)
        earlier.start("c")
    with connect(fake, keep_exits=False) as client:
        client.replace("c", SPEC)
        assert records() == []


def test_records_of_containers_that_others_removed_are_swept(
    fake: FakeContainerd, store: sandbox_pb2.StoreStub, records: Callable[[], list[str]]
) -> None:
    with connect(fake) as earlier:
        earlier.create("stays", SPEC)
        earlier.start("stays")
    for name, labels in (("gone", {LABEL: "1"}), ("not-ours", {})):
        left = Sandbox(sandbox_id=name, runtime=Sandbox.Runtime(name="r"), labels=labels)
        store.Create(sandbox_pb2.StoreCreateRequest(sandbox=left), metadata=METADATA, timeout=DEADLINE)

    with connect(fake, keep_exits=False) as client:
        client.restore_all(lambda dio: dio)
        assert records() == ["gone", "not-ours", "stays"]
    with connect(fake) as client:
        fake.fail("Store/List")
        with capture_logs() as logs:
            assert client.restore_all(lambda dio: dio)["stays"]
        assert [each["event"] for each in logs if each["log_level"] == "warning"] == ["records_not_swept"]
        client.restore_all(lambda dio: dio)
        assert records() == ["not-ours", "stays"]


def test_the_label_is_ours(client: Client) -> None:
    with pytest.raises(InvalidParameterError, match="this library's own"):
        client.create("c", SPEC, labels={LABEL: "1"})
    with pytest.raises(NotFoundError):
        client.start("c")


def test_a_remote_hands_it_on(fake: FakeContainerd, records: Callable[[], list[str]]) -> None:
    with (
        Remote.connect(fake.address, state_dir=fake.state_dir, keep_exits=True) as remote,
        remote.new_client("test") as client,
    ):
        client.create("c", SPEC)
        client.start("c")
        assert records() == ["c"]
