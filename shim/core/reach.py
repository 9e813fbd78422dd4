"""What a failed dial tells of the controller: its bounded name, and whether the controller was there at all."""

from __future__ import annotations

from enum import Enum

from shim.core.backoff import FailureKind, classify

OWN_STATUSES = frozenset({401, 403, 404, 408, 429})
NO_ANSWER = frozenset({"dns", "tcp", "proxy", "timeout"})
FAILURES = (
    *("dns", "tcp", "tls", "timeout", "proxy", "handshake", "token"),
    *(f"http_{status}" for status in sorted(OWN_STATUSES)),
    *(f"http_{digit}xx" for digit in "2345"),
)


class DialOutcome(Enum):
    """How an attempt to get a link online ended."""

    OK = "ok"
    FAILED = "failed"  # although the controller was there
    AWAY = "away"  # the controller was not there, as far as that can be known


def failure_name(reason: str, status: int) -> str:
    """One of `FAILURES` for a `ports.DialFailure`, `other` for what is none."""
    name = reason
    if status:
        name = f"http_{status}" if status in OWN_STATUSES else f"http_{status // 100}xx"
    return name if name in FAILURES else "other"


def is_controller_unreachable(reason: str, status: int, since_working_s: float | None) -> bool:
    """Whether the controller was away by the dial's own account.

    Nobody answered (no name, no TCP connection, no reply in time, no way through the proxy), or who answered says that
    it is away (408, 5xx, a 404 shortly after a working link). Bad TLS and a broken handshake are answers.
    """
    if not status:
        return reason in NO_ANSWER
    return classify(status, None, since_working_s) is FailureKind.LOSS
