"""protos/ is laid out as upstream's API, the generated package is made of it, and drift is noticed."""

import re
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

from libcontainerd._wire import pb
from tools import gen_protos

FILES = sorted(gen_protos.PROTOS.rglob("*.proto"))
API = "github.com/containerd/containerd/api"
# By directory: what the files there must say their package is.
PACKAGES = {
    f"{API}/services/containers/v1": "containerd.services.containers.v1",
    f"{API}/services/content/v1": "containerd.services.content.v1",
    f"{API}/services/events/v1": "containerd.services.events.v1",
    f"{API}/services/images/v1": "containerd.services.images.v1",
    f"{API}/services/introspection/v1": "containerd.services.introspection.v1",
    f"{API}/services/leases/v1": "containerd.services.leases.v1",
    f"{API}/services/namespaces/v1": "containerd.services.namespaces.v1",
    f"{API}/services/sandbox/v1": "containerd.services.sandbox.v1",
    f"{API}/services/snapshots/v1": "containerd.services.snapshots.v1",
    f"{API}/services/tasks/v1": "containerd.services.tasks.v1",
    f"{API}/services/version/v1": "containerd.services.version.v1",
    f"{API}/events": "containerd.events",
    f"{API}/types": "containerd.types",
    f"{API}/types/task": "containerd.v1.types",
    f"{API}/types/runc/options": "containerd.runc.v1",
    "github.com/containerd/containerd/runtime/linux/runctypes": "containerd.linux.runc",
    "github.com/containerd/cgroups/v3/cgroup1/stats": "io.containerd.cgroups.v1",
    "github.com/containerd/cgroups/v3/cgroup2/stats": "io.containerd.cgroups.v2",
}
# The exception is upstream's: the image events keep the package they had before events had one.
EXCEPTIONS = {f"{API}/events/image.proto": "containerd.services.images.v1"}


def _identify(path: Path) -> str:
    return str(path.relative_to(gen_protos.PROTOS))


def _descriptor(path: Path) -> FileDescriptor:
    module = import_module(f"{pb.__name__}.{gen_protos.MODULES[_identify(path)]}")
    descriptor = module._file._descriptor
    assert descriptor.name == _identify(path)
    found: FileDescriptor = descriptor
    return found


def test_every_directory_is_there_and_no_other() -> None:
    assert {str(Path(_identify(path)).parent) for path in FILES} == set(PACKAGES)
    assert {_identify(path) for path in FILES} == set(gen_protos.MODULES)


@pytest.mark.parametrize("path", FILES, ids=_identify)
def test_a_file_has_the_package_of_its_place(path: Path) -> None:
    name = _identify(path)
    package = EXCEPTIONS.get(name, PACKAGES[str(Path(name).parent)])
    assert f"\npackage {package};\n" in path.read_text()
    assert _descriptor(path).package == package


# -------------------------------------------------------- the text against the generated code, without protoc

DECLARATION = re.compile(r"(message|enum|service) (\w+) \{(\})?$")
FIELD = re.compile(r"(repeated |optional )?(map<\w+, [\w.]+>|[\w.]+) (\w+) = (\d+);$")
VALUE = re.compile(r"(\w+) = (\d+);$")
RPC = re.compile(r"rpc (\w+)\((stream )?([\w.]+)\) returns \((stream )?([\w.]+)\);$")
OTHER = re.compile(r'syntax = "proto3";$|package [\w.]+;$|import "[\w./]+";$|//|$')


def _said(path: Path) -> Iterator[str]:
    """Yields one line per declaration in a .proto file of the plain kind that protos/ consists of."""
    scopes: list[str] = []
    kinds: list[str] = []
    for raw in path.read_text().splitlines():
        line = raw.strip()
        if declared := DECLARATION.match(line):
            scopes.append(declared[2])
            kinds.append(declared[1])
            yield f"{declared[1]} {'.'.join(scopes)}"
            if declared[3]:
                scopes.pop()
                kinds.pop()
        elif line == "}":
            scopes.pop()
            kinds.pop()
        elif kinds and kinds[-1] == "message" and (field := FIELD.match(line)):
            yield f"{'.'.join(scopes)}.{field[3]} = {field[4]}: {field[1] or ''}{field[2]}"
        elif kinds and kinds[-1] == "enum" and (value := VALUE.match(line)):
            yield f"{scopes[0]}.{value[1]} = {value[2]}"
        elif kinds and kinds[-1] == "service" and (rpc := RPC.match(line)):
            yield f"{scopes[0]}.{rpc[1]}: {rpc[2] or ''}{rpc[3]} -> {rpc[4] or ''}{rpc[5]}"
        else:
            assert OTHER.match(line), f"{_identify(path)}: what is {line!r}?"


class _Generated:
    """The same lines from a descriptor in the generated package.

    Args:
        file: The descriptor.
    """

    def __init__(self, file: FileDescriptorProto) -> None:
        self._file = file
        self._own = {name for message in file.message_type for name in _names(message, f".{file.package}")}
        self._own |= {f".{file.package}.{enum.name}" for enum in file.enum_type}

    def lines(self) -> Iterator[str]:
        for service in self._file.service:
            yield f"service {service.name}"
            for method in service.method:
                asked = ("", "stream ")[method.client_streaming] + self._short(method.input_type)
                answered = ("", "stream ")[method.server_streaming] + self._short(method.output_type)
                yield f"{service.name}.{method.name}: {asked} -> {answered}"
        for enum in self._file.enum_type:
            yield f"enum {enum.name}"
            yield from (f"{enum.name}.{value.name} = {value.number}" for value in enum.value)
        for message in self._file.message_type:
            yield from self._message(message, "")

    def _message(self, message: DescriptorProto, outer: str) -> Iterator[str]:
        scope = f"{outer}{message.name}"
        yield f"message {scope}"
        entries = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
        for nested in message.nested_type:
            if nested.name not in entries:
                yield from self._message(nested, f"{scope}.")
        for field in message.field:
            yield f"{scope}.{field.name} = {field.number}: {self._field(field, entries)}"

    def _field(self, field: FieldDescriptorProto, entries: dict[str, DescriptorProto]) -> str:
        spelled = self._kind(field)
        if entry := entries.get(spelled.rpartition(".")[2]):
            return f"map<{self._kind(entry.field[0])}, {self._kind(entry.field[1])}>"
        if field.label == FieldDescriptorProto.LABEL_REPEATED:
            return f"repeated {spelled}"
        return f"optional {spelled}" if field.proto3_optional else spelled

    def _kind(self, field: FieldDescriptorProto) -> str:
        if field.type_name:
            return self._short(field.type_name)
        return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()

    def _short(self, name: str) -> str:
        return name.removeprefix(f".{self._file.package}.") if name in self._own else name.removeprefix(".")


def _names(message: DescriptorProto, outer: str) -> Iterator[str]:
    yield f"{outer}.{message.name}"
    for nested in message.nested_type:
        yield from _names(nested, f"{outer}.{message.name}")


@pytest.mark.parametrize("path", FILES, ids=_identify)
def test_the_generated_code_says_what_the_file_says(path: Path) -> None:
    generated = FileDescriptorProto()
    _descriptor(path).CopyToProto(generated)
    assert list(_said(path)) == list(_Generated(generated).lines())


@pytest.mark.parametrize("path", FILES, ids=_identify)
def test_the_service_tables_say_what_the_file_says(path: Path) -> None:
    module = import_module(f"{pb.__name__}.{gen_protos.MODULES[_identify(path)]}")
    described = FileDescriptorProto()
    _descriptor(path).CopyToProto(described)
    for service in described.service:
        for kind in ("Stub", "Servicer"):
            table = getattr(module, f"{service.name}{kind}").service
            assert table.name == f"{described.package}.{service.name}"
            assert [
                (f".{m.request.DESCRIPTOR.full_name}", f".{m.response.DESCRIPTOR.full_name}", m.name, *m[3:])
                for m in table.methods
            ] == [
                (m.input_type, m.output_type, m.name, m.client_streaming, m.server_streaming)
                for m in service.method
            ]


def test_facts_that_clients_of_either_version_rely_on() -> None:
    said = {line for path in FILES for line in _said(path)}
    assert {
        "Options.criu_path = 8: string",  # 1.6 alone
        "Options.task_api_version = 13: uint32",  # 2.1 alone
        "TaskExit.exited_at = 5: google.protobuf.Timestamp",
        "TaskDelete.id = 5: string",
        "CreateTaskRequest.options = 9: google.protobuf.Any",
        "DeleteImageRequest.target = 3: optional containerd.types.Descriptor",
        "Metrics.memory_oom_control = 9: MemoryOomControl",
        "Metrics.memory_events = 8: MemoryEvents",
        "RuncOptions.criu_path = 3: string",
        "Store.Get: StoreGetRequest -> StoreGetResponse",
        "Events.Subscribe: SubscribeRequest -> stream containerd.types.Envelope",
    } <= said


# -------------------------------------------------------------------------------------------------- drift


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(
        shutil.copytree(gen_protos.GENERATED, tmp_path / "pb", ignore=shutil.ignore_patterns("__pycache__"))
    )


def test_equal_trees_do_not_differ_and_caches_do_not_count(copy: Path) -> None:
    (copy / "types/__pycache__").mkdir()
    (copy / "types/__pycache__/mount_pb2.cpython-311.pyc").write_bytes(b"x")
    assert gen_protos.differences(copy, gen_protos.GENERATED) == []
    assert gen_protos.differences(gen_protos.GENERATED, copy) == []


def test_a_changed_byte_is_drift(copy: Path) -> None:
    changed = copy / "services/tasks_pb2.py"
    content = bytearray(changed.read_bytes())
    content[len(content) // 2] ^= 1
    changed.write_bytes(content)
    assert gen_protos.differences(gen_protos.GENERATED, copy) == ["differs: services/tasks_pb2.py"]


@pytest.mark.parametrize("kept", [0, -1])
def test_a_truncated_file_is_drift(copy: Path, kept: int) -> None:
    truncated = copy / "wellknown_pb2.pyi"
    truncated.write_bytes(truncated.read_bytes()[:kept])
    assert gen_protos.differences(gen_protos.GENERATED, copy) == ["differs: wellknown_pb2.pyi"]


def test_a_missing_file_is_drift(copy: Path) -> None:
    # The last by name: a comparison that stops with the shorter list would miss it.
    (copy / "wellknown_pb2.pyi").unlink()
    assert gen_protos.differences(gen_protos.GENERATED, copy) == ["missing: wellknown_pb2.pyi"]


@pytest.mark.parametrize("name", ["zzz_pb2.py", "services/old_pb2.py", "new/deep/__init__.py"])
def test_an_extra_file_is_drift(copy: Path, name: str) -> None:
    extra = copy / name
    extra.parent.mkdir(parents=True, exist_ok=True)
    extra.touch()
    assert gen_protos.differences(gen_protos.GENERATED, copy) == [f"extra: {name}"]


def test_an_absent_tree_is_drift_in_every_file(tmp_path: Path) -> None:
    found = gen_protos.differences(gen_protos.GENERATED, tmp_path / "absent")
    assert "missing: __init__.py" in found
    assert len(found) > 2 * len(FILES)
