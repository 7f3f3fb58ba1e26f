"""Every option for limits, namespaces, devices, seccomp and cgroups, looked at from inside a real container."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from libcontainerd import oci
from tests.integration.oci.conftest import Runc

_MIB = 1 << 20


def cgroup_file(runc: Runc, spec: oci.Spec, v1: str, v2: str) -> str:
    """Read one file of the container's cgroup from inside, by the version that this machine has."""
    seen = runc.run(spec, f"cat /sys/fs/cgroup/{v1} 2>/dev/null || cat /sys/fs/cgroup/{v2}")
    assert seen.code == 0, seen.output
    return seen.output.strip()


def test_with_memory_limit(runc: Runc) -> None:
    spec = oci.with_memory_limit(64 * _MIB, reservation=32 * _MIB)(oci.default_spec())

    assert cgroup_file(runc, spec, "memory/memory.limit_in_bytes", "memory.max") == str(64 * _MIB)
    assert cgroup_file(runc, spec, "memory/memory.soft_limit_in_bytes", "memory.low") == str(32 * _MIB)


def test_a_process_over_the_memory_limit_is_killed(runc: Runc) -> None:
    spec = oci.with_memory_limit(16 * _MIB, swap=16 * _MIB)(oci.default_spec())

    # The shell holds the whole of it as one string.
    seen = runc.run(spec, "x=$(head -c 67108864 /dev/zero | tr '\\0' x); echo survived")

    assert "survived" not in seen.output
    assert seen.code != 0


def test_with_cpu_limit(runc: Runc) -> None:
    spec = oci.with_cpu_limit(0.25, period=50_000)(oci.default_spec())

    quota = cgroup_file(runc, spec, "cpu/cpu.cfs_quota_us", "cpu.max")
    period = cgroup_file(runc, spec, "cpu/cpu.cfs_period_us", "cpu.max")

    assert quota.split()[0] == "12500"
    assert period.split()[-1] == "50000"


def test_with_cpu_shares(runc: Runc) -> None:
    spec = oci.with_cpu_shares(512)(oci.default_spec())

    seen = cgroup_file(runc, spec, "cpu/cpu.shares", "cpu.weight")

    # On cgroup v2 they become a weight by a formula of the runtime's own; 100 is that of nobody's asking.
    assert seen == "512" or 1 < int(seen) < 100


def test_with_cpuset(runc: Runc) -> None:
    cpu = str(min(os.sched_getaffinity(0)))
    spec = oci.with_cpuset(cpu, mems="0")(oci.default_spec())
    seen = runc.run(spec, "cat /proc/self/status")

    assert seen.status("Cpus_allowed_list") == cpu
    assert seen.status("Mems_allowed_list") == "0"


def test_with_pids_limit(runc: Runc) -> None:
    spec = oci.with_pids_limit(12)(oci.default_spec())

    assert cgroup_file(runc, spec, "pids/pids.max", "pids.max") == "12"
    many = "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do sleep 5 & done; echo survived"
    assert "Resource temporarily unavailable" in runc.run(spec, many).output


def test_with_user_namespace(runc: Runc) -> None:
    mapping = oci.LinuxIDMapping(container_id=0, host_id=200_000, size=65_536)
    groups = oci.LinuxIDMapping(container_id=0, host_id=300_000, size=1_000)
    spec = oci.with_user_namespace([mapping], [groups])(oci.default_spec())
    seen = runc.run(
        spec, "id -u; cat /proc/self/uid_map; cat /proc/self/gid_map; readlink /proc/self/ns/user"
    )
    lines = seen.output.splitlines()

    assert seen.code == 0, seen.output
    assert lines[0] == "0"
    assert lines[1].split() == ["0", "200000", "65536"]
    assert lines[2].split() == ["0", "300000", "1000"]
    assert lines[3] != os.readlink("/proc/self/ns/user")


@pytest.fixture
def foreign_process() -> Iterator[int]:
    """A process with network and IPC namespaces of its own; waits until it has them."""
    with subprocess.Popen(
        ["unshare", "--net", "--ipc", "sh", "-c", "echo ready; exec sleep 60"],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process.pid
        process.kill()


def test_with_network_namespace(runc: Runc, foreign_process: int) -> None:
    spec = oci.with_network_namespace(f"/proc/{foreign_process}/ns/net")(oci.default_spec())

    seen = runc.run(spec, "readlink /proc/self/ns/net")

    assert seen.output.strip() == os.readlink(f"/proc/{foreign_process}/ns/net")
    assert seen.output.strip() != os.readlink("/proc/self/ns/net")


def test_with_namespace_that_is_joined(runc: Runc, foreign_process: int) -> None:
    spec = oci.with_namespace("ipc", f"/proc/{foreign_process}/ns/ipc")(oci.default_spec())

    assert runc.run(spec, "readlink /proc/self/ns/ipc").output.strip() == os.readlink(
        f"/proc/{foreign_process}/ns/ipc"
    )


def test_without_namespace_and_with_a_new_one_again(runc: Runc) -> None:
    shared = oci.without_namespace("uts")(oci.default_spec())
    own = oci.with_namespace("uts")(shared)

    assert runc.run(shared, "readlink /proc/self/ns/uts").output.strip() == os.readlink("/proc/self/ns/uts")
    assert runc.run(own, "readlink /proc/self/ns/uts").output.strip() != os.readlink("/proc/self/ns/uts")


def test_with_devices_by_description(runc: Runc, own_rootfs: Path) -> None:
    device = oci.LinuxDevice(path="/dev/kernel", type="c", major=1, minor=11, file_mode=0o640, uid=7, gid=8)
    spec = oci.build(oci.default_spec(), oci.with_rootfs(own_rootfs), oci.with_devices(device, access="w"))

    seen = runc.run(spec, "ls -ln /dev/kernel && : > /dev/kernel && echo opened; : < /dev/kernel")

    fields = seen.output.split()
    assert fields[0] == "crw-r-----"
    assert fields[2:6] == ["7", "8", "1,", "11"]
    assert "opened" in seen.output
    assert "Operation not permitted" in seen.output


def test_with_devices_of_the_host(runc: Runc) -> None:
    spec = oci.with_devices("/dev/kmsg")(oci.default_spec())
    status = os.stat("/dev/kmsg")

    seen = runc.run(spec, "stat -c '%t:%T %a' /dev/kmsg; : > /dev/kmsg && echo opened")

    assert seen.output.splitlines() == [f"1:b {status.st_mode & 0o777:o}", "opened"]


def test_with_annotations_that_a_hook_sees(runc: Runc, tmp_path: Path) -> None:
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\ncat > {tmp_path}/state.json\n")
    hook.chmod(0o755)
    spec = oci.with_annotations({"org.example/job": "7"})(oci.default_spec())
    spec.hooks = oci.Hooks(create_runtime=[oci.Hook(path=str(hook), args=["hook"])])

    assert runc.run(spec, "true").code == 0

    state = oci.parse_state((tmp_path / "state.json").read_bytes())
    assert state.annotations == {"org.example/job": "7"}
    assert state.status == "creating"
    assert oci.validate(state) == []


def test_with_sysctl(runc: Runc) -> None:
    spec = oci.with_sysctl({"net.ipv4.ip_forward": "1", "kernel.msgmax": "4097"})(oci.default_spec())

    seen = runc.run(spec, "cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/msgmax")

    assert seen.output.split() == ["1", "4097"]


def test_with_cgroup_path(runc: Runc) -> None:
    path = f"/{runc.directory.name}/job"
    spec = oci.build(oci.default_spec(), oci.with_cgroup_path(path), oci.without_namespace("cgroup"))

    seen = runc.run(spec, "cat /proc/self/cgroup")

    assert {
        line.split(":", 2)[2] for line in seen.output.splitlines() if ":pids:" in line or line[:1] == "0"
    } >= {path}


def test_with_seccomp(runc: Runc) -> None:
    # The capability is there, so only the filter of a spec without it can be what refuses.
    plain = oci.with_capabilities(add=["SYS_ADMIN"])(oci.default_spec())
    ours = oci.default_seccomp_profile(["CAP_CHOWN"])
    script = "cat /proc/self/status; unshare -u true && echo unshared; ls / > /dev/null && nc 127.0.0.1 1"

    free, filtered = runc.run(plain, script), runc.run(oci.with_seccomp(ours)(plain), script)

    assert (free.status("Seccomp"), filtered.status("Seccomp")) == ("0", "2")
    assert "unshared" in free.output
    assert "unshared" not in filtered.output
    assert "unshare(0x4000000): Operation not permitted" in filtered.output
    # Sockets and forks work as before.
    assert "Connection refused" in filtered.output


def test_the_default_seccomp_profile_follows_the_capabilities(runc: Runc) -> None:
    spec = oci.build(oci.default_spec(), oci.with_capabilities(add=["SYS_ADMIN"]), oci.with_seccomp())

    seen = runc.run(spec, "grep ^Seccomp: /proc/self/status; unshare -u true && echo unshared")

    assert seen.output.split() == ["Seccomp:", "2", "unshared"]


def test_with_a_seccomp_profile_of_ones_own(runc: Runc) -> None:
    profile = oci.LinuxSeccomp(
        default_action="SCMP_ACT_ALLOW",
        syscalls=[oci.LinuxSyscall(names=["mkdir", "mkdirat"], action="SCMP_ACT_ERRNO", errno_ret=122)],
    )

    seen = runc.run(oci.with_seccomp(profile)(oci.default_spec()), "mkdir /run/x")

    assert "quota" in seen.output.lower()
