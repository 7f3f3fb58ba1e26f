"""What a round has asked for, what it was told, and whether the two agree. It knows nothing of how either was done.

What the runner says on stdout steers the round; what it has written into its journal is judged. A run is a process that the
journal says has begun, and each has exactly one exit there, over all lives of the runner.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

KILLED: Final = 137
UNKNOWN: Final = 255

_OUTAGE: Final = 10.0
"""Seconds after the first answer of containerd since a fault in which somebody may still be looking for what it missed."""

_IN_FLIGHT: Final = 1.0
"""Seconds after a fault in which an answer may be one of before."""

_DEATH: Final = 30.0
"""Seconds in which containerd finds out that a shim is dead and tells of it: two, on a machine with time for it."""

_TOGETHER: Final = 2.0
"""Seconds that the ends of a container's processes may be apart, as their shim notes them, when init's end ends them all."""

_NOT_BEGUN: Final = re.compile(r"\w+ exec fifo [^\n]*\n")
"""What runc's init says on stderr when it is not told to begin, because who was to tell it has been killed."""

Line = Mapping[str, object]


@dataclass
class Program:
    """What a process shall print, and how it ends if nobody hinders it."""

    args: list[str]
    text: str
    code: int


@dataclass(frozen=True)
class Exit:
    """An exit as the journal has it; `at` in seconds since the epoch."""

    life: int
    pid: int
    code: int
    at: float


@dataclass
class Outage:
    """A time in which somebody may have missed something.

    Attributes:
        begin: The first fault.
        last: The last one that met it.
        end: Infinite until the runner is ready and containerd has answered it.
        kinds: What was hit.
    """

    begin: float
    last: float
    kinds: set[str]
    end: float = math.inf

    def meets(self, begin: float, end: float) -> bool:
        """Whether it has a moment in common with another time."""
        return self.begin <= end and begin <= self.end


@dataclass
class Expected:
    """A process that was asked for: a job's init, or a step.

    Attributes:
        init: For a step, its job's.
        asked: Whether the command is under way: sent to a runner that has not answered it and lives.
        cut_off: There was a fault while it was asked for: a start may have been taken back, and a job's begun anew.
        orphaned: The runner was killed while it was asked for: it may have begun, and nobody was told.
        failed_at: When the runner said that it could not be started.
        killed: A SIGKILL was sent.
        shim_killed_at: When the shim was killed under it.
        ended: Whether its exit was said on stdout: what is done later is not done to it.
        removed_in: The life in which it was told to be gone with its job.
        lives: The lives of the runner in which it may have run.
        pids: Its runs, as far as stdout tells.
        begun: Its runs in the journal, and which attempt's answer told of them; 0 where it was a restore.
        exits: Its exits in the journal.
        output: What it wrote, by life and attempt.
    """

    job: str
    step: str | None
    program: Program
    init: Expected | None = None
    asked: bool = True
    cut_off: bool = False
    orphaned: bool = False
    failed_at: float | None = None
    killed: bool = False
    shim_killed_at: float | None = None
    ended: bool = False
    removed_in: int | None = None
    lives: set[int] = field(default_factory=set)
    pids: set[int] = field(default_factory=set)
    begun: dict[int, int] = field(default_factory=dict)
    exits: list[Exit] = field(default_factory=list)
    output: dict[int, dict[int, str]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"step {self.step} of {self.job}" if self.step else self.job

    @property
    def may_have_run_untold(self) -> bool:
        """Whether a runner may find a run of it that none has told of.

        One that was killed before it could tell; or that could not take back a start before it was killed.
        """
        return self.orphaned or (self.cut_off and self.failed_at is not None)

    def problems(self, ledger: Ledger) -> list[str]:
        """Say what is wrong with what was told of it, now that all is over."""
        found = self._failure_problems(ledger)
        if self.asked:
            found.append("the command was never answered")
        told = {each.pid for each in self.exits}
        if (unexpected := told - self.begun.keys()) and not self.may_have_run_untold:
            found.append(f"exits of runs that were not told to have begun: {sorted(unexpected)}")
        if len(runs := told | self.begun.keys()) > 1:
            found.append(f"more than one run: {sorted(runs)}")
        for pid in sorted(runs):
            exits = [each for each in self.exits if each.pid == pid]
            if not exits:
                found.append(f"run {pid}: no exit")
            if len(exits) > 1:
                codes = ", ".join(f"{each.code} in life {each.life}" for each in exits)
                found.append(f"run {pid}: {len(exits)} exits: {codes}")
            for each in exits:
                if each.code not in (right := self._codes(each, ledger)):
                    found.append(f"run {pid}: ended with {each.code}, which is none of {sorted(right)}")
        return [f"{self}: {each}" for each in found + self._output_problems(ledger)]

    def _failure_problems(self, ledger: Ledger) -> list[str]:
        """A start fails only where a fault comes between; a step's, which is not tried twice, in an outage or when its job ends."""
        if self.failed_at is None or self.cut_off or self.shim_killed_at is not None:
            return []
        if self.init is not None and any(
            each.meets(self.failed_at, self.failed_at) for each in ledger.outages
        ):
            return []
        if self.init is not None and self.init.shim_killed_at is not None:
            return []  # whether before it was asked for or after: it is some time until containerd says that init has ended
        if self.init is not None:
            ends = [each.at for each in self.init.exits]
            if not self.init.begun or any(at < self.failed_at + _TOGETHER for at in ends):
                return []
        return ["it could not be started"]

    def _codes(self, exit_: Exit, ledger: Ledger) -> set[int]:
        """What this run may have ended with."""
        right = {self.program.code}
        if self.killed:
            right.add(KILLED)
        if self.init is not None and self.init.may_end_at(exit_.at):
            right.add(KILLED)  # the kernel kills what is left in a pid namespace when its init ends
        # A start that a dead runner was taking back, or that its successor finds made but not started, is killed.
        if self.may_have_run_untold and not self.begun.get(exit_.pid):
            right.add(KILLED)
        if (at := self.shim_killed_at) is not None:
            if self.init is not None:
                right.add(UNKNOWN)  # containerd knows of execs what the shim tells, and nothing else
            else:
                right.add(
                    KILLED
                )  # which is what containerd says of init, once, and then knows of the task no more:
                if any(each.meets(at, min(exit_.at, at + _DEATH)) for each in ledger.outages):
                    right.add(UNKNOWN)  # who was not listening then cannot find out
        if ledger.forgets_the_ended and self._may_be_forgotten(exit_, ledger):
            right.add(UNKNOWN)
        return right

    def may_end_at(self, at: float) -> bool:
        """Whether it may have ended at this time; where its shim did not live to say when, that is not known."""
        return self.shim_killed_at is not None or any(
            each.code == UNKNOWN or abs(each.at - at) < _TOGETHER for each in self.exits
        )

    def _may_be_forgotten(self, exit_: Exit, ledger: Ledger) -> bool:
        """Whether containerd has cleaned up an ended init, with its execs, when it was started again: 1.7 and later do."""
        outages = [
            each for each in ledger.outages if "containerd" in each.kinds and each.meets(exit_.at, exit_.at)
        ]
        if self.init is None:
            return bool(outages)
        ends = [each.at for each in self.init.exits]
        return any(one.meets(at, exit_.at) for one in outages for at in ends)

    def _output_problems(self, ledger: Ledger) -> list[str]:
        """What was written before the exit is there, as far as the reader lived."""
        text, first = self.program.text, min(self.lives)
        # What a killed shim had taken from a process and not yet passed on is gone.
        whole = any(each.code == self.program.code for each in self.exits) and self.shim_killed_at is None
        attempts = self.output.get(first, {})
        answered = max(self.begun.values(), default=0)
        for attempt, written in {answered: "", **attempts}.items():
            if attempt != answered and _NOT_BEGUN.fullmatch(written):
                continue
            all_of_it = attempt == answered > 0 and self.lives == {first} and whole
            if not text.startswith(written) or (all_of_it and written != text):
                return [f"output of attempt {attempt}: {_difference(written, text)}"]
        # What was on its way in a runner that was killed is lost; each life has a piece without a gap all the same.
        at, piece = len(attempts.get(answered, "")), ""
        for life in sorted(self.output.keys() - {first}):
            piece = "".join(self.output[life].values())
            if not answered and _NOT_BEGUN.fullmatch(piece):
                continue
            if (found := text.find(piece, at)) < 0:
                return [f"output in life {life} has gaps: {piece[-200:]!r}"]
            at = found + len(piece)
        if whole and piece and self._was_heard_out(ledger) and not text.endswith(piece):
            return [f"output in life {max(self.output)} has no end: {piece[-200:]!r}"]
        return []

    def _was_heard_out(self, ledger: Ledger) -> bool:
        """Whether it ended while a runner was reading that lived until its job was removed."""
        return any(
            ledger.ready_at.get(each.life, math.inf) < each.at and self.removed_in == each.life
            for each in self.exits
        )


def _alike(one: str, other: str) -> int:
    """How many characters the two begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _difference(got: str, wanted: str) -> str:
    same = _alike(got, wanted)
    return (
        f"{len(got)} of {len(wanted)} characters, the first {same} are right, then {got[same : same + 40]!r} for"
        f" {wanted[same : same + 40]!r}"
    )


class Ledger:
    """All of a round's processes. Safe to use from any thread.

    Args:
        release: containerd's major and minor version.
        clock: Tells the time, in seconds since the epoch.
    """

    def __init__(self, release: tuple[int, int] = (1, 6), clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.forgets_the_ended = release >= (1, 7)
        self.changed = threading.Condition()  # guards all below
        self.life = 0
        self.ready = False
        self.ready_at: dict[int, float] = {}
        self.outages: list[Outage] = []
        self.odd: list[str] = []
        self._history: list[str] = []
        self._every: list[Expected] = []
        self._latest: dict[tuple[str, str | None], Expected] = {}
        self._alive: set[str] = set()  # the jobs that are there, as far as the runner has told
        self._said: Counter[str] = Counter()  # what this life has said on stdout and must have in the journal
        self._journal: list[str] = []  # its lines when the life before ended

    # ------------------------------------------------------------------------------------------- what the round does

    def ask(self, job: str, step: str | None, program: Program) -> None:
        """Note a command to run a process."""
        with self.changed:
            self._note(f"asked for {json.dumps(job)} {step or ''}")
            init = None if step is None else self._latest[job, None]
            one = Expected(job, step, program, init, lives={self.life})
            self._every.append(one)
            self._latest[job, step] = one
            if step is None:
                self._alive.add(job)

    def killed(self, job: str, step: str | None) -> None:
        """Note a SIGKILL that is about to be sent."""
        with self.changed:
            one = self._latest[job, step]
            one.killed = one.killed or not one.ended

    def shim_killed(self, job: str) -> None:
        """Note that a job's shim is about to be killed."""
        with self.changed:
            for (name, _), one in self._latest.items():
                if name == job and not one.ended and one.removed_in is None:
                    one.shim_killed_at = self._clock()
            self._fault(f"shim of {json.dumps(job)}")

    def fault(self, what: str) -> None:
        """Note that containerd is about to be killed, or the connection to be cut."""
        with self.changed:
            self._outage(what)
            self._fault(what)

    def runner_dies(self) -> None:
        """Note that the runner is about to be killed."""
        with self.changed:
            self._outage("runner")

    def runner_killed(self) -> None:
        """Note that the runner is dead, and that whatever it says from now on is another's."""
        with self.changed:
            self.ready = False
            self._outage("runner")
            self._fault("runner")
            self.life += 1
            self._alive.clear()
            for one in self._latest.values():
                one.orphaned = one.orphaned or one.asked
                one.asked = False

    def _outage(self, kind: str) -> None:
        now = self._clock()
        if self.outages and now <= self.outages[-1].end:
            self.outages[-1].last, self.outages[-1].end = now, math.inf
            self.outages[-1].kinds.add(kind)
        else:
            self.outages.append(Outage(now, now, {kind}))

    def _containerd_has_answered(self) -> None:
        """Set the end of an outage."""
        now = self._clock()
        if self.ready and self.outages and now > self.outages[-1].last + _IN_FLIGHT:
            self.outages[-1].end = min(self.outages[-1].end, now + _OUTAGE)

    def _note(self, what: str) -> None:
        self._history.append(f"{datetime.now(UTC):%H:%M:%S.%f} {what}")

    def _fault(self, what: str) -> None:
        self._note(f"FAULT {what}")
        for one in self._latest.values():
            one.cut_off = one.cut_off or one.asked

    # ------------------------------------------------------------------------------------------------ what it is told

    def told(self, life: int, line: Line) -> None:
        """Note what the runner has said on stdout."""
        with self.changed:
            if line.get("event") != "output":
                self._note(f"life {life}: {json.dumps(line)}")
            if line.get("event") in ("started", "restored", "exit", "removed"):
                self._said[json.dumps(line)] += 1
            self._told(life, line)
            if life == self.life and line.get("event") in ("started", "removed", "ready"):
                self._containerd_has_answered()
            self.changed.notify_all()

    def _told(self, life: int, line: Line) -> None:
        now = life == self.life
        match line:
            case {"event": "ready"}:
                self.ready = now
                self.ready_at[life] = self._clock()
            case {"event": "started", "job": str(job), "step": str() | None as step, "pid": int(pid)}:
                one = self._latest[job, step]
                one.pids.add(pid)
                one.asked = one.asked and not now
            case {
                "event": "restored",
                "job": str(job),
                "pid": int(pid),
                "alive": bool(),
                "steps": dict(steps),
            }:
                if now:
                    self._alive.add(job)
                self._restored(life, job, pid, steps)
            case {
                "event": "output",
                "job": str(job),
                "step": str() | None as step,
                "attempt": int(attempt),
                "text": str(text),
            }:
                written = self._latest[job, step].output.setdefault(life, {})
                written[attempt] = written.get(attempt, "") + text
            case {"event": "exit", "job": str(job), "step": str() | None as step, "pid": int(pid)}:
                one = self._run(job, step, pid)
                one.ended = True
                one.lives.add(life)
            case {"event": "removed", "job": str(job)}:
                if now:
                    self._alive.discard(job)
            case {
                "event": "failed",
                "command": {"do": "run" | "exec", "job": str(job), **rest},
                "error": str(),
            }:
                self._failed(self._latest[job, str(rest["step"]) if "step" in rest else None], now=now)
            case {"event": "failed", "command": {"do": "kill"}}:
                pass  # it had ended
            case _:
                self.odd.append(f"the runner said {line}")

    def _restored(self, life: int, job: str, pid: int, steps: Mapping[str, object]) -> None:
        for (name, _), one in self._latest.items():
            if name == job and one.removed_in is None:
                one.lives.add(life)
        if pid:
            self._latest[job, None].pids.add(pid)
        for step, number in steps.items():
            if isinstance(number, int):
                self._latest[job, step].pids.add(number)

    def _failed(self, one: Expected, *, now: bool) -> None:
        one.asked = one.asked and not now
        one.failed_at = self._clock()
        if one.step is None and now:
            self._alive.discard(one.job)

    def _run(self, job: str, step: str | None, pid: int) -> Expected:
        """Whose run this is: a name may be used again."""
        for one in reversed(self._every):
            if (one.job, one.step) == (job, step) and pid in one.pids:
                return one
        return self._latest[job, step]

    # ---------------------------------------------------------------------------------------------------- the journal

    def journal(self, life: int, data: bytes) -> None:
        """Take the journal as a life of the runner has left it, after all that it has said on stdout."""
        # A torn last line was never told: the kernel may stop a write of who is killed between two pages.
        lines = data.decode().split("\n")[:-1]
        with self.changed:
            before, kept = self._journal, _without_removed(self._journal)
            if lines == before:
                new = []  # it was killed before it had read it; or had nothing to leave out, and nothing to tell
            elif lines[: len(kept)] == kept:
                new = lines[len(kept) :]
            else:
                new = lines
                self.odd.append(f"the journal of life {life} does not begin as the last one ended")
            self._journal = lines
            if missing := self._said - Counter(new):
                self.odd.append(f"life {life} has told what is not in its journal: {sorted(missing)}")
            self._said.clear()
            for line in new:
                self._journaled(life, json.loads(line))

    def _journaled(self, life: int, line: Line) -> None:
        match line:
            case {
                "event": "started",
                "job": str(job),
                "step": str() | None as step,
                "pid": int(pid),
                "attempt": int(attempt),
            }:
                self._begun(job, step, pid, attempt)
            case {"event": "restored", "job": str(job), "pid": int(pid), "steps": dict(steps)}:
                for step, number in {None: pid, **steps}.items():
                    if number:
                        self._begun(job, step, number, 0)
            case {
                "event": "exit",
                "job": str(job),
                "step": str() | None as step,
                "pid": int(pid),
                "code": int(code),
                "at": str(at),
            }:
                one = self._run(job, step, pid)
                one.exits.append(Exit(life, pid, code, datetime.fromisoformat(at).timestamp()))
                one.lives.add(life)
            case {"event": "removed", "job": str(job)}:
                for one in self._every:
                    if one.job == job and one.exits and one.removed_in is None:
                        one.removed_in = life
            case _:
                self.odd.append(f"the journal has {line}")

    def _begun(self, job: str, step: str | None, pid: int, attempt: int) -> None:
        one = self._run(job, step, pid)
        one.pids.add(pid)
        one.begun.setdefault(pid, attempt)

    # --------------------------------------------------------------------------------------------- what can be asked

    def running(self) -> list[str]:
        """The jobs that were told to have begun and not to be gone."""
        with self.changed:
            return sorted(job for job in self._alive if self._latest[job, None].pids)

    def present(self) -> list[str]:
        """The jobs that are not gone, begun or not."""
        with self.changed:
            return sorted(self._alive)

    def gone(self) -> list[str]:
        """The jobs that are gone, so that their names are free; none while a new runner has not said which it has found."""
        with self.changed:
            if not self.ready:
                return []
            return sorted({job for job, step in self._latest if step is None} - self._alive)

    def steps_of(self, job: str) -> list[str]:
        """The steps that were told to have begun in the job's last run."""
        with self.changed:
            return sorted(
                step
                for (name, step), one in self._latest.items()
                if name == job and step is not None and one.pids
            )

    def under_way(self) -> int:
        """How many commands the runner has not answered."""
        with self.changed:
            return sum(one.asked for one in self._latest.values())

    def problems(self) -> list[str]:
        """All that is wrong at the end."""
        with self.changed:
            left = [f"the journal still has {line}" for line in _without_removed(self._journal)]
            return self.odd + left + [each for one in self._every for each in one.problems(self)]

    def history(self, jobs: set[str]) -> list[str]:
        """What was told of some jobs, with the faults."""
        with self.changed:
            return [
                each
                for each in self._history
                if "FAULT" in each or any(json.dumps(job) in each for job in jobs)
            ]

    def summary(self) -> str:
        """In one line, what there was."""
        with self.changed:
            runs = sum(len(one.begun) for one in self._every)
            codes = Counter(each.code for one in self._every for each in one.exits)
            cut_off = sum(one.cut_off for one in self._every)
        return (
            f"{len(self._every)} processes asked for, {cut_off} starts cut off, {runs} runs, {codes.total()} exits,"
            f" {codes[KILLED]} of killed ones, {codes[UNKNOWN]} unknown"
        )


def _without_removed(lines: list[str]) -> list[str]:
    """What of a journal is about jobs that are not removed."""
    events = [json.loads(line) for line in lines]
    removed = {event["job"]: at for at, event in enumerate(events) if event["event"] == "removed"}
    return [line for at, line in enumerate(lines) if at > removed.get(events[at]["job"], -1)]
