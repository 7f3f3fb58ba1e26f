"""What programs written against the original rely on, on every server: its contract, statement by statement.

Statements that other files of this folder hold have their numbers in the docstrings there. Of the rest, those about restore,
checkpoints, figures and the supervisor stand with these; and 14 to 19, 21, 33, 56 to 58 are about the original's caller.
"""

from __future__ import annotations

import signal
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from libcontainerd import (
    Client,
    ConflictError,
    EventInfo,
    EventType,
    InvalidParameterError,
    NotFoundError,
    Remote,
    cio,
)
from libcontainerd._wire import typeurl
from libcontainerd._wire.pb.events.task_pb2 import TaskStart
from libcontainerd._wire.pb.services.events_pb2 import PublishRequest
from libcontainerd.backends import CallbackBackend, RecordingBackend
from tests.contract import programs
from tests.contract.servers import RUNTIME, Server, Services, process_document
from tests.integration.containers import Collected, bundle_of, exit_of, wait_exec_gone, wait_until


class RecordingIO:
    """An `attach_stdio` that notes how its IO is driven, and hands everything on."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.dio: cio.DirectIO | None = None

    def __call__(self, dio: cio.DirectIO) -> cio.IO:
        self.dio = dio
        return self

    def cancel(self) -> None:
        self.steps.append("cancel")
        assert self.dio is not None
        self.dio.cancel()

    def wait(self) -> None:
        self.steps.append("wait")
        assert self.dio is not None
        self.dio.wait()

    def close(self) -> None:
        self.steps.append("close")
        assert self.dio is not None
        self.dio.close()


# ------------------------------------------------------------------------------------------------------------- events


def test_which_fields_an_event_fills(client: Client, services: Services, backend: RecordingBackend) -> None:
    """Fidelity 3, 4: a deletion is no event; what an event does not tell is empty."""
    client.create("c", services.spec())
    pid = client.start("c")
    client.pause("c")
    client.resume("c")
    exec_pid = client.exec("c", "e", process_document(*programs.TRUE))
    exit_of(backend, "c", "e")
    client.signal_process("c", "init", signal.SIGKILL)
    exit_of(backend, "c")
    client.delete_task("c")

    seen = backend.events("c")
    exits = {each.info.process_id: each.info.exited_at for each in seen if each.event is EventType.EXIT}

    assert [(each.event, each.info) for each in seen] == [
        (EventType.CREATE, EventInfo("c", process_id="c", pid=pid)),
        (EventType.START, EventInfo("c", process_id="c", pid=pid)),
        (EventType.PAUSED, EventInfo("c")),
        (EventType.RESUMED, EventInfo("c")),
        (EventType.EXEC_ADDED, EventInfo("c", process_id="e")),
        (EventType.EXEC_STARTED, EventInfo("c", process_id="e", pid=exec_pid)),
        (EventType.EXIT, EventInfo("c", process_id="e", pid=exec_pid, exited_at=exits["e"])),
        (EventType.EXIT, EventInfo("c", process_id="c", pid=pid, exit_code=137, exited_at=exits["c"])),
    ]


def test_events_of_other_namespaces_are_not_ours(
    client: Client, services: Services, backend: RecordingBackend
) -> None:
    """Fidelity 6: a container of the same name elsewhere, and a topic that is none of a task's."""
    client.create("c", services.spec())
    client.start("c")
    started = typeurl.pack(TaskStart(container_id="c", pid=7))
    request = PublishRequest(topic="/tasks/start", event=started)
    services.call(services.events.Publish, request, namespace=f"{services.namespace}-2")
    services.call(services.events.Publish, PublishRequest(topic="/other/tasks/start", event=started))
    client.signal_process("c", "init", signal.SIGKILL)
    exit_of(backend, "c")

    assert [each.event for each in backend.events("c")] == [EventType.CREATE, EventType.START, EventType.EXIT]


def test_nothing_is_undone_before_the_backend_asks(
    client: Client, services: Services, backend: RecordingBackend
) -> None:
    """Fidelity 13: an init that has ended stays until `delete_task`, and its container until `delete`."""
    client.create("c", services.spec(*programs.SPEAK))
    client.start("c", attach_stdio=Collected())
    exit_of(backend, "c")

    task = services.process("c")
    assert task is not None
    assert (task.status, task.exit_status) == (3, 3)
    assert sorted(path.name for path in bundle_of(services, "c").iterdir()) == ["init-stderr", "init-stdout"]
    assert client.delete_task("c").code == 3
    assert services.process("c") is None
    assert services.container_ids() == {"c"}


def test_an_exit_may_come_before_exec_has_returned(
    server: Server, services: Services, tmp_path: Path
) -> None:
    """Fidelity 22: the backend waits for a lock that the caller of `exec` holds."""
    lock = threading.Lock()
    seen: list[str] = []
    over = threading.Event()

    def take(_container_id: str, _event: EventType, info: EventInfo) -> None:
        with lock:
            seen.append(info.process_id)
            if info.process_id == "e":
                over.set()

    backend = CallbackBackend(on={EventType.EXIT: take})
    client = Client(
        server.address, namespace=services.namespace, state_dir=tmp_path / "state", backend=backend
    )
    try:
        client.create("c", services.spec())
        client.start("c")
        with lock:
            client.exec("c", "e", process_document(*programs.TRUE))
            wait_until(lambda: client.wait("c", "e").code == 0, "it has ended")
            seen.append("exec has returned")
        assert over.wait(60)
        assert seen == ["exec has returned", "e"]
    finally:
        services.remove_everything()
        client.close()


# -------------------------------------------------------------------------------------------------------------- verbs


def test_what_create_makes(client: Client, services: Services) -> None:
    """Fidelity 20, 23: a container and a bundle, no task; the id is taken, and free again once it is deleted."""
    for _ in range(2):
        client.create("c", services.spec(*programs.TRUE), labels={"a": "b"})
        bundle = bundle_of(services, "c")
        container = services.container("c")
        assert (container.runtime.name, container.labels["a"]) == (RUNTIME, "b")
        assert services.process("c") is None
        assert list(bundle.iterdir()) == []
        with pytest.raises(ConflictError, match="already in use"):
            client.create("c", services.spec())
        client.delete("c")
        assert not bundle.exists()
        assert services.container_ids() == set()


@pytest.mark.parametrize("container_id", ["", "a/b", "../a", "-a", "a..b", "a b", "a" * 77, "ä"])
def test_ids_are_checked_before_anything_is_made(
    client: Client, services: Services, tmp_path: Path, container_id: str
) -> None:
    """DESIGN 5, create: containerd's rule, before a path is made of it."""
    with pytest.raises(InvalidParameterError):
        client.create(container_id, services.spec())

    assert services.container_ids() == set()
    assert not [path for path in tmp_path.rglob("*") if path.name.strip("./") in (container_id, "a", "b")]


def test_in_which_words_verbs_refuse(client: Client, services: Services) -> None:
    """Fidelity 24, 34, 37, 38, 43, 44."""
    client.create("made", services.spec())
    client.create("c", services.spec())
    client.start("c")
    document = process_document()
    client.exec("c", "e", document)
    refusals: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: client.start("none"), NotFoundError, "no such container"),
        (lambda: client.start("c"), ConflictError, "already started"),
        (lambda: client.exec("none", "e", document), NotFoundError, "no such container"),
        (lambda: client.exec("made", "e", document), InvalidParameterError, "container is not running"),
        (lambda: client.exec("c", "e", document), ConflictError, "already in use"),
        (lambda: client.signal_process("none", "init", 9), NotFoundError, "no such container"),
        (lambda: client.signal_process("made", "init", 9), NotFoundError, "container is not running"),
        (lambda: client.signal_process("c", "x", 9), NotFoundError, "no such exec"),
        (lambda: client.resize_terminal("c", "x", 1, 1), NotFoundError, "no such exec"),
        (lambda: client.close_stdin("c", "x"), NotFoundError, "no such exec"),
        (lambda: client.pause("none"), NotFoundError, "no such container"),
        (lambda: client.pause("made"), NotFoundError, "container is not running"),
        (lambda: client.resume("made"), NotFoundError, "container is not running"),
        (lambda: client.list_pids("made"), NotFoundError, "container is not running"),
        (lambda: client.summary("made"), NotFoundError, "container is not running"),
        (lambda: client.status("none"), NotFoundError, "no such container"),
        (lambda: client.status("made"), NotFoundError, "container is not running"),
        (lambda: client.wait("none"), NotFoundError, "no such container"),
        (lambda: client.delete("none"), NotFoundError, "no such container"),
    ]
    for refused, kind, words in refusals:
        with pytest.raises(kind, match=words):
            refused()


def test_stdio_comes_before_the_task(client: Client, services: Services) -> None:
    """Fidelity 25 to 27, 46, 47: what is attached, when, and under which paths."""
    seen: list[tuple[object, ...]] = []

    def attach(dio: cio.DirectIO) -> cio.IO:
        fifos = sorted(bundle_of(services, "c").iterdir())
        modes = {stat.S_IMODE(path.stat().st_mode) for path in fifos if path.is_fifo()}
        names = [path.name for path in fifos]
        there = [each is not None for each in (dio.stdin, dio.stdout, dio.stderr)]
        seen.append((services.process("c") is None, names, modes, there))
        return dio

    client.create("c", services.spec(*programs.TERMINAL, terminal=True))
    client.start("c", with_stdin=True, attach_stdio=attach)
    client.wait("c")
    client.delete_task("c")
    client.delete("c")
    client.create("c", services.spec())
    client.start("c", attach_stdio=attach)
    client.exec("c", "e", process_document(*programs.TRUE), attach_stdio=attach)

    first, second, third = seen
    assert first == (True, ["init-stdin", "init-stdout"], {0o700}, [True, True, False])
    assert second == (True, ["init-stderr", "init-stdout"], {0o700}, [False, True, True])
    assert third[1:] == (
        ["e-stderr", "e-stdout", "init-stderr", "init-stdout"],
        {0o700},
        [False, True, True],
    )


def test_after_a_failed_start_the_container_is_deleted(client: Client, services: Services) -> None:
    """Fidelity 26, 29, 36, 52: the IO is cancelled and closed, and `delete` needs no `delete_task` before it."""
    client.create("missing", services.spec(*programs.MISSING))
    client.create("c", services.spec())
    client.start("c")
    init, execed = RecordingIO(), RecordingIO()

    with pytest.raises(InvalidParameterError):
        client.start("missing", with_stdin=True, attach_stdio=init)
    with pytest.raises(InvalidParameterError):
        client.exec("c", "e", process_document(*programs.MISSING), with_stdin=True, attach_stdio=execed)

    for io in (init, execed):
        assert io.steps[0] == "cancel"
        assert "close" in io.steps
        assert io.dio is not None
        assert io.dio.stdout.read(1) == b""
    client.delete("missing")
    assert services.container_ids() == {"c"}
    assert list(bundle_of(services, "c").iterdir()) == []


# -------------------------------------------------------------------------------------------------------------- stdio


def test_how_an_io_is_driven(client: Client, services: Services, backend: RecordingBackend) -> None:
    """Fidelity 12, 49 to 51: cancel, then wait, then close, when a process is deleted, and not before."""
    init, execed = RecordingIO(), RecordingIO()
    client.create("c", services.spec())
    client.start("c", attach_stdio=init)
    client.exec("c", "e", process_document(*programs.TRUE), attach_stdio=execed)
    exit_of(backend, "c", "e")
    wait_exec_gone(client, "c", "e")
    assert init.steps == []
    client.signal_process("c", "init", signal.SIGKILL)
    exit_of(backend, "c")
    client.delete_task("c")

    for io in (init, execed):
        wait_until(lambda io=io: "close" in io.steps, "it is closed")  # type: ignore[misc]  # bound now
        assert [step for step in ("cancel", "wait", "close") if step in io.steps] == [
            "cancel",
            "wait",
            "close",
        ]
        assert io.steps.index("cancel") < io.steps.index("wait") < io.steps.index("close")


def test_stdin_may_be_closed_again(client: Client, services: Services) -> None:
    """Fidelity 48, 50, 52: repeated closes and cancels do nothing."""
    collected = Collected()
    client.create("c", services.spec(*programs.COUNT))
    client.start("c", with_stdin=True, attach_stdio=collected)
    collected.stdin.write(b"four")
    for _ in range(3):
        collected.stdin.close()
    client.close_stdin("c", "init")

    assert client.wait("c").code == 0
    client.delete_task("c")
    assert collected.out == b"4\n"
    assert collected.dio is not None
    for _ in range(2):
        collected.dio.cancel()
        collected.dio.close()


def test_a_remote_has_several_clients(server: Server, services: Services, tmp_path: Path) -> None:
    """Fidelity 59: each in its namespace, all closed by `cleanup`; the containerd was not ours, and goes on."""
    backend = RecordingBackend()
    with Remote.connect(server.address, state_dir=tmp_path / "remote") as remote:
        one = remote.new_client(services.namespace, backend)
        other = remote.new_client(f"{services.namespace}-2")
        one.create("c", services.spec(*programs.TRUE))
        one.start("c")
        assert exit_of(backend, "c") == 0
        with pytest.raises(NotFoundError):
            other.status("c")
        one.delete_task("c")
        one.delete("c")

    assert services.container_ids() == set()
