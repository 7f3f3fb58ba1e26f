"""The errors that this library raises, and the one translation from gRPC's.

Each message says what was being done to which container. The gRPC error that caused one is chained to it
(``__cause__``). No verb lets a ``grpc.RpcError`` or a bare ``OSError`` out.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import grpc


class LibcontainerdError(Exception):
    """What every error of this library is."""


class NotFoundError(LibcontainerdError, LookupError):
    """There is no such container, task, exec or process, here or in containerd."""


class ConflictError(LibcontainerdError):
    """The id is taken, or the container is already started."""


class InvalidParameterError(LibcontainerdError, ValueError):
    """An argument cannot be used: a malformed id, a spec that does not validate, a program that is not there."""


class FailedPreconditionError(LibcontainerdError):
    """The container is not in a state that allows this, such as a deletion while its task exists."""


class UnavailableError(LibcontainerdError, ConnectionError):
    """containerd cannot be reached, or the connection broke before it answered. The outcome is unknown."""


class DeadlineExceededError(LibcontainerdError, TimeoutError):
    """The deadline passed before an answer came. The outcome is unknown; it does not mean that a process is dead."""


class CallCancelledError(LibcontainerdError):
    """The call was cut short by ``close()``."""


class PermissionDeniedError(LibcontainerdError, PermissionError):
    """This user may not do that: containerd's socket is usually root's alone."""


class NotImplementedByServerError(LibcontainerdError):
    """This containerd does not serve the call."""


class SystemFailureError(LibcontainerdError):
    """Something failed below: in containerd, the shim, the runtime or the kernel."""


_BY_CODE: Final[dict[str, type[LibcontainerdError]]] = {
    "NOT_FOUND": NotFoundError,
    "ALREADY_EXISTS": ConflictError,
    "INVALID_ARGUMENT": InvalidParameterError,
    "OUT_OF_RANGE": InvalidParameterError,
    "FAILED_PRECONDITION": FailedPreconditionError,
    "UNAVAILABLE": UnavailableError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "CANCELLED": CallCancelledError,
    "PERMISSION_DENIED": PermissionDeniedError,
    "UNAUTHENTICATED": PermissionDeniedError,
    "UNIMPLEMENTED": NotImplementedByServerError,
}

# Shim and runtime errors reach containerd as plain text, and it answers UNKNOWN. These are the texts that 1.6 to 2.x
# are known to send, most telling first: a runtime's report of a missing program says "not found" as well.
_PROGRAM_UNUSABLE: Final = re.compile(
    r"(?:unable to start container process|OCI runtime (?:create|exec|start) failed|exec failed).*"
    r"(?:executable file (?:\S+ )?not found|no such file or directory|permission denied|is a directory|not a directory"
    r"|exec format error)",
    re.IGNORECASE,  # crun capitalizes
)
_WRONG_STATE: Final = re.compile(
    r"cannot (?:\w+ )+in a \w+ state|cannot (?:\w+ )+a (?:running|stopped|deleted|paused|created)"
    r"|cannot (?:pause|resume)|not paused|bad file descriptor|unable to set memory limit"
)
_NOT_THERE: Final = re.compile(
    r"container does not exist|process already finished|no such (?:container|process|exec|task)|not found"
    r"|does not exist|container not running"
)

_BY_TEXT_OF_UNKNOWN: Final[tuple[tuple[re.Pattern[str], type[LibcontainerdError]], ...]] = (
    (_PROGRAM_UNUSABLE, InvalidParameterError),
    (_WRONG_STATE, FailedPreconditionError),
    (re.compile(r"CRIU version check failed|criu failed|OCI runtime restore failed"), SystemFailureError),
    (re.compile(r"ttrpc: closed|transport is closing|connection refused"), UnavailableError),
    (re.compile(r"context deadline exceeded"), DeadlineExceededError),
    (re.compile(r"OCI runtime (?:create|exec|start) failed"), SystemFailureError),
    (re.compile(r"already exists"), ConflictError),
    (_NOT_THERE, NotFoundError),
)

_ADVICE: Final[dict[type[LibcontainerdError], str]] = {
    UnavailableError: "is containerd running, and is this its socket?",
    NotImplementedByServerError: "is this containerd's socket, and is it of version 1.6 or newer?",
    PermissionDeniedError: "run as root, or give this user access to the socket",
}


def translate(error: grpc.RpcError, doing: str) -> LibcontainerdError:
    """Say a gRPC error in this library's words; raise the result ``from`` the original.

    The class follows the status code. The text is looked at only where the code is UNKNOWN, which is what containerd
    answers for anything that the shim or the runtime reported.

    Args:
        error: What grpcio raised; its ``code()`` and ``details()`` are read.
        doing: What was being done to what, such as ``"start container 'web'"``.
    """
    code, details = error.code().name, (error.details() or "").strip()
    kind = _BY_CODE.get(code, SystemFailureError)
    if code == "UNKNOWN":
        kind = next(
            (cls for pattern, cls in _BY_TEXT_OF_UNKNOWN if pattern.search(details)), SystemFailureError
        )
    message = f"cannot {doing}: {details or code}"
    if advice := _ADVICE.get(kind):
        message = f"{message} ({advice})"
    return kind(message)
