"""For tests of programs that use this library: a containerd in the test's own process.

`FakeContainerd` is a real gRPC server on a unix socket, that the library's `Client` and containerd's own ``ctr`` take for a
containerd. Installing the library brings pytest the fixtures ``containerd`` and ``libcontainerd_client``.
"""

from __future__ import annotations

from libcontainerd.testing.calls import Call, CallLog, Fault
from libcontainerd.testing.scripted import (
    ProcessEndedError,
    Program,
    ScriptedProcess,
    echoes,
    fails_to_start,
    prints,
)
from libcontainerd.testing.server import FakeContainerd

__all__ = [
    "Call",
    "CallLog",
    "FakeContainerd",
    "Fault",
    "ProcessEndedError",
    "Program",
    "ScriptedProcess",
    "echoes",
    "fails_to_start",
    "prints",
]
