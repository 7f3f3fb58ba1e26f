"""The peer that is grpcio's stubs and nothing else: what a careful program written by hand would do, and no more."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from benchmarks import bare_stubs
from benchmarks.protocol import WRITER, serve

# What comes after it is imported late on purpose (E402): the generated code has to find the bare stubs in place.
bare_stubs.install()

import grpc  # noqa: E402
from grpc.experimental import ChannelOptions  # noqa: E402

from libcontainerd._wire.pb.events import task_pb2 as task_events_pb2  # noqa: E402
from libcontainerd._wire.pb.services import containers_pb2, events_pb2, tasks_pb2, version_pb2  # noqa: E402
from libcontainerd._wire.pb.wellknown_pb2 import Any, Empty  # noqa: E402

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from libcontainerd._wire.pb.types.event_pb2 import Envelope

SPEC_URL = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
PROCESS_URL = "types.containerd.io/opencontainers/runtime-spec/1/Process"
READERS: dict[str, Callable[[bytes], Message]] = {
    "containerd.events.TaskExecAdded": task_events_pb2.TaskExecAdded.FromString,
    "containerd.events.TaskExecStarted": task_events_pb2.TaskExecStarted.FromString,
    "containerd.events.TaskExit": task_events_pb2.TaskExit.FromString,
}


class Stubs:
    """What the bench asks for, by plain calls."""

    whose_cpu = resource.RUSAGE_SELF

    def __init__(self, address: str, namespace: str, directory: Path) -> None:
        self._directory = directory
        self._metadata = (("containerd-namespace", namespace),)
        options = (("grpc.default_authority", "localhost"), (ChannelOptions.SingleThreadedUnaryStream, 1))
        self._channel = grpc.insecure_channel(f"unix:{address}", options=options)
        self._containers = containers_pb2.ContainersStub(self._channel)
        self._tasks = tasks_pb2.TasksStub(self._channel)
        self._events = events_pb2.EventsStub(self._channel)
        self._versions = version_pb2.VersionStub(self._channel)
        self._spec: dict[str, dict[str, object]] = json.loads((directory / "spec.json").read_bytes())
        self._true = self._spec_of("/bin/true")
        self._process = json.dumps({**self._spec["process"], "args": ["/bin/true"]}).encode()

    def _spec_of(self, *args: str) -> bytes:
        return json.dumps(self._spec | {"process": {**self._spec["process"], "args": list(args)}}).encode()

    def _create(self, container_id: str, spec: bytes) -> None:
        container = containers_pb2.Container(
            id=container_id,
            runtime=containers_pb2.Container.Runtime(name="io.containerd.runc.v2"),
            spec=Any(type_url=SPEC_URL, value=spec),
        )
        request = containers_pb2.CreateContainerRequest(container=container)
        self._containers.Create(request, metadata=self._metadata)

    @contextlib.contextmanager
    def _fifos(self, name: str) -> Iterator[tuple[str, str, int]]:
        paths = [str(self._directory / f"{name}-{stream}") for stream in ("stdout", "stderr")]
        for path in paths:
            os.mkfifo(path)
        fds = [os.open(path, os.O_RDONLY | os.O_NONBLOCK) for path in paths]
        try:
            yield paths[0], paths[1], fds[0]
        finally:
            for fd in fds:
                os.close(fd)
            for path in paths:
                os.unlink(path)

    def lifecycle(self, container_id: str) -> None:
        """Take one container through its life."""
        self._run(container_id, self._true, lambda _: None)

    def _run(self, container_id: str, spec: bytes, take: Callable[[memoryview], object]) -> None:
        metadata = self._metadata
        self._create(container_id, spec)
        with self._fifos(container_id) as (stdout, stderr, fd):
            make = tasks_pb2.CreateTaskRequest(container_id=container_id, stdout=stdout, stderr=stderr)
            self._tasks.Create(make, metadata=metadata)
            self._tasks.Start(tasks_pb2.StartRequest(container_id=container_id), metadata=metadata)
            _read_all(fd, take)
            self._tasks.Wait(tasks_pb2.WaitRequest(container_id=container_id), metadata=metadata)
            self._tasks.Delete(tasks_pb2.DeleteTaskRequest(container_id=container_id), metadata=metadata)
        deletion = containers_pb2.DeleteContainerRequest(id=container_id)
        self._containers.Delete(deletion, metadata=metadata)

    def hold(self) -> None:
        """Make the container for `exec` and `call`."""
        self._create("held", self._spec_of("/bin/sleep", "100000"))
        self._tasks.Create(tasks_pb2.CreateTaskRequest(container_id="held"), metadata=self._metadata)
        self._tasks.Start(tasks_pb2.StartRequest(container_id="held"), metadata=self._metadata)

    def release(self) -> None:
        """Remove it."""
        metadata = self._metadata
        self._tasks.Kill(tasks_pb2.KillRequest(container_id="held", signal=signal.SIGKILL), metadata=metadata)
        self._tasks.Wait(tasks_pb2.WaitRequest(container_id="held"), metadata=metadata)
        self._tasks.Delete(tasks_pb2.DeleteTaskRequest(container_id="held"), metadata=metadata)
        self._containers.Delete(containers_pb2.DeleteContainerRequest(id="held"), metadata=metadata)

    def exec(self, exec_id: str) -> None:
        """Run one exec."""
        metadata = self._metadata
        with self._fifos(exec_id) as (stdout, stderr, fd):
            make = tasks_pb2.ExecProcessRequest(
                container_id="held",
                exec_id=exec_id,
                stdout=stdout,
                stderr=stderr,
                spec=Any(type_url=PROCESS_URL, value=self._process),
            )
            self._tasks.Exec(make, metadata=metadata)
            start = tasks_pb2.StartRequest(container_id="held", exec_id=exec_id)
            self._tasks.Start(start, metadata=metadata)
            _read_all(fd, lambda _: None)
            self._tasks.Wait(tasks_pb2.WaitRequest(container_id="held", exec_id=exec_id), metadata=metadata)
            deletion = tasks_pb2.DeleteProcessRequest(container_id="held", exec_id=exec_id)
            self._tasks.DeleteProcess(deletion, metadata=metadata)

    def stdout(self, container_id: str, size: int, into: str) -> int:
        """Have a container write, and say how many bytes have come."""
        spec = self._spec_of(*WRITER, f"count={size // 65536}")
        if into == "file":
            path = self._directory / "stdout"
            with path.open("wb", buffering=0) as file:
                self._run(container_id, spec, file.write)
            return path.stat().st_size
        came = 0

        def count(data: memoryview) -> None:
            nonlocal came
            came += len(data)

        self._run(container_id, spec, count)
        return came

    def call(self, of: str) -> None:
        """Make one call."""
        if of == "version":
            self._versions.Version(Empty(), metadata=self._metadata)
        elif of == "status":
            self._tasks.Get(tasks_pb2.GetRequest(container_id="held"), metadata=self._metadata)
        elif of == "list_pids":
            self._tasks.ListPids(tasks_pb2.ListPidsRequest(container_id="held"), metadata=self._metadata)
        else:
            kill = tasks_pb2.KillRequest(container_id="held", signal=signal.SIGWINCH)
            self._tasks.Kill(kill, metadata=self._metadata)

    def subscribe(self, namespace: str, count: int, done: Callable[[], None]) -> None:
        """Read and decode so many events on a thread."""
        request = events_pb2.SubscribeRequest(filters=[f"namespace=={namespace},topic~=|^/tasks/|"])
        call = cast("Iterator[Envelope]", self._events.Subscribe(request, metadata=self._metadata))

        def read() -> None:
            for seen, envelope in enumerate(call, 1):
                READERS[envelope.event.type_url](envelope.event.value)
                if seen == count:
                    done()
                    return

        threading.Thread(target=read, daemon=True).start()
        time.sleep(0.1)  # containerd does not say when it has begun

    def close(self) -> None:
        """End."""
        self._channel.close()


def _read_all(fd: int, take: Callable[[memoryview], object]) -> None:
    """Read to the end; the shim has opened the other end by now."""
    os.set_blocking(fd, True)
    buffer = bytearray(65536)
    view = memoryview(buffer)
    while count := os.readv(fd, [buffer]):
        take(view[:count])


if __name__ == "__main__":
    serve(Stubs)
