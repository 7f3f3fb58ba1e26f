"""The runner of examples/, as a process that can be killed: its lines and its journal go to the ledger, its log to a file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

from tests.chaos.ledger import Ledger

RUNNER = Path(__file__).parents[2] / "examples" / "runner.py"
_GRACE = 60.0


class Daemon:
    """One life of the runner after the other; for use by one thread."""

    def __init__(self, ledger: Ledger, log: Path, journal: Path, *arguments: str | Path) -> None:
        self._ledger = ledger
        self._log = log
        self._journal = journal
        # On SIGABRT it writes the stacks of all its threads to its log.
        self._command = [sys.executable, "-X", "faulthandler", "-W", "error", RUNNER, *arguments]
        self._begin()

    def _begin(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        self._reader = threading.Thread(
            target=self._read, args=(self._process, self._ledger.life), name="runner"
        )
        self._reader.start()

    def _read(self, process: subprocess.Popen[bytes], life: int) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                if line.endswith(b"\n"):  # a killed one's last line may be half a line
                    self._ledger.told(life, json.loads(line))

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, **command: object) -> None:
        """Give it a command. One that dies meanwhile is found by `alive`."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()

    def kill(self) -> None:
        """Kill it, hear it out, and begin its next life."""
        self._ledger.runner_dies()
        self._process.kill()
        self._end()
        self._ledger.runner_killed()
        self._begin()

    def stop(self) -> int:
        """Ask it to end, and give its exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self._end()

    def close(self) -> None:
        """End it whatever it does, if it has not ended: after a round that was interrupted."""
        if self.alive:
            self._process.kill()
            self._end()

    def dump(self) -> None:
        """Make it write its threads' stacks, which ends it."""
        self._process.send_signal(signal.SIGABRT)
        self._end()

    def _end(self) -> int:
        try:
            code = self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGABRT)
            code = self._process.wait(_GRACE)
        self._reader.join(_GRACE)
        with suppress(FileNotFoundError):  # it had not come so far
            self._ledger.journal(self._ledger.life, self._journal.read_bytes())
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        return code

    def threads(self) -> int:
        """How many threads it has."""
        return len(os.listdir(f"/proc/{self._process.pid}/task"))

    def descriptors(self) -> Counter[str]:
        """What its descriptors are, by kind; files by their path."""
        found: Counter[str] = Counter()
        directory = f"/proc/{self._process.pid}/fd"
        for name in os.listdir(directory):
            with suppress(FileNotFoundError):
                target = os.readlink(f"{directory}/{name}")
                found[target if target.startswith("/") else target.partition(":")[0]] += 1
        return found
