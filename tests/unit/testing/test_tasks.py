"""The corners of the tasks service: checkpoints, documents that are none, processes that race their own end."""

from __future__ import annotations

import io
import json
import os
import tarfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import pytest

from libcontainerd._wire import typeurl
from libcontainerd._wire.pb.runc.options_pb2 import CheckpointOptions
from libcontainerd._wire.pb.services import containers_pb2, content_pb2, snapshots_pb2, tasks_pb2
from libcontainerd._wire.pb.types.descriptor_pb2 import Descriptor
from libcontainerd._wire.pb.types.mount_pb2 import Mount
from libcontainerd._wire.pb.wellknown_pb2 import Any
from libcontainerd.testing import FakeContainerd, prints
from libcontainerd.testing.shim import Task
from libcontainerd.testing.tasks import Tasks
from tests.unit.beside import DEADLINE
from tests.unit.testing.specs import METADATA, process, spec

CRIU = "application/vnd.containerd.container.criu.checkpoint.criu.tar"


class Calls:
    """Plain calls of the tasks service, and containers to call it for."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.tasks = tasks_pb2.TasksStub(channel)
        self.containers = containers_pb2.ContainersStub(channel)
        self.content = content_pb2.ContentStub(channel)
        self.snapshots = snapshots_pb2.SnapshotsStub(channel)

    def make(self, name: str, *, document: object = None, runtime: str = "io.containerd.runc.v2") -> None:
        text = document if isinstance(document, bytes) else json.dumps(document or spec()).encode()
        container = containers_pb2.Container(
            id=name,
            runtime=containers_pb2.Container.Runtime(name=runtime),
            spec=typeurl.pack_json(typeurl.SPEC_URL, text),
        )
        self.containers.Create(
            containers_pb2.CreateContainerRequest(container=container), metadata=METADATA, timeout=5
        )

    def create(self, name: str, **fields: object) -> int:
        request = tasks_pb2.CreateTaskRequest(container_id=name, **fields)  # type: ignore[arg-type]  # fields that exist
        return self.tasks.Create(request, metadata=METADATA, timeout=20).pid

    def start(self, name: str, exec_id: str = "") -> int:
        request = tasks_pb2.StartRequest(container_id=name, exec_id=exec_id)
        return self.tasks.Start(request, metadata=METADATA, timeout=20).pid

    def wait(self, name: str, exec_id: str = "") -> int:
        request = tasks_pb2.WaitRequest(container_id=name, exec_id=exec_id)
        return self.tasks.Wait(request, metadata=METADATA, timeout=20).exit_status

    def checkpoint(self, name: str, options: CheckpointOptions | None = None) -> list[Descriptor]:
        request = tasks_pb2.CheckpointTaskRequest(
            container_id=name, options=None if options is None else typeurl.pack(options)
        )
        return list(self.tasks.Checkpoint(request, metadata=METADATA, timeout=20).descriptors)

    def read(self, digest: str) -> bytes:
        answers = self.content.Read(
            content_pb2.ReadContentRequest(digest=digest), metadata=METADATA, timeout=5
        )
        return b"".join(answer.data for answer in answers)


@pytest.fixture
def calls(channel: grpc.Channel) -> Calls:
    return Calls(channel)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return f"{caught.value.code().name}: {caught.value.details()}"


def test_a_checkpoint_and_what_is_made_of_it(fake: FakeContainerd, calls: Calls) -> None:
    calls.make("c")
    calls.create("c")
    first = calls.start("c")

    image, config = calls.checkpoint("c", CheckpointOptions(exit=True))

    assert calls.wait("c") == 137
    assert (image.media_type, config.media_type) == (
        CRIU,
        "application/vnd.containerd.container.checkpoint.config.v1+proto",
    )
    assert len(calls.read(image.digest)) == image.size
    with tarfile.open(fileobj=io.BytesIO(calls.read(image.digest))) as tar:
        assert tar.getnames() == ["descriptors.json", "inventory.img", "pages-1.img"]
    assert Any.FromString(calls.read(config.digest)).type_url == typeurl.SPEC_URL
    calls.tasks.Delete(tasks_pb2.DeleteTaskRequest(container_id="c"), metadata=METADATA, timeout=20)
    fake.script(prints(exit_code=4))
    assert calls.create("c", checkpoint=image) == 0
    second = calls.start("c")
    assert second not in (0, first)
    assert calls.wait("c") == 4
    checkpoints = [
        json.loads(json.dumps(envelope.topic))
        for envelope in fake.published()
        if envelope.topic == "/tasks/create"
    ]
    assert len(checkpoints) == 2


def test_a_checkpoint_goes_on_and_into_a_directory(calls: Calls, tmp_path: Path) -> None:
    calls.make("c")
    calls.create("c")
    calls.start("c")

    assert calls.checkpoint("c", CheckpointOptions(image_path=str(tmp_path))) == []
    assert len(calls.checkpoint("c")) == 2

    assert sorted(os.listdir(tmp_path)) == ["descriptors.json", "inventory.img", "pages-1.img"]
    assert (
        calls.tasks.Get(tasks_pb2.GetRequest(container_id="c"), metadata=METADATA, timeout=20).process.status
        == 2
    )


def test_checkpoints_that_are_none(calls: Calls) -> None:
    calls.make("c")
    data = b"no tar"
    request = content_pb2.WriteContentRequest
    answers = list(
        calls.content.Write(
            iter(
                [
                    request(action=content_pb2.WriteAction.WRITE, ref="r", data=data),
                    request(action=content_pb2.WriteAction.COMMIT, offset=len(data)),
                ]
            ),
            metadata=METADATA,
            timeout=20,
        )
    )
    digest = answers[-1].digest

    for descriptor, reason in (
        (Descriptor(media_type="text/plain", digest=digest), 'unsupported checkpoint type "text/plain"'),
        (Descriptor(media_type=CRIU, digest=digest), "failed to unpack checkpoint"),
        (Descriptor(media_type=CRIU, digest="sha256:" + "0" * 64), "NOT_FOUND: content digest"),
    ):
        assert reason in refused(partial(calls.create, "c", checkpoint=descriptor))
    calls.create("c")
    assert "cannot checkpoint a task in created state" in refused(lambda: calls.checkpoint("c"))


def test_documents_that_are_none(calls: Calls) -> None:
    calls.make("cut", document=b"{")
    calls.make("list", document=b"[]")
    calls.make("empty", document=b"{}")
    calls.make("c")
    calls.create("c")

    assert "failed to create shim task: unexpected end of JSON input" in refused(lambda: calls.create("cut"))
    assert "cannot unmarshal" in refused(lambda: calls.create("list"))
    assert "args must not be empty" in refused(lambda: calls.create("empty"))
    update = tasks_pb2.UpdateTaskRequest(container_id="c", resources=Any(type_url="x", value=b"{"))
    assert "unexpected end of JSON input" in refused(
        lambda: calls.tasks.Update(update, metadata=METADATA, timeout=20)
    )
    nothing = tasks_pb2.ExecProcessRequest(container_id="c", exec_id="e")
    assert "ttrpc: closed" in refused(lambda: calls.tasks.Exec(nothing, metadata=METADATA, timeout=20))


def test_shims_by_name_and_by_path(calls: Calls, tmp_path: Path) -> None:
    shim = tmp_path / "shim"
    shim.touch()
    calls.make("path", runtime=str(shim))
    calls.make("odd", runtime="odd")

    assert calls.create("path") > 0
    assert "invalid runtime name odd" in refused(lambda: calls.create("odd"))


def test_the_root_of_a_container_may_be_a_snapshot(host: FakeContainerd, tmp_path: Path) -> None:
    program = tmp_path / "only-here"
    program.write_text("#!/bin/sh\nexit 11\n")
    program.chmod(0o755)
    with grpc.insecure_channel(
        f"unix:{host.address}", options=(("grpc.default_authority", "localhost"),)
    ) as channel:
        calls = Calls(channel)
        calls.make("c", document=spec("/only-here", root="rootfs"))
        calls.create("c", rootfs=[Mount(type="bind", source=str(tmp_path), options=["rbind"])])
        calls.start("c")

        assert calls.wait("c") == 11


def test_a_start_that_was_refused_can_be_waited_for(calls: Calls, fake: FakeContainerd) -> None:
    calls.make("c")
    calls.create("c")
    calls.start("c")
    request = tasks_pb2.ExecProcessRequest(
        container_id="c",
        exec_id="e",
        spec=typeurl.pack_json(typeurl.PROCESS_URL, json.dumps({**process(), "args": []}).encode()),
    )
    calls.tasks.Exec(request, metadata=METADATA, timeout=20)

    assert "OCI runtime exec failed" in refused(lambda: calls.start("c", "e"))
    assert "cannot start" in refused(lambda: calls.start("c", "e"))
    assert calls.wait("c", "e") == 0


def test_init_deleted_as_if_it_were_an_exec(calls: Calls, fake: FakeContainerd) -> None:
    fake.script(prints(exit_code=2))
    calls.make("c")
    calls.create("c")
    calls.start("c")
    calls.wait("c")

    answer = calls.tasks.DeleteProcess(
        tasks_pb2.DeleteProcessRequest(container_id="c"), metadata=METADATA, timeout=5
    )

    assert answer.exit_status == 2


def after_the_wake(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Have a task's step taken when a server that goes down has woken those who wait."""
    woken = threading.Event()
    wake, take = Tasks.wake, getattr(Task, step)

    def woke(tasks: Tasks) -> None:
        wake(tasks)
        woken.set()

    def late(task: Task, *args: object, **fields: object) -> object:
        assert woken.wait(DEADLINE)
        return take(task, *args, **fields)

    monkeypatch.setattr(Tasks, "wake", woke)
    monkeypatch.setattr(Task, step, late)


def test_nobody_reads(calls: Calls, tmp_path: Path) -> None:
    with (
        FakeContainerd(stdio_timeout=0.05) as fake,
        grpc.insecure_channel(
            f"unix:{fake.address}", options=(("grpc.default_authority", "localhost"),)
        ) as channel,
    ):
        calls = Calls(channel)
        out, err = str(tmp_path / "out"), str(tmp_path / "err")
        os.mkfifo(out)
        os.mkfifo(err)
        calls.make("c")

        told = refused(lambda: calls.create("c", stdout=out, stderr=err))

        assert told.startswith("DEADLINE_EXCEEDED: failed to create shim task: failed to start io pipe copy")
        assert f'opening w/o fifo "{out}" failed: context deadline exceeded' in told
        assert "NOT_FOUND" in refused(
            lambda: calls.tasks.Get(tasks_pb2.GetRequest(container_id="c"), metadata=METADATA, timeout=20)
        )


@pytest.mark.parametrize("late", [False, True], ids=["", "who has only just called"])
@pytest.mark.parametrize("exec_id", ["", "e"])
def test_who_waits_for_a_reader_does_not_hold_the_end_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exec_id: str, late: bool
) -> None:
    out, err = str(tmp_path / "out"), str(tmp_path / "err")
    os.mkfifo(out)
    os.mkfifo(err)
    with (
        FakeContainerd() as fake,
        grpc.insecure_channel(
            f"unix:{fake.address}", options=(("grpc.default_authority", "localhost"),)
        ) as channel,
        ThreadPoolExecutor(1) as pool,
    ):
        calls = Calls(channel)
        calls.make("c")
        if exec_id:
            calls.create("c")
            calls.start("c")
            document = json.dumps(process()).encode()
            request = tasks_pb2.ExecProcessRequest(
                container_id="c",
                exec_id=exec_id,
                stdout=out,
                stderr=err,
                spec=typeurl.pack_json(typeurl.PROCESS_URL, document),
            )
            calls.tasks.Exec(request, metadata=METADATA, timeout=20)
            if late:
                after_the_wake(monkeypatch, "start")
            waiting = pool.submit(calls.start, "c", exec_id)
            fake.calls.wait_for("Tasks/Start", 2)
            if not late:
                fake.process("c", exec_id)
        else:
            if late:
                after_the_wake(monkeypatch, "__init__")
            waiting = pool.submit(calls.create, "c", stdout=out, stderr=err)
            fake.calls.wait_for("Tasks/Create")
        begin = time.monotonic()

        fake.stop()

        assert time.monotonic() - begin < 9
        assert isinstance(waiting.exception(10), grpc.RpcError)


def test_a_snapshots_directory_goes_with_it(calls: Calls) -> None:
    made = calls.snapshots.Prepare(
        snapshots_pb2.PrepareSnapshotRequest(snapshotter="overlayfs", key="k"), metadata=METADATA, timeout=5
    )
    directory = Path(made.mounts[0].source)
    assert directory.is_dir()

    calls.snapshots.Remove(
        snapshots_pb2.RemoveSnapshotRequest(snapshotter="overlayfs", key="k"), metadata=METADATA, timeout=5
    )

    assert not directory.exists()
    assert "bucket name required" in refused(
        lambda: calls.snapshots.Prepare(
            snapshots_pb2.PrepareSnapshotRequest(snapshotter="native"), metadata=METADATA, timeout=5
        )
    )


def test_a_container_may_be_given_another_spec_and_extensions(calls: Calls) -> None:
    from libcontainerd._wire.pb.wellknown_pb2 import FieldMask

    calls.make("c")
    extension = Any(type_url="x", value=b"1")
    update = containers_pb2.UpdateContainerRequest

    def change(*paths: str, **fields: object) -> containers_pb2.Container:
        request = update(
            container=containers_pb2.Container(id="c", **fields),  # type: ignore[arg-type]  # fields that exist
            update_mask=FieldMask(paths=paths),
        )
        return calls.containers.Update(request, metadata=METADATA, timeout=20).container

    assert change("extensions.e", extensions={"e": extension}).extensions["e"] == extension
    assert change("spec", spec=extension).spec == extension
    assert "container.Spec must be set" in refused(lambda: change("spec"))
    assert "Snapshotter must be set" in refused(lambda: change("snapshotkey", snapshot_key="k"))
    whole = containers_pb2.Container(
        id="c", runtime=containers_pb2.Container.Runtime(name="io.containerd.runc.v2"), spec=extension
    )
    answer = calls.containers.Update(update(container=whole), metadata=METADATA, timeout=20)
    assert not answer.container.extensions
    assert "Snapshotter field is immutable" in refused(
        lambda: calls.containers.Update(
            update(container=containers_pb2.Container(id="c", snapshotter="s")), metadata=METADATA, timeout=5
        )
    )
    labelled = containers_pb2.Container(id="d", runtime=whole.runtime, spec=extension, labels={"": "x"})
    assert 'failed to set label ""="x": key required' in refused(
        lambda: calls.containers.Create(
            containers_pb2.CreateContainerRequest(container=labelled), metadata=METADATA, timeout=5
        )
    )


def test_the_service_names_each_method_it_serves() -> None:
    assert all(hasattr(Tasks, method.name) for method in tasks_pb2.TasksStub.service.methods)
