"""What `make fuzz` feeds with bytes: each function reads what comes from outside, and checks what comes of it.

A target returns nothing, and raises where the library has let something through: an exception that is not one of those that
it promises, a value that makes no sense, or a memory that grows.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError, Message

from libcontainerd import _archive as archive
from libcontainerd import oci
from libcontainerd._events import catchup
from libcontainerd._events.decode import MalformedEvent, decode
from libcontainerd._records import Container, Process, Step
from libcontainerd._runtime import mapped_root, read_facts, with_own_cgroup
from libcontainerd._wire import typeurl
from libcontainerd._wire.identifiers import MAX_LENGTH, is_identifier
from libcontainerd._wire.pb.runc.options_pb2 import Options, ProcessDetails
from libcontainerd._wire.pb.services.containers_pb2 import Container as ContainerMessage
from libcontainerd._wire.pb.types.event_pb2 import Envelope
from libcontainerd._wire.pb.types.metrics_pb2 import Metric
from libcontainerd._wire.pb.types.task_pb2 import Process as ProcessMessage
from libcontainerd._wire.pb.types.task_pb2 import ProcessInfo
from libcontainerd._wire.pb.wellknown_pb2 import Any
from libcontainerd.errors import InvalidParameterError, SystemFailureError
from libcontainerd.stats import read_stats
from libcontainerd.types import EventType, Status

_MOST_REMEMBERED: Final = 1024
_JSON_URLS: Final = (typeurl.SPEC_URL, typeurl.PROCESS_URL, typeurl.LINUX_RESOURCES_URL)


def _pieces(data: bytes) -> Iterator[bytes]:
    """Cut data into pieces, each behind one byte that says how long it is."""
    while data:
        length = data[0]
        yield data[1 : 1 + length]
        data = data[1 + length :]


def events(data: bytes) -> None:
    """Envelopes of a stream, one after the other, on a container that runs with an exec."""
    container = Container("c")
    init = container.reserve_task()
    exec_ = _run(container, init, 1)
    told: Counter[tuple[str, int]] = Counter()
    for piece in _pieces(data):
        try:
            event = decode(Envelope.FromString(piece))
        except (DecodeError, MalformedEvent):
            continue
        if event is None:
            continue
        assert len(event.info.container_id) <= MAX_LENGTH
        assert len(event.info.process_id) <= MAX_LENGTH
        info = container.apply(event.type, event.info)
        if info is not None and event.type is EventType.EXIT:
            told[info.process_id, info.pid] += 1
    assert not told or max(told.values()) == 1, f"an exit was told twice: {told}"
    assert len(container.runs()) <= _MOST_REMEMBERED
    assert (init.exit is None) == (not init.reported)
    assert (exec_.exit is None) == (not exec_.reported)


def _run(container: Container, init: Process, pid: int) -> Process:
    for step in (Step.CREATE, Step.START):
        container.advance(init, step, pid)
    container.made(init)
    exec_ = container.reserve_exec("e")
    for step in (Step.CREATE, Step.START):
        container.advance(exec_, step, pid + 1)
    container.made(exec_)
    return exec_


def type_urls(data: bytes) -> None:
    """An Any with any name and any bytes."""
    try:
        packed = Any.FromString(data)
    except DecodeError:
        return
    typeurl.name_of(packed)
    for kind in (Options, ProcessDetails):
        with suppress(typeurl.DecodeError):
            assert isinstance(typeurl.unpack(packed, kind), kind)
    for url in _JSON_URLS:
        with suppress(typeurl.DecodeError):
            assert isinstance(typeurl.unpack_json(packed, url), dict)


def specs(data: bytes) -> None:
    """A document of the runtime-spec, from its text to what containerd is sent."""
    with suppress(InvalidParameterError):
        spec = oci.parse_spec(data)
        uid, gid = mapped_root(spec)
        assert 0 <= uid < 1 << 32
        assert 0 <= gid < 1 << 32
        written = oci.dump(with_own_cgroup(spec, "n", "c", None))
        assert oci.dump(oci.parse_spec(written)) == written
    for parse in (oci.parse_process, oci.parse_resources, oci.parse_state, oci.parse_features):
        with suppress(InvalidParameterError):
            oci.dump(parse(data))


def answers(data: bytes) -> None:
    """What containerd answers, read as each of the messages that the library looks into."""
    for kind, read in _ANSWERS.items():
        try:
            message = kind.FromString(data)
        except DecodeError:
            continue
        with suppress(SystemFailureError):
            read(message)


def _read_process(message: Message) -> None:
    assert isinstance(message, ProcessMessage)
    assert isinstance(catchup.status_of(message), Status)
    status = catchup.exit_status(message.exit_status, message.exited_at)
    assert status.exited_at.tzinfo is not None
    catchup.is_another(message, 1)


def _read_name(message: Message) -> None:
    assert isinstance(message, ProcessInfo)
    is_identifier(catchup.process_name(message, 1))


def _read_metric(message: Message) -> None:
    assert isinstance(message, Metric)
    stats = read_stats(message)
    assert stats.read_at.tzinfo is not None
    assert stats.usage is not None


def _read_container(message: Message) -> None:
    assert isinstance(message, ContainerMessage)
    uid, gid = read_facts(message).owner
    assert 0 <= uid < 1 << 32
    assert 0 <= gid < 1 << 32


_ANSWERS: Final[dict[type[Message], Callable[[Message], None]]] = {
    ProcessMessage: _read_process,
    ProcessInfo: _read_name,
    Metric: _read_metric,
    ContainerMessage: _read_container,
}


def archives(data: bytes) -> None:
    """A checkpoint's archive, unpacked beside something that must stay as it is."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        beside, place = Path(directory, "beside"), Path(directory, "place")
        beside.write_bytes(b"as it was")
        place.mkdir()
        with suppress(archive.ArchiveError, OSError):
            archive.unpack(io.BytesIO(data), str(place), len(data))
        assert beside.read_bytes() == b"as it was"
        assert sorted(os.listdir(directory)) == ["beside", "place"]
        found = list(place.rglob("*"))
        assert not any(each.is_symlink() for each in found)
        assert sum(each.stat().st_size for each in found if each.is_file()) <= len(data)
        assert len(found) <= len(data) // 16


def _archive_seeds() -> list[bytes]:
    found = []
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        written = io.BytesIO()
        with tarfile.open(fileobj=written, mode="w", format=form) as tar:
            for name, kind in (
                ("a", tarfile.REGTYPE),
                ("d", tarfile.DIRTYPE),
                ("d/" + "é" * 60, tarfile.REGTYPE),
                ("l", tarfile.SYMTYPE),
            ):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, "../beside"
                member.size = 5 if kind == tarfile.REGTYPE else 0
                tar.addfile(member, io.BytesIO(b"image"))
        found.append(written.getvalue()[: -tarfile.BLOCKSIZE * 8])
    return found


def _event_seed() -> bytes:
    from libcontainerd._wire.pb.events import task_pb2

    seed = b""
    for message in (
        task_pb2.TaskExit(container_id="c", id="e", pid=2, exit_status=3),
        task_pb2.TaskPaused(container_id="c"),
        task_pb2.TaskExit(container_id="c", id="c", pid=1, exit_status=137),
    ):
        envelope = Envelope(namespace="n", topic="/tasks/x", event=typeurl.pack(message))
        piece = envelope.SerializeToString()
        seed += bytes([len(piece)]) + piece
    return seed


def seeds(name: str) -> list[bytes]:
    """What a target's input looks like where nobody has been at it."""
    spec = oci.dump(oci.default_spec())
    packed = typeurl.pack_json(typeurl.SPEC_URL, spec)
    details = typeurl.pack(ProcessDetails(exec_id="e"))
    return {
        "events": [_event_seed()],
        "type_urls": [packed.SerializeToString(), details.SerializeToString()],
        "archives": _archive_seeds(),
        "specs": [spec, oci.dump(oci.Process(args=["a"], cwd="/"))],
        "answers": [
            ContainerMessage(id="c", spec=packed).SerializeToString(),
            ProcessInfo(pid=2, info=details).SerializeToString(),
            ProcessMessage(id="c", pid=1, exit_status=3).SerializeToString(),
        ],
    }[name]


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "events": events,
    "type_urls": type_urls,
    "specs": specs,
    "answers": answers,
    "archives": archives,
}
