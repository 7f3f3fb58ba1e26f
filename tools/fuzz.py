"""Feeds the library's readers with hostile bytes: with atheris where it is installed, and with damaged samples otherwise.

    python tools/fuzz.py SECONDS [TARGET...]     one after the other, each with its share of the time
    python tools/fuzz.py --replay TARGET FILE    one input again, that a run has left

A run that finds something says how to see it again, leaves the input in .fuzz, and ends with 1.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import random
import subprocess
import sys
import time
import traceback
from pathlib import Path

_FOUND = Path(__file__).parents[1] / ".fuzz"
_MOST_BYTES = 1 << 16
_MOST_MEBIBYTES = 1024
_INPUT_SECONDS = 10


def damaged(seed: bytes, chance: random.Random) -> bytes:
    """Change, drop, double or add some of a sample's bytes."""
    data = bytearray(seed)
    for _ in range(chance.randint(1, 8)):
        at = chance.randint(0, len(data))
        match chance.randrange(5):
            case 0:
                data[at : at + 1] = chance.randbytes(1)
            case 1:
                del data[at : at + chance.randint(1, 20)]
            case 2:
                data[at:at] = data[at : at + chance.randint(1, 40)]
            case 3:
                data[at:at] = chance.randbytes(chance.randint(1, 10))
            case _:
                data[at : at + 1] = chance.choice([b"\x00", b"\xff", b"\x7f", b'"', b"{", b"[", b"/../"])
    return bytes(data[:_MOST_BYTES])


def _found(name: str, data: bytes) -> None:
    _FOUND.mkdir(exist_ok=True)
    path = _FOUND / f"{name}-{hashlib.sha256(data).hexdigest()[:16]}"
    path.write_bytes(data)
    print(f"fuzz: {name}: see it again by: python tools/fuzz.py --replay {name} {path}")


def without_atheris(name: str, seconds: float, seed: int) -> bool:
    """Try damaged samples for some time; say whether all went well."""
    from tests.fuzz import targets  # noqa: PLC0415 - atheris has to be there first where it is used

    chance, end, tried = random.Random(seed), time.monotonic() + seconds, 0  # noqa: S311 - chance is no secret
    samples = targets.seeds(name)
    while time.monotonic() < end:
        data = damaged(chance.choice(samples), chance)
        tried += 1
        try:
            targets.TARGETS[name](data)
        except Exception:  # noqa: BLE001 - whatever it is, it is what was looked for
            traceback.print_exc()
            _found(name, data)
            return False
    print(f"fuzz: {name}: {tried} damaged samples, seed {seed}")
    return True


def with_atheris(name: str, seconds: float, seed: int, corpus: Path) -> None:
    """Let atheris look for inputs that reach new code; does not come back."""
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["libcontainerd", "tests.fuzz"]):
        from tests.fuzz import targets  # noqa: PLC0415 - instrumented as it comes in
    for number, sample in enumerate(targets.seeds(name)):
        (corpus / f"sample-{number}").write_bytes(sample)
    _FOUND.mkdir(exist_ok=True)
    limits = [
        f"-max_total_time={max(1, int(seconds))}",
        f"-max_len={_MOST_BYTES}",
        f"-rss_limit_mb={_MOST_MEBIBYTES}",
        f"-timeout={_INPUT_SECONDS}",
        f"-seed={seed}",
        f"-artifact_prefix={_FOUND}/{name}-",
        "-verbosity=0",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *limits, str(corpus)], targets.TARGETS[name])
    atheris.Fuzz()


def _one(name: str, seconds: float, seed: int) -> bool:
    if importlib.util.find_spec("atheris") is None:
        return without_atheris(name, seconds, seed)
    import tempfile  # noqa: PLC0415 - for this way alone

    with tempfile.TemporaryDirectory(prefix="fuzz-") as corpus:
        # A process each: libFuzzer ends its own.
        command = [sys.executable, __file__, "--one", name, str(seconds), str(seed), corpus]
        return subprocess.run(command, check=False).returncode == 0


def main(arguments: list[str]) -> int:
    """Run what the command line says; the exit code."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    if arguments[:1] == ["--one"]:
        with_atheris(arguments[1], float(arguments[2]), int(arguments[3]), Path(arguments[4]))
        return 0
    from tests.fuzz import targets  # noqa: PLC0415 - as above

    if arguments[:1] == ["--replay"]:
        targets.TARGETS[arguments[1]](Path(arguments[2]).read_bytes())
        print("fuzz: nothing wrong with it")
        return 0
    if not arguments or not arguments[0].isdigit() or not set(arguments[1:]) <= targets.TARGETS.keys():
        print(__doc__, f"\nTargets: {', '.join(targets.TARGETS)}")
        return 2
    names = arguments[1:] or list(targets.TARGETS)
    if importlib.util.find_spec("atheris") is None:
        print("fuzz: atheris is not installed: trying damaged samples")
    seed = random.SystemRandom().randrange(1, 1 << 31)
    went_well = [_one(name, int(arguments[0]) / len(names), seed) for name in names]
    return 0 if all(went_well) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
