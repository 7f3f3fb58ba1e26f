"""The bench: this library beside raw grpcio stubs, containerd's Go client and ``ctr``, on one private containerd.

``make bench`` runs it. Every round measures everything once with each peer, the peers one after the other and in another order
each time. What was measured is written down at once, so a run that was interrupted goes on where it stopped.

Environment: ``ROUNDS`` (5), ``GIB`` written to stdout in each of its measurements (1), ``ONLY`` the measures whose names
begin so, ``DOCS=1`` to put table and picture into docs/.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import structlog

from benchmarks import machine, report, scale
from benchmarks.peers import Process, first_reply
from benchmarks.samples import Samples
from libcontainerd import Remote, oci
from tests.conftest import fill_rootfs
from tests.integration.containers import kill_shims

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "build" / "bench"
GOCLIENT = OUTPUT / "goclient"

PEERS = ("library", "stubs", "go", "ctr")
TALKING = ("library", "stubs", "go")
"""Those that are one process and stay."""

ROUNDS = int(os.environ.get("ROUNDS", "5"))
STDOUT_BYTES = int(float(os.environ.get("GIB", "1")) * (1 << 30))
ONLY = os.environ.get("ONLY", "")

EVENTS = 50_000
CONTAINERS = 1000
IDLE_SECONDS = 10.0

MEASURES = {
    "lifecycle": (PEERS, {"do": "lifecycle", "count": 20, "workers": 1}),
    "lifecycle8": (PEERS, {"do": "lifecycle", "count": 48, "workers": 8}),
    "exec": (PEERS, {"do": "exec", "count": 30}),
    "stdout_file": (PEERS, {"do": "stdout", "bytes": STDOUT_BYTES, "into": "file"}),
    "stdout_discard": (PEERS, {"do": "stdout", "bytes": STDOUT_BYTES, "into": "discard"}),
    "version": (TALKING, {"do": "calls", "of": "version", "count": 500}),
    "status": (TALKING, {"do": "calls", "of": "status", "count": 500}),
    "list_pids": (TALKING, {"do": "calls", "of": "list_pids", "count": 200}),
    "signal_process": (TALKING, {"do": "calls", "of": "signal_process", "count": 50}),
}


class Bench:
    """One run, or the rest of one."""

    def __init__(self, address: str, directory: Path, samples: Samples) -> None:
        self._address = address
        self._samples = samples
        self._peers: dict[str, Process] = {}
        self._run = uuid.uuid4().hex[:8]
        self._directory = directory

    def start(self, stack: ExitStack) -> None:
        """Start the peers; they stay for the whole run."""
        rootfs = self._directory / "rootfs"
        rootfs.mkdir(mode=0o755)
        fill_rootfs(rootfs, Path(shutil.which("busybox") or "/bin/busybox"))
        spec = oci.build(
            oci.default_spec(), oci.with_rootfs(rootfs, readonly=True), oci.with_args("/bin/true")
        )
        for name in PEERS:
            directory = self._directory / name
            directory.mkdir()
            (directory / "spec.json").write_bytes(oci.dump(spec))
            command = [str(GOCLIENT)] if name == "go" else [sys.executable, "-m", f"benchmarks.peer_{name}"]
            namespace = f"bench-{self._run}-{name}"
            stack.callback(_remove_runc_directory, namespace)
            peer = Process([*command, self._address, namespace, str(directory)])
            stack.callback(peer.end)
            self._peers[name] = peer
            peer.ask({"do": "hold"})
            stack.callback(peer.ask, {"do": "release"})
            if name == "ctr":
                continue
            # What is first is slower: modules, caches, connections. It is nobody's to pay in the first round.
            peer.ask({"do": "lifecycle", "count": 3, "workers": 1})
            peer.ask({"do": "exec", "count": 3})

    def round(self, number: int) -> None:
        """Measure everything once."""
        for measure, (peers, request) in MEASURES.items():
            for name in _rotated(peers, number):
                if self._wanted(number, measure, name):
                    self._samples.add(number, measure, name, _per_gib(self._peers[name].ask(dict(request))))
        for name in _rotated(TALKING, number):
            if self._wanted(number, "first_reply", name):
                self._samples.add(number, "first_reply", name, self._first_reply(name))
        self._events(number)
        self._idle(number)

    def _wanted(self, number: int, measure: str, name: str) -> bool:
        if not measure.startswith(ONLY) or self._samples.has(number, measure, name):
            return False
        self._samples.add_spin(machine.spin())
        progress(f"round {number + 1} of {ROUNDS}: {measure}, {name}")
        return True

    def _first_reply(self, name: str) -> dict[str, float]:
        command = [str(GOCLIENT)] if name == "go" else [sys.executable, "-m", "benchmarks.first_reply", name]
        directory = self._directory / name
        return first_reply([*command, self._address, f"bench-{self._run}-{name}", str(directory)])

    def _events(self, number: int) -> None:
        """Stop the subscribers, publish to all of them, and let one after the other go on.

        All listen to the namespace of the library's containers, which is the only one that must know them.
        """
        namespace = f"bench-{self._run}-library"
        names = [name for name in _rotated(TALKING, number) if self._wanted(number, "events", name)]
        if not names:
            return
        for name in names:
            self._peers[name].ask({"do": "subscribe", "count": EVENTS, "of": namespace})
        publisher = Process(
            [
                str(GOCLIENT),
                self._address,
                f"bench-{self._run}-publisher",
                str(self._directory / "go"),
            ]
        )
        publish = {"do": "publish", "count": EVENTS, "bytes": CONTAINERS, "workers": 4, "of": namespace}
        publish["first"] = number * EVENTS
        with ExitStack() as stack:
            stack.callback(publisher.end)
            for name in names:
                self._peers[name].send({"do": "events"})
                stack.callback(self._peers[name].go_on)
                self._peers[name].stop()
            published = publisher.ask(publish)["wall"]
            self._samples.add(number, "events", "containerd", {"wall": published})
            for name in names:  # the others are still stopped
                began = self._peers[name].go_on()
                told = self._peers[name].receive()
                answer = {"wall": told["ended"] - began, "cpu": told["cpu"]}
                self._samples.add(number, "events", name, answer)

    def _idle(self, number: int) -> None:
        """All do nothing at once."""
        names = [name for name in TALKING if self._wanted(number, "idle", name)]
        for name in names:
            self._peers[name].send({"do": "idle", "seconds": IDLE_SECONDS})
        for name in names:
            self._samples.add(number, "idle", name, self._peers[name].receive())

    def scale_real(self) -> None:
        """Measure what many containers do to each other."""
        directory = self._directory / f"bench-{self._run}-many"
        directory.mkdir()
        shutil.copy(self._directory / "library" / "spec.json", directory)
        scale.measure_real(self._samples, self._address, directory, progress)
        _remove_runc_directory(directory.name)


def _per_gib(answer: dict[str, float]) -> dict[str, float]:
    """What was measured of a GiB, where it was measured of another amount; and what of it has not arrived."""
    if "bytes" not in answer:
        return answer
    told = {name: answer[name] / STDOUT_BYTES * (1 << 30) for name in ("wall", "cpu")}
    return told | {"lost": STDOUT_BYTES - answer["bytes"]}


def _rotated(names: tuple[str, ...], by: int) -> list[str]:
    by %= len(names)
    return [*names[by:], *names[:by]]


def _remove_runc_directory(namespace: str) -> None:
    with suppress(OSError):
        Path("/run/containerd/runc", namespace).rmdir()


def _without_containerds_own(
    _logger: object, _level: str, event: MutableMapping[str, object]
) -> MutableMapping[str, object]:
    if event.get("event") == "containerd_log":
        raise structlog.DropEvent
    return event


def progress(text: str) -> None:
    """Say where it is."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


@contextmanager
def containerd() -> Iterator[tuple[str, Path]]:
    """A private containerd's address, and a directory beside it.

    Below /run, where such state belongs: to make a FIFO can cost twenty times as much in a directory that many share.
    """
    directory = Path(tempfile.mkdtemp(prefix="lcb-", dir="/run"))
    directory.chmod(0o755)
    try:
        with Remote.start(directory / "root", directory / "run", log_level="error") as remote:
            try:
                yield remote.address, directory
            finally:
                kill_shims(remote.address)  # which a run that was interrupted has left
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def main() -> None:
    """Run the bench, or the rest of one, and say what came out."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        processors=[_without_containerds_own, structlog.dev.ConsoleRenderer()],
    )
    OUTPUT.mkdir(parents=True, exist_ok=True)
    subprocess.run([ROOT / "benchmarks" / "install.sh", GOCLIENT], check=True)
    samples = Samples.open(
        OUTPUT / "samples.jsonl",
        {
            "revision": machine.revision(),
            "gib": f"{STDOUT_BYTES / (1 << 30):g}",
            "rounds": str(ROUNDS),
            "only": ONLY,
            **machine.facts(),
        },
    )
    with containerd() as (address, directory), ExitStack() as stack:
        bench = Bench(address, directory, samples)
        bench.start(stack)
        for number in range(ROUNDS):
            bench.round(number)
        if "scale".startswith(ONLY):
            bench.scale_real()
    if "scale".startswith(ONLY):
        scale.measure(samples, progress)
    report.write(samples, OUTPUT, ROOT / "docs" if os.environ.get("DOCS") == "1" else None)


if __name__ == "__main__":
    main()
