"""Timers: a group that is cancelled together, a queue of deadlines behind one timer, and periodic tasks."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any

from shim.bridge.context import BridgeContext
from shim.core.records import SessionKey
from shim.log import get
from shim.ports import Clock, Timer, Timers

log = get(__name__)

LATE_S = 1.0
"""Delay after which a timer is considered late because the process was stopped, frozen or without CPU."""
CATCH_UP_S = 0.25
"""Delay of a late timer, in which waiting input is read: event loops call timers before they read from sockets."""


TICK_S = 5.0
"""Interval of the periodic tasks. Each of them serves a time limit of half a minute or more, or retries a write."""
# Agents that polled at the same time, for example after a restart, are due at the same time. Answering a bounded number
# per turn of the event loop lets other agents' calls be served in between.
AT_A_TIME = 64

DueCallback = Callable[[SessionKey, Any], None]
PeriodicTask = tuple[float, Callable[[], None]]


class _PendingTimer:
    """One `ports.Timer` of a `TimerGroup`."""

    __slots__ = ("_callback", "_due_s", "_owner", "timer")

    def __init__(self, owner: TimerGroup, callback: Callable[[], None], due_s: float) -> None:
        self._owner = owner
        self._callback = callback
        self._due_s: float | None = due_s
        self.timer: Timer | None = None

    def fire(self) -> None:
        """Call the callback; if the timer is late, wait once for input that arrived meanwhile."""
        if self._due_s is not None and self._owner.now_s() - self._due_s > LATE_S:
            self._due_s = None
            self.timer = self._owner.again(CATCH_UP_S, self.fire)
            return
        self._owner.pending.discard(self)
        self._callback()

    def cancel(self) -> None:
        """Cancel the call (`ports.Timer`)."""
        self._owner.pending.discard(self)
        if self.timer is not None:
            self.timer.cancel()


class TimerGroup:
    """`ports.Timers` on top of another one, with a list of its pending timers."""

    def __init__(self, timers: Timers, clock: Clock) -> None:
        self._timers = timers
        self._closed = False
        self.now_s = clock.monotonic_s
        self.again = timers.call_later
        self.pending: set[_PendingTimer] = set()

    def call_later(self, delay: float, callback: Callable[[], None], /) -> Timer:
        """Call `callback` after `delay` seconds, unless the group is closed by then."""
        pending = _PendingTimer(self, callback, self.now_s() + delay)
        if not self._closed:
            self.pending.add(pending)
            pending.timer = self._timers.call_later(delay, pending.fire)
        return pending

    def close(self) -> None:
        """Cancel all pending timers and ignore later calls of `call_later`."""
        self._closed = True
        for pending in list(self.pending):
            pending.cancel()


class DeadlineQueue:
    """Callbacks ordered by due time, all behind one timer.

    A callback cannot be cancelled: it must check for itself if it is still needed.
    """

    def __init__(self, ctx: BridgeContext) -> None:
        self._ctx = ctx
        self._heap: list[tuple[float, int, DueCallback, SessionKey, Any]] = []
        self._numbers = count()
        self._armed_for: float | None = None

    def add(self, delay_s: float, due: DueCallback, key: SessionKey, item: Any) -> None:
        """Call `due(key, item)` after `delay_s`."""
        heapq.heappush(self._heap, (self._ctx.now + delay_s, next(self._numbers), due, key, item))
        self._arm()

    def _arm(self) -> None:
        if not self._heap:
            return
        at = self._heap[0][0]
        if self._armed_for is None or at < self._armed_for:
            self._armed_for = at
            self._ctx.timers.call_later(max(at - self._ctx.now, 0.0), partial(self._fire, at))

    def _fire(self, armed_for: float) -> None:
        if self._armed_for != armed_for:
            return
        self._armed_for = None
        now = max(self._ctx.now, armed_for)
        for _ in range(AT_A_TIME):
            if not self._heap or self._heap[0][0] > now:
                break
            _, _, due, key, item = heapq.heappop(self._heap)
            due(key, item)
        self._arm()


class PeriodicTasks:
    """Runner of periodic tasks behind one timer. Intervals are multiples of `TICK_S`.

    A task that raises is logged and counted; the others go on.
    """

    def __init__(self, ctx: BridgeContext, tasks: Sequence[PeriodicTask]) -> None:
        self._ctx = ctx
        self._tasks = tasks
        self._done_at = [ctx.now] * len(tasks)

    def start(self) -> None:
        """Start the periodic tasks; the first tick comes after `TICK_S`."""
        self._ctx.timers.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._ctx.timers.call_later(TICK_S, self._tick)
        now = self._ctx.now
        for number, (every_s, task) in enumerate(self._tasks):
            if now - self._done_at[number] < every_s - TICK_S / 2:  # a timer may be early by a rounding error
                continue
            self._done_at[number] = now
            try:
                task()
            except Exception:
                self._ctx.metrics.internal_errors.labels("bridge").inc()
                log.exception("upkeep_failed", duty=getattr(task, "__qualname__", "?"))
