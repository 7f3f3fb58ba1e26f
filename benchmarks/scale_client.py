"""A client with more and more containers: what each verb and each event costs, and what idle containers do.

``scale_client fake`` or ``scale_client real ADDRESS DIRECTORY``. Prints a line of figures for each number of containers.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import cast

from benchmarks import logs
from benchmarks.peer_library import Counter
from benchmarks.peers import environment
from libcontainerd import Client, Restored, cio, oci

FAKE_NUMBERS = (10, 100, 1000, 10_000)
REAL_NUMBERS = (10, 50, 100, 200)

_CALLS = 400
_CYCLES = 30
_REPETITIONS = 5
"""Of which the median counts: the garbage collector, or the machine, falls into one or the other."""
_EVENTS = 15_000
_IDLE_SECONDS = 3.0
_ATTACHED = 1000
_PAGE = resource.getpagesize()

Figures = dict[str, float]


class Fake:
    """The fake's process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fake_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        told = self._receive()
        self.address, self.state_dir = str(told["address"]), str(told["state_dir"])

    def _receive(self) -> dict[str, object]:
        if self._process.stdout is None:
            raise ValueError("it was started without one")
        return cast("dict[str, object]", json.loads(self._process.stdout.readline()))

    def ask(self, count: int = 0, containers: int = 1) -> int:
        """Have so many events published; says how many calls there were since the last time."""
        if self._process.stdin is None:
            raise ValueError("it was started without one")
        print(json.dumps({"count": count, "containers": containers}), file=self._process.stdin, flush=True)
        return int(cast("int", self._receive()["calls"]))

    def end(self) -> None:
        """End it."""
        with self._process:  # which closes its streams, and waits
            pass


class Crowd:
    """A client whose containers grow in number."""

    def __init__(
        self, address: str, namespace: str, state_dir: str, spec: oci.Spec, fake: Fake | None
    ) -> None:
        self._counter = Counter()
        self._client = Client(address, namespace=namespace, state_dir=state_dir, backend=self._counter)
        self._spec = spec
        self._fake = fake
        self._size = 0
        self._memory = (0, 0)

    def grow(self, size: int) -> None:
        """Have so many idle containers."""
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(self._add, range(self._size, size)))
        self._size = size
        time.sleep(1.5)  # surplus threads end after a second

    def _add(self, number: int) -> None:
        self._client.create(f"b{number}", self._spec)
        self._client.start(f"b{number}")

    def figures(self) -> Figures:
        """What it costs with so many."""
        gc.collect()
        threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
        figures: Figures = {"threads": threads, "descriptors": descriptors, "rss": resident}
        size, before = self._memory
        if size:
            figures["bytes_each"] = (resident - before) / (self._size - size)
        self._memory = self._size, resident
        figures |= self._per_call("status", self._client.status)
        figures |= self._per_call("list_pids", self._client.list_pids)
        figures |= self._cycles()
        if self._fake is not None:
            figures |= self._events(self._fake)
        with timed() as idle:
            time.sleep(_IDLE_SECONDS)
        return figures | {"idle_cpu": idle["cpu"] / idle["wall"]}

    def _per_call(self, name: str, call: Callable[[str], object]) -> Figures:
        measured = []
        for _ in range(_REPETITIONS):
            with timed() as told:
                for number in range(_CALLS):
                    call(f"b{number % self._size}")
            measured.append(told)
        return {
            f"{name}_{kind}": median(told[kind] for told in measured) / _CALLS for kind in ("cpu", "wall")
        }

    def _cycles(self) -> Figures:
        """Containers that come and go beside the others."""
        verbs: dict[str, Callable[[str], object]] = {
            "create": lambda name: self._client.create(name, self._spec),
            "start": self._client.start,
            "signal_process": lambda name: self._client.signal_process(name, "init", signal.SIGKILL),
            "delete_task": lambda name: (self._client.wait(name), self._client.delete_task(name)),
            "delete": self._client.delete,
        }
        measured: dict[str, list[float]] = defaultdict(list)
        for _ in range(_REPETITIONS):
            for verb, act in verbs.items():
                with timed() as told:
                    for number in range(_CYCLES):
                        act(f"x{number}")
                measured[f"{verb}_cpu"].append(told["cpu"] / _CYCLES)
                measured[f"{verb}_wall"].append(told["wall"] / _CYCLES)
        return {name: median(values) for name, values in measured.items()}

    def _events(self, fake: Fake) -> Figures:
        everything = threading.Event()
        count = _EVENTS // (3 * self._size) * 3 * self._size or 3 * self._size
        self._counter.expect(count, everything.set)
        with timed() as told:
            fake.ask(count, self._size)
            if not everything.wait(120):
                raise RuntimeError("events are missing")
        return {"event_cpu": told["cpu"] / count, "event_wall": told["wall"] / count}

    def remove_all(self) -> None:
        """Remove every container."""
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(self._remove, range(self._size)))
        self._client.close()

    def _remove(self, number: int) -> None:
        name = f"b{number}"
        self._client.signal_process(name, "init", signal.SIGKILL)
        self._client.wait(name)
        self._client.delete_task(name)
        self._client.delete(name)

    def come_back(self, fake: Fake, address: str, namespace: str, state_dir: str) -> Figures:
        """Leave the containers alone, and restore all with a new client."""
        self._client.close()
        with Client(address, namespace=namespace, state_dir=state_dir) as client:
            fake.ask()
            with timed() as told:
                restored = client.restore_all(cio.null_io)
            alive = sum(isinstance(each, Restored) and each.alive for each in restored.values())
            return {
                "alive": alive,
                "restore_wall": told["wall"],
                "restore_cpu": told["cpu"],
                "restore_calls": fake.ask(),
            }


@contextmanager
def timed() -> Iterator[Figures]:
    """What a block takes: seconds by the clock, and of this process's CPU."""
    told: Figures = {}
    began, used = time.perf_counter(), _cpu()
    yield told
    told |= {"wall": time.perf_counter() - began, "cpu": _cpu() - used}


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def attached(fake: Fake, spec: oci.Spec) -> Figures:
    """A thousand containers whose output is copied, and which are silent."""
    with Client(fake.address, namespace="attached", state_dir=fake.state_dir + "a") as client:

        def add(number: int) -> None:
            client.create(f"a{number}", spec)
            client.start(f"a{number}", attach_stdio=cio.copy(stdout=lambda _: None))

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(add, range(_ATTACHED)))
        time.sleep(1.5)
        threads = [thread.name for thread in threading.enumerate()]
        with timed() as idle:
            time.sleep(_IDLE_SECONDS)
        return {
            "containers": _ATTACHED,
            "threads": len(threads),
            "pumps": threads.count("libcontainerd-pump"),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "idle_cpu": idle["cpu"] / idle["wall"],
        }


def say(kind: str, number: int, figures: Figures) -> None:
    """Print what was measured."""
    print(json.dumps([kind, number, figures]), flush=True)


def on_fake() -> None:
    """Up to ten thousand, on the fake."""
    fake = Fake()
    try:
        spec = oci.build(oci.default_spec(), oci.with_args("sleep", "1000"))
        crowd = Crowd(fake.address, "bench", fake.state_dir, spec, fake)
        for number in FAKE_NUMBERS:
            crowd.grow(number)
            say("scale", number, crowd.figures())
        say("restored", number, crowd.come_back(fake, fake.address, "bench", fake.state_dir))
        say("attached", _ATTACHED, attached(fake, spec))
    finally:
        fake.end()


def on_real(address: str, directory: str) -> None:
    """Up to two hundred, on containerd."""
    spec = oci.build(
        oci.parse_spec(Path(directory, "spec.json").read_bytes()), oci.with_args("/bin/sleep", "100000")
    )
    crowd = Crowd(address, Path(directory).name, f"{directory}/state", spec, None)
    for number in REAL_NUMBERS:
        crowd.grow(number)
        say("scale_real", number, crowd.figures())
    crowd.remove_all()


if __name__ == "__main__":
    logs.to_stderr()
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if sys.argv[1] == "fake":
        on_fake()
    else:
        on_real(*sys.argv[2:])
