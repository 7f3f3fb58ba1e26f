"""The specs that tests of the fake use."""

from __future__ import annotations

NAMESPACE = "test"
METADATA = (("containerd-namespace", NAMESPACE),)


def process(*args: str, terminal: bool = False, cwd: str = "/") -> dict[str, object]:
    """An OCI process."""
    return {
        "args": list(args or ("sleep", "1000")),
        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C"],
        "cwd": cwd,
        "terminal": terminal,
    }


def spec(*args: str, terminal: bool = False, root: str = "/", cwd: str = "/") -> dict[str, object]:
    """A container's spec."""
    return {
        "ociVersion": "1.0.2",
        "process": process(*args, terminal=terminal, cwd=cwd),
        "root": {"path": root},
    }
