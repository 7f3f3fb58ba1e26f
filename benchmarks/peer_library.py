"""The peer that is this library, with everything switched on: subscription, backend, records, spec models."""

from __future__ import annotations

import itertools
import resource
import signal
from collections.abc import Callable
from pathlib import Path

from benchmarks import logs
from benchmarks.protocol import WRITER, serve
from libcontainerd import Client, EventInfo, EventType, cio, oci

BACKLOG_CONTAINERS = 1000


class Counter:
    """A backend that counts."""

    def __init__(self) -> None:
        self.expect(0, lambda: None)

    def expect(self, count: int, done: Callable[[], None]) -> None:
        """Begin anew, and call `done` at the last one."""
        self._count, self._done = count, done
        self._numbers = itertools.count(1)  # whose `next` is one step for the interpreter

    def process_event(self, _container_id: str, _event: EventType, _info: EventInfo, /) -> None:
        """Count one."""
        if next(self._numbers) == self._count:
            self._done()


class Library:
    """What the bench asks for, by the library's verbs."""

    whose_cpu = resource.RUSAGE_SELF

    def __init__(self, address: str, namespace: str, directory: Path) -> None:
        self._directory = directory
        self._namespace = namespace
        self._counter = Counter()
        self._client = Client(
            address, namespace=namespace, state_dir=directory / "state", backend=self._counter
        )
        self._spec = oci.parse_spec((directory / "spec.json").read_bytes())
        self._true = oci.build(self._spec, oci.with_args("/bin/true"))
        self._process = self._true.process
        self._subscribed = False

    def lifecycle(self, container_id: str) -> None:
        """Take one container through its life."""
        self._run(container_id, self._true, None)

    def _run(self, container_id: str, spec: oci.Spec, stdout: cio.Output | None) -> None:
        client = self._client
        client.create(container_id, spec)
        client.start(container_id, attach_stdio=cio.copy(stdout=stdout))
        client.wait(container_id)
        client.delete_task(container_id)
        client.delete(container_id)

    def hold(self) -> None:
        """Make the container for `exec` and `call`."""
        self._client.create("held", oci.build(self._spec, oci.with_args("/bin/sleep", "100000")))
        self._client.start("held")

    def release(self) -> None:
        """Remove it."""
        self._client.signal_process("held", "init", signal.SIGKILL)
        self._client.wait("held")
        self._client.delete_task("held")
        self._client.delete("held")

    def exec(self, exec_id: str) -> None:
        """Run one exec; the library deletes it by itself."""
        if self._process is None:
            raise ValueError("the spec has no process")
        self._client.exec("held", exec_id, self._process, attach_stdio=cio.copy())
        self._client.wait("held", exec_id)

    def stdout(self, container_id: str, size: int, into: str) -> int:
        """Have a container write, and say how many bytes have come."""
        spec = oci.build(self._spec, oci.with_args(*WRITER, f"count={size // 65536}"))
        if into == "file":
            path = self._directory / "stdout"
            with path.open("wb") as file:
                self._run(container_id, spec, file)
            return path.stat().st_size
        came = 0

        def count(data: bytes) -> None:
            nonlocal came
            came += len(data)

        self._run(container_id, spec, count)
        return came

    def call(self, of: str) -> None:
        """Make one call."""
        if of == "version":
            self._client.version()
        elif of == "status":
            self._client.status("held")
        elif of == "list_pids":
            self._client.list_pids("held")
        else:
            self._client.signal_process("held", "init", signal.SIGWINCH)

    def subscribe(self, namespace: str, count: int, done: Callable[[], None]) -> None:
        """The client is subscribed; what it needs is containers that the events are about."""
        if namespace != self._namespace:
            raise ValueError("a client hears of its own namespace")
        if not self._subscribed:
            for number in range(BACKLOG_CONTAINERS):
                self._client.create(f"b{number}", self._true)
            self._subscribed = True
        self._counter.expect(count, done)

    def close(self) -> None:
        """Remove what the events were about, and end."""
        if self._subscribed:
            for number in range(BACKLOG_CONTAINERS):
                self._client.delete(f"b{number}")
        self._client.close()


if __name__ == "__main__":
    logs.to_stderr()
    serve(Library)
