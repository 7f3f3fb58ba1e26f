"""Shims that nobody can reach any more: found among the processes of this machine, and ended.

A Tasks.Create, seldom a Delete, that is cut off by the death of containerd, of its caller or of the connection can leave a
shim. There are two kinds (seen with kill -9 at random moments):

- containerd 1.6 takes it up again when it starts. It has no task, or one that nobody was told of; no list shows it, and as
  soon as its container is deleted no call reaches it, because every call about a task asks for the container first.
- 2.1 has cleared its bundle away while it was still starting. Nothing is connected to it.

A client must not end what belongs to a containerd of somebody else's. A supervisor's own containerd is its own, with its shims.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from libcontainerd import _cleanup as cleanup
from libcontainerd._runtime import KEEP_LABEL
from libcontainerd._wire.connection import NAMESPACE_HEADER, Address, Deadline
from libcontainerd._wire.identifiers import is_identifier
from libcontainerd._wire.pb.services import containers_pb2, sandbox_pb2
from libcontainerd._wire.shelter import Shelter
from libcontainerd.errors import LibcontainerdError, NotFoundError, NotImplementedByServerError
from libcontainerd.supervisor import claim

if TYPE_CHECKING:
    from libcontainerd._wire.shelter import Lease
    from libcontainerd.supervisor.child import Log

_SECONDS: Final = 30.0
_SOON_SECONDS: Final = 5.0
_MOST_SECONDS: Final = 60.0
_SHARE: Final = 20
"""One part in so many of the time, at most, goes into looking: a look costs a call per shim."""

_ASK_SECONDS: Final = 10.0
_END_SECONDS: Final = 1.0
_KILL_SECONDS: Final = 10.0  # as for containerd itself: only a process stuck in the kernel needs more
_STOP_SECONDS: Final = 5.0

_ACTIONS: Final = ("start", "delete")
"""What a shim's program is also run for, for a moment."""

_LISTENING: Final = "01"


@dataclass(frozen=True, slots=True)
class Shim:
    """One process that is a shim.

    Attributes:
        pid: Its process id.
        started: When it started, in ticks since boot: what tells it from a later process of that id.
        namespace: The namespace of its container.
        container_id: The container, or the first one of those that share it.
    """

    pid: int
    started: str
    namespace: str
    container_id: str


def shims_of(address: str) -> set[Shim]:
    """The shims of the containerd at an address: those that were given that very address."""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdecimal() and (shim := _shim(int(name), address)) is not None:
            found.add(shim)
    return found


def _shim(pid: int, address: str) -> Shim | None:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            line = file.read()
    except OSError:  # gone, or not for us to see
        return None
    if os.fsencode(address) not in line:
        return None
    words = [os.fsdecode(word) for word in line.split(b"\0")[:-1]]
    options = dict(pairwise(words))
    namespace, container_id = options.get("-namespace", ""), options.get("-id", "")
    if (
        options.get("-address") != address
        or words[-1] in _ACTIONS
        or not (is_identifier(namespace) and is_identifier(container_id))
    ):
        return None
    started = claim.start_time(pid)
    return None if started is None else Shim(pid, started, namespace, container_id)


class Sweeper:
    """Looks for orphaned shims of one containerd, soon after its starts and then seldom; a thread does it.

    A shim is an orphan when containerd, asked in two looks some seconds apart, has neither a container nor a sandbox of its
    id. That is there before the task and the shim are, and as long as they are of use, so no start, restoration or hung shim is
    taken for one: none of them is without it.

    Args:
        address: containerd's socket.
        log: Where its events go.
    """

    def __init__(self, address: str, log: Log) -> None:
        self._address = address
        self._log = log
        self._shelters: dict[str, Shelter] = {}
        self._suspects: set[Shim] = set()
        self._spared: set[Shim] = set()
        self._woken = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._walk, name="containerd-sweeper", daemon=True)

    def start(self) -> None:
        """Begin.

        Raises:
            RuntimeError: There can be no more threads.
        """
        self._thread.start()

    def soon(self) -> None:
        """Look again in a few seconds: containerd was started anew."""
        self._woken.set()

    def stop(self) -> None:
        """End it: what it is ending just now comes to its end, for five seconds at most."""
        self._stopped = True
        self._woken.set()
        self.close()
        if self._thread.ident is not None:
            self._thread.join(_STOP_SECONDS)

    def _walk(self) -> None:
        pause = _SOON_SECONDS
        try:
            while not self._stopped:
                if self._woken.wait(pause):
                    self._woken.clear()
                    self._spared.clear()
                    pause = _SOON_SECONDS
                    continue
                begun = time.monotonic()
                try:
                    self.look()
                except LibcontainerdError as error:  # it is away, or does not answer: others see to that
                    self._log.event("debug", "orphans_not_looked_for", error=str(error))
                    pause = _SOON_SECONDS
                    continue
                except Exception as error:  # noqa: BLE001 - the thread outlives whatever one look brings
                    self._log.event("error", "orphans_not_looked_for", error=repr(error))
                took = time.monotonic() - begun
                pause = _SOON_SECONDS
                if not self._suspects:
                    pause = min(max(_SECONDS, _SHARE * took), _MOST_SECONDS)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the channels; what waits for an answer fails."""
        for shelter in list(self._shelters.values()):
            shelter.close()

    def look(self) -> None:
        """Look once: end the shims that were orphans the last time too.

        Raises:
            LibcontainerdError: containerd did not answer. Nothing is concluded from that.
        """
        shims = shims_of(self._address)
        self._let_go({shim.namespace for shim in shims})
        self._spared = {shim for shim in self._spared & shims if not is_abandoned(shim)}
        orphans = {shim for shim in shims - self._spared if not self._stopped and self._is_orphan(shim)}
        again, self._suspects = orphans & self._suspects, orphans
        for shim in again:
            if not self._stopped:
                try:
                    self._end(shim)
                except LibcontainerdError as error:
                    self._tell("orphan_not_ended", shim, error=str(error))

    def _is_orphan(self, shim: Shim) -> bool:
        doing = f"look for container {shim.container_id!r} of a shim"
        deadline = Deadline(_ASK_SECONDS)
        request = containers_pb2.GetContainerRequest(id=shim.container_id)
        with self._shelter(shim.namespace).enter(doing) as calls:
            try:
                found = calls.call(calls.containers.Get, request, doing=doing, deadline=deadline).container
            except NotFoundError:
                return not _is_sandbox(calls, shim.container_id, doing, deadline)
        return cleanup.is_stand_in(found)

    def _let_go(self, namespaces: set[str]) -> None:
        """Close the channels of the other namespaces: there may come many, one after the other."""
        for namespace in self._shelters.keys() - namespaces:
            self._shelters.pop(namespace).close()

    def _shelter(self, namespace: str) -> Shelter:
        if namespace not in self._shelters:
            address = Address(self._address, with_credentials=False)
            self._shelters[namespace] = Shelter(address, ((NAMESPACE_HEADER, namespace),))
        return self._shelters[namespace]

    def _end(self, shim: Shim) -> None:
        """End a shim: by containerd if that has it, else by its process."""
        with _process(shim) as process:
            if process is None:
                return
            how = ""

            def finish() -> None:
                nonlocal how
                if _has_ended(process, _END_SECONDS):
                    how = "containerd"
                elif is_abandoned(shim):
                    _kill(shim, process)
                    how = "signal"
                else:  # other containers', say, that share it
                    self._spared.add(shim)

            doing = f"end the orphaned shim of {shim.container_id!r}"
            with self._shelter(shim.namespace).enter(doing) as calls:
                cleanup.end_orphan(calls, shim.container_id, lambda _: True, doing=doing, then=finish)
        if how:
            self._tell("orphan_ended", shim, by=how)

    def _tell(self, event: str, shim: Shim, **fields: str) -> None:
        self._log.event(
            "warning", event, pid=shim.pid, namespace=shim.namespace, container=shim.container_id, **fields
        )


def _is_sandbox(calls: Lease, sandbox_id: str, doing: str, deadline: Deadline) -> bool:
    """Whether a shim is a sandbox's own, which has a record in another store than containers have (1.7 and later)."""
    request = sandbox_pb2.StoreGetRequest(sandbox_id=sandbox_id)
    try:
        found = calls.call(calls.sandboxes.Get, request, doing=doing, deadline=deadline).sandbox
    except (NotFoundError, NotImplementedByServerError):
        return False
    return KEEP_LABEL not in found.labels  # else it is a container's, which is gone


@contextmanager
def _process(shim: Shim) -> Iterator[int | None]:
    """A handle of a shim's process that never means another one; None if it is gone."""
    try:
        process = os.pidfd_open(shim.pid)
    except OSError:
        yield None
        return
    try:
        yield process if claim.start_time(shim.pid) == shim.started else None
    finally:
        os.close(process)


def _has_ended(process: int, seconds: float) -> bool:
    poller = select.poll()
    poller.register(process, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


def is_abandoned(shim: Shim) -> bool:
    """Whether containerd has given up a shim whose process goes on: its bundle is gone, and nobody is connected to it.

    containerd keeps a connection to each shim that it knows, and makes the bundle before the shim. One that containers share
    goes on without the bundle of the first of them, but not without the connection.
    """
    try:
        bundle = os.readlink(f"/proc/{shim.pid}/cwd")
    except OSError:
        return False
    sockets = _sockets(shim.pid)
    return not os.path.exists(bundle) and bool(sockets) and all(state == _LISTENING for _, state in sockets)


def _sockets(pid: int) -> list[tuple[str, str]]:
    """Path and state of the unix sockets of a process that have a path: see proc_pid_net(5). Empty where they cannot be seen."""
    mine, found = set(), []
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(FileNotFoundError):
                mine.add(os.readlink(f"/proc/{pid}/fd/{name}"))
        with open(f"/proc/{pid}/net/unix", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                fields = line.split(maxsplit=7)
                if len(fields) == 8 and f"socket:[{fields[6]}]" in mine:
                    found.append((fields[7].rstrip("\n"), fields[5]))
    except OSError:
        return []
    return found


def _kill(shim: Shim, process: int) -> None:
    """Kill a shim with what it has for children, and remove its socket."""
    sockets = _sockets(shim.pid)
    for child in _children(shim.pid):
        _kill_child(child, shim.pid)
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, signal.SIGKILL)
    _has_ended(process, _KILL_SECONDS)  # while it lives it serves its socket, which is then not removed
    for path, _ in sockets:
        if path.startswith("/"):
            claim.unlink_socket(path)


def _children(pid: int) -> set[int]:
    found: set[int] = set()
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                found.update(map(int, file.read().split()))
    return found


def _kill_child(pid: int, parent: int) -> None:
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if pid in _children(parent):  # still, so that the handle is the child's
            signal.pidfd_send_signal(process, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(process)
