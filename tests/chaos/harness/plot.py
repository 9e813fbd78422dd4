"""Draw measurements over time as SVG: panels one below the other, each with its own scale and a line per series."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, PANEL_HEIGHT = 760, 150
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 30, 24
COLOURS = ("#1f6feb", "#d9822b", "#2da44e")
FONT = 'font-family="sans-serif" font-size="11"'
MAX_POINTS = 360
TICKS = 4


@dataclass(frozen=True, slots=True)
class Panel:
    """One scale: a title with its unit, and named series of as many values as there are times."""

    title: str
    series: dict[str, Sequence[float]]


def plot(minutes: Sequence[float], panels: Sequence[Panel]) -> str:
    """Return the drawing. Of many points every n-th is drawn, and the last."""
    step = math.ceil(len(minutes) / MAX_POINTS) or 1
    kept = sorted({*range(0, len(minutes), step), len(minutes) - 1})
    height = PANEL_HEIGHT * len(panels) + 20
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {FONT}>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for number, panel in enumerate(panels):
        lines += _panel(panel, minutes, kept, number * PANEL_HEIGHT)
    lines.append(f'<text x="{WIDTH / 2:.0f}" y="{height - 6}" text-anchor="middle">minutes</text>')
    return "\n".join([*lines, "</svg>", ""])


def _panel(panel: Panel, minutes: Sequence[float], kept: Sequence[int], top: int) -> Iterator[str]:
    longest = max(minutes[-1], 1e-9)
    highest = _round_up(max(max(values) for values in panel.series.values()))
    bottom, right = top + PANEL_HEIGHT - BOTTOM, WIDTH - RIGHT

    def x(minute: float) -> float:
        return LEFT + minute / longest * (right - LEFT)

    def y(value: float) -> float:
        return bottom - value / highest * (bottom - top - TOP)

    yield f'<text x="{LEFT}" y="{top + 18}" font-weight="bold">{escape(panel.title)}</text>'
    for tick in range(TICKS + 1):
        value, minute = highest * tick / TICKS, longest * tick / TICKS
        yield f'<line x1="{LEFT}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#d0d7de"/>'
        yield f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        yield f'<text x="{x(minute):.1f}" y="{bottom + 14}" text-anchor="middle">{minute:.0f}</text>'
    for (name, values), colour, number in zip(panel.series.items(), COLOURS, range(len(COLOURS)), strict=False):
        points = " ".join(f"{x(minutes[index]):.1f},{y(values[index]):.1f}" for index in kept)
        yield f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{points}"/>'
        yield f'<text x="{right - 130 * number}" y="{top + 18}" text-anchor="end" fill="{colour}">{escape(name)}</text>'


def _round_up(value: float) -> float:
    """Return the next of 1, 2, 4, 8, 10 times a power of ten, so that quarters of it are short numbers."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 8, 10) if value <= step * power)
