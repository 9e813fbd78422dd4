"""Pacing of an agent's calls: pure functions of time, which is passed in as a number."""

from __future__ import annotations

import math
from enum import Enum
from typing import Protocol


class PollStyle(Enum):
    """Pacing of an agent's polls."""

    TICKER = "ticker"  # at a fixed rate, in a loop of its own
    PAUSE = "pause"  # a fixed pause after each response
    SERIAL = "serial"  # at a fixed rate, in one loop with the heartbeats: no heartbeat is sent while a poll is held


class Pace(Protocol):
    """Schedule of a repeated call in monotonic seconds. `due_s` is the next call's time, possibly past."""

    due_s: float

    def started(self, now_s: float) -> None:
        """Record that the call that was due has begun."""

    def ended(self, now_s: float) -> None:
        """Record that the call has its response."""


class Ticker:
    """Go's `time.Ticker`: a fixed grid. Of the ticks missed during a long call one is kept, the others are dropped."""

    def __init__(self, period_s: float, start_s: float, *, at_once: bool = False) -> None:
        """Set the first tick one period after `start_s`, or to `start_s` if `at_once`."""
        if period_s <= 0:
            raise ValueError("a ticker's period must be positive")
        self._period_s = period_s
        self.due_s = start_s if at_once else start_s + period_s

    def started(self, now_s: float) -> None:
        # A timer may fire a little early; that still counts as the tick for which it was set.
        late_s = max(0.0, now_s - self.due_s)
        self.due_s += self._period_s * (math.floor(late_s / self._period_s) + 1)

    def ended(self, now_s: float) -> None:
        """Leave the grid as it is: a response does not move it."""


class Pause:
    """A fixed pause after each response; the first call is due at once."""

    def __init__(self, pause_s: float, start_s: float) -> None:
        if pause_s <= 0:
            raise ValueError("a pause must be positive")
        self._pause_s = pause_s
        self.due_s = start_s

    def started(self, now_s: float) -> None:
        """Leave the schedule as it is: the pause starts with the response."""

    def ended(self, now_s: float) -> None:
        self.due_s = now_s + self._pause_s
