"""What a killed program leaves in its state directory is removed by the next one's start."""

from __future__ import annotations

import os

from libcontainerd import Client, Remote, cio
from tests.integration.containers import MakeSpec, Raw, bundle_of


def test_empty_bundles_without_a_container_are_removed_at_a_restore(
    client: Client, remote: Remote, raw: Raw, namespace: str, spec: MakeSpec
) -> None:
    client.create("kept", spec("true"))
    bundle = bundle_of(raw, "kept")
    (bundle.parent / "orphan").mkdir()
    (bundle.parent / "full").mkdir()
    (bundle.parent / "full" / "theirs").touch()
    client.close()

    with remote.new_client(namespace) as second:
        second.create("just-made", spec("true"))
        second.restore_all(cio.null_io)

        assert sorted(os.listdir(bundle.parent)) == ["full", "just-made", "kept"]
        second.start("kept")
        second.wait("kept")
        second.delete_task("kept")
