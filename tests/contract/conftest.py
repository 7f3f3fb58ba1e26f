"""One contract, several servers: the fake with either runtime, and every real containerd at hand."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import grpc
import pytest

from libcontainerd import Client, Remote
from libcontainerd.backends import RecordingBackend
from libcontainerd.testing import FakeContainerd
from libcontainerd.testing.releases import RELEASES
from tests import servers
from tests.conftest import USED
from tests.contract import programs
from tests.contract.servers import Server, Services, Subscription
from tests.integration.containers import divert_log, shims_of, wait_until

# Tests keep content and snapshots that nothing refers to: no garbage collection may come upon them in between.
_NO_COLLECTION = {
    "io.containerd.gc.v1.scheduler": {
        "deletion_threshold": 0,
        "mutation_threshold": 1_000_000,
        "startup_delay": "24h",
    }
}
_SERVERS = (
    "fake, scripted runtime",
    "fake, host runtime",
    pytest.param("containerd", marks=pytest.mark.real),
)


@contextmanager
def _fake(name: str, rootfs: Path) -> Iterator[Server]:
    scripted = "scripted" in name
    version = next((each for each in RELEASES if f"fake {each}," in name), "1.6")
    with FakeContainerd(
        "scripted" if scripted else "host",
        version=version,  # type: ignore[arg-type]  # one of them
        stdio_timeout=2.0,
    ) as fake:
        if scripted:
            programs.script(fake)
        yield Server(name, fake.address, rootfs, RELEASES[version].number, real=False)


def fake_like(real: Server, runtime: str) -> str:
    """The name of a fake that behaves as a real containerd's release, or as the last before it that the fake knows."""
    release = max(
        (each for each in RELEASES.items() if each[1].number <= real.release), key=lambda each: each[1].number
    )
    return f"fake {release[0]}, {runtime} runtime"


@contextmanager
def _real(binary: Path, rootfs: Path, *, criu: bool) -> Iterator[Server]:
    """A containerd without garbage collection, or one with criu: checkpoints have their remains collected."""
    directory = Path(tempfile.mkdtemp(prefix="lcd-"))
    directory.chmod(0o755)
    try:
        path_prefix, environment = servers.find_criu().prepare(directory) if criu else ("", {})
        with Remote.start(
            directory / "root",
            directory / "state",
            binary=str(binary),
            path_prefix=path_prefix,
            environment=environment,
            plugins={} if criu else _NO_COLLECTION,
        ) as remote:
            divert_log(remote, print)
            with remote.new_client("version") as client:
                version = client.version().version
            yield Server(
                f"containerd {version}", remote.address, rootfs, servers.release_of(version), real=True
            )
            wait_until(lambda: not shims_of(remote.address), "all shims have ended")
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def make_server(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Server]]:
    """Starts each server once, when the first test asks for it."""
    started: dict[str, Server] = {}
    with ExitStack() as stack:

        def make(name: str) -> Server:
            if name not in started:
                if name in ("containerd", "containerd, criu"):
                    binary: Path = request.getfixturevalue("containerd_binary")
                    server = _real(binary, request.getfixturevalue("rootfs"), criu="criu" in name)
                else:
                    server = _fake(name, Path("/"))
                started[name] = stack.enter_context(server)
            return started[name]

        yield make


@pytest.fixture(params=_SERVERS)
def server(
    request: pytest.FixtureRequest, make_server: Callable[[str], Server], pytestconfig: pytest.Config
) -> Server:
    """The server under contract."""
    made = make_server(request.param)
    pytestconfig.stash[USED][made.name] += 1
    return made


@pytest.fixture
def namespace() -> Iterator[str]:
    """A namespace of the test's own."""
    name = f"t-{uuid.uuid4().hex[:10]}"
    yield name
    with suppress(FileNotFoundError):  # what runc leaves of a namespace, and shares with other containerds
        Path("/run/containerd/runc", name).rmdir()


@pytest.fixture
def services(server: Server, namespace: str) -> Iterator[Services]:
    """The server past the client. What the test leaves in its namespace is removed."""
    with grpc.insecure_channel(
        f"unix:{server.address}", options=(("grpc.default_authority", "localhost"),)
    ) as channel:
        made = Services(channel, namespace, server.rootfs, server.release)
        try:
            yield made
        finally:
            made.remove_everything()


@pytest.fixture
def backend() -> RecordingBackend:
    """Keeps the client's events."""
    return RecordingBackend()


@pytest.fixture
def client(
    server: Server, namespace: str, backend: RecordingBackend, services: Services, tmp_path: Path
) -> Iterator[Client]:
    """A client of the test's namespace."""
    made = Client(
        server.address,
        namespace=namespace,
        state_dir=tmp_path / "state",
        backend=backend,
        default_timeout=60.0,
    )
    try:
        yield made
    finally:
        services.remove_everything()
        made.close()


@pytest.fixture
def subscribe(services: Services) -> Iterator[Callable[..., Subscription]]:
    """Subscribes past the client: `subscribe("topic~=|^/tasks/|")`, by default to all of the test's namespace.

    With `everywhere` to other namespaces, too, where the last events of the tests before may still arrive.
    """
    with ExitStack() as stack:

        def make(*filters: str, everywhere: bool = False) -> Subscription:
            here = f"namespace=={services.namespace}"
            if not everywhere:
                filters = tuple(f"{here},{each}" for each in filters) or (here,)
            subscription = Subscription(services, filters)
            stack.callback(subscription.close)
            return subscription

        yield make
