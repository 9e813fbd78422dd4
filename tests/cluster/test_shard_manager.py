"""Shards move between real processes: an owner dies, replicas come and go."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support.replicas import ENDED, LONG, SHARDS, assert_no_double_owner, elsewhere, events, gateway

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(180)]


async def test_the_owner_dies(tmp_path: Path, pg_url: str) -> None:
    async with gateway(tmp_path, pg_url, poll=LONG) as gate:
        a, b = await gate.add("a", "b")
        await gate.settled(a, b)
        agent, holding = gate.agent(1), gate.agent(2)
        for each in (agent, holding):
            await each.register(a)
        owner, other = await elsewhere(gate, agent)
        await gate.push(agent, "before")
        await gate.until_state(other, "before", "queued")
        assert await agent.heartbeat(other) == 204
        await owner.kill()
        held = asyncio.create_task(holding.poll_until(other, "held"))
        # a poll waits for the next owner, and a heartbeat need not
        assert await agent.heartbeat(other) == 204
        assert await agent.poll_until(other, "before") == ["before"]
        await agent.result(other, "before")
        found = await gate.until_state(other, "before", *ENDED)
        assert events(found).count("offered") == 1
        await gate.push(holding, "held")
        assert await held == ["held"]
        assert await gate.settled(other) == [SHARDS]
        assert_no_double_owner(tmp_path)


async def test_shards_are_spread_anew_when_replicas_come_and_go(tmp_path: Path, pg_url: str) -> None:
    """The lease is far longer than the test waits: what is taken over was given, and had not to run out."""
    async with gateway(tmp_path, pg_url, lease_s=600) as gate:
        (a,) = await gate.add("a")
        assert await gate.settled(a) == [SHARDS]
        agent = gate.agent(1)
        await agent.register(a)
        b, c = await gate.add("b", "c")
        assert sorted(await gate.settled(a, b, c)) == [5, 5, 6]
        names = [each["name"] for each in (await gate.status(c))["replicas"]]
        assert names == ["a", "b", "c"]
        assert await agent.heartbeat(b) == 204
        owner, other = await elsewhere(gate, agent)
        assert await owner.stop() == 0
        await agent.register(other)
        del gate.replicas[next(name for name, replica in gate.replicas.items() if replica is owner)]
        assert await gate.settled(*gate.replicas.values()) == [8, 8]
        assert owner.events("shard_given")
        assert not owner.events("shards_left")
        assert [event["level"] for event in owner.events("lease_lost")] == ["info"]
        await gate.push(agent, "after")
        assert await agent.poll_until(other, "after") == ["after"]
        assert_no_double_owner(tmp_path)
