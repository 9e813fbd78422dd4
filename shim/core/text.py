"""Numbers, times and the names of others as a person reads them."""

from __future__ import annotations

from shim.core.bounds import MAX_SHOWN_CHARS, cut

_UNITS = ((86_400.0, "day"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def format_duration(seconds: float) -> str:
    """`3 s`, `4 min`, `2 h 5 min`, `3 days 4 h`: two units at most, rounded down."""
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
            break  # seconds beside minutes only flicker
    return " ".join(words) or "0 s"


def plural(number: int, noun: str) -> str:
    """`1 agent`, `2 agents`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def printable(text: str) -> str:
    """Somebody else's text for a terminal, which it must not steer: `?` for control characters and the like."""
    return "".join(char if char.isprintable() else "?" for char in text)


def shorten(name: str) -> str:
    """Return an agent's name for a sentence or a table: printable, and short enough to leave room for the rest."""
    return cut(printable(name), MAX_SHOWN_CHARS)
