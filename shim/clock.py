"""Clock of the machine. All other modules get a `Clock`, or the time itself as data."""

from __future__ import annotations

import time


class Clock:
    """The machine's clocks. Tests use an object with the same three methods."""

    # These are the functions themselves, without a method around them: every request calls them several times.
    monotonic_s = staticmethod(time.monotonic)
    """Return seconds of a clock that never steps; only differences have a meaning."""
    wall_s = staticmethod(time.time)
    """Return Unix seconds; the clock may step in either direction."""
    cpu_s = staticmethod(time.thread_time)
    """Return the CPU seconds that the calling thread has used."""
