"""SIGTERM while fifty agents wait for commands."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import aiohttp

from tests.chaos.harness.waiting import Starved, last
from tests.support.processes import TOKEN, Shim, world

POLLS = 50
HOLD_S = 20.0


async def held(shim: Shim, session: aiohttp.ClientSession) -> int:
    async with session.get(f"{shim.admin}/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(int(float(line.rpartition(" ")[2])) for line in lines if line.startswith("agent_shim_polls_held"))


async def test_all_held_polls_are_answered_empty_within_1_s_and_the_process_is_gone_within_5(tmp_path: Path) -> None:
    async with (
        aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {TOKEN}"}, connector=aiohttp.TCPConnector(limit=0)
        ) as session,
        world(tmp_path, {"poll": {"hold": HOLD_S}}) as (shim, _),
    ):
        await shim.start()
        answered_at: list[float] = []

        async def poll(number: int) -> object:
            async with session.get(f"{shim.url}/api/v1/agents/agent-{number}/commands") as response:
                body = await response.json()
                answered_at.append(time.monotonic())
                return response.status, body["commands"]

        polls = [asyncio.create_task(poll(number)) for number in range(POLLS)]
        async with asyncio.timeout(HOLD_S - 5):
            while await held(shim, session) < POLLS:
                await last(0.05)
        assert not answered_at

        starved = Starved(shim.pid, os.getpid())
        watching = asyncio.create_task(starved.watch())
        began = time.monotonic()
        code = await shim.stop()
        took_s = time.monotonic() - began
        watching.cancel()
        assert await asyncio.gather(*polls) == [(200, [])] * POLLS
        assert max(answered_at) - began - starved.for_s < 1
        assert (code, took_s - starved.for_s < 5) == (0, True)
