"""A container from its creation to its end, on a containerd of our own. What `make demo` runs.

python examples/demo.py [--fake]

As root, where containerd, runc and a static busybox are there, the container is a real one. Elsewhere, or with ``--fake``, it is
`libcontainerd.testing.FakeContainerd` that serves, and the processes really run, but on this machine, isolated by nothing.

Everything it makes lies in one temporary directory and is removed again, which it checks. Exit code 0: all went well.
"""

from __future__ import annotations

import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import structlog

from libcontainerd import Client, EventInfo, EventType, LibcontainerdError, Remote, cio, oci
from libcontainerd.backends import CallbackBackend
from libcontainerd.testing import FakeContainerd

NAME: Final = "demo"
NAMESPACE: Final = f"demo-{os.getpid()}"
PATIENCE: Final = 10.0  # seconds that any single thing may take
SCRIPT: Final = 'while read -r line; do echo "you said: $line"; echo "${#line} characters" >&2; done'

# A root shell opened with plain `su` has no sbin in its PATH, and runc lives there.
os.environ["PATH"] = f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/local/sbin:/usr/sbin:/sbin"


def main(arguments: list[str]) -> int:
    """Run the demo, and say which containerd it runs on; return the exit code."""
    lacking = "--fake was asked for" if "--fake" in arguments else missing()
    # How logs look is the program's business; the library only emits them.
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    if lacking:
        print(
            f"No real container ({lacking}):\na FakeContainerd, whose processes run on this machine, unisolated.\n"
        )
    story = Story()
    directory = Path(tempfile.mkdtemp(prefix="lc-demo-"))  # short, for a socket's path must be
    try:
        if lacking:
            tell_of_fake(story, directory)
        else:
            tell(story, directory)
    except (LibcontainerdError, SurpriseError) as error:
        print(f"demo: failed: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(directory)
    print(f"\n  Done in {story.seconds():.1f} s, and nothing is left of it.")
    return 0


def tell(story: Story, directory: Path) -> None:
    """Start a containerd, let a container live in it, and stop it."""
    rootfs, state = directory / "rootfs", directory / "state"
    with story.step("make a root filesystem") as say:
        say(f"one busybox, {make_rootfs(rootfs)} programs")
    with story.step("start a containerd") as say:
        remote = Remote.start(directory / "root", state, log_level="error")
        containerd = int((state / "containerd.pid").read_text().split()[0])
        say(f"pid {containerd}, in {directory}")
    with remote:
        talk_to(story, remote, rootfs, state, inside="inside")
        with story.step("stop containerd") as say:
            remote.cleanup()
            expect(not is_alive(containerd), f"containerd, pid {containerd}, still runs")
            say("gone")


def tell_of_fake(story: Story, directory: Path) -> None:
    """The same with a FakeContainerd."""
    rootfs, state = directory / "rootfs", directory / "state"
    with story.step("make a root filesystem") as say:
        rootfs.mkdir()
        say("empty: the programs are this machine's")
    with story.step("start a FakeContainerd") as say:
        fake = FakeContainerd("host")
        fake.start()
        say(f"in this process, pid {os.getpid()}, and in {fake.directory}")
    try:
        with Remote.connect(fake.address, state_dir=state) as remote:
            talk_to(story, remote, rootfs, state, inside=os.uname().nodename)
        with story.step("stop the FakeContainerd") as say:
            address = fake.address
            fake.stop()
            expect(not os.path.exists(address), f"{address} is still there")
            say("gone")
    finally:
        fake.stop()


def talk_to(story: Story, remote: Remote, rootfs: Path, state: Path, inside: str) -> None:
    """Connect to a containerd, let a container live in it, and look for what is left."""
    with story.step("connect") as say:
        client = remote.new_client(NAMESPACE, CallbackBackend(story.event))
        version = client.version()
        fake = " (a fake)" if "fake" in version.revision else ""
        say(f"containerd {version.version}{fake}, namespace {NAMESPACE}")
    try:
        live(story, client, rootfs, inside)
    except BaseException:
        end_by_force(client)
        raise
    with story.step("look for what is left") as say:
        expect(names_in(remote.address) == [], "containerd still has containers or tasks")
        expect(os.listdir(state / "bundles" / NAMESPACE) == [], "a bundle is left")
        say("no container, no task, no process, no FIFO")


def live(story: Story, client: Client, rootfs: Path, inside: str) -> None:
    """Take one container through its life; its hostname is known to be `inside`."""
    spec = oci.build(
        oci.default_spec(),
        oci.with_rootfs(rootfs),
        oci.with_hostname("inside"),
        oci.with_cgroup_path(f"/{NAMESPACE}"),  # runc's own choice is the id, which another demo may have too
        oci.with_args("sh", "-c", SCRIPT),
        *([oci.with_rootless()] if in_user_namespace() else []),
    )
    init = Stdio()
    with story.step("create"):
        # Else runc leaves an empty directory of the namespace's name in /run/containerd.
        client.create(NAME, spec, {"root": str(rootfs.parent / "runc")})
    with story.step("start") as say:
        pid = client.start(NAME, with_stdin=True, attach_stdio=init.attach)
        say(f"pid {pid}")
    with story.step("write to its stdin") as say:
        init.write("hello\n")
        say(f"stdout {init.stdout.line()!r}, stderr {init.stderr.line()!r}")

    with story.step("exec") as say:
        greeting = Stdio()
        process = oci.exec_process(spec, "sh", "-c", "uname -n; exit 7")
        client.exec(NAME, "greeting", process, attach_stdio=greeting.attach)
        code = client.wait(NAME, "greeting", timeout=PATIENCE).code
        output = greeting.stdout.line()
        expect((output, code) == (inside, 7), f"the exec said {output!r} and ended with {code}")
        say(f"stdout {output!r}, exit code {code}")
    with story.step("exec on a terminal, resize") as say:
        shell = Stdio()
        process = oci.exec_process(spec, "sh", "-c", "stty -echo; stty size; read -r _; stty size")
        process.terminal, process.console_size = True, oci.Box(width=80, height=24)
        client.exec(NAME, "shell", process, with_stdin=True, attach_stdio=shell.attach)
        sizes = [shell.stdout.line()]
        client.resize_terminal(NAME, "shell", width=120, height=40)
        shell.write("\n")
        sizes.append(shell.stdout.line())
        client.wait(NAME, "shell", timeout=PATIENCE)
        expect(sizes[-1] == "40 120", f"the terminal has {sizes[-1]} rows and columns")
        say(f"rows and columns were {sizes[0]}, are {sizes[1]}")

    if not in_user_namespace():  # where there is no cgroup to freeze
        freeze(story, client, init)

    with story.step("kill") as say:
        client.signal_process(NAME, "init", signal.SIGKILL)
        code = client.wait(NAME, timeout=PATIENCE).code
        expect(code == 128 + signal.SIGKILL, f"it ended with {code}")
        say(f"exit code {code}")
    with story.step("delete the task, delete the container"):
        client.delete_task(NAME)
        client.delete(NAME)
    with story.step("wait for its last event") as say:
        say(f"it had {story.events_until_exit()}, one exit for each of its 3 processes")
    expect(not is_alive(pid), f"its process, pid {pid}, is still there")


def freeze(story: Story, client: Client, init: Stdio) -> None:
    """Pause the container, and let it go on."""
    with story.step("pause, write to it") as say:
        client.pause(NAME)
        init.write("are you there?\n")
        expect(init.stdout.silent(0.25), "a paused container answered")
        say(f"{client.status(NAME)}, no answer")
    with story.step("resume") as say:
        client.resume(NAME)
        say(f"{client.status(NAME)}, stdout {init.stdout.line()!r}")


def end_by_force(client: Client) -> None:
    """End the container wherever the story broke off; else it would outlive us."""
    with suppress(LibcontainerdError):
        client.signal_process(NAME, "init", signal.SIGKILL)
    with suppress(LibcontainerdError):
        client.wait(NAME, timeout=PATIENCE)
        client.delete_task(NAME)
    with suppress(LibcontainerdError):
        client.delete(NAME)


# ---------------------------------------------------------------------------------------------------------- stdio


class Stdio:
    """One process's stdio in our hands: lines in, lines out."""

    def __init__(self) -> None:
        self.stdout, self.stderr = Lines(), Lines()
        self._stdin: cio.InputStream | None = None

    def attach(self, dio: cio.DirectIO) -> cio.IO:
        """Have what the process prints copied to us, and keep its stdin; this is what `attach_stdio` takes."""
        self._stdin = dio.stdin
        return cio.copy(stdout=self.stdout.take, stderr=self.stderr.take)(dio)

    def write(self, text: str) -> None:
        """Write to the process's stdin."""
        if self._stdin is not None:
            self._stdin.write(text.encode())


class Lines:
    """What came out of one stream."""

    def __init__(self) -> None:
        self._pieces: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._text = b""

    def take(self, piece: bytes) -> None:
        """Receive what was read; called by a thread of `cio.copy`'s."""
        self._pieces.put(piece)

    def line(self) -> str:
        """Wait for the next line."""
        while b"\n" not in self._text:
            try:
                self._text += self._pieces.get(timeout=PATIENCE)
            except queue.Empty:
                raise SurpriseError(f"no line came within {PATIENCE:g} s") from None
        line, _, self._text = self._text.partition(b"\n")
        return line.decode().rstrip("\r")

    def silent(self, seconds: float) -> bool:
        """Listen for so long, and say whether nothing came."""
        try:
            self._text += self._pieces.get(timeout=seconds)
        except queue.Empty:
            return not self._text
        return False


# ---------------------------------------------------------------------------------------------- telling and checking


class SurpriseError(Exception):
    """The demo saw something that it should not have seen."""


def expect(true: bool, otherwise: str) -> None:
    """Go on only if it is so."""
    if not true:
        raise SurpriseError(otherwise)


class Story:
    """Prints steps with their times, and events between them as they come."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._lock = threading.Lock()  # guards the counts and keeps lines whole; a leaf
        self._events = 0
        self._exits = 0
        self._ended = threading.Event()

    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    @contextmanager
    def step(self, title: str) -> Iterator[Callable[[str], None]]:
        """Print a step when it has succeeded, with what was said of it and how long it took."""
        said: list[str] = []
        began = self.seconds()
        yield said.append
        took = (self.seconds() - began) * 1000
        self._print(f"{self.seconds():6.2f} s  {title:<38}{took:6.0f} ms  {'; '.join(said)}".rstrip())

    def event(self, container_id: str, event: EventType, info: EventInfo) -> None:
        """Print an event; runs on a thread of the client's."""
        of = f" of {info.process_id}" if info.process_id not in ("", container_id) else ""
        code = f", code {info.exit_code}" if event is EventType.EXIT else ""
        self._print(f"{self.seconds():6.2f} s      event: {container_id} {event}{of}{code}")
        with self._lock:
            self._events += 1
            self._exits += event is EventType.EXIT
        if event is EventType.EXIT and info.process_id == container_id:
            self._ended.set()

    def events_until_exit(self) -> str:
        """Wait for init's exit, and count the events."""
        expect(self._ended.wait(PATIENCE), "the exit's event did not come")
        with self._lock:
            expect(self._exits == 3, f"3 processes had {self._exits} exit events")
            return f"{self._events} events"

    def _print(self, line: str) -> None:
        with self._lock:
            print(line, flush=True)


def missing() -> str:
    """Say what a real container needs and this machine lacks; empty if nothing."""
    reasons = [] if sys.platform == "linux" else ["this is no Linux"]
    lacking = [name for name in ("containerd", "runc", "busybox") if shutil.which(name) is None]
    if lacking:
        packages = " ".join(lacking).replace("busybox", "busybox-static")
        reasons.append(f"no {', no '.join(lacking)} (on Debian, as root: apt-get install {packages})")
    elif (
        subprocess.run(["ldd", shutil.which("busybox") or ""], capture_output=True, check=False).returncode
        == 0
    ):
        reasons.append("busybox is not static")
    if os.geteuid() != 0:
        reasons.append("not root, and containerd needs root")
    return "; ".join(reasons)


def in_user_namespace() -> bool:
    """Say whether root here is not the machine's root."""
    mappings = Path("/proc/self/uid_map")
    return mappings.exists() and mappings.read_text().split() != ["0", "0", "4294967295"]


def make_rootfs(root: Path) -> int:
    """Make a root filesystem around a static busybox; return how many programs it has."""
    for name in ("bin", "dev", "proc", "sys", "tmp"):
        (root / name).mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "busybox", root / "bin/busybox")
    listed = subprocess.run([root / "bin/busybox", "--list"], capture_output=True, text=True, check=True)
    applets = [name for name in listed.stdout.split() if name != "busybox"]
    for name in applets:
        (root / "bin" / name).symlink_to("busybox")
    return len(applets)


def names_in(address: str) -> list[str]:
    """Ask containerd's own command-line client, which knows nothing of us, what there is in our namespace."""
    if shutil.which("ctr") is None:
        return []
    asking = ["ctr", "--address", address, "--namespace", NAMESPACE]
    found: list[str] = []
    for kind in ("containers", "tasks"):
        listed = subprocess.run(
            [*asking, kind, "list", "--quiet"], capture_output=True, text=True, check=True
        )
        found += listed.stdout.split()
    return found


def is_alive(pid: int) -> bool:
    """Say whether there is a process of that number."""
    return Path(f"/proc/{pid}").exists()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
