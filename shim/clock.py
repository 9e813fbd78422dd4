"""Clock of the machine. All other modules get a `Clock`, or the time itself as data."""

from __future__ import annotations

import time


def pause(seconds: float) -> None:
    """Block the process: for commands, never for what serves agents.

    Ctrl-C ends it at any moment. In `threading.Event.wait` there are moments at which it raises `RuntimeError` instead.
    """
    time.sleep(seconds)


class Clock:
    """The machine's clocks. Tests use an object with the same methods."""

    # These are the functions themselves, without a method around them: every request calls them several times.
    monotonic_s = staticmethod(time.monotonic)
    """Return seconds of a clock that never steps; only differences have a meaning."""
    wall_s = staticmethod(time.time)
    """Return Unix seconds; the clock may step in either direction."""
    cpu_s = staticmethod(time.thread_time)
    """Return the CPU seconds that the calling thread has used."""

    def __init__(self) -> None:
        self._began_ms = int(time.monotonic() * 1000)

    def until_tick_s(self, every_s: float) -> float:
        """Return the seconds to a multiple of `every_s` since the clock was made, at least half of `every_s`.

        Periodic work of the same interval is due at the same moment, so that an idle process wakes up once for all. The
        moment is exact to the millisecond if it is asked for in the event loop, whose timers count these.
        """
        every_ms = int(every_s * 1000)
        left_ms = every_ms - (int(time.monotonic() * 1000) - self._began_ms) % every_ms
        return (left_ms if left_ms > every_ms / 2 else left_ms + every_ms) / 1000
