"""One process's IO, from its attachment before the process exists to its end after the process was deleted."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import structlog

from libcontainerd.cio import IO, AttachStdio, CopyIO, Destination
from libcontainerd.cio.direct import DirectIO, drain
from libcontainerd.cio.fifo import FifoSet, make_mark, unlink
from libcontainerd.errors import InvalidParameterError, SystemFailureError

if TYPE_CHECKING:
    from collections.abc import Callable

    from libcontainerd.cio import StdioCallback
    from libcontainerd.cio.fifo import InputStream, OutputStream

_WAIT_SECONDS: Final = 10.0
"""How long a user's ``IO.wait`` is waited for once the process's output has been taken to its end."""

_log = structlog.get_logger("libcontainerd")


def check_attach_stdio(attach_stdio: object) -> None:
    """Refuse what is neither a callback nor a destination.

    Raises:
        InvalidParameterError: it is neither.
    """
    if not isinstance(attach_stdio, Destination) and not callable(attach_stdio):
        raise InvalidParameterError(
            f"attach_stdio is a callback, or a destination such as cio.null_io, not {attach_stdio!r}"
        )


class Attached:
    """What a process's stdio is connected to, and the paths that containerd is told.

    Attributes:
        stdin: The path or empty, for containerd's request; likewise `stdout` and `stderr`.
        direct: Our ends of the FIFOs; None for a destination that needs none.
    """

    __slots__ = ("_io", "_paths", "direct", "stderr", "stdin", "stdout")

    def __init__(self, attach_stdio: Destination | FifoSet, mark: str = "") -> None:
        self.stdin = "" if isinstance(attach_stdio, Destination) else attach_stdio.stdin
        self.stdout, self.stderr = attach_stdio.stdout, attach_stdio.stderr
        fifos = () if isinstance(attach_stdio, Destination) else attach_stdio.paths
        self._paths = (*fifos, mark) if mark else fifos
        self._io: IO | None = None
        self.direct: DirectIO | None = None

    @classmethod
    def attach(
        cls,
        attach_stdio: AttachStdio,
        fifos: FifoSet,
        *,
        owner: tuple[int, int],
        on_stdin_close: Callable[[InputStream], None],
        name: tuple[str, str] = ("", ""),
        mark: str = "",
        runc: bool = False,
    ) -> Attached:
        """Connect a process that does not exist yet.

        Args:
            attach_stdio: The user's callback, or a ready-made destination.
            fifos: The paths to use, where FIFOs are needed.
            owner: uid and gid that new FIFOs belong to.
            on_stdin_close: As `DirectIO` wants it.
            name: The container's id and the process's.
            mark: The path of a file that stands for the FIFOs where none are needed; empty for none.
            runc: The process is in the care of one of runc's shims.

        Raises:
            InvalidParameterError: the destination cannot do what was asked, or the callback returned no IO.
            SystemFailureError: a FIFO cannot be made or opened.
            Exception: what the callback raised. Nothing is left open or behind in any of these cases.
        """
        check_attach_stdio(attach_stdio)
        if isinstance(attach_stdio, Destination):
            attach_stdio.check(with_stdin=bool(fifos.stdin), terminal=fifos.terminal)
            attached = cls(attach_stdio, mark)
            attached.stdout, attached.stderr = attach_stdio.told(runc=runc)
            if fifos.terminal and not attached.stdout:
                attached.stdout = (
                    os.devnull
                )  # the shim copies a terminal to somewhere, and opens no empty path
            if mark:
                try:
                    make_mark(mark)
                except OSError as error:
                    raise SystemFailureError(f"cannot make {mark}: {error}") from error
            return attached
        attached = cls(fifos)
        direct = attached._open(fifos, owner, on_stdin_close, name)
        try:
            attached._hand_over(direct, attach_stdio)
            if any(stream.closed for stream in direct.outputs):
                raise InvalidParameterError(
                    "attach_stdio closed an output before the process was there, and the shim waits for a reader: use"
                    " cio.copy, which discards what it is given no destination for"
                )
        except BaseException:
            attached.discard()
            raise
        return attached

    @classmethod
    def restore(
        cls,
        attach_stdio: AttachStdio,
        fifos: FifoSet,
        *,
        on_stdin_close: Callable[[InputStream], None],
        name: tuple[str, str],
        mark: str,
    ) -> Attached:
        """Connect a process that exists, and is perhaps over, to the FIFOs that it was made with.

        Args:
            attach_stdio: The user's callback; a destination opens nothing.
            fifos: The FIFOs' paths; with a callback they are there.
            on_stdin_close: As `DirectIO` wants it.
            name: The container's id and the process's.
            mark: The file that may stand for the FIFOs.

        Raises:
            InvalidParameterError: the callback returned no IO.
            SystemFailureError: a FIFO cannot be opened.
            Exception: what the callback raised. Nothing is left open in any of these cases, and the FIFOs stay.
        """
        attached = cls(fifos, mark)
        if isinstance(attach_stdio, Destination):
            return attached
        direct = attached._open(fifos, (0, 0), on_stdin_close, name)
        try:
            attached._hand_over(direct, attach_stdio)
        except BaseException:
            attached.abandon()
            raise
        return attached

    def _open(
        self,
        fifos: FifoSet,
        owner: tuple[int, int],
        on_stdin_close: Callable[[InputStream], None],
        name: tuple[str, str],
    ) -> DirectIO:
        try:
            # The host's root reaches them anyway, and who is not root could not give them to it.
            mapped = owner if owner != (0, 0) else None
            self.direct = DirectIO(
                fifos, owner=mapped, on_stdin_close=on_stdin_close, container_id=name[0], process_id=name[1]
            )
        except OSError as error:
            raise SystemFailureError(f"cannot open the FIFOs {', '.join(fifos.paths)}: {error}") from error
        return self.direct

    def _hand_over(self, direct: DirectIO, attach_stdio: StdioCallback) -> None:
        io = attach_stdio(direct)
        if not isinstance(io, IO):
            raise InvalidParameterError(
                f"attach_stdio returned {type(io).__name__}: it must return an IO (cancel, wait, close), such as"
                " the DirectIO it was given"
            )
        self._io = io

    def process_is_there(self) -> None:
        """The process can be sent its end of input."""
        if self.direct is not None:
            self.direct.process_is_there()

    def process_ended(self) -> None:
        """The process's exit is known."""
        if self.direct is not None:
            self.direct.process_ended()

    def discard(self) -> None:
        """The process never came to be: cancel and close everything, and remove the FIFOs."""
        try:
            if self.direct is not None:
                self.direct.process_ended()
                self._quietly("cancel")
                self._quietly("close")
                self.direct.close()
        finally:
            self.unlink()

    def finish(
        self, *, drained: bool, hurry: Callable[[], bool] = lambda: False
    ) -> list[InputStream | OutputStream]:
        """The process is gone from containerd: remove the FIFOs, and close what has come to its end.

        Args:
            drained: The reader has taken all there was before the deletion. What the shim has sent after that is waited
                for; where the reader was stuck, nothing is.
            hurry: As for `drain`.

        Returns:
            The streams that are left to their owner: they still hold bytes, or their descriptor may be about to be used.
        """
        self.unlink()
        if self.direct is None:
            return []
        drained = drained and drain([self.direct], limit=_WAIT_SECONDS, hurry=hurry)
        if drained and self._io is not self.direct:
            self._quietly("cancel")
            if not isinstance(self._io, CopyIO):  # whose copies are over when their streams are drained
                self._wait_for_users_io()
            self._quietly("close")
        return self.direct.finish(drained=drained)

    def _wait_for_users_io(self) -> None:
        waiter = threading.Thread(
            target=self._quietly, args=("wait",), name="libcontainerd-io-wait", daemon=True
        )
        waiter.start()
        waiter.join(_WAIT_SECONDS)
        if waiter.is_alive():
            _log.warning("io_wait_hangs", fifo=self.stdout, seconds=_WAIT_SECONDS)

    @property
    def has_users_io(self) -> bool:
        """Whether there is an IO beside our own ends, which wants to be cancelled and closed."""
        return self.direct is not None and self._io is not self.direct

    def finish_late(self) -> bool:
        """After `finish`: close what its owner has come to the end of since, and with the last the IO; say whether it was."""
        if self.direct is not None and self.direct.finish(drained=False):
            return False
        self._quietly("cancel")
        self._quietly("close")
        return True

    def abandon(self) -> None:
        """The client goes away and the process stays: close our ends, send no end of input, keep the FIFOs."""
        if self.direct is None:
            return
        self.direct.abandon()
        self._quietly("cancel")
        self._quietly("close")

    def unlink(self) -> None:
        """Remove the FIFOs, or the mark in their place, once; the ends that are open live on."""
        paths, self._paths = self._paths, ()
        with suppress(OSError):
            unlink(paths)

    def disown(self) -> None:
        """Remove no files any more: what is there under these names may be a successor's."""
        self._paths = ()

    def _quietly(self, step: str) -> None:
        """Call the user's IO; what it raises is its own affair, said in the log."""
        if self._io is None:
            return
        try:
            getattr(self._io, step)()
        except Exception as error:  # noqa: BLE001 - logged; an IO that fails must not keep the others from their end
            _log.warning("io_failed", step=step, fifo=self.stdout, error=repr(error))
