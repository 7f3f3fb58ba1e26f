"""Peers as processes: started, asked, stopped and ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from benchmarks.protocol import Answer

_END_SECONDS = 60.0


def environment() -> dict[str, str]:
    """Ours, but with Python's caches: what every user has."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


class Process:
    """A peer that runs."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )

    def ask(self, request: Mapping[str, object]) -> Answer:
        """Have something done."""
        self.send(request)
        return self.receive()

    def send(self, request: Mapping[str, object]) -> None:
        """Have something done, and see to the answer later."""
        if self._process.stdin is None:
            raise ValueError("it was started without one")
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def receive(self) -> Answer:
        """The answer to what was sent."""
        if self._process.stdout is None:
            raise ValueError("it was started without one")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self._command)} has ended")
        return cast("Answer", json.loads(line))

    def peak_memory(self) -> int:
        """The most bytes of memory that it has had."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        [peak] = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
        return int(peak) * 1024

    def stop(self) -> None:
        """Freeze it."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> float:
        """Let it go on, and say when that was."""
        began = time.time()
        self._process.send_signal(signal.SIGCONT)
        return began

    def end(self) -> None:
        """Ask it to end, and wait for that."""
        try:
            if self._process.poll() is None:
                self.send({"do": "quit"})
            self._process.wait(_END_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
        with self._process:  # which closes its streams, and waits
            pass


def first_reply(command: list[str]) -> Answer:
    """Run a program that asks for the version and ends; its seconds, and its peak memory in bytes.

    The memory is read while it is there: what the kernel says at its end has the peak of whoever started it in it.
    """
    began = time.perf_counter()
    process = Process(command)
    process.ask({"do": "calls", "of": "version", "count": 1})
    memory = process.peak_memory()
    process.end()
    return {"wall": time.perf_counter() - began, "rss": memory}
