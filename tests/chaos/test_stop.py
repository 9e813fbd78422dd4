"""SIGTERM while fifty agents wait for commands."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp

from tests.chaos.harness.waiting import last
from tests.support.processes import TOKEN, Shim, world

POLLS = 50
HOLD_S = 25.0


async def held(shim: Shim, session: aiohttp.ClientSession) -> int:
    async with session.get(f"{shim.admin}/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(int(float(line.rpartition(" ")[2])) for line in lines if line.startswith("agent_shim_polls_held"))


async def test_all_held_polls_are_answered_empty_and_the_process_ends_in_order(tmp_path: Path) -> None:
    """A poll that is still held when the agents' port closes is cut off: an answer to each shows that none was."""
    async with (
        aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {TOKEN}"}, connector=aiohttp.TCPConnector(limit=0)
        ) as session,
        world(tmp_path, {"poll": {"hold": HOLD_S, "max_hold_s": HOLD_S}}) as (shim, _),
    ):
        await shim.start()

        async def poll(number: int) -> object:
            async with session.get(f"{shim.url}/api/v1/agents/agent-{number}/commands") as response:
                body = await response.json()
                return response.status, body["commands"]

        polls = [asyncio.create_task(poll(number)) for number in range(POLLS)]
        async with asyncio.timeout(HOLD_S):
            while await held(shim, session) < POLLS:
                await last(0.05)
        assert await shim.stop() == 0
        assert await asyncio.gather(*polls) == [(200, [])] * POLLS
