"""What a failed dial is called and what it tells of the controller."""

from __future__ import annotations

import pytest

from shim.core.backoff import FAILURES, failure_name, is_controller_unreachable


@pytest.mark.parametrize(
    "reason, status, name",
    [
        ("dns", 0, "dns"),
        ("status", 401, "http_401"),
        ("status", 418, "http_4xx"),
        ("status", 503, "http_5xx"),
        ("status", 302, "http_3xx"),
        ("status", 200, "http_2xx"),
        ("a new reason", 0, "other"),
        ("status", 999, "other"),
    ],
)
def test_names_are_bounded(reason: str, status: int, name: str) -> None:
    assert failure_name(reason, status) == name
    assert name in (*FAILURES, "other")


@pytest.mark.parametrize(
    "reason, status, since_working_s, away",
    [
        ("dns", 0, None, True),
        ("tcp", 0, 5, True),
        ("timeout", 0, 5, True),
        ("proxy", 0, None, True),
        ("tls", 0, None, False),  # somebody answered, wrongly
        ("handshake", 0, None, False),
        ("status", 503, None, True),
        ("status", 408, None, True),
        ("status", 401, None, False),
        ("status", 429, None, False),
        ("status", 404, 5, True),  # being redeployed
        ("status", 404, None, False),  # a wrong address
    ],
)
def test_away_or_there(reason: str, status: int, since_working_s: float | None, away: bool) -> None:
    assert is_controller_unreachable(reason, status, since_working_s) is away
