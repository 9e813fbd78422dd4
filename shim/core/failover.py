"""Choice of the transport for an agent's calls: WebSocket or HTTP (docs/reference/protocol.md#4-modes)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from enum import Enum
from fnmatch import fnmatchcase

import msgspec

BREAKER_INITIAL_S = 1.0
BREAKER_MAX_S = 60.0
BREAKER_THRESHOLD = 3


def bucket(name: str) -> float:
    """Return an agent's place in [0, 100), a stable hash of its name.

    `name` is the cluster's name, else its id. The place is the same on every shim and in every version. So a rollout
    raised from 10 to 50 percent keeps the first 10.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) / 2**64 * 100


def in_rollout(name: str, percent: float, include: Iterable[str], exclude: Iterable[str]) -> bool:
    """Return True if the shim serves an agent of this name. `exclude` comes first, then `include`, then the hash."""
    if any(fnmatchcase(name, pattern) for pattern in exclude):
        return False
    return any(fnmatchcase(name, pattern) for pattern in include) or bucket(name) < percent


class Transport(Enum):
    """Transports for a call."""

    WEBSOCKET = "websocket"
    HTTP = "http"


class Failover:
    """Failover of one link in mode `auto`: HTTP after `after_s` of outage, WebSocket after `hold_down_s` of uptime.

    Times are monotonic seconds. The state is evaluated on each call, so no timer is needed.
    """

    def __init__(self) -> None:
        self.transport = Transport.WEBSOCKET

    def update(self, now: float, *, up: bool, since: float, after_s: float, hold_down_s: float) -> Transport:
        """Return the transport for a call at `now`. The link has been up, or down, since `since`."""
        if now - since >= (hold_down_s if up else after_s):
            self.transport = Transport.WEBSOCKET if up else Transport.HTTP
        return self.transport


class Breaker(msgspec.Struct):
    """Circuit breaker for the vendor's HTTP API. It opens after three failures in a row, each time for longer."""

    _failures: int = 0
    _delay_s: float = BREAKER_INITIAL_S
    _closed_at: float = 0.0

    def allows(self, now: float) -> bool:
        """Return True if a call may be tried: the breaker is closed, or its delay is over."""
        return now >= self._closed_at

    @property
    def open(self) -> bool:
        """True if at least the last three calls failed."""
        return self._failures >= BREAKER_THRESHOLD

    def succeeded(self) -> None:
        """Close the breaker after a successful call."""
        self._failures = 0
        self._delay_s = BREAKER_INITIAL_S
        self._closed_at = 0.0

    def failed(self, now: float) -> None:
        """Count a failed call; open the breaker from the third in a row on."""
        self._failures += 1
        if self._failures >= BREAKER_THRESHOLD:
            self._closed_at = now + self._delay_s
            self._delay_s = min(2 * self._delay_s, BREAKER_MAX_S)
