"""How long the event loop is kept from its work: while it is, no agent is answered and no ping either."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from shim.metrics import Metrics
from shim.ports import Clock

SAMPLE_S = 0.1


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The fastest event loop that is installed; `None` is asyncio's own."""
    try:
        import uvloop  # noqa: PLC0415 - not installed everywhere
    except ModuleNotFoundError:
        return None
    return uvloop.new_event_loop


async def watch_loop(clock: Clock, metrics: Metrics, stop: asyncio.Event) -> None:
    """Measure until `stop` how late a timer comes. A block may have lasted up to `SAMPLE_S` longer than is seen."""
    longest_s = 0.0
    while not stop.is_set():
        before = clock.monotonic_s()
        await asyncio.sleep(SAMPLE_S)
        late_s = max(0.0, clock.monotonic_s() - before - SAMPLE_S)
        metrics.loop_lag_seconds.observe(late_s)
        if late_s > longest_s:
            longest_s = late_s
            metrics.loop_lag_max_seconds.set(late_s)
