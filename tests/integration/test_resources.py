"""What real containers use, and their limits as the kernel sees them."""

from __future__ import annotations

from pathlib import Path

import pytest

from libcontainerd import (
    Client,
    EventType,
    FailedPreconditionError,
    SystemFailureError,
    oci,
)
from libcontainerd.backends import RecordingBackend
from libcontainerd.stats import Usage
from tests.integration.containers import (
    Collected,
    MakeSpec,
    exit_of,
    process,
    run_exec,
    running,
    wait_exec_gone,
    wait_until,
)

_CGROUPS = Path("/sys/fs/cgroup")
_V2 = (_CGROUPS / "cgroup.controllers").exists()
_SHARES_AS_WEIGHT = 1 + ((512 - 2) * 9999) // 262142
"""What runc makes of 512 shares on cgroup v2."""


def limits(pid: int) -> dict[str, str]:
    """The limits in a process's cgroups, under the names of `update_resources`."""
    paths = {}
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            paths[controller] = path.lstrip("/")

    def read(controller: str, name: str) -> str:
        directory = _CGROUPS / paths[""] if _V2 else _CGROUPS / controller / paths[controller]
        return (directory / name).read_text().strip()

    if _V2:
        quota, period = read("cpu", "cpu.max").split()
        return {
            "memory": read("memory", "memory.max"),
            "shares": read("cpu", "cpu.weight"),
            "quota": quota,
            "period": period,
            "pids": read("pids", "pids.max"),
        }
    return {
        "memory": read("memory", "memory.limit_in_bytes"),
        "shares": read("cpu", "cpu.shares"),
        "quota": read("cpu", "cpu.cfs_quota_us"),
        "period": read("cpu", "cpu.cfs_period_us"),
        "pids": read("pids", "pids.max"),
    }


def test_the_kernel_sees_what_was_set_and_nothing_else_changes(client: Client, spec: MakeSpec) -> None:
    with running(client, "c", spec("sleep", "1000", options=[oci.with_memory_limit(64 << 20)])) as pid:
        before = limits(pid)
        assert before["memory"] == str(64 << 20)

        client.update_resources("c", {"memory": {"limit": 128 << 20}})
        assert limits(pid) == {**before, "memory": str(128 << 20)}

        client.update_resources("c", oci.LinuxResources(pids=oci.LinuxPids(limit=77)))
        assert limits(pid) == {**before, "memory": str(128 << 20), "pids": "77"}

        cpu = oci.LinuxCPU(shares=512, quota=50_000, period=100_000)
        client.update_resources("c", oci.LinuxResources(cpu=cpu))
        after = limits(pid)
        assert after == {
            "memory": str(128 << 20),
            "shares": str(_SHARES_AS_WEIGHT) if _V2 else "512",
            "quota": "50000",
            "period": "100000",
            "pids": "77",
        }

        client.update_resources("c", {})
        assert limits(pid) == after
        usage = client.stats("c").usage
        assert (usage.memory_limit_bytes, usage.pids_limit) == (128 << 20, 77)


def test_what_the_kernel_refuses_is_an_error_and_changes_nothing(client: Client, spec: MakeSpec) -> None:
    with running(client, "c", spec("sleep", "1000", options=[oci.with_memory_limit(64 << 20)])) as pid:
        before = limits(pid)
        with pytest.raises(
            FailedPreconditionError, match=r"resources of container 'c': .*memory limit to 4096"
        ):
            client.update_resources("c", {"memory": {"limit": 4096}})
        with pytest.raises(SystemFailureError, match="invalid argument"):
            client.update_resources("c", {"cpu": {"quota": 1}})

        assert limits(pid) == before


def test_a_tasks_new_limits_end_with_it(client: Client, spec: MakeSpec) -> None:
    client.create("c", spec("cat", options=[oci.with_pids_limit(50)]))
    for _ in range(2):
        pid = client.start("c", with_stdin=True, attach_stdio=Collected())
        assert limits(pid)["pids"] == "50"
        client.update_resources("c", {"pids": {"limit": 60}})
        assert limits(pid)["pids"] == "60"
        client.close_stdin("c", "init")
        assert client.wait("c", timeout=40).code == 0
        client.delete_task("c")
    client.delete("c")


def test_the_usage_grows_with_what_is_used(client: Client, spec: MakeSpec) -> None:
    # Each line that it reads costs it time, and more memory than the kernel counts on account, a quarter MiB for each processor.
    script = "echo ready; while read x; do i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done; y=$y$(head -c 2000000 /dev/zero | tr '\\0' a); echo done; done"
    collected = Collected()
    made = spec("sh", "-c", script, options=[oci.with_memory_limit(64 << 20), oci.with_pids_limit(40)])

    def usage(processes: int) -> Usage:
        # What made a process, or one that has ended, may be counted for a moment longer.
        wait_until(lambda: client.stats("c").usage.pids == processes, f"{processes} are all", timeout=30)
        return client.stats("c").usage

    with running(client, "c", made, collected, with_stdin=True):
        collected.wait_for(b"ready", timeout=30)
        idle = usage(1)
        for round_number in range(1, 4):
            collected.stdin.write(b"go\n")
            collected.wait_for(b"done\n" * round_number, timeout=40)
        busy = usage(1)
        client.exec("c", "e", process("sleep", "1000"))
        usage(2)

    assert idle.cpu_ns is not None and busy.cpu_ns is not None  # noqa: PT018 - for mypy
    assert idle.memory_working_set_bytes is not None and busy.memory_working_set_bytes is not None  # noqa: PT018
    assert busy.cpu_ns > idle.cpu_ns > 0
    assert busy.memory_working_set_bytes > idle.memory_working_set_bytes + 500_000
    assert (idle.memory_limit_bytes, idle.pids_limit) == (64 << 20, 40)
    assert (idle.oom_kills, idle.swap_bytes) == (0, 0)


def test_stats_of_many_in_one_call(client: Client, spec: MakeSpec) -> None:
    names = [f"c{number}" for number in range(4)]
    for number, name in enumerate(names):
        client.create(name, spec("sleep", "1000", options=[oci.with_pids_limit(20 + number)]))
        client.start(name)

    assert {name: each.usage.pids_limit for name, each in client.stats_all().items()} == {
        "c0": 20,
        "c1": 21,
        "c2": 22,
        "c3": 23,
    }


def test_an_exec_over_the_limit_is_told_like_init(
    client: Client, backend: RecordingBackend, spec: MakeSpec
) -> None:
    with running(client, "c", spec("sleep", "1000", options=[oci.with_memory_limit(16 << 20)])):
        hog = run_exec(client, "c", "hog", "sh", "-c", "x=a; while :; do x=$x$x; done")
        assert hog.status.code == 137
        backend.wait_for(EventType.OOM, "c", timeout=20)
        wait_exec_gone(client, "c", "hog")
        assert client.stats("c").usage.oom_kills == 1
    assert exit_of(backend, "c") == 137
    assert backend.wait_for(EventType.EXIT, "c", "init", timeout=20).info.oom_killed


# ----------------------------------------------------------------------------------------------------------- summary


def test_the_summary_names_what_we_started_and_shows_the_rest(client: Client, spec: MakeSpec) -> None:
    collected = Collected()
    script = "sleep 1001 & sleep 1002 & echo ready; wait"
    with running(client, "c", spec("sh", "-c", script), collected) as pid:
        collected.wait_for(b"ready", timeout=30)
        lone = client.exec("c", "lone", process("sleep", "1000"))
        parent_output = Collected()
        parent = client.exec(
            "c", "parent", process("sh", "-c", "sleep 1003 & echo up; wait"), attach_stdio=parent_output
        )
        parent_output.wait_for(b"up", timeout=30)

        named = {each.pid: each.process_id for each in client.summary("c")}
        # Those of unknown origin: two of init's, one of the exec's.
        children = {each for each, name in named.items() if not name}
        assert len(named) == 6
        assert {each: name for each, name in named.items() if name} == {
            pid: "init",
            lone: "lone",
            parent: "parent",
        }
        assert len(children) == 3
        assert sorted(named) == sorted(client.list_pids("c"))
        sleeping = {"sleep 1001", "sleep 1002", "sleep 1003"}
        # The shell goes on as soon as it has forked, and what it forked is a shell for a moment more.
        wait_until(
            lambda: {_command(each) for each in children} == sleeping, "they have become what they are"
        )

        client.signal_process("c", "parent", 9)
        client.wait("c", "parent", timeout=40)
        wait_exec_gone(client, "c", "parent")
        # What the exec has left behind is init's child now, and nobody's exec.
        left = {each.process_id for each in client.summary("c")}
        assert left == {"init", "lone", ""}


def test_what_an_exec_has_left_behind_has_no_name(client: Client, spec: MakeSpec) -> None:
    with running(client, "c", spec("sleep", "1000")) as pid:
        assert [each.process_id for each in client.summary("c")] == ["init"]
        run_exec(client, "c", "e", "sh", "-c", "sleep 1004 >/dev/null 2>&1 &")
        wait_exec_gone(client, "c", "e")
        wait_until(lambda: len(client.summary("c")) == 2, "the orphan is alone")
        assert sorted(each.process_id for each in client.summary("c")) == ["", "init"]
        assert next(each.pid for each in client.summary("c") if each.process_id) == pid


def _command(pid: int) -> str:
    return " ".join(Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")).strip()
