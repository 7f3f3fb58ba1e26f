"""Containers live the same life under each of the runtimes, except where a runtime has no such thing."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from libcontainerd import Client, EventType, LibcontainerdError, Status, oci
from libcontainerd.backends import RecordingBackend
from tests.integration.containers import (
    Collected,
    MakeSpec,
    exit_of,
    process,
    run_exec,
    wait_until,
)
from tests.integration.private import private_containerd
from tools.matrix import UNAVAILABLE

V1_LINUX = "io.containerd.runtime.v1.linux"
SAY = "read line; echo got $line; echo problem >&2; exit 3"


def live(
    client: Client,
    backend: RecordingBackend,
    spec: MakeSpec,
    runtime: str,
    options: Mapping[str, object] | None = None,
) -> list[EventType]:
    """See a container through its whole life, and return the events of it in their order."""
    collected = Collected()
    client.create("c", spec("sh", "-c", SAY), options, runtime=runtime)
    pid = client.start("c", with_stdin=True, attach_stdio=collected)
    assert client.status("c") is Status.RUNNING
    client.exec("c", "long", process("sleep", "1000"))
    names = {summary.pid: summary.process_id for summary in client.summary("c")}
    assert (names[pid], sorted(names.values())) == ("init", ["init", "long"])
    short = run_exec(client, "c", "short", "sh", "-c", "cat; exit 5", stdin=b"to and fro")
    assert (short.out, short.status.code) == (b"to and fro", 5)
    assert exit_of(backend, "c", "short") == 5
    client.pause("c")
    assert client.status("c") is Status.PAUSED
    client.resume("c")
    client.signal_process("c", "long", signal.SIGKILL)
    assert exit_of(backend, "c", "long") == 137
    collected.stdin.write(b"it\n")
    assert client.wait("c", timeout=30).code == 3
    assert exit_of(backend, "c", "c") == 3
    assert client.delete_task("c").code == 3
    assert (collected.out, collected.err) == (b"got it\n", b"problem\n")
    # The same container once more.
    client.start("c")
    assert client.wait("c", timeout=30).code == 3
    assert client.delete_task("c").code == 3
    client.delete("c")
    wait_until(lambda: len([each for each in kinds(backend) if each is EventType.EXIT]) == 4, "all are told")
    return kinds(backend)


def kinds(backend: RecordingBackend) -> list[EventType]:
    return [each.event for each in backend.events("c")]


def test_runc(client: Client, backend: RecordingBackend, spec: MakeSpec) -> None:
    events = live(client, backend, spec, "io.containerd.runc.v2", {"binary_name": "runc"})

    assert events.count(EventType.EXEC_ADDED) == events.count(EventType.EXEC_STARTED) == 2


def test_crun(containerd_binary: Path, namespace: str, backend: RecordingBackend, spec: MakeSpec) -> None:
    """In a mount namespace without cgroup v2: crun refuses a hierarchy of which some controllers are v2's."""
    crun = shutil.which("crun")
    if crun is None:
        pytest.skip("no crun")
    hide = "{ ! mountpoint -q /sys/fs/cgroup/unified || umount /sys/fs/cgroup/unified; }"
    with private_containerd(containerd_binary, hide) as connect:
        client = connect(namespace, backend)
        events = live(client, backend, spec, "io.containerd.runc.v2", {"binary_name": crun})
        assert events.count(EventType.EXEC_ADDED) == events.count(EventType.EXEC_STARTED) == 2
        client.create("d", spec("no-such-program"), {"binary_name": crun})
        with pytest.raises(LibcontainerdError, match="no-such-program"):
            client.start("d")
        client.delete("d")


def test_v1_linux(
    client: Client,
    backend: RecordingBackend,
    spec: MakeSpec,
    release: tuple[int, int],
    record_property: Callable[[str, object], None],
) -> None:
    """The runtime that the original used. containerd 2.0 has done away with it."""
    if release >= (2, 0):
        record_property(UNAVAILABLE, "refused: removed in 2.0")
        client.create("c", spec("true"), runtime=V1_LINUX)
        with pytest.raises(LibcontainerdError, match=r"io\.containerd\.runtime\.v1\.linux"):
            client.start("c")
        client.delete("c")
        return
    events = live(client, backend, spec, V1_LINUX, {"binary_name": "runc"})
    # It has no event for an exec that was added.
    assert events.count(EventType.EXEC_ADDED) == 0
    assert events.count(EventType.EXEC_STARTED) == 2
    # Its own message says whose the pipes are.
    mapping = oci.LinuxIDMapping(container_id=0, host_id=100_000, size=65_536)
    mapped = spec("sh", "-c", "id -u; cat", options=[oci.with_user_namespace([mapping])])
    client.create("m", mapped, runtime=V1_LINUX)
    collected = Collected(b"input")
    client.start("m", with_stdin=True, attach_stdio=collected)
    assert client.wait("m", timeout=30).code == 0
    assert client.delete_task("m").code == 0
    assert collected.out == b"0\ninput"
    client.delete("m")
