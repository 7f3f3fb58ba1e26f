"""What was only suspected of containerd, runc and the shim, tried on real ones; and what the library makes of it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import cast

import grpc
import pytest

from libcontainerd import Client, DeadlineExceededError, InvalidParameterError, Remote, oci
from libcontainerd._wire.connection import NAMESPACE_HEADER
from libcontainerd._wire.pb.services.events_pb2 import EventsStub, PublishRequest, SubscribeRequest
from libcontainerd._wire.pb.services.version_pb2 import VersionStub
from libcontainerd._wire.pb.types import task_pb2
from libcontainerd._wire.pb.types.event_pb2 import Envelope
from libcontainerd._wire.pb.wellknown_pb2 import Any, Empty
from libcontainerd.backends import RecordingBackend
from tests.integration.containers import (
    Collected,
    MakeSpec,
    Raw,
    alive,
    exit_of,
    process,
    running,
    shims_of,
    wait_exec_gone,
    wait_until,
)

SLEEP = ("sleep", "1000")


def test_containerd_does_not_acknowledge_a_subscription(remote: Remote, namespace: str) -> None:
    """Its first sign of life is the first event, however long it is served already."""
    metadata, topic = ((NAMESPACE_HEADER, namespace),), f"/{namespace}/probe"
    begun = threading.Event()
    with grpc.insecure_channel(
        f"unix:{remote.address}", options=(("grpc.default_authority", "localhost"),)
    ) as channel:
        events = EventsStub(channel)
        stream = events.Subscribe(SubscribeRequest(filters=[f'topic=="{topic}"']), metadata=metadata)

        def listen() -> None:
            cast("grpc.Call", stream).initial_metadata()
            begun.set()

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        for _ in range(20):  # answers that come after the subscription was asked for, on the same connection
            VersionStub(channel).Version(Empty(), metadata=metadata)
        assert not begun.is_set()

        def publish() -> bool:
            events.Publish(PublishRequest(topic=topic, event=Any(type_url="a.Probe")), metadata=metadata)
            return begun.is_set()

        wait_until(publish, "the first event brings the header")
        assert next(cast("Iterator[Envelope]", stream)).topic == topic
    thread.join(30)
    assert not thread.is_alive()


def test_an_exec_in_the_hosts_pid_namespace_ends_with_its_init(
    client: Client, backend: RecordingBackend, spec: MakeSpec
) -> None:
    """The kernel does not see to it there; the shim kills what is left, or the library says that it cannot know."""
    client.create("c", spec(*SLEEP, options=[oci.without_namespace("pid")]))
    client.start("c")
    pid = client.exec("c", "e", process(*SLEEP))
    client.signal_process("c", "init", signal.SIGKILL)
    assert client.wait("c").code == 137
    with pytest.raises(InvalidParameterError, match="container is not running"):
        client.exec("c", "late", process("true"))
    assert client.wait("c", "e").code == 137
    assert exit_of(backend, "c", "e") == 137
    wait_until(lambda: not alive(pid), "the exec's process is gone")
    wait_exec_gone(client, "c", "e")
    assert client.delete_task("c").code == 137
    client.delete("c")


def test_the_output_of_a_killed_exec_is_all_there(
    client: Client, backend: RecordingBackend, spec: MakeSpec
) -> None:
    with running(client, "c", spec(*SLEEP)):
        output = Collected()
        client.exec("c", "e", process("sh", "-c", "seq 1 1000; exec sleep 1000"), attach_stdio=output)
        output.wait_for(b"\n1000\n")
        client.signal_process("c", "e", signal.SIGKILL)
        assert client.wait("c", "e").code == 137
        assert exit_of(backend, "c", "e") == 137
        output.wait()
        assert output.out == b"".join(b"%d\n" % number for number in range(1, 1001))


def test_stdio_outlives_the_deadline_of_its_start(client: Client, spec: MakeSpec) -> None:
    client.create("c", spec("cat"))
    output = Collected()
    end = 0.0
    for seconds in (2.0, 8.0, 60.0):  # as short as this machine allows
        output = Collected()
        end = time.monotonic() + seconds
        with suppress(DeadlineExceededError):
            client.start("c", with_stdin=True, attach_stdio=output, timeout=seconds)
            break
    wait_until(lambda: time.monotonic() > end, "the deadline has passed", timeout=90)
    output.stdin.write(b"after\n")
    output.wait_for(b"after\n")
    output.stdin.close()
    assert client.wait("c").code == 0
    client.delete_task("c")
    client.delete("c")


@pytest.mark.parametrize("first", ["the exec", "the task"])
def test_a_shim_gives_up_what_an_exec_wrote_when_its_task_is_deleted(
    remote: Remote, client: Client, namespace: str, spec: MakeSpec, tmp_path: Path, *, first: str
) -> None:
    """What is still on its way through the shim is waited for in the deletion of the process concerned, and of no other.

    So `delete_task` has ended execs deleted before their task.
    """
    size = 120_000  # more than a FIFO holds, and less than it holds together with the shim and a pipe
    client.create("c", spec(*SLEEP))
    client.start("c")
    paths = [tmp_path / "stdout", tmp_path / "stderr"]
    for path in paths:
        os.mkfifo(path)
    readers = [os.open(path, os.O_RDONLY | os.O_NONBLOCK) for path in paths]
    with grpc.insecure_channel(
        f"unix:{remote.address}", options=(("grpc.default_authority", "localhost"),)
    ) as channel:
        raw = Raw(channel, namespace)
        raw.exec("c", "e", process("head", "-c", str(size), "/dev/zero"), *map(str, paths))
        wait_until(lambda: _has_ended(raw, "c", "e"), "the exec has ended")
        (shim,) = (pid for pid, words in shims_of(remote.address).items() if f" {namespace} " in words)
        raw.kill("c")
        client.wait("c")
        with ThreadPoolExecutor(1) as executor:
            if first == "the exec":
                reading = threading.Event()
                came = executor.submit(_read_all, readers[0], reading.set)
                assert reading.wait(30)  # the shim waits for who reads, and for nobody who is about to
                raw.delete_exec("c", "e")
                raw.delete_task("c")
            else:
                raw.delete_task("c")
                wait_until(lambda: not alive(shim), "the shim has ended")  # until then it moves what it has
                came = executor.submit(_read_all, readers[0])
            assert (came.result(30) == size) is (first == "the exec")
    for reader in readers:
        os.close(reader)
    client.delete_task("c")
    client.delete("c")


def _has_ended(raw: Raw, container_id: str, exec_id: str) -> bool:
    found = raw.process(container_id, exec_id)
    return found is not None and found.status == task_pb2.Status.STOPPED


def _read_all(reader: int, begun: Callable[[], object] = lambda: None) -> int:
    os.set_blocking(reader, True)
    count = 0
    while data := os.read(reader, 4096):
        count += len(data)
        begun()
    return count
