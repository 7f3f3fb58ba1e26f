"""Create, start, exec, exit, delete, for a given time on a real containerd: does anything grow? ``make soak SECONDS=n``.

Prints what the client's process holds, for each thousand execs. Fails if descriptors, threads or FIFOs have grown between the
first line and the last, or its memory by more than a tenth.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from libcontainerd import Client, Remote, cio, oci
from libcontainerd.backends import CallbackBackend
from libcontainerd.types import EventInfo, EventType
from tests.conftest import fill_rootfs
from tests.integration.containers import kill_shims

_EXECS_OF_A_CONTAINER: Final = 20
_LINE: Final = "{:>8} {:>11} {:>12} {:>8} {:>9} {:>6} {:>8}"
_ALLOWED_DESCRIPTORS: Final = 16  # grpc's own come and go
_ALLOWED_THREADS: Final = 4
_ALLOWED_MEMORY: Final = 0.1


@dataclass(frozen=True)
class Sample:
    """What the process holds at one time."""

    execs: int
    containers: int
    descriptors: int
    threads: int
    kilobytes: int
    fifos: int
    seconds: float

    def __str__(self) -> str:
        seconds = f"{self.seconds:.0f} s"
        memory = f"{self.kilobytes / 1024:.1f} MB"
        return _LINE.format(
            self.execs, self.containers, self.descriptors, self.threads, memory, self.fifos, seconds
        )

    def grown_since(self, first: Sample) -> list[str]:
        """What is more than it was."""
        found = []
        if self.descriptors > first.descriptors + _ALLOWED_DESCRIPTORS:
            found.append("descriptors")
        if self.threads > first.threads + _ALLOWED_THREADS:
            found.append("threads")
        if self.fifos > first.fifos:
            found.append("FIFOs")
        if self.kilobytes > first.kilobytes * (1 + _ALLOWED_MEMORY):
            found.append("memory")
        return found


class Soak:
    """The cycles, and what they leave."""

    def __init__(self, remote: Remote, state_dir: Path, rootfs: Path) -> None:
        self._state_dir = state_dir
        self._gone = threading.Condition()  # guards the number of exits
        self._exits = 0
        self._client: Client = remote.new_client("soak", CallbackBackend(on={EventType.EXIT: self._exited}))
        self._spec = oci.build(
            oci.default_spec(), oci.with_rootfs(rootfs, readonly=True), oci.with_args("sleep", "100000")
        )
        self._began = time.monotonic()
        self._execs = 0
        self._containers = 0

    def _exited(self, _container_id: str, _event: EventType, _info: EventInfo) -> None:
        with self._gone:
            self._exits += 1
            self._gone.notify_all()

    def container(self) -> None:
        """One container's life, with some execs in it."""
        name = f"soak{self._containers}"
        self._client.create(name, self._spec)
        self._client.start(name, attach_stdio=cio.copy())
        for number in range(_EXECS_OF_A_CONTAINER):
            self._exec(name, f"exec{number}")
        self._client.signal_process(name, "init", 9)
        self._client.wait(name)
        self._client.delete_task(name)
        self._client.delete(name)
        self._containers += 1

    def _exec(self, name: str, exec_id: str) -> None:
        output = bytearray()
        attached = []

        def attach(dio: cio.DirectIO) -> cio.IO:
            attached.append(cio.copy(stdin=b"some input\n", stdout=output.extend)(dio))
            return attached[0]

        self._client.exec(
            name, exec_id, oci.exec_process(self._spec, "cat"), with_stdin=True, attach_stdio=attach
        )
        status = self._client.wait(name, exec_id)
        attached[0].wait()
        if (status.code, bytes(output)) != (0, b"some input\n"):
            raise SystemExit(f"exec {self._execs} ended with {status} and wrote {bytes(output)!r}")
        self._execs += 1

    def sample(self) -> Sample:
        """Look at the process, between two containers."""
        with self._gone:  # the clean-up after an exec is over a moment after its exit
            self._gone.wait_for(lambda: self._exits >= self._execs + self._containers, 30)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
        return Sample(
            self._execs,
            self._containers,
            len(os.listdir("/proc/self/fd")),
            len(os.listdir("/proc/self/task")),
            resident,
            sum(path.is_fifo() for path in self._state_dir.rglob("*")),
            time.monotonic() - self._began,
        )


def main() -> int:
    """Soak, and say what has grown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--every", type=int, default=1000, help="execs between two lines")
    arguments = parser.parse_args()
    structlog.configure(processors=[_drop])
    directory = Path(tempfile.mkdtemp(prefix="lcs-"))
    directory.chmod(0o755)
    try:
        rootfs = directory / "rootfs"
        rootfs.mkdir(mode=0o755)
        fill_rootfs(rootfs, Path(shutil.which("busybox") or "/bin/busybox"))
        with Remote.start(directory / "root", directory / "run", log_level="error") as remote:
            try:
                return _soak(
                    Soak(remote, directory / "run" / "bundles", rootfs), arguments.seconds, arguments.every
                )
            finally:
                kill_shims(remote.address)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _soak(soak: Soak, seconds: float, every: int) -> int:
    print(
        _LINE.format("execs", "containers", "descriptors", "threads", "memory", "FIFOs", "after"), flush=True
    )
    until = time.monotonic() + seconds
    samples: list[Sample] = []
    while time.monotonic() < until:
        soak.container()
        sample = soak.sample()
        # The first comes when all that is made once has been made.
        if not samples or sample.execs >= samples[-1].execs + every:
            samples.append(sample)
            print(sample, flush=True)
    if soak.sample().execs > samples[-1].execs:
        samples.append(soak.sample())
        print(samples[-1], flush=True)
    grown = samples[-1].grown_since(samples[min(1, len(samples) - 1)])
    print("grown: " + ", ".join(grown) if grown else "nothing has grown")
    return 1 if grown else 0


def _drop(*_: object) -> structlog.typing.EventDict:
    raise structlog.DropEvent


if __name__ == "__main__":
    sys.exit(main())
