"""What reading and writing a spec costs, beside what a start costs.

python benchmarks/oci_speed.py

Prints microseconds of one thread, the best of several rounds, for a spec of ordinary size and for one with a seccomp
profile; and milliseconds for the first use in a process, each taken in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import timeit
from collections.abc import Callable

from libcontainerd import oci

_ROUNDS = 7
_CALLS = 200

_FIRST_USE = """
import time
import libcontainerd
begin = time.perf_counter()
import pydantic.main
pydantic_done = time.perf_counter()
from libcontainerd import oci
imported = time.perf_counter()
oci.default_spec()
used = time.perf_counter()
print((pydantic_done - begin) * 1e3, (imported - pydantic_done) * 1e3, (used - imported) * 1e3)
"""


def microseconds(call: Callable[[], object]) -> float:
    """Time one call: the best round is the one that the machine disturbed least."""
    return min(timeit.repeat(call, number=_CALLS, repeat=_ROUNDS)) / _CALLS * 1e6


def first_use() -> list[float]:
    """Time the imports and the first spec in fresh processes: milliseconds, the best of each."""
    runs = [
        subprocess.run(
            [sys.executable, "-c", _FIRST_USE], capture_output=True, text=True, timeout=60, check=True
        )
        for _ in range(_ROUNDS)
    ]
    return [min(column) for column in zip(*(map(float, run.stdout.split()) for run in runs), strict=True)]


def calls(spec: oci.Spec) -> dict[str, Callable[[], object]]:
    """Give what is timed, by name."""
    text, mapping, option = oci.dump(spec), oci.to_mapping(spec), oci.with_hostname("a")
    return {
        "parse_spec of bytes": lambda: oci.parse_spec(text),
        "parse_spec of a mapping": lambda: oci.parse_spec(mapping),
        "parse_spec of a Spec": lambda: oci.parse_spec(spec),
        "dump": lambda: oci.dump(spec),
        "validate": lambda: oci.validate(spec),
        "one option": lambda: option(spec),
        "build with ten options": lambda: oci.build(spec, *[option] * 10),
        "json.loads alone": lambda: json.loads(text),
    }


def main() -> None:
    """Print the figures."""
    typical = oci.build(
        oci.default_spec(),
        oci.with_args("sh", "-c", "exec sleep 60"),
        oci.with_env({f"VARIABLE_{number}": "some value" for number in range(20)}),
        oci.with_hostname("worker"),
        oci.with_memory_limit(64 << 20),
        oci.with_pids_limit(100),
        oci.with_cgroup_path("/example/worker"),
    )
    large = oci.with_seccomp()(typical)
    print(f"{'microseconds':<28}{'ordinary':>10}{'seccomp':>10}")
    print(f"{'size in bytes':<28}{len(oci.dump(typical)):>10}{len(oci.dump(large)):>10}")
    columns = [calls(typical), calls(large)]
    for name in columns[0]:
        print(f"{name:<28}" + "".join(f"{microseconds(column[name]):>10.0f}" for column in columns))
    print(f"{'default_spec':<28}{microseconds(oci.default_spec):>10.0f}")
    of_pydantic, of_models, of_first = first_use()
    print(
        f"\nmilliseconds, once in a process, after import libcontainerd: import pydantic {of_pydantic:.0f},"
        f" import libcontainerd.oci {of_models:.0f}, the first spec {of_first:.0f}"
    )


if __name__ == "__main__":
    main()
