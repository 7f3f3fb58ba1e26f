"""libcontainerd: drive containerd from Python, the way the Docker daemon does.

Make a `Client` (or a `Remote`, which starts a private containerd and makes clients for it), give it a `Backend`, and
call its verbs. `cio` says what becomes of stdio, `oci` makes specs, `backends` has backends ready-made.
"""

from __future__ import annotations

import typing as _typing

from libcontainerd import backends, cio
from libcontainerd.client import Client
from libcontainerd.errors import (
    CallCancelledError,
    ConflictError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidParameterError,
    LibcontainerdError,
    NotFoundError,
    NotImplementedByServerError,
    PermissionDeniedError,
    SystemFailureError,
    UnavailableError,
)
from libcontainerd.remote import Remote
from libcontainerd.types import (
    INIT_PROCESS_NAME,
    Backend,
    EventInfo,
    EventType,
    ExitStatus,
    Restored,
    Status,
    Summary,
    Version,
)

if _typing.TYPE_CHECKING:
    from libcontainerd import oci
    from libcontainerd.stats import Stats, Usage

__all__ = [
    "INIT_PROCESS_NAME",
    "Backend",
    "CallCancelledError",
    "Client",
    "ConflictError",
    "DeadlineExceededError",
    "EventInfo",
    "EventType",
    "ExitStatus",
    "FailedPreconditionError",
    "InvalidParameterError",
    "LibcontainerdError",
    "NotFoundError",
    "NotImplementedByServerError",
    "PermissionDeniedError",
    "Remote",
    "Restored",
    "Stats",
    "Status",
    "Summary",
    "SystemFailureError",
    "UnavailableError",
    "Usage",
    "Version",
    "backends",
    "cio",
    "oci",
]


_LATE: _typing.Final = {"Stats": "libcontainerd.stats", "Usage": "libcontainerd.stats"}
"""Names that few ask for, and where they are."""


def __getattr__(name: str) -> object:
    """Import `oci` when it is first asked for: its models cost more than the rest together; and what else can wait."""
    from importlib import import_module  # noqa: PLC0415 - only for whoever asks for these

    if name == "oci":
        return import_module("libcontainerd.oci")
    if name in _LATE:
        value: object = getattr(import_module(_LATE[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'libcontainerd' has no attribute {name!r}")
