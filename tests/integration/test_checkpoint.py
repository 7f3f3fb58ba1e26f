"""Checkpoints of real processes, by the criu that was fetched."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from libcontainerd import Client, EventType, Remote, Status, SystemFailureError
from libcontainerd.backends import RecordingBackend
from tests import servers
from tests.integration.containers import (
    Collected,
    MakeSpec,
    Raw,
    exit_of,
    process,
    run_exec,
    shims_of,
    stop,
    wait_until,
)

COUNT = "i=0; while :; do i=$((i + 1)); echo $i; sleep 0.05; done"


@pytest.fixture(autouse=True)
def _criu(criu: servers.Criu) -> None:
    """All of them need one."""


def numbers(collected: Collected) -> list[int]:
    """The whole lines that have come."""
    return [int(line) for line in collected.out.rpartition(b"\n")[0].split()]


def test_a_loop_goes_on_counting_after_its_container_was_deleted(
    client: Client, spec: MakeSpec, backend: RecordingBackend, tmp_path: Path
) -> None:
    made = spec("sh", "-c", COUNT)
    first = Collected()
    client.create("c", made)
    before = client.start("c", attach_stdio=first)
    first.wait_for(b"5\n", timeout=30)

    client.create_checkpoint("c", tmp_path / "saved", exit=True)

    assert client.wait("c").code == 137
    assert client.delete_task("c").error is None
    client.delete("c")
    first.wait()
    assert exit_of(backend, "c") == 137
    backend.clear()
    client.create("c", made)
    second = Collected()
    pid = client.start("c", tmp_path / "saved", attach_stdio=second)
    wait_until(lambda: len(numbers(second)) >= 5, "it goes on counting", timeout=30)
    went_on = numbers(second)

    assert pid != before
    assert Path(f"/proc/{pid}").exists()
    # Every number once: none is lost on the way, none comes again.
    assert numbers(first) == list(range(1, len(numbers(first)) + 1))
    assert went_on == list(range(went_on[0], went_on[-1] + 1))
    assert went_on[0] == numbers(first)[-1] + 1
    stop(client, "c")
    assert exit_of(backend, "c") == 137
    assert [(each.event, each.info.pid) for each in backend.events("c")] == [
        (EventType.CREATE, 0),
        (EventType.START, pid),
        (EventType.EXIT, pid),
    ]


def test_memory_files_and_processes_are_there_again(client: Client, spec: MakeSpec, tmp_path: Path) -> None:
    """Also more memory than one range of the archive holds."""
    script = (
        "x=$(head -c 9000000 /dev/zero | tr '\\0' a); echo kept >/tmp/file; sleep 1005 & "
        "echo ready; while read what; do echo ${#x} $(cat /tmp/file) $what; done"
    )
    first = Collected()
    client.create("c", spec("sh", "-c", script))
    client.start("c", with_stdin=True, attach_stdio=first)
    first.wait_for(b"ready", timeout=40)

    client.create_checkpoint("c", tmp_path / "saved", exit=True)
    client.delete_task("c")
    second = Collected()
    client.start("c", tmp_path / "saved", with_stdin=True, attach_stdio=second)
    second.stdin.write(b"again\n")
    second.wait_for(b"9000000 kept again\n", timeout=40)

    assert sum(each.stat().st_size for each in (tmp_path / "saved").iterdir()) > 9_000_000
    assert len(client.list_pids("c")) == 2
    # It is a task like any other.
    client.pause("c")
    assert client.status("c") is Status.PAUSED
    client.resume("c")
    assert run_exec(client, "c", "e", "cat", "/tmp/file").out == b"kept\n"
    stop(client, "c")


def test_a_restored_task_can_be_taken_over_by_the_next_client(
    remote: Remote, namespace: str, spec: MakeSpec, tmp_path: Path, raw: Raw
) -> None:
    with remote.new_client(namespace) as earlier:
        collected = Collected()
        earlier.create("c", spec("sh", "-c", "while read x; do echo got $x; done"))
        earlier.start("c", with_stdin=True, attach_stdio=collected)
        collected.stdin.write(b"one\n")
        collected.wait_for(b"got one", timeout=30)
        earlier.create_checkpoint("c", tmp_path / "saved", exit=True)
        earlier.delete_task("c")
        pid = earlier.start("c", tmp_path / "saved", with_stdin=True, attach_stdio=Collected())

    with remote.new_client(namespace) as later:
        found = Collected()
        assert later.restore("c", found)[:2] == (True, pid)
        found.stdin.write(b"two\n")
        found.wait_for(b"got two\n", timeout=30)
        stop(later, "c")
    assert raw.container_ids() == set()


def test_criu_s_own_reason_is_told_when_it_cannot_restore(
    client: Client, spec: MakeSpec, raw: Raw, tmp_path: Path
) -> None:
    client.create("c", spec("sleep", "1000"))
    client.start("c")
    client.create_checkpoint("c", tmp_path / "saved", exit=True)
    client.delete_task("c")
    (core,) = (tmp_path / "saved").glob("core-*.img")
    core.write_bytes(b"nonsense")

    with pytest.raises(SystemFailureError, match=r"start container 'c': .*criu failed") as caught:
        client.start("c", tmp_path / "saved")

    # runc 1.3 names no log any more.
    assert ("criu says: " in str(caught.value)) == ("restore.log" in str(caught.value))
    assert raw.process("c") is None
    client.start("c")
    stop(client, "c")


def test_an_exec_is_not_saved_and_not_harmed(client: Client, spec: MakeSpec, tmp_path: Path) -> None:
    client.create("c", spec("sleep", "1000"))
    client.start("c")
    client.exec("c", "e", process("sleep", "1000"))

    client.create_checkpoint("c", tmp_path / "saved")

    assert sorted(each.process_id for each in client.summary("c")) == ["e", "init"]
    assert run_exec(client, "c", "f", "echo", "alive").out == b"alive\n"
    stop(client, "c")


def test_a_criu_that_cannot_run_is_told_and_nothing_is_harmed(
    containerd_binary: Path, spec: MakeSpec, namespace: str
) -> None:
    directory = Path(tempfile.mkdtemp(prefix="lcd-"))
    directory.chmod(0o755)
    try:
        (directory / "bin").mkdir()
        criu = directory / "bin/criu"
        criu.write_text("#!/bin/sh\nexit 1\n")
        criu.chmod(0o755)
        with Remote.start(
            directory / "root",
            directory / "state",
            binary=str(containerd_binary),
            path_prefix=str(criu.parent),
        ) as remote:
            with remote.new_client(namespace) as client:
                collected = Collected()
                client.create("c", spec("sh", "-c", COUNT))
                client.start("c", attach_stdio=collected)
                collected.wait_for(b"3\n", timeout=30)

                with pytest.raises(SystemFailureError, match=r"cannot checkpoint container 'c': .*(?i:criu)"):
                    client.create_checkpoint("c", directory / "saved", exit=True)

                assert client.status("c") is Status.RUNNING
                so_far = len(numbers(collected))
                wait_until(lambda: len(numbers(collected)) > so_far, "it goes on", timeout=30)
                assert not os.path.exists(directory / "saved")
                stop(client, "c")
            wait_until(lambda: not shims_of(remote.address), "all shims have ended", timeout=30)
    finally:
        shutil.rmtree(directory)
