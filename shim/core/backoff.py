"""When to dial again: classify a failure, then draw a delay (protocol.md §2.1)."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import msgspec

RETRY_AFTER_MIN_S = 1.0
RETRY_AFTER_MAX_S = 300.0
RECENTLY_WORKING_S = 600.0


class FailureKind(Enum):
    """LOSS: the controller is away and should be found quickly. REFUSED: it answered and does not want us now."""

    LOSS = "loss"
    REFUSED = "refused"


class BackoffPolicy(msgspec.Struct, frozen=True):
    """Delays in seconds; `contended_s` is also the pace of an own token that was never accepted."""

    initial_s: float = 1
    max_s: float = 5
    refused_max_s: float = 60
    contended_s: float = 60


def classify(status: int, retry_after_s: float | None, since_working_s: float | None) -> FailureKind:
    """Tell loss from refusal by the handshake's HTTP status (0: none was received).

    `since_working_s` is the age of the last working link, `None` if there was none: a 404 shortly after one is a
    controller that is being redeployed, not a wrong address.
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
    """Full jitter, doubling from `initial_s`; starts over only by `reset()`, which a stable link earns.

    `rng` returns a float in [0, 1). A `Retry-After`, clamped to 1-300 s, is a lower bound: jitter is added to it, so
    that a fleet that was told the same second does not come back in it.
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
        """The link was stable: the next failure starts from the beginning."""
        self._failures = 0

    def next_delay_s(self, kind: FailureKind, retry_after_s: float | None = None) -> float:
        """Count one failure and draw the delay before the next dial."""
        cap_s = self._policy.max_s if kind is FailureKind.LOSS else self._policy.refused_max_s
        bound_s = min(cap_s, self._policy.initial_s * float(1 << min(self._failures, 16)))
        self._failures += 1
        if retry_after_s is not None:
            floor_s = _clamped(retry_after_s)
            return floor_s + self._rng() * min(bound_s, floor_s)
        return self._rng() * bound_s

    def fixed_delay_s(self, retry_after_s: float | None = None) -> float:
        """Count one failure and return the pace of a contended or never accepted identity, or what was asked for."""
        self._failures += 1
        floor_s = 0.0 if retry_after_s is None else _clamped(retry_after_s)
        return max(self._policy.contended_s, floor_s) * (1 + 0.1 * self._rng())


def _clamped(retry_after_s: float) -> float:
    return min(max(retry_after_s, RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S)
