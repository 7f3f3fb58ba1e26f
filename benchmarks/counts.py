"""What does not depend on the machine: calls, threads, descriptors and copies, counted on the fake. ``make bench-quick``.

Each is compared with what is written here. Who makes the library do more must change it here, and will be asked why.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.scale_client import Fake
from libcontainerd import Client, cio, oci
from libcontainerd.cio import DirectIO, FifoSet
from libcontainerd.testing import FakeContainerd

Counts = dict[str, object]

LIFECYCLE = [
    "Containers/Create",
    "Tasks/Create",
    "Tasks/Start",
    "Tasks/Delete",
    "Tasks/Get",  # containerd would delete a container under somebody else's task
    "Containers/Delete",
]
CALLS: Counts = {
    "create": ["Containers/Create"],
    "start": ["Tasks/Create", "Tasks/Start"],
    "exec": ["Tasks/Exec", "Tasks/Start"],
    "status": ["Tasks/Get"],
    "list_pids": ["Tasks/ListPids"],
    "summary": ["Tasks/ListPids"],
    "pause": ["Tasks/Pause"],
    "resume": ["Tasks/Resume"],
    "signal_process": ["Tasks/Kill"],
    "wait for an exec, and its removal": ["Tasks/DeleteProcess"],
    "wait": [],
    "delete_task": ["Tasks/Delete"],
    "delete": ["Tasks/Get", "Containers/Delete"],
    "version": ["Version/Version"],
    "a whole lifecycle": LIFECYCLE,
}
THREADS_AND_DESCRIPTORS: Counts = {
    "threads of an idle client": 2,  # one that reads events, and the patrol
    "threads for 10 idle containers": 0,
    "descriptors for 10 idle containers": 0,
    "threads for 10 attached containers": 1,
    "descriptors for each of 10 attached containers": 2,
    "descriptors for the pump": 2,
    "threads left of all that": 0,
    "descriptors left of all that": 0,
}
COPIES: Counts = {
    "read, for each byte into a file": 1,
    "written, for each byte into a file": 1,
    "read, for each byte into a callable": 1,
    "written, for each byte into a callable": 0,
}

_OWN = 2
_PATIENCE = 30.0
_QUIET = 0.5
_CROWD = 10
_COPIED = 32 << 20


def _spec() -> oci.Spec:
    return oci.build(oci.default_spec(), oci.with_args("sleep", "1000"))


def calls() -> Counts:
    """The calls of each verb."""
    counted: Counts = {}
    spec = _spec()
    with FakeContainerd() as fake, Client(fake.address, namespace="n", state_dir=fake.state_dir) as client:

        def count(name: str, act: Callable[[], object]) -> None:
            fake.calls.clear()
            act()
            counted[name] = [call.method for call in fake.calls.all()]

        def end_exec() -> None:
            fake.process("c", "e").exit(0)
            client.wait("c", "e")
            fake.calls.wait_for("Tasks/DeleteProcess", timeout=_PATIENCE)

        def end_init() -> None:
            fake.process("c").exit(0)
            client.wait("c")

        count("create", lambda: client.create("c", spec))
        count("start", lambda: client.start("c", attach_stdio=cio.copy()))
        count("exec", lambda: client.exec("c", "e", oci.exec_process(spec, "sleep"), attach_stdio=cio.copy()))
        count("status", lambda: client.status("c"))
        count("list_pids", lambda: client.list_pids("c"))
        count("summary", lambda: client.summary("c"))
        count("pause", lambda: client.pause("c"))
        count("resume", lambda: client.resume("c"))
        count(
            "signal_process", lambda: client.signal_process("c", "init", signal.SIGWINCH)
        )  # which it ignores
        count("wait for an exec, and its removal", end_exec)
        count("wait", end_init)
        count("delete_task", lambda: client.delete_task("c"))
        count("delete", lambda: client.delete("c"))
        count("version", client.version)

        def live() -> None:
            client.create("c", spec)
            client.start("c", attach_stdio=cio.copy())
            end_init()
            client.delete_task("c")
            client.delete("c")

        count("a whole lifecycle", live)
    return counted


def threads_and_descriptors() -> Counts:
    """What idle and attached containers hold. The fake is a process of its own here, for its share is not ours."""
    spec = _spec()
    fake = Fake()
    try:
        _settle(0)
        with Client(fake.address, namespace="n", state_dir=fake.state_dir) as client:
            _come_and_go(client, "w")  # channels, and what is opened for the first container
            gc.collect()  # what others left is not to go meanwhile
            _settle(_OWN, quiet=4 * _QUIET)
            counted: Counts = {"threads of an idle client": _threads()}
            fds = _descriptors()
            for number in range(_CROWD):
                client.create(f"i{number}", spec)
                client.start(f"i{number}")
            _settle(_OWN, fds)
            counted["threads for 10 idle containers"] = _threads() - _OWN
            counted["descriptors for 10 idle containers"] = _descriptors() - fds
            for number in range(_CROWD):
                client.create(f"a{number}", spec)
                client.start(f"a{number}", attach_stdio=cio.copy(stdout=lambda _: None))
            _settle(_OWN + 1, fds + _CROWD * 2 + 2)
            counted["threads for 10 attached containers"] = _threads() - _OWN
            each, pump = divmod(_descriptors() - fds, _CROWD)
            counted["descriptors for each of 10 attached containers"] = each
            counted["descriptors for the pump"] = pump
            for number in range(_CROWD):
                _end(client, f"i{number}")
                _end(client, f"a{number}")
            _settle(_OWN, fds)
            counted["threads left of all that"] = _threads() - _OWN
            counted["descriptors left of all that"] = _descriptors() - fds
    finally:
        fake.end()
    return counted


def _come_and_go(client: Client, name: str) -> None:
    client.create(name, _spec())
    client.start(name)
    _end(client, name)


def _end(client: Client, name: str) -> None:
    client.signal_process(name, "init", 9)
    client.wait(name)
    client.delete_task(name)
    client.delete(name)


def _threads() -> int:
    return sum(thread.name.startswith("libcontainerd-") for thread in threading.enumerate())


def _settle(threads: int, descriptors: int | None = None, quiet: float = _QUIET) -> None:
    """Wait until it is quiet, with these threads at most and so many descriptors; where it does not come to that, the count will say so.

    Threads that have nothing to do end after a second, and grpcio closes and opens descriptors when it comes to it.
    """
    deadline = time.monotonic() + _PATIENCE
    since, before = time.monotonic(), -1
    while (now := time.monotonic()) < deadline and now - since < quiet:
        there = _descriptors()
        if _threads() > threads or there != before or descriptors not in (None, there):
            since, before = now, there
        time.sleep(0.05)


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def copies() -> Counts:
    """How often each byte of output crosses between this process and the kernel."""
    counted: Counts = {}
    with tempfile.TemporaryDirectory() as directory:
        with Path(directory, "file").open("wb") as file:
            read, written = _copy(directory, file)
        counted |= {"read, for each byte into a file": read, "written, for each byte into a file": written}
        read, written = _copy(directory, lambda _: None)
        counted |= {
            "read, for each byte into a callable": read,
            "written, for each byte into a callable": written,
        }
    return counted


def _copy(directory: str, destination: cio.Output) -> tuple[int, int]:
    fifos = FifoSet.within(directory, "p", with_stdin=False, terminal=True)
    with DirectIO(fifos, on_stdin_close=lambda _: None) as direct:
        before = _through()
        io = cio.copy(stdout=destination)(direct)
        writer = ["dd", "if=/dev/zero", f"of={fifos.stdout}", "bs=65536", f"count={_COPIED // 65536}"]
        with subprocess.Popen(writer, stderr=subprocess.DEVNULL) as process:
            io.wait()
            after = _through()  # before the kernel adds what the child has read and written
            process.wait(_PATIENCE)
        io.close()
    fifos.unlink()
    read, written = (end - begin for begin, end in zip(before, after, strict=True))
    return read // _COPIED, written // _COPIED


def _through() -> tuple[int, int]:
    """Bytes that this process has read and written so far."""
    told = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(told["rchar"]), int(told["wchar"])


def main() -> int:
    """Count, and say where it is not what it should be."""
    wrong = 0
    for counted, wanted in (
        (calls(), CALLS),
        (threads_and_descriptors(), THREADS_AND_DESCRIPTORS),
        (copies(), COPIES),
    ):
        for name in wanted | counted:
            is_, should = counted.get(name), wanted.get(name)
            wrong += is_ != should
            shown = f"{len(is_)} ({', '.join(is_)})" if isinstance(is_, list) else str(is_)
            print(f"{name:<50}{shown}" + ("" if is_ == should else f"   WRONG: should be {should}"))
    print("all as it should be" if not wrong else f"{wrong} are not as they should be")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
