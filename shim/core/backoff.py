"""Backoff of a link: failure classes and delays between dials (docs/reference/protocol.md#21-link-life)."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import msgspec

RETRY_AFTER_MIN_S = 1.0
RETRY_AFTER_MAX_S = 300.0
RECENTLY_WORKING_S = 600.0


class FailureKind(Enum):
    """Kinds of failed dials, which differ in the longest delay before the next dial.

    LOSS: the controller is unreachable; the short cap finds it soon after its return. REFUSED: the controller answered
    and rejected the connection.
    """

    LOSS = "loss"
    REFUSED = "refused"


class CloseMeaning(Enum):
    """The part of a close code that decides about the next dial (docs/reference/protocol.md#21-link-life)."""

    COME_AGAIN = "come again"  # the controller restarts, is busy or has failed: dial again soon
    REFUSED = "refused"  # the controller rejects the token
    COMPLAINT = "complaint"  # the controller could not process our messages: dial again with growing delays
    OTHER = "other"  # three in a row, each soon after a registration, mean that another process has our identity


# RFC 6455 section 7.4.1 and IANA's registry of close codes. 3000 is Unauthorized, 3003 Forbidden, 3008 Timeout.
_MEANINGS = {
    **dict.fromkeys((1001, 1011, 1012, 1013, 1014, 3008), CloseMeaning.COME_AGAIN),
    **dict.fromkeys((1008, 3000, 3003), CloseMeaning.REFUSED),
    **dict.fromkeys((1002, 1003, 1007, 1009, 1010), CloseMeaning.COMPLAINT),
}
# Applications commonly close with 4000 + an HTTP status; 4409 (conflict) is left to the check for contention.
_MEANINGS_OF_STATUS = {
    401: CloseMeaning.REFUSED,
    403: CloseMeaning.REFUSED,
    408: CloseMeaning.COME_AGAIN,
    429: CloseMeaning.COMPLAINT,
    **dict.fromkeys(range(500, 600), CloseMeaning.COME_AGAIN),
}


def close_meaning(code: int) -> CloseMeaning:
    """Return the meaning of a close frame's code; 0 is a frame without one."""
    return _MEANINGS.get(code) or _MEANINGS_OF_STATUS.get(code - 4000, CloseMeaning.OTHER)


class BackoffPolicy(msgspec.Struct, frozen=True):
    """Delays in seconds. `contended_s` is also the delay for an agent's own token that was never accepted."""

    initial_s: float = 1
    max_s: float = 5
    refused_max_s: float = 60
    contended_s: float = 60


def classify(status: int, retry_after_s: float | None, since_working_s: float | None) -> FailureKind:
    """Return the kind of a failed handshake by its HTTP status (0: no response was received).

    `since_working_s` is the time since the last working link, `None` if there was none. A 404 shortly after a working
    link is a controller that is being redeployed, not a wrong address.
    """
    if status in {0, 408}:
        return FailureKind.LOSS
    if retry_after_s is not None:
        return FailureKind.REFUSED
    if status >= 500:
        return FailureKind.LOSS
    if status == 404 and since_working_s is not None and since_working_s < RECENTLY_WORKING_S:
        return FailureKind.LOSS
    return FailureKind.REFUSED


class Backoff:
    """Exponential backoff with full jitter. The bound doubles from `initial_s` and returns there only by `reset()`.

    `rng` returns a float in [0, 1). A `Retry-After`, clamped to 1-300 s, is a lower bound. Jitter is added to it,
    because all shims of a fleet may have received the same value and must not return in the same second.
    """

    def __init__(self, policy: BackoffPolicy, rng: Callable[[], float]) -> None:
        self._policy = policy
        self._rng = rng
        self._failures = 0

    @property
    def failures(self) -> int:
        """Failures since the last reset."""
        return self._failures

    def reset(self) -> None:
        """Start again from the initial delay. Call this when a link was stable."""
        self._failures = 0

    def next_delay_s(self, kind: FailureKind, retry_after_s: float | None = None) -> float:
        """Count one failure and return a random delay in seconds before the next dial."""
        cap_s = self._policy.max_s if kind is FailureKind.LOSS else self._policy.refused_max_s
        bound_s = min(cap_s, self._policy.initial_s * float(1 << min(self._failures, 16)))
        self._failures += 1
        if retry_after_s is not None:
            floor_s = _clamped(retry_after_s)
            return floor_s + self._rng() * min(bound_s, floor_s)
        return self._rng() * bound_s

    def fixed_delay_s(self, retry_after_s: float | None = None) -> float:
        """Count one failure and return `contended_s` or `Retry-After`, if that is longer, plus up to 10 % jitter.

        Use this for a contended identity and for a token that was never accepted.
        """
        self._failures += 1
        floor_s = 0.0 if retry_after_s is None else _clamped(retry_after_s)
        return max(self._policy.contended_s, floor_s) * (1 + 0.1 * self._rng())


def _clamped(retry_after_s: float) -> float:
    return min(max(retry_after_s, RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S)


OWN_STATUSES = frozenset({401, 403, 404, 408, 429})
NO_ANSWER = frozenset({"dns", "tcp", "proxy", "timeout"})
FAILURES = (
    *("dns", "tcp", "tls", "timeout", "proxy", "handshake", "token"),
    *(f"http_{status}" for status in sorted(OWN_STATUSES)),
    *(f"http_{digit}xx" for digit in "2345"),
)


class DialOutcome(Enum):
    """Outcomes of an attempt to bring a link online."""

    OK = "ok"
    FAILED = "failed"  # the controller was reachable
    UNREACHABLE = "away"  # the controller was unreachable, as far as the dial shows


def failure_name(reason: str, status: int) -> str:
    """Return the metric label of a `ports.DialFailure`: one of `FAILURES`, or `other`."""
    name = reason
    if status:
        name = f"http_{status}" if status in OWN_STATUSES else f"http_{status // 100}xx"
    return name if name in FAILURES else "other"


def is_controller_unreachable(reason: str, status: int, since_working_s: float | None) -> bool:
    """Return True if the dial's failure means that the controller was unreachable.

    That is so without any answer (DNS, TCP, timeout, proxy), and for statuses of a proxy in front of an absent
    controller (408, 5xx, a 404 shortly after a working link). Bad TLS and a broken handshake are answers.
    """
    if not status:
        return reason in NO_ANSWER
    return classify(status, None, since_working_s) is FailureKind.LOSS
