"""The peer that is containerd's command-line client, run once for everything that is done."""

from __future__ import annotations

import json
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

from benchmarks.protocol import WRITER, serve


class Ctr:
    """What the bench asks for, as far as ``ctr`` can."""

    whose_cpu = resource.RUSAGE_CHILDREN

    def __init__(self, address: str, namespace: str, directory: Path) -> None:
        self._directory = directory
        self._rootfs: str = json.loads((directory / "spec.json").read_bytes())["root"]["path"]
        self._ctr = ["ctr", "--address", address, "--namespace", namespace]

    def _run(self, *args: str, stdout: int = subprocess.DEVNULL) -> None:
        subprocess.run(
            [*self._ctr, *args],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            check=True,
            timeout=300,
        )

    def lifecycle(self, container_id: str) -> None:
        """Take one container through its life."""
        self._run("run", "--rm", "--rootfs", self._rootfs, container_id, "/bin/true")

    def hold(self) -> None:
        """Make the container for `exec` and `call`."""
        self._run("run", "--detach", "--rootfs", self._rootfs, "held", "/bin/sleep", "100000")

    def release(self) -> None:
        """Remove it."""
        self._run("task", "delete", "--force", "held")
        self._run("container", "delete", "held")

    def exec(self, exec_id: str) -> None:
        """Run one exec."""
        self._run("task", "exec", "--exec-id", exec_id, "held", "/bin/true")

    def stdout(self, container_id: str, size: int, into: str) -> int:
        """Have a container write into a file; `ctr` itself cannot discard, but /dev/null can."""
        path = self._directory / "stdout" if into == "file" else Path("/dev/null")
        with path.open("wb") as file:
            self._run(
                "run",
                "--rm",
                "--rootfs",
                self._rootfs,
                container_id,
                *WRITER,
                f"count={size // 65536}",
                stdout=file.fileno(),
            )
        return path.stat().st_size if into == "file" else size

    def call(self, of: str) -> None:
        """Make one call."""
        calls = {
            "version": ["version"],
            "status": ["task", "list"],
            "list_pids": ["task", "ps", "held"],
            "signal_process": ["task", "kill", "--signal", "SIGWINCH", "held"],
        }
        self._run(*calls[of])

    def subscribe(self, namespace: str, count: int, done: Callable[[], None]) -> None:
        """Not asked of this peer."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is left open."""


if __name__ == "__main__":
    serve(Ctr)
