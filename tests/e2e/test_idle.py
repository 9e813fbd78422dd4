"""A whole shim with nothing to do, in virtual time: how often it is woken."""

from __future__ import annotations

import asyncio

from bench import simulation
from tests.support.virtual import VirtualLoop

SPAN_S = 900.0


async def _woken() -> int:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    async with simulation.running():
        await asyncio.sleep(60)
        before = loop.jumps
        await asyncio.sleep(SPAN_S)
        return loop.jumps - before


def test_an_idle_shim_is_woken_twice_a_second_at_most() -> None:
    """The controller's part is counted too: it answers the pings."""
    assert simulation.run(_woken()) <= 2 * SPAN_S
