"""Every option for the process, root filesystem, mounts and host name, looked at from inside a real container."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from libcontainerd import oci
from libcontainerd.oci._build_process import _CAPABILITIES
from tests.integration.oci.conftest import Runc, Seen


def test_with_args(runc: Runc) -> None:
    spec = oci.build(oci.default_spec(), oci.with_args("echo", "two  words", "$HOME"))

    assert runc.run(spec).output == "two  words $HOME\n"


def test_with_env_and_without_env(runc: Runc) -> None:
    spec = oci.build(
        oci.default_spec(),
        oci.with_env({"A": "1", "B": "two words", "GONE": "x", "EMPTY": ""}),
        oci.with_env({"A": "3=4"}),
        oci.without_env("GONE"),
    )
    seen = runc.run(spec, "env")

    assert {"A=3=4", "B=two words", "EMPTY="} <= set(seen.output.splitlines())
    assert "GONE" not in seen.output


def test_with_cwd(runc: Runc) -> None:
    assert runc.run(oci.with_cwd("/var")(oci.default_spec()), "pwd").output == "/var\n"


def test_with_user(runc: Runc) -> None:
    spec = oci.build(oci.default_spec(), oci.with_user(1000, 1001, additional_gids=[44, 45], umask=0o027))
    seen = runc.run(spec, "cat /proc/self/status; umask")

    assert seen.status("Uid").split() == ["1000"] * 4
    assert seen.status("Gid").split() == ["1001"] * 4
    assert seen.status("Groups").split() == ["44", "45", "1001"]
    assert seen.status("CapEff") == "0" * 16
    assert seen.output.splitlines()[-1] == "0027"


def test_with_rootfs(runc: Runc, own_rootfs: Path) -> None:
    (own_rootfs / "which").write_text("mine")
    spec = oci.with_rootfs(own_rootfs)(oci.default_spec())

    assert runc.run(spec, "cat /which && echo written > /new").output == "mine"
    assert (own_rootfs / "new").read_text() == "written\n"


def test_with_rootfs_readonly(runc: Runc, own_rootfs: Path) -> None:
    spec = oci.with_rootfs(own_rootfs, readonly=True)(oci.default_spec())
    seen = runc.run(spec, "touch /new; touch /run/new /dev/shm/new && echo on top is writable")

    assert "Read-only file system" in seen.output
    assert "on top is writable" in seen.output
    assert not (own_rootfs / "new").exists()


def test_with_hostname(runc: Runc) -> None:
    before = socket.gethostname()

    assert runc.run(oci.with_hostname("worker-1")(oci.default_spec()), "hostname").output == "worker-1\n"
    assert socket.gethostname() == before


def test_with_mounts(runc: Runc) -> None:
    scratch = oci.Mount(destination="/tmp", type="tmpfs", source="tmpfs", options=["nosuid", "size=1m"])
    shm = oci.Mount(destination="/dev/shm/", type="tmpfs", source="shm", options=["size=2m"])
    spec = oci.with_mounts(scratch, shm)(oci.default_spec())
    lines = runc.run(
        spec, "mount | grep -E ' (/tmp|/dev/shm) '; echo x > /tmp/x && cat /tmp/x"
    ).output.splitlines()

    assert [line.split()[2] for line in lines[:2]] == ["/dev/shm", "/tmp"]
    assert "size=2048k" in lines[0]
    assert "nosuid" in lines[1]
    assert "size=1024k" in lines[1]
    assert lines[2:] == ["x"]


@pytest.mark.parametrize("readonly", [False, True])
def test_with_bind(runc: Runc, tmp_path: Path, readonly: bool) -> None:
    (tmp_path / "from-the-host").write_text("hello\n")
    spec = oci.with_bind(tmp_path, "/tmp", readonly=readonly)(oci.default_spec())
    seen = runc.run(spec, "cat /tmp/from-the-host; echo back > /tmp/from-inside")

    assert seen.output.startswith("hello\n")
    assert (tmp_path / "from-inside").exists() is not readonly
    assert ("Read-only file system" in seen.output) is readonly


def test_with_bind_of_one_file_that_is_not_recursive(runc: Runc, tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    file.write_text("nameserver 192.0.2.1\n")
    spec = oci.with_bind(file, "/etc/passwd", readonly=True, recursive=False)(oci.default_spec())

    assert runc.run(spec, "cat /etc/passwd").output == "nameserver 192.0.2.1\n"


def test_without_mounts(runc: Runc) -> None:
    spec = oci.without_mounts("/run/", "/sys/fs/cgroup", "/not/there")(oci.default_spec())
    seen = runc.run(spec, "mount")

    assert " /dev/shm " in seen.output
    assert " /run " not in seen.output
    assert "/sys/fs/cgroup" not in seen.output


def test_with_terminal(runc: Runc) -> None:
    spec = oci.build(
        oci.default_spec(),
        oci.with_args("sh", "-c", "tty; stty size; echo $TERM; echo to stderr >&2"),
        oci.with_terminal(width=101, height=33),
    )

    printed = runc.run_on_terminal(spec).replace("\r\n", "\n")

    assert printed == "/dev/pts/0\n33 101\nxterm\nto stderr\n"


def test_without_a_terminal_there_is_none(runc: Runc) -> None:
    assert runc.run(oci.default_spec(), "tty").output == "not a tty\n"


def test_with_capabilities_added(runc: Runc) -> None:
    spec = oci.with_capabilities(add=["NET_ADMIN", "cap_sys_time"])(oci.default_spec())
    seen = runc.run(spec, "cat /proc/self/status")

    wanted = 0xA80425FB | 1 << 12 | 1 << 25
    assert {int(seen.status(name), 16) for name in ("CapPrm", "CapEff", "CapBnd")} == {wanted}


def test_with_capabilities_dropped(runc: Runc) -> None:
    spec = oci.with_capabilities(drop=["CHOWN", "MKNOD"])(oci.default_spec())
    seen = runc.run(spec, "cat /proc/self/status; chown 1 /run")

    assert int(seen.status("CapEff"), 16) == 0xA80425FB & ~(1 << 0) & ~(1 << 27)
    assert "Operation not permitted" in seen.output


def test_with_all_capabilities_dropped_but_one(runc: Runc) -> None:
    spec = oci.with_capabilities(drop=["ALL"], add=["KILL"])(oci.default_spec())
    seen = runc.run(spec, "cat /proc/self/status")

    assert {int(seen.status(name), 16) for name in ("CapPrm", "CapEff", "CapBnd")} == {1 << 5}


def test_with_all_capabilities(runc: Runc) -> None:
    mine = int(Seen(Path("/proc/self/status").read_text(), 0).status("CapBnd"), 16)
    # Where the tests themselves run in a container that lacks some, nobody can give those.
    lacking = [name for bit, name in enumerate(_CAPABILITIES) if not mine >> bit & 1]
    spec = oci.with_capabilities(add=["ALL"], drop=lacking)(oci.default_spec())

    seen = runc.run(spec, "cat /proc/self/status")

    assert int(seen.status("CapEff"), 16) == mine


def test_with_ambient_capabilities_for_an_ordinary_user(runc: Runc) -> None:
    spec = oci.build(
        oci.default_spec(),
        oci.with_user(1000, 1000),
        oci.with_capabilities(drop=["ALL"], add=["NET_BIND_SERVICE"], ambient=True),
    )
    seen = runc.run(spec, "cat /proc/self/status")

    assert {int(seen.status(name), 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {1 << 10}


def test_with_no_new_privileges(runc: Runc) -> None:
    for enabled in (True, False):
        spec = oci.with_no_new_privileges(enabled)(oci.default_spec())
        assert runc.run(spec, "cat /proc/self/status").status("NoNewPrivs") == str(int(enabled))


def test_with_rlimit(runc: Runc) -> None:
    spec = oci.build(
        oci.default_spec(), oci.with_rlimit("nofile", 100, 200), oci.with_rlimit("RLIMIT_CORE", 0)
    )
    seen = runc.run(spec, "ulimit -Sn; ulimit -Hn; ulimit -c")

    assert seen.output.split() == ["100", "200", "0"]


def test_with_image_config(runc: Runc, own_rootfs: Path) -> None:
    with (own_rootfs / "etc/passwd").open("a") as file:
        file.write("app:x:4711:4712::/srv:/bin/sh\n")
    with (own_rootfs / "etc/group").open("a") as file:
        file.write("app:x:4712:\nextra:x:4713:other,app\n")
    image = {
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "Entrypoint": ["sh", "-c"],
            "Cmd": ["id; pwd; echo $GREETING; echo $PATH"],
            "Env": ["GREETING=hello", "PATH=/bin"],
            "User": "app",
            "WorkingDir": "/tmp",
        },
    }
    spec = oci.build(
        oci.default_spec(),
        oci.with_rootfs(own_rootfs),
        oci.with_image_config(json.dumps(image), rootfs=own_rootfs),
    )

    assert runc.run(spec).output.splitlines() == [
        "uid=4711(app) gid=4712(app) groups=4712(app),4713(extra)",
        "/tmp",
        "hello",
        "/bin",
    ]


def test_exec_process(runc: Runc, tmp_path: Path) -> None:
    spec = oci.build(
        oci.default_spec(), oci.with_args("sleep", "60"), oci.with_user(1000, 1000), oci.with_cwd("/var")
    )
    name = runc.start(spec)
    file = tmp_path / "process.json"
    file.write_bytes(oci.dump(oci.exec_process(spec, "sh", "-c", "id -u; pwd; cat /proc/self/status")))

    done = runc.command("exec", "--process", file, name)

    assert done.stdout.splitlines()[:2] == ["1000", "/var"], done.stdout
    assert f"CapBnd:\t{0xA80425FB:016x}" in done.stdout
    assert os.getuid() == 0
