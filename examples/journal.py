"""The runner's memory: which runs have begun, and how they ended. It outlives the runner, however that ends.

One JSON object to a line, each written by a single call with O_APPEND, so a line is there or not, whenever the runner is killed. A
last line that is torn all the same (the kernel may stop between two pages) was never told. A power failure is not provided
for: that takes an `fsync`.

    {"event": "started", "job": "build-7", "step": null, "pid": 4711, "attempt": 1}
    {"event": "restored", "job": "build-7", "pid": 4711, "alive": true, "steps": {"test": 4712}}
    {"event": "exit", "job": "build-7", "step": "test", "pid": 4712, "code": 3, "at": "2026-11-28T12:00:00+00:00"}
    {"event": "removed", "job": "build-7"}

A run is named by job, step (none for the job's own process) and pid.
"""

import json
import os
import threading
from contextlib import suppress
from dataclasses import dataclass, field

Run = tuple[str | None, int]
"""Step and pid."""


@dataclass
class _Job:
    begun: set[Run] = field(default_factory=set)
    ended: set[Run] = field(default_factory=set)


class Journal:
    """An open journal. Its methods may be called from any thread."""

    def __init__(self, path: str) -> None:
        """Read what is there, and leave out the jobs that are removed: it grows with the jobs of one runner, not of all."""
        self._lock = threading.Lock()  # guards the jobs, and keeps the order of the lines
        self._jobs: dict[str, _Job] = {}
        lines = _whole_lines(path)
        events = [json.loads(line) for line in lines]
        removed = {event["job"]: at for at, event in enumerate(events) if event["event"] == "removed"}
        with open(f"{path}.new", "wb") as file:
            for at, event in enumerate(events):
                if at > removed.get(event["job"], -1):
                    file.write(lines[at])
                    self._note(event)
        os.replace(f"{path}.new", path)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)

    def close(self) -> None:
        """Close the file. What is told after that is refused."""
        with self._lock:
            os.close(self._descriptor)
            self._descriptor = -1

    def tell(self, event: dict[str, object]) -> bool:
        """Write an event, for good; False, and nothing is written, where it is an exit that is there already, or of a job that is not.

        Raises:
            OSError: it is not written, or not whole. The next one that opens the journal does not find it.
        """
        data = json.dumps(event).encode() + b"\n"
        with self._lock:
            job = self._jobs.get(str(event["job"]))
            if event["event"] == "exit" and (job is None or _run_of(event) in job.ended):
                return False
            if (written := os.write(self._descriptor, data)) < len(data):
                os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
                raise OSError(f"cannot write to the journal: {written} of {len(data)} bytes were taken")
            self._note(event)
        return True

    def jobs(self) -> list[str]:
        """The jobs that are not removed."""
        with self._lock:
            return list(self._jobs)

    def unended(self, job_id: str) -> set[Run]:
        """A job's runs that have begun, and of which no exit was told."""
        with self._lock:
            job = self._jobs.get(job_id, _Job())
            return job.begun - job.ended

    def _note(self, event: dict[str, object]) -> None:
        name = str(event["job"])
        job = self._jobs.setdefault(name, _Job())
        match event:
            case {"event": "started"}:
                job.begun.add(run := _run_of(event))
                job.ended.discard(run)  # the kernel gives a pid again
            case {"event": "restored", "pid": int(pid), "steps": dict(steps)}:
                job.begun |= {(None, pid)} if pid else set()
                job.begun |= set(steps.items())
            case {"event": "exit"}:
                job.ended.add(_run_of(event))
            case {"event": "removed"}:
                del self._jobs[name]


def _whole_lines(path: str) -> list[bytes]:
    with suppress(FileNotFoundError), open(path, "rb") as file:
        return [line for line in file if line.endswith(b"\n")]  # only the last can be torn
    return []


def _run_of(event: dict[str, object]) -> Run:
    match event:
        case {"step": str() | None as step, "pid": int(pid)}:
            return step, pid
    raise ValueError(f"this names no run: {event}")
