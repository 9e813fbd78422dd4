"""Another number of shards: what waits is found again, wherever it belongs now."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.replicas import SHARDS, gateway

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(400)]


async def divide(url: str, count: int) -> tuple[int, str]:
    return await store("shards", str(count), "--at", url)


async def store(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "shim", "store", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    return process.returncode or 0, said.decode().strip()


async def test_the_store_is_divided_anew_while_nobody_uses_it(tmp_path: Path, pg_url: str) -> None:
    assert (await divide(pg_url, 5))[
        1
    ] == "store shards: the database was never used: the first replica makes the shards"
    async with gateway(tmp_path, pg_url) as gate:
        (a,) = await gate.add("a")
        await gate.settled(a)
        agents = [gate.agent(number) for number in range(6)]
        for agent in agents:
            await agent.register(a)
            await gate.push(agent, f"c-{agent.agent_id}")
            await gate.until_state(a, f"c-{agent.agent_id}", "queued")
        code, said = await divide(pg_url, 5)
        assert (code, said) == (1, "store shards: replicas use the database (a): stop all of them first")
        assert await a.stop() == 0
        for count, before in ((40, SHARDS), (5, 40)):
            assert await divide(pg_url, count) == (0, f"{count} shards, {before} before")
        b, c = await gate.add("b", "c")
        assert sorted(await gate.settled(b, c)) == [2, 3]
        for agent in agents:
            assert await agent.poll_until(c, f"c-{agent.agent_id}") == [f"c-{agent.agent_id}"]


async def test_a_copied_store_is_divided_before_its_first_replica_starts(
    tmp_path: Path, postgres: Any, pg_url: str
) -> None:
    async with gateway(tmp_path, pg_url) as gate:
        (a,) = await gate.add("a")
        await gate.settled(a)
        assert await a.stop() == 0
    copied = postgres.create()
    code, said = await store("copy", "--from", pg_url, "--to", copied)
    assert code == 0, said
    assert await divide(copied, 40) == (0, f"40 shards, {SHARDS} before")
