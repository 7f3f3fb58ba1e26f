"""What was measured: written down line by line, so that an interrupted run can go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from benchmarks.protocol import Answer


class Samples:
    """The samples of one run.

    Attributes:
        about: What was run, and on what.
        spins: Seconds that always the same work has taken, in the course of the run.
    """

    def __init__(self, path: Path, about: dict[str, str]) -> None:
        self._path = path
        self.about = about
        self.spins: list[float] = []
        self._samples: dict[tuple[int, str, str], Answer] = {}

    @classmethod
    def open(cls, path: Path, about: dict[str, str]) -> Samples:
        """Go on with the run of that file, if it was of the same things, and begin a new one otherwise."""
        samples = cls(path, about)
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and json.loads(lines[0]) == about:
            for line in lines[1:]:
                samples._take(json.loads(line))
            if any(measure == "done" for _, measure, _ in samples._samples):
                samples = cls(path, about)
        if not samples._samples:
            path.write_text(json.dumps(about) + "\n")
        return samples

    def _take(self, line: list[object]) -> None:
        number, measure, peer, answer = cast("tuple[int, str, str, Answer]", line)
        if measure == "spin":
            self.spins.append(answer["wall"])
        else:
            self._samples[number, measure, peer] = answer

    def _write(self, *line: object) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def add(self, number: int, measure: str, peer: str, answer: Answer) -> None:
        """Write one down."""
        self._samples[number, measure, peer] = answer
        self._write(number, measure, peer, answer)

    def add_spin(self, seconds: float) -> None:
        """Write down how fast the machine just was."""
        self.spins.append(seconds)
        self._write(0, "spin", "", {"wall": seconds})

    def has(self, number: int, measure: str, peer: str) -> bool:
        """Whether it was measured already."""
        return (number, measure, peer) in self._samples

    def of(self, measure: str, peer: str, figure: str) -> dict[int, float]:
        """One figure of a peer, by round (or by the number of containers)."""
        return {
            number: answer[figure]
            for (number, its_measure, its_peer), answer in sorted(self._samples.items())
            if (its_measure, its_peer) == (measure, peer) and figure in answer
        }

    def all_of(self, measure: str) -> dict[int, Answer]:
        """The library's samples of a measure."""
        return {
            number: answer
            for (number, its_measure, peer), answer in self._samples.items()
            if (its_measure, peer) == (measure, "library")
        }

    def peers(self, measure: str) -> list[str]:
        """Who was measured."""
        return list(dict.fromkeys(peer for _, its_measure, peer in self._samples if its_measure == measure))

    def finish(self) -> None:
        """The run is complete: the next one begins anew."""
        self.add(0, "done", "", {})
