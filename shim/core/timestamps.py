"""RFC 3339 texts and Unix seconds, without reading a clock."""

from __future__ import annotations

from datetime import UTC, datetime

from shim.core import rfc3339 as form

FIRST_S = -62_135_596_800
"""Unix seconds of the year 1, the earliest time that has a text."""

AFTER_LAST_S = 253_402_300_800
"""Unix seconds of the year 10000, the first time that has no text any more."""


def rfc3339(wall_s: float) -> str:
    """Unix seconds as RFC 3339 in UTC, cut to milliseconds: `2026-11-24T21:28:03.120Z`.

    Times before the year 1 and after 9999 become the nearest one that has a text; NaN raises `ValueError`.
    """
    milliseconds = int(min(max(wall_s, FIRST_S), AFTER_LAST_S - 0.001) * 1000 // 1)
    moment = datetime.fromtimestamp(milliseconds // 1000, tz=UTC).replace(microsecond=milliseconds % 1000 * 1000)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_rfc3339(text: object) -> float | None:
    """Unix seconds of an RFC 3339 text, `None` if it is none or its offset leads out of the years 1 to 9999."""
    moment = form.parse(text)
    if moment is None:
        return None
    wall_s = moment.timestamp()
    return wall_s if FIRST_S <= wall_s < AFTER_LAST_S else None
