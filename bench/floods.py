"""`python -m bench.floods`: how long a heartbeat and `/healthz` take while others flood both ports.

The floods are those of tests/security/test_floods.py, each against a process of its own. 100 ms are the goal; the flood
itself comes from this machine too, so that the figures mean something only on one with cores to spare.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.security.test_floods import (
    FLOODS,
    Bystanders,
    Flood,
    by_tls,
    connections_beyond_the_maximum,
    many_descriptors,
    silent_handshakes,
)
from tests.support.processes import world

GOAL_MS = 100.0


async def measure(flood: Callable[[Flood], Awaitable[None]]) -> list[float]:
    """Return the milliseconds that each call of the bystanders took, in order of size."""
    with tempfile.TemporaryDirectory() as folder:
        config, context = by_tls(Path(folder)) if flood is silent_handshakes else ({}, None)
        async with many_descriptors(), world(Path(folder), config) as (shim, controller):
            await shim.start()
            it = Flood(shim, controller)
            others = Bystanders(shim, context, room=flood is not connections_beyond_the_maximum)
            async with asyncio.TaskGroup() as group:
                group.create_task(others.watch())
                await others.begun.wait()
                await flood(it)
                others.over.set()
            for line in it.lines:
                line.close()
    return sorted(1000 * took_s for took_s in others.took_s)


def main() -> int:
    """Measure every flood; exit code 1 if the 99th percentile of one is above the goal."""
    above = 0
    print(f"{'flood':<32}{'calls':>7}{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}")
    for flood in FLOODS:
        took_ms = asyncio.run(measure(flood))
        p99_ms = took_ms[min(len(took_ms) - 1, int(0.99 * len(took_ms)))]
        above += p99_ms > GOAL_MS
        name = getattr(flood, "__name__", "").replace("_", " ")
        middle_ms = statistics.median(took_ms)
        print(f"{name:<32}{len(took_ms):>7}{middle_ms:>9.1f}{p99_ms:>9.1f}{took_ms[-1]:>9.1f}", flush=True)
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
