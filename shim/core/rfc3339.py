"""RFC 3339 timestamps, as strict as Go's `time.Time` is: one that Go refuses makes a whole reply undecodable."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone

_FORM = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d{1,9})\d*)?(?:Z|([+-])([01]\d|2[0-3]):([0-5]\d))", re.ASCII
)


def parse(value: object) -> datetime | None:
    """The aware time that `value` tells, cut to microseconds; `None` if it is no RFC 3339 text.

    Lower-case `t` and `z`, a missing offset, second 60 and year 0 are refused.
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
    """The moment as RFC 3339 in UTC. Raises `OverflowError` where the offset leads out of the years 1 to 9999."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
