"""The log of a running shim: its level changes at run time, its format does not, an outage does not flood it."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from pathlib import Path

import aiohttp

from tests.support.processes import Shim, world

SWIFT = {"reconnect": {"initial_s": 0.01, "max_s": 0.02}}


async def dialled(http: aiohttp.ClientSession, shim: Shim, number: int) -> None:
    """Wait until so many more dials have found nobody."""

    async def so_far() -> float:
        async with http.get(f"{shim.admin}/metrics") as response:
            found = re.search(
                r'^agent_shim_upstream_dials_total{outcome="tcp"} (\S+)$', await response.text(), re.MULTILINE
            )
            assert found is not None
            return float(found[1])

    wanted = await so_far() + number
    async with asyncio.timeout(60):
        while await so_far() < wanted:
            pass


async def test_the_level_changes_at_run_time_and_a_format_waits_for_a_restart(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with world(tmp_path, {"upstream": SWIFT}) as (shim, controller):
        await shim.start()
        await shim.event("link_state", state="online")
        assert not any('"level": "debug"' in line for line in shim.lines)
        shim.write({"log": {"level": "debug", "format": "console"}})
        shim.send(signal.SIGHUP)
        reloaded = await shim.event("config_reloaded")
        assert reloaded["needs_restart"] == ["log.format"]
        await controller.kill()
        await shim.event("link_retry")  # a line of level debug, still as JSON
        after = len(shim.lines)
        shim.write({"log": {"level": "info"}})
        shim.send(signal.SIGHUP)
        await shim.event("config_reloaded", after)
        after = len(shim.lines)
        await dialled(http, shim, 2)
        assert [line for line in shim.lines[after:] if '"level": "debug"' in line] == []


async def test_an_outage_is_told_once_and_not_at_every_dial(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, {"upstream": SWIFT}) as (shim, controller):
        await shim.start()
        await shim.event("link_state", state="online")
        await controller.kill()
        await shim.event("dial_failed")
        after = len(shim.lines)
        await dialled(http, shim, 30)
        assert [json.loads(line)["event"] for line in shim.lines[after:]] == []
        await controller.start()
        await shim.event("link_state", after, state="online")
