"""Timers that end with the bridge, and that judge nobody by what a standing process could not read."""

from __future__ import annotations

from collections.abc import Callable

from shim.ports import Clock, Timer, Timers

LATE_S = 1.0
"""A timer that fires so late was kept by a process that stood still: stopped, frozen, without CPU."""
CATCH_UP_S = 0.25
"""What arrived meanwhile is read within this time: event loops call timers before they look at sockets."""


class _PendingTimer:
    """`ports.Timer`."""

    __slots__ = ("_callback", "_due_s", "_owner", "timer")

    def __init__(self, owner: TimerGroup, callback: Callable[[], None], due_s: float) -> None:
        self._owner = owner
        self._callback = callback
        self._due_s: float | None = due_s
        self.timer: Timer | None = None

    def fire(self) -> None:
        if self._due_s is not None and self._owner.now_s() - self._due_s > LATE_S:
            self._due_s = None
            self.timer = self._owner.again(CATCH_UP_S, self.fire)
            return
        self._owner.pending.discard(self)
        self._callback()

    def cancel(self) -> None:
        self._owner.pending.discard(self)
        if self.timer is not None:
            self.timer.cancel()


class TimerGroup:
    """`ports.Timers` on others that remembers what is pending."""

    def __init__(self, timers: Timers, clock: Clock) -> None:
        self._timers = timers
        self._closed = False
        self.now_s = clock.monotonic_s
        self.again = timers.call_later
        self.pending: set[_PendingTimer] = set()

    def call_later(self, delay: float, callback: Callable[[], None], /) -> Timer:
        """See `ports.Timers`; once closed, nothing is called."""
        pending = _PendingTimer(self, callback, self.now_s() + delay)
        if not self._closed:
            self.pending.add(pending)
            pending.timer = self._timers.call_later(delay, pending.fire)
        return pending

    def close(self) -> None:
        """Cancel everything."""
        self._closed = True
        for pending in list(self.pending):
            pending.cancel()
