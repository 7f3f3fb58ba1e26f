"""A containerd in a mount namespace of its own, where the machine's cgroups can be other than outside."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc

from libcontainerd import Client, Remote
from libcontainerd.backends import RecordingBackend
from tests.integration.containers import Raw, divert_log, kill_shims, shims_of, wait_until


@contextmanager
def private_containerd(binary: Path, prepare: str) -> Iterator[Callable[[str, RecordingBackend], Client]]:
    """A containerd with its shims in a mount namespace of its own, in which the shell has run `prepare` first."""
    with ExitStack() as undo:
        directory = Path(tempfile.mkdtemp(prefix="lcm-"))
        undo.callback(shutil.rmtree, directory)
        wrapper = directory / "containerd"
        inside = f'mount --make-rprivate / && {prepare} && exec {shlex.quote(str(binary))} "$@"'
        wrapper.write_text(f'#!/bin/sh\nexec unshare --mount sh -c {shlex.quote(inside)} containerd "$@"\n')
        wrapper.chmod(0o755)
        remote = undo.enter_context(
            Remote.start(directory / "root", directory / "state", binary=str(wrapper))
        )
        divert_log(remote, print)
        undo.callback(kill_shims, remote.address)
        channel = undo.enter_context(
            grpc.insecure_channel(
                f"unix:{remote.address}", options=(("grpc.default_authority", "localhost"),)
            )
        )

        def connect(namespace: str, backend: RecordingBackend) -> Client:
            raw = Raw(channel, namespace)
            client = remote.new_client(namespace, backend)
            undo.callback(raw.remove_everything)
            return client

        yield connect
        wait_until(lambda: not shims_of(remote.address), "all shims have ended", timeout=30)
