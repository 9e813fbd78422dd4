"""The headers that tell agents' operators how long the legacy API will be there (protocol.md §1.7)."""

from __future__ import annotations

from collections.abc import Mapping
from email.utils import formatdate

from shim.settings import Sunset
from shim.validation import parse_date_s


def sunset_headers(sunset: Sunset) -> Mapping[str, str]:
    """`Deprecation` (RFC 9745, a structured date), `Sunset` (RFC 8594, an HTTP date), `Link`; absent if not set."""
    found: dict[str, str] = {}
    if sunset.deprecation_at:
        found["Deprecation"] = f"@{int(parse_date_s(sunset.deprecation_at))}"
    if sunset.at:
        found["Sunset"] = formatdate(parse_date_s(sunset.at), usegmt=True)
    if sunset.link:
        found["Link"] = f'<{sunset.link}>; rel="deprecation"'
    return found


def is_over(sunset: Sunset, wall_s: float) -> bool:
    """Whether the legacy API is gone by then (Unix seconds): nothing goes that way any more."""
    return bool(sunset.at) and wall_s >= parse_date_s(sunset.at)
