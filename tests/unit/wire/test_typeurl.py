"""Any to message and back, under containerd's names; hostile input ends in one error."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
from google.protobuf import any_pb2, timestamp_pb2
from hypothesis import example, given
from hypothesis import strategies as st

from libcontainerd._wire import typeurl
from libcontainerd._wire.pb import wellknown_pb2
from libcontainerd._wire.pb.events import task_pb2 as task_events
from libcontainerd._wire.pb.runc import options_pb2
from libcontainerd._wire.pb.services import containers_pb2

URLS = (typeurl.SPEC_URL, typeurl.PROCESS_URL, typeurl.LINUX_RESOURCES_URL)


def test_a_message_is_packed_under_its_bare_name() -> None:
    packed = typeurl.pack(task_events.TaskExit(container_id="c", pid=7))
    assert packed.type_url == "containerd.events.TaskExit"
    assert packed.value == b"\x0a\x01c\x18\x07"


def test_the_json_urls_are_those_containerd_registers() -> None:
    prefix = "types.containerd.io/opencontainers/runtime-spec/1/"
    assert [url.removeprefix(prefix) for url in URLS] == ["Spec", "Process", "LinuxResources"]


@pytest.mark.parametrize("prefix", ["", "type.googleapis.com/", "/", "a/b/"])
def test_a_message_is_unpacked_with_and_without_prefix(prefix: str) -> None:
    packed = wellknown_pb2.Any(type_url=f"{prefix}containerd.events.TaskExit", value=b"\x18\x07")
    assert typeurl.name_of(packed) == "containerd.events.TaskExit"
    assert typeurl.is_a(packed, task_events.TaskExit)
    assert typeurl.unpack(packed, task_events.TaskExit).pid == 7


def test_protobuf_itself_refuses_a_bare_name() -> None:
    # The reason for the module; when protobuf learns it, the module can go.
    assert not typeurl.pack(task_events.TaskExit()).Unpack(task_events.TaskExit())


@pytest.mark.parametrize(
    "url",
    ["", "/", "containerd.events.TaskExit/", "containerd.events.TaskExi", "ontainerd.events.TaskExit", "x"],
)
def test_another_type_is_refused_by_name(url: str) -> None:
    packed = wellknown_pb2.Any(type_url=url, value=b"")
    assert not typeurl.is_a(packed, task_events.TaskExit)
    with pytest.raises(typeurl.DecodeError, match=r"expected containerd\.events\.TaskExit"):
        typeurl.unpack(packed, task_events.TaskExit)


def test_a_json_type_is_no_message_of_its_last_word() -> None:
    packed = wellknown_pb2.Any(type_url="types.containerd.io/containerd.events.TaskExit")
    assert typeurl.name_of(packed) == "types.containerd.io/containerd.events.TaskExit"
    assert not typeurl.is_a(packed, task_events.TaskExit)


def test_messages_and_anys_of_another_pool_are_taken() -> None:
    packed = typeurl.pack(timestamp_pb2.Timestamp(seconds=5))
    assert packed.type_url == "google.protobuf.Timestamp"
    assert typeurl.unpack(packed, wellknown_pb2.Timestamp).seconds == 5
    assert typeurl.unpack(packed, timestamp_pb2.Timestamp).seconds == 5
    foreign = any_pb2.Any(type_url="containerd.runc.v1.Options", value=b"\x32\x04crun")
    assert typeurl.unpack(foreign, options_pb2.Options).binary_name == "crun"


@given(st.builds(task_events.TaskExit, container_id=st.text(), pid=st.integers(0, 2**32 - 1)))
def test_pack_and_unpack_are_inverse(message: task_events.TaskExit) -> None:
    assert typeurl.unpack(typeurl.pack(message), task_events.TaskExit) == message


@given(st.binary())
@example(b"\x0a\x02\xff\xfe")  # a string that is no UTF-8
@example(b"\x0b" * 20_000)  # groups nested without end
@example(b"\x2a\xff\xff\xff\xff\x7f")  # a length beyond the end
def test_garbage_for_a_message_raises_no_other_error(value: bytes) -> None:
    for kind in (task_events.TaskExit, containers_pb2.Container, wellknown_pb2.Any):
        packed = wellknown_pb2.Any(type_url=kind.DESCRIPTOR.full_name, value=value)
        with contextlib.suppress(typeurl.DecodeError):
            typeurl.unpack(packed, kind)


@given(st.text())
@example("/" * 100_000)
@example("\x00")
def test_any_url_at_all_is_answered(url: str) -> None:
    packed = wellknown_pb2.Any(type_url=url, value=b"\xff")
    assert url.endswith(typeurl.name_of(packed))
    with pytest.raises(typeurl.DecodeError) as caught:
        typeurl.unpack(packed, task_events.TaskExit)
    assert len(str(caught.value)) < 2500
    with pytest.raises(typeurl.DecodeError):
        typeurl.unpack_json(packed, typeurl.SPEC_URL)


_SCALAR = st.none() | st.booleans() | st.integers() | st.text()
_JSON = _SCALAR | st.lists(_SCALAR, max_size=3) | st.dictionaries(st.text(), _SCALAR, max_size=3)


@given(st.dictionaries(st.text(), _JSON, max_size=4), st.sampled_from(URLS))
def test_a_json_object_comes_back(document: dict[str, object], url: str) -> None:
    packed = typeurl.pack_json(url, json.dumps(document).encode())
    assert packed.type_url == url
    assert typeurl.unpack_json(packed, url) == document


@given(st.binary() | st.text().map(str.encode))
@example(b"[]")
@example(b"null")
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"\xff\xfe{\x00}")
@example(b'{"a":' + b"9" * 10_000 + b"}")
def test_garbage_for_json_raises_no_other_error(value: bytes) -> None:
    with contextlib.suppress(typeurl.DecodeError):
        typeurl.unpack_json(typeurl.pack_json(typeurl.SPEC_URL, value), typeurl.SPEC_URL)


def test_one_json_type_is_not_another() -> None:
    packed = typeurl.pack_json(typeurl.SPEC_URL, b"{}")
    with pytest.raises(typeurl.DecodeError, match="runtime-spec/1/Process"):
        typeurl.unpack_json(packed, typeurl.PROCESS_URL)


def test_garbage_raises_the_one_error_in_pure_python_too() -> None:
    program = """
from google.protobuf.internal import api_implementation
from libcontainerd._wire import typeurl
from libcontainerd._wire.pb import wellknown_pb2
from libcontainerd._wire.pb.events import task_pb2
assert api_implementation.Type() == "python"
for value in (b"\\x0a\\x02\\xff\\xfe", b"\\x0b" * 20000, b"\\x2a\\xff\\xff\\xff\\xff\\x7f", b"\\xff"):
    try:
        typeurl.unpack(wellknown_pb2.Any(type_url="containerd.events.TaskExit", value=value), task_pb2.TaskExit)
    except typeurl.DecodeError:
        print("refused")
"""
    environment = {**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert ran.stdout.split() == ["refused"] * 4, ran.stderr
