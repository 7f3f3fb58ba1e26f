"""Outages of a real containerd: what ends, or is frozen, while nobody listens is told once, as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import grpc
import pytest

from libcontainerd import Client, EventType, NotFoundError, Status
from libcontainerd._events import patrol as patrol_module
from libcontainerd._wire import typeurl
from libcontainerd._wire.connection import NAMESPACE_HEADER
from libcontainerd._wire.pb.events.task_pb2 import TaskExit
from libcontainerd._wire.pb.services.events_pb2 import EventsStub, PublishRequest, SubscribeRequest
from libcontainerd._wire.pb.services.tasks_pb2 import PauseTaskRequest, ResumeTaskRequest
from libcontainerd._wire.pb.types import task_pb2
from libcontainerd._wire.pb.types.event_pb2 import Envelope
from libcontainerd._wire.pb.wellknown_pb2 import Any
from libcontainerd.backends import RecordingBackend
from tests.integration.containerd import MortalContainerd
from tests.integration.containers import (
    Collected,
    MakeSpec,
    Raw,
    alive,
    exit_of,
    process,
    run_task,
    shims_of,
    wait_exec_gone,
    wait_until,
)
from tests.integration.proxy import Proxy

_SECONDS = 30.0


@pytest.fixture(scope="module")
def containerd(containerd_binary: Path) -> Iterator[MortalContainerd]:
    """One that may be killed; every test leaves it up."""
    with MortalContainerd(containerd_binary) as made:
        yield made


@dataclass
class Site:
    """A client, its events, and a look past it, at a containerd that may go away."""

    client: Client
    backend: RecordingBackend
    raw: Raw
    channel: grpc.Channel
    keeps_exits: bool = False
    held: dict[tuple[str, str], Collected] = field(default_factory=dict)
    pids: dict[tuple[str, str], int] = field(default_factory=dict)

    def run(self, container_id: str, spec: MakeSpec, code: int, **execs: int) -> None:
        """Have a container and execs run, that end with these codes when they are told to."""
        held = self.held[container_id, "init"] = Collected()
        self.client.create(container_id, spec("sh", "-c", f"read line; exit {code}"))
        self.pids[container_id, "init"] = self.client.start(container_id, with_stdin=True, attach_stdio=held)
        for exec_id, exec_code in execs.items():
            held = self.held[container_id, exec_id] = Collected()
            self.pids[container_id, exec_id] = self.client.exec(
                container_id,
                exec_id,
                process("sh", "-c", f"echo last words; read line; exit {exec_code}"),
                with_stdin=True,
                attach_stdio=held,
            )
            held.wait_for(b"last words", _SECONDS)

    def end(self, container_id: str, process_id: str = "init") -> None:
        """Tell a process to end, and wait until it has."""
        self.held[container_id, process_id].stdin.write(b"\n")
        self.wait_end(container_id, process_id)

    def wait_end(self, container_id: str, process_id: str) -> None:
        """Wait until a process has ended and its shim, which lives, has been told by the kernel when and how."""
        pid = self.pids[container_id, process_id]
        wait_until(
            lambda: not Path(f"/proc/{pid}").exists(), f"{process_id} of {container_id} ends", _SECONDS
        )

    def exits(self, container_id: str) -> list[tuple[str, int]]:
        """Whose exits were told, and the codes."""
        return sorted(
            (each.info.process_id, each.info.exit_code)
            for each in self.backend.events(container_id)
            if each.event is EventType.EXIT
        )

    def told(self, container_id: str, event: EventType) -> int:
        return len([each for each in self.backend.events(container_id) if each.event is event])

    def publish_exit(self, container_id: str, process_id: str, code: int) -> None:
        """Tell an exit again, as a shim does that was not heard the first time."""
        name = container_id if process_id == "init" else process_id
        pid = self.pids[container_id, process_id]
        event = TaskExit(container_id=container_id, id=name, pid=pid, exit_status=code)
        EventsStub(self.channel).Publish(
            PublishRequest(topic="/tasks/exit", event=typeurl.pack(event)),
            metadata=self.raw.metadata,
            timeout=_SECONDS,
        )

    def shim_of(self, container_id: str, address: str) -> int:
        """The pid of a container's shim."""
        wanted = {"-namespace", self.raw.metadata[0][1], "-id", container_id}
        (pid,) = [pid for pid, line in shims_of(address).items() if wanted <= set(line.split())]
        return pid

    def settle(self, spec: MakeSpec) -> None:
        """Wait until the stream is read again, and what was told before has been delivered."""
        wait_until(lambda: self.client._subscriber.live, "the subscription is live", _SECONDS)
        name = f"last-{len(self.backend.events())}"
        self.client.create(name, spec("true"))
        run_task(self.client, name)
        exit_of(self.backend, name)
        self.client.delete(name)


@contextmanager
def open_site(
    address: str, channel: grpc.Channel, namespace: str, state_dir: Path, *, keep_exits: bool = False
) -> Iterator[Site]:
    """A client at an address; what it leaves in containerd is removed past it."""
    backend = RecordingBackend()
    raw = Raw(channel, namespace)
    with Client(
        address, namespace=namespace, state_dir=state_dir, backend=backend, keep_exits=keep_exits
    ) as client:
        yield Site(client, backend, raw, channel, keep_exits)
        raw.remove_everything()


@pytest.fixture
def site(
    request: pytest.FixtureRequest, containerd: MortalContainerd, namespace: str, tmp_path: Path
) -> Iterator[Site]:
    """At a containerd that may be killed; with ``True`` as its parameter, exits are kept."""
    keep_exits = getattr(request, "param", False)
    with (
        containerd.channel() as channel,
        open_site(
            containerd.address, channel, namespace, tmp_path / "bundles", keep_exits=keep_exits
        ) as made,
    ):
        yield made


@contextmanager
def published(containerd: MortalContainerd, namespace: str) -> Iterator[Callable[[str], int]]:
    """Counts what containerd publishes in a namespace, by topic, as seen past the client."""
    seen: list[str] = []
    with containerd.channel() as channel:
        stub = EventsStub(channel)
        stream = stub.Subscribe(SubscribeRequest(filters=[f"namespace=={namespace}"]))

        def read() -> None:
            with suppress(grpc.RpcError):  # the channel is closed
                for envelope in cast("Iterator[Envelope]", stream):
                    seen.append(envelope.topic)  # noqa: PERF401 - as they come

        def listens() -> bool:
            stub.Publish(
                PublishRequest(topic="/listens", event=Any(type_url="listens")),
                metadata=((NAMESPACE_HEADER, namespace),),
                timeout=_SECONDS,
            )
            return "/listens" in seen

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        wait_until(listens, "the subscription is there", _SECONDS)
        yield seen.count
    reader.join(_SECONDS)
    assert not reader.is_alive()


def freeze(site: Site, container_id: str) -> None:
    request = PauseTaskRequest(container_id=container_id)
    site.raw.tasks.Pause(request, metadata=site.raw.metadata, timeout=_SECONDS)


def thaw(site: Site, container_id: str) -> None:
    request = ResumeTaskRequest(container_id=container_id)
    site.raw.tasks.Resume(request, metadata=site.raw.metadata, timeout=_SECONDS)


# ------------------------------------------------------------------------------------------------------ containerd dies


@pytest.mark.parametrize("site", [False, True], indirect=True, ids=["not kept", "kept"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_ends_while_containerd_is_down_is_told_once_with_its_code_and_time(
    containerd: MortalContainerd, site: Site, spec: MakeSpec, number: signal.Signals
) -> None:
    client = site.client
    # From 1.7 on, a containerd that starts forgets the tasks whose init has ended, if nothing is done about it.
    remembers = site.keeps_exits or client.version().version.startswith("1.6.")
    site.run("all", spec, 7, ends=20, goes_on=21)
    site.run("some", spec, 8, ends=22)
    with ThreadPoolExecutor(2) as executor:
        waiting = [executor.submit(client.wait, "all", name, timeout=55) for name in ("init", "ends")]
        containerd.stop(number)
        before = datetime.now(UTC)
        site.end("all", "ends")
        site.end("all")
        site.wait_end("all", "goes_on")
        site.end("some", "ends")
        after = datetime.now(UTC)
        assert site.exits("all") == []
        containerd.start()
        codes = [each.result().code for each in waiting]
    assert codes == ([7, 20] if remembers else [255, 255])

    expected = [("all", 7), ("ends", 20), ("goes_on", 137)]
    if not remembers:
        expected = [(name, 255) for name, _ in expected]
    for name, code in expected:
        assert exit_of(site.backend, "all", name) == code
    assert exit_of(site.backend, "some", "ends") == 22
    slack = timedelta(seconds=2)  # the clock that files and processes are dated by is a coarse one
    for recorded in site.backend.events():
        if recorded.event is EventType.EXIT and recorded.info.exit_code != 255:
            assert recorded.info.exited_at is not None
            assert before - slack <= recorded.info.exited_at <= after + slack
    # Shims send again what nobody heard, and it may come at any time: here it does for certain.
    for container_id, name, code in (("all", "init", 7), ("all", "ends", 20), ("some", "ends", 22)):
        site.publish_exit(container_id, name, code)
    site.settle(spec)
    assert site.exits("all") == expected
    assert site.exits("some") == [("ends", 22)]

    wait_exec_gone(client, "some", "ends")
    status = client.delete_task("all")
    assert status.code == (7 if remembers else 255)
    client.delete("all")
    site.end("some")
    assert exit_of(site.backend, "some") == 8
    assert client.delete_task("some").code == 8
    client.delete("some")


def test_a_frozen_container_is_still_frozen_after_a_restart(
    containerd: MortalContainerd, site: Site, spec: MakeSpec
) -> None:
    site.run("c", spec, 7)
    site.client.pause("c")
    site.backend.wait_for(EventType.PAUSED, "c", timeout=_SECONDS)
    containerd.stop(signal.SIGKILL)
    containerd.start()
    site.settle(spec)
    # Of a shim that is late containerd says that it does not know.
    wait_until(lambda: site.client.status("c") is not Status.UNKNOWN, "it is known", _SECONDS)
    assert site.client.status("c") is Status.PAUSED
    assert (site.told("c", EventType.PAUSED), site.told("c", EventType.RESUMED)) == (1, 0)
    site.client.signal_process(
        "c", "init", signal.SIGKILL
    )  # which thaws it, because the record says that it is frozen
    assert exit_of(site.backend, "c") == 137


@pytest.mark.parametrize("site", [False, True], indirect=True, ids=["not kept", "kept"])
def test_a_shim_that_dies_with_containerd_leaves_unknown_exits(
    containerd: MortalContainerd, site: Site, spec: MakeSpec
) -> None:
    site.run("c", spec, 7, e=20)
    shim = site.shim_of("c", containerd.address)
    containerd.stop(signal.SIGKILL)
    os.kill(shim, signal.SIGKILL)
    wait_until(lambda: not alive(shim), "the shim is dead", _SECONDS)
    containerd.start()

    assert exit_of(site.backend, "c") == 255
    assert exit_of(site.backend, "c", "e") == 255
    for name in ("init", "e"):
        status = site.client.wait("c", name, timeout=_SECONDS)
        assert status.code == 255
        assert isinstance(status.error, NotFoundError)
    site.settle(spec)
    assert site.exits("c") == [("c", 255), ("e", 255)]
    assert isinstance(site.client.delete_task("c").error, NotFoundError)
    site.client.delete("c")
    for name in ("init", "e"):
        pid = site.pids["c", name]
        wait_until(lambda: not alive(pid), "nothing of it runs", _SECONDS)  # noqa: B023


# ------------------------------------------------------------------------------------------------ the connection breaks


def test_a_freeze_a_thaw_and_an_end_in_a_cut_connection_are_told(
    containerd: MortalContainerd, namespace: str, spec: MakeSpec, tmp_path: Path
) -> None:
    with (
        Proxy(containerd.address) as proxy,
        containerd.channel() as channel,
        open_site(proxy.path, channel, namespace, tmp_path / "bundles") as site,
        published(containerd, namespace) as count,
    ):

        def in_a_gap(*what: tuple[str, Callable[[], object]]) -> None:
            proxy.cut(stay_broken=True)
            wait_until(lambda: not site.client._subscriber.live, "the gap is seen", _SECONDS)
            for topic, do in what:
                before = count(topic)
                do()
                # A shim answers first, and has its event published when it comes to it: it must be in the gap too.
                wait_until(lambda: count(topic) > before, f"{topic} is published", _SECONDS)  # noqa: B023
            proxy.mend()
            wait_until(lambda: site.client._subscriber.live, "the subscription is live", _SECONDS)

        site.run("c", spec, 7, ends=20)
        site.run("killed", spec, 8)
        in_a_gap(("/tasks/paused", lambda: freeze(site, "c")))
        site.backend.wait_for(EventType.PAUSED, "c", timeout=_SECONDS)
        in_a_gap(("/tasks/resumed", lambda: thaw(site, "c")), ("/tasks/paused", lambda: freeze(site, "c")))
        in_a_gap(("/tasks/resumed", lambda: thaw(site, "c")))
        site.backend.wait_for(EventType.RESUMED, "c", timeout=_SECONDS)
        in_a_gap(
            ("/tasks/exit", lambda: site.end("c", "ends")), ("/tasks/paused", lambda: freeze(site, "killed"))
        )
        assert exit_of(site.backend, "c", "ends") == 20
        site.backend.wait_for(EventType.PAUSED, "killed", timeout=_SECONDS)
        # It is known to be frozen, so it is thawed for the signal to come through.
        site.client.signal_process("killed", "init", signal.SIGKILL)
        assert exit_of(site.backend, "killed") == 137
        in_a_gap(("/tasks/exit", lambda: site.end("c")))
        assert exit_of(site.backend, "c") == 7
        site.settle(spec)
        assert site.exits("c") == [("c", 7), ("ends", 20)]
        assert (site.told("c", EventType.PAUSED), site.told("c", EventType.RESUMED)) == (1, 1)


def test_a_shim_that_hangs_keeps_nobody_from_being_told(
    containerd: MortalContainerd, namespace: str, spec: MakeSpec, tmp_path: Path
) -> None:
    with (
        Proxy(containerd.address) as proxy,
        containerd.channel() as channel,
        open_site(proxy.path, channel, namespace, tmp_path / "bundles") as site,
    ):
        for name in ("hangs", "ends", "goes-on"):
            site.run(name, spec, 7, e=20)
        shim = site.shim_of("hangs", containerd.address)
        os.kill(shim, signal.SIGSTOP)
        try:
            proxy.cut(stay_broken=True)
            wait_until(lambda: not site.client._subscriber.live, "the gap is seen", _SECONDS)
            site.end("ends")
            site.end("goes-on", "e")
            proxy.mend()
            assert exit_of(site.backend, "ends") == 7
            assert exit_of(site.backend, "goes-on", "e") == 20
            assert site.exits("hangs") == []
        finally:
            os.kill(shim, signal.SIGCONT)
        site.end("hangs", "e")
        site.end("hangs")
        assert exit_of(site.backend, "hangs", "e") == 20
        assert exit_of(site.backend, "hangs") == 7


# ---------------------------------------------------------------------------------------------------------- no gap at all


def test_an_exit_whose_event_got_lost_is_found_by_the_patrol(
    site: Site, spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patrol_module, "_LATE_EVENT_SECONDS", 0.1)
    site.run("c", spec, 7, ends=20, goes_on=21)
    site.run("other", spec, 8, goes_on=22)
    receive = site.client._delivery.receive
    monkeypatch.setattr(
        site.client._subscriber,
        "_on_event",
        lambda envelope: (
            envelope.topic == "/tasks/exit" or receive(envelope)
        ),  # as a shim that has given it up
    )

    def over(name: str) -> bool:
        found = site.raw.process("c", "" if name == "init" else name)
        return found is not None and found.status == task_pb2.Status.STOPPED

    for name, code in (("ends", 20), ("init", 7)):
        site.end("c", name)
        wait_until(lambda: over(name), "containerd knows", _SECONDS)  # noqa: B023
        site.client._patrol.look_round()
        assert exit_of(site.backend, "c", name) == code
    site.client._patrol.look_round()
    assert exit_of(site.backend, "c", "goes_on") == 137
    monkeypatch.undo()
    site.publish_exit("c", "init", 7)
    site.settle(spec)
    assert site.exits("c") == [("c", 7), ("ends", 20), ("goes_on", 137)]
    assert site.exits("other") == []


# ------------------------------------------------------------------------------------------------------------ its price

_IDLE = """
import sys, threading, time
from libcontainerd import Client

with Client(sys.argv[1], namespace=sys.argv[2], state_dir=sys.argv[3]):
    least = float("inf")
    for _ in range(20):  # what the constructor has begun comes to rest first, and other programs want the processors too
        before, began = time.process_time(), time.monotonic()
        time.sleep(1)
        least = min(least, 1000 * (time.process_time() - before) / (time.monotonic() - began))
        threads = sorted(each.name for each in threading.enumerate())
        if least <= 1.5 and len(threads) <= 3:
            break
    print(least, *threads)
"""


def test_an_idle_client_costs_next_to_nothing(
    containerd: MortalContainerd, namespace: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _IDLE, containerd.address, namespace, str(tmp_path / "bundles")],
        capture_output=True,
        text=True,
        check=True,
        timeout=55,
    )
    milliseconds, *threads = done.stdout.split()
    assert threads == ["MainThread", f"libcontainerd-events-{namespace}", f"libcontainerd-patrol-{namespace}"]
    assert float(milliseconds) <= 1.5, "of CPU for each second"
