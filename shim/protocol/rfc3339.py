"""RFC 3339 times: lenient parsing, output in UTC."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache

# `datetime.fromisoformat` accepts more, such as a date alone, and since Python 3.13 also the hour 24.
_FORM = re.compile(
    r"\d{4}-\d\d-\d\dT(?:[01]\d|2[0-3]):\d\d:\d\d(?:\.\d+)?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)", re.ASCII
)


def parse(value: object) -> datetime | None:
    """Return the aware time of an RFC 3339 text, cut to microseconds; `None` for anything else.

    Lower-case `t` and `z`, a missing offset, second 60 and year 0 are rejected.
    """
    if not isinstance(value, str) or _FORM.fullmatch(value) is None:
        return None
    try:
        return datetime.fromisoformat(value)
    except ValueError:
        return None


def utc_text(moment: datetime) -> str:
    """Return a time as RFC 3339 in UTC. Raises `OverflowError` if it is outside of the years 1 to 9999 in UTC."""
    return moment.astimezone(UTC).isoformat().removesuffix("+00:00") + "Z"


FIRST_S = -62_135_596_800
"""Unix seconds of the year 1, the earliest time that has a text."""

AFTER_LAST_S = 253_402_300_800
"""Unix seconds of the year 10000, the first time that has no text."""


def rfc3339(wall_s: float) -> str:
    """Return Unix seconds as RFC 3339 in UTC, cut to milliseconds: `2026-11-24T21:28:03.120Z`.

    Times before the year 1 and after 9999 become the nearest one that has a text. Raises `ValueError` for NaN.
    """
    milliseconds = int(min(max(wall_s, FIRST_S), AFTER_LAST_S - 0.001) * 1000 // 1)
    return f"{_second(milliseconds // 1000)}.{milliseconds % 1000:03d}Z"


@lru_cache(maxsize=1)  # nearly every text is of the same second as the one before
def _second(wall_s: int) -> str:
    """Return whole Unix seconds as RFC 3339 without the zone."""
    return datetime.fromtimestamp(wall_s, tz=UTC).isoformat().removesuffix("+00:00")


def parse_rfc3339(text: object) -> float | None:
    """Return the Unix seconds of an RFC 3339 text, `None` if it is malformed or outside of the years 1 to 9999."""
    moment = parse(text)
    if moment is None:
        return None
    wall_s = moment.timestamp()
    return wall_s if FIRST_S <= wall_s < AFTER_LAST_S else None
