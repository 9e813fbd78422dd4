"""Work at given times: a queue of deadlines behind one timer, periodic tasks, and work in slices."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any

from shim.bridge.context import BridgeContext
from shim.core.records import SessionKey
from shim.log import get

log = get(__name__)

TICK_S = 5.0
"""Interval of the periodic tasks. Each of them serves a time limit of half a minute or more, or retries a write."""
# Agents that polled at the same time, for example after a restart, are due at the same time. Answering a bounded number
# per turn of the event loop lets other agents' calls be served in between.
AT_A_TIME = 64
SLOT_S = 0.02
CROWD = 16
GOLDEN_RATIO = 0.6180339887498949
EARLY = 0.25
"""Share of a delay by which `DeadlineQueue.add` may bring a deadline forward."""
SLICE_S = 0.002
"""Time for which work on all sessions may occupy the event loop in one turn."""

DueCallback = Callable[[SessionKey, Any], None]
PeriodicTask = tuple[float, Callable[[], Iterator[None] | None]]
"""Interval in seconds, and a function. An iterator that it returns is advanced over as many turns as it takes."""


class DeadlineQueue:
    """Callbacks ordered by due time, all behind one timer.

    A callback cannot be cancelled: it must check for itself if it is still needed.
    """

    def __init__(self, ctx: BridgeContext) -> None:
        self._ctx = ctx
        self._heap: list[tuple[float, int, DueCallback, SessionKey, Any]] = []
        self._numbers = count()
        self._armed_for: float | None = None
        self._slots: Counter[int] = Counter()

    def add(self, delay_s: float, due: DueCallback, key: SessionKey, item: Any) -> None:
        """Call `due(key, item)` after `delay_s`, or up to a quarter earlier if many calls are due at the same time.

        Agents that polled in the same second poll again in the same second, and so on for hours: the calls of others
        would wait behind thousands of them again and again. Spread a few times, they are as far apart as they can be.
        """
        now = self._ctx.now
        at, number = now + delay_s, next(self._numbers)
        if self._slots[int(at / SLOT_S)] >= CROWD:
            # Multiples of the golden ratio, without their integers, fill the interval evenly however many there are.
            at = now + delay_s * (1.0 - EARLY * (number * GOLDEN_RATIO % 1.0))
        self._slots[int(at / SLOT_S)] += 1
        heapq.heappush(self._heap, (at, number, due, key, item))
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
            at, _, due, key, item = heapq.heappop(self._heap)
            slot = int(at / SLOT_S)
            self._slots[slot] -= 1
            if not self._slots[slot]:
                del self._slots[slot]
            due(key, item)
        self._arm()


def in_slices(ctx: BridgeContext, steps: Iterator[None]) -> None:
    """Advance an iterator to its end, for at most `SLICE_S` in each turn of the event loop.

    Agents are answered between two slices. A step must therefore check that its object still exists.
    """
    end_s = ctx.now + SLICE_S
    for _ in steps:
        if ctx.now > end_s:
            ctx.timers.call_later(0, partial(in_slices, ctx, steps))
            return


class PeriodicTasks:
    """Runner of periodic tasks behind one timer. Intervals are multiples of `TICK_S`.

    A task that raises is logged and counted; the others go on. They are carried out by `in_slices`, because with
    thousands of sessions they take tens of milliseconds together.
    """

    def __init__(self, ctx: BridgeContext, tasks: Sequence[PeriodicTask]) -> None:
        self._ctx = ctx
        self._tasks = tasks
        self._done_at = [ctx.now] * len(tasks)

    def start(self) -> None:
        """Start the periodic tasks; the first tick comes after about `TICK_S`."""
        self._ctx.timers.call_later(self._ctx.clock.until_tick_s(TICK_S), self._tick)

    def _tick(self) -> None:
        now = self._ctx.now
        due = []
        for number, (every_s, task) in enumerate(self._tasks):
            if now - self._done_at[number] >= every_s - TICK_S / 2:  # a timer may be early by a rounding error
                self._done_at[number] = now
                due.append(task)
        in_slices(self._ctx, self._steps(due))

    def _steps(self, tasks: Sequence[Callable[[], Iterator[None] | None]]) -> Iterator[None]:
        for task in tasks:
            try:
                yield from task() or ()
            except Exception:
                self._ctx.metrics.internal_errors.labels("bridge").inc()
                log.exception("upkeep_failed", duty=getattr(task, "__qualname__", "?"))
            yield
        # Only now: tasks that take longer than the interval must not run twice at the same time.
        self._ctx.timers.call_later(self._ctx.clock.until_tick_s(TICK_S), self._tick)
