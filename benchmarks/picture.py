"""Two kinds of pictures, as SVG: bars beside a line at 1, and lines over a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from html import escape

_COLOURS = ("#3465a4", "#888a85", "#c17d11", "#73d216", "#75507b", "#cc0000", "#06989a", "#2e3436")
_WIDTH, _LEFT, _RIGHT = 860, 260, 90
_MOST = 2.5
"""Where a bar is cut off."""


def _page(height: float, title: str, parts: Iterator[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="{_WIDTH}" height="{height:.0f}" fill="white"/>\n'
    )
    return head + _text(12, 20, title, size=14) + "".join(parts) + "</svg>\n"


def _text(x: float, y: float, what: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" font-size="{size}">{escape(what)}</text>\n'


def _line(x: float, y: float, to_x: float, to_y: float, colour: str) -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{colour}"/>\n'


def _legend(names: list[str], y: float) -> Iterator[str]:
    for number, name in enumerate(names):
        x = _LEFT + number % 4 * 150
        top = y + number // 4 * 16
        yield f'<rect x="{x}" y="{top - 10:.0f}" width="10" height="10" fill="{_COLOURS[number % len(_COLOURS)]}"/>\n'
        yield _text(x + 15, top, name)


def bars(title: str, groups: Mapping[str, Mapping[str, float]]) -> str:
    """Draw a group of bars for each name, with a line at 1."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    scale = (_WIDTH - _LEFT - _RIGHT) / _MOST
    height = 70 + sum(14 * len(group) + 10 for group in groups.values())

    def parts() -> Iterator[str]:
        yield from _legend(names, 42)
        y = 60.0
        for label, group in groups.items():
            yield _text(_LEFT - 8, y + 7 * len(group) + 2, label, anchor="end")
            for name, value in group.items():
                width = min(value, _MOST) * scale
                colour = _COLOURS[names.index(name) % len(_COLOURS)]
                yield f'<rect x="{_LEFT}" y="{y:.0f}" width="{width:.1f}" height="11" fill="{colour}"/>\n'
                yield _text(
                    _LEFT + width + 5, y + 10, f"{value:.2f}" + (" →" if value > _MOST else ""), size=11
                )
                y += 14
            y += 10
        yield _line(_LEFT + scale, 52, _LEFT + scale, height - 10, "black")

    return _page(height, title, parts())


def lines(title: str, series: Mapping[str, Mapping[int, float]]) -> str:
    """Draw a line for each name, over a logarithmic axis of numbers."""
    series = {name: points for name, points in series.items() if points}
    height, top, bottom, left = 420, 80, 380, 70
    numbers = sorted({number for points in series.values() for number in points}) or [1]
    most = max((value for points in series.values() for value in points.values()), default=1.0) * 1.1
    span = max(math.log10(numbers[-1] / numbers[0]), 1.0)

    def at(number: int, value: float) -> tuple[float, float]:
        x = left + (_WIDTH - left - 40) * math.log10(number / numbers[0]) / span
        return x, bottom - (bottom - top) * value / most

    def parts() -> Iterator[str]:
        yield from _legend(list(series), 42)
        yield _line(left, bottom, _WIDTH - 40, bottom, "black")
        for number in numbers:
            x, y = at(number, 0)
            yield _text(x, y + 18, f"{number:,}", anchor="middle")
        for step in range(5):
            value = most * step / 4
            _, y = at(numbers[0], value)
            yield _line(left, y, _WIDTH - 40, y, "#d3d7cf")
            yield _text(left - 6, y + 4, f"{value:.0f}", anchor="end")
        for index, points in enumerate(series.values()):
            colour = _COLOURS[index % len(_COLOURS)]
            path = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in sorted(points.items()))
            yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>\n'

    return _page(height, title, parts())
