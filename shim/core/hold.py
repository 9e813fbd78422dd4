"""How long a poll with nothing to deliver may be held open, learnt for each agent (protocol.md §1.3)."""

from __future__ import annotations

from collections import deque
from enum import Enum
from statistics import median
from typing import Any

STEP_S = 1.0
MARGIN_S = 1.0
PROBE_AFTER = 50
MAX_PROBE_AFTER = 3200
MIN_SAMPLES = 4
AT_ONCE_S = 0.1
STEADY = 0.15


class Pace(Enum):
    """How the agent spaces its polls."""

    UNKNOWN = "unknown"
    TICKER = "ticker"  # at a fixed rate: a poll that ends late is followed by the next at once
    PAUSE = "pause"  # a fixed time after each answer


class Hold:
    """The learnt hold of one session; all times in seconds, `now` monotonic.

    It grows by 1 s with each poll that ended with our reply, halves when the agent leaves first, and then stays 1 s
    under the time at which it left. That ceiling is what the agent's client allows, or the moment at which the agent
    died: so after many answered polls at the ceiling it is tried 1 s higher, each time more rarely.
    """

    __slots__ = (
        "_answered_at",
        "_arrived_at",
        "_at_ceiling",
        "_base_interval_s",
        "_concurrent",
        "_gaps",
        "_pauses",
        "_probe_after",
        "ceiling_s",
        "changed",
        "held_s",
    )

    def __init__(self, stored: dict[str, Any] | None = None) -> None:
        known = stored or {}
        self.held_s: float = _number(known.get("hold_s"), STEP_S)
        self.ceiling_s: float | None = _number(known.get("ceiling_s"), None)
        self._concurrent = known.get("concurrent") is True
        self._base_interval_s: float | None = _number(known.get("interval_s"), None)
        self._at_ceiling = 0
        self._probe_after = int(_number(known.get("probe_after"), PROBE_AFTER))
        self._arrived_at: float | None = None
        self._answered_at: float | None = None
        self._gaps: deque[float] = deque(maxlen=8)
        self._pauses: deque[float] = deque(maxlen=8)
        self.changed = False

    def stored(self) -> dict[str, Any]:
        """What survives a restart, as a JSON object."""
        self.changed = False
        return {
            "hold_s": self.held_s,
            "ceiling_s": self.ceiling_s,
            "concurrent": self._concurrent,
            "interval_s": self._base_interval_s,
            "probe_after": self._probe_after,
        }

    @property
    def serial(self) -> bool:
        """True for an agent that heartbeats, but has never done so while a poll of it was held."""
        return self._base_interval_s is not None and not self._concurrent

    def limit_s(self, max_s: float) -> float:
        """How long the next poll may be held at most."""
        bounds: list[float] = [self.held_s, max_s]
        if self.ceiling_s is not None:
            bounds.append(self.ceiling_s)
        if self.serial and self._base_interval_s is not None:
            bounds.append(self._base_interval_s - MARGIN_S)
        return max(0.0, min(bounds))

    def poll_arrived(self, now: float) -> None:
        """A poll came: learn the agent's pace."""
        if self._arrived_at is not None:
            self._gaps.append(now - self._arrived_at)
        if self._answered_at is not None:
            self._pauses.append(now - self._answered_at)
        self._arrived_at, self._answered_at = now, None

    def replied(self, now: float, max_s: float) -> None:
        """The poll ended with our reply."""
        self._answered_at = now
        if self.ceiling_s is not None and self.held_s >= self.ceiling_s:
            self._at_ceiling += 1
            if self._at_ceiling >= self._probe_after and self.ceiling_s < max_s:
                self._at_ceiling = 0
                self.ceiling_s += STEP_S
                self.changed = True
        allowed = max_s if self.ceiling_s is None else min(max_s, self.ceiling_s)
        grown = min(self.held_s + STEP_S, max(allowed, 0.0))
        if grown != self.held_s:
            self.held_s = grown
            self.changed = True

    def left(self, after_s: float) -> None:
        """The agent hung up `after_s` after its poll arrived, before our reply."""
        self.held_s /= 2
        self.ceiling_s = max(0.0, after_s - MARGIN_S)
        self.held_s = min(self.held_s, self.ceiling_s)
        self._at_ceiling = 0
        self._probe_after = min(2 * self._probe_after, MAX_PROBE_AFTER)
        self._answered_at = None
        self.changed = True

    def heartbeat(self, interval_s: float | None, *, during_hold: bool) -> None:
        """A heartbeat came. `interval_s` is the measured interval, `None` while it is not known.

        Of a serial agent's intervals the shortest counts: the later ones contain our holds.
        """
        if during_hold and not self._concurrent:
            self._concurrent = self.changed = True
        if interval_s is not None and (self._base_interval_s is None or interval_s < self._base_interval_s):
            self._base_interval_s = interval_s
            self.changed = True

    def new_process(self) -> None:
        """Another process speaks for the agent now: its client may allow more."""
        if self.ceiling_s is not None:
            self.ceiling_s = None
            self._probe_after = PROBE_AFTER
            self.changed = True

    @property
    def pace(self) -> Pace:
        """How the agent spaces its polls, as far as that can be told."""
        if len(self._pauses) < MIN_SAMPLES or len(self._gaps) < MIN_SAMPLES:
            return Pace.UNKNOWN
        if median(self._pauses) < AT_ONCE_S:
            return Pace.TICKER  # its ticks come faster than our replies
        pause_spread, gap_spread = _spread(self._pauses), _spread(self._gaps)
        if min(pause_spread, gap_spread) > STEADY or pause_spread == gap_spread:
            return Pace.UNKNOWN
        return Pace.PAUSE if pause_spread < gap_spread else Pace.TICKER


def _spread(values: deque[float]) -> float:
    """Median deviation relative to the median."""
    middle = median(values)
    return median(abs(value - middle) for value in values) / middle if middle else 0.0


def _number(value: Any, default: Any) -> Any:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 else default
