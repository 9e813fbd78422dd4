"""A process that stood still (SIGSTOP, a frozen container) reads what has arrived before it judges anybody."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import aiohttp
import pytest

from tests.support.processes import TOKEN, world

AUTH = {"Authorization": f"Bearer {TOKEN}"}
HASTY = {
    "upstream": {"ping_interval_s": 2, "read_timeout_s": 6, "heartbeat_interval_s": 2, "idle_close_s": 60},
    "poll": {"hold": "off"},
}


@pytest.mark.parametrize("paused_s", [9.0, 16.0])
async def test_a_command_that_arrived_during_a_pause_is_read_before_the_link_is_judged(
    tmp_path: Path, paused_s: float
) -> None:
    async with (
        world(tmp_path, HASTY, "--ping-interval-s", "2") as (shim, controller),
        aiohttp.ClientSession(headers=AUTH) as http,
    ):
        await shim.start()
        base = f"{shim.url}/api/v1/clusters/agent"
        async with http.post(f"{base}/register", json={"agent_id": "a", "name": "n"}) as response:
            cluster_id = (await response.json())["cluster_id"]
        beat = {"agent_id": "a", "status": "healthy"}
        assert (await http.post(f"{base}/{cluster_id}/heartbeat", json=beat)).status == 200
        await controller.until(type="heartbeat_ack", direction="out")
        os.kill(shim.pid, signal.SIGSTOP)
        try:
            pushed = await controller.api.push({"cluster_id": cluster_id, "type": "restart"})
            await asyncio.sleep(paused_s)  # the pause itself is what is tried
        finally:
            os.kill(shim.pid, signal.SIGCONT)
        await shim.event("command_queued", command=pushed["id"])
        async with http.get(f"{base}/{cluster_id}/poll") as response:
            assert [each["id"] for each in (await response.json())["commands"]] == [pushed["id"]]
        assert not shim.events("link_broken")
        assert not shim.events("link_lost")
