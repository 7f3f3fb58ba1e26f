"""DirectIO: the open ends of one process's FIFOs."""

from __future__ import annotations

import os
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from libcontainerd.cio.fifo import End, FifoSet, InputStream, OutputStream, unlink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Self


class DirectIO:
    """The open ends of one process's FIFOs, and itself an `IO` that copies nothing.

    Attributes:
        config: The FIFOs' paths.
        container_id: Whose they are.
        process_id: ``"init"``, or the exec's id.
        stdin: Where to write what the process shall read, or None.
        stdout: Where to read what the process writes.
        stderr: Likewise; None with a terminal.
    """

    def __init__(
        self,
        config: FifoSet,
        *,
        on_stdin_close: Callable[[InputStream], None],
        owner: tuple[int, int] | None = None,
        container_id: str = "",
        process_id: str = "",
    ) -> None:
        """Make the FIFOs that are missing and open our ends, without waiting for the other side.

        Args:
            config: The paths.
            on_stdin_close: Called once, when the owner has closed stdin and the process is there; shall see to it that
                `InputStream.end_input` is called in the background, and CloseIO sent.
            owner: uid and gid that new FIFOs shall belong to.
            container_id: For the attribute.
            process_id: For the attribute.

        Raises:
            OSError: a FIFO cannot be made or opened. What was made is removed, what was opened is closed.
        """
        self.config = config
        self.container_id = container_id
        self.process_id = process_id
        self._lock = threading.Lock()  # guards _on_cancel and _cancelled; nothing is called while it is held
        self._on_cancel: list[Callable[[], None]] = []
        self._cancelled = False
        with ExitStack() as undo:
            undo.callback(unlink, config.make(owner))

            def open_end(path: str, flags: int) -> End:
                end = End(path, flags)
                undo.callback(end.close)
                return end

            self.stdout = OutputStream(open_end(config.stdout, os.O_RDONLY))
            self.stderr = OutputStream(open_end(config.stderr, os.O_RDONLY)) if config.stderr else None
            self.stdin: InputStream | None = None
            if config.stdin:
                holder = open_end(config.stdin, os.O_RDWR)
                self.stdin = InputStream(open_end(config.stdin, os.O_WRONLY), holder, on_stdin_close)
            undo.pop_all()

    @property
    def outputs(self) -> tuple[OutputStream, ...]:
        """stdout, and stderr where there is one."""
        return (self.stdout,) if self.stderr is None else (self.stdout, self.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Have something called when this IO is cancelled or closed; at once if it is."""
        with self._lock:
            cancelled = self._cancelled
            if not cancelled:
                self._on_cancel.append(callback)
        if cancelled:
            callback()

    def cancel(self) -> None:
        """Wake every blocked read (``b""``) and write (``ECANCELED``); idempotent."""
        with self._lock:
            self._cancelled = True
            callbacks, self._on_cancel = self._on_cancel, []
        for stream in self.outputs:
            stream.cancel()
        if self.stdin is not None:
            self.stdin.cancel()
        for callback in callbacks:
            callback()

    def wait(self) -> None:
        """Return at once: there are no copiers to wait for."""

    def close(self) -> None:
        """Close the streams; idempotent, and safe beside blocked reads and writes.

        The process's input ends as if its owner had closed stdin; reads of the outputs return ``b""``.
        """
        self.cancel()
        if self.stdin is not None:
            self.stdin.close()
        for stream in self.outputs:
            stream.shut()

    # The library's side.

    def process_is_there(self) -> None:
        """The process can be sent its end of input."""
        if self.stdin is not None:
            self.stdin.process_is_there()

    def process_ended(self) -> None:
        """The process's exit is known, or it never came to be."""
        if self.stdin is not None:
            self.stdin.process_ended()
        for stream in self.outputs:
            stream.process_ended()

    def finish(self, *, drained: bool) -> list[InputStream | OutputStream]:
        """The process is gone: close the streams and return those that are left to their owner.

        Args:
            drained: Whether the outputs are known to be read; otherwise those that hold bytes are left.
        """
        left: list[InputStream | OutputStream] = [
            each for each in self.outputs if not each.finish(drained=drained)
        ]
        if self.stdin is not None and not self.stdin.finish():
            left.append(self.stdin)
        return left

    def abandon(self) -> None:
        """Close every descriptor and leave the process as it is: no end of input is sent."""
        if self.stdin is not None:
            self.stdin.shut()
        self.cancel()
        for stream in self.outputs:
            stream.shut()


def drain(
    ios: Iterable[DirectIO],
    *,
    limit: float,
    hurry: Callable[[], bool] = lambda: False,
    stall: float = 5.0,
    idle: float = 0.3,
) -> bool:
    """Wait until the readers have come to the end of all outputs, as long as they go on reading.

    Args:
        ios: The processes' IO.
        limit: Seconds after which nothing is waited for any more.
        hurry: Says whether somebody waits for this to end; then `idle` is as long as `stall`.
        stall: Seconds without a byte taken after which a reader is thought to be stuck, and no longer waited for.
        idle: Seconds after which a FIFO that is empty, but has a writer still, counts as read: the shim moves what it
            has at once, so only a process that was left behind in the background can hold it open.

    Returns:
        Whether the readers took everything there was.
    """
    deadline = time.monotonic() + limit
    pause = 0.001
    complete = True
    # What was seen of each, and since when it has been so.
    waiting = {stream: (-1, -1, 0.0) for io in ios for stream in io.outputs}
    while True:
        now = time.monotonic()
        for stream, (taken, unread, since) in list(waiting.items()):
            pending, hung_up = stream.pending()
            if stream.drained() or (not pending and not hung_up and taken >= 0 and now - since >= idle):
                del waiting[stream]
            elif (taken, unread) != (stream.taken, pending):
                waiting[stream] = stream.taken, pending, now
            elif now - since >= (idle if hurry() else stall):
                del waiting[stream]
                complete = False
        if not waiting or now >= deadline:
            return complete and not waiting
        time.sleep(pause)
        pause = min(pause * 2, 0.05)
