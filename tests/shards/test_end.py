"""How a replica ends what it started."""

from __future__ import annotations

import asyncio

from shim.shards.cluster import end


async def test_a_task_that_swallows_a_cancellation_is_ended_all_the_same() -> None:
    """As the NATS client does while it connects; a stop would wait for it for ever."""
    swallowed = asyncio.Event()

    async def connects() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            swallowed.set()
        await asyncio.Event().wait()

    tasks = [asyncio.create_task(connects()), asyncio.create_task(asyncio.sleep(3600))]
    await asyncio.sleep(0)
    async with asyncio.timeout(30):
        await end(tasks)
    assert swallowed.is_set()
    assert all(task.cancelled() for task in tasks)
