"""Tasks of ours that have lost their container: a start that was cut off can come to light in containerd after its deletion.

Every call about a task asks for its container first, so nobody reaches such a task by chance. It is known for ours by its
FIFOs, which lie in our state directory; another's, or one that was given none, is left alone.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog

from libcontainerd import _cleanup as cleanup
from libcontainerd._wire.connection import Deadline
from libcontainerd._wire.pb.services import containers_pb2
from libcontainerd.errors import LibcontainerdError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from libcontainerd._events.serial import SerialQueue
    from libcontainerd._records import ContainerMap
    from libcontainerd._wire.connection import Connection
    from libcontainerd._wire.pb.types import task_pb2
    from libcontainerd._wire.shelter import Shelter

_ASK_SECONDS: Final = 10.0

_log = structlog.get_logger("libcontainerd")


class Strays:
    """Finds and ends such tasks. Thread-safe.

    Args:
        connection: For what is asked.
        shelter: For what is removed.
        containers: The map: what it has is no stray.
        background: Where the work is done.
        state_dir: Where our FIFOs are.
    """

    def __init__(
        self,
        connection: Connection,
        shelter: Shelter,
        containers: ContainerMap,
        background: SerialQueue,
        state_dir: str,
    ) -> None:
        self._connection = connection
        self._shelter = shelter
        self._containers = containers
        self._background = background
        self._below = os.path.join(state_dir, "")
        self._log = _log.bind(namespace=connection.namespace)

    def look(self, tasks: Mapping[str, task_pb2.Process]) -> None:
        """See that the strays among the namespace's tasks are ended, in the background.

        Args:
            tasks: What containerd lists, by container.
        """
        for container_id, task in tasks.items():
            if self._is_ours(task) and self._containers.find(container_id) is None:
                self._background.append((container_id, "stray"), partial(self._end, container_id, task))

    def _is_ours(self, task: task_pb2.Process) -> bool:
        paths = [path for path in (task.stdin, task.stdout, task.stderr) if path]
        return bool(paths) and all(
            path.startswith(self._below) and os.path.normpath(path) == path for path in paths
        )

    def _end(self, container_id: str, seen: task_pb2.Process) -> None:
        doing = f"end the task {container_id!r}, which has no container"

        def is_the_same(task: task_pb2.Process | None) -> bool:
            return task is not None and task.pid == seen.pid and self._is_ours(task)

        try:
            # After the task was seen: a container is made before its task.
            if self._containers.find(container_id) is not None or self._has_container(container_id, doing):
                return
            with self._shelter.enter(doing) as calls:
                ended = cleanup.end_orphan(calls, container_id, is_the_same, doing=doing)
        except LibcontainerdError as error:
            self._log.info("stray_not_ended", container=container_id, error=str(error))
            return
        if ended:
            self._log.warning("stray_ended", container=container_id, pid=seen.pid)

    def _has_container(self, container_id: str, doing: str) -> bool:
        request = containers_pb2.GetContainerRequest(id=container_id)
        try:
            self._connection.call(
                self._connection.containers.Get, request, doing=doing, deadline=Deadline(_ASK_SECONDS)
            )
        except NotFoundError:
            return False
        return True
