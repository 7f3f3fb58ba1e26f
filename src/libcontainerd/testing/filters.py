"""containerd's filter syntax: ``namespace==moby,topic~=|^/tasks/|``.

A filter is a list of selectors joined by commas, all of which must match; of several filters one suffices. A selector is a
field's path, which asks whether it is there, or a path, one of ``==``, ``!=`` and ``~=``, and a value. A value is quoted with
``"``, or for ``~=`` also with ``/`` or ``|``, or is a run of characters without white space, commas and quotes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

Lookup = Callable[[Sequence[str]], str | None]
"""Gives a field's value by its path, or None where there is no such field."""

_FIELD: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_OPERATOR: Final = re.compile(r"[=!~]+")
_VALUE: Final = re.compile(r"[^\s,\"/|]+")
_UNQUOTED_REST: Final = re.compile(r"[^\s,]*")
_OPERATORS: Final = ("==", "!=", "~=")


class FilterError(ValueError):
    """A filter does not parse; the text is containerd's."""


@dataclass(frozen=True, slots=True)
class Selector:
    """One condition."""

    path: tuple[str, ...]
    operator: str = ""
    value: str = ""

    def matches(self, lookup: Lookup) -> bool:
        """Whether an object fulfils it."""
        found = lookup(self.path)
        if self.operator == "==":
            return found is not None and found == self.value
        if self.operator == "!=":
            return found is None or found != self.value
        if self.operator == "~=":
            try:
                return found is not None and re.search(self.value, found) is not None
            except re.error:
                return False  # as containerd: logged there, and no match
        return found is not None


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def parse(self) -> tuple[Selector, ...]:
        selectors = [self._selector()]
        while self._at < len(self._text):
            if self._text[self._at] != ",":
                raise self._error(self._at, f"unexpected input: {self._text[self._at]}")
            self._at += 1
            selectors.append(self._selector())
        return tuple(selectors)

    def _error(self, at: int, reason: str) -> FilterError:
        text = self._text
        shown = text if at >= len(text) else f"{text[:at]} >|{text[at]}|< {text[at + 1 :]}"
        return FilterError(f"filters: parse error: [{shown}]: {reason}: invalid argument")

    def _selector(self) -> Selector:
        path = [self._field()]
        while self._at < len(self._text) and self._text[self._at] == ".":
            self._at += 1
            path.append(self._field())
        if self._at == len(self._text) or self._text[self._at] == ",":
            return Selector(tuple(path))
        operator = self._operator()
        return Selector(tuple(path), operator, self._value(operator))

    def _skip_space(self) -> None:
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1

    def _field(self) -> str:
        self._skip_space()
        if self._text[self._at : self._at + 1] == '"':
            return self._quoted('"')
        if match := _FIELD.match(self._text, self._at):
            self._at = match.end()
            return match.group()
        raise self._error(self._at, "expected field or quoted")

    def _operator(self) -> str:
        self._skip_space()
        match = _OPERATOR.match(self._text, self._at)
        if match is None:
            raise self._error(self._at, 'expected an operator ("=="|"!="|"~=")')
        if match.group() not in _OPERATORS:
            raise self._error(self._at, f'unsupported operator "{match.group()}"')
        self._at = match.end()
        return match.group()

    def _value(self, operator: str) -> str:
        self._skip_space()
        first = self._text[self._at : self._at + 1]
        if first == '"':
            return self._quoted(first)
        if first in ("/", "|") and first:
            if self._text.find(first, self._at + 1) < 0:
                raise self._error(self._at, "quoted literal not terminated")
            if operator != "~=":
                raise self._error(self._at, "invalid quote encountered")
            return self._quoted(first)
        match = _VALUE.match(self._text, self._at)
        if match is None:
            raise self._error(self._at, "expected value or quoted")
        rest = _UNQUOTED_REST.match(self._text, match.end())
        self._at = match.end() if rest is None else rest.end()
        return self._text[match.start() : self._at]

    def _quoted(self, quote: str) -> str:
        start = self._at
        self._at += 1
        taken: list[str] = []
        while self._at < len(self._text):
            char = self._text[self._at]
            if char == quote:
                self._at += 1
                return "".join(taken)
            if char == "\\" and self._at + 1 < len(self._text):
                self._at += 1
                escaped = self._text[self._at]
                # Between slashes and bars the text is a regular expression, whose escapes are its own.
                char = escaped if quote in (escaped, '"') else f"\\{escaped}"
            taken.append(char)
            self._at += 1
        raise self._error(start, "quoted literal not terminated")


class Filters:
    """Filters of which one must match; no filter at all matches everything.

    Args:
        texts: As a request holds them.

    Raises:
        FilterError: one does not parse.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._filters = [() if not text else _Parser(text).parse() for text in texts]

    def match(self, lookup: Lookup) -> bool:
        """Whether an object passes."""
        return not self._filters or any(
            all(selector.matches(lookup) for selector in selectors) for selectors in self._filters
        )


def fields(values: Mapping[str, str], labels: Mapping[str, str] | None = None) -> Lookup:
    """Make a lookup of plain fields, given by their dotted paths, and of labels.

    A field that is empty is not there, but a label may be empty.
    """

    def look_up(path: Sequence[str]) -> str | None:
        if path[0] == "labels" and labels is not None:
            return labels.get(".".join(path[1:]))
        return values.get(".".join(path)) or None

    return look_up
