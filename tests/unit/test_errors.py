"""The errors: their hierarchy, and the one translation from gRPC's codes and containerd's texts."""

from __future__ import annotations

import inspect

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libcontainerd import errors
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
    translate,
)

Kind = type[LibcontainerdError]


class Answer(grpc.RpcError):
    """What grpcio raises: an error that is also the call."""

    def __init__(self, code: grpc.StatusCode, details: str | None) -> None:
        super().__init__(code, details)
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details


# ------------------------------------------------------------------------------------------------------------- hierarchy


@pytest.mark.parametrize(
    ("kind", "also"),
    [
        (NotFoundError, LookupError),
        (ConflictError, Exception),
        (InvalidParameterError, ValueError),
        (FailedPreconditionError, Exception),
        (UnavailableError, ConnectionError),
        (DeadlineExceededError, TimeoutError),
        (CallCancelledError, Exception),
        (PermissionDeniedError, PermissionError),
        (NotImplementedByServerError, Exception),
        (SystemFailureError, Exception),
    ],
)
def test_each_error_is_ours_and_the_builtin_that_it_stands_for(kind: Kind, also: type[Exception]) -> None:
    error = kind("cannot start container 'web': no")
    assert isinstance(error, LibcontainerdError)
    assert isinstance(error, also)
    assert str(error) == "cannot start container 'web': no"
    assert error.__doc__


def test_no_error_is_another() -> None:
    kinds = [
        each
        for _, each in inspect.getmembers(errors, inspect.isclass)
        if issubclass(each, LibcontainerdError) and each is not LibcontainerdError
    ]
    assert len(kinds) == 10
    assert not [(one, two) for one in kinds for two in kinds if one is not two and issubclass(one, two)]
    builtins = [OSError, LookupError, ValueError]
    assert not [builtin for builtin in builtins if issubclass(SystemFailureError, builtin)]


# ------------------------------------------------------------------------------------------------------------------ codes

BY_CODE: dict[grpc.StatusCode, Kind] = {
    grpc.StatusCode.CANCELLED: CallCancelledError,
    grpc.StatusCode.UNKNOWN: SystemFailureError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidParameterError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: ConflictError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNAUTHENTICATED: PermissionDeniedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: SystemFailureError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.ABORTED: SystemFailureError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidParameterError,
    grpc.StatusCode.UNIMPLEMENTED: NotImplementedByServerError,
    grpc.StatusCode.INTERNAL: SystemFailureError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DATA_LOSS: SystemFailureError,
}


def test_the_table_has_every_code() -> None:
    assert set(BY_CODE) == set(grpc.StatusCode) - {grpc.StatusCode.OK}


@pytest.mark.parametrize("code", BY_CODE)
def test_each_code_has_its_class(code: grpc.StatusCode) -> None:
    error = translate(Answer(code, "because"), "pause container 'web'")
    assert type(error) is BY_CODE[code]
    assert str(error).startswith("cannot pause container 'web': because")


@pytest.mark.parametrize("code", BY_CODE)
@pytest.mark.parametrize("details", ["", "  ", None])
def test_an_answer_without_words_is_named_by_its_code(code: grpc.StatusCode, details: str | None) -> None:
    error = translate(Answer(code, details), "pause container 'web'")
    assert type(error) is BY_CODE[code]
    assert str(error).startswith(f"cannot pause container 'web': {code.name}")


@given(
    code=st.sampled_from([each for each in BY_CODE if each is not grpc.StatusCode.UNKNOWN]), details=st.text()
)
def test_the_text_decides_nothing_but_for_unknown(code: grpc.StatusCode, details: str) -> None:
    for text in (details, f"{details} not found already exists context deadline exceeded {details}"):
        assert type(translate(Answer(code, text), "do it")) is BY_CODE[code]


@given(details=st.text())
def test_any_text_of_unknown_gives_one_of_our_errors(details: str) -> None:
    error = translate(Answer(grpc.StatusCode.UNKNOWN, details), "do it")
    assert isinstance(error, LibcontainerdError)
    assert details.strip() in str(error)


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (grpc.StatusCode.UNAVAILABLE, "is containerd running"),
        (grpc.StatusCode.PERMISSION_DENIED, "run as root"),
        (grpc.StatusCode.UNIMPLEMENTED, "1.6 or newer"),
        (grpc.StatusCode.NOT_FOUND, ""),
    ],
)
def test_what_the_reader_can_mend_is_said(code: grpc.StatusCode, advice: str) -> None:
    message = str(translate(Answer(code, "because"), "do it"))
    assert advice in message
    assert message.endswith(")") is bool(advice)


# --------------------------------------------------------------------------------------------------------- texts of UNKNOWN

RUNC = "failed to create shim task: OCI runtime create failed: runc create failed: unable to start container process: "
NO_READER = (
    "failed to create shim task: failed to start io pipe copy: unable to copy pipes: containerd-shim: opening w/o"
    ' fifo "/p" failed: context deadline exceeded'
)
SENT: list[tuple[str, Kind]] = [
    # A program that cannot be run, as runc and crun say it, for init and for an exec.
    (f'{RUNC}exec: "nope": executable file not found in $PATH: unknown', InvalidParameterError),
    (f'{RUNC}exec: "/nope": stat /nope: no such file or directory: unknown', InvalidParameterError),
    (f'{RUNC}exec: "/etc/passwd": permission denied: unknown', InvalidParameterError),
    (f'{RUNC}exec: "/etc": is a directory: unknown', InvalidParameterError),
    (f"{RUNC}exec /bin/x: exec format error: unknown", InvalidParameterError),
    (
        (
            'OCI runtime exec failed: exec failed: unable to start container process: exec: "nope": executable file not'
            " found in $PATH: unknown"
        ),
        InvalidParameterError,
    ),
    (
        (
            "failed to create shim task: OCI runtime create failed: crun: executable file `nope` not found in $PATH: No"
            " such file or directory: unknown"
        ),
        InvalidParameterError,
    ),
    (
        'OCI runtime exec failed: exec failed: open /nope: No such file or directory: "x"',
        InvalidParameterError,
    ),
    # The runtime failed otherwise.
    (f"{RUNC}error during container init: mount failed: unknown", SystemFailureError),
    ("OCI runtime create failed: cgroups in hybrid mode not supported: unknown", SystemFailureError),
    (
        (
            "runc did not terminate successfully: exit status 1: criu failed: type NOTIFY errno 0 path= /b/dump.log:"
            " unknown"
        ),
        SystemFailureError,
    ),
    # The state does not allow it.
    ("cannot exec in a paused state: unknown", FailedPreconditionError),
    ("cannot resize a stopped container: unknown", FailedPreconditionError),
    ("bad file descriptor", FailedPreconditionError),
    (
        (
            "runc did not terminate successfully: exit status 1: unable to set memory limit to 1024 (current usage: 5000,"
            " peak usage: 6000)\n: unknown"
        ),
        FailedPreconditionError,
    ),
    ("failed to delete task: cannot delete a running process: unknown", FailedPreconditionError),
    ("failed to delete task: cannot delete a running process", FailedPreconditionError),
    ("OCI runtime pause failed: container not paused: unknown", FailedPreconditionError),
    ("OCI runtime exec failed: cannot exec in a paused container", FailedPreconditionError),
    # It is not there.
    ("container does not exist: unknown", NotFoundError),
    ("process already finished: unknown", NotFoundError),
    ("no such container: unknown", NotFoundError),
    ("no such process: unknown", NotFoundError),
    ("no such exec: unknown", NotFoundError),
    ("bucket not found", NotFoundError),
    ("OCI runtime state failed: container does not exist", NotFoundError),
    # The shim is gone, or slow.
    ("ttrpc: closed: unknown", UnavailableError),
    ("ttrpc: closed", UnavailableError),
    ("dial unix /run/shim.sock: connect: connection refused", UnavailableError),
    (NO_READER, DeadlineExceededError),
    ("task web: already exists", ConflictError),
    # A FIFO's missing path is no missing container or program.
    (
        'failed to create shim task: opening file "/p" failed: open /p: no such file or directory',
        SystemFailureError,
    ),
]


@pytest.mark.parametrize(("text", "kind"), SENT, ids=[text[-60:] for text, _ in SENT])
def test_containerds_texts_have_their_class(text: str, kind: Kind) -> None:
    error = translate(Answer(grpc.StatusCode.UNKNOWN, text), "start container 'web'")
    assert type(error) is kind, str(error)
    assert text in str(error)


def test_the_translation_does_not_raise_and_can_be_chained() -> None:
    answer = Answer(grpc.StatusCode.NOT_FOUND, "task web not found")
    with pytest.raises(NotFoundError, match="cannot stop container 'web': task web not found") as caught:
        raise translate(answer, "stop container 'web'") from answer
    assert caught.value.__cause__ is answer
