"""What is due later for thousands at a time: a tuple for each, and one timer for all."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

from shim.bridge.context import BridgeContext
from shim.core.records import SessionKey

# Agents that polled together, after a restart say, are due together, too: the others' calls come in between.
AT_A_TIME = 64

DueCallback = Callable[[SessionKey, Any], None]


class DeadlineQueue:
    """Calls that come due. None can be cancelled: the call must find out whether it still matters."""

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
