"""Many threads, many containers, many events at once on a real containerd: who wins, what is told, and in which order."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol, Self, TypeVar, cast

import grpc
import pytest

from libcontainerd import (
    Client,
    ConflictError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidParameterError,
    LibcontainerdError,
    NotFoundError,
    Remote,
    SystemFailureError,
    UnavailableError,
    cio,
)
from libcontainerd._records import Container, Process
from libcontainerd._wire.pb.events import task_pb2
from libcontainerd._wire.pb.services.events_pb2 import EventsStub, PublishRequest, SubscribeRequest
from libcontainerd._wire.pb.types import task_pb2 as task_types_pb2
from libcontainerd._wire.pb.types.event_pb2 import Envelope
from libcontainerd._wire.pb.wellknown_pb2 import Any
from libcontainerd.backends import CallbackBackend, RecordedEvent, RecordingBackend
from libcontainerd.types import Backend, EventInfo, EventType, ExitStatus, Status
from tests.conftest import Count
from tests.integration.containers import (
    MakeSpec,
    Raw,
    process,
    run_exec,
    running,
    shims_of,
    stop,
    wait_exec_gone,
    wait_until,
)
from tests.integration.proxy import Proxy

THREADS = 16

_Result = TypeVar("_Result")

Told = tuple[EventType, str, int, int]
"""An event as the backend and the witness both tell it: what, which process, pid, exit code."""


class Subscription(Protocol):
    """What grpcio's stub returns for a stream."""

    def cancel(self) -> bool: ...
    def __iter__(self) -> Iterator[Envelope]: ...


class Witness:
    """A subscription of its own to a namespace's task events, decoded without the library's help."""

    def __init__(self, channel: grpc.Channel, namespace: str) -> None:
        self._namespace = namespace
        self._stub = EventsStub(channel)
        self._changed = threading.Condition()
        self._live = False
        self._told: dict[str, list[Told]] = defaultdict(list)
        self._call = cast(
            "Subscription", self._stub.Subscribe(SubscribeRequest(filters=[f"namespace=={namespace}"]))
        )
        self._thread = threading.Thread(target=self._read, name="witness", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        wait_until(self._probe, "the witness sees its own event")
        return self

    def __exit__(self, *_: object) -> None:
        self._call.cancel()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _probe(self) -> bool:
        self._stub.Publish(
            PublishRequest(topic="/witness", event=Any(type_url="witness")),
            metadata=(("containerd-namespace", self._namespace),),
            timeout=5,
        )
        with self._changed:
            return self._live

    def _read(self) -> None:
        try:
            for envelope in self._call:
                with self._changed:
                    self._take(envelope)
                    self._changed.notify_all()
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.CANCELLED:
                raise

    def _take(self, envelope: Envelope) -> None:
        value = envelope.event.value
        match envelope.event.type_url:
            case "witness":
                self._live = True
            case "containerd.events.TaskCreate":
                create = task_pb2.TaskCreate.FromString(value)
                self._note(create.container_id, EventType.CREATE, create.container_id, create.pid)
            case "containerd.events.TaskStart":
                start = task_pb2.TaskStart.FromString(value)
                self._note(start.container_id, EventType.START, start.container_id, start.pid)
            case "containerd.events.TaskExecAdded":
                added = task_pb2.TaskExecAdded.FromString(value)
                self._note(added.container_id, EventType.EXEC_ADDED, added.exec_id)
            case "containerd.events.TaskExecStarted":
                started = task_pb2.TaskExecStarted.FromString(value)
                self._note(started.container_id, EventType.EXEC_STARTED, started.exec_id, started.pid)
            case "containerd.events.TaskExit":
                ended = task_pb2.TaskExit.FromString(value)
                self._note(ended.container_id, EventType.EXIT, ended.id, ended.pid, ended.exit_status)

    def _note(
        self, container_id: str, event: EventType, process_id: str, pid: int = 0, code: int = 0
    ) -> None:
        self._told[container_id].append((event, process_id, pid, code))

    def wait_exits(self, container_id: str, number: int) -> list[Told]:
        """What was told of a container, once that many exits were."""

        def exits() -> int:
            return sum(told[0] is EventType.EXIT for told in self._told[container_id])

        with self._changed:
            assert self._changed.wait_for(lambda: exits() >= number, 30), self._told[container_id]
            return list(self._told[container_id])


def told(events: Sequence[RecordedEvent]) -> list[Told]:
    return [(each.event, each.info.process_id, each.info.pid, each.info.exit_code) for each in events]


def exits(backend: RecordingBackend, container_id: str) -> dict[str, list[int]]:
    """The exit codes that were told of a container's processes."""
    found: dict[str, list[int]] = defaultdict(list)
    for each in backend.events(container_id):
        if each.event is EventType.EXIT:
            found[each.info.process_id].append(each.info.exit_code)
    return dict(found)


def wait_exits(backend: RecordingBackend, container_id: str, number: int) -> None:
    wait_until(
        lambda: sum(map(len, exits(backend, container_id).values())) >= number,
        f"{number} exits of {container_id!r}",
        timeout=100,
    )


@contextmanager
def pool(threads: int = THREADS) -> Iterator[ThreadPoolExecutor]:
    """Threads whose end is waited for, and whose stuck calls a test's own timeout reports."""
    with ThreadPoolExecutor(threads) as executor:
        yield executor


def together(*calls: Callable[[], _Result]) -> list[_Result | Exception]:
    """Run calls at the same moment, each on a thread of its own; gives what each returned or raised."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], _Result]) -> _Result | Exception:
        barrier.wait(60)
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - what was raised is what the test looks at
            return error

    with pool(len(calls)) as executor:
        return list(executor.map(run, calls))


def open_streams(dio: cio.DirectIO) -> cio.IO:
    """Attach nothing: the test reads and writes the streams itself."""
    return dio


class Held:
    """An `attach_stdio` that keeps the streams for the test to use."""

    def __init__(self) -> None:
        self.dio: cio.DirectIO | None = None

    def __call__(self, dio: cio.DirectIO) -> cio.IO:
        self.dio = dio
        return dio

    @property
    def stdin(self) -> cio.InputStream:
        assert self.dio is not None
        assert self.dio.stdin is not None
        return self.dio.stdin

    @property
    def stdout(self) -> cio.OutputStream:
        assert self.dio is not None
        return self.dio.stdout

    def echoes(self, text: bytes) -> None:
        """Hold a process to repeating what it is sent, and to end with its input."""
        self.stdin.write(text)
        self.stdin.close()
        assert self.stdout.readall() == text


# -------------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture
def witness(raw_channel: grpc.Channel, namespace: str) -> Iterator[Witness]:
    """Watches the test's namespace past the library."""
    with Witness(raw_channel, namespace) as made:
        yield made


NewClient = Callable[[Backend], Client]


@pytest.fixture
def new_client(remote: Remote, namespace: str, raw: Raw) -> Iterator[NewClient]:
    """Makes clients with a backend of the test's; removes in the end what is left in containerd."""
    made: list[Client] = []

    def make(backend: Backend) -> Client:
        made.append(remote.new_client(namespace, backend))
        return made[-1]

    yield make
    raw.remove_everything()
    for client in made:
        client.close()


# ---------------------------------------------------------------------------------------------------------- crowds


class Crowd:
    """Containers and their execs, each with a random exit code."""

    def __init__(self, client: Client, spec: MakeSpec, containers: int, execs: int) -> None:
        self._client = client
        self._spec = spec
        choose = random.Random(containers * execs)
        self.codes = {
            f"c{number}": {f"e{each}": choose.randrange(256) for each in range(execs)}
            for number in range(containers)
        }
        self.init_codes = {container_id: choose.randrange(256) for container_id in self.codes}
        self._inits = {container_id: Held() for container_id in self.codes}
        self.execs = [
            (container_id, exec_id) for container_id in self.codes for exec_id in self.codes[container_id]
        ]
        choose.shuffle(self.execs)

    def start(self, container_id: str) -> None:
        self._client.create(
            container_id, self._spec("sh", "-c", f"read line; exit {self.init_codes[container_id]}")
        )
        self._client.start(container_id, with_stdin=True, attach_stdio=self._inits[container_id])

    def exec(self, name: tuple[str, str]) -> ExitStatus:
        container_id, exec_id = name
        self._client.exec(
            container_id, exec_id, process("sh", "-c", f"exit {self.codes[container_id][exec_id]}")
        )
        return self._client.wait(container_id, exec_id)

    def end(self, container_id: str) -> ExitStatus:
        self._inits[container_id].stdin.write(b"\n")
        ended = self._client.wait(container_id)
        assert self._client.delete_task(container_id) == ended
        self._client.delete(container_id)
        return ended


@pytest.mark.timeout(240)
def test_a_crowd_is_told_of_once_each_with_the_right_code_and_in_containerds_order(
    client: Client, backend: RecordingBackend, witness: Witness, spec: MakeSpec, count: Count
) -> None:
    crowd = Crowd(client, spec, containers=count(50, 8), execs=count(20, 5))
    with pool() as executor:
        list(executor.map(crowd.start, crowd.codes))
        for (container_id, exec_id), status in zip(
            crowd.execs, executor.map(crowd.exec, crowd.execs), strict=True
        ):
            assert status.code == crowd.codes[container_id][exec_id]
        for container_id, status in zip(crowd.codes, executor.map(crowd.end, crowd.codes), strict=True):
            assert status.code == crowd.init_codes[container_id]
        for container_id, codes in crowd.codes.items():
            seen = witness.wait_exits(container_id, len(codes) + 1)
            wait_exits(backend, container_id, len(codes) + 1)
            assert told(backend.events(container_id)) == seen
            assert exits(backend, container_id) == {
                container_id: [crowd.init_codes[container_id]],
                **{exec_id: [code] for exec_id, code in codes.items()},
            }


@pytest.mark.timeout(240)
def test_a_write_right_after_exec_never_meets_a_broken_pipe(
    client: Client, spec: MakeSpec, count: Count
) -> None:
    number = count(1000, 40)

    def echo(each: int) -> int:
        held = Held()
        container_id, exec_id = f"c{each % 4}", f"e{each}"
        client.exec(container_id, exec_id, process("cat"), with_stdin=True, attach_stdio=held)
        if each % 2:
            os.write(held.stdin.fileno(), b"first\n")
        else:
            held.stdin.write(b"first\n")
        held.stdin.close()
        assert held.stdout.readall() == b"first\n"
        return client.wait(container_id, exec_id).code

    for each in range(4):
        client.create(f"c{each}", spec("sleep", "1000"))
        client.start(f"c{each}")
    with pool() as executor:
        assert Counter(executor.map(echo, range(number))) == {0: number}
    for each in range(4):
        stop(client, f"c{each}")


@pytest.mark.timeout(240)
def test_a_stdin_closed_while_it_is_attached_ends_the_process(
    client: Client, spec: MakeSpec, count: Count
) -> None:
    number = count(1000, 40)

    def end_at_once(each: int) -> int:
        held = Held()

        def attach(dio: cio.DirectIO) -> cio.IO:
            held(dio)
            if each % 2:
                held.stdin.write(b"only\n")
            held.stdin.close()
            return dio

        container_id, exec_id = f"c{each % 4}", f"e{each}"
        client.exec(container_id, exec_id, process("cat"), with_stdin=True, attach_stdio=attach)
        assert held.stdout.readall() == (b"only\n" if each % 2 else b"")
        return client.wait(container_id, exec_id).code

    for each in range(4):
        client.create(f"c{each}", spec("sleep", "1000"))
        client.start(f"c{each}")
    with pool() as executor:
        assert Counter(executor.map(end_at_once, range(number))) == {0: number}
    for each in range(4):
        stop(client, f"c{each}")


# ------------------------------------------------------------------------------------------------------ one wins


def winner_of(results: Sequence[object]) -> int:
    """Which of two succeeded, where the other was told of the conflict."""
    refused = [each for each in results if isinstance(each, Exception)]
    assert [type(each) for each in refused] == [ConflictError], results
    return 1 - results.index(refused[0])


@pytest.mark.timeout(240)
def test_of_two_who_want_the_same_id_one_wins_unharmed(client: Client, spec: MakeSpec, count: Count) -> None:
    chosen = spec("cat")

    def start(held: Held) -> int:
        return client.start("c", with_stdin=True, attach_stdio=held)

    def exec_(held: Held) -> int:
        return client.exec("c", "e", process("cat"), with_stdin=True, attach_stdio=held)

    for each in range(count(200, 10)):
        winner_of(together(lambda: client.create("c", chosen), lambda: client.create("c", chosen)))
        inits = Held(), Held()
        init = inits[winner_of(together(lambda: start(inits[0]), lambda: start(inits[1])))]  # noqa: B023
        execs = Held(), Held()
        one = execs[winner_of(together(lambda: exec_(execs[0]), lambda: exec_(execs[1])))]  # noqa: B023
        one.echoes(b"exec %d\n" % each)
        assert client.wait("c", "e").code == 0
        init.echoes(b"init %d\n" % each)
        assert client.wait("c").code == 0
        assert client.delete_task("c").error is None
        client.delete("c")


def test_of_two_clients_that_create_the_same_id_one_wins_unharmed(
    new_client: NewClient, spec: MakeSpec, raw: Raw, count: Count
) -> None:
    clients = [new_client(RecordingBackend()) for _ in range(2)]
    for _ in range(count(50, 10)):
        results = together(*[partial(each.create, "c", spec("cat")) for each in clients])
        winner = clients[winner_of(results)]
        assert raw.container_ids() == {"c"}
        held = Held()
        winner.start("c", with_stdin=True, attach_stdio=held)
        held.echoes(b"unharmed\n")
        assert winner.wait("c").code == 0
        assert winner.delete_task("c").error is None
        winner.delete("c")


def test_two_who_delete_one_task_get_the_same_status(
    client: Client, spec: MakeSpec, count: Count, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.create("c", spec("sh", "-c", "echo unread; exit 9"))
    at_it = threading.Semaphore(0)
    claim = Container.claim_removal

    def claim_removal(self: Container, process: Process, timeout: float) -> bool:
        at_it.release()
        return claim(self, process, timeout)

    monkeypatch.setattr(Container, "claim_removal", claim_removal)
    for _ in range(count(25, 5)):
        held = Held()
        client.start("c", attach_stdio=held)
        assert client.wait("c").code == 9
        with pool(3) as executor:
            # Neither is done before the output is read, which is when both are at it.
            both = [executor.submit(client.delete_task, "c") for _ in range(2)]
            for _ in both:
                assert at_it.acquire(timeout=30), "both are deleting"
            assert held.stdout.readall() == b"unread\n"
            first, second = (each.result(30) for each in both)
        assert first == second
        assert (first.code, first.error) == (9, None)
    client.delete("c")


# ---------------------------------------------------------------------------------------------- backends that do things


def test_a_backend_that_blocks_for_some_containers_delays_no_other(
    new_client: NewClient, spec: MakeSpec, count: Count
) -> None:
    blocked = {f"b{number}" for number in range(count(30, 8))}
    release = threading.Event()
    record = RecordingBackend()

    def block(container_id: str, event: EventType, info: EventInfo) -> None:
        if container_id in blocked:
            assert release.wait(100)
        record.process_event(container_id, event, info)

    client = new_client(CallbackBackend(block))
    try:
        with pool() as executor:
            list(executor.map(lambda each: client.create(each, spec("true")), blocked))
            list(executor.map(client.start, blocked))
            assert {client.wait(each).code for each in blocked} == {0}
        with running(client, "free", spec("sleep", "1000")):
            for number in range(5):
                run_exec(client, "free", f"e{number}", "true")
                record.wait_for(EventType.EXIT, "free", f"e{number}", timeout=30)
        assert record.wait_for(EventType.EXIT, "free", "init", timeout=30).info.exit_code == 137
        assert {each.container_id for each in record.events()} == {"free"}
    finally:
        release.set()
    for each in blocked:
        record.wait_for(EventType.EXIT, each, "init")
        assert [one.event for one in record.events(each)] == [
            EventType.CREATE,
            EventType.START,
            EventType.EXIT,
        ]


class Reviver:
    """A backend that, when a container's init ends, deletes the container and runs the next of the same id."""

    def __init__(self, spec: MakeSpec, generations: int) -> None:
        self._spec = spec
        self._generations = generations
        self._generation: Counter[str] = Counter()
        self.client: Client | None = None
        self.record = RecordingBackend()
        self.failures: list[Exception] = []

    def process_event(self, container_id: str, event: EventType, info: EventInfo) -> None:
        if event is EventType.EXIT and info.process_id == container_id:
            try:
                self.revive(container_id, info)
            except Exception as error:  # noqa: BLE001 - told to the test
                self.failures.append(error)
        self.record.process_event(container_id, event, info)

    def begin(self, container_id: str) -> None:
        assert self.client is not None
        self.client.create(container_id, self._spec("sh", "-c", f"exit {self._generation[container_id]}"))
        self.client.start(container_id)

    def revive(self, container_id: str, info: EventInfo) -> None:
        assert self.client is not None
        ended = self.client.delete_task(container_id)
        assert ended == ExitStatus(info.exit_code, ended.exited_at), ended
        self.client.delete(container_id)
        self._generation[container_id] += 1
        if self._generation[container_id] < self._generations:
            self.begin(container_id)


class DistantReviver(Reviver):
    """Likewise, from another thread than the one that delivers events."""

    def __init__(self, spec: MakeSpec, generations: int, executor: ThreadPoolExecutor) -> None:
        super().__init__(spec, generations)
        self._executor = executor
        self._doing: list[Future[None]] = []

    def revive(self, container_id: str, info: EventInfo) -> None:
        self._doing.append(self._executor.submit(super().revive, container_id, info))

    def check(self) -> None:
        for each in self._doing:
            each.result(30)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("where", ["in process_event", "on another thread"])
def test_a_backend_can_run_the_next_container_of_the_same_id(
    new_client: NewClient, spec: MakeSpec, raw: Raw, count: Count, where: str
) -> None:
    ids = [f"c{number}" for number in range(4)]
    generations = count(25, 5)
    with pool() as executor:
        near = where == "in process_event"
        backend = Reviver(spec, generations) if near else DistantReviver(spec, generations, executor)
        backend.client = new_client(backend)
        for each in ids:
            backend.begin(each)
        for each in ids:
            wait_exits(backend.record, each, generations)
        if isinstance(backend, DistantReviver):
            backend.check()
        assert not backend.failures
    assert not raw.container_ids()
    for each in ids:
        events = backend.record.events(each)
        life = [EventType.CREATE, EventType.START, EventType.EXIT]
        assert [one.event for one in events] == life * generations
        assert exits(backend.record, each) == {each: list(range(generations))}
        pids = [one.info.pid for one in events]
        assert pids[::3] == pids[1::3] == pids[2::3]


def test_every_verb_can_be_called_while_an_event_of_the_same_container_is_delivered(
    new_client: NewClient, spec: MakeSpec
) -> None:
    said: Future[list[object]] = Future()
    record = RecordingBackend()

    def on_start(container_id: str, event: EventType, info: EventInfo) -> None:
        try:
            said.set_result(verbs(container_id, info))
        except Exception as error:  # noqa: BLE001 - told to the test
            said.set_exception(error)

    def verbs(container_id: str, info: EventInfo) -> list[object]:
        said: list[object] = [client.status(container_id)]
        assert client.list_pids(container_id) == [info.pid]
        assert [each.process_id for each in client.summary(container_id)] == ["init"]
        client.pause(container_id)
        said.append(client.status(container_id))
        client.resume(container_id)
        result = run_exec(client, container_id, "e", "sh", "-c", "cat; exit 4", stdin=b"in an event")
        said += [result.out, result.status.code]
        client.signal_process(container_id, "init", signal.SIGKILL)
        said += [client.wait(container_id).code, client.delete_task(container_id).code]
        client.delete(container_id)
        return said

    client = new_client(CallbackBackend(record.process_event, on={EventType.START: on_start}))
    client.create("c", spec("sleep", "1000"))
    client.start("c")
    assert said.result(30) == [Status.RUNNING, Status.PAUSED, b"in an event", 4, 137, 137]
    wait_exits(record, "c", 2)
    assert [(each.event, each.info.process_id) for each in record.events("c")] == [
        (EventType.CREATE, "c"),
        (EventType.PAUSED, ""),
        (EventType.RESUMED, ""),
        (EventType.EXEC_ADDED, "e"),
        (EventType.EXEC_STARTED, "e"),
        (EventType.EXIT, "e"),
        (EventType.EXIT, "c"),
    ]


# ------------------------------------------------------------------------------------------------------- ends and ids


def test_the_id_of_an_ended_exec_can_be_used_again(
    client: Client, backend: RecordingBackend, spec: MakeSpec, count: Count
) -> None:
    number = count(100, 10)
    with running(client, "c", spec("sleep", "1000")):
        for each in range(number):
            assert run_exec(client, "c", "e", "sh", "-c", f"exit {each}").status.code == each
            wait_exec_gone(client, "c", "e")
            assert client.wait("c", "e").code == each
    assert exits(backend, "c")["e"] == list(range(number))


@pytest.mark.timeout(240)
def test_an_exec_that_races_with_its_containers_end_is_told_or_refused(
    client: Client, backend: RecordingBackend, spec: MakeSpec, raw: Raw, count: Count
) -> None:
    refusals: list[LibcontainerdError] = []
    for each in range(count(40, 10)):
        container_id, wanted = f"c{each}", each % 5
        init, begun = Held(), threading.Semaphore(0)
        client.create(container_id, spec("sh", "-c", "read line; exit 7"))
        client.start(container_id, with_stdin=True, attach_stdio=init)

        def end() -> int:
            for _ in range(wanted):  # noqa: B023
                assert begun.acquire(timeout=30)  # noqa: B023
            return init.stdin.write(b"\n")  # noqa: B023

        def begin(exec_id: str) -> int:
            try:
                return client.exec(container_id, exec_id, process("sleep", "1000"), attach_stdio=Held())  # noqa: B023
            finally:
                begun.release()  # noqa: B023

        names = "e0", "e1", "e2", "e3"
        _, *results = together(end, *[partial(begin, name) for name in names])
        assert client.wait(container_id, timeout=30).code == 7
        ran = {name for name, result in zip(names, results, strict=True) if isinstance(result, int)}
        assert len(ran) >= wanted
        for exec_id in ran:
            assert client.wait(container_id, exec_id, timeout=30).code == 137
        refusals += [result for result in results if isinstance(result, LibcontainerdError)]
        status = client.delete_task(container_id)
        assert (status.code, status.error) == (7, None)
        client.delete(container_id)
        wait_exits(backend, container_id, len(ran) + 1)
        ended = exits(backend, container_id)
        assert ended.pop(container_id) == [7]
        assert all(len(codes) == 1 for codes in ended.values()), ended
        assert ran <= set(ended)
    assert not raw.tasks_by_id()
    # The last is runc's setns, which the end of init has overtaken.
    kinds = InvalidParameterError, NotFoundError, FailedPreconditionError, SystemFailureError
    assert {type(refusal) for refusal in refusals} <= set(kinds), refusals


# --------------------------------------------------------------------------------------------- when something breaks


@pytest.fixture
def shim_of(remote: Remote, namespace: str) -> Callable[[str], int]:
    """Finds the pid of a container's shim."""

    def find(container_id: str) -> int:
        wanted = {"-namespace", namespace, "-id", container_id}
        (pid,) = [pid for pid, line in shims_of(remote.address).items() if wanted <= set(line.split())]
        return pid

    return find


def test_the_death_of_a_shim_is_told_as_one_exit_of_every_process(
    client: Client, backend: RecordingBackend, shim_of: Callable[[str], int], spec: MakeSpec, count: Count
) -> None:
    def end(container_id: str) -> None:
        init, execs = Held(), {f"e{number}": Held() for number in range(3)}
        client.create(container_id, spec("cat"))
        client.start(container_id, with_stdin=True, attach_stdio=init)
        for exec_id, held in execs.items():
            client.exec(container_id, exec_id, process("cat"), with_stdin=True, attach_stdio=held)
        with pool(4) as executor:
            names = ["init", *execs]
            waiting = [executor.submit(client.wait, container_id, name, timeout=30) for name in names]
            os.kill(shim_of(container_id), signal.SIGKILL)
            codes = [future.result().code for future in waiting]
        assert codes[0] == 137
        assert set(codes[1:]) <= {137, 255}
        for held in (init, *execs.values()):
            assert held.stdout.readall() == b""
        wait_exits(backend, container_id, len(names))
        for exec_id in execs:
            wait_exec_gone(client, container_id, exec_id)
        assert client.delete_task(container_id).code == 137
        client.delete(container_id)
        told_of = exits(backend, container_id)
        assert told_of == {
            container_id: [137],
            **{name: [code] for name, code in zip(execs, codes[1:], strict=True)},
        }
        for held in (init, *execs.values()):
            with pytest.raises((BrokenPipeError, ValueError)):
                held.stdin.write(b"nobody reads this")

    with pool(8) as executor:
        list(executor.map(end, [f"c{number}" for number in range(count(24, 4))]))


@pytest.fixture
def proxy(remote: Remote) -> Iterator[Proxy]:
    """What the proxied client's connection goes through."""
    with Proxy(remote.address) as made:
        yield made


@pytest.fixture
def proxied(
    proxy: Proxy, namespace: str, raw: Raw, tmp_path: Path
) -> Iterator[tuple[Client, RecordingBackend]]:
    """A client whose connection can be cut, and its events."""
    record = RecordingBackend()
    with Client(proxy.path, namespace=namespace, state_dir=tmp_path / "bundles", backend=record) as made:
        yield made, record
        raw.remove_everything()


def reached(client: Client) -> bool:
    """Whether a call comes through."""
    try:
        client.version(timeout=1)
    except (UnavailableError, DeadlineExceededError):
        return False
    return True


def state_of(raw: Raw, container_id: str, exec_id: str = "") -> int | None:
    """A process's state as containerd sees it."""
    found = raw.process(container_id, exec_id)
    return None if found is None else found.status


def test_exits_in_a_gap_of_the_events_are_told_once_with_their_codes(
    proxied: tuple[Client, RecordingBackend],
    proxy: Proxy,
    raw: Raw,
    spec: MakeSpec,
    count: Count,
) -> None:
    through, record = proxied
    for each in range(count(20, 3)):
        container_id = f"c{each}"
        init, execs = Held(), {f"e{number}": Held() for number in range(4)}
        through.create(container_id, spec("sh", "-c", "read line; exit 7"))
        through.start(container_id, with_stdin=True, attach_stdio=init)
        for number, (exec_id, held) in enumerate(execs.items()):
            code = process("sh", "-c", f"read line; exit {number + 20}")
            through.exec(container_id, exec_id, code, with_stdin=True, attach_stdio=held)
        proxy.cut(stay_broken=True)
        ends = dict(list(execs.items())[:2])
        for held in ends.values():
            held.stdin.write(b"\n")
        stopped = task_types_pb2.Status.STOPPED
        for exec_id in ends:
            wait_until(lambda: state_of(raw, container_id, exec_id) == stopped, "it ends")  # noqa: B023
        if each % 2:
            init.stdin.write(b"\n")
            wait_until(lambda: state_of(raw, container_id) == stopped, "init ends")  # noqa: B023
        proxy.cut()
        for number, exec_id in enumerate(ends):
            assert through.wait(container_id, exec_id, timeout=30).code == number + 20
        if not each % 2:
            for held in list(execs.values())[2:]:
                held.stdin.write(b"\n")
            for number, exec_id in enumerate(list(execs)[2:]):
                assert through.wait(container_id, exec_id, timeout=30).code == number + 22
            init.stdin.write(b"\n")
        assert through.wait(container_id, timeout=30).code == 7
        last = [through.wait(container_id, exec_id, timeout=30).code for exec_id in list(execs)[2:]]
        assert last == ([137, 137] if each % 2 else [22, 23])
        wait_exits(record, container_id, 5)
        status = through.delete_task(container_id)
        assert (status.code, status.error) == (7, None)
        through.delete(container_id)
        codes = dict(zip(execs, [[20], [21], *[[code] for code in last]], strict=True))
        assert exits(record, container_id) == {container_id: [7], **codes}


@pytest.mark.timeout(240)
def test_a_crowd_on_a_connection_that_keeps_breaking_is_told_of_once_each(
    proxied: tuple[Client, RecordingBackend], proxy: Proxy, raw: Raw, spec: MakeSpec, count: Count
) -> None:
    through, record = proxied
    containers, number = 4, count(400, 60)
    for each in range(containers):
        through.create(f"c{each}", spec("sleep", "1000"))
        through.start(f"c{each}")
    done, came_through = threading.Event(), threading.Event()
    cuts, most_cuts = 0, count(60, 12)

    def run(each: int) -> int | None:
        container_id, exec_id = f"c{each % containers}", f"e{each}"
        try:
            through.exec(container_id, exec_id, process("sh", "-c", f"exit {each % 256}"))
        except UnavailableError:
            return None
        # Not wait(), which asks by itself after a while: the event has to come.
        code = record.wait_for(EventType.EXIT, container_id, exec_id, timeout=30).info.exit_code
        came_through.set()
        return code

    def cut() -> None:
        nonlocal cuts
        # Not for ever: what is to be told in the end needs a connection that lasts.
        while cuts < most_cuts and not done.wait(0.2):
            if not came_through.is_set():
                continue  # however slow the machine is, some shall live between two cuts
            came_through.clear()
            proxy.cut(stay_broken=bool(cuts % 3 == 2))
            cuts += 1
            if cuts % 3 == 0:
                done.wait(0.2)
                proxy.mend()

    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        with pool() as executor:
            statuses = list(executor.map(run, range(number)))
    finally:
        done.set()
        cutter.join()
    wait_until(lambda: reached(through), "the connection is back")
    ran = {each for each, code in enumerate(statuses) if code is not None}
    assert cuts
    assert ran
    assert {each for each in ran if statuses[each] != each % 256} == set()
    for each in range(containers):
        container_id = f"c{each}"
        own = {f"e{one}": one % 256 for one in ran if one % containers == each}
        for exec_id in own:
            wait_exec_gone(through, container_id, exec_id)
        through.signal_process(container_id, "init", signal.SIGKILL)
        assert through.wait(container_id, timeout=30).code == 137
        assert through.delete_task(container_id).error is None
        through.delete(container_id)
        wait_until(lambda: container_id in exits(record, container_id), "init's exit is told")  # noqa: B023
        told_of = exits(record, container_id)
        assert {exec_id: told_of.get(exec_id) for exec_id in own} == {
            name: [code] for name, code in own.items()
        }
        assert {name: codes for name, codes in told_of.items() if len(codes) != 1} == {}
