"""What came out, as a table, as JSON, and as pictures."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import picture
from benchmarks.samples import Samples

UNSTEADY: Final = 0.15
"""More than this between the quartiles, in relation to the median, and a figure is said to be noisy."""

_PICTURES = """\
![Ratios to the Go client](benchmarks.svg)

![Cost against the number of containers](scale.svg)
"""
_MARK = re.compile(r"(<!-- measured -->\n).*(<!-- /measured -->)", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: What was measured.
        measure: Its samples' name, and `figure` the figure in them.
        shown: Makes what is shown of the figure.
        unit: Of what is shown.
        goal: What the ratio to the Go client, or to another, is to be; None where nothing is asked.
        rate: More is better: what is shown is one over the figure.
        beside: The peer that the ratio is to.
    """

    name: str
    measure: str
    figure: str
    shown: Callable[[float], float]
    unit: str
    goal: float | None = None
    rate: bool = False
    beside: str = "go"


ROWS: Final = (
    Row("lifecycle, one after the other", "lifecycle", "wall", lambda s: s / 20 * 1e3, "ms", 0.95),
    Row("lifecycle, 8 workers", "lifecycle8", "wall", lambda s: 48 / s, "per s", 1.10, rate=True),
    Row("lifecycle, client CPU", "lifecycle", "cpu", lambda s: s / 20 * 1e3, "ms", 0.90),
    Row("exec, one after the other", "exec", "wall", lambda s: s / 30 * 1e3, "ms", 1.00),
    Row("exec, client CPU", "exec", "cpu", lambda s: s / 30 * 1e3, "ms", 1.25),
    Row("stdout into a file", "stdout_file", "wall", lambda s: 1024 / s, "MiB/s", 1.00, rate=True),
    Row("stdout into a file, client CPU", "stdout_file", "cpu", lambda s: s, "s/GiB", 0.65),
    Row("stdout into a callable", "stdout_discard", "wall", lambda s: 1024 / s, "MiB/s", 1.00, rate=True),
    Row("stdout into a callable, client CPU", "stdout_discard", "cpu", lambda s: s, "s/GiB", 0.65),
    Row("events of a backlog", "events", "wall", lambda s: 50_000 / s, "per s", None, rate=True),
    Row("events, client CPU", "events", "cpu", lambda s: s / 50_000 * 1e6, "µs", None),
    Row("version", "version", "wall", lambda s: s / 500 * 1e6, "µs", 1.10, beside="stubs"),
    Row("status", "status", "wall", lambda s: s / 500 * 1e6, "µs", 1.10, beside="stubs"),
    Row("list_pids", "list_pids", "wall", lambda s: s / 200 * 1e6, "µs", 1.10, beside="stubs"),
    Row("signal_process", "signal_process", "wall", lambda s: s / 50 * 1e3, "ms", 1.10, beside="stubs"),
    Row(
        "start of a program to its first reply",
        "first_reply",
        "wall",
        lambda s: s * 1e3,
        "ms",
        1.25,
        beside="stubs",
    ),
    Row("its memory", "first_reply", "rss", lambda b: b / (1 << 20), "MiB", 1.25, beside="stubs"),
    Row("idle, CPU", "idle", "cpu", lambda s: s / 10 * 1e3, "ms/s", None),
)

_PEERS: Final = {"go": "Go client", "library": "libcontainerd", "stubs": "raw grpcio stubs", "ctr": "`ctr`"}


@dataclass(frozen=True)
class Figure:
    """A figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Figure | None:
        """Of values of several rounds; None of none."""
        if not values:
            return None
        if len(values) < 3:
            return cls(statistics.median(values), min(values), max(values))
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)

    @property
    def unsteady(self) -> bool:
        """Whether it moved too much to be told."""
        return self.high - self.low > UNSTEADY * self.median

    def __str__(self) -> str:
        return f"{_short(self.median)} ({_short(self.low)}-{_short(self.high)})"


def _short(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def figure(samples: Samples, row: Row, peer: str) -> Figure | None:
    """What a peer needs for a row."""
    return Figure.of([row.shown(value) for value in samples.of(row.measure, peer, row.figure).values()])


def ratio(samples: Samples, row: Row, peer: str, beside: str) -> Figure | None:
    """One peer's figure over another's, round by round: what disturbs a round disturbs both."""
    ours, theirs = (samples.of(row.measure, name, row.figure) for name in (peer, beside))
    both = [row.shown(ours[each]) / row.shown(theirs[each]) for each in ours if each in theirs]
    return Figure.of(both)


def verdict(row: Row, told: Figure | None) -> str:
    """Whether a goal is met."""
    if row.goal is None or told is None:
        return ""
    met = told.median >= row.goal if row.rate else told.median <= row.goal
    if told.low <= row.goal <= told.high and told.unsteady:
        return "too noisy to tell"
    return "met" if met else "missed"


def table(samples: Samples) -> str:
    """The comparison, in Markdown."""
    lines = [
        "| measure | Go client | libcontainerd | raw grpcio stubs | `ctr` | goal | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        go = figure(samples, row, "go")
        if figure(samples, row, "library") is None:
            continue
        cells = [f"{row.name}, {row.unit}", "" if go is None else str(go)]
        for peer in ("library", "stubs", "ctr"):
            its, over = figure(samples, row, peer), ratio(samples, row, peer, "go")
            cells.append(
                "" if its is None else str(its) + ("" if over is None else f" **{over.median:.2f}**")
            )
        told = ratio(samples, row, "library", row.beside)
        goal = ""
        if row.goal is not None and told is not None:
            goal = f"{'≥' if row.rate else '≤'} {row.goal:.2f}"
            if row.beside != "go":
                goal += f" of the stubs (is {told.median:.2f})"
        lines.append("| " + " | ".join([*cells, goal, verdict(row, told)]) + " |")
    return "\n".join(lines)


def events(samples: Samples) -> str:
    """What has to be said of the events beside the table: the goals are no ratios to the Go client."""
    row = next(row for row in ROWS if row.measure == "events")
    ours, published = figure(samples, row, "library"), figure(samples, row, "containerd")
    cpu = next(row for row in ROWS if (row.measure, row.figure) == ("events", "cpu"))
    used = figure(samples, cpu, "library")
    if ours is None or published is None or used is None:
        return ""
    return (
        f"Events: {_short(ours.median)} per second (goal 20,000) and {_short(used.median)} µs of CPU each (goal 50);"
        f" containerd publishes {_short(published.median)} per second here, {ours.median / published.median:.1f} times less"
        " than the library takes (goal 3)."
    )


def steadiness(samples: Samples) -> str:
    """How far the machine's speed has moved, by always the same work in between."""
    speed = Figure.of(samples.spins)
    if speed is None:
        return ""
    moved = (speed.high - speed.low) / speed.median
    text = (
        f"Always the same work, done {len(samples.spins)} times in between, took {speed.median * 1e3:.0f} ms, within"
        f" {moved:.0%} from quartile to quartile, {max(samples.spins) / min(samples.spins):.2f} from the fastest to the slowest."
    )
    if moved > UNSTEADY:
        text += " **The machine was too noisy: only what is far from its goal can be told.**"
    return text


SCALED: Final = ("create", "start", "status", "list_pids", "signal_process", "delete_task", "delete", "event")


def scaled(samples: Samples, kind: str) -> str:
    """The client's CPU per verb and event against the number of containers, in Markdown."""
    numbers = sorted(samples.of(kind, "library", "threads"))
    if not numbers:
        return ""
    lines = [
        "| containers | " + " | ".join(f"{number:,}" for number in numbers) + " | last to first |",
        "|---|" + "---|" * (len(numbers) + 1),
    ]
    rows = [(f"{verb}, µs of CPU", f"{verb}_cpu", 1e6) for verb in SCALED]
    rows += [
        ("threads", "threads", 1.0),
        ("descriptors", "descriptors", 1.0),
        ("memory for each further container, KiB", "bytes_each", 1 / 1024),
        ("idle, ms of CPU per s", "idle_cpu", 1e3),
    ]
    for name, key, factor in rows:
        found = samples.of(kind, "library", key)
        if not found:
            continue
        cells = [_short(found[number] * factor) if number in found else "" for number in numbers]
        first, last = found.get(numbers[0]), found.get(numbers[-1])
        growth = f"{last / first:.2f}" if first and last and key.endswith("_cpu") else ""
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {growth} |")
    return "\n".join(lines)


def attached(samples: Samples) -> str:
    """What a thousand attached and silent containers need."""
    found = {
        name: next(iter(samples.of("attached", "library", name).values()), None)
        for name in ("containers", "threads", "pumps", "idle_cpu")
    }
    if found["containers"] is None:
        return ""
    return (
        f"{found['containers']:,.0f} attached and silent containers: {found['threads']:.0f} Python threads in all,"
        f" {found['pumps']:.0f} of them the pump's, {(found['idle_cpu'] or 0) * 1e3:.2g} ms of CPU per second."
    )


def lost(samples: Samples) -> str:
    """Who has not got all of the output."""
    missing = [
        f"{_PEERS[peer]}, {measure}: {sum(amounts.values()):,.0f} bytes in {sum(map(bool, amounts.values()))} of {len(amounts)} rounds"
        for measure in ("stdout_file", "stdout_discard")
        for peer in samples.peers(measure)
        if any((amounts := samples.of(measure, peer, "lost")).values())
    ]
    return f"Output that did not arrive: {'; '.join(missing)}." if missing else ""


def restored(samples: Samples) -> str:
    """What it takes to find all of them again."""
    parts = []
    for number, told in samples.all_of("restored").items():
        parts.append(
            f"`restore_all` of {number:,} containers: {told['restore_wall']:.1f} s (goal 5), {told['restore_calls']:,.0f} calls,"
            f" {told['alive']:,.0f} found alive."
        )
    return "\n".join(parts)


def text(samples: Samples) -> str:
    """All of it, in Markdown."""
    about = samples.about
    facts = ", ".join(
        f"{name} {about[name]}"
        for name in ("kernel", "containerd", "runc", "go", "python", "grpcio", "protobuf")
    )
    parts = [
        f"Revision {about['revision']}, {about['rounds']} rounds, {about['processor']}, {facts}.",
        steadiness(samples),
        table(samples),
        lost(samples),
        events(samples),
        scaled(samples, "scale") and "On the fake, which is a process of its own:",
        scaled(samples, "scale"),
        scaled(samples, "scale_real") and "On containerd:",
        scaled(samples, "scale_real"),
        attached(samples),
        restored(samples),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(samples: Samples) -> dict[str, object]:
    """All of it, for programs."""
    peers: Mapping[str, str] = _PEERS
    return {
        "about": samples.about,
        "spins": samples.spins,
        "rows": [
            {
                "name": row.name,
                "unit": row.unit,
                "goal": row.goal,
                "beside": row.beside,
                "figures": {
                    peer: vars(told) for peer in peers if (told := figure(samples, row, peer)) is not None
                },
                "ratios_to_go": {
                    peer: vars(told)
                    for peer in peers
                    if (told := ratio(samples, row, peer, "go")) is not None
                },
            }
            for row in ROWS
        ],
        "scale": {kind: samples.all_of(kind) for kind in ("scale", "scale_real", "attached", "restored")},
    }


def write(samples: Samples, output: Path, docs: Path | None) -> None:
    """Print it, write it below `output`, and where there are `docs`, renew what they hold of it."""
    told = text(samples)
    bars = picture.bars(
        "In relation to containerd's Go client (1.0); the shorter, the better",
        {
            row.name: {
                _PEERS[peer]: (1 / over.median if row.rate else over.median)
                for peer in ("library", "stubs", "ctr")
                if (over := ratio(samples, row, peer, "go")) is not None
            }
            for row in ROWS
            if ratio(samples, row, "library", "go") is not None
        },
    )
    lines = picture.lines(
        "CPU of one verb or event (µs) against the number of containers, on the fake",
        {
            verb: {n: s * 1e6 for n, s in samples.of("scale", "library", f"{verb}_cpu").items()}
            for verb in SCALED
        },
    )
    files = {
        "benchmarks.json": json.dumps(summary(samples), indent=1) + "\n",
        "benchmarks.svg": bars,
        "scale.svg": lines,
    }
    (output / "benchmarks.md").write_text(told)
    for directory in (output, *([docs] if docs is not None else [])):
        for name, content in files.items():
            (directory / name).write_text(content)
    if docs is not None:
        page = docs / "benchmarks.md"
        page.write_text(
            _MARK.sub(lambda found: f"{found[1]}\n{told}\n{_PICTURES}\n{found[2]}", page.read_text())
        )
    print(told)
    samples.finish()
