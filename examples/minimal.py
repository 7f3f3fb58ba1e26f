"""Run one program in a container, hand its output through, and clean up when it ends: what a daemon does, once.

python examples/minimal.py ADDRESS STATE_DIR ROOTFS PROGRAM [ARGUMENT...]
"""

import logging
import os
import queue
import sys

import structlog

from libcontainerd import Client, EventInfo, EventType, LibcontainerdError, cio, oci


class Daemon:
    """Its own client's backend."""

    def __init__(self, address: str, state_dir: str) -> None:
        self.ended: queue.Queue[int] = queue.Queue()
        self.client = Client(address, namespace="minimal", state_dir=state_dir, backend=self)

    def run(self, container_id: str, rootfs: str, *args: str) -> None:
        """Create and start a container."""
        spec = oci.build(oci.default_spec(), oci.with_rootfs(rootfs), oci.with_args(*args))
        self.client.create(container_id, spec)
        try:
            self.client.start(container_id, attach_stdio=cio.copy(stdout=1, stderr=2))
        except LibcontainerdError:  # no such program, say: the container is still ours to delete
            self.client.delete(container_id)
            raise

    def process_event(self, container_id: str, event: EventType, info: EventInfo) -> None:
        """Receive an event; its thread is ours for as long as we like, and every verb may be called."""
        if event is EventType.EXIT and info.process_id == container_id:  # of init, not of an exec
            self.client.delete_task(container_id)
            self.client.delete(container_id)
            self.ended.put(info.exit_code)


if __name__ == "__main__":
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    address, state_dir, rootfs, *args = sys.argv[1:]
    daemon = Daemon(address, os.path.abspath(state_dir))
    with daemon.client:
        daemon.run(f"minimal-{os.getpid()}", os.path.abspath(rootfs), *args)
        sys.exit(daemon.ended.get())
