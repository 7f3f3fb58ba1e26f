"""What an Any holds, named the way containerd names it.

Elsewhere a message in an Any has the URL ``type.googleapis.com/<full name>``, and protobuf's own ``Pack``, ``Unpack``
and ``Is`` insist on something before a slash. containerd writes the bare full name (``containerd.events.TaskExit``), and
for the OCI's types, which are no messages, a URL of its own with JSON as the value. Both are settled by containerd's
typeurl package. Reading takes a prefix as well, because containerd itself does.

Everything here is pure and safe to call from any thread.
"""

import json
from typing import TYPE_CHECKING, Protocol, TypeVar

from google.protobuf import message as protobuf_message

from libcontainerd._wire.pb import wellknown_pb2

if TYPE_CHECKING:
    from google.protobuf.message import Message

_JSON_PREFIX = "types.containerd.io/"
SPEC_URL = _JSON_PREFIX + "opencontainers/runtime-spec/1/Spec"
PROCESS_URL = _JSON_PREFIX + "opencontainers/runtime-spec/1/Process"
LINUX_RESOURCES_URL = _JSON_PREFIX + "opencontainers/runtime-spec/1/LinuxResources"

_M = TypeVar("_M", bound="Message")


class Packed(Protocol):
    """An Any of whatever descriptor pool: ours, protobuf's default one, or another."""

    @property
    def type_url(self) -> str:
        """Names what ``value`` holds."""

    @property
    def value(self) -> bytes:
        """The message or the JSON, serialized."""


class DecodeError(ValueError):
    """An Any holds something else than was asked for, or bytes that do not decode as what it says."""


def pack(message: "Message") -> wellknown_pb2.Any:
    """Packs a message under its bare full name.

    Args:
        message: Of any descriptor pool, such as the user's own copy of ``containerd.runc.v1.Options``.
    """
    return wellknown_pb2.Any(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


def pack_json(url: str, document: bytes) -> wellknown_pb2.Any:
    """Packs a JSON document.

    Args:
        url: One of the three above.
        document: UTF-8, passed on as it is.
    """
    return wellknown_pb2.Any(type_url=url, value=document)


def name_of(packed: Packed) -> str:
    """Returns what an Any says it holds: a message's full name, or containerd's URL of a JSON type.

    The name is the sender's; it may be empty or absurd.
    """
    url = packed.type_url
    return url if url.startswith(_JSON_PREFIX) else url.rpartition("/")[2]


def is_a(packed: Packed, kind: "type[Message]") -> bool:
    """Tells whether an Any says that it holds a message of this kind; its bytes may still not decode."""
    return name_of(packed) == kind.DESCRIPTOR.full_name


def unpack(packed: Packed, kind: type[_M]) -> _M:
    """Returns the message in an Any.

    Args:
        packed: As received.
        kind: The class expected, of any descriptor pool.

    Raises:
        DecodeError: It holds something else, or its bytes are no such message.
    """
    if not is_a(packed, kind):
        raise DecodeError(f"expected {kind.DESCRIPTOR.full_name}, received {name_of(packed)[:200]!r}")
    try:
        return kind.FromString(packed.value)
    except (protobuf_message.DecodeError, ValueError, RecursionError) as error:
        # The last two come from protobuf in pure Python: bad UTF-8, and groups nested without end.
        raise DecodeError(
            f"{len(packed.value)} bytes do not decode as {kind.DESCRIPTOR.full_name}"
        ) from error


def unpack_json(packed: Packed, url: str) -> dict[str, object]:
    """Returns the JSON object in an Any.

    Args:
        packed: As received.
        url: The type expected, one of the three above.

    Raises:
        DecodeError: It holds something else, or its bytes are no JSON object.
    """
    if name_of(packed) != url:
        raise DecodeError(f"expected {url}, received {name_of(packed)[:200]!r}")
    try:
        document = json.loads(packed.value)
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"{len(packed.value)} bytes do not decode as the JSON of {url}") from error
    if not isinstance(document, dict):
        raise DecodeError(f"the JSON of {url} is no object")
    return document
