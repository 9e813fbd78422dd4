"""shim.protocol.rfc3339: what Go's time.Time would accept."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.protocol import rfc3339


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
    rfc3339.parse(text)
