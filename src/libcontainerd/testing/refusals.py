"""How containerd says no: a status code, and a text made as its own."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import grpc

if TYPE_CHECKING:
    from collections.abc import Mapping

    from libcontainerd.testing.releases import Release

_NAMESPACE_HEADER: Final = "containerd-namespace"
_LEASE_HEADER: Final = "containerd-lease"
_MAX_LENGTH: Final = 76
_PATTERN: Final = "^[A-Za-z0-9]+(?:[._-](?:[A-Za-z0-9]+))*$"
_IDENTIFIER: Final = re.compile(_PATTERN[:-1], re.ASCII)
_ONE_ERROR: Final = re.compile(r"1 error occurred:\n\t\* (.*)\n\n")
_MAX_LABEL_BYTES: Final = 4096
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}|sha384:[0-9a-f]{96}|sha512:[0-9a-f]{128}")


class Refusal(Exception):  # noqa: N818 - it is what becomes of a call, not a mistake of this program
    """Ends a call with a status code and a text.

    Attributes:
        code: gRPC's status code.
        details: The text, as containerd 1.6 sends it.
    """

    def __init__(
        self, code: grpc.StatusCode, details: str, *, since_1_7: str = "", since_2: str = ""
    ) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details
        self._since_1_7 = since_1_7 or details
        self._since_2 = since_2 or self._since_1_7

    def within(self, doing: str, code: grpc.StatusCode | None = None) -> Refusal:
        """The same, with what it was that was being done before its text, and maybe with another code."""
        return Refusal(
            code or self.code,
            f"{doing}{self.details}",
            since_1_7=f"{doing}{self._since_1_7}",
            since_2=f"{doing}{self._since_2}",
        )

    def said_by(self, release: Release) -> str:
        """The text as a release of containerd sends it."""
        if release.number < (1, 7):
            return self.details
        if release.number < (2, 0):
            return self._since_1_7
        # 2.x joins errors in another way, and has no name for those of the class "unknown".
        return _ONE_ERROR.sub(r"\1", self._since_2).removesuffix(": unknown")


# containerd's error classes end the text with their own names; what the shim and the runtime say ends with "unknown".


def not_found(text: str) -> Refusal:
    """Something that is not there."""
    return Refusal(grpc.StatusCode.NOT_FOUND, f"{text}: not found")


def already_exists(text: str) -> Refusal:
    """An id that is taken."""
    return Refusal(grpc.StatusCode.ALREADY_EXISTS, f"{text}: already exists")


def invalid_argument(text: str) -> Refusal:
    """An argument that cannot be used."""
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"{text}: invalid argument")


def failed_precondition(text: str) -> Refusal:
    """A state that does not allow it."""
    return Refusal(grpc.StatusCode.FAILED_PRECONDITION, f"{text}: failed precondition")


def unimplemented(text: str) -> Refusal:
    """Something that is not served."""
    return Refusal(grpc.StatusCode.UNIMPLEMENTED, text)


def unknown(text: str) -> Refusal:
    """Whatever the shim or the runtime reports: containerd knows no code for it."""
    return Refusal(grpc.StatusCode.UNKNOWN, f"{text}: unknown")


def closing() -> Refusal:
    """The server goes away."""
    return Refusal(grpc.StatusCode.UNAVAILABLE, "transport is closing")


def identifier_fault(value: str) -> str:
    """Say what containerd's identifier rule has against a value; nothing if it is fine."""
    if not value:
        return "identifier must not be empty"
    if len(value) > _MAX_LENGTH:
        return f'identifier "{value}" greater than maximum length ({_MAX_LENGTH} characters)'
    if not _IDENTIFIER.fullmatch(value):
        return f'identifier "{value}" must match {_PATTERN}'
    return ""


def check_labels(labels: Mapping[str, str], what: str) -> None:
    """Refuse labels that containerd would not keep.

    Raises:
        Refusal: one is too long.
    """
    for key, value in labels.items():
        length = len(key.encode()) + len(value.encode())
        if length > _MAX_LABEL_BYTES:
            before, limit = (
                f"{what}.Labels: label key and value",
                f"greater than maximum size ({_MAX_LABEL_BYTES} bytes)",
            )
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"{before} {limit}, key: {key[:10]}: invalid argument",
                since_1_7=f"{before} length ({length} bytes) {limit}, key: {key[:64]}: invalid argument",
            )


def is_digest(value: str) -> bool:
    """Whether a text is a digest as the OCI writes them."""
    return _DIGEST.fullmatch(value) is not None


def _header(context: grpc.ServicerContext, name: str) -> str:
    for key, value in context.invocation_metadata():
        if key == name:
            return value if isinstance(value, str) else value.decode()
    return ""


def namespace_in(context: grpc.ServicerContext) -> str:
    """The namespace that a call names, or nothing."""
    return _header(context, _NAMESPACE_HEADER)


def lease_in(context: grpc.ServicerContext) -> str:
    """The lease that a call works under, or nothing."""
    return _header(context, _LEASE_HEADER)


def namespace_of(context: grpc.ServicerContext) -> str:
    """The namespace that a call works in.

    Raises:
        Refusal: it names none, or no valid one.
    """
    namespace = namespace_in(context)
    if not namespace:
        raise failed_precondition("namespace is required")
    if fault := identifier_fault(namespace):
        raise invalid_argument(f"namespace validation: {fault}")
    return namespace
