"""The generated package: a pool of its own, stubs that tell the truth, nothing loaded that is not used."""

import ast
import builtins
import datetime
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import ModuleType

import grpc
import pytest
from google.protobuf.message import Message

from libcontainerd._wire import pb
from libcontainerd._wire.pb import wellknown_pb2
from libcontainerd._wire.pb.events import task_pb2 as task_events
from libcontainerd._wire.pb.services import (
    containers_pb2,
    content_pb2,
    images_pb2,
    introspection_pb2,
    tasks_pb2,
)
from libcontainerd._wire.pb.types import task_pb2

PACKAGE = Path(pb.__file__).parent
STUBS = sorted(PACKAGE.rglob("*.pyi"))


def _module(stub: Path) -> ModuleType:
    return import_module(".".join((pb.__name__, *stub.relative_to(PACKAGE).with_suffix("").parts)))


def _python(program: str, implementation: str | None = None) -> str:
    environment = dict(os.environ)
    if implementation is not None:
        environment["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = implementation
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


# Somebody else's copy of containerd's API, loaded the way protoc's Python output loads itself: the same files and
# the same names in the default pool, but every message has one field that containerd's does not have.
FOREIGN = """
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.internal import builder

PREFIX = "github.com/containerd/containerd/api/"
FILES = {
    PREFIX + "types/mount.proto": ("containerd.types", ["Mount"]),
    PREFIX + "types/task/task.proto": ("containerd.v1.types", ["Process", "Status"]),
    PREFIX + "events/task.proto": ("containerd.events", ["TaskExit", "TaskStart"]),
    PREFIX + "services/tasks/v1/tasks.proto": ("containerd.services.tasks.v1", ["GetRequest", "Tasks"]),
    PREFIX + "services/containers/v1/containers.proto": ("containerd.services.containers.v1", ["Container"]),
    PREFIX + "types/runc/options/oci.proto": ("containerd.runc.v1", ["Options"]),
}

def load_foreign():
    module = {"__name__": "foreign"}
    for name, (package, messages) in FILES.items():
        file = descriptor_pb2.FileDescriptorProto(name=name, package=package, syntax="proto3")
        for message in messages:
            field = file.message_type.add(name=message).field.add(name="foreign", number=1)
            field.type, field.label = field.TYPE_SINT64, field.LABEL_OPTIONAL
        descriptor = descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
        builder.BuildMessageAndEnumDescriptors(descriptor, module)
        builder.BuildTopDescriptorsAndMessages(descriptor, "foreign_pb2", module)
    return module

def load_ours():
    from libcontainerd._wire.pb.services import containers_pb2, tasks_pb2
    from libcontainerd._wire.pb.events import task_pb2
    from libcontainerd._wire.pb.runc import options_pb2
    return containers_pb2, tasks_pb2, task_pb2, options_pb2
"""
USE_BOTH = """
containers_pb2, tasks_pb2, task_pb2, options_pb2 = ours
ours_sent = task_pb2.TaskExit(container_id="c", pid=4).SerializeToString()
assert task_pb2.TaskExit.FromString(ours_sent).container_id == "c"
assert foreign["TaskExit"].FromString(foreign["TaskExit"](foreign=-7).SerializeToString()).foreign == -7
assert containers_pb2.Container(labels={"a": "b"}).labels["a"] == "b"
assert tasks_pb2.GetRequest.DESCRIPTOR.full_name == foreign["GetRequest"].DESCRIPTOR.full_name
assert tasks_pb2.GetRequest.DESCRIPTOR.fields_by_name.keys() != foreign["GetRequest"].DESCRIPTOR.fields_by_name.keys()
from google.protobuf.internal import api_implementation
print("both work", api_implementation.Type())
"""


@pytest.mark.parametrize("implementation", [None, "python"])
@pytest.mark.parametrize(
    "loading",
    ["foreign = load_foreign()\nours = load_ours()", "ours = load_ours()\nforeign = load_foreign()"],
    ids=["theirs first", "ours first"],
)
def test_another_copy_of_the_api_may_be_in_the_process(loading: str, implementation: str | None) -> None:
    out = _python(f"{FOREIGN}\n{loading}\n{USE_BOTH}", implementation)
    assert out.startswith("both work")
    assert implementation is None or implementation in out


def test_the_default_pool_would_not_have_held_both() -> None:
    # Without this, the test above could pass because protobuf minds nothing.
    program = f"""{FOREIGN}
load_foreign()
_, tasks_pb2, _, _ = load_ours()
file = descriptor_pb2.FileDescriptorProto()
tasks_pb2.GetRequest.DESCRIPTOR.file.CopyToProto(file)
try:
    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
except TypeError:
    print("refused")
"""
    assert _python(program).strip() == "refused"


def test_a_module_loads_what_it_builds_on_and_no_more() -> None:
    # The package itself imports its client, and with it all that the client needs: here it is an empty one.
    program = """
import importlib.util, sys, types
package = types.ModuleType("libcontainerd")
package.__path__ = importlib.util.find_spec("libcontainerd").submodule_search_locations
sys.modules["libcontainerd"] = package
from libcontainerd._wire.pb.services import tasks_pb2
loaded = {name.removeprefix("libcontainerd._wire.pb.") for name in sys.modules if name.endswith("_pb2")}
print(*sorted(name for name in loaded if not name.startswith("google.")))
print("grpc" in sys.modules)
"""
    loaded, has_grpc = _python(program).splitlines()
    assert loaded.split() == [
        "services.tasks_pb2",
        "types.descriptor_pb2",
        "types.metrics_pb2",
        "types.mount_pb2",
        "types.task_pb2",
        "wellknown_pb2",
    ]
    assert has_grpc == "False"


def test_well_known_messages_keep_their_methods() -> None:
    moment = datetime.datetime(2024, 5, 6, 7, 8, 9, tzinfo=datetime.UTC)
    event = task_events.TaskExit()
    event.exited_at.FromDatetime(moment)
    assert event.exited_at.ToDatetime(tzinfo=datetime.UTC) == moment
    request = containers_pb2.UpdateContainerRequest(
        update_mask=wellknown_pb2.FieldMask(paths=["labels", "spec"])
    )
    assert request.update_mask.ToJsonString() == "labels,spec"
    assert tasks_pb2.CreateTaskRequest(options=wellknown_pb2.Any(type_url="x")).options.type_url == "x"
    packed = wellknown_pb2.Any()
    packed.Pack(event)
    unpacked = task_events.TaskExit()
    assert packed.Unpack(unpacked)
    assert unpacked == event


def test_submessages_are_the_classes_that_modules_export() -> None:
    container = containers_pb2.Container(runtime=containers_pb2.Container.Runtime(name="r"))
    assert type(container.runtime) is containers_pb2.Container.Runtime
    assert type(container.created_at) is wellknown_pb2.Timestamp
    assert type(tasks_pb2.GetResponse().process) is task_pb2.Process
    assert containers_pb2.Container.__module__ == containers_pb2.__name__


def test_presence_and_names_of_numbers() -> None:
    assert not images_pb2.DeleteImageRequest().HasField("target")
    process = task_pb2.Process(status=task_pb2.Status.RUNNING)
    assert task_pb2.Status.Name(process.status) == "RUNNING"
    unknown = task_pb2.Process.FromString(b"\x20\x63")
    assert unknown.status == 99


def test_a_status_inside_a_plugin_is_readable() -> None:
    plugin = introspection_pb2.Plugin.FromString(b"\x3a\x06\x08\x0d\x12\x02no")
    assert (plugin.init_err.code, plugin.init_err.message) == (13, "no")


# ----------------------------------------------------------------------------------------------- the type stubs


@pytest.mark.parametrize("stub", STUBS, ids=lambda stub: str(stub.relative_to(PACKAGE)))
def test_a_stub_says_what_its_module_has(stub: Path) -> None:
    module = _module(stub)
    tree = ast.parse(stub.read_text())
    declared = {
        node.name for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    }
    declared |= {
        node.target.id
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    own = {name for name in vars(module) if not name.startswith("_")}
    assert declared == {name for name in own if not isinstance(getattr(module, name), ModuleType)}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        if node.name.startswith("_"):
            _check_enum(getattr(module, node.name[1:]), node)
        elif issubclass(getattr(module, node.name), Message):
            _check_message(getattr(module, node.name), node)
        else:
            members = {_name(member) for member in node.body}
            assert members == {method.name for method in getattr(module, node.name).service.methods}


def _name(node: ast.stmt) -> str:
    if isinstance(node, ast.AnnAssign):
        assert isinstance(node.target, ast.Name)
        return node.target.id
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    return node.name


def _check_enum(wrapper: object, node: ast.ClassDef) -> None:
    for member in node.body:
        assert isinstance(member, ast.AnnAssign)
        assert isinstance(member.value, ast.Constant)
        assert getattr(wrapper, _name(member)) == member.value.value


def _check_message(kind: type[Message], node: ast.ClassDef) -> None:
    message = kind()
    fields = set()
    for member in node.body:
        name = _name(member)
        if isinstance(member, ast.ClassDef):
            _check_message(getattr(kind, name), member)
        elif isinstance(member, ast.AnnAssign):
            assert isinstance(member.annotation, ast.Name)
            assert type(getattr(message, name)) is getattr(builtins, member.annotation.id)
            setattr(message, name, getattr(message, name))
            fields.add(name)
        elif isinstance(member, ast.FunctionDef) and name == "HasField":
            literals = [item.value for item in ast.walk(member.args) if isinstance(item, ast.Constant)]
            assert all(message.HasField(str(literal)) is False for literal in literals)
        elif name != "__init__":
            fields.add(name)
    assert fields == set(kind.DESCRIPTOR.fields_by_name)


# --------------------------------------------------------------------------------------------- stubs and servicers


class Tasks(tasks_pb2.TasksServicer):
    def Get(self, request: tasks_pb2.GetRequest, context: grpc.ServicerContext) -> tasks_pb2.GetResponse:  # noqa: N802  # the API's name
        return tasks_pb2.GetResponse(process=task_pb2.Process(id=request.container_id, pid=9))


class Content(content_pb2.ContentServicer):
    def Read(  # noqa: N802  # the API's name
        self, request: content_pb2.ReadContentRequest, context: grpc.ServicerContext
    ) -> Iterator[content_pb2.ReadContentResponse]:
        yield from (content_pb2.ReadContentResponse(offset=offset) for offset in range(request.size))

    def Write(  # noqa: N802  # the API's name
        self, request_iterator: Iterator[content_pb2.WriteContentRequest], context: grpc.ServicerContext
    ) -> Iterator[content_pb2.WriteContentResponse]:
        for request in request_iterator:
            yield content_pb2.WriteContentResponse(action=request.action, offset=len(request.data))


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[grpc.Channel]:
    address = f"unix:{tmp_path}/s"
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        server.add_generic_rpc_handlers((Tasks().generic_handler(), Content().generic_handler()))
        server.add_insecure_port(address)
        server.start()
        with grpc.insecure_channel(address) as channel:
            yield channel
        server.stop(None).wait()


def test_calls_of_every_arity_reach_the_servicer(channel: grpc.Channel) -> None:
    got = tasks_pb2.TasksStub(channel).Get(tasks_pb2.GetRequest(container_id="c"), timeout=10)
    assert (got.process.id, got.process.pid) == ("c", 9)
    content = content_pb2.ContentStub(channel)
    assert [part.offset for part in content.Read(content_pb2.ReadContentRequest(size=3), timeout=10)] == [
        0,
        1,
        2,
    ]
    writes = [
        content_pb2.WriteContentRequest(action=content_pb2.WriteAction.WRITE, data=b"x" * n) for n in (1, 2)
    ]
    answers = content.Write(iter(writes), timeout=10)
    assert [(answer.action, answer.offset) for answer in answers] == [(1, 1), (1, 2)]


def test_a_method_that_no_subclass_defines_is_unimplemented(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        tasks_pb2.TasksStub(channel).Kill(tasks_pb2.KillRequest(container_id="c"), timeout=10)
    assert "UNIMPLEMENTED" in str(caught.value)


def test_methods_have_the_paths_and_kinds_of_containerd() -> None:
    tasks = tasks_pb2.TasksStub.service
    assert tasks.path(tasks.methods[0]) == "/containerd.services.tasks.v1.Tasks/Create"
    assert {method.arity for method in tasks.methods} == {"unary_unary"}
    kinds = {method.name: method.arity for method in content_pb2.ContentStub.service.methods}
    assert {kinds["Info"], kinds["Read"], kinds["Write"]} == {"unary_unary", "unary_stream", "stream_stream"}
