"""What the copies do: the steps that move one stream, for the pump to take."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable
from contextlib import suppress
from time import sleep
from typing import TYPE_CHECKING, Final, TypeVar

import structlog

from libcontainerd.cio.ends import CHUNK, Chunk, Sink, Wait, open_sink

if TYPE_CHECKING:
    from libcontainerd.cio.ends import Source
    from libcontainerd.cio.fifo import InputStream, OutputStream
    from libcontainerd.cio.pump import Steps

_T = TypeVar("_T")

_BURST: Final = CHUNK
"""A stream that gave so much without a pause is busy, and will give more: it is let gather for a moment.

Otherwise whoever reads faster than the shim writes is woken for each 32 KiB.
"""
_GATHER_SECONDS: Final = 0.001
"""In which a shim does not fill a widened FIFO."""

_log = structlog.get_logger("libcontainerd")


def copy_output(stream: OutputStream, sink: Sink, name: str) -> Steps:
    """Move a process's output into a sink until its end, then close our end of it.

    A sink that fails is logged once, and the rest of the stream is drained and discarded.
    """
    stream.adopt()
    outlet = _Outlet(stream, sink, name)
    ended = False
    with suppress(ValueError):  # somebody else has closed the stream
        with stream.use() as fd:
            pass
        while not ended:
            yield ((fd, select.EPOLLIN),)
            burst = 0
            while True:
                try:
                    with stream.use():
                        data = os.read(fd, CHUNK)
                        ended = not data and stream.at_end()
                except BlockingIOError:
                    if burst < _BURST or not stream.widen():
                        break
                    burst = 0
                    sleep(_GATHER_SECONDS)
                    continue
                if not data:
                    break
                burst += len(data)
                yield from _move(stream, data, outlet)
            while not outlet.flush():
                yield outlet.room()
    stream.on_close = None  # an end of its own is no cancellation: `at_end` comes before `wait` returns
    stream.close()


def _move(stream: OutputStream, data: bytes, outlet: _Outlet) -> Steps:
    """Deliver one chunk that was read. Moving one without reading it, by os.splice, has its place beside this."""
    stream.in_hand = len(data)
    stream.note_taken(len(data))
    rest: Chunk = data
    while rest:
        count = outlet.write(rest)
        rest = memoryview(rest)[count:]
        stream.in_hand = len(rest)
        yield () if count else outlet.room()


class _Outlet:
    """A sink that does not fail: the first failure is logged, and everything from there on discarded."""

    def __init__(self, stream: OutputStream, sink: Sink, name: str) -> None:
        self._stream = stream
        self._sink = sink
        self._name = name

    def write(self, data: Chunk) -> int:
        return self._try(lambda sink: sink.write(data))

    def flush(self) -> bool:
        return self._try(lambda sink: sink.flush())

    def room(self) -> Wait:
        return self._try(lambda sink: sink.room())

    def _try(self, act: Callable[[Sink], _T]) -> _T:
        try:
            return act(self._sink)
        except BaseException:  # noqa: BLE001 # not even a callable's SystemExit may leave a process blocked
            _log.warning("destination_failed", stream=self._name, path=self._stream.path, exc_info=True)
            self._sink = open_sink(None, self._name)
            return act(self._sink)


def copy_input(stream: InputStream, source: Source, *, stays_open: bool = False) -> Steps:
    """Move a source into a process's stdin until its end, then close stdin.

    The process's end, told by a broken pipe, ends it quietly. A source that fails is logged, and ends the input. Where
    stdin `stays_open`, on a terminal, it does not end: that would be a hang-up, and the process killed over what it was told.
    """
    try:
        yield from _feed(stream, source)
    except ValueError:  # somebody else has closed the stream, and knows why
        return
    except BrokenPipeError:  # the process has ended
        pass
    if not stays_open:
        stream.close()


def _feed(stream: InputStream, source: Source) -> Steps:
    with stream.use() as fd:
        pass
    while True:
        # Nothing is taken from the source before there is room for it: whoever reads it next may want it.
        yield ((fd, select.EPOLLOUT),)
        while (data := _take(source, stream)) is None:
            yield (*source.ready(), (fd, 0))
        if not data:
            return
        while data:
            try:
                with stream.use():
                    data = memoryview(data)[os.write(fd, data) :]
            except BlockingIOError:
                yield ((fd, select.EPOLLOUT),)
            else:
                yield ()


def _take(source: Source, stream: InputStream) -> Chunk | None:
    """Take a chunk from the source; a failure is logged and taken for its end.

    Raises:
        BrokenPipeError: nobody is there to read it; nothing was taken.
        ValueError: the stream is closed.
    """
    with stream.use() as fd:
        poller = select.poll()
        poller.register(fd, 0)
        if poller.poll(0):
            raise BrokenPipeError(errno.EPIPE, "the process has ended", stream.path)
    try:
        return source.read()
    except BaseException:  # noqa: BLE001 # the process must get its end of input whatever happened
        _log.warning("source_failed", stream="stdin", path=stream.path, exc_info=True)
        return b""
