"""When an agent calls next: pure pacing, time goes in as numbers."""

from __future__ import annotations

import math
from enum import Enum
from typing import Protocol


class PollStyle(Enum):
    """How an agent paces its polls."""

    TICKER = "ticker"  # at a fixed rate, from a loop of its own
    PAUSE = "pause"  # a fixed pause after each answer
    SERIAL = "serial"  # at a fixed rate, but in one loop with the heartbeats: none is sent while a poll is held


class Pace(Protocol):
    """Times of a repeated call, in monotonic seconds. `due_s` is when the next call is due, perhaps long ago."""

    due_s: float

    def started(self, now_s: float) -> None:
        """The call that was due begins."""

    def ended(self, now_s: float) -> None:
        """It has its answer."""


class Ticker:
    """Go's `time.Ticker`: a fixed grid; of the ticks missed during a long call one waits, the rest are lost."""

    def __init__(self, period_s: float, start_s: float, *, at_once: bool = False) -> None:
        """The first tick comes a period after `start_s`, or right then if `at_once`."""
        if period_s <= 0:
            raise ValueError("a ticker's period must be positive")
        self._period_s = period_s
        self.due_s = start_s if at_once else start_s + period_s

    def started(self, now_s: float) -> None:
        # A timer may fire a little early; that is the tick it was set for all the same.
        late_s = max(0.0, now_s - self.due_s)
        self.due_s += self._period_s * (math.floor(late_s / self._period_s) + 1)

    def ended(self, now_s: float) -> None:
        """An answer does not move the grid."""


class Pause:
    """A fixed pause after each answer; the first call is due at once."""

    def __init__(self, pause_s: float, start_s: float) -> None:
        if pause_s <= 0:
            raise ValueError("a pause must be positive")
        self._pause_s = pause_s
        self.due_s = start_s

    def started(self, now_s: float) -> None:
        """The pause counts from the answer."""

    def ended(self, now_s: float) -> None:
        self.due_s = now_s + self._pause_s
