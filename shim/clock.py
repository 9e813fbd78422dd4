"""The only reader of clocks. Everything else gets a `Clock`, or the time itself as data."""

from __future__ import annotations

import time


class Clock:
    """The machine's clocks; tests pass an object with the same two methods."""

    def monotonic_s(self) -> float:
        """Seconds on a clock that never steps; only differences mean anything."""
        return time.monotonic()

    def wall_s(self) -> float:
        """Unix seconds; may step in either direction."""
        return time.time()
