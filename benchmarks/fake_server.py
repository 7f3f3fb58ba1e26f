"""A FakeContainerd in a process of its own, for clients whose own cost is measured. It reads requests like a peer."""

from __future__ import annotations

import json
import sys
import time
from typing import cast

from benchmarks import logs
from libcontainerd._wire.pb.events import task_pb2
from libcontainerd._wire.pb.wellknown_pb2 import Timestamp
from libcontainerd.testing import FakeContainerd


def publish(fake: FakeContainerd, namespace: str, count: int, containers: int, first: int) -> None:
    """Publish the events of execs that somebody else runs, container after container."""
    now = Timestamp(seconds=int(time.time()))
    for number in range(count):
        container, each = f"b{number % containers}", number // containers
        run = first + each // 3  # an exit that was told before would be none
        name, pid = f"e{run}", 1_000_000 + run
        if each % 3 == 0:
            added = task_pb2.TaskExecAdded(container_id=container, exec_id=name)
            fake.publish(namespace, "/tasks/exec-added", added)
        elif each % 3 == 1:
            started = task_pb2.TaskExecStarted(container_id=container, exec_id=name, pid=pid)
            fake.publish(namespace, "/tasks/exec-started", started)
        else:
            ended = task_pb2.TaskExit(container_id=container, id=name, pid=pid, exit_status=7, exited_at=now)
            fake.publish(namespace, "/tasks/exit", ended)


def main() -> None:
    """Serve until the end of the input."""
    logs.to_stderr()
    with FakeContainerd() as fake:
        print(json.dumps({"address": fake.address, "state_dir": fake.state_dir}), flush=True)
        published = 0
        for line in sys.stdin:
            asked = cast("dict[str, int]", json.loads(line))
            if asked["count"]:
                publish(fake, "bench", asked["count"], asked["containers"], published)
                published += asked["count"]
            print(json.dumps({"calls": len(fake.calls.all())}), flush=True)
            fake.calls.clear()


if __name__ == "__main__":
    main()
