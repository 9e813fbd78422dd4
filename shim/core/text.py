"""Formatting of durations, counts, tables and texts from outside for people."""

from __future__ import annotations

from collections.abc import Sequence

from shim.core.bounds import MAX_SHOWN_CHARS, cut

_UNITS = ((86_400.0, "day"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def format_duration(seconds: float) -> str:
    """Return a duration as text with at most two units, rounded down.

    Examples: `3 s`, `4 min`, `2 h 5 min`, `3 days 4 h`.
    """
    left = max(0.0, seconds)
    words: list[str] = []
    for size_s, unit in _UNITS:
        number = int(left // size_s)
        left -= number * size_s
        if words and not number:
            break
        if number:
            words.append(f"{number} {unit}" + ("s" if unit == "day" and number > 1 else ""))
        if len(words) == 2:
            break
        if words and unit == "min":
            break  # seconds next to minutes would change on every refresh
    return " ".join(words) or "0 s"


def plural(number: int, noun: str) -> str:
    """Return a count with its noun, as in `1 agent`, `2 agents`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def printable(text: str) -> str:
    """Return a text from outside that cannot control a terminal: `?` replaces unprintable characters."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else "?" for char in text)


def shorten(name: str) -> str:
    """Return an agent's name for a sentence or a table: printable and cut to `MAX_SHOWN_CHARS`."""
    return cut(printable(name), MAX_SHOWN_CHARS)
