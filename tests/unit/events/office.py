"""A delivery and a patrol with all that they need, for tests of either."""

from __future__ import annotations

import os
from pathlib import Path

from libcontainerd import cio
from libcontainerd._bundle import Bundle
from libcontainerd._events.delivery import Delivery
from libcontainerd._events.patrol import Patrol
from libcontainerd._events.serial import SerialQueue
from libcontainerd._events.strays import Strays
from libcontainerd._records import Container, ContainerMap, Process, SpecFacts, Step
from libcontainerd._wire import typeurl
from libcontainerd._wire.connection import NAMESPACE_HEADER, Address, Connection
from libcontainerd._wire.pb.events import task_pb2 as task_events
from libcontainerd._wire.pb.types import event_pb2, task_pb2
from libcontainerd._wire.pb.wellknown_pb2 import Any
from libcontainerd._wire.shelter import Shelter
from libcontainerd.cio.attached import Attached
from libcontainerd.cio.fifo import FifoSet
from libcontainerd.types import EventInfo, EventType
from tests.unit.beside import DEADLINE
from tests.unit.server import Process as ServedProcess
from tests.unit.server import Scripted

FACTS = SpecFacts(terminal=False, owner=(0, 0), options=None)
ME = (os.geteuid(), os.getegid())


class Office:
    """A delivery with all that it needs, a backend that remembers, and containers in the server and in the records."""

    def __init__(self, server: Scripted, directory: Path) -> None:
        self.server = server
        self.directory = directory
        self.connection = Connection(Address(server.path, with_credentials=False), namespace="test")
        self.shelter = Shelter(
            Address(server.path, with_credentials=False), ((NAMESPACE_HEADER, "test"),), None
        )
        self.containers = ContainerMap()
        self.background = SerialQueue("background")
        self.events: list[tuple[EventType, EventInfo]] = []
        self.delivery = Delivery(self.connection, self.shelter, self.containers, self, self.background)
        self.strays = Strays(self.connection, self.shelter, self.containers, self.background, str(directory))
        self.patrol = Patrol(self.connection, self.containers, self.delivery, self.background, self.strays)

    def process_event(self, container_id: str, event: EventType, info: EventInfo, /) -> object:
        self.events.append((event, info))
        return None

    @property
    def exits(self) -> list[tuple[str, int]]:
        """Whose exits were delivered, and their codes."""
        return [
            (info.process_id, info.exit_code) for event, info in list(self.events) if event is EventType.EXIT
        ]

    def run(self, container_id: str) -> tuple[Container, Process]:
        """Have a container run."""
        container = self.containers.reserve(container_id)
        container.publish(Bundle(str(self.directory), (0, 0)), FACTS)
        return container, self._start(container, container.reserve_task(), "")

    def exec(self, container: Container, exec_id: str) -> Process:
        """Have an exec run in it."""
        return self._start(container, container.reserve_exec(exec_id), exec_id)

    def _start(self, container: Container, process: Process, exec_id: str) -> Process:
        pid = self.server.new_pid()
        self.server.processes[container.id, exec_id] = ServedProcess(pid, task_pb2.Status.RUNNING)
        container.advance(process, Step.CREATE, pid)
        container.advance(process, Step.START, pid)
        container.made(process)
        return process

    def attach(self, container: Container, process: Process, stdio: cio.AttachStdio) -> Attached:
        """Give a process its IO."""
        fifos = FifoSet.within(str(self.directory), process.id, with_stdin=False, terminal=False)
        attached = Attached.attach(stdio, fifos, owner=ME, on_stdin_close=lambda _: None)
        container.attach(process, attached)
        return attached

    def tell(self, topic: str, message: task_events.TaskExit | Any) -> None:
        """Hand on an event as the reading thread does."""
        event = message if isinstance(message, Any) else typeurl.pack(message)
        self.delivery.receive(event_pb2.Envelope(namespace="test", topic=topic, event=event))

    def tell_task(self, message: task_events.TaskPaused | task_events.TaskResumed) -> None:
        """Hand on an event of a task's."""
        self.tell("/tasks/task", typeurl.pack(message))

    def tell_exit(self, container: Container, process: Process, code: int = 0) -> None:
        name = process.exec_id or container.id
        self.tell(
            "/tasks/exit",
            task_events.TaskExit(container_id=container.id, id=name, pid=process.pid, exit_status=code),
        )

    def close(self) -> None:
        self.patrol.stop()
        self.delivery.close(DEADLINE)
        self.background.close(DEADLINE)
        self.delivery.shut_leftovers()
        self.connection.close()
        self.shelter.close()
        self.patrol.join(DEADLINE)
