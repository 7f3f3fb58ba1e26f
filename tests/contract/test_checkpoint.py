"""Checkpoints, where there is a criu: on the fake's scripted runtime, and on containerd with the criu that was fetched."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from libcontainerd import (
    Client,
    EventType,
    FailedPreconditionError,
    InvalidParameterError,
    NotFoundError,
    Status,
    SystemFailureError,
)
from libcontainerd._checkpoint import CRIU_TYPE
from libcontainerd._wire import typeurl
from libcontainerd._wire.pb.runc.options_pb2 import CheckpointOptions
from libcontainerd._wire.pb.services import content_pb2, images_pb2, leases_pb2, tasks_pb2
from libcontainerd.backends import RecordingBackend
from tests.contract import programs
from tests.contract.servers import Server, Services
from tests.integration.containers import Collected, exit_of

WITH_CRIU = pytest.mark.parametrize(
    "server",
    ["fake, scripted runtime", pytest.param("containerd, criu", marks=pytest.mark.real)],
    indirect=True,
)
WITHOUT_CRIU = pytest.mark.parametrize("server", ["fake, host runtime"], indirect=True)


@pytest.fixture(autouse=True)
def _criu(request: pytest.FixtureRequest, server: Server) -> None:
    if server.real:
        request.getfixturevalue("criu")


@pytest.fixture(autouse=True)
def _nothing_left(services: Services, client: Client) -> Iterator[None]:
    """Whatever a test does, no content, ingest, lease or image may be left of it."""
    yield
    assert left_in_containerd(services) == []


def left_in_containerd(services: Services) -> list[str]:
    content = [
        info.digest
        for answer in services.call(services.content.List, content_pb2.ListContentRequest())
        for info in answer.info
    ]
    ingests = services.call(services.content.ListStatuses, content_pb2.ListStatusesRequest()).statuses
    leases = services.call(services.leases.List, leases_pb2.ListRequest()).leases
    images = services.call(services.images.List, images_pb2.ListImagesRequest()).images
    return [
        *content,
        *(each.ref for each in ingests),
        *(each.id for each in leases),
        *(each.name for each in images),
    ]


def counting(client: Client, services: Services, container_id: str = "c", up_to: int = 3) -> Collected:
    """Have a container count the lines that it is given, up to a number."""
    collected = Collected()
    client.create(container_id, services.spec(*programs.COUNTING))
    client.start(container_id, with_stdin=True, attach_stdio=collected)
    collected.wait_for(b"ready\n", timeout=30)
    for number in range(1, up_to + 1):
        count_on(collected, number)
    return collected


def count_on(collected: Collected, number: int) -> None:
    """Give it one more line, and wait for its number."""
    collected.stdin.write(b"x\n")
    collected.wait_for(b"%d\n" % number, timeout=30)


def end(client: Client, container_id: str = "c") -> None:
    client.signal_process(container_id, "init", signal.SIGKILL)
    assert client.wait(container_id).code == 137
    assert client.delete_task(container_id).error is None


@WITH_CRIU
def test_a_process_goes_on_counting_where_it_was(
    client: Client, services: Services, backend: RecordingBackend, tmp_path: Path
) -> None:
    counting(client, services)
    client.create_checkpoint("c", tmp_path / "saved", exit=True)
    assert left_in_containerd(services) == []
    assert client.status("c") is Status.STOPPED
    assert client.delete_task("c").code == 137
    client.delete("c")
    assert exit_of(backend, "c") == 137

    client.create("c", services.spec(*programs.COUNTING))
    backend.clear()
    restored = Collected()
    pid = client.start("c", tmp_path / "saved", with_stdin=True, attach_stdio=restored)

    assert left_in_containerd(services) == []
    assert pid > 0
    assert client.status("c") is Status.RUNNING
    assert client.list_pids("c") == [pid]
    assert [each.process_id for each in client.summary("c")] == ["init"]
    for number in (4, 5):
        count_on(restored, number)
    assert restored.out == b"4\n5\n"
    end(client)
    exited = backend.wait_for(EventType.EXIT, "c", "init", timeout=30)
    events = backend.events("c")
    assert [each.event for each in events] == [EventType.CREATE, EventType.START, EventType.EXIT]
    # Before it is started, a restored process is none.
    assert [each.info.pid for each in events] == [0, pid, pid]
    assert exited.info.exit_code == 137


@WITH_CRIU
def test_without_exit_the_process_goes_on_and_can_be_saved_again(
    client: Client, services: Services, backend: RecordingBackend, tmp_path: Path
) -> None:
    first = counting(client, services)
    client.create_checkpoint("c", tmp_path / "three")
    assert client.status("c") is Status.RUNNING
    count_on(first, 4)
    client.create_checkpoint("c", tmp_path / "four")
    end(client)
    assert exit_of(backend, "c") == 137
    frozen = [EventType.PAUSED, EventType.RESUMED]
    assert [each.event for each in backend.events("c")] == [
        EventType.CREATE,
        EventType.START,
        *frozen,
        *frozen,
        EventType.EXIT,
    ]

    for name, number in (("three", 4), ("four", 5), ("three", 4)):
        restored = Collected()
        client.start("c", str(tmp_path / name), with_stdin=True, attach_stdio=restored)
        count_on(restored, number)
        assert restored.out == b"%d\n" % number
        end(client)


@WITH_CRIU
@pytest.mark.parametrize("leave", [True, False])
def test_a_frozen_container_stays_so(client: Client, services: Services, tmp_path: Path, leave: bool) -> None:
    counting(client, services)
    client.pause("c")

    client.create_checkpoint("c", tmp_path / "saved", exit=not leave)

    if leave:
        assert client.status("c") is Status.PAUSED
        client.resume("c")
        end(client)
    else:
        assert client.wait("c").code == 137
        assert client.delete_task("c").error is None
    restored = Collected()
    client.start("c", tmp_path / "saved", with_stdin=True, attach_stdio=restored)
    assert client.status("c") is Status.RUNNING
    count_on(restored, 4)


@WITH_CRIU
def test_a_restored_process_ends_by_itself(client: Client, services: Services, tmp_path: Path) -> None:
    counting(client, services)
    client.create_checkpoint("c", tmp_path / "saved", exit=True)
    client.delete_task("c")

    client.start("c", tmp_path / "saved", with_stdin=True, attach_stdio=Collected())
    client.close_stdin("c", "init")

    assert client.wait("c").code == 0
    assert client.delete_task("c").code == 0


@WITH_CRIU
def test_one_checkpoint_begins_several_containers(client: Client, services: Services, tmp_path: Path) -> None:
    """Their archives are the same content: whoever is first to be done must not take it from the others."""
    counting(client, services)
    client.create_checkpoint("c", tmp_path / "saved", exit=True)
    client.delete_task("c")
    names = [f"c{number}" for number in range(3)]
    for name in names:
        client.create(name, services.spec(*programs.COUNTING))

    def restore(name: str) -> Collected:
        restored = Collected()
        client.start(name, tmp_path / "saved", with_stdin=True, attach_stdio=restored)
        count_on(restored, 4)
        return restored

    with ThreadPoolExecutor(len(names)) as pool:
        assert [each.out for each in pool.map(restore, names)] == [b"4\n"] * len(names)


@WITH_CRIU
def test_containers_of_one_spec_are_saved_at_once(client: Client, services: Services, tmp_path: Path) -> None:
    """The second one's spec is content already: containerd up to 1.7 stumbles over that."""
    # An empty path of a cgroup is left to runc, which takes the container's id: it must be nobody else's on this machine.
    names = [f"{services.namespace}-{number}" for number in range(3)]
    spec = services.spec(*programs.COUNTING)
    spec["linux"] = {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "mount")], "cgroupsPath": ""}
    for number, name in enumerate(names):
        client.create(name, spec)
        collected = Collected()
        client.start(name, with_stdin=True, attach_stdio=collected)
        collected.wait_for(b"ready\n", timeout=30)
        for count in range(1, number + 1):
            count_on(collected, count)

    with ThreadPoolExecutor(len(names)) as pool:
        for saved in [
            pool.submit(client.create_checkpoint, name, tmp_path / name, exit=True) for name in names
        ]:
            saved.result()

    for number, name in enumerate(names):
        client.delete_task(name)
        restored = Collected()
        client.start(name, tmp_path / name, with_stdin=True, attach_stdio=restored)
        count_on(restored, number + 1)


@WITH_CRIU
def test_what_another_hand_has_saved_is_neither_in_the_way_nor_removed(
    client: Client, services: Services, tmp_path: Path
) -> None:
    collected = counting(client, services)
    options = typeurl.pack(CheckpointOptions())
    request = tasks_pb2.CheckpointTaskRequest(container_id="c", options=options)
    services.call(services.leases.Create, leases_pb2.CreateRequest(id="theirs"))
    answer = services.tasks.Checkpoint(
        request, metadata=(*services.metadata, ("containerd-lease", "theirs")), timeout=50
    )
    theirs = sorted(each.digest for each in answer.descriptors)
    assert sorted(left_in_containerd(services)) == sorted([*theirs, "theirs"])

    client.create_checkpoint("c", tmp_path / "saved")

    count_on(collected, 4)
    assert sorted(left_in_containerd(services)) == sorted([*theirs, "theirs"])
    assert (tmp_path / "saved/inventory.img").is_file()
    services.call(services.leases.Delete, leases_pb2.DeleteRequest(id="theirs", sync=True))
    assert answer.descriptors[0].media_type == CRIU_TYPE


@WITH_CRIU
def test_a_directory_that_is_there_is_filled_and_its_files_are_their_owners(
    client: Client, services: Services, tmp_path: Path
) -> None:
    counting(client, services)
    (tmp_path / "there").mkdir(mode=0o755)

    client.create_checkpoint("c", tmp_path / "there")
    client.create_checkpoint("c", tmp_path / "new")

    assert (tmp_path / "there").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    for directory in ("there", "new"):
        modes = {each.stat().st_mode & 0o777 for each in (tmp_path / directory).iterdir()}
        assert modes == {0o600}


@WITH_CRIU
def test_a_directory_that_cannot_be_used_is_refused_before_anything_happens(
    client: Client, services: Services, backend: RecordingBackend, tmp_path: Path
) -> None:
    counting(client, services)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()

    for directory in ("full", "full/file", "none/at all", "full/file/below", "nul\0"):
        with pytest.raises(InvalidParameterError, match="checkpoint container 'c': checkpoint_dir"):
            client.create_checkpoint("c", tmp_path / directory, exit=True)

    assert os.listdir(tmp_path / "full") == ["file"]
    assert client.status("c") is Status.RUNNING
    end(client)
    assert exit_of(backend, "c") == 137
    # Nothing was frozen: that would have come before the exit.
    assert [each.event for each in backend.events("c")] == [EventType.CREATE, EventType.START, EventType.EXIT]


@WITH_CRIU
def test_the_state_must_allow_it(client: Client, services: Services, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    with pytest.raises(NotFoundError, match="no such container"):
        client.create_checkpoint("c", saved)
    client.create("c", services.spec(*programs.TRUE))
    with pytest.raises(NotFoundError, match="container is not running"):
        client.create_checkpoint("c", saved)
    client.start("c")
    client.wait("c")
    with pytest.raises(FailedPreconditionError, match="cannot checkpoint container 'c'"):
        client.create_checkpoint("c", saved)
    assert not saved.exists()


@WITH_CRIU
def test_a_directory_that_holds_no_checkpoint_starts_nothing(
    client: Client, services: Services, backend: RecordingBackend, tmp_path: Path
) -> None:
    client.create("c", services.spec(*programs.COUNTING))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/inventory.img").symlink_to("/etc/passwd")

    for directory in ("none", "empty", "file", "linked"):
        with pytest.raises(InvalidParameterError, match="start container 'c': checkpoint_dir"):
            client.start("c", tmp_path / directory)

    assert services.process("c") is None
    assert backend.events("c") == []
    client.delete("c")


@WITH_CRIU
def test_a_checkpoint_that_criu_cannot_use_leaves_nothing(
    client: Client, services: Services, tmp_path: Path
) -> None:
    counting(client, services)
    client.create_checkpoint("c", tmp_path / "saved", exit=True)
    client.delete_task("c")
    (tmp_path / "saved/descriptors.json").unlink()
    attached = Collected()

    with pytest.raises(
        SystemFailureError, match=r"start container 'c': OCI runtime restore failed.*descriptors.json"
    ):
        client.start("c", tmp_path / "saved", with_stdin=True, attach_stdio=attached)

    assert services.process("c") is None
    attached.wait()
    with pytest.raises(NotFoundError, match="container is not running"):
        client.status("c")
    fresh = Collected()
    client.start("c", with_stdin=True, attach_stdio=fresh)
    fresh.wait_for(b"ready\n", timeout=30)
    count_on(fresh, 1)


@WITH_CRIU
def test_execs_are_no_part_of_a_checkpoint(client: Client, services: Services, tmp_path: Path) -> None:
    collected = counting(client, services)
    client.exec("c", "e", {"args": list(programs.SLEEP), "cwd": "/", "env": ["PATH=/bin:/usr/bin"]})

    client.create_checkpoint("c", tmp_path / "saved")

    count_on(collected, 4)
    assert sorted(each.process_id for each in client.summary("c")) == ["e", "init"]
    end(client)
    restored = Collected()
    client.start("c", tmp_path / "saved", with_stdin=True, attach_stdio=restored)
    count_on(restored, 4)
    assert [each.process_id for each in client.summary("c")] == ["init"]


@WITHOUT_CRIU
def test_without_criu_the_reason_is_told_and_the_process_goes_on(
    client: Client, services: Services, backend: RecordingBackend, tmp_path: Path
) -> None:
    client.create("c", services.spec())
    client.start("c")

    with pytest.raises(
        SystemFailureError, match=r"checkpoint container 'c': .*CRIU version check failed.*not found"
    ):
        client.create_checkpoint("c", tmp_path / "saved", exit=True)

    assert not (tmp_path / "saved").exists()
    assert client.status("c") is Status.RUNNING
    assert left_in_containerd(services) == []
    backend.wait_for(EventType.RESUMED, "c", timeout=60)
