"""Checkpoints where something goes wrong: what is told, and that nothing is left, in containerd or on disk."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from structlog.testing import capture_logs

from libcontainerd import Client, Status, cio
from libcontainerd import _archive as archive
from libcontainerd import _checkpoint as checkpoint
from libcontainerd._wire.connection import NAMESPACE_HEADER, Connection, Deadline
from libcontainerd._wire.pb.services import content_pb2, leases_pb2, tasks_pb2
from libcontainerd._wire.shelter import Lease
from libcontainerd.errors import (
    CallCancelledError,
    ConflictError,
    DeadlineExceededError,
    InvalidParameterError,
    LibcontainerdError,
    PermissionDeniedError,
    SystemFailureError,
    UnavailableError,
)
from libcontainerd.testing import FakeContainerd
from libcontainerd.testing import tasks as fake_tasks
from tests.leaks import no_leaks
from tests.unit.beside import DEADLINE, Beside
from tests.unit.test_client import SPEC

UNAVAILABLE, UNKNOWN, ALREADY_EXISTS = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.ALREADY_EXISTS,
)
METADATA = ((NAMESPACE_HEADER, "unit"),)


@pytest.fixture
def fake() -> Iterator[FakeContainerd]:
    with FakeContainerd() as server:
        yield server


@pytest.fixture
def client(fake: FakeContainerd, tmp_path: Path) -> Iterator[Client]:
    with Client(
        fake.address, namespace="unit", state_dir=tmp_path / "state", default_timeout=DEADLINE
    ) as made:
        made.create("web", SPEC)
        made.start("web")
        yield made


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Where a checkpoint is to go, or has gone."""
    return tmp_path / "saved"


def left_in(fake: FakeContainerd) -> list[str]:
    """What content, ingests and leases there are."""
    with grpc.insecure_channel(
        f"unix:{fake.address}", options=(("grpc.default_authority", "localhost"),)
    ) as channel:
        content, leases = content_pb2.ContentStub(channel), leases_pb2.LeasesStub(channel)
        answers = content.List(content_pb2.ListContentRequest(), metadata=METADATA, timeout=DEADLINE)
        blobs = [info.digest for answer in answers for info in answer.info]
        ingests = content.ListStatuses(content_pb2.ListStatusesRequest(), metadata=METADATA, timeout=DEADLINE)
        held = leases.List(leases_pb2.ListRequest(), metadata=METADATA, timeout=DEADLINE)
        return [
            *blobs,
            *(each.ref for each in ingests.statuses),
            *(each.id for each in held.leases),
        ]


def tar_of(name: str, data: bytes = b"data") -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as tar:
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
    return written.getvalue()


def refused(
    fake: FakeContainerd, client: Client, saved: Path, kind: type[LibcontainerdError], said: str
) -> None:
    """A checkpoint fails; the process goes on, and nothing is left."""
    there = saved.exists()
    with pytest.raises(kind, match=said):
        client.create_checkpoint("web", saved)
    assert saved.exists() == there
    assert not there or os.listdir(saved) == []
    assert left_in(fake) == []
    assert client.status("web") is Status.RUNNING


# --------------------------------------------------------------------------------------------------- out of containerd


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(
    "method", ["Leases/Create", "Containers/Get", "Tasks/Pause", "Tasks/Checkpoint", "Content/Read"]
)
def test_whatever_call_fails_nothing_is_left(
    fake: FakeContainerd, client: Client, saved: Path, method: str, there: bool
) -> None:
    if there:
        saved.mkdir()
    fake.fail(method, UNAVAILABLE, "going down")
    refused(fake, client, saved, UnavailableError, "cannot checkpoint container 'web': going down")
    client.create_checkpoint("web", saved)
    assert (saved / "inventory.img").is_file()


@pytest.mark.parametrize("method", ["Leases/Create", "Tasks/Pause", "Tasks/Checkpoint"])
def test_an_answer_that_gets_lost_is_undone(
    fake: FakeContainerd, client: Client, saved: Path, method: str
) -> None:
    fake.fail(method, UNAVAILABLE, "lost", after=True)

    refused(fake, client, saved, UnavailableError, "lost")


def test_a_checkpoint_without_criu_s_part_is_an_error(
    fake: FakeContainerd, client: Client, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original took it for a success."""
    monkeypatch.setattr(fake_tasks, "_CHECKPOINT_TYPE", "application/octet-stream")

    refused(fake, client, saved, SystemFailureError, "'web': containerd has made no archive of it")


@pytest.mark.parametrize(
    "case",
    [
        (tar_of("../escaped"), "would leave its directory"),
        (tar_of("/escaped"), "would leave its directory"),
        (tar_of("core-1.img"), "holds no checkpoint of criu's"),
        (tar_of("inventory.img", b"x" * 5000)[:2048], "larger than the archive"),
        (b"no archive", "malformed"),
    ],
)
def test_an_archive_is_not_trusted(
    fake: FakeContainerd,
    client: Client,
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[bytes, str],
) -> None:
    data, said = case
    monkeypatch.setattr(fake_tasks, "_archive", lambda _files: data)

    refused(fake, client, saved, SystemFailureError, f"cannot checkpoint container 'web': .*({said})")
    assert not (saved.parent / "escaped").exists()


def test_an_archive_that_comes_short_is_an_error(
    fake: FakeContainerd, client: Client, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather = Connection.gather

    def short(self: Connection, method: object, request: object, **rest: object) -> object:
        answers = gather(self, method, request, **rest)  # type: ignore[arg-type,var-annotated]  # as it was called
        if isinstance(request, content_pb2.ReadContentRequest):
            answers[-1].data = answers[-1].data[:-1]
        return answers

    monkeypatch.setattr(Connection, "gather", short)

    refused(fake, client, saved, SystemFailureError, "containerd sent 10239 bytes of 10240 of its archive")


def test_an_archive_is_read_in_ranges(
    fake: FakeContainerd, client: Client, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_READ_BYTES", 3000)

    client.create_checkpoint("web", saved)

    requests = [call.request for call in fake.calls.all("Content/Read")]
    ranges = [
        (each.offset, each.size) for each in requests if isinstance(each, content_pb2.ReadContentRequest)
    ]
    assert ranges == [(0, 3000), (3000, 3000)]  # what follows is the archive's padding
    assert sorted(os.listdir(saved)) == ["descriptors.json", "inventory.img", "pages-1.img"]


@pytest.mark.parametrize(
    "case",
    [
        (OSError(errno.ENOSPC, "No space left on device"), SystemFailureError),
        (PermissionError(errno.EACCES, "Permission denied"), PermissionDeniedError),
    ],
)
def test_a_disk_that_refuses_is_told(
    fake: FakeContainerd,
    client: Client,
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[OSError, type[LibcontainerdError]],
) -> None:
    error, kind = case
    write = archive._write
    written = False

    def fill(*arguments: object) -> None:
        nonlocal written
        if written:
            raise error
        write(*arguments)  # type: ignore[arg-type]  # as it was called
        written = True

    monkeypatch.setattr(archive, "_write", fill)

    refused(fake, client, saved, kind, f"cannot checkpoint container 'web': .*{error.strerror}")


def test_what_was_unpacked_below_is_removed_too(
    fake: FakeContainerd, client: Client, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tar_of("a/b/c")
    monkeypatch.setattr(fake_tasks, "_archive", lambda _files: data)
    saved.mkdir()

    refused(fake, client, saved, SystemFailureError, "holds no checkpoint")


def test_a_lease_that_cannot_be_given_up_is_logged_and_expires(
    fake: FakeContainerd, client: Client, saved: Path
) -> None:
    fake.fail("Leases/Delete", UNKNOWN, "broken")
    before = datetime.now(UTC)

    with capture_logs() as logs:
        client.create_checkpoint("web", saved)

    assert (saved / "inventory.img").is_file()
    (failure,) = [each for each in logs if each["event"] == "clean_up_failed"]
    (call,) = fake.calls.all("Leases/Create")
    assert isinstance(call.request, leases_pb2.CreateRequest)
    assert failure["lease"] == call.request.id
    expires = datetime.fromisoformat(call.request.labels["containerd.io/gc.expire"])
    assert before + timedelta(hours=23) < expires < before + timedelta(hours=25)


def test_content_that_is_there_and_nothing_under_the_lease_is_an_error(
    fake: FakeContainerd, client: Client, saved: Path
) -> None:
    digest = f"sha256:{hashlib.sha256(b'spec').hexdigest()}"
    fake.fail("Tasks/Checkpoint", ALREADY_EXISTS, f"content {digest}: already exists")
    refused(fake, client, saved, ConflictError, f"content {digest}: already exists")
    fake.fail("Tasks/Checkpoint", ALREADY_EXISTS, "something: already exists", after=True)
    refused(fake, client, saved, ConflictError, "something: already exists")


@pytest.mark.parametrize(
    ("runtime", "kind"),
    [
        ("io.containerd.runc.v2", "containerd.runc.v1.CheckpointOptions"),
        ("io.containerd.runtime.v1.linux", "containerd.linux.runc.CheckpointOptions"),
    ],
)
def test_each_runtime_gets_its_own_options(
    fake: FakeContainerd, client: Client, saved: Path, runtime: str, kind: str
) -> None:
    client.create("other", SPEC, runtime=runtime)
    client.start("other")

    client.create_checkpoint("other", saved, exit=True)

    (call,) = fake.calls.all("Tasks/Checkpoint")
    assert isinstance(call.request, tasks_pb2.CheckpointTaskRequest)
    assert call.request.options.type_url == kind
    assert client.delete_task("other").code == 137


def test_a_task_that_is_not_started_is_refused_and_not_thawed(
    fake: FakeContainerd, client: Client, saved: Path
) -> None:
    fake.fail("Tasks/Pause", UNKNOWN, "cannot pause task in created state")

    refused(fake, client, saved, LibcontainerdError, "cannot pause task in created state")
    assert fake.calls.all("Tasks/Resume") == []


def test_a_checkpoint_that_takes_too_long_is_undone_when_it_is_over(
    fake: FakeContainerd, client: Client, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung = fake.hang("Tasks/Checkpoint")
    settle = Lease.settle

    def release_and_settle(lease: Lease, deadline: Deadline) -> None:
        hung.release()  # nobody waits for its answer any more
        settle(lease, deadline)

    monkeypatch.setattr(Lease, "settle", release_and_settle)
    with pytest.raises(DeadlineExceededError, match="cannot checkpoint container 'web'"):
        client.create_checkpoint("web", saved, timeout=0.5)

    assert not saved.exists()
    assert left_in(fake) == []
    assert client.status("web") is Status.RUNNING


def test_a_close_in_the_middle_leaves_nothing_frozen(
    fake: FakeContainerd, client: Client, saved: Path
) -> None:
    hung = fake.hang("Tasks/Checkpoint")
    call = Beside(lambda: client.create_checkpoint("web", saved))
    fake.calls.wait_for("Tasks/Checkpoint", timeout=DEADLINE)

    client.close(timeout=1.0)
    hung.release()

    with pytest.raises(CallCancelledError):
        call.answer()
    assert not saved.exists()
    assert left_in(fake) == []
    fake.calls.wait_for("Tasks/Resume", timeout=DEADLINE)


def test_it_leaves_no_thread_and_no_descriptor(tmp_path: Path, saved: Path) -> None:
    with (
        no_leaks(within=DEADLINE),
        FakeContainerd() as fake,
        Client(fake.address, namespace="unit", state_dir=tmp_path / "state") as client,
    ):
        client.create("web", SPEC)
        client.start("web")
        client.create_checkpoint("web", saved, exit=True)
        client.delete_task("web")
        client.start("web", saved)


# ------------------------------------------------------------------------------------------------------- criu's reasons


def failing(log: Path) -> str:
    return f"runc did not terminate successfully: exit status 1: criu failed: type NOTIFY errno 0 path= {log}: unknown"


def test_criu_s_last_complaints_are_told(
    fake: FakeContainerd, client: Client, saved: Path, tmp_path: Path
) -> None:
    log = tmp_path / "criu-dump.log"
    log.write_text(
        "(00.01) Error (far away): forgotten\n"
        + "(00.02) fine\n" * 9000
        + "(00.03) Error (x.c:1): no tables\n\n"
        "(00.04) going down\n(00.05) Error (y.c:2): Dumping FAILED.\n"
    )
    fake.fail("Tasks/Checkpoint", UNKNOWN, failing(log))

    refused(
        fake,
        client,
        saved,
        SystemFailureError,
        r"criu says: \(00.03\) Error \(x.c:1\): no tables; \(00.05\) Error \(y.c:2\): Dumping FAILED.$",
    )


def test_a_log_without_complaints_gives_its_end(
    fake: FakeContainerd, client: Client, saved: Path, tmp_path: Path
) -> None:
    log = tmp_path / "criu-dump.log"
    log.write_bytes(b"one\ntwo\n\n three\xff\nfour\n")
    fake.fail("Tasks/Checkpoint", UNKNOWN, failing(log))

    refused(fake, client, saved, SystemFailureError, "criu says: two; three\ufffd; four$")


def _nothing(_: Path) -> None:
    pass


@pytest.mark.parametrize(
    "make", [_nothing, Path.mkdir, Path.touch, lambda path: path.symlink_to("/dev/zero")]
)
def test_a_log_that_cannot_be_read_adds_nothing(
    fake: FakeContainerd, client: Client, saved: Path, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    log = tmp_path / "criu-dump.log"
    make(log)
    fake.fail("Tasks/Checkpoint", UNKNOWN, failing(log))

    refused(fake, client, saved, SystemFailureError, "criu-dump.log: unknown$")


# ------------------------------------------------------------------------------------------------------ into containerd


@pytest.fixture
def stopped(client: Client, saved: Path) -> Client:
    """A client whose container has been saved and has ended."""
    client.create_checkpoint("web", saved, exit=True)
    client.delete_task("web")
    return client


def not_started(fake: FakeContainerd, client: Client, saved: Path, kind: type[Exception], said: str) -> None:
    """A start from the checkpoint fails; nothing is left, and the next one succeeds."""
    with pytest.raises(kind, match=said):
        client.start("web", saved)
    assert left_in(fake) == []
    fake.clear_faults()
    assert client.start("web", saved) > 0


@pytest.mark.parametrize("method", ["Leases/Create", "Content/Write", "Tasks/Create", "Tasks/Start"])
@pytest.mark.parametrize("after", [True, False])
def test_whatever_call_of_a_restore_fails_nothing_is_left(
    fake: FakeContainerd, stopped: Client, saved: Path, method: str, after: bool
) -> None:
    fake.fail(method, UNAVAILABLE, "going down", after=after)

    not_started(fake, stopped, saved, UnavailableError, "cannot start container 'web': going down")


def test_a_directory_that_breaks_while_it_is_sent(
    fake: FakeContainerd, stopped: Client, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = archive.pack

    def breaks(entries: list[archive.Entry]) -> Iterator[bytes]:
        yield next(iter(pack(entries)))
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(archive, "pack", breaks)
        with pytest.raises(SystemFailureError, match=r"cannot start container 'web': .*Input/output error"):
            stopped.start("web", saved)
    assert left_in(fake) == []
    assert stopped.start("web", saved) > 0


def test_a_directory_that_cannot_be_read(
    stopped: Client, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denies(_directory: str) -> list[archive.Entry]:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(archive, "survey", denies)

    with pytest.raises(PermissionDeniedError, match=r"cannot start container 'web': .*Permission denied"):
        stopped.start("web", saved)


def test_what_is_no_part_of_a_checkpoint_is_refused(
    fake: FakeContainerd, stopped: Client, saved: Path
) -> None:
    (saved / "parent").symlink_to("/etc")

    with pytest.raises(
        InvalidParameterError, match=r"checkpoint_dir: .*parent is neither a file nor a directory"
    ):
        stopped.start("web", saved)
    assert fake.calls.all("Content/Write") == []


def test_the_user_s_callback_is_not_called_before_the_archive_is_there(
    fake: FakeContainerd, stopped: Client, saved: Path
) -> None:
    called = []

    def attach(dio: cio.DirectIO) -> cio.IO:
        called.append(dio)
        raise ValueError("not now")

    fake.fail("Content/Write", UNAVAILABLE, "going down")
    with pytest.raises(UnavailableError):
        stopped.start("web", saved, attach_stdio=attach)
    assert called == []
    with pytest.raises(ValueError, match="not now"):
        stopped.start("web", saved, attach_stdio=attach)
    assert left_in(fake) == []


def test_criu_s_reason_for_a_failed_restore_is_read_before_the_log_goes(
    fake: FakeContainerd, stopped: Client, saved: Path, tmp_path: Path
) -> None:
    log = tmp_path / "work/restore.log"
    log.parent.mkdir()
    log.write_text("(00.1) Error (cr-restore.c:517): Can't open core data for 1\n")
    reason = f"OCI runtime restore failed: criu failed: type NOTIFY errno 0\nlog file: {log}: unknown"
    fake.fail("Tasks/Start", UNKNOWN, reason)

    not_started(fake, stopped, saved, SystemFailureError, "criu says: .*Can't open core data for 1")


def test_a_start_without_a_checkpoint_reads_no_log(
    fake: FakeContainerd, stopped: Client, tmp_path: Path
) -> None:
    log = tmp_path / "restore.log"
    log.write_text("Error: of another time\n")
    fake.fail("Tasks/Start", UNKNOWN, f"OCI runtime start failed: see {log}")

    with pytest.raises(SystemFailureError, match=r"restore\.log$"):
        stopped.start("web")
