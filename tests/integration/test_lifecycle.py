"""A container's life on a real containerd: made, started, looked at, paused, ended, removed; and its events."""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import structlog

from libcontainerd import (
    Client,
    ConflictError,
    DeadlineExceededError,
    EventInfo,
    EventType,
    FailedPreconditionError,
    InvalidParameterError,
    NotFoundError,
    Remote,
    Status,
    cio,
    oci,
)
from libcontainerd._wire import typeurl
from libcontainerd._wire.pb.runc.options_pb2 import Options
from libcontainerd.backends import RecordingBackend
from tests import servers
from tests.conftest import Count
from tests.integration.containers import (
    Collected,
    MakeSpec,
    Raw,
    alive,
    bundle_of,
    exit_of,
    process,
    run,
    run_exec,
    run_task,
    running,
    stop,
    wait_exec_gone,
    wait_until,
)

SLEEP = ("sleep", "1000")
CLOCK_SLACK = timedelta(seconds=2)
"""How far the clocks of two processes may be apart: one of them may be read coarsely."""


def kinds(backend: RecordingBackend, container_id: str) -> list[tuple[str, str]]:
    return [(event.event.value, event.info.process_id) for event in backend.events(container_id)]


# ------------------------------------------------------------------------------------------------------ from start to end


def test_the_version_is_containerds(client: Client) -> None:
    found = servers.find().containerd
    assert found is not None
    version = client.version()
    assert found.version.startswith(version.version)
    assert version.revision or found.release >= (2, 0)  # which Debian builds without


def test_a_container_is_made_started_waited_for_and_removed(client: Client, raw: Raw, spec: MakeSpec) -> None:
    client.create("web", spec(*SLEEP))
    assert raw.container_ids() == {"web"}
    assert not raw.tasks_by_id()
    bundle = bundle_of(raw, "web")
    assert stat.S_IMODE(bundle.stat().st_mode) == 0o755

    pid = client.start("web")
    assert alive(pid)
    assert raw.tasks_by_id()["web"].pid == pid
    # Until runc's own init has become the program, it would die of it.
    wait_until(lambda: Path(f"/proc/{pid}/comm").read_text() == "sleep\n", "the program runs", timeout=30)
    client.signal_process("web", "init", signal.SIGTERM)  # pid 1 takes no SIGTERM that it does not handle
    before = datetime.now(UTC)
    client.signal_process("web", "init", signal.SIGKILL)
    status = client.wait("web")
    assert (status.code, status.error) == (137, None)
    assert status.exited_at.tzinfo is UTC
    assert before - CLOCK_SLACK <= status.exited_at <= datetime.now(UTC) + CLOCK_SLACK
    assert not alive(pid)

    assert client.delete_task("web") == status
    assert not raw.tasks_by_id()
    client.delete("web")
    assert not raw.container_ids()
    assert not bundle.exists()


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 1", 1), ("exit 255", 255), ("kill -9 $$", 137)]
)
def test_the_exit_code_is_the_processes(
    client: Client, backend: RecordingBackend, spec: MakeSpec, script: str, code: int
) -> None:
    # A process cannot kill itself as pid 1, so the shell that counts is that one's child.
    container = run(client, "c", spec("sh", "-c", f"sh -c '{script}'; exit $?"))
    assert container.status.code == code
    assert exit_of(backend, "c") == code
    with running(client, "d", spec(*SLEEP)):
        exec_ = run_exec(client, "d", "e", "sh", "-c", script)
        assert (exec_.status.code, exit_of(backend, "d", "e")) == (code, code)


def test_an_exec_killed_by_a_signal_says_so(
    client: Client, backend: RecordingBackend, spec: MakeSpec
) -> None:
    with running(client, "c", spec(*SLEEP)):
        client.exec("c", "e", process(*SLEEP))
        client.signal_process("c", "e", signal.SIGKILL)
        assert client.wait("c", "e").code == 137
        client.exec("c", "f", process(*SLEEP))
        client.signal_process("c", "f", signal.SIGTERM)
        assert client.wait("c", "f").code == 143
        assert (exit_of(backend, "c", "e"), exit_of(backend, "c", "f")) == (137, 143)


def test_a_container_runs_again_and_again(
    client: Client, backend: RecordingBackend, spec: MakeSpec, raw: Raw
) -> None:
    client.create("c", spec("sh", "-c", "cat; exit 4"))
    for run_number in (b"1", b"2", b"3"):
        backend.clear()
        result = run_task(client, "c", stdin=run_number)
        assert (result.out, result.err, result.status.code) == (run_number, b"", 4)
        backend.wait_for(EventType.EXIT, "c")
        assert kinds(backend, "c") == [("create", "c"), ("start", "c"), ("exit", "c")]
        assert not list(bundle_of(raw, "c").iterdir())
    client.delete("c")


def test_an_id_is_free_after_its_deletion(client: Client, spec: MakeSpec) -> None:
    for number in range(3):
        assert run(client, "c", spec("sh", "-c", f"exit {number}")).status.code == number


def test_leaving_the_client_leaves_the_containers_running(
    remote: Remote, namespace: str, raw: Raw, spec: MakeSpec, client: Client
) -> None:
    with remote.new_client(namespace) as other:
        other.create("c", spec(*SLEEP))
        pid = other.start("c")
        assert "1 containers" in repr(other)
    assert other.closed
    assert "closed" in repr(other)
    assert alive(pid)
    assert raw.tasks_by_id()["c"].pid == pid


# ------------------------------------------------------------------------------------------------------------- looking


def test_the_status_follows_the_task(
    client: Client, backend: RecordingBackend, spec: MakeSpec, raw: Raw
) -> None:
    client.create("c", spec(*SLEEP))
    with pytest.raises(NotFoundError, match="container is not running"):
        client.status("c")
    client.start("c")
    assert client.status("c") is Status.RUNNING
    client.pause("c")
    assert client.status("c") is Status.PAUSED
    backend.wait_for(EventType.PAUSED, "c")
    client.resume("c")
    assert client.status("c") is Status.RUNNING
    backend.wait_for(EventType.RESUMED, "c")
    client.signal_process("c", "init", signal.SIGKILL)
    client.wait("c")
    assert client.status("c") is Status.STOPPED
    client.delete_task("c")
    with pytest.raises(NotFoundError, match="container is not running"):
        client.status("c")
    client.delete("c")
    with pytest.raises(NotFoundError, match="no such container"):
        client.status("c")
    assert exit_of(backend, "c") == 137
    assert kinds(backend, "c") == [
        ("create", "c"),
        ("start", "c"),
        ("paused", ""),
        ("resumed", ""),
        ("exit", "c"),
    ]


def test_a_start_under_way_has_the_container_for_itself(
    client: Client, backend: RecordingBackend, spec: MakeSpec, tmp_path: Path
) -> None:
    """A runtime that is asked to start waits here until it is told to go on."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    script = f'for word; do [ "$word" = start ] && read line < {gate}; done; exec runc "$@"'
    client.create("c", spec(*SLEEP), {"binary_name": runtime(tmp_path, script)})
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(client.start, "c")
        try:
            pid = backend.wait_for(EventType.CREATE, "c").info.pid
            with pytest.raises(ConflictError, match="already started"):
                client.start("c")
            with pytest.raises(FailedPreconditionError):
                client.delete("c")
            assert not starting.done()
        finally:
            gate.write_text("go\n")
        assert starting.result(timeout=20) == pid
    assert client.status("c") is Status.RUNNING
    stop(client, "c")


def runtime(directory: Path, script: str) -> str:
    """Make a runtime of a shell script that has runc in its PATH."""
    program = directory / "my-runc"
    program.write_text(f'#!/bin/sh\nPATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"\n{script}\n')
    program.chmod(0o755)
    return str(program)


def test_what_is_paused_stands_still(client: Client, spec: MakeSpec) -> None:
    ticking = Collected()
    client.create("c", spec("sh", "-c", "while echo tick; do usleep 2000; done"))
    client.start("c", attach_stdio=ticking)
    ticking.wait_for(b"tick")
    client.pause("c")
    with pytest.raises(FailedPreconditionError):
        client.pause("c")
    counts = [len(ticking.out)]

    def steady() -> bool:
        threading.Event().wait(0.1)
        counts.append(len(ticking.out))
        return counts[-1] == counts[-2]

    wait_until(steady, "the output has come to rest")
    client.resume("c")
    with pytest.raises(FailedPreconditionError):
        client.resume("c")
    wait_until(lambda: len(ticking.out) > counts[-1], "the output goes on")
    stop(client, "c")


def test_a_paused_container_can_be_killed(client: Client, backend: RecordingBackend, spec: MakeSpec) -> None:
    with running(client, "c", spec(*SLEEP)):
        client.pause("c")
        backend.wait_for(EventType.PAUSED, "c")
        client.signal_process("c", "init", signal.SIGKILL)
        assert client.wait("c", timeout=20).code == 137


def test_nothing_is_execed_in_a_paused_container(client: Client, spec: MakeSpec, raw: Raw) -> None:
    with running(client, "c", spec(*SLEEP)):
        client.pause("c")
        with pytest.raises(FailedPreconditionError, match="'e'"):
            client.exec("c", "e", process("true"), attach_stdio=Collected())
        assert raw.process("c", "e") is None
        assert not list(bundle_of(raw, "c").iterdir())
        client.resume("c")
        assert run_exec(client, "c", "e", "echo", "hi").out == b"hi\n"


def test_pids_and_their_names(client: Client, spec: MakeSpec) -> None:
    with running(client, "c", spec("sh", "-c", "sleep 1000 & wait")) as init:
        first = client.exec("c", "e.1", process(*SLEEP))
        second = client.exec("c", "e-2", process("sh", "-c", "sleep 1000; true"))
        wait_until(lambda: len(client.list_pids("c")) == 5, "all processes are there")
        pids = client.list_pids("c")
        assert len(set(pids)) == 5
        assert {init, first, second} <= set(pids)
        names = {each.pid: each.process_id for each in client.summary("c")}
        assert set(names) == set(pids)
        assert (names.pop(init), names.pop(first), names.pop(second)) == ("init", "e.1", "e-2")
        assert list(names.values()) == ["", ""]


def test_labels_and_options_are_kept_in_containerd(client: Client, raw: Raw, spec: MakeSpec) -> None:
    client.create("c", spec(*SLEEP), labels={"org.example/job": "7"})
    kept = dict(raw.container("c").labels)
    bundle = kept.pop("libcontainerd/bundle.path")
    assert Path(bundle).is_dir()
    assert kept == {"org.example/job": "7"}
    assert raw.container("c").runtime.name == "io.containerd.runc.v2"
    client.delete("c")


@pytest.mark.parametrize(
    "options",
    [{"no_new_keyring": True, "shim_cgroup": ""}, Options(no_new_keyring=True)],
    ids=["mapping", "message"],
)
def test_runtime_options_reach_the_shim(
    client: Client, raw: Raw, spec: MakeSpec, options: Options | dict[str, object]
) -> None:
    client.create("c", spec("true"), options)
    sent = raw.container("c").runtime.options
    assert sent.type_url == "containerd.runc.v1.Options"
    root = typeurl.unpack(sent, Options).root
    assert typeurl.unpack(sent, Options) == Options(no_new_keyring=True, root=root)
    assert run_task(client, "c").status.code == 0
    client.delete("c")


def test_a_private_containerd_has_a_runc_root_of_its_own(
    client: Client, remote: Remote, namespace: str, spec: MakeSpec, tmp_path: Path
) -> None:
    client.create("c", spec(*SLEEP))
    client.start("c")
    assert (Path(remote.address).parent / "runc" / namespace / "c").is_dir()
    stop(client, "c")

    client.create("own", spec(*SLEEP), {"root": str(tmp_path / "runc")})
    client.start("own")
    assert [each.name for each in (tmp_path / "runc").glob("*/own")] == ["own"]
    stop(client, "own")


def test_containers_of_one_id_in_two_namespaces_share_no_cgroup(
    client: Client, remote: Remote, namespace: str, spec: MakeSpec
) -> None:
    with remote.new_client(f"{namespace}-b") as other:
        alike = oci.to_mapping(spec(*SLEEP))
        del alike["linux"]["cgroupsPath"]  # type: ignore[attr-defined] # a mapping's mapping
        for each in (client, other):
            each.create("c", alike)
            each.start("c")
        assert len(client.list_pids("c")) == len(other.list_pids("c")) == 1
        client.pause("c")
        assert (client.status("c"), other.status("c")) == (Status.PAUSED, Status.RUNNING)
        for each in (client, other):
            stop(each, "c")


def test_what_is_fed_to_a_terminal_ends_without_a_hang_up(client: Client, spec: MakeSpec) -> None:
    out: list[bytes] = []
    client.create("c", spec("sh", options=[oci.with_terminal()]))
    client.start("c", with_stdin=True, attach_stdio=cio.copy(stdin=b"echo fed; exit 7\n", stdout=out.append))
    assert client.wait("c").code == 7
    client.delete_task("c")
    assert b"fed\r\n" in b"".join(out)
    client.delete("c")


def test_the_options_choose_the_runtime(client: Client, spec: MakeSpec, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    wrapper = runtime(tmp_path, f'echo "$@" >> {mark}; exec runc "$@"')
    client.create("c", spec("sh", "-c", "exit 6"), {"binary_name": wrapper})
    assert run_task(client, "c").status.code == 6
    client.delete("c")
    assert "create" in mark.read_text()


def test_on_a_ramdisk_the_runtime_is_told_not_to_pivot(
    client: Client, spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    script = f'echo "$@" >> {calls}; exec runc "$@"'
    client.create("c", spec("sh", "-c", "exit 6"), {"binary_name": runtime(tmp_path, script)})
    assert run_task(client, "c").status.code == 6
    assert "--no-pivot" not in calls.read_text()
    monkeypatch.setenv("DOCKER_RAMDISK", "1")
    calls.write_text("")
    assert run_task(client, "c").status.code == 6
    assert "--no-pivot" in calls.read_text()  # and the container's own options still hold: it was our runtime
    client.delete("c")


def test_a_runtime_that_is_not_there_is_said_by_name(client: Client, spec: MakeSpec, raw: Raw) -> None:
    client.create("c", spec("true"), runtime="io.containerd.nosuch.v9")
    assert raw.container("c").runtime.name == "io.containerd.nosuch.v9"
    with pytest.raises(Exception, match="nosuch") as caught:
        client.start("c")
    assert type(caught.value).__module__ == "libcontainerd.errors"
    assert not list(bundle_of(raw, "c").iterdir())
    client.delete("c")


# ------------------------------------------------------------------------------------------------------------- waiting


def test_many_wait_and_all_hear_the_same(client: Client, spec: MakeSpec, count: Count) -> None:
    waiters = count(200, 30)
    client.create("c", spec("sh", "-c", "read line; exit 9"))
    stdin = Collected()
    client.start("c", with_stdin=True, attach_stdio=stdin)
    client.exec("c", "e", process("sh", "-c", "exit 5"))
    with ThreadPoolExecutor(waiters) as pool:
        waiting = [pool.submit(client.wait, "c") for _ in range(waiters // 2)]
        waiting_exec = [pool.submit(client.wait, "c", "e") for _ in range(waiters // 2)]
        codes = {future.result(timeout=30).code for future in waiting_exec}
        assert codes == {5}
        stdin.stdin.write(b"go\n")
        results = {future.result(timeout=30) for future in waiting}
    (status,) = results
    assert status.code == 9
    wait_exec_gone(client, "c", "e")
    assert client.wait("c", "e").code == 5
    assert client.delete_task("c") == status
    assert client.wait("c") == status
    client.delete("c")
    assert client.wait("c") == status
    assert client.wait("c", "e").code == 5


def test_a_wait_that_takes_too_long_says_nothing_of_the_process(client: Client, spec: MakeSpec) -> None:
    with running(client, "c", spec(*SLEEP)):
        with pytest.raises(DeadlineExceededError, match="'c'"):
            client.wait("c", timeout=0.05)
        assert client.status("c") is Status.RUNNING


def test_a_new_container_does_not_answer_for_its_predecessor(client: Client, spec: MakeSpec) -> None:
    assert run(client, "c", spec("sh", "-c", "exit 3")).status.code == 3
    client.create("c", spec(*SLEEP))
    with pytest.raises(NotFoundError, match="container is not running"):
        client.wait("c")
    client.delete("c")


# ---------------------------------------------------------------------------------------------------- refused, and why


def test_a_container_with_a_task_is_not_deleted(client: Client, raw: Raw, spec: MakeSpec) -> None:
    client.create("c", spec(*SLEEP))
    pid = client.start("c")
    with pytest.raises(FailedPreconditionError, match=r"'c'.*delete_task"):
        client.delete("c")
    assert alive(pid)
    assert raw.container_ids() == {"c"}
    client.signal_process("c", "init", signal.SIGKILL)
    client.wait("c")
    with pytest.raises(FailedPreconditionError, match=r"'c'.*delete_task"):
        client.delete("c")
    client.delete_task("c")
    client.delete("c")


def test_delete_task_tells_why_it_did_not(client: Client, spec: MakeSpec) -> None:
    before = datetime.now(UTC)
    with structlog.testing.capture_logs() as logs:
        status = client.delete_task("nobody")
    assert status.code == 255
    assert isinstance(status.error, NotFoundError)
    assert "no such container" in str(status.error)
    assert before <= status.exited_at <= datetime.now(UTC)
    assert [(each["event"], each["container"]) for each in logs] == [("task_not_deleted", "nobody")]

    client.create("c", spec(*SLEEP))
    status = client.delete_task("c")
    assert (status.code, type(status.error)) == (255, NotFoundError)
    assert "container is not running" in str(status.error)

    pid = client.start("c")
    status = client.delete_task("c")
    assert (status.code, type(status.error)) == (255, FailedPreconditionError)
    assert "'c'" in str(status.error)
    assert alive(pid)
    client.pause("c")
    assert isinstance(client.delete_task("c").error, FailedPreconditionError)
    client.resume("c")
    # The record stayed, so everything goes on from here.
    assert stop(client, "c").code == 137


def test_a_container_is_started_once(client: Client, spec: MakeSpec) -> None:
    collected = Collected()
    client.create("c", spec("sh", "-c", "read line; echo $line; read line; exit 2"))
    client.start("c", with_stdin=True, attach_stdio=collected)
    for _ in range(2):
        with pytest.raises(ConflictError, match="already started"):
            client.start("c", with_stdin=True, attach_stdio=Collected())
    collected.stdin.write(b"still mine\n")
    collected.wait_for(b"still mine")
    collected.stdin.write(b"\n")
    client.wait("c")
    with pytest.raises(ConflictError, match="already started"):  # its task is still there
        client.start("c")
    assert client.delete_task("c").code == 2
    client.delete("c")


def test_an_execs_id_is_taken_once(client: Client, spec: MakeSpec) -> None:
    collected = Collected()
    with running(client, "c", spec(*SLEEP)):
        client.exec("c", "e", process("cat"), with_stdin=True, attach_stdio=collected)
        with pytest.raises(ConflictError, match="'e'"):
            client.exec("c", "e", process("true"), attach_stdio=Collected())
        collected.stdin.write(b"still mine\n")
        collected.wait_for(b"still mine")
        collected.stdin.close()
        assert client.wait("c", "e").code == 0
        wait_exec_gone(client, "c", "e")
        assert run_exec(client, "c", "e", "sh", "-c", "exit 8").status.code == 8


VERBS: dict[str, Callable[[Client, str], object]] = {
    "start": lambda client, cid: client.start(cid),
    "exec": lambda client, cid: client.exec(cid, "e", process("true")),
    "signal_process": lambda client, cid: client.signal_process(cid, "init", signal.SIGTERM),
    "resize_terminal": lambda client, cid: client.resize_terminal(cid, "init", 80, 24),
    "close_stdin": lambda client, cid: client.close_stdin(cid, "init"),
    "pause": lambda client, cid: client.pause(cid),
    "resume": lambda client, cid: client.resume(cid),
    "status": lambda client, cid: client.status(cid),
    "list_pids": lambda client, cid: client.list_pids(cid),
    "summary": lambda client, cid: client.summary(cid),
    "wait": lambda client, cid: client.wait(cid),
    "delete": lambda client, cid: client.delete(cid),
}


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_container_is_not_found(client: Client, verb: str) -> None:
    with pytest.raises(NotFoundError, match=r"'nobody'.*no such container"):
        VERBS[verb](client, "nobody")


def test_a_container_without_a_task_is_not_running(client: Client, spec: MakeSpec) -> None:
    client.create("c", spec("true"))
    for verb in set(VERBS) - {"start", "exec", "delete"}:
        with pytest.raises(NotFoundError, match=r"'c'.*container is not running"):
            VERBS[verb](client, "c")
    with pytest.raises(InvalidParameterError, match=r"'c'.*container is not running"):
        VERBS["exec"](client, "c")
    client.delete("c")


def test_an_unknown_exec_is_not_found(client: Client, spec: MakeSpec) -> None:
    with running(client, "c", spec(*SLEEP)):
        for verb in (
            lambda: client.signal_process("c", "nobody", signal.SIGTERM),
            lambda: client.resize_terminal("c", "nobody", 80, 24),
            lambda: client.close_stdin("c", "nobody"),
            lambda: client.wait("c", "nobody"),
        ):
            with pytest.raises(NotFoundError, match=r"'nobody'.*no such exec"):
                verb()


def test_an_ended_process_is_not_there_to_be_signalled(client: Client, spec: MakeSpec) -> None:
    client.create("c", spec("true"))
    client.start("c")
    client.wait("c")
    with pytest.raises(NotFoundError):
        client.signal_process("c", "init", signal.SIGTERM)
    with pytest.raises(InvalidParameterError, match="not running"):
        client.exec("c", "e", process("true"))
    client.close_stdin("c", "init")
    for verb in (client.pause, client.resume):
        with pytest.raises(FailedPreconditionError):
            verb("c")
    client.delete_task("c")
    client.delete("c")


def test_a_mapping_is_as_good_as_a_spec(client: Client, spec: MakeSpec) -> None:
    client.create("c", oci.to_mapping(spec("sh", "-c", "read line; exit 3")))
    client.start("c", with_stdin=True, attach_stdio=Collected())
    client.exec("c", "e", oci.to_mapping(process("sh", "-c", "exit 4")), attach_stdio=Collected())
    assert client.wait("c", "e").code == 4
    client.close_stdin("c", "init")
    assert client.wait("c", timeout=20).code == 3
    client.delete_task("c")
    client.delete("c")


def test_of_many_who_delete_at_once_one_does_and_all_hear_of_it(
    client: Client, spec: MakeSpec, backend: RecordingBackend, count: Count
) -> None:
    def delete() -> bool:
        try:
            client.delete("c")
        except (NotFoundError, ConflictError):
            return False
        return True

    with ThreadPoolExecutor(5) as pool:
        for _ in range(count(50, 5)):
            backend.clear()
            client.create("c", spec("sh", "-c", "exit 3"))
            client.start("c", attach_stdio=Collected())
            status = client.wait("c")
            deleting = [pool.submit(client.delete_task, "c") for _ in range(5)]
            told = [each.result(timeout=20) for each in deleting]
            assert status in told
            # Who comes after the record was dropped is told that there is none.
            assert all(each == status or isinstance(each.error, NotFoundError) for each in told)
            deleted = [each.result(timeout=20) for each in [pool.submit(delete) for _ in range(5)]]
            assert deleted.count(True) == 1
            assert exit_of(backend, "c") == 3
            assert kinds(backend, "c") == [("create", "c"), ("start", "c"), ("exit", "c")]


# ------------------------------------------------------------------------------------------------------- other hands


def test_what_another_has_removed_can_be_forgotten(client: Client, raw: Raw, spec: MakeSpec) -> None:
    client.create("c", spec("sh", "-c", "exit 3"))
    bundle = bundle_of(raw, "c")
    client.start("c")
    client.wait("c")
    raw.delete_task("c")
    status = client.delete_task("c")
    assert (status.code, status.error) == (3, None)
    raw.delete_container("c")
    client.delete("c")
    assert not bundle.exists()
    assert run(client, "c", spec("sh", "-c", "exit 4")).status.code == 4


def test_a_task_that_another_kills_and_deletes_has_one_exit(
    client: Client, backend: RecordingBackend, raw: Raw, spec: MakeSpec
) -> None:
    client.create("c", spec(*SLEEP))
    client.start("c")
    raw.kill("c")
    assert client.wait("c").code == 137
    raw.delete_task("c")
    assert client.delete_task("c").code == 137
    assert exit_of(backend, "c") == 137
    client.delete("c")
    assert kinds(backend, "c") == [("create", "c"), ("start", "c"), ("exit", "c")]


# ------------------------------------------------------------------------------------------------------------ events


def test_events_come_in_order_with_their_fields(
    client: Client, backend: RecordingBackend, spec: MakeSpec
) -> None:
    client.create("c", spec("sh", "-c", "read line; exit 7"))
    collected = Collected()
    pid = client.start("c", with_stdin=True, attach_stdio=collected)
    exec_pid = client.exec("c", "e", process("sh", "-c", "exit 5"))
    exec_status = client.wait("c", "e")
    backend.wait_for(EventType.EXIT, "c", "e")
    client.pause("c")
    backend.wait_for(EventType.PAUSED, "c")
    client.resume("c")
    collected.stdin.write(b"\n")
    status = client.wait("c")
    client.delete_task("c")
    client.delete("c")
    backend.wait_for(EventType.EXIT, "c", "c")

    assert [(event.event, event.info) for event in backend.events("c")] == [
        (EventType.CREATE, EventInfo("c", "c", pid)),
        (EventType.START, EventInfo("c", "c", pid)),
        (EventType.EXEC_ADDED, EventInfo("c", "e")),
        (EventType.EXEC_STARTED, EventInfo("c", "e", exec_pid)),
        (EventType.EXIT, EventInfo("c", "e", exec_pid, 5, exec_status.exited_at)),
        (EventType.PAUSED, EventInfo("c")),
        (EventType.RESUMED, EventInfo("c")),
        (EventType.EXIT, EventInfo("c", "c", pid, 7, status.exited_at)),
    ]
    assert exec_pid != pid


def test_events_of_others_containers_are_not_ours(
    client: Client, remote: Remote, namespace: str, backend: RecordingBackend, spec: MakeSpec
) -> None:
    theirs = RecordingBackend()
    with remote.new_client(namespace, theirs) as other:
        run(client, "mine", spec("true"))
        run(other, "theirs", spec("true"))
        exit_of(backend, "mine")
        exit_of(theirs, "theirs")
        assert {event.container_id for event in backend.events()} == {"mine"}
        assert {event.container_id for event in theirs.events()} == {"theirs"}


def test_a_failing_backend_hears_the_next_event(
    remote: Remote, namespace: str, client: Client, spec: MakeSpec
) -> None:
    class Failing(RecordingBackend):
        def process_event(self, container_id: str, event: EventType, info: EventInfo) -> None:
            super().process_event(container_id, event, info)
            raise RuntimeError("backend's own trouble")

    failing = Failing()
    with structlog.testing.capture_logs() as logs, remote.new_client(namespace, failing) as other:
        run(other, "c", spec("true"))
        exit_of(failing, "c")
    assert kinds(failing, "c") == [("create", "c"), ("start", "c"), ("exit", "c")]
    failures = [log for log in logs if log["event"] == "backend_failed"]
    assert [(log["container"], log["event_type"]) for log in failures] == [
        ("c", "create"),
        ("c", "start"),
        ("c", "exit"),
    ]


def test_a_backend_may_remove_and_remake_from_inside(
    remote: Remote, namespace: str, client: Client, spec: MakeSpec, count: Count
) -> None:
    """What a daemon's restart policy does: everything from process_event, for the same id."""
    rounds = count(100, 5)
    made = spec("sh", "-c", "exit 3")
    ends: list[int] = []
    errors: list[BaseException] = []
    done = threading.Event()

    class Restarting:
        def process_event(self, container_id: str, event: EventType, info: EventInfo) -> None:
            if event is not EventType.EXIT:
                return
            try:
                ends.append(other.delete_task(container_id).code)
                other.delete(container_id)
                if len(ends) == rounds:
                    done.set()
                    return
                other.create(container_id, made)
                other.start(container_id)
            except BaseException as error:
                errors.append(error)
                done.set()
                raise

    with remote.new_client(namespace, Restarting()) as other:
        other.create("c", made)
        other.start("c")
        assert done.wait(50)
    assert not errors
    assert ends == [3] * rounds


def test_execs_end_with_their_init_and_each_is_told_once(
    client: Client, backend: RecordingBackend, spec: MakeSpec, raw: Raw, no_leaks: None
) -> None:
    client.create("c", spec(*SLEEP))
    bundle = bundle_of(raw, "c")
    client.start("c", attach_stdio=Collected())
    for number in range(3):
        client.exec("c", f"e{number}", process("cat"), with_stdin=True, attach_stdio=Collected())
    client.signal_process("c", "init", signal.SIGKILL)
    assert client.wait("c").code == 137
    assert [client.wait("c", f"e{number}").code for number in range(3)] == [137] * 3
    for name in ("e0", "e1", "e2", "init"):
        assert exit_of(backend, "c", name) == 137
    assert client.delete_task("c").code == 137
    for number in range(3):
        wait_exec_gone(client, "c", f"e{number}")
    wait_until(lambda: not list(bundle.iterdir()), "the FIFOs are gone")
    client.delete("c")
    exits = [event.info.process_id for event in backend.events("c") if event.event is EventType.EXIT]
    assert sorted(exits) == ["c", "e0", "e1", "e2"]


# --------------------------------------------------------------------------------------------------- out of memory


def test_out_of_memory_is_told_and_forgotten_with_the_task(
    client: Client, backend: RecordingBackend, spec: MakeSpec
) -> None:
    script = 'read what; [ "$what" = hog ] || exit 3; x=a; while :; do x=$x$x; done'
    client.create("c", spec("sh", "-c", script, options=[oci.with_memory_limit(16 << 20)]))
    client.start("c", with_stdin=True, attach_stdio=Collected(b"hog\n"))
    assert client.wait("c", timeout=40).code == 137
    oom = backend.wait_for(EventType.OOM, "c", timeout=20)
    assert oom.info == EventInfo("c", oom_killed=True)
    exit_of(backend, "c")
    told = backend.events("c")
    after = told[told.index(oom) :]
    assert all(event.info.oom_killed for event in after)
    assert not any(event.info.oom_killed for event in told[: told.index(oom)])
    assert client.delete_task("c").code == 137

    backend.clear()
    client.start("c", with_stdin=True, attach_stdio=Collected(b"rest\n"))
    assert exit_of(backend, "c") == 3
    assert not any(event.info.oom_killed for event in backend.events("c"))
    client.delete_task("c")
    client.delete("c")


# ------------------------------------------------------------------------------------------------------ user namespaces


def test_a_user_namespaces_bundle_belongs_to_its_root(
    client: Client, raw: Raw, rootfs: Path, spec: MakeSpec
) -> None:
    mapping = oci.LinuxIDMapping(container_id=0, host_id=100_000, size=65_536)
    mapped = spec(
        "sh", "-c", "id -u; cat; echo problem >&2; exit 3", options=[oci.with_user_namespace([mapping])]
    )
    client.create("c", mapped)
    bundle = bundle_of(raw, "c")
    assert bundle.name == "c.100000.100000"
    details = bundle.stat()
    assert (details.st_uid, details.st_gid, stat.S_IMODE(details.st_mode)) == (100_000, 100_000, 0o700)
    owners: list[tuple[int, int, int]] = []
    collected = Collected()

    def attach(dio: cio.DirectIO) -> cio.IO:
        for path in dio.config.paths:
            found = Path(path).stat()
            owners.append((found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)))
        return collected(dio)

    client.start("c", with_stdin=True, attach_stdio=attach)
    collected.stdin.write(b"from outside\n")
    collected.wait_for(b"from outside\n")
    seen = run_exec(client, "c", "e", "sh", "-c", "id -u; cat", stdin=b"to the exec")
    assert (seen.out, seen.status.code) == (b"0\nto the exec", 0)
    collected.stdin.close()
    assert client.wait("c").code == 3
    assert client.delete_task("c").code == 3
    assert (collected.out, collected.err) == (b"0\nfrom outside\n", b"problem\n")
    assert owners == [(100_000, 100_000, 0o700)] * 3
    client.delete("c")
    assert not bundle.exists()


# ------------------------------------------------------------------------------------------------------- what is kept


def test_noclean_keeps_the_bundle(
    client: Client, raw: Raw, spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.create("c", spec("true"))
    bundle = bundle_of(raw, "c")
    monkeypatch.setenv("LIBCONTAINERD_NOCLEAN", "1")
    client.delete("c")
    assert bundle.is_dir()
    assert not raw.container_ids()
    monkeypatch.delenv("LIBCONTAINERD_NOCLEAN")
    # An id whose directory was kept can be used again, and takes it along at its end.
    assert run(client, "c", spec("sh", "-c", "exit 3")).status.code == 3
    assert not bundle.exists()


def test_a_start_that_runs_out_of_time_is_undone(
    client: Client, raw: Raw, spec: MakeSpec, no_leaks: None, count: Count
) -> None:
    cut_off = 0
    client.create("c", spec(*SLEEP))
    bundle = bundle_of(raw, "c")
    for number in range(count(60, 4)):
        collected = Collected()
        try:
            client.start("c", with_stdin=True, attach_stdio=collected, timeout=0.005 * (3 * number % 8 + 1))
        except DeadlineExceededError:
            cut_off += 1
            assert raw.process("c") is None
            assert not list(bundle.iterdir())
            with pytest.raises(NotFoundError, match="container is not running"):
                client.status("c")
        else:
            client.signal_process("c", "init", signal.SIGKILL)
            client.wait("c")
            assert client.delete_task("c").code == 137
    assert cut_off
    # The container itself is none the worse for it.
    client.start("c")
    assert stop(client, "c").code == 137


def test_an_exec_that_runs_out_of_time_is_undone(
    client: Client, raw: Raw, spec: MakeSpec, no_leaks: None, count: Count
) -> None:
    cut_off = 0
    with running(client, "c", spec(*SLEEP)):
        bundle = bundle_of(raw, "c")
        for number in range(count(100, 8)):
            try:
                client.exec(
                    "c",
                    "e",
                    process(*SLEEP),
                    with_stdin=True,
                    attach_stdio=Collected(),
                    timeout=0.004 * (number % 8 + 1),
                )
            except DeadlineExceededError:
                cut_off += 1
                assert raw.process("c", "e") is None
                assert not list(bundle.glob("e-*"))
            else:
                client.signal_process("c", "e", signal.SIGKILL)
                client.wait("c", "e")
                wait_exec_gone(client, "c", "e")
            wait_until(lambda: len(client.list_pids("c")) == 1, "only init is left")
        assert cut_off
        assert run_exec(client, "c", "e", "sh", "-c", "exit 3").status.code == 3
