"""The public surface: few names, sorted, all documented, typed for those who install the wheel."""

from __future__ import annotations

import ast
import inspect
import itertools
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import libcontainerd
from libcontainerd import stats

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src/libcontainerd"
MOST_NAMES = 40


def documented_assignments() -> set[str]:
    """Return the module-level names of the source that a string right below them documents."""
    found: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        body = ast.parse(path.read_text()).body
        for statement, following in itertools.pairwise(body):
            if not (isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)):
                continue
            if isinstance(statement, ast.Assign):
                found.update(target.id for target in statement.targets if isinstance(target, ast.Name))
            elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                found.add(statement.target.id)
    return found


def undocumented(name: str, value: object) -> Iterator[str]:
    """Yield `name` and those of its public methods that have no docstring of their own."""
    if inspect.isclass(value):
        # Data classes and named tuples are given their signature for a docstring where they have none.
        if (value.__dict__.get("__doc__") or f"{name}(").startswith(f"{name}("):
            yield name
        for attribute, member in vars(value).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if not attribute.startswith("_") and inspect.isfunction(function) and not function.__doc__:
                yield f"{name}.{attribute}"
    elif inspect.ismodule(value) or inspect.isfunction(value):
        if not value.__doc__:
            yield name
    elif name not in documented_assignments():
        yield name


def test_the_names_are_few_and_each_stands_once() -> None:
    names = libcontainerd.__all__

    assert len(names) <= MOST_NAMES
    assert len(names) == len(set(names))  # ruff keeps them sorted


def test_nothing_else_is_public() -> None:
    public = {name for name in vars(libcontainerd) if not name.startswith("_") and name != "annotations"}
    # Importing a submodule puts it into the package, by Python's own doing.
    submodules = {
        name
        for name in public
        if isinstance(value := getattr(libcontainerd, name), ModuleType)
        and value.__name__ == f"libcontainerd.{name}"
    }

    on_demand = {"oci", *libcontainerd._LATE}
    assert sorted(public - submodules - on_demand) == sorted(
        set(libcontainerd.__all__) - submodules - on_demand
    )


def test_a_name_that_is_imported_late_is_there_and_no_other() -> None:
    assert libcontainerd.Stats is stats.Stats
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        getattr(libcontainerd, "Nothing")  # noqa: B009 # which the type checker would not let pass


@pytest.mark.parametrize("name", libcontainerd.__all__)
def test_each_name_and_its_methods_have_a_docstring(name: str) -> None:
    assert list(undocumented(name, getattr(libcontainerd, name))) == []


def test_a_missing_docstring_is_found() -> None:
    class Bare:
        """Has a docstring; its method has none."""

        def verb(self) -> None: ...

        @property
        def state(self) -> int:
            return 0

    @dataclass
    class Point:
        x: int

    assert list(undocumented("Point", Point)) == ["Point"]
    assert list(undocumented("Bare", Bare)) == ["Bare.verb", "Bare.state"]
    assert list(undocumented("NO_SUCH_CONSTANT", 3)) == ["NO_SUCH_CONSTANT"]


def test_importing_the_package_does_not_import_testing() -> None:
    program = "import sys, libcontainerd; sys.exit('libcontainerd.testing' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], timeout=30, check=False).returncode == 0


def test_the_wheel_holds_the_package_and_its_type_marker(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        capture_output=True,
        timeout=50,
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}

    tree = {
        str(path.relative_to(SOURCE.parent))
        for package in (SOURCE, SOURCE.parent / "libcontainerd_pytest")
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "libcontainerd/py.typed" in shipped
    assert shipped == tree
