"""shim.protocol.rfc3339: what Go's time.Time would accept."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.protocol import rfc3339
from shim.protocol.rfc3339 import AFTER_LAST_S, FIRST_S, parse_rfc3339


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-23T05:08:13Z",
        "2026-11-23T05:08:13.483384858Z",
        "2026-11-23T05:08:13.483384858123456+01:30",
        "0001-01-01T00:00:00Z",
        "2024-02-29T23:59:59-23:59",
    ],
)
def test_accepts_what_go_writes(text: str) -> None:
    assert rfc3339.parse(text) is not None


@pytest.mark.parametrize(
    "value",
    [
        "",
        "now",
        "2026-11-23",
        "2026-11-23 05:08:13Z",
        "2026-11-23t05:08:13z",
        "2026-11-23T05:08:13",
        "2026-11-23T05:08:13.Z",
        "2026-11-23T05:08:13,5Z",
        "2026-11-23T05:08:60Z",
        "2026-11-23T24:00:00Z",
        "2026-02-30T05:08:13Z",
        "2026-13-01T05:08:13Z",
        "0000-01-01T00:00:00Z",
        "2026-11-23T05:08:13+24:00",
        "2026-11-23T05:08:13+01:60",
        "2026-11-23T5:08:13Z",
        "2026-11-23T05:08:13Z\n",
        "٢٠٢٦-11-23T05:08:13Z",
        1763874493,
        None,
        b"2026-11-23T05:08:13Z",
    ],
)
def test_refuses_what_go_refuses(value: object) -> None:
    assert rfc3339.parse(value) is None


def test_reads_fraction_and_offset() -> None:
    assert rfc3339.parse("2026-11-23T05:08:13.25-02:00") == datetime(2026, 11, 23, 7, 8, 13, 250_000, UTC)


@given(st.datetimes(timezones=st.timezones()))
def test_utc_text_is_parsed_back(moment: datetime) -> None:
    try:
        text = rfc3339.utc_text(moment)
    except OverflowError:
        return
    assert text.endswith("Z")
    assert rfc3339.parse(text) == moment.astimezone(UTC)


@given(st.text())
def test_any_text_is_answered(text: str) -> None:
    assert isinstance(rfc3339.parse(text), datetime | None)


# --- shim.protocol.rfc3339: texts and seconds tell the same time ---


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
    assert rfc3339.rfc3339(wall_s) == text


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
        rfc3339.rfc3339(float("nan"))


@given(st.floats(FIRST_S, AFTER_LAST_S - 1))
def test_what_is_written_is_read_back_to_the_millisecond(wall_s: float) -> None:
    again = parse_rfc3339(rfc3339.rfc3339(wall_s))
    assert again is not None
    assert abs(again - wall_s) < 0.0011
