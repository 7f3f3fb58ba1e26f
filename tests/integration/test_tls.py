"""A container's life over TCP with TLS. No containerd serves its API on TCP, so a proxy that speaks TLS stands before its socket."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from libcontainerd import Client, DeadlineExceededError, EventType, Remote, UnavailableError
from libcontainerd.backends import RecordingBackend
from tests.certificate import make_certificate
from tests.integration.containers import MakeSpec, Raw, run, run_exec, stop, wait_until

Connect = Callable[[grpc.ChannelCredentials, RecordingBackend, float], Client]


@contextmanager
def tls_before(socket_path: str, certificate: Path) -> Iterator[int]:
    """Serve what a unix socket serves on a TCP port of this machine, with TLS; give the port."""
    command = [sys.executable, str(Path(__file__).with_name("tls_proxy.py")), str(certificate), socket_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdout is not None
        try:
            yield int(proxy.stdout.readline())
        finally:
            proxy.kill()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def connect(remote: Remote, namespace: str, tmp_path: Path, certificate: Path) -> Iterator[Connect]:
    """Makes clients that talk TLS to containerd."""
    with tls_before(remote.address, certificate) as port:

        def make(credentials: grpc.ChannelCredentials, backend: RecordingBackend, timeout: float) -> Client:
            return Client(
                f"tcp://localhost:{port}",
                namespace=namespace,
                state_dir=tmp_path / "state",
                backend=backend,
                credentials=credentials,
                default_timeout=timeout,
            )

        yield make


def test_a_life_over_tcp_with_tls(connect: Connect, raw: Raw, spec: MakeSpec, certificate: Path) -> None:
    backend = RecordingBackend()
    trusted = grpc.ssl_channel_credentials((certificate / "cert.pem").read_bytes())
    with connect(trusted, backend, 60) as client:
        ran = run(client, "c", spec("sh", "-c", "echo out; echo err >&2; exit 3"))
        assert (ran.out, ran.err, ran.status.code) == (b"out\n", b"err\n", 3)
        client.create("d", spec("sleep", "1000"))
        client.start("d")
        assert run_exec(client, "d", "e", "sh", "-c", "echo from exec").out == b"from exec\n"
        assert stop(client, "d").code == 137
        wait_until(
            lambda: (
                [each.info.exit_code for each in backend.events("c") if each.event is EventType.EXIT] == [3]
            ),
            "the exit is told",
        )
    assert not raw.container_ids()


def test_who_does_not_trust_the_certificate_is_told(connect: Connect) -> None:
    for seconds in (2.0, 10.0, 60.0):  # as short as this machine allows
        with pytest.raises((UnavailableError, DeadlineExceededError), match="localhost:") as caught:
            connect(grpc.ssl_channel_credentials(), RecordingBackend(), seconds)
        if caught.type is UnavailableError:
            break
    else:
        pytest.fail("it was only ever told that the time was up")
