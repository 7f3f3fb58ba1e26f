"""containerd's rule for identifiers, checked here so that no path is made of a bad one."""

from __future__ import annotations

import re
from typing import Final

from libcontainerd.errors import InvalidParameterError

MAX_LENGTH: Final = 76
"""Characters of the longest identifier that containerd takes."""

_IDENTIFIER: Final = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*", re.ASCII)


def is_identifier(value: str) -> bool:
    """Whether containerd would take it for one."""
    return len(value) <= MAX_LENGTH and _IDENTIFIER.fullmatch(value) is not None


def is_text(value: object) -> bool:
    """Whether containerd can be told it as a string, and the kernel as part of a path."""
    try:
        return isinstance(value, str) and "\0" not in value and value.encode() is not None
    except UnicodeEncodeError:
        return False


def check_identifier(kind: str, value: str) -> None:
    """Refuse what containerd refuses (its ``identifiers.Validate``): 76 characters at most, alphanumeric groups.

    Args:
        kind: What it names, for the message: ``"container id"``.
        value: The identifier.

    Raises:
        InvalidParameterError: it is not a string, too long, or made otherwise.
    """
    if not isinstance(value, str):
        raise InvalidParameterError(f"a {kind} is a string, not {type(value).__name__}")
    if not value or len(value) > MAX_LENGTH:
        raise InvalidParameterError(
            f"{kind} {value[:80]!r} has {len(value)} characters: it needs 1 to {MAX_LENGTH}"
        )
    if not _IDENTIFIER.fullmatch(value):
        raise InvalidParameterError(
            f"{kind} {value!r} is not valid: it is made of letters and digits, in groups joined by single '.', '_' or '-'"
        )
