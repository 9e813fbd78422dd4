"""How long the event loop is kept from its work: while it is, no agent is answered and no ping either."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

from shim.metrics import Metrics
from shim.ports import Clock

SAMPLE_S = 0.1

# With 10,000 sessions a search for garbage through everything takes most of a second, in which no agent is answered,
# and by default it comes whenever a quarter more is alive than before: with every wave of held polls. What is garbage
# is nearly always young: the young are searched, and all only after tens of millions of objects.
_YOUNG, _MIDDLE, _ALL = 10_000, 20, 200


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The fastest event loop that is installed; `None` is asyncio's own."""
    try:
        import uvloop  # noqa: PLC0415 - not installed everywhere
    except ModuleNotFoundError:
        return None
    return uvloop.new_event_loop


def collect_rarely() -> None:
    """Spare this process's event loop long searches. What is alive now, modules and classes, is left out of all."""
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLE, _ALL)


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
