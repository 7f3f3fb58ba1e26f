#!/usr/bin/env python3
"""Generate src/libcontainerd/_wire/pb from protos/, or check that it is up to date.

    tools/gen_protos.py           write the package anew
    tools/gen_protos.py --check   compare it with protos/, file by file, and write nothing

protoc, in the oldest grpcio-tools that this Python has wheels for, compiles the .proto files to descriptors. This
script turns each file into a module with its descriptor as bytes, and a stub with its types: protoc's own Python
output would register everything in protobuf's default pool, where another copy of containerd's API may already be
(see _wire/_pool.py). Descriptors are the same whichever protoc made them, so any supported Python may run this.

The pinned tools are put into a virtual environment of their own, .venv-protos, the first time.
"""

import argparse
import importlib.metadata
import keyword
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.protobuf.descriptor_pb2 import (
        DescriptorProto,
        EnumDescriptorProto,
        FieldDescriptorProto,
        FileDescriptorProto,
        ServiceDescriptorProto,
    )

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
GENERATED = ROOT / "src/libcontainerd/_wire/pb"
TOOLS_VENV = ROOT / ".venv-protos"
PACKAGE = "libcontainerd._wire.pb"

# CPython's minor version to the oldest grpcio-tools with wheels for it. setuptools has the pkg_resources that it imports.
TOOLS = {11: "grpcio-tools==1.54.3", 12: "grpcio-tools==1.59.0", 13: "grpcio-tools==1.66.2"}
TOOLS_NEWER = "grpcio-tools==1.76.0"
# googleapis-common-protos is there for google/rpc/status.proto. On 3.11 everything is the oldest that is supported.
BESIDE = ("setuptools<81", "googleapis-common-protos")
BESIDE_OLDEST = ("setuptools<81", "googleapis-common-protos==1.56.4", "grpcio==1.54.3", "protobuf==4.21.6")

API = "github.com/containerd/containerd/api"
# Every .proto file, and the module made of it.
MODULES = {
    f"{API}/services/containers/v1/containers.proto": "services.containers_pb2",
    f"{API}/services/content/v1/content.proto": "services.content_pb2",
    f"{API}/services/events/v1/events.proto": "services.events_pb2",
    f"{API}/services/images/v1/images.proto": "services.images_pb2",
    f"{API}/services/introspection/v1/introspection.proto": "services.introspection_pb2",
    f"{API}/services/leases/v1/leases.proto": "services.leases_pb2",
    f"{API}/services/namespaces/v1/namespace.proto": "services.namespaces_pb2",
    f"{API}/services/sandbox/v1/sandbox.proto": "services.sandbox_pb2",
    f"{API}/services/snapshots/v1/snapshots.proto": "services.snapshots_pb2",
    f"{API}/services/tasks/v1/tasks.proto": "services.tasks_pb2",
    f"{API}/services/version/v1/version.proto": "services.version_pb2",
    f"{API}/events/container.proto": "events.container_pb2",
    f"{API}/events/content.proto": "events.content_pb2",
    f"{API}/events/image.proto": "events.image_pb2",
    f"{API}/events/namespace.proto": "events.namespace_pb2",
    f"{API}/events/sandbox.proto": "events.sandbox_pb2",
    f"{API}/events/snapshot.proto": "events.snapshot_pb2",
    f"{API}/events/task.proto": "events.task_pb2",
    f"{API}/types/descriptor.proto": "types.descriptor_pb2",
    f"{API}/types/event.proto": "types.event_pb2",
    f"{API}/types/metrics.proto": "types.metrics_pb2",
    f"{API}/types/mount.proto": "types.mount_pb2",
    f"{API}/types/platform.proto": "types.platform_pb2",
    f"{API}/types/sandbox.proto": "types.sandbox_pb2",
    f"{API}/types/task/task.proto": "types.task_pb2",
    f"{API}/types/runc/options/oci.proto": "runc.options_pb2",
    "github.com/containerd/containerd/runtime/linux/runctypes/runc.proto": "runc.linux_pb2",
    "github.com/containerd/cgroups/v3/cgroup1/stats/metrics.proto": "cgroups.v1_pb2",
    "github.com/containerd/cgroups/v3/cgroup2/stats/metrics.proto": "cgroups.v2_pb2",
}
# Files that installed packages bring along, as descriptors too: their Python module, and ours that holds copies.
INSTALLED = {
    "google/protobuf/any.proto": ("google.protobuf.any_pb2", "wellknown_pb2"),
    "google/protobuf/empty.proto": ("google.protobuf.empty_pb2", "wellknown_pb2"),
    "google/protobuf/field_mask.proto": ("google.protobuf.field_mask_pb2", "wellknown_pb2"),
    "google/protobuf/timestamp.proto": ("google.protobuf.timestamp_pb2", "wellknown_pb2"),
    "google/rpc/status.proto": ("google.rpc.status_pb2", "status_pb2"),
}
PACKAGE_DOCS = {
    "": """containerd's API as classes, generated from protos/ by tools/gen_protos.py. Never edited.

services.<name>_pb2   one module per gRPC service, with its requests and answers: containers, content, events, images,
                      introspection, leases, namespaces, sandbox (the store), snapshots, tasks, version
types.<name>_pb2      what they share: descriptor, event (Envelope), metrics, mount, platform, sandbox, task
events.<name>_pb2     the messages inside an envelope: container, content, image, namespace, sandbox, snapshot, task
runc.options_pb2      containerd.runc.v1; runc.linux_pb2 is containerd.linux.runc, for the old v1 runtime
cgroups.v1_pb2        io.containerd.cgroups.v1, and v2_pb2 for v2
wellknown_pb2         Any, Empty, FieldMask, Timestamp: the only ones that fit into messages of this package
status_pb2            google.rpc.Status, likewise

A service module has ``<Service>Stub(channel)``, with one typed multi-callable per method, and ``<Service>Servicer``, whose
subclasses define the methods they serve and go to ``server.add_generic_rpc_handlers((servicer.generic_handler(),))``.
Modules load what they build on and no more. Everything is in a descriptor pool of our own; see ``_wire/_pool.py``.
""",
    "cgroups": "What a task's metrics hold, by cgroup version.\n",
    "events": "Event messages, by what they are about.\n",
    "runc": "Options of the runc shims.\n",
    "services": "containerd's gRPC services.\n",
    "types": "Messages that several services share.\n",
}
NOTICE = "Generated by tools/gen_protos.py; do not edit."


# ------------------------------------------------------------------------------------------------ the tools


def _wanted() -> tuple[str, ...]:
    minor = sys.version_info.minor
    return (TOOLS.get(minor, TOOLS_NEWER), *(BESIDE_OLDEST if minor == min(TOOLS) else BESIDE))


def _run_in_tools_venv(arguments: list[str]) -> int:
    """Runs this script again under the pinned tools, which it installs first where they are missing."""
    python = str(TOOLS_VENV / "bin/python")
    stamp = TOOLS_VENV / "installed"
    contents = "\n".join((sys.version, *_wanted()))
    if not stamp.exists() or stamp.read_text() != contents:
        print(f"installing {_wanted()[0]} into {TOOLS_VENV.name}", flush=True)
        venv.create(TOOLS_VENV, clear=True, with_pip=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *_wanted()]
        if subprocess.run(install, check=False).returncode:
            raise SystemExit(f"could not install {', '.join(_wanted())}: see pip's message above")
        stamp.write_text(contents)
    return subprocess.run([python, __file__, *arguments], check=False).returncode


def _compile() -> "dict[str, FileDescriptorProto]":
    """Compiles protos/; returns the descriptors of its files and of those they import, by path."""
    from google.protobuf.descriptor_pb2 import FileDescriptorSet  # noqa: PLC0415  # only the tools' venv has it

    found = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    if found != sorted(MODULES):
        different = sorted(set(found) ^ set(MODULES))
        raise SystemExit(f"protos/ and MODULES in {Path(__file__).name} differ: {', '.join(different)}")
    site = importlib.metadata.distribution("googleapis-common-protos").locate_file("")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "set")
        subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "grpc_tools.protoc", f"-I{PROTOS}", f"-I{site}",
             "--include_imports", f"--descriptor_set_out={out}", *found],
            check=True,
        )  # fmt: skip
        compiled = FileDescriptorSet.FromString(out.read_bytes())
    for file in compiled.file:
        for message in file.message_type:
            _forget_json_names(message)
    return {file.name: file for file in compiled.file}


def _forget_json_names(message: "DescriptorProto") -> None:
    # protoc writes them out though they follow from the names; without them the modules are a fifth smaller.
    for field in message.field:
        field.ClearField("json_name")
    for nested in message.nested_type:
        _forget_json_names(nested)


# ---------------------------------------------------------------------------------------------- the modules


class _Names:
    """How messages are written in the module of one file.

    Args:
        files: All files compiled.
        module: The module that the names are for, relative to the package.
    """

    def __init__(self, files: "dict[str, FileDescriptorProto]", module: str) -> None:
        self._module = module
        self._homes: dict[str, tuple[str, str]] = {}
        for file in files.values():
            for message in file.message_type:
                self._add(_module_of(file.name), file.package, message, "")

    def _add(self, module: str, package: str, message: "DescriptorProto", outer: str) -> None:
        name = f"{outer}.{message.name}".lstrip(".")
        self._homes[f"{package}.{name}"] = (module, name)
        for nested in message.nested_type:
            self._add(module, package, nested, name)

    def __call__(self, type_name: str) -> str:
        """Returns the Python expression for a message that a descriptor calls ``.package.Name``."""
        module, name = self._homes[type_name.lstrip(".")]
        return name if module == self._module else f"{module.rpartition('.')[2]}.{name}"


def _module_of(name: str) -> str:
    return MODULES[name] if name in MODULES else INSTALLED[name][1]


def _imports(file: "FileDescriptorProto") -> list[str]:
    """Lines that import the modules of what the file imports; loading those puts their files into the pool."""
    wanted: dict[str, set[str]] = {}
    for dependency in file.dependency:
        package, _, name = _module_of(dependency).rpartition(".")
        wanted.setdefault(f"{PACKAGE}.{package}".rstrip("."), set()).add(name)
    return [f"from {package} import {', '.join(sorted(names))}" for package, names in sorted(wanted.items())]


def _literal(data: bytes) -> Iterator[str]:
    for start in range(0, len(data), 32):
        yield f"    {data[start : start + 32]!r}"


def _module_source(file: "FileDescriptorProto", names: _Names) -> str:
    lines = [f'"""{file.package}, from {file.name}. {NOTICE}"""', "", "from libcontainerd._wire import _pool"]
    lines += [*_imports(file), "", "_file = _pool.add(", "    __name__,", f"    {_quoted(file.name)},"]
    lines += ["\n".join(_literal(file.SerializeToString(deterministic=True))) + ",", ")"]
    lines += [f"{enum.name} = _file.enum({_quoted(enum.name)})" for enum in file.enum_type]
    lines += [f"{message.name} = _file.message({_quoted(message.name)})" for message in file.message_type]
    for service in file.service:
        table = f"_{service.name.upper()}"
        lines += [
            "",
            f"{table} = _pool.Service(",
            f"    {_quoted(f'{file.package}.{service.name}')},",
            "    (",
        ]
        for method in service.method:
            request, response = names(method.input_type), names(method.output_type)
            flags = f"{method.client_streaming}, {method.server_streaming}"
            lines.append(f"        _pool.Method({_quoted(method.name)}, {request}, {response}, {flags}),")
        lines += ["    ),", ")"]
        for kind in ("Stub", "Servicer"):
            lines += ["", "", f"class {service.name}{kind}(_pool.{kind}):", f"    service = {table}"]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return f'"{text}"'


# ------------------------------------------------------------------------------------------------ the stubs


def _stub_source(file: "FileDescriptorProto", names: _Names) -> str:
    body: list[str] = []
    for enum in file.enum_type:
        body += _enum_stub(enum)
    for message in file.message_type:
        body += ["", *_message_stub(message, f".{file.package}.{message.name}", names)]
    for service in file.service:
        body += _service_stub(service, names)
    doc = f'"""{file.package}, from {file.name}. {NOTICE}"""'
    return _stub_module(doc, ["from libcontainerd._wire import _pool", *_imports(file)], body)


def _stub_module(doc: str, imports: list[str], body: list[str]) -> str:
    head = [
        doc,
        "",
        "from collections.abc import Iterable, Iterator, Mapping",
        "from typing import Final, Literal",
        "",
        "import grpc",
        "from google.protobuf.internal import containers",
        "from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper",
        "from google.protobuf.message import Message",
        *imports,
    ]
    return _without_unused("\n".join(head), "\n".join(body))


def _without_unused(head: str, text: str) -> str:
    """Drops from the import lines in ``head`` every name that ``text`` does not use."""
    kept = []
    for line in head.splitlines():
        start, importing, listed = line.rpartition("import ")
        if importing and not line.startswith('"""'):
            used = [name for name in listed.split(", ") if _uses(text, name)]
            if used:
                kept.append(f"{start}import {', '.join(used)}")
        elif line or (kept and kept[-1]):
            kept.append(line)
    return "\n".join(kept).rstrip() + "\n" + text.rstrip() + "\n"


def _uses(text: str, name: str) -> bool:
    words = "".join(char if char.isalnum() or char == "_" else " " for char in text).split()
    return name in words


def _enum_stub(enum: "EnumDescriptorProto") -> list[str]:
    lines = ["", f"class _{enum.name}(EnumTypeWrapper):"]
    lines += [f"    {value.name}: Final = {value.number}" for value in enum.value]
    return [*lines, "", f"{enum.name}: _{enum.name}"]


SCALARS = {
    "TYPE_BOOL": "bool",
    "TYPE_BYTES": "bytes",
    "TYPE_DOUBLE": "float",
    "TYPE_ENUM": "int",  # open in proto3: a newer server may send a number that has no name here
    "TYPE_INT32": "int",
    "TYPE_INT64": "int",
    "TYPE_STRING": "str",
    "TYPE_UINT32": "int",
    "TYPE_UINT64": "int",
}


def _message_stub(message: "DescriptorProto", full_name: str, names: _Names) -> list[str]:
    lines = [f"class {message.name}(Message):"]
    entries = {}
    for nested in message.nested_type:
        if nested.options.map_entry:
            entries[f"{full_name}.{nested.name}"] = nested
        else:
            lines += ["    " + line for line in _message_stub(nested, f"{full_name}.{nested.name}", names)]
    parameters, attributes, present = [], [], []
    for field in message.field:
        if keyword.iskeyword(field.name):
            raise SystemExit(f"{full_name}.{field.name} is a keyword of Python")
        held, taken = _field_types(field, entries, names)
        if field.label == field.LABEL_REPEATED or field.type == field.TYPE_MESSAGE:
            attributes += ["    @property", f"    def {field.name}(self) -> {held}: ..."]
        else:
            attributes.append(f"    {field.name}: {held}")
        if field.label != field.LABEL_REPEATED and (
            field.type == field.TYPE_MESSAGE or field.proto3_optional
        ):
            present.append(f'"{field.name}"')
        parameters.append(f"{field.name}: {taken} | None = ...")
    lines += attributes
    if parameters:
        lines.append("    def __init__(")
        lines.append("        self,")
        lines.append("        *,")
        lines += [f"        {parameter}," for parameter in parameters]
        lines.append("    ) -> None: ...")
    else:
        lines.append("    def __init__(self) -> None: ...")
    if present:
        lines.append(f"    def HasField(self, field_name: Literal[{', '.join(present)}]) -> bool: ...")
    return lines


def _field_types(
    field: "FieldDescriptorProto", entries: "dict[str, DescriptorProto]", names: _Names
) -> tuple[str, str]:
    """Returns the types of the attribute and of the constructor's parameter."""
    if field.type_name in entries:
        key, value = entries[field.type_name].field
        key_type, value_type = _single(key, names), _single(value, names)
        kind = "MessageMap" if value.type == value.TYPE_MESSAGE else "ScalarMap"
        return f"containers.{kind}[{key_type}, {value_type}]", f"Mapping[{key_type}, {value_type}]"
    single = _single(field, names)
    if field.label == field.LABEL_REPEATED:
        kind = "Composite" if field.type == field.TYPE_MESSAGE else "Scalar"
        return f"containers.Repeated{kind}FieldContainer[{single}]", f"Iterable[{single}]"
    return single, single


def _single(field: "FieldDescriptorProto", names: _Names) -> str:
    if field.type == field.TYPE_MESSAGE:
        return names(field.type_name)
    return SCALARS[type(field).Type.Name(field.type)]


def _service_stub(service: "ServiceDescriptorProto", names: _Names) -> list[str]:
    stub = ["", f"class {service.name}Stub(_pool.Stub):"]
    servicer = ["", f"class {service.name}Servicer(_pool.Servicer):"]
    for method in service.method:
        request, response = names(method.input_type), names(method.output_type)
        kind = ("Unary", "Stream")[method.client_streaming] + ("Unary", "Stream")[method.server_streaming]
        stub.append(f"    {method.name}: grpc.{kind}MultiCallable[{request}, {response}]")
        taken = f"request_iterator: Iterator[{request}]" if method.client_streaming else f"request: {request}"
        given = f"Iterator[{response}]" if method.server_streaming else response
        servicer.append(
            f"    def {method.name}(self, {taken}, context: grpc.ServicerContext) -> {given}: ..."
        )
    return [*stub, *servicer]


# ------------------------------------------------------------------------------------------------- the tree


# What protobuf adds in Python to some of its own messages, as in Timestamp.ToDatetime.
MIXINS = ("Any", "FieldMask", "Timestamp")


def _installed_modules(files: "dict[str, FileDescriptorProto]") -> Iterator[tuple[str, str, str]]:
    """Yields name, source and stub of the modules that copy files of installed packages."""
    grouped: dict[str, list[str]] = {}
    for name, (_, module) in INSTALLED.items():
        grouped.setdefault(module, []).append(name)
    for module, members in grouped.items():
        doc = f'"""Copies in our own pool of messages that installed packages define. {NOTICE}"""'
        names = _Names(files, module)
        source, definitions, body = [doc, ""], [], []
        for member in members:
            package, _, generated = INSTALLED[member][0].rpartition(".")
            source.append(f"from {package} import {generated}")
            for message in files[member].message_type:
                definitions.append(
                    f'{message.name} = _pool.add_installed(__name__, {generated}).message("{message.name}")'
                )
                lines = _message_stub(message, f".{files[member].package}.{message.name}", names)
                if message.name in MIXINS:
                    lines[0] = f"class {message.name}(Message, well_known_types.{message.name}):"
                body += ["", *lines]
        others = [line for member in members for line in _imports(files[member])]
        source += ["", "from libcontainerd._wire import _pool", *others, "", *definitions]
        imports = ["from google.protobuf.internal import well_known_types", *others]
        yield module, "\n".join(source) + "\n", _stub_module(doc, imports, body)


def generate(target: Path) -> None:
    """Writes the whole package into an empty directory."""
    files = _compile()
    for package, doc in PACKAGE_DOCS.items():
        directory = target / package
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "__init__.py").write_text(
            f'"""{doc}"""\n' if "\n" in doc[:-1] else f'"""{doc[:-1]}"""\n'
        )
    for name, module in MODULES.items():
        file, names = files[name], _Names(files, module)
        path = target.joinpath(*module.split("."))
        path.with_suffix(".py").write_text(_module_source(file, names))
        path.with_suffix(".pyi").write_text(_stub_source(file, names))
    for module, source, stub in _installed_modules(files):
        (target / f"{module}.py").write_text(source)
        (target / f"{module}.pyi").write_text(stub)


def differences(expected: Path, actual: Path) -> list[str]:
    """Compares two trees whole, byte for byte; Python's own caches do not count.

    Returns:
        One line for each file that is missing, extra or different in ``actual``; none when they are equal.
    """
    trees = [
        {
            str(path.relative_to(top)): path.read_bytes()
            for path in top.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        for top in (expected, actual)
    ]
    found = []
    for name in sorted(trees[0].keys() | trees[1].keys()):
        if name not in trees[1]:
            found.append(f"missing: {name}")
        elif name not in trees[0]:
            found.append(f"extra: {name}")
        elif trees[0][name] != trees[1][name]:
            found.append(f"differs: {name}")
    return found


def main(arguments: list[str]) -> int:
    """Generates or checks; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if the package is out of date"
    )
    options = parser.parse_args(arguments)
    if Path(sys.prefix) != TOOLS_VENV:
        return _run_in_tools_venv(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch, "pb")
        generate(fresh)
        found = differences(fresh, GENERATED)
        if options.check:
            for line in found:
                print(line)
            print(
                "generated code is out of date: run tools/gen_protos.py"
                if found
                else "generated code is up to date"
            )
            return 1 if found else 0
        shutil.rmtree(GENERATED, ignore_errors=True)
        shutil.copytree(fresh, GENERATED)
    print(
        f"wrote {GENERATED.relative_to(ROOT)}: {len(found)} files changed" if found else "nothing to change"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
