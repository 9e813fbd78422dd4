"""Notes between replicas."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.protocol.reply_notes import Note, came, note, read, read_came


def _target(encoded: bytes) -> str:
    return encoded.split(b" ")[1].decode()


@pytest.mark.parametrize("kind", list(Note))
def test_a_note_is_read_as_it_was_written(kind: Note) -> None:
    assert read(_target(note(kind, "?x"))) == (kind, "x")


@given(st.floats(0, 1e4), st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_a_request_never_arrived_before_the_moment_that_its_forwarder_told(
    age_s: float, not_before: float, now: float
) -> None:
    _, query = read(_target(came(age_s, not_before)))
    started_s, bound = read_came(query, now)
    assert started_s == pytest.approx(now - age_s, abs=1e-5)
    assert bound == pytest.approx(min(not_before, now), abs=1e-5)


def test_without_a_bound_a_request_may_have_come_at_any_time() -> None:
    _, query = read(_target(came(-3.0, None)))
    assert read_came(query, 10.0) == (10.0, -math.inf)


@pytest.mark.parametrize("query", ["", "x", "1", "-1&2", "nan&1", "1&nan", "inf&1", "1&x"])
def test_what_is_no_time_is_refused(query: str) -> None:
    if query == "1":
        assert read_came(query, 5.0) == (4.0, -math.inf)
        return
    with pytest.raises(ValueError, match=r".*"):
        read_came(query, 5.0)


def test_what_is_no_note_is_refused() -> None:
    with pytest.raises(ValueError, match="/nonsense"):
        read("/nonsense")
