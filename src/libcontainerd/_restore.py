"""Containers that an earlier client has left, taken back into the map: container, task, execs, and their stdio."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog

from libcontainerd import _cleanup as cleanup
from libcontainerd import _keeping as keeping
from libcontainerd import cio
from libcontainerd._bundle import BUNDLE_LABEL, Bundle, names_in, remove_orphans
from libcontainerd._events import catchup
from libcontainerd._records import Process, State
from libcontainerd._runtime import read_facts
from libcontainerd._wire.identifiers import check_identifier, is_identifier
from libcontainerd._wire.pb.services import containers_pb2, tasks_pb2
from libcontainerd._wire.pb.types import task_pb2
from libcontainerd.cio.attached import Attached, check_attach_stdio
from libcontainerd.cio.fifo import End, FifoSet
from libcontainerd.errors import (
    CallCancelledError,
    ConflictError,
    FailedPreconditionError,
    NotFoundError,
)
from libcontainerd.types import INIT_PROCESS_NAME, Restored

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable

    from libcontainerd._events.delivery import Delivery
    from libcontainerd._events.strays import Strays
    from libcontainerd._records import Container, ContainerMap, SpecFacts
    from libcontainerd._stdin import StdinCloser
    from libcontainerd._wire.connection import Connection, Deadline
    from libcontainerd._wire.shelter import Shelter
    from libcontainerd.types import ExitStatus

    AttachExecStdio = Callable[[str, cio.DirectIO], cio.IO] | cio.Destination

_ONE_SECONDS: Final = 20.0
"""The most that one container of many gets: a shim that does not answer must not use up the others' time."""

_MOST_AT_ONCE: Final = 8
_PAUSE_SECONDS: Final = 0.1

_STATE: Final = {
    task_pb2.Status.CREATED: State.CREATED,
    task_pb2.Status.PAUSED: State.PAUSED,
    task_pb2.Status.PAUSING: State.PAUSED,
}
_DISCARD: Final = cio.copy()

_log = structlog.get_logger("libcontainerd")


class Restorer:
    """Restores a client's containers. Thread-safe; what it promises and raises is said at `Client.restore`."""

    def __init__(
        self,
        connection: Connection,
        shelter: Shelter,
        containers: ContainerMap,
        delivery: Delivery,
        stdin: StdinCloser,
        *,
        state_dir: str,
        keep_exits: bool,
        look_again: Callable[[], None],
        strays: Strays,
        cut: threading.Event,
    ) -> None:
        """Take what it works with.

        Args:
            connection: For what is asked.
            shelter: For what is removed.
            containers: The map.
            delivery: For exits that nobody was told of.
            stdin: Ends a process's input.
            state_dir: Where bundles are.
            keep_exits: Whether to look for records that were left (`_keeping`).
            look_again: Compares all records with containerd, in the background.
            strays: Ends tasks that have lost their container.
            cut: Set once `close` has cut IO off.
        """
        self.connection = connection
        self.shelter = shelter
        self.containers = containers
        self.delivery = delivery
        self.stdin = stdin
        self.state_dir = state_dir
        self.cut = cut
        self._keep_exits = keep_exits
        self._look_again = look_again
        self._strays = strays
        self.log = _log.bind(namespace=connection.namespace)

    def restore(
        self,
        container_id: str,
        attach_stdio: cio.AttachStdio,
        attach_exec_stdio: AttachExecStdio | None,
        deadline: Deadline,
    ) -> Restored:
        """Restore one container."""
        check_identifier("container id", container_id)
        stdio = _Stdio(attach_stdio, attach_exec_stdio)
        with ExitStack() as undo:
            one = _Restoration(self, container_id, stdio, deadline)
            undo.callback(one.abandon)
            one.read(
                self.connection.call(
                    self.connection.containers.Get,
                    containers_pb2.GetContainerRequest(id=container_id),
                    doing=one.doing,
                    deadline=deadline,
                ).container
            )
            one.take(one.ask(""), thorough=True)
            undo.pop_all()
        restored = one.finish()
        for process in one.living():
            self.delivery.look(one.container, process, deadline=deadline, grace=False)
        return restored

    def restore_all(
        self,
        attach_stdio: cio.AttachStdio,
        attach_exec_stdio: AttachExecStdio | None,
        deadline: Deadline,
    ) -> dict[str, Restored | Exception]:
        """Restore every container of ours that is not in the map."""
        doing = f"restore the containers of namespace {self.connection.namespace!r}"
        stdio = _Stdio(attach_stdio, attach_exec_stdio)
        bundles = names_in(self.state_dir)
        # Streamed: a few thousand specs are more than containerd sends in one message.
        request = containers_pb2.ListContainersRequest(filters=[f'labels."{BUNDLE_LABEL}"'])
        answers = self.connection.gather(
            self.connection.containers.ListStream, request, doing=doing, deadline=deadline
        )
        results: dict[str, Restored | Exception] = {}
        seen = set()
        with ExitStack() as undo:
            under_way = []
            for answer in answers:
                message = answer.container
                seen.add(os.path.basename(message.labels[BUNDLE_LABEL]))
                try:
                    one = self._begin(message, stdio, deadline, undo)
                except Exception as error:  # noqa: BLE001 - one broken container spoils no other; it is reported
                    results[message.id] = error
                else:
                    under_way += [] if one is None else [one]
            tasks = catchup.ask_for_all(self.connection, deadline)
            for one, outcome in self._take_all(under_way, tasks):
                results[one.container.id] = outcome
        if self.cut.is_set():
            raise CallCancelledError(f"cannot {doing}: the client was closed meanwhile")
        remove_orphans(
            self.state_dir, bundles, lambda name: name in seen or self.containers.find(name) is not None
        )
        if self._keep_exits:
            keeping.sweep(self.shelter, deadline)
        self._strays.look(tasks)
        if any(isinstance(each, Restored) for each in results.values()):
            self._look_again()
        return results

    def _begin(
        self, message: containers_pb2.Container, stdio: _Stdio, deadline: Deadline, undo: ExitStack
    ) -> _Restoration | None:
        check_identifier("container id", message.id)
        if self.containers.find(message.id) is not None:
            return None
        try:
            one = _Restoration(self, message.id, stdio, deadline)
        except ConflictError:  # taken meanwhile
            return None
        undo.callback(one.abandon)
        one.read(message)
        return one

    def _take_all(
        self, under_way: list[_Restoration], tasks: dict[str, task_pb2.Process]
    ) -> Iterable[tuple[_Restoration, Restored | Exception]]:
        """Take over what was listed; those that more is to be asked for side by side, for a shim may not answer."""

        def in_doubt(one: _Restoration) -> bool:
            # A task whose shim does not answer is left out of the list, or (by 1.6) is there without its state.
            task = tasks.get(one.container.id)
            return bool(one.left) if task is None else task.status == task_pb2.Status.UNKNOWN

        def take(one: _Restoration) -> Restored | Exception:
            try:
                task = tasks.get(one.container.id)
                if in_doubt(one):
                    one.limit(_ONE_SECONDS)
                    task = one.ask("")
                one.take(task)
                return one.finish()
            except Exception as error:  # noqa: BLE001 - reported
                one.abandon()  # now, for the others may need the descriptors
                return error

        asking = [one for one in under_way if one.left or in_doubt(one)]
        yield from ((one, take(one)) for one in under_way if not one.left and not in_doubt(one))
        if asking:
            with ThreadPoolExecutor(_MOST_AT_ONCE, thread_name_prefix="libcontainerd-restore") as pool:
                yield from zip(asking, pool.map(take, asking), strict=True)


class _Stdio:
    """What becomes of the stdio of what is restored."""

    def __init__(self, attach_stdio: cio.AttachStdio, attach_exec_stdio: AttachExecStdio | None) -> None:
        check_attach_stdio(attach_stdio)
        if attach_exec_stdio is not None:
            check_attach_stdio(attach_exec_stdio)
        self._of_init = attach_stdio
        self._of_execs = attach_exec_stdio

    def of(self, process: Process) -> cio.AttachStdio:
        """What to attach to a process; the output of execs that nobody asks for is discarded, lest they are stuck."""
        if not process.exec_id:
            return self._of_init
        if self._of_execs is None:
            return _DISCARD
        if isinstance(self._of_execs, cio.Destination):
            return self._of_execs
        return partial(self._of_execs, process.exec_id)


class _Restoration:
    """One container on its way back into the map. Of one thread at a time.

    Attributes:
        container: Its record: found by events from the beginning on, and by verbs after `finish`.
        doing: For errors' messages.
        left: The processes that have files in the bundle, and which.
    """

    def __init__(self, restorer: Restorer, container_id: str, stdio: _Stdio, deadline: Deadline) -> None:
        """Register the record.

        Raises:
            ConflictError: the id is in the map.
        """
        self._restorer = restorer
        self._stdio = stdio
        self._deadline = deadline
        self.doing = f"restore container {container_id!r}"
        self.container: Container = restorer.containers.reserve(container_id, "restore")
        self.left: dict[str, set[str]] = {}
        self._bundle: Bundle
        self._facts: SpecFacts
        self._reserved = {INIT_PROCESS_NAME: self.container.reserve_found(INIT_PROCESS_NAME)}
        self._holders: list[End] = []
        self._found: list[tuple[Process, task_pb2.Process]] = []
        self._without_stdin: list[Process] = []
        self._over = False

    def limit(self, seconds: float) -> None:
        """Take no longer than that from now on."""
        self._deadline = self._deadline.at_most(seconds)

    def read(self, message: containers_pb2.Container) -> None:
        """Take over what containerd's database has of it, and make way for the shim.

        Raises:
            SystemFailureError: the spec cannot be read.
        """
        name = self.container.id
        self._facts = read_facts(message)
        self._bundle = Bundle.find(
            self._restorer.state_dir, name, self._facts.owner, message.labels.get(BUNDLE_LABEL, "")
        )
        self.left = self._bundle.left_behind()
        for process_id, files in self.left.items():
            if process_id not in (INIT_PROCESS_NAME, name):
                self._reserved[process_id] = self.container.reserve_found(process_id)
            # A start that was under way when its client died keeps its shim silent until readers come.
            for each in ("stdout", "stderr"):
                if each in files:
                    with suppress(OSError):
                        path = os.path.join(self._bundle.path, f"{process_id}-{each}")
                        self._holders.append(End(path, os.O_RDONLY))

    def ask(self, exec_id: str) -> task_pb2.Process | None:
        """Ask for init, or an exec; None where containerd knows of none.

        Raises:
            LibcontainerdError: there was no answer.
        """
        connection = self._restorer.connection
        request = tasks_pb2.GetRequest(container_id=self.container.id, exec_id=exec_id)
        while True:
            try:
                found = connection.call(
                    connection.tasks.Get, request, doing=self.doing, deadline=self._deadline
                ).process
            except NotFoundError:
                return None
            if found.status != task_pb2.Status.UNKNOWN:
                return found
            # containerd 1.6 answers so, without pid and FIFOs, where a shim has not told it in two seconds.
            self._restorer.cut.wait(_PAUSE_SECONDS)

    def take(self, task: task_pb2.Process | None, *, thorough: bool = False) -> None:
        """Find the processes and attach their stdio.

        Args:
            task: The init process, if there is a task.
            thorough: Ask for execs that have no files in the bundle, too; otherwise only where the bundle is gone.

        Raises:
            LibcontainerdError: there was no answer, or a FIFO cannot be opened.
            Exception: what the user's callback raised.
        """
        if task is None:
            self._bundle.ensure()
            return
        self._attach(self._reserved[INIT_PROCESS_NAME], task)
        alive = task.status != task_pb2.Status.STOPPED
        if alive and (thorough or not os.path.isdir(self._bundle.path)):
            for exec_id in self._unmarked_execs(task.pid):
                self._reserved[exec_id] = self.container.reserve_found(exec_id)
        for exec_id, process in self._reserved.items():
            if exec_id != INIT_PROCESS_NAME and (answer := self._ask_for_exec(exec_id)) is not None:
                self._attach(process, answer)

    def _unmarked_execs(self, init: int) -> list[str]:
        """The execs that run, are ours, and have no files in the bundle."""
        connection = self._restorer.connection
        request = tasks_pb2.ListPidsRequest(container_id=self.container.id)
        try:
            answer = connection.call(
                connection.tasks.ListPids, request, doing=self.doing, deadline=self._deadline
            )
        except (NotFoundError, FailedPreconditionError):
            return []
        names = {catchup.process_name(info, init) for info in answer.processes}
        return [
            name
            for name in sorted(names - {"", INIT_PROCESS_NAME} - self.left.keys())
            # Paths are made of it.
            if is_identifier(name) and (found := self.ask(name)) is not None and self._is_ours(name, found)
        ]

    def _is_ours(self, exec_id: str, found: task_pb2.Process) -> bool:
        """What others have started in our container is theirs to delete; ours have FIFOs in the bundle, or a mark."""
        if not os.path.isdir(self._bundle.path) and not found.stdout:
            return True
        fifos = self._fifos(exec_id, found)
        return found.stdout == fifos.stdout

    def _ask_for_exec(self, exec_id: str) -> task_pb2.Process | None:
        """Ask for an exec; one that was never started is deleted, for nobody is there to start it."""
        answer = self.ask(exec_id)
        if answer is None or answer.status != task_pb2.Status.CREATED:
            return answer
        process = self._reserved[exec_id]
        try:
            with self._restorer.shelter.enter(self.doing) as calls:
                cleanup.delete_process(
                    calls, self.container, process, doing=self.doing, deadline=self._deadline
                )
        except NotFoundError:
            return None
        except FailedPreconditionError:
            return self.ask(exec_id)  # its start was under way
        return None

    def _fifos(self, process_id: str, answer: task_pb2.Process) -> FifoSet:
        terminal = self._facts.terminal if process_id == INIT_PROCESS_NAME else answer.terminal
        return FifoSet.within(self._bundle.path, process_id, with_stdin=bool(answer.stdin), terminal=terminal)

    def _attach(self, process: Process, answer: task_pb2.Process) -> None:
        fifos = self._fifos(process.id, answer)
        attach = self._stdio.of(process)
        if (answer.stdout, answer.stderr if fifos.stderr else "") != (fifos.stdout, fifos.stderr):
            attach = cio.null_io  # it was given no FIFOs, or others than ours
        elif isinstance(attach, cio.Destination):
            self._say("stdio_left_unread", process)
        else:
            without = FifoSet("", fifos.stdout, fifos.stderr, fifos.terminal)
            if not fifos.there():
                if fifos.stdin and without.there():
                    self._without_stdin.append(process)
                    fifos = without
                else:
                    self._say("stdio_gone", process)
                    attach = cio.null_io
        attached = Attached.restore(
            attach,
            fifos,
            on_stdin_close=partial(self._restorer.stdin.owner_closed, self.container, process),
            name=(self.container.id, process.id),
            mark=self._bundle.mark_of(process.exec_id),
        )
        self.container.attach(process, attached)
        self._found.append((process, answer))

    def _say(self, event: str, process: Process) -> None:
        self._restorer.log.warning(event, container=self.container.id, exec=process.exec_id)

    def finish(self) -> Restored:
        """Publish the record; what has ended meanwhile is told. From here on nothing of the restoration itself can fail.

        Raises:
            CallCancelledError: the client was closed meanwhile.
        """
        container = self.container
        for process, answer in self._found:
            self._adopt(process, answer)
        self._forget_the_rest()
        container.kept = self._facts.keeps_exits  # also without a task: nobody may have let it go
        container.publish(self._bundle, self._facts)
        self._restorer.containers.publish(container)
        self._over = True
        self._close_holders()
        for process, answer in self._found:
            self._release(process, answer)
        for process in self._without_stdin:
            self._restorer.stdin.ended_before(container, process)
        if self._restorer.cut.is_set():
            for attached in container.attached():
                attached.abandon()
            raise CallCancelledError(f"cannot {self.doing}: the client was closed meanwhile")
        alive, pid, execs = False, 0, {}
        for process, answer in self._found:
            runs = answer.status != task_pb2.Status.STOPPED
            if not process.exec_id:
                alive, pid = runs, answer.pid
            elif runs:
                execs[process.id] = answer.pid
        if execs and not alive:
            self._restorer.delivery.follow_execs(container)
        return Restored(alive, pid, execs)

    def _adopt(self, process: Process, answer: task_pb2.Process) -> None:
        state = _STATE.get(answer.status, State.RUNNING)
        if not process.exec_id:
            self.container.adopt(process, state, answer.pid, _exit_of(answer))
        else:  # one that is frozen is so with its container, whose state that is; one that has ended is told of below
            self.container.adopt(process, State.RUNNING, answer.pid)

    def _release(self, process: Process, answer: task_pb2.Process) -> None:
        """Let the verbs, and what follows an exit, have a process."""
        self.container.made(process)
        ended = _exit_of(answer)
        if process.attached is not None and ended is None:
            process.attached.process_is_there()
        elif process.attached is not None:
            process.attached.process_ended()
        if process.exec_id and ended is not None:
            self._restorer.delivery.conclude(self.container, process, ended, answer.pid)

    def living(self) -> list[Process]:
        """The processes whose exits are not known."""
        return self.container.running()

    def _forget_the_rest(self) -> None:
        """What has files here, and is not in containerd."""
        found = {process.id for process, _ in self._found}
        for process in self._reserved.values():
            if process.id not in found:
                self.container.forget(process)
        for process_id, files in self.left.items():
            if process_id not in found:
                self._bundle.forget(process_id, files)

    def _close_holders(self) -> None:
        holders, self._holders = self._holders, []
        for each in holders:
            each.close()

    def abandon(self) -> None:
        """It failed: close what was opened, and leave no record. Does nothing after `finish`, or again."""
        if self._over:
            return
        self._over = True
        self._restorer.containers.release(self.container)
        for process, _ in self._found:
            if process.attached is not None:
                with suppress(OSError):
                    process.attached.abandon()
        self._close_holders()


def _exit_of(answer: task_pb2.Process) -> ExitStatus | None:
    if answer.status != task_pb2.Status.STOPPED:
        return None
    return catchup.exit_status(answer.exit_status, answer.exited_at)
