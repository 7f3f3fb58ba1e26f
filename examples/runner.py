"""A daemon like a CI runner's: jobs come in as JSON lines, what happens to them goes out as JSON lines.

A job is a container, a step is an exec in it. Commands, on stdin:

    {"do": "run", "job": "build-7", "args": ["sleep", "60"]}
    {"do": "exec", "job": "build-7", "step": "test", "args": ["sh", "-c", "echo hello; exit 3"]}
    {"do": "kill", "job": "build-7", "step": "test", "signal": 15}      (without a step: the job itself)

Answers, on stdout: `started` and `failed` to a command, `output`, `exit`, and `removed` when nothing of a job is left. After its
start the runner takes back what an earlier one has left behind, even one that was killed: it says `restored` of each job,
then `ready`. Job, step and pid name a run. A start that containerd's end cuts off is begun anew; `output` and `started` have the number
of the attempt, for the last words of one that was given up can come late.

Every run that was told to have begun has exactly one exit, over all lives of the runner: `started`, `restored`, `exit` and
`removed` are in a journal, STATE_DIR.journal, before they are on stdout. Who reads stdout of a runner that was killed finds
in the journal what did not get there. The code is 255 where containerd does not know it any more.

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
from datetime import UTC, datetime
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

import structlog

from journal import Journal, Run
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
class Process:
    """A job's own process, or a step, from its command or a restore on."""

    starting: threading.Lock = field(default_factory=threading.Lock)  # held until it has begun, or failed
    pid: int = 0
    over: bool = False


@dataclass
class Job:
    """A container of ours, from `run` or a restore until it is removed."""

    init: Process = field(default_factory=Process)
    steps: dict[str, Process] = field(default_factory=dict)

    def process(self, step: str | None) -> Process | None:
        """A step, or the job's own."""
        return self.init if step is None else self.steps.get(step)

    @property
    def over(self) -> bool:
        """Whether nothing of it runs."""
        return self.init.over and all(step.over for step in self.steps.values())


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
        self.journal = Journal(f"{state_dir}.journal")
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
        self.journal.close()

    def say(self, event: str, **fields: object) -> None:
        """Write a line."""
        with self.output:
            print(json.dumps({"event": event, **fields}), flush=True)

    def tell(self, event: str, **fields: object) -> None:
        """Write a line that counts: no exit twice, whoever has told it."""
        if self.journal.tell({"event": event, **fields}):
            self.say(event, **fields)

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
                    self.run(job, args)
                case {"do": "exec", "job": str(job), "step": str(step), "args": [*args]}:
                    self.exec(job, step, args)
                case {"do": "kill", "job": str(job), "signal": int(number), **rest}:
                    process = str(rest.get("step") or "init")
                    self.patiently(partial(self.client.signal_process, job, process, number))
                case _:
                    raise ValueError("that is no command")
        except (ValueError, LibcontainerdError) as error:
            self.say("failed", command=command, error=str(error))

    def run(self, job_id: str, args: list[str]) -> None:
        """Make and start a container. A start of which nobody knows how it ended is begun anew."""
        spec = self.spec(args)
        job, attempt = Job(), 0
        with self.changed:
            if job_id in self.jobs:
                raise ConflictError(f"there is a job {job_id!r}")
            self.jobs[job_id] = job

        def start() -> int:
            nonlocal attempt
            self.client.replace(job_id, spec)
            self.tell_lost(job_id, self.journal.unended(job_id))  # of one that could not be restored
            attempt += 1
            return self.client.start(job_id, attach_stdio=partial(self.attach, attempt=attempt))

        try:
            with job.init.starting:
                # A start that was cut off with an earlier runner can bring its task to light between the two.
                job.init.pid = self.patiently(start, (*AWAY, ConflictError))
                self.tell("started", job=job_id, step=None, pid=job.init.pid, attempt=attempt)
        except BaseException:
            with suppress(LibcontainerdError):  # no such program, say: the container is still ours
                self.patiently(partial(self.client.delete, job_id))
            self.forget(job_id)
            raise

    def spec(self, args: list[str]) -> oci.Spec:
        """What a job's container is to be."""
        return oci.build(
            oci.default_spec(), oci.with_rootfs(self.rootfs, readonly=True), oci.with_args(*args)
        )

    def exec(self, job_id: str, step: str, args: list[str]) -> None:
        """Start a further process. It is not tried twice: a step that may have run is not run again."""
        spec = oci.exec_process(oci.default_spec(), *args)
        process = Process()
        with self.changed:
            job = self.jobs.get(job_id)
            if job is None or job.init.over or (step in job.steps and not job.steps[step].over):
                raise ConflictError(f"there is no job {job_id!r} that runs and has no step {step!r}")
            job.steps[step] = process
        try:
            with process.starting:
                process.pid = self.client.exec(
                    job_id, step, spec, attach_stdio=partial(self.attach, step=step)
                )
                self.tell("started", job=job_id, step=step, pid=process.pid, attempt=1)
        except BaseException:
            self.ended(job_id, job, process)
            raise

    def attach(self, dio: cio.DirectIO, step: str | None = None, attempt: int = 1) -> cio.IO:
        """Pass the output of a job, or of a step, on: at its start, and after a restore."""

        def take(data: bytes) -> None:
            text = data.decode(errors="replace")
            self.say("output", job=dio.container_id, step=step, attempt=attempt, text=text)

        return cio.copy(stdout=take, stderr=take)(dio)

    # -------------------------------------------------------------------------------------------------------- events

    def process_event(self, job_id: str, event: EventType, info: EventInfo) -> None:
        """Receive an event, in the order of the job's; its thread is ours for as long as we like."""
        if event is not EventType.EXIT or not info.pid:
            return  # without a pid it is of a start that was cut off before there was a process
        self.restored.wait()
        step = None if info.process_id == job_id else info.process_id
        with self.changed:
            job = self.jobs.get(job_id)
            process = job.process(step) if job else None
        if process is not None:
            with process.starting:  # so that it is told to have begun before
                if process.pid != info.pid:
                    return  # of a start that failed, or was begun anew
        # Else a step that an earlier runner has started, and was killed before it could tell of it.
        self.tell_exit(job_id, (step, info.pid), info.exit_code, info.exited_at)
        if job is not None and process is not None:
            self.ended(job_id, job, process)

    def tell_exit(self, job_id: str, run: Run, code: int, at: datetime | None) -> None:
        """Tell of an exit."""
        step, pid = run
        self.tell("exit", job=job_id, step=step, pid=pid, code=code, at=at and at.isoformat())

    def tell_lost(self, job_id: str, runs: set[Run]) -> None:
        """Tell of the exits of runs that containerd does not know any more."""
        for run in runs:
            self.tell_exit(job_id, run, 255, datetime.now(UTC))

    def ended(self, job_id: str, job: Job, process: Process) -> None:
        """Take note of an end, and remove a job that has ended with all its steps."""
        with self.changed:
            before, process.over = process.over, True
            last = job.over and not before
        if last:
            self.remove(job_id)

    def remove(self, job_id: str) -> None:
        """Remove a container and its task."""
        self.patiently(partial(self.delete_task, job_id))
        with suppress(NotFoundError):
            self.patiently(partial(self.delete, job_id))
        with self.changed:  # who is told may use the name again at once
            self.tell("removed", job=job_id)
            self.forget(job_id)

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
                partial(
                    self.client.restore_all,
                    self.attach,
                    attach_exec_stdio=lambda step, dio: self.attach(dio, step),
                )
            )
            found |= {job_id: each for job_id, each in results.items() if isinstance(each, Restored)}
            broken = {job_id: each for job_id, each in results.items() if isinstance(each, Exception)}
            if not broken or time.monotonic() > deadline or self.stopping.wait(PAUSE):
                break
        for job_id, error in broken.items():
            self.say("failed", command={"do": "restore", "job": job_id}, error=str(error))
        for job_id in self.journal.jobs():
            if job_id not in found and job_id not in broken:
                self.tell_lost(job_id, self.journal.unended(job_id))
                self.tell("removed", job=job_id)
        gone = {}
        for job_id, each in found.items():
            self.tell("restored", job=job_id, pid=each.pid, alive=each.alive, steps=each.execs)
            alive: set[Run] = {*each.execs.items(), (None, each.pid if each.alive else 0)}
            gone[job_id] = self.journal.unended(job_id) - alive
            steps = {step: pid for step, pid in gone[job_id] if step is not None} | each.execs
            self.jobs[job_id] = Job(
                Process(pid=each.pid), {step: Process(pid=pid) for step, pid in steps.items()}
            )
        self.restored.set()
        self.say("ready")
        for job_id, each in found.items():
            self.pool.submit(self.settle, job_id, each, gone[job_id])

    def settle(self, job_id: str, restored: Restored, gone: set[Run]) -> None:
        """Finish what the earlier runner was doing with a job when it was killed.

        Args:
            job_id: The job.
            restored: What there is of it.
            gone: Its runs that have ended since, and whose exits are still to be told.
        """
        job = self.jobs[job_id]
        try:
            for run in gone:
                self.tell_outcome(job_id, run, restored)
            for step, pid in gone:
                if step is not None and job.steps[step].pid == pid:
                    self.ended(job_id, job, job.steps[step])
            if not restored.alive:  # nobody will be told by an event
                self.ended(job_id, job, job.init)
            elif (
                self.patiently(partial(self.client.status, job_id)) is Status.CREATED
            ):  # and would be for ever
                self.patiently(partial(self.client.signal_process, job_id, "init", signal.SIGKILL))
        except NotFoundError:
            pass  # it has ended meanwhile, which an event tells
        except LibcontainerdError as error:
            self.say("failed", command={"do": "restore", "job": job_id}, error=str(error))

    def tell_outcome(self, job_id: str, run: Run, restored: Restored) -> None:
        """Tell how a run ended while there was no runner. An event may tell it, too: of a step that containerd still knows."""
        step, pid = run
        with suppress(NotFoundError):
            if pid == (restored.pid if step is None else restored.execs.get(step, pid)):
                status = self.client.wait(job_id, step or "init")
                self.tell_exit(job_id, run, status.code, status.exited_at)
                return
        self.tell_lost(job_id, {run})

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
