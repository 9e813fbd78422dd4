"""RFC 3339 times: lenient parsing, output in UTC."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone

_FORM = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d{1,9})\d*)?(?:Z|([+-])([01]\d|2[0-3]):([0-5]\d))", re.ASCII
)


def parse(value: object) -> datetime | None:
    """Return the aware time of an RFC 3339 text, cut to microseconds; `None` for anything else.

    Lower-case `t` and `z`, a missing offset, second 60 and year 0 are rejected.
    """
    found = _FORM.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return None
    year, month, day, hour, minute, second = map(int, found.groups()[:6])
    fraction, sign, offset_h, offset_m = found.groups()[6:]
    zone = UTC
    if sign:
        offset = timedelta(hours=int(offset_h), minutes=int(offset_m))
        zone = timezone(-offset if sign == "-" else offset)
    try:
        return datetime(year, month, day, hour, minute, second, int((fraction or "0").ljust(6, "0")[:6]), zone)
    except ValueError:
        return None


def utc_text(moment: datetime) -> str:
    """Return a time as RFC 3339 in UTC. Raises `OverflowError` if it is outside of the years 1 to 9999 in UTC."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


FIRST_S = -62_135_596_800
"""Unix seconds of the year 1, the earliest time that has a text."""

AFTER_LAST_S = 253_402_300_800
"""Unix seconds of the year 10000, the first time that has no text."""


def rfc3339(wall_s: float) -> str:
    """Return Unix seconds as RFC 3339 in UTC, cut to milliseconds: `2026-11-24T21:28:03.120Z`.

    Times before the year 1 and after 9999 become the nearest one that has a text. Raises `ValueError` for NaN.
    """
    milliseconds = int(min(max(wall_s, FIRST_S), AFTER_LAST_S - 0.001) * 1000 // 1)
    moment = datetime.fromtimestamp(milliseconds // 1000, tz=UTC).replace(microsecond=milliseconds % 1000 * 1000)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_rfc3339(text: object) -> float | None:
    """Return the Unix seconds of an RFC 3339 text, `None` if it is malformed or outside of the years 1 to 9999."""
    moment = parse(text)
    if moment is None:
        return None
    wall_s = moment.timestamp()
    return wall_s if FIRST_S <= wall_s < AFTER_LAST_S else None
