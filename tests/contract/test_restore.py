"""What an earlier client has left, taken back by the next one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from libcontainerd import Client, ConflictError, EventType, NotFoundError, Restored, Status, cio
from libcontainerd._wire.pb.services import tasks_pb2
from libcontainerd.backends import RecordingBackend
from tests.contract import programs
from tests.contract.servers import Server, Services, process_document
from tests.integration.containers import (
    Collected,
    bundle_of,
    exit_of,
    wait_exec_gone,
    wait_until,
)
from tests.leaks import no_leaks_of_ours

MakeClient = Callable[..., Client]


@pytest.fixture
def make_client(server: Server, namespace: str, services: Services, tmp_path: Path) -> Iterator[MakeClient]:
    """Makes clients of one state directory, one after the other: `make_client(backend)`."""
    with ExitStack() as stack:
        stack.callback(services.remove_everything)

        def make(backend: RecordingBackend | None = None, state: str = "state") -> Client:
            return stack.enter_context(
                Client(
                    server.address,
                    namespace=namespace,
                    state_dir=tmp_path / state,
                    backend=backend,
                    default_timeout=60.0,
                )
            )

        yield make


@pytest.fixture
def earlier(make_client: MakeClient) -> Client:
    """The client whose program ends."""
    return make_client()


@pytest.fixture
def client(make_client: MakeClient, earlier: Client, backend: RecordingBackend) -> Client:
    """The client of the program that comes after it; nobody tells it anything."""
    return make_client(backend)


def exits(backend: RecordingBackend, container_id: str = "c") -> list[tuple[str, int]]:
    """The exits that were told."""
    return [
        (event.info.process_id, event.info.exit_code)
        for event in backend.events(container_id)
        if event.event is EventType.EXIT
    ]


def have_answer(process: Collected) -> None:
    """Have a `cat` answer: the fake's shim, whose descriptors are this program's, has then opened all it will open."""
    process.stdin.write(b"hello\n")
    process.wait_for(b"hello\n")


def start_to_talk(client: Client) -> None:
    """Start a `cat`."""
    talking = Collected()
    client.start("c", with_stdin=True, attach_stdio=talking)
    have_answer(talking)


def test_a_running_container_with_its_execs(
    earlier: Client, client: Client, services: Services, backend: RecordingBackend
) -> None:
    earlier.create("c", services.spec())
    pid = earlier.start("c", attach_stdio=Collected())
    exec_pid = earlier.exec("c", "e", process_document(), attach_stdio=Collected())
    silent_pid = earlier.exec("c", "silent", process_document())
    earlier.close()

    restored = client.restore("c", Collected(), attach_exec_stdio=lambda _, dio: dio)

    assert restored == Restored(True, pid, {"e": exec_pid, "silent": silent_pid})
    assert client.status("c") is Status.RUNNING
    assert sorted(client.summary("c")) == sorted([(pid, "init"), (exec_pid, "e"), (silent_pid, "silent")])
    for exec_id in ("e", "silent"):
        client.signal_process("c", exec_id, signal.SIGKILL)
        assert exit_of(backend, "c", exec_id) == 137
        wait_exec_gone(client, "c", exec_id)
        assert services.process("c", exec_id) is None
    client.signal_process("c", "init", signal.SIGKILL)
    assert exit_of(backend, "c") == 137
    assert client.delete_task("c").code == 137
    assert list(bundle_of(services, "c").iterdir()) == []
    client.delete("c")
    assert exits(backend) == [("e", 137), ("silent", 137), ("c", 137)]


def test_stdio_goes_on_where_it_was(earlier: Client, client: Client, services: Services) -> None:
    before, after, of_exec = Collected(), Collected(), Collected()
    earlier.create("c", services.spec(*programs.CAT))
    earlier.start("c", with_stdin=True, attach_stdio=before)
    earlier.exec("c", "e", process_document(*programs.CAT), with_stdin=True, attach_stdio=Collected())
    before.stdin.write(b"before\n")
    before.wait_for(b"before\n")
    earlier.close()
    assert before.out == b"before\n"

    client.restore("c", after, attach_exec_stdio=lambda _, dio: of_exec(dio))
    assert after.dio is not None
    assert (after.dio.container_id, after.dio.process_id) == ("c", "init")
    assert of_exec.dio is not None
    assert (of_exec.dio.container_id, of_exec.dio.process_id) == ("c", "e")
    after.stdin.write(b"after\n")
    of_exec.stdin.write(b"of the exec\n")
    after.wait_for(b"after\n")
    of_exec.wait_for(b"of the exec\n")

    of_exec.stdin.close()
    assert client.wait("c", "e").code == 0
    after.stdin.close()
    assert client.wait("c").code == 0
    assert client.delete_task("c").code == 0
    assert (after.out, of_exec.out) == (b"after\n", b"of the exec\n")


def test_what_was_written_while_nobody_read_arrives_whole(
    earlier: Client, client: Client, services: Services
) -> None:
    seen = threading.Event()

    def peek(dio: cio.DirectIO) -> cio.IO:
        seen.set()
        return dio  # and read nothing

    earlier.create("c", services.spec(*programs.FLOOD))
    earlier.start("c", attach_stdio=peek)
    assert seen.is_set()
    earlier.close()

    after = Collected()
    assert client.restore("c", after).alive
    assert client.wait("c").code == 0
    client.delete_task("c")
    assert len(after.out) == programs.FLOOD_BYTES


def test_input_that_an_earlier_client_has_ended_stays_ended(
    earlier: Client, client: Client, services: Services
) -> None:
    earlier.create("c", services.spec(*programs.FLOOD))
    earlier.start("c", with_stdin=True, attach_stdio=lambda dio: dio)
    earlier.close_stdin("c", "init")
    earlier.close()

    after = Collected()
    client.restore("c", after)

    assert after.dio is not None
    assert after.dio.stdin is None
    client.close_stdin("c", "init")
    assert client.wait("c").code == 0


def test_an_exec_that_has_ended_is_told_once_and_cleaned_up(
    earlier: Client, client: Client, services: Services, backend: RecordingBackend
) -> None:
    earlier.create("c", services.spec())
    earlier.start("c")
    obeying = Collected()
    earlier.exec("c", "e", process_document(*programs.OBEY), attach_stdio=obeying)
    obeying.wait_for(b"ready")
    earlier.exec("c", "silent", process_document())
    earlier.close()
    services.kill("c", "e", signal.SIGTERM)
    services.kill("c", "silent")
    assert services.wait("c", "e") == 42
    assert services.wait("c", "silent") == 137

    restored = client.restore("c", attach_exec_stdio=lambda _, dio: Collected()(dio))

    assert restored.execs == {}
    assert exit_of(backend, "c", "e") == 42
    assert exit_of(backend, "c", "silent") == 137
    for exec_id in ("e", "silent"):
        wait_exec_gone(client, "c", exec_id)
        assert services.process("c", exec_id) is None
    assert list(bundle_of(services, "c").iterdir()) == []
    assert client.wait("c", "e").code == 42
    client.exec("c", "e", process_document(*programs.TRUE))
    wait_until(lambda: len(exits(backend)) == 3, "the exit of the next one")
    assert sorted(exits(backend)) == [("e", 0), ("e", 42), ("silent", 137)]


def test_an_exec_that_was_never_started_is_deleted(
    earlier: Client, client: Client, services: Services, backend: RecordingBackend
) -> None:
    earlier.create("c", services.spec())
    earlier.start("c")
    earlier.close()
    services.add_exec("c", "theirs", *programs.SLEEP)
    services.add_exec("c", "ours", *programs.SLEEP)
    (bundle_of(services, "c") / "ours-exec").touch()

    assert client.restore("c").execs == {}

    assert services.process("c", "ours") is None
    assert services.process("c", "theirs") is not None
    assert list(bundle_of(services, "c").iterdir()) == []
    client.exec("c", "ours", process_document(*programs.TRUE))
    assert exit_of(backend, "c", "ours") == 0


def test_an_exec_of_somebody_else_stays_theirs(
    earlier: Client, client: Client, services: Services, backend: RecordingBackend
) -> None:
    earlier.create("c", services.spec())
    earlier.start("c")
    earlier.close()
    services.add_exec("c", "theirs", *programs.SLEEP)
    services.start("c", "theirs")

    assert client.restore("c").execs == {}
    services.kill("c", "theirs")

    assert exit_of(backend, "c", "theirs") == 137
    assert services.process("c", "theirs") is not None


def test_a_task_that_has_ended(
    earlier: Client, client: Client, services: Services, backend: RecordingBackend
) -> None:
    earlier.create("c", services.spec(*programs.OBEY))
    collected = Collected()
    pid = earlier.start("c", attach_stdio=collected)
    collected.wait_for(b"ready")
    earlier.exec("c", "e", process_document(), attach_stdio=Collected())
    earlier.close()
    services.kill("c", signal_number=signal.SIGTERM)
    assert services.wait("c") == 42

    restored = client.restore("c", Collected())

    assert (restored.alive, restored.pid) == (False, pid)
    assert exit_of(backend, "c", "e") == 137
    assert client.wait("c").code == 42
    status = client.delete_task("c")
    assert (status.code, status.error) == (42, None)
    assert client.wait("c").code == 42
    collected = Collected()
    client.start("c", attach_stdio=collected)
    collected.wait_for(b"ready")
    client.signal_process("c", "init", signal.SIGKILL)
    assert exit_of(backend, "c") == 137
    client.delete_task("c")
    client.delete("c")
    assert exits(backend) == [("e", 137), ("c", 137)]


def test_a_task_that_is_gone(
    earlier: Client, client: Client, services: Services, backend: RecordingBackend
) -> None:
    earlier.create("c", services.spec(*programs.SPEAK))
    earlier.start("c", attach_stdio=lambda dio: dio)
    earlier.close()
    with_readers = Collected()
    assert services.wait("c") == 3
    services.delete_task("c")
    bundle = bundle_of(services, "c")
    assert list(bundle.iterdir())

    assert client.restore("c", with_readers) == Restored(False, 0, {})

    assert with_readers.dio is None
    assert list(bundle.iterdir()) == []
    assert isinstance(client.delete_task("c").error, NotFoundError)
    client.start("c", attach_stdio=with_readers)
    assert exit_of(backend, "c") == 3
    client.delete_task("c")
    client.delete("c")
    assert (with_readers.out, with_readers.err) == (b"out\n", b"err\n")
    assert not bundle.exists()


def test_a_container_that_was_never_started(earlier: Client, client: Client, services: Services) -> None:
    earlier.create("c", services.spec(*programs.SPEAK))
    earlier.close()
    bundle = bundle_of(services, "c")
    bundle.rmdir()

    assert client.restore("c") == Restored(False, 0, {})

    assert bundle.is_dir()
    client.start("c", attach_stdio=Collected())
    assert client.wait("c").code == 3


def test_a_paused_task_is_restored_as_paused(
    earlier: Client, client: Client, services: Services, backend: RecordingBackend
) -> None:
    earlier.create("c", services.spec())
    pid = earlier.start("c")
    earlier.pause("c")
    earlier.close()

    assert client.restore("c") == Restored(True, pid, {})

    assert client.status("c") is Status.PAUSED
    client.signal_process("c", "init", signal.SIGKILL)  # which thaws what it is told is frozen
    assert exit_of(backend, "c") == 137


def test_a_task_that_was_made_and_not_started_is_alive(
    earlier: Client, client: Client, services: Services
) -> None:
    earlier.create("c", services.spec())
    earlier.close()
    pid = services.make_task("c")

    assert client.restore("c") == Restored(True, pid, {})

    assert client.status("c") is Status.CREATED
    with pytest.raises(ConflictError):
        client.start("c")
    client.replace("c", services.spec(*programs.SPEAK))
    client.start("c")
    assert client.wait("c").code == 3


def test_fifos_that_are_gone(
    earlier: Client, client: Client, services: Services, backend: RecordingBackend
) -> None:
    earlier.create("c", services.spec())
    pid = earlier.start("c", with_stdin=True, attach_stdio=Collected())
    exec_pid = earlier.exec("c", "e", process_document(), attach_stdio=Collected())
    silent_pid = earlier.exec("c", "silent", process_document())
    earlier.close()
    bundle = bundle_of(services, "c")
    for each in bundle.iterdir():
        each.unlink()
    bundle.rmdir()

    after = Collected()
    restored = client.restore("c", after, attach_exec_stdio=lambda _, dio: after(dio))

    assert restored == Restored(True, pid, {"e": exec_pid, "silent": silent_pid})
    assert after.dio is None
    client.signal_process("c", "e", signal.SIGKILL)
    assert exit_of(backend, "c", "e") == 137
    client.exec("c", "next", process_document(*programs.SPEAK), attach_stdio=after)
    assert exit_of(backend, "c", "next") == 3
    client.signal_process("c", "init", signal.SIGKILL)
    assert client.wait("c").code == 137
    client.delete_task("c")
    client.delete("c")
    assert not bundle.exists()


def test_a_destination_opens_nothing(
    earlier: Client, client: Client, services: Services, tmp_path: Path
) -> None:
    earlier.create("c", services.spec(*programs.CAT))
    start_to_talk(earlier)
    earlier.close()

    with no_leaks_of_ours(tmp_path):
        client.restore("c", cio.null_io)
    client.signal_process("c", "init", signal.SIGKILL)
    assert client.wait("c").code == 137
    client.delete_task("c")
    assert list(bundle_of(services, "c").iterdir()) == []


def test_what_is_in_use_or_unknown(earlier: Client, client: Client, services: Services) -> None:
    earlier.create("c", services.spec())

    with pytest.raises(ConflictError, match="cannot restore container 'c': id already in use"):
        earlier.restore("c")
    with pytest.raises(NotFoundError, match="cannot restore container 'x'"):
        client.restore("x")
    client.create("x", services.spec())  # nothing of the failure is left
    client.restore("c")
    with pytest.raises(ConflictError):
        client.restore("c")


def test_a_callback_that_fails_leaves_no_record(
    earlier: Client, client: Client, services: Services, tmp_path: Path
) -> None:
    earlier.create("c", services.spec(*programs.CAT))
    start_to_talk(earlier)
    talking = Collected()
    earlier.exec("c", "e", process_document(*programs.CAT), with_stdin=True, attach_stdio=talking)
    have_answer(talking)
    earlier.close()
    attached = Collected()

    def fail(exec_id: str, dio: cio.DirectIO) -> cio.IO:
        raise ZeroDivisionError(exec_id)

    with no_leaks_of_ours(tmp_path), pytest.raises(ZeroDivisionError, match="e"):
        client.restore("c", attached, attach_exec_stdio=fail)

    with pytest.raises(NotFoundError):
        client.status("c")
    again = Collected()
    assert client.restore("c", again).alive
    again.stdin.write(b"still here\n")
    again.wait_for(b"still here\n")


def test_all_at_once_and_one_that_is_broken(
    earlier: Client, client: Client, services: Services, backend: RecordingBackend
) -> None:
    running = earlier_start(earlier, services, "running", *programs.CAT)
    earlier.exec("running", "e", process_document())
    earlier_start(earlier, services, "ended", *programs.SPEAK)
    earlier.create("made", services.spec())
    earlier.close()
    assert services.wait("ended") == 3
    services.make_container("foreign")
    earlier_label = services.container("made").labels
    services.make_container("broken", labels=dict(earlier_label))
    broken = services.container("broken")
    services.delete_container("broken")
    broken.spec.value = b"["
    services.create_container(broken)
    client.create("ours", services.spec())

    results = client.restore_all(Collected())

    assert isinstance(results.pop("broken"), Exception)
    restored = {name: (each.alive, each.pid) for name, each in results.items() if isinstance(each, Restored)}
    ended = restored.pop("ended")
    assert not ended[0]
    assert restored == {"running": (True, running), "made": (False, 0)}
    assert client.wait("ended").code == 3
    client.signal_process("running", "init", signal.SIGKILL)
    assert exit_of(backend, "running") == 137
    assert exit_of(backend, "running", "e") == 137
    assert exits(backend, "ended") == []
    with pytest.raises(NotFoundError):
        client.status("broken")
    assert client.restore_all(Collected()).keys() == {"broken"}


def earlier_start(earlier: Client, services: Services, container_id: str, *args: str) -> int:
    earlier.create(container_id, services.spec(*args))
    return earlier.start(container_id, with_stdin=True, attach_stdio=Collected())


@pytest.mark.parametrize("label", ["/", "/etc", "{state}/../c", "{state}/other", "{state}/c/../other", "c"])
def test_a_label_leads_nowhere_else(
    earlier: Client, client: Client, services: Services, tmp_path: Path, label: str
) -> None:
    other = tmp_path / "state" / "other"
    other.mkdir(parents=True)
    (other / "e-exec").touch()
    services.make_container("c", labels={"libcontainerd/bundle.path": label.format(state=tmp_path / "state")})
    services.call(services.tasks.Create, tasks_pb2.CreateTaskRequest(container_id="c"))
    services.start("c")

    assert client.restore("c").alive

    client.signal_process("c", "init", signal.SIGKILL)
    client.wait("c")
    client.delete_task("c")
    client.delete("c")
    assert (other / "e-exec").exists()
    assert sorted(each.name for each in (tmp_path / "state").iterdir()) == ["other"]
