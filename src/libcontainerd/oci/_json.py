"""Reading what others wrote, as JSON text or as Python values, without the leniencies of the standard library."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import NoReturn

from libcontainerd.errors import InvalidParameterError
from libcontainerd.oci._base import MAX_DEPTH, Model, is_text, join


class _Repeated:
    """Stands in for the value of a member that occurred twice, until its path is known."""

    __slots__ = ()


_REPEATED = _Repeated()


def loads(text: str | bytes, what: str) -> object:
    """Read one JSON document, strictly by RFC 8259.

    Args:
        text: The document; bytes are UTF-8.
        what: What the document is, for messages: `spec`.

    Returns:
        Plain `dict`, `list`, `str`, `int`, `float`, `bool` and `None`.

    Raises:
        InvalidParameterError: if the text is not JSON, or holds a member twice in one object (readers differ on which
            counts), NaN or an infinity, or nesting that Python's parser gives up on.
    """
    repeated: list[tuple[dict[str, object], str]] = []

    def members(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for index, name in enumerate(names) if name in names[:index])
            found[twice] = _REPEATED
            repeated.append((found, twice))
        return found

    def constant(name: str) -> NoReturn:
        raise InvalidParameterError(f"invalid {what}: JSON has no number {name}")

    def number(literal: str) -> float:
        value = float(literal)
        if not math.isfinite(value):
            raise InvalidParameterError(f"invalid {what}: the number {literal[:40]} is too large")
        return value

    try:
        if isinstance(text, bytes):
            text = text.decode()
        document: object = json.loads(
            text, object_pairs_hook=members, parse_constant=constant, parse_float=number
        )
    except InvalidParameterError:
        raise
    except RecursionError:
        raise InvalidParameterError(f"invalid {what}: nested deeper than {MAX_DEPTH} levels") from None
    except UnicodeDecodeError as error:
        raise InvalidParameterError(f"invalid {what}: not UTF-8 text: {error}") from error
    except ValueError as error:
        raise InvalidParameterError(f"invalid {what}: not JSON: {error}") from error
    if repeated:
        path = _find(document)
        raise InvalidParameterError(f"invalid {what}: {path} occurs twice in one object")
    return document


def _find(document: object) -> str:
    """Find the path of the first repeated member; it nests no deeper than the parser, so a stack of our own does."""
    pending: list[tuple[str, object]] = [("", document)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, _Repeated):
            return path
        if isinstance(value, dict):
            pending.extend((join(path, key), item) for key, item in value.items())
        elif isinstance(value, list):
            pending.extend((f"{path}[{index}]", item) for index, item in enumerate(value))
    # A member that repeats itself inside a member that is itself repeated is overwritten with it; only then is none left.
    return "a member"


class UnreadableError(Exception):
    """A value that cannot become JSON; the steps to it are collected on the way out, innermost first."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.steps: list[int | str] = []


def plain(value: object, depth: int = 0) -> object:
    """Copy mappings and models of any kind as `dict`, and lists as `list`; leave the rest for the models to judge.

    Raises:
        UnreadableError: for a string that is not Unicode text, and for nesting that no document has, such as a cycle.
    """
    # The common types first: every spec that comes as a mapping passes here, and abstract classes are slow to ask.
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, dict) or isinstance(value, list):  # noqa: SIM101 (twice as fast as a union)
        return _copied(value, depth)
    if isinstance(value, int) or value is None:
        return value
    if isinstance(value, Model):
        return _copied(_members(value), depth)
    if isinstance(value, Mapping):
        return _copied(value, depth)
    return value


def _text(value: object) -> object:
    if isinstance(value, str) and not is_text(value):
        raise UnreadableError("must be Unicode text, and holds a lone surrogate")
    return value


def _copied(value: list[object] | Mapping[str, object], depth: int) -> object:
    if depth > 2 * MAX_DEPTH:
        raise UnreadableError(f"is nested deeper than {MAX_DEPTH} levels")
    step: object = 0
    try:
        if isinstance(value, list):
            items: list[object] = []
            for step, item in enumerate(value):  # noqa: B007 (for the path of an error)
                items.append(plain(item, depth + 1))
            return items
        members: dict[object, object] = {}
        for step, item in value.items():
            members[_text(step)] = plain(item, depth + 1)
    except UnreadableError as error:
        error.steps.append(step if isinstance(step, int) else _printable(step))
        raise
    return members


def _printable(key: object) -> str:
    return key if isinstance(key, str) and is_text(key) else ascii(key)


def _members(model: Model) -> dict[str, object]:
    fields = type(model).model_fields
    members = {
        fields[name].alias or name: getattr(model, name) for name in model.model_fields_set if name in fields
    }
    return members | (model.model_extra or {})
