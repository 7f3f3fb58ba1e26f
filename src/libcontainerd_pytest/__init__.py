"""The pytest plugin: the fixtures `containerd`, `libcontainerd_backend` and `libcontainerd_client`.

pytest imports it in every run of every project in whose environment this library is. So it is a package of its own, that
imports nothing of `libcontainerd` before a fixture is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from libcontainerd import Client
    from libcontainerd.backends import RecordingBackend
    from libcontainerd.testing import FakeContainerd

_MARKER = 'containerd(runtime="scripted", version="1.6"): the arguments of the FakeContainerd that the fixture of that name gives'
_NAMESPACE = "test"


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", _MARKER)


@pytest.fixture
def containerd(request: pytest.FixtureRequest) -> Iterator[FakeContainerd]:
    """A `FakeContainerd` of the test's own; ``@pytest.mark.containerd(runtime="host")`` has processes really run."""
    from libcontainerd.testing import FakeContainerd  # noqa: PLC0415 - see the module's docstring

    marker = request.node.get_closest_marker("containerd")
    with FakeContainerd(**({} if marker is None else marker.kwargs)) as fake:
        yield fake


@pytest.fixture
def libcontainerd_backend() -> RecordingBackend:
    """Keeps the events of `libcontainerd_client`, and waits for one."""
    from libcontainerd.backends import RecordingBackend  # noqa: PLC0415 - see the module's docstring

    return RecordingBackend()


@pytest.fixture
def libcontainerd_client(
    containerd: FakeContainerd, libcontainerd_backend: RecordingBackend
) -> Iterator[Client]:
    """A `Client` of `containerd`, in the namespace ``test``."""
    from libcontainerd import Client  # noqa: PLC0415 - see the module's docstring

    with Client(
        containerd.address,
        namespace=_NAMESPACE,
        state_dir=containerd.state_dir,
        backend=libcontainerd_backend,
    ) as client:
        yield client
