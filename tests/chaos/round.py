"""One round: random work on fifty containers while things are killed, then clean-up, then the reckoning."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from libcontainerd import Remote
from tests.chaos.daemon import Daemon
from tests.chaos.ledger import Ledger, Program
from tests.integration.containers import Raw, shims_of, wait_until
from tests.integration.proxy import Proxy

JOBS: Final = 50
_STEPS: Final = 40
_KILLS: Final = 12
_AGAIN: Final = 8
_FAULTS: Final = ("containerd", "shim", "runner", "connection")
_MORE_FAULTS: Final = 3
_AT_ONCE: Final = 6
_PATIENCE: Final = 120.0
_ASK_AGAIN: Final = 3.0
_GRACE: Final = 30.0

# grpc's threads and descriptors come and go; what grows with containers is seen through this all the same.
_MORE_THREADS: Final = 20
_MORE_DESCRIPTORS: Final = 16


class Round:
    """The work, drawn from a seed. The same seed draws the same work; when it meets what, the machine decides."""

    def __init__(
        self,
        seed: int,
        remote: Remote,
        proxy: Proxy,
        raw: Raw,
        *,
        directory: Path,
        rootfs: Path,
        release: tuple[int, int],
    ) -> None:
        self._random = random.Random(seed)
        self._remote = remote
        self._proxy = proxy
        self._raw = raw
        self.ledger = Ledger(release)
        self.log = directory / "runner.log"
        self._state_dir = directory / "bundles"
        self._numbers = iter(range(1, 1_000_000))
        self.daemon = Daemon(
            self.ledger,
            self.log,
            Path(f"{self._state_dir}.journal"),
            *(proxy.path, self._state_dir, raw.metadata[0][1], rootfs),
        )

    def run(self) -> list[str]:
        """Run it, and return what is wrong."""
        self._await_ready()
        threads, descriptors = self.daemon.threads(), self.daemon.descriptors()
        self._work()
        self._clear()
        problems = self._left_in_runner(threads, sum(descriptors.values()))
        if code := self.daemon.stop():
            problems.append(f"the runner ended with {code}")
        return problems + self.ledger.problems() + self._left_behind()

    # ---------------------------------------------------------------------------------------------------------- work

    def _work(self) -> None:
        actions: list[Callable[[], None]] = [self._start_job] * JOBS
        actions += [self._start_step] * _STEPS + [self._kill_process] * _KILLS + [self._start_again] * _AGAIN
        self._random.shuffle(actions)
        kinds = [*_FAULTS, *self._random.choices(_FAULTS, k=self._random.randint(0, _MORE_FAULTS))]
        self._random.shuffle(kinds)
        for kind in kinds:
            place = self._random.randint(len(actions) // 8, len(actions))
            actions.insert(place, getattr(self, f"_fault_{kind}"))
        for action in actions:
            with (
                self.ledger.changed
            ):  # so that not all starts are under way at once where the machine is slow
                self.ledger.changed.wait_for(lambda: self.ledger.under_way() < _AT_ONCE, _PATIENCE)
            action()
            time.sleep(self._random.choice((0, 0, 0.02, 0.1, 0.2)))

    def _await_ready(self) -> None:
        with self.ledger.changed:
            ready = self.ledger.changed.wait_for(lambda: self.ledger.ready, _PATIENCE)
        assert ready, "the runner does not come up"

    def _program(self, name: str) -> Program:
        """A process that writes, lives for a while, writes again, and ends with a code of its own."""
        lines, seconds = self._random.choice((0, 1, 30, 4000)), self._random.choice((0.0, 0.1, 0.5, 2.0, 5.0))
        code = self._random.randint(0, 100)
        script = f"seq 1 {lines} | sed 's/^/{name} /'; sleep {seconds}; echo {name} end; exit {code}"
        text = "".join(f"{name} {number}\n" for number in range(1, lines + 1)) + f"{name} end\n"
        return Program(["sh", "-c", script], text, code)

    def _start_job(self) -> None:
        self._run(f"job{next(self._numbers)}")

    def _start_again(self) -> None:
        if gone := self.ledger.gone():
            self._run(self._random.choice(gone))

    def _run(self, job: str) -> None:
        program = self._program(f"{job}.{next(self._numbers)}")
        self.ledger.ask(job, None, program)
        self.daemon.send(do="run", job=job, args=program.args)

    def _start_step(self) -> None:
        if running := self.ledger.running():
            job, step = self._random.choice(running), f"step{next(self._numbers)}"
            program = self._program(step)
            self.ledger.ask(job, step, program)
            self.daemon.send(do="exec", job=job, step=step, args=program.args)

    def _kill_process(self) -> None:
        if running := self.ledger.running():
            job = self._random.choice(running)
            self._kill(job, self._random.choice([None, *self.ledger.steps_of(job)]))

    def _kill(self, job: str, step: str | None) -> None:
        self.ledger.killed(job, step)
        self.daemon.send(do="kill", job=job, step=step, signal=int(signal.SIGKILL))

    # -------------------------------------------------------------------------------------------------------- faults

    def _fault_containerd(self) -> None:
        assert self._remote._supervisor is not None
        if pid := self._remote._supervisor.pid:
            self.ledger.fault("containerd")
            _kill(pid)

    def _fault_shim(self) -> None:
        if shims := self._shims():
            pid = self._random.choice(sorted(shims))
            self.ledger.shim_killed(shims[pid])
            _kill(pid)

    def _fault_runner(self) -> None:
        self.daemon.kill()
        if self._random.random() < 0.5:  # else it is killed while it restores, should that be next
            self._await_ready()

    def _fault_connection(self) -> None:
        self.ledger.fault("connection")
        broken = self._random.choice((0.0, 0.0, 0.5, 2.0))
        self._proxy.cut(stay_broken=broken > 0)
        time.sleep(broken)
        self._proxy.mend()

    def _shims(self) -> dict[int, str]:
        """The shims, with their containers."""
        found = {}
        for pid, line in shims_of(self._remote.address).items():
            if match := re.search(r" -id (\S+)", line):
                found[pid] = match[1]
        return found

    # ------------------------------------------------------------------------------------------- clean-up and reckoning

    def _clear(self) -> None:
        """Wait until every job has ended or been killed, and is gone."""
        deadline = time.monotonic() + _PATIENCE
        self._await_ready()
        while present := self.ledger.present():
            assert time.monotonic() < deadline, f"these jobs are never gone: {present}"
            assert self.daemon.alive, "the runner has died"
            for job in self.ledger.running():
                self._kill(job, None)
            with self.ledger.changed:
                self.ledger.changed.wait_for(lambda: not self.ledger.present(), _ASK_AGAIN)
        wait_until(lambda: not self._listed(), "containerd lists nothing", _PATIENCE)
        wait_until(lambda: not self._bundles(), "state_dir is empty", _PATIENCE)

    def _listed(self) -> set[str]:
        return {*self._raw.container_ids(), *self._raw.tasks_by_id()}

    def _bundles(self) -> list[str]:
        return os.listdir(self._state_dir) if self._state_dir.exists() else []

    def _left_in_runner(self, threads: int, descriptors: int) -> list[str]:
        """What the runner has more than at its beginning."""

        def grown() -> list[str]:
            now = self.daemon.descriptors()
            found = [f"the runner holds {name}" for name in now if name.startswith(f"{self._state_dir}/")]
            if (count := sum(now.values())) > descriptors + _MORE_DESCRIPTORS:
                found.append(f"the runner has {count} descriptors, at first {descriptors}: {now}")
            if (count := self.daemon.threads()) > threads + _MORE_THREADS:
                found.append(f"the runner has {count} threads, at first {threads}")
            return found

        deadline = time.monotonic() + _GRACE
        while (found := grown()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def _left_behind(self) -> list[str]:
        """The shims that are left, once the supervisor has had the time to find and end those that no call reaches."""
        deadline = time.monotonic() + _PATIENCE
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def _left(self) -> list[str]:
        # While a shim is being ended, containerd has a container of its id, for a moment longer than the shim.
        shims = [f"a shim is left of {job}" for job in sorted(self._shims().values())]
        return shims or [f"containerd lists {each} again" for each in sorted(self._listed())]


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(pid, signal.SIGKILL)
