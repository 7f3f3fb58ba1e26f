"""A real containerd of a test's own, to be killed and started again."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Self

import grpc

from libcontainerd.supervisor.options import Options, configuration, environment
from tests.integration.containers import kill_shims, shims_of, wait_until

_START_SECONDS = 30.0


class MortalContainerd:
    """A containerd that dies and comes back as a test wants it; a context manager. Its shims live on meanwhile."""

    def __init__(self, binary: Path) -> None:
        self._binary = binary
        self._options = Options(log_level="info")
        self._process: subprocess.Popen[bytes] | None = None
        self.directory = Path(tempfile.mkdtemp(prefix="lco-"))
        self.address = str(self.directory / "c.sock")

    def __enter__(self) -> Self:
        self.directory.chmod(0o755)
        (self.directory / "config.toml").write_bytes(
            configuration(
                self._options,
                root=str(self.directory / "root"),
                state=str(self.directory / "state"),
                address=self.address,
                debug_address=str(self.directory / "debug.sock"),
            )
        )
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop(signal.SIGKILL)
        finally:
            kill_shims(self.address)
            wait_until(lambda: not shims_of(self.address), "all shims have ended", 30)
            shutil.rmtree(self.directory, ignore_errors=True)

    def start(self) -> None:
        """Start it, and return when it serves."""
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._binary), "--config", str(self.directory / "config.toml")],
                stdout=log,
                stderr=log,
                env=environment(self._options),
                start_new_session=True,
            )
        with self.channel() as channel:
            grpc.channel_ready_future(channel).result(_START_SECONDS)

    def stop(self, number: signal.Signals) -> None:
        """End it with a signal, and return when it has ended: its shims and their processes go on. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            process.wait(_START_SECONDS)

    def channel(self) -> grpc.Channel:
        """A channel past the library."""
        return grpc.insecure_channel(
            f"unix:{self.address}",
            options=(
                ("grpc.default_authority", "localhost"),
                ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.min_reconnect_backoff_ms", 1000),
                ("grpc.max_reconnect_backoff_ms", 200),
            ),
        )
