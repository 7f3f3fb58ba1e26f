"""A program with a live client, that forks: run by test_forks.py, not by pytest, which has threads of its own.

Its arguments are the address, the namespace, the state directory and a scenario. What it finds out it prints, as JSON.
"""

from __future__ import annotations

import inspect
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

from libcontainerd import Client, EventType, LibcontainerdError, cio
from libcontainerd.backends import RecordingBackend

CONTAINER = "c"  # its init copies its input to its output
_LONGEST_SECONDS = 50  # the kernel ends a child that hangs


_SPEC = {"ociVersion": "1.0.2", "process": {"args": ["true"], "cwd": "/"}, "root": {"path": "/"}}
_ARGUMENTS: dict[str, object] = {
    "attach_stdio": cio.null_io,
    "checkpoint_dir": "/checkpoint",
    "container_id": CONTAINER,
    "height": 24,
    "process": {"args": ["true"], "cwd": "/"},
    "process_id": "e",
    "resources": {"pids": {"limit": 10}},
    "signal": signal.SIGKILL,
    "spec": _SPEC,
    "width": 80,
}
"""Good ones, for whatever a verb must be given."""


def verbs(client: Client) -> dict[str, Callable[[], object]]:
    """Every verb that there is but `close`, with good arguments."""
    found: dict[str, Callable[[], object]] = {}
    for name, verb in inspect.getmembers(client, inspect.ismethod):
        if name.startswith("_") or name == "close":
            continue
        needed = [each for each in inspect.signature(verb).parameters.values() if each.default is each.empty]
        found[name] = partial(verb, *(_ARGUMENTS[each.name] for each in needed))
    return found


class Program:
    """The client, its container, and the end of its input."""

    def __init__(self, address: str, namespace: str, state_dir: str) -> None:
        self.backend = RecordingBackend()
        self.client = Client(address, namespace=namespace, state_dir=state_dir, backend=self.backend)
        self.output = bytearray()
        self.came = threading.Event()

    def start(self) -> None:
        """Start the container that the test has a spec for in the environment."""
        self.client.create(CONTAINER, json.loads(os.environ["SPEC"]))
        self.client.start(CONTAINER, with_stdin=True, attach_stdio=self.attach)

    def attach(self, dio: cio.DirectIO) -> cio.IO:
        assert dio.stdin is not None
        self.stdin = dio.stdin
        return cio.copy(stdout=self.take)(dio)

    def take(self, data: bytes) -> None:
        self.output += data
        if b"\n" in self.output:
            self.came.set()

    def finish(self) -> dict[str, object]:
        """See that all goes on in the parent: calls, output, events, and the end of input."""
        found: dict[str, object] = {"status": self.client.status(CONTAINER)}
        self.stdin.write(b"to and fro\n")
        found["echoed"] = self.came.wait(_LONGEST_SECONDS)
        self.stdin.close()
        event = self.backend.wait_for(EventType.EXIT, CONTAINER, timeout=_LONGEST_SECONDS)
        found["exit"] = event.info.exit_code
        self.client.delete_task(CONTAINER)
        self.client.delete(CONTAINER)
        self.client.close()
        return found

    # What children do.

    def use(self) -> dict[str, object]:
        refused = {}
        for name, verb in verbs(self.client).items():
            try:
                verb()
            except LibcontainerdError as error:
                refused[name] = f"{type(error).__name__}: {error}"
            else:
                refused[name] = "no error"
        return {"refused": refused, "repr": repr(self.client)}

    def leave(self) -> dict[str, object]:
        with self.client:
            pass
        self.client.close()
        self.stdin.close()
        return {}


def forked(child: Callable[[], dict[str, object]]) -> dict[str, object]:
    """Fork, and let the child end as programs do, atexit handlers and all."""
    reader, writer = os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        signal.alarm(_LONGEST_SECONDS)
        os.write(writer, json.dumps(child()).encode())
        os.close(writer)
        sys.exit(3)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        told = json.loads(answer.read() or b"null")
    _, status = os.waitpid(pid, 0)
    return {"child": told, "code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - began}


def multiprocessed(program: Program) -> dict[str, object]:
    """Fork as multiprocessing does, with a pool of workers beside."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=program.leave)
    process.start()
    process.join(_LONGEST_SECONDS)
    code = process.exitcode
    if code is None:
        process.kill()
    with context.Pool(2) as pool:
        squares = pool.map_async(abs, range(-3, 1)).get(_LONGEST_SECONDS)
    return {"code": code, "pool": squares}


def executed() -> dict[str, object]:
    """Run another program that is given every descriptor that may be had, and list them."""
    listing = (
        "import os\n"
        "links = [f'/proc/self/fd/{fd}' for fd in os.listdir('/proc/self/fd') if int(fd) > 2]\n"
        "print([os.readlink(each) for each in links if os.path.lexists(each)])"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", listing],
        close_fds=False,
        capture_output=True,
        text=True,
        check=True,
        timeout=_LONGEST_SECONDS,
    )
    return {"descriptors": done.stdout.strip()}


def main() -> None:
    address, namespace, state_dir, scenario = sys.argv[1:]
    program = Program(address, namespace, state_dir)
    program.start()
    found = {
        "use": lambda: forked(program.use),
        "leave": lambda: forked(program.leave),
        "end": lambda: forked(dict),
        "multiprocessing": lambda: multiprocessed(program),
        "subprocess": executed,
    }[scenario]()
    sys.stdout.write(json.dumps({**found, **program.finish()}))


if __name__ == "__main__":
    main()
