"""The only reader of clocks. Everything else gets a `Clock`, or the time itself as data."""

from __future__ import annotations

import time


class Clock:
    """The machine's clocks; tests pass an object with the same two methods."""

    # The functions themselves: they are called several times for each request.
    monotonic_s = staticmethod(time.monotonic)
    """Seconds on a clock that never steps; only differences mean anything."""
    wall_s = staticmethod(time.time)
    """Unix seconds; may step in either direction."""
