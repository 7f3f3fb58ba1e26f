"""A containerd of our own for the whole run, and for each test a namespace, a client and a look past the client."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import uuid
from collections import deque
from collections.abc import Generator, Iterator, MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
import structlog

from libcontainerd import Client, Remote, oci
from libcontainerd.backends import RecordingBackend
from tests import servers
from tests.integration.containers import MakeSpec, Raw, divert_log, kill_shims, shims_of, wait_until

_LOG_LINES = 2000
_log: deque[str] = deque(maxlen=_LOG_LINES)
"""What containerd and the library logged during the current test; shown when it fails."""


def _keep(_logger: object, level: str, event: MutableMapping[str, object]) -> MutableMapping[str, object]:
    fields = " ".join(f"{key}={value!r}" for key, value in event.items() if key != "event")
    _log.append(f"{level}: {event.get('event')} {fields}")
    raise structlog.DropEvent


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin each test's log anew."""
    _log.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the log with a failure."""
    report = yield
    if report.failed and _log:
        report.sections.append(("log of containerd and the library", "\n".join(_log)))
    return report


# -------------------------------------------------------------------------------------------------- for the whole run


@pytest.fixture(scope="session")
def remote(containerd_binary: Path) -> Iterator[Remote]:
    """A containerd of our own, in a directory short enough for sockets. No shim of it may be left at the end."""
    before = structlog.get_config()
    structlog.configure(processors=[_keep])
    directory = Path(tempfile.mkdtemp(prefix="lcd-"))
    directory.chmod(0o755)
    try:
        path_prefix, environment = servers.find_criu().prepare(directory)
        with Remote.start(
            directory / "root",
            directory / "state",
            log_level="info",
            binary=str(containerd_binary),
            path_prefix=path_prefix,
            environment=environment,
        ) as started:
            divert_log(started, lambda line: _log.append(f"containerd: {line}"))
            yield started
            try:
                wait_until(lambda: not shims_of(started.address), "all shims have ended")
            finally:
                kill_shims(started.address)
    finally:
        structlog.configure(**before)
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def raw_channel(remote: Remote) -> Iterator[grpc.Channel]:
    """A channel past the library."""
    with grpc.insecure_channel(
        f"unix:{remote.address}", options=(("grpc.default_authority", "localhost"),)
    ) as channel:
        yield channel


# ------------------------------------------------------------------------------------------------------ for each test


@pytest.fixture
def namespace() -> Iterator[str]:
    """A namespace of the test's own."""
    name = f"t-{uuid.uuid4().hex[:10]}"
    yield name
    with suppress(FileNotFoundError):  # what runc leaves of a namespace, and shares with other containerds
        Path("/run/containerd/runc", name).rmdir()


@pytest.fixture
def raw(raw_channel: grpc.Channel, namespace: str) -> Raw:
    """What containerd itself knows of the test's namespace."""
    return Raw(raw_channel, namespace)


@pytest.fixture
def backend() -> RecordingBackend:
    """Keeps the client's events."""
    return RecordingBackend()


@pytest.fixture
def client(remote: Remote, namespace: str, backend: RecordingBackend, raw: Raw) -> Iterator[Client]:
    """A client of the test's namespace. What the test leaves in containerd is removed past the client."""
    made = remote.new_client(namespace, backend)
    try:
        yield made
    finally:
        raw.remove_everything()
        made.close()
    assert made.closed
    assert not raw.tasks_by_id()
    assert not raw.container_ids()


@pytest.fixture
def spec(rootfs: Path, namespace: str) -> MakeSpec:
    """Makes specs: `spec("sh", "-c", "...")`."""
    numbers = itertools.count(1)

    def make(*args: str, options: Sequence[oci.SpecOption] = ()) -> oci.Spec:
        return oci.build(
            oci.default_spec(),
            oci.with_rootfs(rootfs, readonly=True),
            oci.with_mounts(
                oci.Mount(destination="/tmp", type="tmpfs", source="tmpfs", options=["nosuid", "nodev"])
            ),
            # By default runc takes the container's id, which another namespace may use at the same time.
            oci.with_cgroup_path(f"/libcontainerd-{namespace}-{next(numbers)}"),
            *([oci.with_args(*args)] if args else []),
            *options,
        )

    return make
