"""The default spec, looked at from inside a real container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from libcontainerd import oci
from tests.integration.oci.conftest import Runc

_NAMESPACES = {
    "pid": "pid",
    "ipc": "ipc",
    "uts": "uts",
    "mnt": "mount",
    "net": "network",
    "cgroup": "cgroup",
}


def test_it_runs_a_shell_as_root_in_the_root_directory(runc: Runc) -> None:
    seen = runc.run(oci.default_spec(), "id; pwd; env")

    assert seen.code == 0, seen.output
    assert seen.output.splitlines()[:2] == ["uid=0(root) gid=0(root) groups=0(root)", "/"]
    assert "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" in seen.output


def test_it_exits_with_the_programs_code(runc: Runc) -> None:
    assert runc.run(oci.default_spec(), "exit 7").code == 7


@pytest.mark.parametrize("name", _NAMESPACES)
def test_it_has_namespaces_of_its_own(runc: Runc, name: str) -> None:
    seen = runc.run(oci.default_spec(), f"readlink /proc/self/ns/{name}")

    assert seen.output.strip().startswith(f"{name}:["), seen.output
    assert seen.output.strip() != os.readlink(f"/proc/self/ns/{name}")


def test_it_has_fourteen_capabilities_and_cannot_gain_more(runc: Runc) -> None:
    seen = runc.run(oci.default_spec(), "cat /proc/self/status")

    assert {seen.status(name) for name in ("CapPrm", "CapEff", "CapBnd")} == {"00000000a80425fb"}
    assert {seen.status(name) for name in ("CapInh", "CapAmb")} == {"0000000000000000"}
    assert seen.status("NoNewPrivs") == "1"
    assert seen.status("Seccomp") == "0"


def test_it_limits_open_files(runc: Runc) -> None:
    assert runc.run(oci.default_spec(), "ulimit -Sn; ulimit -Hn").output.split() == ["1024", "1024"]


def test_it_mounts_what_programs_expect(runc: Runc) -> None:
    seen = runc.run(oci.default_spec(), "mount")
    mounted = {fields[2]: (fields[4], fields[5]) for fields in map(str.split, seen.output.splitlines())}

    assert {
        place: mounted[place][0] for place in ("/proc", "/dev", "/dev/pts", "/dev/shm", "/sys", "/run")
    } == {
        "/proc": "proc",
        "/dev": "tmpfs",
        "/dev/pts": "devpts",
        "/dev/shm": "tmpfs",
        "/sys": "sysfs",
        "/run": "tmpfs",
    }
    assert mounted["/dev/mqueue"][0] == "mqueue"
    assert mounted["/sys"][1].startswith("(ro,")
    assert {"noexec", "nosuid", "nodev"} <= set(mounted["/dev/shm"][1].strip("()").split(","))


def test_it_sees_its_own_cgroup_read_only(runc: Runc) -> None:
    script = "d=/sys/fs/cgroup; test -d $d/memory && d=$d/memory; mkdir $d/x; cut -d: -f3 /proc/self/cgroup"
    lines = runc.run(oci.default_spec(), script).output.splitlines()

    assert "Read-only file system" in "".join(lines)
    assert lines[-1] == "/"


def test_it_masks_what_tells_of_the_host(runc: Runc) -> None:
    spec = oci.default_spec()
    assert spec.linux is not None
    telling = [path for path in spec.linux.masked_paths or () if content(Path(path))]

    seen = runc.run(
        spec, "".join(f"cat {path} 2> /dev/null; ls -A {path}/ 2> /dev/null\n" for path in telling)
    )

    # Kernels differ in which of them they have; these two are in all that run containers.
    assert {"/proc/keys", "/proc/timer_list"} & set(telling)
    assert seen.output == ""


def content(path: Path) -> bool:
    """Say whether a file or directory of the host holds anything."""
    if path.is_dir():
        return any(path.iterdir())
    if not path.exists():
        return False
    with path.open("rb") as file:
        return file.read(1) != b""


def test_it_cannot_change_the_kernels_parameters(runc: Runc) -> None:
    seen = runc.run(oci.default_spec(), "echo 1 > /proc/sys/kernel/panic || cat /proc/self/mounts")

    assert "/proc/sys proc ro," in seen.output
    assert "Read-only file system" in seen.output


def test_it_can_use_the_common_devices(runc: Runc) -> None:
    script = """
        echo lost > /dev/null && head -c 4 /dev/zero | od -An -tx1 && head -c 4 /dev/urandom | wc -c
        head -c 4 /dev/random | wc -c
        echo lost > /dev/full || echo full
        test -c /dev/ptmx && test -c /dev/tty && ls /dev/fd/0 /dev/stdin
        """
    seen = runc.run(oci.default_spec(), script)

    assert seen.code == 0, seen.output
    assert "00 00 00 00" in seen.output
    assert seen.output.splitlines().count("4") == 2
    assert "full" in seen.output


def test_it_may_make_other_devices_but_not_use_them(runc: Runc) -> None:
    seen = runc.run(oci.default_spec(), "mknod /dev/kernel c 1 11 && ls /dev/kernel && : > /dev/kernel")

    assert "/dev/kernel" in seen.output.splitlines()
    assert "Operation not permitted" in seen.output
    assert seen.code != 0


def test_it_leaves_nothing_in_the_root_filesystem(runc: Runc, own_rootfs: Path) -> None:
    before = sorted(str(path.relative_to(own_rootfs)) for path in own_rootfs.rglob("*"))
    seen = runc.run(oci.with_rootfs(own_rootfs)(oci.default_spec()), "true")

    assert seen.code == 0, seen.output
    assert sorted(str(path.relative_to(own_rootfs)) for path in own_rootfs.rglob("*")) == before


def test_the_host_keeps_its_own_name_for_the_processes(runc: Runc) -> None:
    # The shell is the container's first process and sees no other.
    assert runc.run(oci.default_spec(), "echo $$; ls -d /proc/[0-9]*").output.split()[:2] == ["1", "/proc/1"]


def test_what_the_runtime_says_of_it_is_a_valid_state(runc: Runc) -> None:
    spec = oci.build(
        oci.default_spec(), oci.with_args("sleep", "60"), oci.with_annotations({"org.example.job": "7"})
    )
    name = runc.start(spec)

    state = oci.parse_state(runc.command("state", name).stdout)

    assert (state.id, state.status, state.annotations) == (name, "running", {"org.example.job": "7"})
    assert state.pid is not None
    assert state.pid > 0
    assert oci.validate(state) == []


def test_what_the_runtime_says_of_itself_are_valid_features(runc: Runc) -> None:
    text = runc.command("features").stdout
    features = oci.parse_features(text)

    assert features.linux is not None
    assert features.linux.namespaces is not None
    assert set(_NAMESPACES.values()) <= set(features.linux.namespaces)
    assert oci.validate(features) == []
    assert oci.parse_features(oci.dump(features)) == features
