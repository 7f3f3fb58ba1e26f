"""What a round has asked for, what it was told, and whether the two agree. It knows nothing of how either was done."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

KILLED: Final = 137
UNKNOWN: Final = 255

_OUTAGE: Final = 10.0
"""Seconds after a fault in which the runner may still be without events."""

Line = Mapping[str, object]


@dataclass
class Program:
    """What a process shall print, and how it ends if nobody hinders it."""

    args: list[str]
    text: str
    code: int


@dataclass
class Expected:
    """A process that was asked for: a job's init, or a step.

    Attributes:
        codes: What it may end with, as far as what was done to it says.
        asked: Whether the command is under way: sent to a runner that has not answered it and lives.
        uncertain: Whether its start may have been cut off, so that there may have been runs that nobody was told of.
        shim_killed: Whether the shim was killed under it.
        lives: The lives of the runner in which it may have run.
        pids: Its runs, as the runner has told.
        exits: The codes that were told, by life and pid.
        output: What it wrote, by life.
    """

    job: str
    step: str | None
    program: Program
    codes: set[int]
    asked: bool = True
    uncertain: bool = False
    shim_killed: bool = False
    lives: set[int] = field(default_factory=set)
    pids: set[int] = field(default_factory=set)
    exits: dict[tuple[int, int], list[int]] = field(default_factory=lambda: defaultdict(list))
    output: dict[int, str] = field(default_factory=lambda: defaultdict(str))

    def __str__(self) -> str:
        return f"step {self.step} of {self.job}" if self.step else self.job

    def problems(self, lives: int) -> list[str]:
        """Say what is wrong with what was told of it, now that all is over."""
        found = []
        told = {pid for _, pid in self.exits}
        if (unexpected := told - self.pids) and not self.uncertain:
            found.append(f"exits of runs that were not told to have begun: {sorted(unexpected)}")
        if len(self.pids) > 1 and not self.uncertain:
            found.append(f"more than one run: {sorted(self.pids)}")
        for (life, pid), codes in sorted(self.exits.items()):
            if len(codes) > 1:
                found.append(f"run {pid}: {len(codes)} exits in life {life} of the runner: {codes}")
        for pid in sorted(self.pids):
            ends = {code for (_, which), codes in self.exits.items() if which == pid for code in codes}
            # A shim that dies while no runner lives, or that containerd forgets after a start that was cut off, takes all that
            # was known of its processes with it: a later runner finds a container without a task.
            if not ends and not ((self.shim_killed or self.uncertain) and lives > 1):
                found.append(f"run {pid}: no exit")
            if len(ends) > 1:
                found.append(f"run {pid}: different codes: {sorted(ends)}")
            if wrong := ends - self.codes:
                found.append(f"run {pid}: ended with {sorted(wrong)}, which is none of {sorted(self.codes)}")
        return [f"{self}: {each}" for each in found + self._output_problems()]

    def _output_problems(self) -> list[str]:
        """What was written before the exit is there, as far as the reader lived."""
        if self.uncertain:
            return []
        ended = {code for codes in self.exits.values() for code in codes}
        whole = "".join(self.output[life] for life in sorted(self.output))
        if len(self.lives) == 1:
            if ended == {self.program.code} and not self.shim_killed and self.codes == {self.program.code}:
                if whole != self.program.text:
                    return [f"output: {_difference(whole, self.program.text)}"]
            elif not self.program.text.startswith(whole):
                return [f"output, though it was killed: {_difference(whole, self.program.text)}"]
            return []
        # What was on its way in a runner that was killed is lost; each life has a piece without a gap all the same.
        at = 0
        for life in sorted(self.output):
            if (at := self.program.text.find(self.output[life], at)) < 0:
                return [f"output in life {life} has gaps: {self.output[life][-200:]!r}"]
            at += len(self.output[life])
        return []


def _difference(got: str, wanted: str) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted))
    )
    return (
        f"{len(got)} of {len(wanted)} characters, the first {same} are right, then {got[same : same + 40]!r} for"
        f" {wanted[same : same + 40]!r}"
    )


class Ledger:
    """All of a round's processes. Safe to use from any thread."""

    def __init__(self) -> None:
        self.changed = threading.Condition()  # guards all below
        self.life = 0
        self.ready = False
        self.faults = 0
        self.odd: list[str] = []
        self._history: list[str] = []
        self._last_outage = -math.inf
        self._every: list[Expected] = []
        self._latest: dict[tuple[str, str | None], Expected] = {}
        self._alive: set[str] = set()  # the jobs that are there, as far as the runner has told
        self._cut_off: set[str] = set()  # those that were being started or removed in a fault

    # ------------------------------------------------------------------------------------------- what the round does

    def ask(self, job: str, step: str | None, program: Program) -> None:
        """Note a command to run a process."""
        with self.changed:
            self._note(f"asked for {json.dumps(job)} {step or ''}")
            one = Expected(job, step, program, {program.code}, lives={self.life})
            if step is not None:
                one.codes.add(KILLED)  # init may end before it
            self._every.append(one)
            self._latest[job, step] = one
            if step is None:
                self._alive.add(job)

    def killed(self, job: str, step: str | None) -> None:
        """Note a SIGKILL that is about to be sent."""
        with self.changed:
            self._latest[job, step].codes.add(KILLED)

    def shim_killed(self, job: str) -> None:
        """Note that a job's shim is about to be killed."""
        with self.changed:
            for (name, step), one in self._latest.items():
                if name == job:
                    one.shim_killed = True
                    one.codes |= {KILLED} if step is None else {KILLED, UNKNOWN}
                    # containerd finds out two seconds later, tells it once, and knows of the task no more.
                    if time.monotonic() < self._last_outage + _OUTAGE:
                        one.codes.add(UNKNOWN)
            self._fault(f"shim of {json.dumps(job)}")

    def fault(self, what: str) -> None:
        """Note that something is about to be killed or cut."""
        with self.changed:
            self._outage(what)

    def _outage(self, what: str) -> None:
        self._last_outage = time.monotonic()
        for one in self._every:
            if one.shim_killed and not one.exits:
                one.codes.add(UNKNOWN)
        self._fault(what)

    def _note(self, what: str) -> None:
        self._history.append(f"{datetime.now(UTC):%H:%M:%S.%f} {what}")

    def _fault(self, what: str) -> None:
        self._note(f"FAULT {what}")
        self.faults += 1
        for one in self._latest.values():
            if one.asked:
                one.uncertain = True
                one.codes.add(KILLED)  # what was begun may be taken back
            if one.step is None and (one.asked or (one.exits and one.job in self._alive)):
                self._cut_off.add(one.job)

    def runner_killed(self) -> None:
        """Note that the runner is dead, and that whatever it says from now on is another's."""
        with self.changed:
            self._outage("runner")
            self.life += 1
            self.ready = False
            self._alive.clear()
            for one in self._latest.values():
                one.asked = False

    # ------------------------------------------------------------------------------------------- what it is told

    def told(self, life: int, line: Line) -> None:
        """Note what the runner has said."""
        with self.changed:
            if line.get("event") != "output":
                self._note(f"life {life}: {json.dumps(line)}")
            self._told(life, line)
            self.changed.notify_all()

    def _told(self, life: int, line: Line) -> None:
        now = life == self.life
        match line:
            case {"event": "ready"}:
                self.ready = now
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
            case {"event": "output", "job": str(job), "step": str() | None as step, "text": str(text)}:
                self._latest[job, step].output[life] += text
            case {
                "event": "exit",
                "job": str(job),
                "step": str() | None as step,
                "pid": int(pid),
                "code": int(code),
            }:
                one = self._run(job, step, pid)
                one.exits[life, pid].append(code)
                one.lives.add(life)
            case {"event": "removed", "job": str(job)}:
                if now:
                    self._alive.discard(job)
            case {
                "event": "failed",
                "command": {"do": "run" | "exec", "job": str(job), **rest},
                "error": error,
            }:
                step = str(rest["step"]) if "step" in rest else None
                self._failed(self._latest[job, step], str(error), now=now)
            case {"event": "failed", "command": {"do": "kill"}}:
                pass  # it had ended
            case _:
                self.odd.append(f"the runner said {line}")

    def _restored(self, life: int, job: str, pid: int, steps: Mapping[str, object]) -> None:
        for (name, _), one in self._latest.items():
            if name == job:
                one.lives.add(life)
        if pid:
            self._latest[job, None].pids.add(pid)
        for step, number in steps.items():
            if isinstance(number, int):
                self._latest[job, step].pids.add(number)

    def _failed(self, one: Expected, error: str, *, now: bool) -> None:
        one.asked = one.asked and not now
        if one.step is None:
            if now:
                self._alive.discard(one.job)
            if not one.uncertain and not self.faults:
                self.odd.append(f"{one} could not be started: {error}")
        one.uncertain = True

    def _run(self, job: str, step: str | None, pid: int) -> Expected:
        """Whose exit this is: a name may be used again, and an exit may be told once more in a later life."""
        for one in reversed(self._every):
            if (one.job, one.step) == (job, step) and pid in one.pids:
                return one
        return self._latest[job, step]

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

    def cut_off(self) -> set[str]:
        """The jobs that were being started or removed in a fault."""
        with self.changed:
            return set(self._cut_off)

    def under_way(self) -> int:
        """How many commands the runner has not answered."""
        with self.changed:
            return sum(one.asked for one in self._latest.values())

    def problems(self) -> list[str]:
        """All that is wrong at the end."""
        with self.changed:
            return self.odd + [each for one in self._every for each in one.problems(self.life + 1)]

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
            runs = sum(len(one.pids) for one in self._every)
            exits = sum(len(codes) for one in self._every for codes in one.exits.values())
            uncertain = sum(one.uncertain for one in self._every)
        return (
            f"{len(self._every)} processes asked for, {runs} runs, {exits} exits, {uncertain} starts cut off"
        )
