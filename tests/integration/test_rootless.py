"""A containerd without rights on the host: an ordinary user's, root only in a user namespace that maps this one id."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USER = 12345

Run = Callable[..., subprocess.CompletedProcess[str]]

# What cannot be had without a cgroup: told in clear words, and nothing is left of the attempt.
WITHOUT_CGROUP = """\
import json, os, sys
from pathlib import Path
from libcontainerd import LibcontainerdError, NotFoundError, Remote, oci
sys.path.insert(0, os.getcwd())
from tests.conftest import fill_rootfs

said = {}
top = Path(os.environ["TMPDIR"])
rootfs = top / "rootfs"
rootfs.mkdir()
fill_rootfs(rootfs, Path(sys.argv[1]))
base = oci.build(oci.default_spec(), oci.with_rootfs(rootfs, readonly=True), oci.with_args("sleep", "1000"))
with Remote.start(top / "root", top / "state", log_level="fatal") as remote, remote.new_client("rootless") as client:
    client.create("bare", oci.build(base, oci.with_rootless()))
    client.start("bare")
    try:
        client.pause("bare")
    except LibcontainerdError as error:
        said["pause"] = str(error)
    said["status"] = str(client.status("bare"))
    client.signal_process("bare", "init", 9)
    said["ended"] = str(client.wait("bare", timeout=30).code)
    client.delete_task("bare")
    client.delete("bare")
    limited = oci.build(base, oci.with_rootless(), oci.with_memory_limit(64 << 20), oci.with_cgroup_path("/limited"))
    client.create("limited", limited)
    try:
        client.start("limited")
    except LibcontainerdError as error:
        said["limit"] = str(error)
    try:
        client.status("limited")
    except NotFoundError as error:
        said["after"] = str(error)
    client.delete("limited")
print(json.dumps(said))
"""


def closed_above(paths: Iterable[Path]) -> list[Path]:
    """The directories on the way to some paths that an ordinary user may not pass, outermost first."""
    found = {
        above
        for path in paths
        for above in (path, *path.parents)
        if above.is_dir() and not above.stat().st_mode & stat.S_IXOTH
    }
    return sorted(found, key=lambda each: len(each.parts))


def opened(directory: Path, closed: list[Path]) -> Iterator[str]:
    """Commands after which, in a mount namespace of their own, an ordinary user may pass closed directories.

    The project, its Python and containerd may lie in root's home. An overlay over it has a mode of its own, and nothing
    changes on the disk.
    """
    tops = [each for each in closed if not any(above in closed for above in each.parents)]
    if tops:
        yield f"mkdir {directory}/over && mount -t tmpfs tmpfs {directory}/over"
    for number, top in enumerate(tops):
        upper, work = f"{directory}/over/{number}u", f"{directory}/over/{number}w"
        yield f"mkdir {upper} {work} && chmod 755 {upper}"
        place = shlex.quote(str(top))
        yield f"mount -t overlay overlay -o lowerdir={place},upperdir={upper},workdir={work} {place}"
    for each in closed:
        yield f"chmod a+rx {shlex.quote(str(each))}"


@pytest.fixture
def run(containerd_binary: Path) -> Iterator[Run]:
    """Runs a Python program of that user's, as root of his user namespace, with /run empty."""
    directory = Path(tempfile.mkdtemp(prefix="lcr-"))
    needed = [
        containerd_binary.resolve(),
        ROOT,
        Path(sys.executable),
        Path(sys.prefix),
        Path(sys.base_prefix),
    ]
    # What tools/fetch_containerd.py has fetched has libraries beside its programs.
    needed.append(containerd_binary.resolve().parents[1])
    as_root = 'mount -t tmpfs tmpfs /run && exec "$@"'
    inside = f"unshare --user --map-root-user --mount sh -c {shlex.quote(as_root)} sh {shlex.quote(sys.executable)}"
    inside += ' "$@"'
    commands = [
        *opened(directory, closed_above(needed)),
        f"exec setpriv --reuid {USER} --regid {USER} --clear-groups {inside}",
    ]

    def program(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-e", "-c", "\n".join(commands), "sh"]
            + [str(each) for each in arguments],
            cwd=ROOT,
            env={
                **os.environ,
                "TMPDIR": str(directory),
                "HOME": str(directory),
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    try:
        os.chown(directory, USER, USER)
        yield program
    finally:
        shutil.rmtree(directory)


def test_rootless_demo(run: Run) -> None:
    ran = run(ROOT / "examples/demo.py")

    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "No real container" not in ran.stdout
    assert "stdout 'you said: hello', stderr '5 characters'" in ran.stdout
    assert "stdout 'inside', exit code 7" in ran.stdout
    assert "rows and columns were 24 80, are 40 120" in ran.stdout
    assert "one exit for each of its 3 processes" in ran.stdout
    assert "and nothing is left of it." in ran.stdout


def test_rootless_has_no_cgroup(run: Run, rootfs: Path) -> None:
    ran = run("-c", WITHOUT_CGROUP, rootfs / "bin/busybox")

    assert ran.returncode == 0, ran.stdout + ran.stderr
    said = json.loads(ran.stdout.splitlines()[-1])
    assert "cannot pause container 'bare'" in said["pause"]
    assert "freezer" in said["pause"]
    assert said["status"] == "running"
    assert said["ended"] == "137"
    assert "cannot start container 'limited'" in said["limit"]
    assert "cgroup" in said["limit"]
    assert "container is not running" in said["after"]
