"""In what the releases of containerd differ, as far as the fake shows it. Each was seen on the release named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Release:
    """One release of containerd.

    Attributes:
        version: The version in full, as it tells it.
        number: Its first two numbers.
        keeps_ended: A task whose init ended while containerd was down is still known when it is up again, and its exit told.
        tells_process: Its introspection tells its own pid and pid namespace.
        wants_spec: A container must have a spec.
        spaces_tell_themselves: A change of a namespace is told in that namespace, not in the caller's.
        tells_new_content: Content that is committed is told.
        drain_seconds: How long its shim waits for output that a process's child still holds.
        keeps_sandboxes: It has a store of sandboxes, and what has a record there is kept as `keeps_ended` says.
        saves_specs_again: A checkpoint succeeds where the container's spec, which goes with it, is content already.
        shims: The runtimes that it finds without their paths.
    """

    version: str
    number: tuple[int, int]
    keeps_ended: bool = False
    tells_process: bool = True
    wants_spec: bool = False
    spaces_tell_themselves: bool = True
    tells_new_content: bool = False
    drain_seconds: float = 2.0
    keeps_sandboxes: bool = True
    saves_specs_again: bool = False
    shims: tuple[str, ...] = (
        "io.containerd.runc.v2",
        "io.containerd.runc.v1",
        "io.containerd.runtime.v1.linux",
    )


RELEASES: Final = {
    "1.6": Release(
        "1.6.20",
        (1, 6),
        keeps_ended=True,
        keeps_sandboxes=False,
        tells_process=False,
        wants_spec=True,
        spaces_tell_themselves=False,
    ),
    "1.7": Release("1.7.24", (1, 7)),
    "2.1": Release(
        "2.1.9",
        (2, 1),
        tells_new_content=True,
        drain_seconds=10.0,
        saves_specs_again=True,
        shims=("io.containerd.runc.v2",),
    ),
}
