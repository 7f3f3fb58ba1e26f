"""Starting a process, init or exec: its record reserved, its IO attached, then containerd asked; or all of it taken back."""

from __future__ import annotations

import re
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

from libcontainerd import _cleanup as cleanup
from libcontainerd import _keeping as keeping
from libcontainerd._records import Step
from libcontainerd._runtime import is_runc, task_options
from libcontainerd._wire import typeurl
from libcontainerd._wire.connection import NotSentError
from libcontainerd._wire.identifiers import check_identifier
from libcontainerd._wire.pb.services import tasks_pb2
from libcontainerd.cio.attached import Attached
from libcontainerd.cio.fifo import FifoSet
from libcontainerd.errors import (
    ConflictError,
    FailedPreconditionError,
    InvalidParameterError,
    LibcontainerdError,
)
from libcontainerd.types import INIT_PROCESS_NAME

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Mapping

    from libcontainerd import oci
    from libcontainerd._checkpoint import Checkpoints
    from libcontainerd._records import Container, ContainerMap, Process
    from libcontainerd._stdin import StdinCloser
    from libcontainerd._wire.connection import Deadline
    from libcontainerd._wire.shelter import Lease, Shelter
    from libcontainerd.cio import AttachStdio


_PAUSED: Final = re.compile(r"\bin a paused (?:state|container)\b")
"""The runtime's word, which no code says; a freeze's event may be still on its way."""


class Starter:
    """Starts a client's processes. Thread-safe; what the verbs promise and raise is said at `Client.start` and `Client.exec`."""

    def __init__(
        self,
        shelter: Shelter,
        containers: ContainerMap,
        stdin: StdinCloser,
        checkpoints: Callable[[], Checkpoints],
        cut: threading.Event,
    ) -> None:
        self._shelter = shelter
        self._checkpoints = checkpoints
        self._containers = containers
        self._stdin = stdin
        self._cut = cut

    def start(
        self,
        container_id: str,
        *,
        checkpoint_dir: str | None,
        with_stdin: bool,
        attach_stdio: AttachStdio,
        deadline: Deadline,
    ) -> int:
        """Create and start a container's task, perhaps from a checkpoint; the pid of its init."""
        doing = f"start container {container_id!r}"
        container = self._containers.get(container_id, doing)
        facts = container.facts
        terminal = facts.terminal
        saved = None
        if checkpoint_dir is not None:
            from libcontainerd._checkpoint import surveyed  # noqa: PLC0415 - for those who restore one

            saved = surveyed(checkpoint_dir, doing)
        with ExitStack() as stack:
            calls, task = stack.enter_context(self._making(container, container.reserve_task, doing))
            checkpoint = None
            if saved is not None:
                checkpoint = stack.enter_context(self._checkpoints().uploaded(calls, saved, doing, deadline))
            attached = self._attach(
                container, task, with_stdin=with_stdin, terminal=terminal, attach_stdio=attach_stdio
            )
            created = cleanup.make_task(
                calls,
                tasks_pb2.CreateTaskRequest(
                    container_id=container_id,
                    terminal=terminal,
                    stdin=attached.stdin,
                    stdout=attached.stdout,
                    stderr=attached.stderr,
                    checkpoint=checkpoint,
                    options=task_options(facts.options, facts.owner, facts.runtime),
                ),
                cut=self._cut,
                doing=doing,
                deadline=deadline,
            )
            container.advance(task, Step.CREATE, created.pid)
            if facts.keeps_exits:
                keeping.keep(calls, container, doing=doing, deadline=deadline)
            # The end of a terminal's input is a hang-up, which no process would live to be started; and the shim opens the
            # FIFOs of a restored one in Start.
            if not terminal and checkpoint is None:
                attached.process_is_there()
            with _criu_says_why(checkpoint is not None):
                started = calls.call(
                    calls.tasks.Start,
                    tasks_pb2.StartRequest(container_id=container_id),
                    doing=doing,
                    deadline=deadline,
                )
            container.advance(task, Step.START, started.pid)
            attached.process_is_there()
        return started.pid or created.pid

    def exec(
        self,
        container_id: str,
        process_id: str,
        process: oci.Process | Mapping[str, object],
        *,
        with_stdin: bool,
        attach_stdio: AttachStdio,
        deadline: Deadline,
    ) -> int:
        """Start a further process in a running container; its pid."""
        # pydantic's 80 ms are for those who start execs
        from libcontainerd import oci  # noqa: PLC0415
        from libcontainerd.oci._document import checked_process  # noqa: PLC0415

        check_identifier("exec id", process_id)
        if process_id in (INIT_PROCESS_NAME, container_id):
            raise InvalidParameterError(f"exec id {process_id!r} is what the init process is called")
        model = checked_process(process)
        document = oci.dump(model)
        terminal = bool(model.terminal)
        doing = f"exec {process_id!r} in container {container_id!r}"
        container = self._containers.get(container_id, doing)
        reserve = partial(container.reserve_exec, process_id)
        with _refused_when_ended(container), self._making(container, reserve, doing) as (calls, record):
            attached = self._attach(
                container, record, with_stdin=with_stdin, terminal=terminal, attach_stdio=attach_stdio
            )
            calls.call(
                calls.tasks.Exec,
                tasks_pb2.ExecProcessRequest(
                    container_id=container_id,
                    exec_id=process_id,
                    terminal=terminal,
                    stdin=attached.stdin,
                    stdout=attached.stdout,
                    stderr=attached.stderr,
                    spec=typeurl.pack_json(typeurl.PROCESS_URL, document),
                ),
                doing=doing,
                deadline=deadline,
            )
            container.advance(record, Step.CREATE)
            started = calls.call(
                calls.tasks.Start,
                tasks_pb2.StartRequest(container_id=container_id, exec_id=process_id),
                doing=doing,
                deadline=deadline,
            )
            container.advance(record, Step.START, started.pid)
            attached.process_is_there()
        return started.pid

    def _attach(
        self,
        container: Container,
        process: Process,
        *,
        with_stdin: bool,
        terminal: bool,
        attach_stdio: AttachStdio,
    ) -> Attached:
        bundle = container.require_bundle()
        bundle.ensure()
        attached = Attached.attach(
            attach_stdio,
            FifoSet.within(bundle.path, process.id, with_stdin=with_stdin, terminal=terminal),
            owner=bundle.owner,
            on_stdin_close=partial(self._stdin.owner_closed, container, process),
            name=(container.id, process.id),
            mark=bundle.mark_of(process.exec_id),
            runc=is_runc(container.facts.runtime),
        )
        container.attach(process, attached)
        return attached

    @contextmanager
    def _making(
        self, container: Container, reserve: Callable[[], Process], doing: str
    ) -> Iterator[tuple[Lease, Process]]:
        """Reserve a process, and take back all that was made of it if the block fails."""
        with self._shelter.enter(doing) as calls:
            process = reserve()
            try:
                yield calls, process
            except BaseException as error:
                # What was never asked for is not there; what somebody else has under that name is not ours to remove.
                unmade = isinstance(error, ConflictError | NotSentError) and not container.is_ours(process)
                try:
                    if process.attached is not None and not unmade:
                        cleanup.remove_process(calls, container, process)
                    if process.attached is not None:
                        container.remove_files(process.attached)
                        process.attached.discard()
                finally:
                    container.forget(process)
                raise
            finally:
                container.made(process)
            if self._cut.is_set() and process.attached is not None:
                process.attached.abandon()  # it was answered while `close` went by


@contextmanager
def _criu_says_why(restoring: bool) -> Iterator[None]:
    """Add criu's reason to the failure of a restore, while its log is still there."""
    try:
        yield
    except LibcontainerdError as error:
        if not restoring:
            raise
        from libcontainerd._checkpoint import with_criu_log  # noqa: PLC0415 - likewise

        raise with_criu_log(error) from error


@contextmanager
def _refused_when_ended(container: Container) -> Iterator[None]:
    """Say an exec's failure in a container that has just ended like one in a container that had ended before."""
    try:
        yield
    except FailedPreconditionError as error:
        if container.is_paused() or _PAUSED.search(str(error)):
            raise
        raise InvalidParameterError(f"{error}: container is not running") from error
