"""shim.protocol.rfc3339: texts and seconds tell the same time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.protocol.rfc3339 import AFTER_LAST_S, FIRST_S, parse_rfc3339, rfc3339


@pytest.mark.parametrize(
    "wall_s, text",
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1_795_410_496.8279, "2026-11-23T05:08:16.827Z"),
        (-0.0005, "1969-12-31T23:59:59.999Z"),
        (FIRST_S - 1e9, "0001-01-01T00:00:00.000Z"),
        (float("inf"), "9999-12-31T23:59:59.999Z"),
    ],
)
def test_writes_utc_milliseconds(wall_s: float, text: str) -> None:
    assert rfc3339(wall_s) == text


@pytest.mark.parametrize(
    "text, wall_s",
    [
        ("1970-01-01T01:00:00+01:00", 0),
        ("2026-11-23T05:08:16.827904655Z", 1_795_410_496.827904),
        ("0001-01-01T00:00:00Z", FIRST_S),
        ("0001-01-01T00:00:00+00:01", None),
        ("9999-12-31T23:59:59-00:01", None),
        ("2026-11-23", None),
        (1_795_410_496, None),
    ],
)
def test_reads_seconds(text: object, wall_s: float | None) -> None:
    assert parse_rfc3339(text) == wall_s


def test_not_a_number_has_no_text() -> None:
    with pytest.raises(ValueError, match="NaN"):
        rfc3339(float("nan"))


@given(st.floats(FIRST_S, AFTER_LAST_S - 1))
def test_what_is_written_is_read_back_to_the_millisecond(wall_s: float) -> None:
    again = parse_rfc3339(rfc3339(wall_s))
    assert again is not None
    assert abs(again - wall_s) < 0.0011
