"""The house's rules of import and of descriptors, read from the source: imports run down only, and in no circle."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = "libcontainerd"
SOURCE = Path(__file__).parents[2] / "src" / PACKAGE

# From the top down; a module may import from the layers under its own, and within its own only without a circle.
LAYERS = (
    ("remote",),
    ("client",),
    ("_checkpoint", "_creating", "_events", "_restore", "_starting", "_stdin", "stats", "supervisor"),
    ("_cleanup", "_keeping"),
    ("cio", "_archive", "_bundle", "_records", "_runtime", "backends"),
    ("_wire",),
    ("types", "errors", "oci"),
)
# Stands beside: sees these alone, and nobody sees it.
TESTING_MAY_SEE = {"_wire", "types", "errors", "cio", "testing"}

# These know nothing of gRPC, so that they can be used, tested and read without it.
WITHOUT_GRPC = {"cio", "oci"}
GRPC = {"grpc", "grpc_health", "google", f"{PACKAGE}._wire"}

# A raw descriptor is closed by hand, and its number is reused at once: one module knows how.
DESCRIPTOR_MODULE = "cio.fifo"
RAW_OPENERS = {"os.open", "os.mkfifo", "os.pipe", "os.pipe2", "os.dup", "os.dup2", "os.fdopen", "io.FileIO"}
FILE_OPENERS = {"open", "io.open"}

Sources = Mapping[str, str]
"""Module names below the package ('' is the package itself) and their text."""


def read_sources() -> dict[str, str]:
    """Read every module but the generated ones."""
    sources = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        if parts[:2] == ("_wire", "pb"):
            continue
        sources[".".join(part for part in parts if part != "__init__")] = path.read_text()
    return sources


def imports(text: str, known: set[str]) -> Iterator[str]:
    """Yield the full name of each module that `text` imports, anywhere in it and under whatever condition."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "a relative import hides what is imported"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full.removeprefix(f"{PACKAGE}.") in known else node.module


def inner_imports(name: str, sources: Sources) -> Iterator[str]:
    """Yield what module `name` imports of this package, named as in `sources`."""
    for full in imports(sources[name], set(sources)):
        if full == PACKAGE or full.startswith(f"{PACKAGE}."):
            yield full.removeprefix(PACKAGE).removeprefix(".")


def unit(module: str) -> str:
    """Return the file or folder right under the package that holds `module`."""
    return module.partition(".")[0]


def wrong_layers(sources: Sources) -> Iterator[str]:
    """Yield each import that runs up, or into or out of `testing`, and each module that has no layer."""
    rank = {name: len(LAYERS) - index for index, layer in enumerate(LAYERS) for name in layer}
    for module in sources:
        own = unit(module)
        if own not in {"", "testing"} and own not in rank:
            yield f"{module} has no place among the layers"
            continue
        for target in inner_imports(module, sources):
            other = unit(target)
            if own == "testing":
                if other not in TESTING_MAY_SEE:
                    yield f"{module} imports {target}"
            elif other == "testing":
                yield f"{module} imports {target}"
            elif own and (not other or rank.get(other, 0) > rank[own]):
                yield f"{module} imports {target or 'the package itself'}"


def circles(sources: Sources) -> Iterator[str]:
    """Yield one line for each circle of imports met on a walk in depth."""
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> Iterator[str]:
        if module in path:
            yield " > ".join((*path[path.index(module) :], module))
        elif module not in done and module in sources:
            for target in inner_imports(module, sources):
                yield from walk(target, (*path, module))
            done.add(module)

    for module in sources:
        yield from walk(module, ())


def grpc_where_none_belongs(sources: Sources) -> Iterator[str]:
    """Yield each import of gRPC, protobuf or `_wire` in a module that is to know nothing of them."""
    for module, text in sources.items():
        if unit(module) in WITHOUT_GRPC:
            for full in imports(text, set(sources)):
                if any(full == name or full.startswith(f"{name}.") for name in GRPC):
                    yield f"{module} imports {full}"


def stray_openers(sources: Sources) -> Iterator[str]:
    """Yield each call outside `cio.fifo` that makes a raw descriptor, or within `cio` opens a file."""
    for module, text in sources.items():
        if module == DESCRIPTOR_MODULE:
            continue
        banned = RAW_OPENERS | FILE_OPENERS if unit(module) == "cio" else RAW_OPENERS
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in banned:
                yield f"{module}:{node.lineno} calls {ast.unparse(node.func)}"
            elif isinstance(node, ast.ImportFrom) and node.module in {"os", "io"}:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                yield from (f"{module}:{node.lineno} imports {name}" for name in sorted(names & RAW_OPENERS))


RULES = [wrong_layers, circles, grpc_where_none_belongs, stray_openers]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_source_keeps_the_rule(rule: Callable[[Sources], Iterator[str]]) -> None:
    sources = read_sources()

    assert sources, "no source found"
    assert list(rule(sources)) == []


def test_the_package_never_imports_testing() -> None:
    assert list(wrong_layers({"": "from libcontainerd.testing import FakeContainerd", "testing": ""})) == [
        " imports testing"
    ]


@pytest.mark.parametrize(
    ("module", "text", "finding"),
    [
        ("errors", "import libcontainerd.client", "errors imports client"),
        (
            "_wire.connection",
            "from libcontainerd._records import Record",
            "_wire.connection imports _records",
        ),
        ("_records", "def f():\n    from libcontainerd import client", "_records imports client"),
        ("client", "from libcontainerd import Client", "client imports the package itself"),
        ("testing.fake", "from libcontainerd.client import Client", "testing.fake imports client"),
        ("client", "from libcontainerd.testing import x", "client imports testing"),
        ("helpers", "", "helpers has no place among the layers"),
    ],
)
def test_an_import_that_runs_up_is_found(module: str, text: str, finding: str) -> None:
    sources = {"": "", "client": "", "_records": "", "testing": "", module: text}

    assert list(wrong_layers(sources)) == [finding]


def test_an_import_that_runs_down_or_across_is_not() -> None:
    sources = {
        "client": "from libcontainerd.cio import fifo\nfrom libcontainerd import _bundle, errors",
        "cio": "",
        "cio.fifo": "from libcontainerd.errors import NotFoundError",
        "_bundle": "from libcontainerd import _records",
        "_records": "import os",
        "errors": "",
    }

    assert list(wrong_layers(sources)) == []
    assert list(circles(sources)) == []


def test_a_circle_is_found() -> None:
    sources = {"types": "import libcontainerd.errors", "errors": "from libcontainerd.types import Status"}

    assert list(circles(sources)) == ["types > errors > types"]


def test_a_package_and_its_module_can_make_a_circle() -> None:
    sources = {
        "cio": "from libcontainerd.cio.pump import copy",
        "cio.pump": "from libcontainerd.cio import IO",
    }

    assert list(circles(sources)) == ["cio > cio.pump > cio"]


@pytest.mark.parametrize(
    "text", ["import grpc", "from google.protobuf import any_pb2", "from libcontainerd._wire import typeurl"]
)
def test_grpc_in_cio_is_found(text: str) -> None:
    assert (
        len(list(grpc_where_none_belongs({"cio.pump": text, "_wire.typeurl": "", "_wire": "import grpc"})))
        == 1
    )


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("cio.pump", "open('x')"),
        ("cio.pump", "os.open('x', 0)"),
        ("client", "os.mkfifo('x')"),
        ("client", "from os import pipe2"),
    ],
)
def test_a_stray_opener_is_found(module: str, text: str) -> None:
    assert len(list(stray_openers({module: text}))) == 1
    assert list(stray_openers({"cio.fifo": text})) == []
