"""A container's life on a real containerd: made, started, looked at, paused, ended, removed; and its events."""

from __future__ import annotations

from libcontainerd import Client
from tests.integration.containers import MakeSpec, run


def test_the_version_is_containerds(client: Client) -> None:
    version = client.version()
    assert version.version[0].isdigit()
    assert version.revision


def test_smoke(client: Client, spec: MakeSpec) -> None:
    result = run(client, "c", spec("sh", "-c", "echo hi; exit 3"))
    assert (result.out, result.status.code) == (b"hi\n", 3)
