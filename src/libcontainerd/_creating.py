"""Making containers, and removing them: the record reserved, the bundle made, then containerd asked; or all of it taken back."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from libcontainerd import _cleanup as cleanup
from libcontainerd import _keeping as keeping
from libcontainerd._bundle import BUNDLE_LABEL, Bundle
from libcontainerd._records import Container, ContainerMap, Process, SpecFacts
from libcontainerd._runtime import (
    KEEP_LABEL,
    check_labels,
    check_runtime,
    container_options,
    mapped_root,
    options_for,
    read_facts,
    with_own_cgroup,
)
from libcontainerd._wire import typeurl
from libcontainerd._wire.identifiers import check_identifier
from libcontainerd._wire.pb.services import containers_pb2, tasks_pb2
from libcontainerd.errors import (
    CallCancelledError,
    ConflictError,
    DeadlineExceededError,
    FailedPreconditionError,
    LibcontainerdError,
    NotFoundError,
    SystemFailureError,
    UnavailableError,
)
from libcontainerd.types import INIT_PROCESS_NAME

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Mapping

    from google.protobuf.message import Message

    from libcontainerd import oci
    from libcontainerd._wire.connection import Connection, Deadline
    from libcontainerd._wire.pb.runc.options_pb2 import Options
    from libcontainerd._wire.shelter import Shelter

_OUTCOME_UNKNOWN: Final = (UnavailableError, DeadlineExceededError, CallCancelledError)
_REPLACEMENTS: Final = 3


class Creator:
    """Makes and removes a client's containers. Thread-safe; what the verbs promise and raise is said at `Client`."""

    def __init__(
        self,
        connection: Connection,
        shelter: Shelter,
        containers: ContainerMap,
        *,
        state_dir: str,
        runtime: str,
        runtime_options: Options | None,
        keep_exits: bool,
        end_task: Callable[[str, Deadline, str], None],
        cut: threading.Event,
    ) -> None:
        """Take what it works with.

        Args:
            connection: For what is asked, and for deletions.
            shelter: For what is made.
            containers: The map.
            state_dir: Where bundles are made.
            runtime: For containers that name none.
            runtime_options: Under those that a container is given.
            keep_exits: Whether containerd is to keep the exits of the containers that are made (`_keeping`).
            end_task: Kills and deletes a task that our records have.
            cut: Set once `close` has cut IO off.
        """
        self._connection = connection
        self._shelter = shelter
        self._containers = containers
        self._state_dir = state_dir
        self._runtime = runtime
        self._runtime_options = runtime_options
        self._keep_exits = keep_exits
        self._end_task = end_task
        self._cut = cut

    def create(
        self,
        container_id: str,
        spec: oci.Spec | Mapping[str, object],
        runtime_options: Message | Mapping[str, object] | None,
        *,
        runtime: str | None,
        labels: Mapping[str, str] | None,
        deadline: Deadline,
        first: Callable[[Container, str, Deadline], None] | None = None,
    ) -> None:
        """Create a container; do something first with what is there, before any verb can find it."""
        # pydantic's 80 ms are for those who make containers
        from libcontainerd import oci  # noqa: PLC0415
        from libcontainerd.oci._document import checked_spec  # noqa: PLC0415

        doing = f"create container {container_id!r}"
        check_identifier("container id", container_id)
        check_runtime(runtime or self._runtime)
        options = options_for(runtime or self._runtime, runtime_options, self._runtime_options)
        model = with_own_cgroup(checked_spec(spec), self._connection.namespace, container_id, options)
        document = oci.dump(model)
        facts = SpecFacts(
            terminal=bool(model.process is not None and model.process.terminal),
            owner=mapped_root(model),
            options=options,
            runtime=runtime or self._runtime,
            keeps_exits=self._keep_exits,
        )
        check_labels(labels or {})
        container = self._containers.reserve(container_id)
        with ExitStack() as undo:
            undo.callback(self._containers.release, container)
            bundle = Bundle.prepare(self._state_dir, container_id, facts.owner)
            undo.callback(bundle.undo)
            request = containers_pb2.CreateContainerRequest(
                container=containers_pb2.Container(
                    id=container_id,
                    labels={
                        **(labels or {}),
                        BUNDLE_LABEL: bundle.path,
                        **({KEEP_LABEL: "1"} if facts.keeps_exits else {}),
                    },
                    runtime=containers_pb2.Container.Runtime(
                        name=facts.runtime,
                        options=container_options(facts.runtime, options),
                    ),
                    spec=typeurl.pack_json(typeurl.SPEC_URL, document),
                )
            )
            with self._shelter.enter(doing) as calls:
                made = False
                try:
                    cleanup.make_container(calls, request, cut=self._cut, doing=doing, deadline=deadline)
                    made = True
                    if first is not None:
                        first(container, doing, deadline)
                except BaseException as error:
                    told = isinstance(error, LibcontainerdError) and not isinstance(error, _OUTCOME_UNKNOWN)
                    if made or not told:
                        cleanup.remove_container(calls, request.container)
                    raise
            undo.pop_all()
        container.publish(bundle, facts)
        self._containers.publish(container)

    def delete(self, container_id: str, deadline: Deadline) -> None:
        """Remove a container that has no task."""
        doing = f"delete container {container_id!r}"
        container = self._containers.get(container_id, doing)
        self._delete(container, doing, deadline, self._refuse_while_task_exists)

    def _delete(
        self,
        container: Container,
        doing: str,
        deadline: Deadline,
        first: Callable[[Container, str, Deadline], None],
    ) -> None:
        container.reserve_deletion()
        try:
            first(container, doing, deadline)
            if container.kept:
                with self._shelter.enter(doing) as calls:
                    keeping.let_go(calls, container, doing=doing, deadline=deadline)
            with suppress(NotFoundError):  # somebody else has removed it: what is left to do is ours
                self._connection.call(
                    self._connection.containers.Delete,
                    containers_pb2.DeleteContainerRequest(id=container.id),
                    doing=doing,
                    deadline=deadline,
                )
        except BaseException:
            container.release_deletion()
            raise
        try:
            container.yield_bundle()
            if container.bundle is not None:
                container.bundle.remove()
        finally:
            self._containers.remove(container)

    def _refuse_while_task_exists(self, container: Container, doing: str, deadline: Deadline) -> None:
        """Our record has no task; but somebody else may have started one, or a start was cut off and has left its shim."""
        request = tasks_pb2.GetRequest(container_id=container.id)
        try:
            self._connection.call(self._connection.tasks.Get, request, doing=doing, deadline=deadline)
        except NotFoundError as error:
            if cleanup.is_empty_shim(error):  # which nobody could reach any more without the container
                self._end_hidden_task(container, doing, deadline)
        else:
            raise FailedPreconditionError(f"cannot {doing}: a task exists that was not started here")

    def replace(
        self,
        container_id: str,
        spec: oci.Spec | Mapping[str, object],
        runtime_options: Message | Mapping[str, object] | None,
        *,
        runtime: str | None,
        labels: Mapping[str, str] | None,
        deadline: Deadline,
    ) -> None:
        """Create a container, after removing one of the same id, with its task."""
        create = partial(
            self.create,
            container_id,
            spec,
            runtime_options,
            runtime=runtime,
            labels=labels,
            deadline=deadline,
            first=self._end_hidden_task,
        )
        for _ in range(_REPLACEMENTS - 1):
            with suppress(ConflictError):
                create()
                return
            # What a client that has died had sent may arrive in containerd even now, so once may not be enough.
            self._clear(container_id, deadline)
        create()

    def _clear(self, container_id: str, deadline: Deadline) -> None:
        """Remove a container of that id, ours or one that only containerd knows, with its task."""
        doing = f"clear away the old container {container_id!r}"
        known = self._containers.find(container_id)
        if known is not None and known.ready:
            with suppress(NotFoundError):
                self._end_task(container_id, deadline, doing)
                self._delete(known, doing, deadline, self._end_hidden_task)
            return
        # Reserved, so that what another call is making under this id just now is not taken for the old one.
        unknown = self._containers.reserve(container_id)
        try:
            bundle = Bundle.find(self._state_dir, container_id, (0, 0), "")
            with self._shelter.enter(doing) as calls:
                with suppress(NotFoundError):
                    look = containers_pb2.GetContainerRequest(id=container_id)
                    found = calls.call(calls.containers.Get, look, doing=doing, deadline=deadline).container
                    bundle = self._bundle_of(found)
                    unknown.kept = KEEP_LABEL in found.labels
                init = Process(INIT_PROCESS_NAME)
                cleanup.end_process(calls, unknown, init, doing=doing, deadline=deadline)
                with suppress(NotFoundError):
                    deletion = containers_pb2.DeleteContainerRequest(id=container_id)
                    calls.call(calls.containers.Delete, deletion, doing=doing, deadline=deadline)
            bundle.remove()
        finally:
            self._containers.release(unknown)

    def _bundle_of(self, found: containers_pb2.Container) -> Bundle:
        """The bundle of a container that only containerd knows; one whose spec cannot be read is taken for root's."""
        owner = (0, 0)
        with suppress(SystemFailureError):
            owner = read_facts(found).owner
        return Bundle.find(self._state_dir, found.id, owner, found.labels.get(BUNDLE_LABEL, ""))

    def _end_hidden_task(self, container: Container, doing: str, deadline: Deadline) -> None:
        """End a task that our record does not have: of a start that was cut off, and came to light in containerd late."""
        with self._shelter.enter(doing) as calls:
            init = Process(INIT_PROCESS_NAME)
            cleanup.end_process(calls, container, init, doing=doing, deadline=deadline)
