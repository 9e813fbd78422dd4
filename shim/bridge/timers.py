"""Timers that end with the bridge: after `close()` nothing happens later any more."""

from __future__ import annotations

from collections.abc import Callable

from shim.ports import Timer, Timers


class _Pending:
    """`ports.Timer`."""

    __slots__ = ("_callback", "_owner", "timer")

    def __init__(self, owner: OwnedTimers, callback: Callable[[], None]) -> None:
        self._owner = owner
        self._callback = callback
        self.timer: Timer | None = None

    def fire(self) -> None:
        self._owner.pending.discard(self)
        self._callback()

    def cancel(self) -> None:
        self._owner.pending.discard(self)
        if self.timer is not None:
            self.timer.cancel()


class OwnedTimers:
    """`ports.Timers` on others that remembers what is pending."""

    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self._closed = False
        self.pending: set[_Pending] = set()

    def call_later(self, delay: float, callback: Callable[[], None], /) -> Timer:
        """See `ports.Timers`; once closed, nothing is called."""
        pending = _Pending(self, callback)
        if not self._closed:
            self.pending.add(pending)
            pending.timer = self._timers.call_later(delay, pending.fire)
        return pending

    def close(self) -> None:
        """Cancel everything."""
        self._closed = True
        for pending in list(self.pending):
            pending.cancel()
