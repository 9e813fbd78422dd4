"""Time series of queue depth and command latency of the last hour, for the plots."""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec

from shim.core.records import CommandState
from shim.management.objectives import ObjectiveWindows
from shim.management.subject import Subject
from shim.ports import Timer

EVERY_S = 5.0
KEPT = 720
RECENT = 512


class Sample(msgspec.Struct, frozen=True):
    """One sample. `waiting` and `offered` count commands without evidence of delivery; `results` are not confirmed.

    `handed_over` counts the commands written to agents since the previous sample. `p50_s` and `p95_s` are their times
    since arrival, `None` without such commands. `calls_per_s` counts replies to agents since the previous sample, and
    `errors_per_s` those of them with a status of 400 or above.
    """

    at: float
    waiting: int
    offered: int
    results: int
    held: int
    handed_over: int
    p50_s: float | None
    p95_s: float | None
    calls_per_s: float
    errors_per_s: float


class Sampler:
    """Periodic sampler, active from `start` to `stop`."""

    def __init__(self, bridge: Subject) -> None:
        self._bridge = bridge
        self.windows = ObjectiveWindows(bridge.ctx.metrics, bridge.ctx.now)
        self._samples: deque[Sample] = deque(maxlen=KEPT)
        self._recent_s: deque[float] = deque(maxlen=RECENT)
        self._timer: Timer | None = None
        self._replies = (bridge.ctx.now, 0, 0)
        self.taken = 0

    def start(self) -> None:
        """Take a sample now, and then every `EVERY_S` seconds."""
        self.take()
        self._timer = self._bridge.ctx.timers.call_later(self._bridge.ctx.clock.until_tick_s(EVERY_S), self.start)

    def stop(self) -> None:
        """Stop sampling."""
        if self._timer is not None:
            self._timer.cancel()

    def take(self) -> Sample:
        """Take one sample."""
        bridge = self._bridge
        waiting = offered = 0
        for _, queue in bridge.queues:
            under_way = sum(live.state is CommandState.OFFERED for live in queue.offer.commands) if queue.offer else 0
            offered += under_way
            waiting += len(queue) - under_way
        times_s = list(bridge.hand_overs_s)
        bridge.hand_overs_s.clear()
        self._recent_s.extend(times_s)
        calls_per_s, errors_per_s = self._rates()
        sample = Sample(
            at=round(bridge.ctx.clock.wall_s(), 1),
            waiting=waiting,
            offered=offered,
            results=bridge.results,
            held=bridge.held_polls,
            handed_over=len(times_s),
            p50_s=quantile(times_s, 0.5),
            p95_s=quantile(times_s, 0.95),
            calls_per_s=calls_per_s,
            errors_per_s=errors_per_s,
        )
        self._samples.append(sample)
        self.windows.record(bridge.ctx.now)
        self.taken += 1
        return sample

    def _rates(self) -> tuple[float, float]:
        """Return the replies and the error replies per second since the previous sample."""
        calls = errors = 0
        for (status,), count in self._bridge.ctx.metrics.requests.sums("status").items():
            calls += count.number
            errors += count.number if status >= "400" else 0
        now = self._bridge.ctx.now
        before, old_calls, old_errors = self._replies
        self._replies = (now, calls, errors)
        passed_s = max(now - before, 1.0)
        return round((calls - old_calls) / passed_s, 2), round((errors - old_errors) / passed_s, 2)

    def last(self, number: int = KEPT) -> dict[str, list[Any]]:
        """Return the last samples by column, the oldest first."""
        samples = list(self._samples)[-number:] if number > 0 else []
        return {name: [getattr(sample, name) for sample in samples] for name in Sample.__struct_fields__}

    def latency(self) -> dict[str, Any]:
        """Return the number, median and 95th percentile of the times of the last commands written to agents."""
        times_s = [*self._recent_s, *self._bridge.hand_overs_s]
        return {"commands": len(times_s), "p50_s": quantile(times_s, 0.5), "p95_s": quantile(times_s, 0.95)}


def quantile(values: list[float], share: float) -> float | None:
    """Return the smallest value that at least this share of the values does not exceed; `None` without values."""
    if not values:
        return None
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))], 6)
