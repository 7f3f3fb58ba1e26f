"""The table of runtime-spec 1.3.0's properties as a tree, and documents made from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from hypothesis import strategies as st

from libcontainerd import oci

PLATFORMS: Final = {"solaris", "windows", "vm", "zos", "freebsd"}

RANGES: Final = {
    "uint8": (0, 2**8 - 1),
    "uint16": (0, 2**16 - 1),
    "uint32": (0, 2**32 - 1),
    "uint64": (0, 2**64 - 1),
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-(2**63), 2**63 - 1),
    # Go's int, where containers run.
    "integer": (-(2**63), 2**63 - 1),
}


@dataclass(frozen=True)
class Facts:
    """What the table says of one property."""

    type: str
    go: str = ""
    required: bool = False
    enum: tuple[str, ...] = ()
    pattern: str = ""
    min: int | None = None
    max: int | None = None
    minItems: int = 0  # noqa: N815 (the table's own name)

    @property
    def shape(self) -> str:
        """What Go's decoder takes it for."""
        return self.go or self.type


@dataclass
class Node:
    """A property and what is in it: members by name, an array's element as `[]`, a map's value as `{}`."""

    path: str
    facts: Facts
    parts: dict[str, Node] = field(default_factory=dict)

    @property
    def shape(self) -> str:
        return self.facts.shape

    @property
    def members(self) -> dict[str, Node]:
        return {name: part for name, part in self.parts.items() if name not in ("[]", "{}")}

    def walk(self) -> Iterator[Node]:
        """Yield this node and all below it."""
        yield self
        for part in self.parts.values():
            yield from part.walk()


def _tokens(path: str) -> list[str]:
    return path.replace("[]", ".[]").replace("{}", ".{}").split(".")


def _tree(table: dict[str, dict[str, object]]) -> Node:
    root = Node("", Facts("object"))
    for path, facts in table.items():
        *parents, name = _tokens(path)
        node = root
        for parent in parents:
            node = node.parts[parent]
        values: dict[str, object] = {**facts}
        if "enum" in values:
            values["enum"] = tuple(facts["enum"])  # type: ignore[arg-type]
        node.parts[name] = Node(path, Facts(**values))  # type: ignore[arg-type]
    return root


_TABLE: Final = json.loads((Path(__file__).parent / "properties.json").read_text())
CONFIG: Final = _tree(_TABLE["config"])
STATE: Final = _tree(_TABLE["state"])
FEATURES: Final = _tree(_TABLE["features"])

Parser = Callable[[str], oci.Model]
DOCUMENTS: Final[dict[str, tuple[Node, Parser, type[oci.Model]]]] = {
    "config": (CONFIG, oci.parse_spec, oci.Spec),
    "state": (STATE, oci.parse_state, oci.State),
    "features": (FEATURES, oci.parse_features, oci.Features),
}


def at(path: str, literal: str) -> str:
    """Write the smallest document with a JSON literal at a path of the table."""
    text = literal
    for token in reversed(_tokens(path)):
        if token == "[]":
            text = f"[{text}]"
        elif token == "{}":
            text = f'{{"key": {text}}}'
        else:
            text = f'{{"{token}": {text}}}'
    return text


def message_path(path: str) -> str:
    """Write a path of the table as a message for the document that `at` makes names it."""
    return path.replace("[]", "[0]").replace("{}", ".key")


def unknown_json() -> st.SearchStrategy[object]:
    """Any JSON."""
    scalars = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=["Cs"]))
    )
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(unknown_names(), inner, max_size=3),
        max_leaves=8,
    )


def unknown_names() -> st.SearchStrategy[str]:
    """Names that no property has, whatever their case: among them Python's names of some that are known."""
    odd = st.sampled_from(
        ["oci_version", "uid_mappings", "model_config", "__class__", "copy", "\u017f", "a.b", ""]
    )
    # Every known name, and every folding of one, begins with a letter.
    return odd | st.text(st.characters(exclude_categories=["Cs"]), max_size=6).map(lambda text: f"%{text}")


def texts() -> st.SearchStrategy[str]:
    """Strings that can be written as UTF-8."""
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


def accepted(node: Node, *, strict: bool = False) -> st.SearchStrategy[object]:
    """Make values that Go's decoder takes for a property; with `strict`, those that the schema takes as well."""
    if (id(node), strict) not in _MADE:
        value = _STRATEGIES.get(node.shape, _integers)(node, strict)
        _MADE[id(node), strict] = value if strict else st.one_of(value, value, value, value, st.none())
    return _MADE[id(node), strict]


# Making a strategy costs more than drawing from it; the nodes live as long as the module.
_MADE: Final[dict[tuple[int, bool], st.SearchStrategy[object]]] = {}


@st.composite
def _object(draw: st.DrawFn, node: Node, strict: bool) -> object:
    members = node.members
    needed = {name for name, part in members.items() if strict and part.facts.required}
    chosen = draw(st.sets(st.sampled_from(sorted(members)), max_size=4)) | needed
    known = {name: draw(accepted(members[name], strict=strict)) for name in sorted(chosen)}
    return {**known, **draw(st.dictionaries(unknown_names(), unknown_json(), max_size=1))}


def _array(node: Node, strict: bool) -> st.SearchStrategy[object]:
    element = node.parts.get("[]")
    if element is None:
        return st.just([])
    return st.lists(
        accepted(element, strict=strict), min_size=node.facts.minItems if strict else 0, max_size=2
    )


def _map(node: Node, strict: bool) -> st.SearchStrategy[object]:
    value = next(iter(node.parts.values()))
    return st.dictionaries(texts(), accepted(value, strict=strict), max_size=2)


def _string(node: Node, strict: bool) -> st.SearchStrategy[object]:
    if strict and node.facts.enum:
        return st.sampled_from(node.facts.enum)
    if strict and node.facts.pattern:
        return st.from_regex(node.facts.pattern.replace("$", r"\Z"), alphabet=st.characters(codec="ascii"))
    return texts()


def _integers(node: Node, strict: bool) -> st.SearchStrategy[object]:
    least, most = RANGES[node.shape]
    if strict:
        narrow = RANGES.get(node.facts.type, (least, most))
        least = max(least, narrow[0], narrow[0] if node.facts.min is None else node.facts.min)
        most = min(most, narrow[1], narrow[1] if node.facts.max is None else node.facts.max)
    return st.sampled_from([least, most]) | st.integers(least, most)


_STRATEGIES: Final[dict[str, Callable[[Node, bool], st.SearchStrategy[object]]]] = {
    "object": _object,
    "array": _array,
    "map": _map,
    "string": _string,
    "boolean": lambda node, strict: st.booleans(),
    "any-object": lambda node, strict: st.dictionaries(texts(), unknown_json(), max_size=2),
}
