"""Reading JSON text that others wrote, without the leniencies of the standard library."""

from __future__ import annotations

import json
import math
from typing import NoReturn

from libcontainerd.errors import InvalidParameterError
from libcontainerd.oci._base import MAX_DEPTH, join


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
