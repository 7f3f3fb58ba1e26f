"""A daemon like a CI runner's: jobs come in as JSON lines, what happens to them goes out as JSON lines.

A job is a container, a step is an exec in it. Commands, on stdin:

    {"do": "run", "job": "build-7", "args": ["sleep", "60"]}
    {"do": "exec", "job": "build-7", "step": "test", "args": ["sh", "-c", "echo hello; exit 3"]}
    {"do": "kill", "job": "build-7", "step": "test", "signal": 15}      (without a step: the job itself)

Answers, on stdout: `started` and `failed` to a command, `output`, `exit`, and `removed` when nothing of a job is left. After its
start the runner takes back what an earlier one has left behind, even one that was killed: it says `restored` of each job,
then `ready`. Job, step and pid name a run. Each runner tells of an exit once; one that was killed right after it has told
of a job's exit will have a successor that tells of it again.

At the end of stdin it waits for its jobs. SIGTERM ends it at once, and the jobs go on. The log is on stderr. As root:

    python examples/runner.py ADDRESS STATE_DIR NAMESPACE ROOTFS
"""

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

import structlog

from libcontainerd import (
    Client,
    ConflictError,
    DeadlineExceededError,
    EventInfo,
    EventType,
    FailedPreconditionError,
    LibcontainerdError,
    NotFoundError,
    Restored,
    Status,
    UnavailableError,
    cio,
    oci,
)

AWAY = (UnavailableError, DeadlineExceededError)
"""What a call raises while containerd is away or overloaded: its outcome is unknown."""

PATIENCE = 120.0  # seconds for containerd to come back
PAUSE = 0.2
WORKERS = 8

Result = TypeVar("Result")


@dataclass
class Job:
    """A container of ours, from `run` or a restore until it is removed."""

    lock: threading.Lock = field(default_factory=threading.Lock)  # held while it is being started
    pid: int = 0
    steps: set[str] = field(default_factory=set)  # those whose exits are still to be told
    ended: bool = False


class Runner:
    """Its own client's backend. Use it in a `with`."""

    def __init__(self, address: str, state_dir: str, namespace: str, rootfs: str) -> None:
        self.rootfs = rootfs
        self.jobs: dict[str, Job] = {}
        self.changed = threading.Condition()  # guards the jobs and what is in them; told when one is gone
        self.stopping = threading.Event()
        self.restored = threading.Event()
        self.output = threading.Lock()  # one line at a time
        self.pool = ThreadPoolExecutor(WORKERS, "command")
        self.client = self.patiently(
            partial(Client, address, namespace=namespace, state_dir=state_dir, backend=self)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        self.restored.set()
        self.client.close()  # ends the calls that commands wait for
        self.pool.shutdown(cancel_futures=True)

    def say(self, event: str, **fields: object) -> None:
        """Write a line."""
        with self.output:
            print(json.dumps({"event": event, **fields}), flush=True)

    def patiently(
        self, call: Callable[[], Result], passing: tuple[type[LibcontainerdError], ...] = AWAY
    ) -> Result:
        """Call, and again while containerd is away: it will be back, and the client's channel with it."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return call()
            except passing:
                if self.stopping.wait(PAUSE) or time.monotonic() > deadline:
                    raise

    # ------------------------------------------------------------------------------------------------------ commands

    def take(self, line: str) -> None:
        """Carry out a command, beside others."""
        self.pool.submit(self.obey, line)

    def obey(self, line: str) -> None:
        """Carry out a command, and say what came of it."""
        command: object = line
        try:
            match command := json.loads(line):
                case {"do": "run", "job": str(job), "args": [*args]}:
                    self.say("started", job=job, step=None, pid=self.run(job, args))
                case {"do": "exec", "job": str(job), "step": str(step), "args": [*args]}:
                    self.say("started", job=job, step=step, pid=self.exec(job, step, args))
                case {"do": "kill", "job": str(job), "signal": int(number), **rest}:
                    process = str(rest.get("step") or "init")
                    self.patiently(partial(self.client.signal_process, job, process, number))
                case _:
                    raise ValueError("that is no command")
        except (ValueError, LibcontainerdError) as error:
            self.say("failed", command=command, error=str(error))

    def run(self, job_id: str, args: list[str]) -> int:
        """Make and start a container. A start of which nobody knows how it ended is begun anew."""
        spec = self.spec(args)
        job = Job()
        with self.changed:
            if job_id in self.jobs:
                raise ConflictError(f"there is a job {job_id!r}")
            self.jobs[job_id] = job

        def start() -> int:
            self.client.replace(job_id, spec)
            return self.client.start(job_id, attach_stdio=self.attach)

        with job.lock:
            try:
                # A start that was cut off with an earlier runner can bring its task to light between the two.
                job.pid = self.patiently(start, (*AWAY, ConflictError))
            except BaseException:
                with suppress(LibcontainerdError):  # no such program, say: the container is still ours
                    self.patiently(partial(self.client.delete, job_id))
                self.forget(job_id)
                raise
        return job.pid

    def spec(self, args: list[str]) -> oci.Spec:
        """What a job's container is to be."""
        return oci.build(
            oci.default_spec(), oci.with_rootfs(self.rootfs, readonly=True), oci.with_args(*args)
        )

    def exec(self, job_id: str, step: str, args: list[str]) -> int:
        """Start a further process. It is not tried twice: a step that may have run is not run again."""
        process = oci.exec_process(oci.default_spec(), *args)
        with self.changed:
            job = self.jobs.get(job_id)
            if job is None or job.ended or step in job.steps:
                raise ConflictError(f"there is no job {job_id!r} that runs and has no step {step!r}")
            job.steps.add(step)
        try:
            return self.client.exec(job_id, step, process, attach_stdio=partial(self.attach_step, step))
        except BaseException:
            self.ended(job_id, job, step)
            raise

    def attach(self, dio: cio.DirectIO) -> cio.IO:
        """Pass a job's output on; at its start, and after a restore."""
        return self.attach_step(None, dio)

    def attach_step(self, step: str | None, dio: cio.DirectIO) -> cio.IO:
        """Likewise for a step's."""

        def take(data: bytes) -> None:
            self.say("output", job=dio.container_id, step=step, text=data.decode(errors="replace"))

        return cio.copy(stdout=take, stderr=take)(dio)

    # -------------------------------------------------------------------------------------------------------- events

    def process_event(self, job_id: str, event: EventType, info: EventInfo) -> None:
        """Receive an event, in the order of the job's; its thread is ours for as long as we like."""
        if event is not EventType.EXIT:
            return
        self.restored.wait()
        step = None if info.process_id == job_id else info.process_id
        self.say_exit(job_id, step, info.pid, info.exit_code, info.exited_at)
        with self.changed:
            job = self.jobs.get(job_id)
        if job is None:
            return
        with job.lock:  # `run` may not know its pid yet
            if step is None and job.pid != info.pid:
                return  # the end of a start that `run` has begun anew
        self.ended(job_id, job, step)

    def say_exit(self, job_id: str, step: str | None, pid: int, code: int, at: datetime | None) -> None:
        """Tell of an exit."""
        self.say("exit", job=job_id, step=step, pid=pid, code=code, at=at and at.isoformat())

    def ended(self, job_id: str, job: Job, step: str | None) -> None:
        """Take note of an end, and remove a job that has ended with all its steps."""
        with self.changed:
            if step is None:
                job.ended = True
            else:
                job.steps.discard(step)
            over = job.ended and not job.steps
        if over:
            self.remove(job_id)

    def remove(self, job_id: str) -> None:
        """Remove a container and its task."""
        self.patiently(partial(self.delete_task, job_id))
        with suppress(NotFoundError):
            self.patiently(partial(self.delete, job_id))
        self.forget(job_id)
        self.say("removed", job=job_id)

    def delete_task(self, job_id: str) -> None:
        """Delete a task, if it is there. The client's verb returns its errors, as Go's does."""
        error = self.client.delete_task(job_id).error
        if error is not None and not isinstance(error, NotFoundError):
            raise error

    def delete(self, job_id: str) -> None:
        """Delete a container, with a task that has come to light since: of a start that was cut off with an earlier runner."""
        try:
            self.client.delete(job_id)
        except FailedPreconditionError:
            self.client.replace(job_id, self.spec(["true"]))  # which ends whatever goes by that name
            self.client.delete(job_id)

    def forget(self, job_id: str) -> None:
        """Let its name be used again."""
        with self.changed:
            self.jobs.pop(job_id, None)
            self.changed.notify_all()

    # ----------------------------------------------------------------------------------------------- start and end

    def restore(self) -> None:
        """Take back the jobs of an earlier runner, and clear away those that have ended."""
        found: dict[str, Restored] = {}
        deadline = time.monotonic() + PATIENCE
        while True:
            results = self.patiently(
                partial(self.client.restore_all, self.attach, attach_exec_stdio=self.attach_step)
            )
            found |= {job_id: each for job_id, each in results.items() if isinstance(each, Restored)}
            broken = {job_id: each for job_id, each in results.items() if isinstance(each, Exception)}
            if not broken or time.monotonic() > deadline or self.stopping.wait(PAUSE):
                break
        for job_id, error in broken.items():
            self.say("failed", command={"do": "restore", "job": job_id}, error=str(error))
        for job_id, each in found.items():
            self.jobs[job_id] = Job(pid=each.pid, steps=set(each.execs))
            self.say("restored", job=job_id, pid=each.pid, alive=each.alive, steps=each.execs)
        self.restored.set()
        self.say("ready")
        for job_id, each in found.items():
            self.pool.submit(self.settle, job_id, each)

    def settle(self, job_id: str, restored: Restored) -> None:
        """Finish what the earlier runner was doing with a job when it was killed."""
        try:
            if not restored.alive:  # nobody will be told by an event
                if restored.pid:  # told before it is removed: who is killed between the two has a successor
                    status = self.client.wait(job_id)
                    self.say_exit(job_id, None, restored.pid, status.code, status.exited_at)
                self.remove(job_id)
            elif (
                self.patiently(partial(self.client.status, job_id)) is Status.CREATED
            ):  # and would be for ever
                self.patiently(partial(self.client.signal_process, job_id, "init", signal.SIGKILL))
        except NotFoundError:
            pass  # it has ended meanwhile, which an event tells
        except LibcontainerdError as error:
            self.say("failed", command={"do": "restore", "job": job_id}, error=str(error))

    def finish(self) -> None:
        """Wait until all commands are carried out and all jobs are removed."""
        self.pool.shutdown()
        with self.changed:
            self.changed.wait_for(lambda: not self.jobs)


def main() -> None:
    """Read commands until there are no more, or SIGTERM."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    address, state_dir, namespace, rootfs = sys.argv[1:]
    with Runner(address, os.path.abspath(state_dir), namespace, os.path.abspath(rootfs)) as runner:
        runner.restore()
        for line in sys.stdin:
            runner.take(line)
        runner.finish()


if __name__ == "__main__":
    main()
