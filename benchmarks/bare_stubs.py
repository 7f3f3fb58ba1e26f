"""Makes the generated stubs importable without the library around them, for the peer that shall not pay for it."""

from __future__ import annotations

import importlib.util
import sys
import types


def install() -> None:
    """Put an empty ``libcontainerd`` with the same path in the place of the real one, whose import brings in all of it."""
    if "libcontainerd" in sys.modules:
        return
    spec = importlib.util.find_spec("libcontainerd")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("libcontainerd is not installed")
    package = types.ModuleType("libcontainerd")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["libcontainerd"] = package
