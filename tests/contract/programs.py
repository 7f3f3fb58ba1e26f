"""The few programs that contract tests run: as command lines, and as what the scripted runtime plays in their place."""

from __future__ import annotations

import signal
from typing import Final

from libcontainerd.testing import FakeContainerd, ScriptedProcess, echoes, fails_to_start, prints

SLEEP: Final = ("sleep", "1000")
TRUE: Final = ("true",)
SPEAK: Final = ("sh", "-c", "echo out; echo err >&2; exit 3")
CAT: Final = ("cat",)
COUNT: Final = ("wc", "-c")
FLOOD: Final = ("head", "-c", "300000", "/dev/zero")
FLOOD_BYTES: Final = 300_000
OBEY: Final = ("sh", "-c", "trap 'exit 42' TERM; echo ready; while :; do sleep 0.02; done")
TERMINAL: Final = ("sh", "-c", "test -t 0 && test -t 1 && echo tty")
SIZE: Final = ("sh", "-c", "stty -echo; echo ready; read x; stty size")
HANG_UP: Final = ("sh", "-c", "trap 'exit 9' HUP; echo hello; while :; do sleep 0.02; done")
COUNTING: Final = ("sh", "-c", "i=0; echo ready; while read x; do i=$((i + 1)); echo $i; done")
MISSING: Final = ("no-such-program",)


def _count(process: ScriptedProcess) -> int:
    process.write(b"%d\n" % len(process.read_all()))
    return 0


def _obey(process: ScriptedProcess) -> int:
    process.handled.add(signal.SIGTERM)
    process.write(b"ready\n")
    process.wait_signal()
    return 42


def _size(process: ScriptedProcess) -> int:
    process.write(b"ready\r\n")
    process.read()
    width, height = process.size or (0, 0)
    process.write(b"%d %d\r\n" % (height, width))
    return 0


def _hang_up(process: ScriptedProcess) -> int:
    process.handled.add(signal.SIGHUP)
    process.write(b"hello\r\n")
    process.wait_signal()
    return 9


def _counting(process: ScriptedProcess) -> int:
    if "i" not in process.memory:
        process.memory["i"] = 0
        process.write(b"ready\n")
    for data in iter(process.read, b""):
        for _ in range(data.count(b"\n")):
            number = process.memory["i"]
            assert isinstance(number, int)
            process.memory["i"] = number + 1
            process.write(b"%d\n" % (number + 1))
    return 0


def script(fake: FakeContainerd) -> None:
    """Have the scripted runtime play them."""
    for args, program in (
        (TRUE, prints()),
        (SPEAK, prints(b"out\n", stderr=b"err\n", exit_code=3)),
        (CAT, echoes()),
        (COUNT, _count),
        (FLOOD, prints(bytes(FLOOD_BYTES))),
        (OBEY, _obey),
        (TERMINAL, prints(b"tty\r\n")),
        (SIZE, _size),
        (HANG_UP, _hang_up),
        (COUNTING, _counting),
        (MISSING, fails_to_start()),
    ):
        fake.script(program, args=args)
