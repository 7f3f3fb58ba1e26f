"""The shortest program of its kind: imports, a connection, one answer. ``python -m benchmarks.first_reply PEER ADDRESS ...``."""

from __future__ import annotations

import sys


def answer() -> None:
    """Answer like a peer, and wait until it was seen how much memory that took."""
    print("{}", flush=True)
    sys.stdin.readline()
    sys.stdin.readline()


def library(address: str, namespace: str, directory: str) -> None:
    """A `Client`, which subscribes before it is there."""
    from libcontainerd import Client  # noqa: PLC0415 - what is imported is what is measured

    with Client(address, namespace=namespace, state_dir=f"{directory}/first") as client:
        client.version()
        answer()


def stubs(address: str, _namespace: str, _directory: str) -> None:
    """A channel and a stub."""
    from benchmarks import bare_stubs  # noqa: PLC0415 - likewise

    bare_stubs.install()
    import grpc  # noqa: PLC0415 - likewise

    from libcontainerd._wire.pb.services import version_pb2  # noqa: PLC0415 - likewise
    from libcontainerd._wire.pb.wellknown_pb2 import Empty  # noqa: PLC0415 - likewise

    options = (("grpc.default_authority", "localhost"),)
    with grpc.insecure_channel(f"unix:{address}", options=options) as channel:
        version_pb2.VersionStub(channel).Version(Empty())
        answer()


if __name__ == "__main__":
    _, peer, *where = sys.argv
    {"library": library, "stubs": stubs}[peer](*where)
