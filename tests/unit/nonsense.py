"""Draws answers that no containerd gives: of wrong types, of absurd values, cut short, or of bytes that mean nothing."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Final, Protocol

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

from tests.unit.server import Step, fail, say

_MOST_DEPTH: Final = 3
_CODES: Final = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]

# What servers say, and what this library reads words from; the rest is any text.
_TEXTS: Final = [
    "",
    "not found",
    "process already finished: not found",
    "cannot delete a running process: unknown",
    "OCI runtime exec failed: exec failed: no such file or directory",
    "ttrpc: closed: unknown",
    "id already exists",
    "%s %(name)s {0} {name}",
    "x" * 3000,
]

names = st.one_of(
    st.sampled_from(["", "web", "..", "../../etc/passwd", "/", "a/b", "init", "a" * 77, "\0", "x" * 5000]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
times = st.one_of(
    st.sampled_from([0, -1, -62135596800, -62135596801, 253402300799, 253402300800, 2**63 - 1, -(2**63)]),
    st.integers(-(2**63), 2**63 - 1),
)
words = st.one_of(st.sampled_from([0, 1, 255, 256, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1))
errors = st.builds(
    fail,
    st.sampled_from(_CODES),
    st.one_of(st.sampled_from(_TEXTS), st.text(st.characters(exclude_categories=["Cs"]), max_size=40)),
)


class _Field(Protocol):
    """As much of a field's descriptor as is looked at; protobuf has several classes of them."""

    @property
    def type(self) -> int: ...
    @property
    def cpp_type(self) -> int: ...


def _scalar(field: _Field) -> st.SearchStrategy[object]:
    kinds: dict[int, st.SearchStrategy[object]] = {
        FieldDescriptor.CPPTYPE_STRING: st.binary(max_size=40)
        if field.type == FieldDescriptor.TYPE_BYTES
        else names,
        FieldDescriptor.CPPTYPE_UINT32: words,
        FieldDescriptor.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1),
        FieldDescriptor.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
        FieldDescriptor.CPPTYPE_INT64: times,
        FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
        FieldDescriptor.CPPTYPE_DOUBLE: st.floats(),
        FieldDescriptor.CPPTYPE_ENUM: st.sampled_from([0, 1, 2, 3, 4, 5, 6, 99, 2**31 - 1, -1]),
    }
    return kinds[field.cpp_type]


def _fill(draw: st.DrawFn, message: Message, depth: int = 0) -> None:
    for field in message.DESCRIPTOR.fields:
        if not draw(st.booleans()):
            continue
        value = getattr(message, field.name)
        if isinstance(value, Message):
            value.SetInParent()
            if depth < _MOST_DEPTH:
                _fill(draw, value, depth + 1)
        elif isinstance(value, MutableMapping):
            if not hasattr(value, "get_or_create"):  # one of messages, which no answer to us has
                value[draw(names)] = draw(names)
        elif hasattr(value, "extend"):
            for _ in range(draw(st.integers(0, 4))):
                if field.message_type is None:
                    value.append(draw(_scalar(field)))
                elif depth < _MOST_DEPTH:
                    _fill(draw, value.add(), depth + 1)
        else:
            setattr(message, field.name, draw(_scalar(field)))


@st.composite
def messages(draw: st.DrawFn, kind: type[Message]) -> bytes:
    """A message of a kind, any fields missing and the others at their types' limits, perhaps damaged."""
    message = kind()
    _fill(draw, message)
    data = bytearray(message.SerializeToString())
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    if draw(st.sampled_from([False, False, False, True])):
        del data[draw(st.integers(0, len(data))) :]
    return bytes(data)


def answers(kind: type[Message], others: list[type[Message]]) -> st.SearchStrategy[Step]:
    """What a server that has lost its mind may do instead of answering with a message of a kind."""
    wrong = st.sampled_from(others).flatmap(messages)
    return st.one_of(errors, messages(kind).map(say), wrong.map(say), st.binary(max_size=200).map(say))
