"""Durations, counts, tables and texts from outside, as people see them."""

from __future__ import annotations

import pytest

from shim.core.bounds import MAX_SHOWN_CHARS
from shim.core.text import columns, format_duration, plural, printable, shorten


@pytest.mark.parametrize(
    "seconds, words",
    [
        (-1, "0 s"),
        (0.9, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (3599, "59 min"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (86_400, "1 day"),
        (200_000, "2 days 7 h"),
        (86_460, "1 day"),
    ],
)
def test_spans_in_words(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words


def test_numbers_in_words() -> None:
    assert [plural(number, "agent") for number in (0, 1, 2)] == ["0 agents", "1 agent", "2 agents"]


def test_a_table_is_as_wide_as_its_widest_cells() -> None:
    assert columns([("a", "bbb", "c"), ("aaaa", "b", "")]) == ["a     bbb  c", "aaaa  b"]


def test_a_text_from_outside_controls_no_terminal() -> None:
    assert printable("größe 1") == "größe 1"
    assert printable("a\x1b[2J\nb") == "a?[2J?b"
    assert shorten("x" * MAX_SHOWN_CHARS) == "x" * MAX_SHOWN_CHARS
    assert shorten("\x00" + "x" * MAX_SHOWN_CHARS) == "?" + "x" * (MAX_SHOWN_CHARS - 2) + "…"
