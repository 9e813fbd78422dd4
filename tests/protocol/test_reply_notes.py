"""Notes and headers between replicas."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.agent_api.internal import Note, arrival, note, read_arrival


@pytest.mark.parametrize("kind", list(Note))
def test_a_note_is_a_whole_request_named_by_its_path(kind: Note) -> None:
    method, target, version = note(kind, "?x", "A: b\r\n").split(b"\r\n")[0].split(b" ")
    assert (method, target, version) == (b"NOTIFY", f"{kind.value}?x".encode(), b"HTTP/1.1")
    assert note(kind, headers="A: b\r\n").endswith(b"\r\nA: b\r\n\r\n")


@given(st.floats(0, 1e4), st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_a_request_never_arrived_before_the_moment_that_its_forwarder_told(
    age_s: float, not_before: float, now: float
) -> None:
    started_s, bound = read_arrival(arrival(age_s, not_before), now)
    assert started_s == pytest.approx(now - age_s, abs=1e-5)
    assert bound == pytest.approx(min(not_before, now), abs=1e-5)


def test_without_a_bound_a_request_may_have_come_at_any_time() -> None:
    assert read_arrival(arrival(-3.0, None), 10.0) == (10.0, -math.inf)


@pytest.mark.parametrize("value", ["", "x", "1", "-1&2", "nan&1", "1&nan", "inf&1", "1&x"])
def test_what_is_no_time_is_refused(value: str) -> None:
    if value == "1":
        assert read_arrival(value, 5.0) == (4.0, -math.inf)
        return
    with pytest.raises(ValueError, match=r".*"):
        read_arrival(value, 5.0)
