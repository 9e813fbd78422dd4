"""Figures: what was measured, against what, in how many rounds, and whether that is what was aimed at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table. `ours` and `baseline` are medians in `unit`; ratios are ours to the baseline's, by round.

    `better` is the direction of improvement; `aim` the bound that the project set itself for the median ratio or, with
    `absolute`, for `ours`; `None` where there is none.
    """

    part: str
    what: str
    unit: str
    ours: float
    baseline: float | None = None
    against: str = ""
    ratios: Sequence[float] = field(default_factory=tuple)
    better: str = "less"
    aim: float | None = None
    absolute: bool = False
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """The median of the rounds."""
        return median(self.ratios) if self.ratios else None

    @property
    def worst(self) -> float | None:
        if not self.ratios:
            return None
        return max(self.ratios) if self.better == "less" else min(self.ratios)

    @property
    def best(self) -> float | None:
        if not self.ratios:
            return None
        return min(self.ratios) if self.better == "less" else max(self.ratios)

    @property
    def met(self) -> bool | None:
        """Return True if the aim was reached."""
        found = self.ours if self.absolute else self.ratio
        if self.aim is None or found is None:
            return None
        return found <= self.aim if self.better == "less" else found >= self.aim

    def to_json(self) -> dict[str, Any]:
        return {
            "part": self.part,
            "what": self.what,
            "unit": self.unit,
            "ours": self.ours,
            "baseline": self.baseline,
            "against": self.against,
            "ratios": list(self.ratios),
            "better": self.better,
            "aim": self.aim,
            "absolute": self.absolute,
            "met": self.met,
            "note": self.note,
        }


def from_json(known: dict[str, Any]) -> Figure:
    """Inverse of `Figure.to_json`."""
    return Figure(**{key: value for key, value in known.items() if key != "met"})


def compared(part: str, what: str, unit: str, ours: Sequence[float], base: Sequence[float], **rest: Any) -> Figure:
    """A figure of paired rounds."""
    ratios = tuple(one / other for one, other in zip(ours, base, strict=True) if other)
    return Figure(part, what, unit, median(ours), median(base), ratios=ratios, **rest)


def spread(rounds: Sequence[float]) -> str:
    """Return the range of the rounds, for a figure without a baseline."""
    return f"rounds from {number(min(rounds))} to {number(max(rounds))}"


def number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return ""
    if value and abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


HEAD = ("", "ours", "baseline", "unit", "ratio", "worst", "best", "aim", "")


def cells(figure: Figure) -> tuple[str, ...]:
    """The columns of `HEAD`."""
    sign = "≤" if figure.better == "less" else "≥"
    aim = "" if figure.aim is None else f"{sign} {number(figure.aim)}{'' if figure.absolute else 'x'}"
    met = {True: "met", False: "MISSED", None: ""}[figure.met]
    against = f"{number(figure.baseline)} ({figure.against})" if figure.against else number(figure.baseline)
    ratios = (number(figure.ratio), number(figure.worst), number(figure.best))
    return (figure.what, number(figure.ours), against, figure.unit, *ratios, aim, met)


def table(figures: Sequence[Figure]) -> list[str]:
    """The figures as aligned text, a heading for each part."""
    rows = [cells(figure) for figure in figures]
    widths = [max(len(row[column]) for row in [HEAD, *rows]) for column in range(len(HEAD))]

    def line(row: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return "  ".join([row[0].ljust(widths[0]), *rest]).rstrip()

    lines = [line(HEAD)]
    part = ""
    for figure, row in zip(figures, rows, strict=True):
        if figure.part != part:
            part = figure.part
            lines += ["", part]
        lines.append(line(row))
    return lines


def markdown(figures: Sequence[Figure]) -> list[str]:
    """The figures as Markdown tables, one for each part; notes below."""
    lines: list[str] = []
    for part in dict.fromkeys(figure.part for figure in figures):
        of_part = [figure for figure in figures if figure.part == part]
        lines += ["", f"### {part}", "", "| | ours | baseline | unit | ratio | worst | best | aim | |"]
        lines.append("|---|--:|--:|---|--:|--:|--:|--:|---|")
        lines += ["| " + " | ".join(cells(figure)) + " |" for figure in of_part]
        lines += ["", *(f"- {figure.what}: {figure.note}" for figure in of_part if figure.note)]
    return lines


Log = Callable[[str], None]
