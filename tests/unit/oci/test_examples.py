"""The documentation runs: every Python block of docs/oci.md, and every example in a docstring."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

from libcontainerd import oci

_PAGE = Path(__file__).parents[3] / "docs/oci.md"
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_MODULES = [
    "libcontainerd.oci",
    *(f"libcontainerd.oci.{found.name}" for found in pkgutil.iter_modules(oci.__path__)),
]


def test_the_page_runs_from_top_to_bottom() -> None:
    text = _PAGE.read_text()
    blocks = list(_BLOCK.finditer(text))
    names: dict[str, object] = {}

    assert len(blocks) > 10
    for block in blocks:
        # Blank lines before it, so that a failure shows the page's own line.
        source = "\n" * text.count("\n", 0, block.start(1)) + block.group(1)
        exec(compile(source, str(_PAGE), "exec"), names)


@pytest.mark.parametrize("name", _MODULES)
def test_examples_in_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", [name for name in oci.__all__ if name.startswith(("with_", "without_"))])
def test_every_option_is_on_the_page_and_has_an_example(name: str) -> None:
    assert f"`{name}`" in _PAGE.read_text()
    assert f"oci.{name}(" in "".join(_BLOCK.findall(_PAGE.read_text()))
    assert ">>> " in (getattr(oci, name).__doc__ or "")


@pytest.mark.parametrize("name", [name for name in oci.__all__ if name[0].islower()])
def test_every_function_is_on_the_page_and_says_what_it_does(name: str) -> None:
    assert name in _PAGE.read_text()
    assert getattr(oci, name).__doc__


@pytest.mark.parametrize("name", [name for name in oci.__all__ if name[0].isupper() and name != "SpecOption"])
def test_every_model_says_what_it_is(name: str) -> None:
    documentation = getattr(oci, name).__dict__.get("__doc__")

    assert documentation
    assert not documentation.startswith(f"{name}(")


def test_the_names_are_sorted_and_there() -> None:
    assert list(oci.__all__) == sorted(set(oci.__all__))
    assert all(hasattr(oci, name) for name in oci.__all__)
