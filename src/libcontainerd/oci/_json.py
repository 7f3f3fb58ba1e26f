"""Reading what others wrote, as JSON text or Python values, without the standard library's leniencies."""

from __future__ import annotations

import json
from collections.abc import Mapping

from libcontainerd.errors import InvalidParameterError
from libcontainerd.oci._base import MAX_DEPTH, Model, is_text, join


class _Repeated:
    """Stands in for the value of a member that occurred twice, until its path is known."""

    __slots__ = ()


_REPEATED = _Repeated()

# Lists that hold one list twice, thirty levels deep, are thirty lists in memory and a billion in the
# document. A large spec has some hundreds.
_MOST_CONTAINERS = 100_000


def loads(text: str | bytes, what: str) -> object:
    """Read one JSON document, strictly by RFC 8259 but for one thing.

    NaN, infinities and numbers too large for a float come out as such floats: a model refuses them wherever
    they stand, and can say where that is.

    Args:
        text: The document; bytes are UTF-8.
        what: What the document is, for messages: `spec`.

    Returns:
        Plain `dict`, `list`, `str`, `int`, `float`, `bool` and `None`.

    Raises:
        InvalidParameterError: if the text is not JSON, or holds a member twice in one object (readers differ
            on which counts), or nesting that Python's parser gives up on.
    """
    repeated = False

    def members(pairs: list[tuple[str, object]]) -> dict[str, object]:
        nonlocal repeated
        found = dict(pairs)
        if len(found) != len(pairs):
            repeated = True
            seen = set[str]()
            for name, _ in pairs:
                if name in seen:
                    found[name] = _REPEATED
                seen.add(name)
        return found

    try:
        if isinstance(text, bytes):
            text = text.decode()
        document: object = json.loads(text, object_pairs_hook=members)
    except RecursionError:
        raise InvalidParameterError(f"invalid {what}: nested deeper than {MAX_DEPTH} levels") from None
    except UnicodeDecodeError as error:
        raise InvalidParameterError(f"invalid {what}: not UTF-8 text: {error}") from error
    except ValueError as error:
        raise InvalidParameterError(f"invalid {what}: not JSON: {error}") from error
    if repeated:
        raise InvalidParameterError(f"invalid {what}: {_find(document)} occurs twice in one object")
    return document


def _find(document: object) -> str:
    """Find the path of a repeated member."""
    pending: list[tuple[str, object]] = [("", document)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, _Repeated):
            return path
        if isinstance(value, dict):
            pending.extend((join(path, key), item) for key, item in value.items())
        elif isinstance(value, list):
            pending.extend((f"{path}[{index}]", item) for index, item in enumerate(value))
    # A member that repeats itself inside a member that is itself repeated is overwritten with it; only then
    # is none left.
    return "a member"


class UnreadableError(Exception):
    """A value that cannot become JSON; the steps to it are collected on the way out, innermost first."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.steps: list[int | str] = []


def plain(value: object) -> object:
    """Copy mappings and models of any kind as `dict`, and lists as `list`; leave the rest as it is.

    Raises:
        UnreadableError: for a string that is not Unicode text, and for nesting and size that no document has,
            as a cycle has, or lists that hold each other over and over.
    """
    return _Copier().copy(value, 0)


class _Copier:
    __slots__ = ("_containers",)

    def __init__(self) -> None:
        self._containers = 0

    def copy(self, value: object, depth: int) -> object:
        # The common types first: every spec that comes as a mapping passes here, and abstract classes are
        # slow to ask.
        if isinstance(value, str):
            return _text(value)
        if isinstance(value, dict) or isinstance(value, list):  # noqa: SIM101 (twice as fast as a union)
            return self._container(value, depth)
        if isinstance(value, int) or value is None:
            return value
        if isinstance(value, Model):
            return self._container(_members(value), depth)
        if isinstance(value, Mapping):
            return self._container(value, depth)
        return value

    def _container(self, value: list[object] | Mapping[str, object], depth: int) -> object:
        if depth > 2 * MAX_DEPTH:
            raise UnreadableError(f"is nested deeper than {MAX_DEPTH} levels")
        self._containers += 1
        if self._containers > _MOST_CONTAINERS:
            raise UnreadableError(f"takes the document beyond {_MOST_CONTAINERS} arrays and objects")
        step: object = 0
        try:
            if isinstance(value, list):
                items: list[object] = []
                for step, item in enumerate(value):  # noqa: B007 (for the path of an error)
                    items.append(self.copy(item, depth + 1))
                return items
            members: dict[object, object] = {}
            for step, item in value.items():
                members[_text(step)] = self.copy(item, depth + 1)
        except UnreadableError as error:
            error.steps.append(step if isinstance(step, int) else _printable(step))
            raise
        return members


def _text(value: object) -> object:
    if isinstance(value, str) and not is_text(value):
        raise UnreadableError("must be Unicode text, and holds a lone surrogate")
    return value


def _printable(key: object) -> str:
    return key if isinstance(key, str) and is_text(key) else ascii(key)


def _members(model: Model) -> dict[str, object]:
    fields = type(model).model_fields
    members = {
        fields[name].alias or name: getattr(model, name) for name in model.model_fields_set if name in fields
    }
    return members | (model.model_extra or {})
