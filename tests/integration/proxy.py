"""A socket before containerd's, to break and to hold up what goes through it."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from contextlib import suppress
from typing import Self


class Proxy:
    """A socket before containerd's, whose connections a test can cut or let hang. For use in a `with`."""

    def __init__(self, upstream: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="lcp-")
        self.path = os.path.join(self._directory.name, "sock")
        self._upstream = upstream
        self._lock = threading.Lock()  # guards the two below
        self._broken = False
        self._open: set[socket.socket] = set()
        self._flowing = threading.Event()
        self._flowing.set()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(64)
        self._threads = [threading.Thread(target=self._accept, name="proxy", daemon=True)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._flowing.set()
        self.cut()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        self._listener.close()
        self._directory.cleanup()

    def cut(self, *, stay_broken: bool = False) -> None:
        """Break every connection; and let none last until the next cut."""
        with self._lock:
            self._broken = stay_broken
            for each in self._open:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Let new connections last."""
        with self._lock:
            self._broken = False

    def hold(self) -> None:
        """Carry nothing any more: calls hang."""
        self._flowing.clear()

    def release(self) -> None:
        """Carry on, with what has come meanwhile."""
        self._flowing.set()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            try:
                far.connect(self._upstream)
            except OSError:  # containerd is away: so is what stands before it
                near.close()
                far.close()
                continue
            with self._lock:
                if self._broken:
                    near.close()
                    far.close()
                    continue
                self._open |= {near, far}
            ended: list[socket.socket] = []
            for source, target in ((near, far), (far, near)):
                thread = threading.Thread(target=self._carry, args=(source, target, ended), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _carry(self, source: socket.socket, target: socket.socket, ended: list[socket.socket]) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._flowing.wait()
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)
        with self._lock:
            ended.append(source)
            if len(ended) == 2:  # a number that is given away early would be another's
                self._open -= {source, target}
                source.close()
                target.close()
