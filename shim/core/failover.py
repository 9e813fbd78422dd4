"""Decide which way an agent's calls go: over the WebSocket or by HTTP (docs/reference/protocol.md#4-modes)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

BREAKER_INITIAL_S = 1.0
BREAKER_MAX_S = 60.0
BREAKER_THRESHOLD = 3


def bucket(name: str) -> float:
    """Return the place of an agent in [0, 100), by a stable hash of its cluster name, else of its id.

    It is the same on every shim and in every version: a fleet that goes from 10 to 50 percent keeps its first 10.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) / 2**64 * 100


def in_rollout(name: str, percent: float, include: Iterable[str], exclude: Iterable[str]) -> bool:
    """Return whether the shim serves an agent of this name. `exclude` comes first, then `include`, then the hash."""
    if any(fnmatchcase(name, pattern) for pattern in exclude):
        return False
    return any(fnmatchcase(name, pattern) for pattern in include) or bucket(name) < percent


class Transport(Enum):
    """How a call is served."""

    WEBSOCKET = "websocket"
    HTTP = "http"


class Failover:
    """`auto` for one link: HTTP once the link has been down for `after_s`, back once it was up for `hold_down_s`.

    Times are monotonic seconds. `up` is what the link is now; it is looked at on each call, so nothing runs in between.
    """

    def __init__(self, now: float) -> None:
        self._up_since: float | None = None
        self._down_since: float | None = now
        self.way = Transport.WEBSOCKET

    def update(self, now: float, *, up: bool, after_s: float, hold_down_s: float) -> Transport:
        """The way of a call that comes now."""
        if up:
            self._down_since = None
            self._up_since = now if self._up_since is None else self._up_since
            if self.way is Transport.HTTP and now - self._up_since >= hold_down_s:
                self.way = Transport.WEBSOCKET
        else:
            self._up_since = None
            self._down_since = now if self._down_since is None else self._down_since
            if now - self._down_since >= after_s:
                self.way = Transport.HTTP
        return self.way


@dataclass(slots=True)
class Breaker:
    """Whether the vendor's HTTP API is worth a try: after three failures in a row not for a while, ever longer."""

    _failures: int = 0
    _delay_s: float = BREAKER_INITIAL_S
    _closed_at: float = 0.0

    def allows(self, now: float) -> bool:
        """False while the breaker is open; when its time is over one call after the other may try."""
        return now >= self._closed_at

    @property
    def open(self) -> bool:
        """Whether the last calls failed."""
        return self._failures >= BREAKER_THRESHOLD

    def succeeded(self) -> None:
        """The API answered."""
        self._failures = 0
        self._delay_s = BREAKER_INITIAL_S
        self._closed_at = 0.0

    def failed(self, now: float) -> None:
        """It did not, or said that it is gone."""
        self._failures += 1
        if self._failures >= BREAKER_THRESHOLD:
            self._closed_at = now + self._delay_s
            self._delay_s = min(2 * self._delay_s, BREAKER_MAX_S)
