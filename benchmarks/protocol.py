"""What the bench asks of a peer, and how a peer written in Python answers.

A peer is a program of its own: ``PEER ADDRESS NAMESPACE DIRECTORY``. It reads one request a line from its standard input, as
JSON, and answers each with one line. `DIRECTORY` holds the containers' spec, ``spec.json``, and is the peer's to use.

=============  ============================================================================================================
request        what is done
=============  ============================================================================================================
``lifecycle``  `count` containers, `workers` at a time: created, started with FIFOs, their output read to its end, waited
               for, and deleted
``hold``       make the one container that ``exec`` and ``calls`` use; ``release`` removes it
``exec``       `count` execs, one after the other: started with FIFOs, waited for, deleted
``stdout``     a container writes `bytes` zeros, and they go into a ``file`` or to whoever ``discard``s them
``calls``      `count` times one call: ``version``, ``status``, ``list_pids`` or ``signal_process``
``subscribe``  subscribe to the namespace `of`, and begin to wait for `count` events; ``events`` says when they had come
``idle``       do nothing for so many `seconds`
``quit``       end
=============  ============================================================================================================

The answers to what is timed hold ``wall`` and ``cpu``: seconds by the clock, and of the client process's CPU.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypedDict, cast

WRITER = ["/bin/dd", "if=/dev/zero", "bs=65536"]
"""What a container runs that shall write much."""


class Request(TypedDict, total=False):
    """One request. ``do`` is always there."""

    do: str
    count: int
    workers: int
    bytes: int
    into: str
    of: str
    seconds: float


Answer = dict[str, float]


class Peer(Protocol):
    """What a peer written in Python can do."""

    whose_cpu: int
    """`resource.RUSAGE_SELF`, or the children's for a peer that runs a program for each thing it does."""

    def lifecycle(self, container_id: str) -> None:
        """Take one container through its life."""

    def hold(self) -> None:
        """Make the container for `exec` and `call`."""

    def release(self) -> None:
        """Remove it."""

    def exec(self, exec_id: str) -> None:
        """Run one exec in it."""

    def stdout(self, container_id: str, size: int, into: str) -> int:
        """Have a container write, and say how many bytes have come."""

    def call(self, of: str) -> None:
        """Make one call."""

    def subscribe(self, namespace: str, count: int, done: Callable[[], None]) -> None:
        """Subscribe, and call `done` when so many events have come."""

    def close(self) -> None:
        """End."""


class Worker:
    """Reads requests, and has a peer do what they ask for."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._number = 0
        self._seen: Answer = {}
        self._all_seen = threading.Event()

    def serve(self) -> None:
        """Answer requests until the end."""
        for line in sys.stdin:
            request = cast("Request", json.loads(line))
            if request["do"] == "quit":
                break
            print(json.dumps(self._answer(request)), flush=True)
        self._peer.close()

    def _answer(self, request: Request) -> Answer:
        do, peer = request["do"], self._peer
        if do == "lifecycle":
            names = self._names("c", request["count"])
            return self._timed(lambda: _in_parallel(peer.lifecycle, names, request["workers"]))
        if do == "exec":
            names = self._names("e", request["count"])
            return self._timed(lambda: _in_parallel(peer.exec, names, 1))
        if do == "calls":
            return self._timed(lambda: _in_parallel(peer.call, [request["of"]] * request["count"], 1))
        if do == "stdout":
            [name] = self._names("s", 1)
            came = 0

            def run() -> None:
                nonlocal came
                came = peer.stdout(name, request["bytes"], request["into"])

            return self._timed(run) | {"bytes": came}
        if do == "idle":
            threads = threading.active_count()
            return self._timed(lambda: time.sleep(request["seconds"])) | {"threads": threads}
        if do == "subscribe":
            self._subscribe(request["of"], request["count"])
        elif do == "events":
            self._all_seen.wait()
            return self._seen
        elif do == "hold":
            peer.hold()
        elif do == "release":
            peer.release()
        else:
            raise ValueError(f"no such request: {do}")
        return {}

    def _subscribe(self, namespace: str, count: int) -> None:
        self._all_seen.clear()
        used = 0.0

        def done() -> None:
            self._seen = {"ended": time.time(), "cpu": self._cpu() - used}
            self._all_seen.set()

        self._peer.subscribe(namespace, count, done)
        used = self._cpu()

    def _names(self, kind: str, count: int) -> list[str]:
        first, self._number = self._number, self._number + count
        return [f"{kind}{number}" for number in range(first, self._number)]

    def _timed(self, work: Callable[[], None]) -> Answer:
        began, used = time.perf_counter(), self._cpu()
        work()
        return {"wall": time.perf_counter() - began, "cpu": self._cpu() - used}

    def _cpu(self) -> float:
        usage = resource.getrusage(self._peer.whose_cpu)
        return usage.ru_utime + usage.ru_stime


def _in_parallel(act: Callable[[str], None], names: list[str], workers: int) -> None:
    if workers == 1:
        for name in names:
            act(name)
        return
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(act, names))


def serve(make: Callable[[str, str, Path], Peer]) -> None:
    """Be the program that a peer is."""
    _, address, namespace, directory = sys.argv
    Worker(make(address, namespace, Path(directory))).serve()
