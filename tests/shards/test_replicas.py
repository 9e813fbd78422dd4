"""Several replicas as processes on real NATS servers: any serves any agent, one owns each link, whatever dies."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.natsd import NatsServer, cluster, running
from tests.support.processes import Shim
from tests.support.replicas import Agent, Gateway, gateway

pytestmark = [pytest.mark.needs("nats-server"), pytest.mark.timeout(300)]


ENDED = ("answered", "closed")
"""The controller has the result, or will: a connection that acknowledges heartbeats must do so once more."""


def events(found: dict[str, Any]) -> list[str]:
    return [step["event"] for step in found["trace"]]


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def assert_no_double_owner(folder: Path) -> int:
    """Once a token's next connection was opened, nothing comes in on the one before. Returns how many were next."""
    opened: dict[str, list[tuple[float, int]]] = defaultdict(list)
    last: dict[int, float] = {}
    for event in journal(folder):
        if event["kind"] == "opened":
            opened[event["owner"]].append((event["monotonic_s"], event["connection"]))
        elif event["kind"] in ("received", "ping_received"):
            last[event["connection"]] = event["monotonic_s"]
    successors = 0
    for connections in opened.values():
        for (_, before), (next_at, _) in pairwise(connections):
            assert last.get(before, 0.0) < next_at, "two owners sent at once"
            successors += 1
    return successors


async def elsewhere(gate: Gateway, agent: Agent) -> tuple[Shim, Shim]:
    """The owner of an agent's link, and another replica."""
    owner = await gate.owner(agent)
    return owner, next(replica for replica in gate.replicas.values() if replica is not owner)


async def test_any_replica_serves_any_agent(tmp_path: Path, nats: NatsServer) -> None:
    poll = {"hold": 20, "max_hold_s": 20}
    async with gateway(tmp_path, nats.url, poll=poll) as gate:
        a, b = await gate.add("a", "b")
        assert await gate.settled(a, b) == [4, 4]
        agents = [gate.agent(number) for number in range(8)]
        for number, agent in enumerate(agents):
            await agent.register((a, b)[number % 2])
        owners = dict.fromkeys(gate.replicas, 0)
        for agent in agents:
            owner = await gate.owner(agent)
            owners[next(name for name, replica in gate.replicas.items() if replica is owner)] += 1
        assert all(owners.values()), "one replica has all tokens"

        agent = agents[0]
        owner, other = await elsewhere(gate, agent)
        held = asyncio.create_task(agent.poll_until(other, "c-1"))
        await gate.until_held(owner)
        await gate.push(agent, "c-1")
        assert await held == ["c-1"]
        assert await agent.result(other, "c-1") == 1
        assert await agent.heartbeat(other) == 204
        for replica in (owner, other):
            found = await gate.until_state(replica, "c-1", *ENDED)
            assert events(found)[:4] == ["arrived", "offered", "delivered", "result"]
            assert found["trace"][2]["detail"] == "next request"
        assert found["replica"] == next(name for name, replica in gate.replicas.items() if replica is owner)
        status, _ = await agent.call(other, "GET", f"{agent.cluster_id}/tunnel-info")
        assert status == 200
        # An agent that leaves during a held poll frees it at the owner.
        held = asyncio.create_task(agent.poll(other))
        await gate.until_held(owner)
        held.cancel()
        await gate.until_held(owner, 0)
        # Larger than a message of NATS may be.
        body = {"agent_id": agent.agent_id, "name": agent.name, "metadata": {"note": "x" * 100_000}}
        assert (await agent.call(other, "POST", "register", body))[0] in (200, 503)
        assert 'agent_shim_relayed_calls_total{kind="poll",outcome="answered"} ' in await gate.metrics(other)
        await gate.until_ready(other)


async def test_the_owner_dies(tmp_path: Path, nats: NatsServer) -> None:
    async with gateway(tmp_path, nats.url) as gate:
        a, b = await gate.add("a", "b")
        await gate.settled(a, b)
        agent = gate.agent(1)
        await agent.register(a)
        owner, other = await elsewhere(gate, agent)
        await gate.push(agent, "before")
        await gate.until_state(other, "before", "queued")
        assert await agent.heartbeat(other) == 204
        await owner.kill()
        # The replica that served the agent vouches for it: its registration is replayed before it calls again.
        await gate.controller.until(2, type="register", direction="in")
        assert await agent.poll_until(other, "before") == ["before"]
        await agent.result(other, "before")
        assert await agent.heartbeat(other) == 204
        found = await gate.until_state(other, "before", *ENDED)
        assert events(found).count("offered") == 1
        assert await gate.settled(other) == [8]
        assert_no_double_owner(tmp_path)


async def test_a_paused_owner_sends_nothing_more(tmp_path: Path, nats: NatsServer) -> None:
    async with gateway(tmp_path, nats.url) as gate:
        a, b = await gate.add("a", "b")
        await gate.settled(a, b)
        agents = [gate.agent(number) for number in range(6)]
        for agent in agents:
            await agent.register(a)
        agent = agents[0]
        owner, other = await elsewhere(gate, agent)
        await gate.push(agent, "c-1")
        await gate.until_state(other, "c-1", "queued")
        owner.send(signal.SIGSTOP)
        assert await agent.heartbeat(other) == 204  # nobody answers, and agents need not wait
        assert await agent.poll_until(other, "c-1") == ["c-1"]
        await agent.result(other, "c-1")
        for each in agents:
            assert await each.heartbeat(other) == 204
        assert await gate.settled(other) == [8]
        found = await gate.until_state(other, "c-1", *ENDED)
        assert events(found).count("offered") == 1
        owner.send(signal.SIGCONT)
        await owner.event("lease_lost")
        assert await gate.settled(owner, other) == [4, 4]
        for each in agents:
            assert await each.heartbeat(owner) == 204
            await gate.owner(each)
        assert assert_no_double_owner(tmp_path) >= 1


async def test_links_are_spread_anew_when_replicas_come_and_go(tmp_path: Path, nats: NatsServer) -> None:
    async with gateway(tmp_path, nats.url) as gate:
        (a,) = await gate.add("a")
        assert await gate.settled(a) == [8]
        agent = gate.agent(1)
        await agent.register(a)
        b, c = await gate.add("b", "c")
        assert sorted(await gate.settled(a, b, c)) == [2, 3, 3]
        names = [each["name"] for each in (await gate.status(c))["replicas"]]
        assert names == ["a", "b", "c"]
        assert await agent.heartbeat(b) == 204
        owner, other = await elsewhere(gate, agent)
        assert await owner.stop() == 0
        del gate.replicas[next(name for name, replica in gate.replicas.items() if replica is owner)]
        assert await gate.settled(*gate.replicas.values()) == [4, 4]
        assert owner.events("shard_given")
        assert not owner.events("shards_left")
        assert await agent.heartbeat(other) == 204
        await gate.push(agent, "after")
        assert await agent.poll_until(other, "after") == ["after"]
        assert_no_double_owner(tmp_path)


async def test_the_serving_replica_dies_and_its_agents_commands_do_not(tmp_path: Path, nats: NatsServer) -> None:
    poll = {"hold": 20, "max_hold_s": 20}
    async with gateway(tmp_path, nats.url, poll=poll) as gate:
        a, b = await gate.add("a", "b")
        await gate.settled(a, b)
        agents = [gate.agent(number) for number in range(8)]
        for agent in agents:
            await agent.register(a)
        owned = [agent for agent in agents if await gate.owner(agent) is a]
        holding, reading = owned[:2]
        await gate.push(reading, "read")
        await gate.until_state(a, "read", "queued")
        assert await reading.poll(b) == ["read"]
        held = asyncio.create_task(holding.poll(b))
        await gate.until_held(a)
        await b.kill()
        with pytest.raises(aiohttp.ClientError):
            await held
        # Its poll is still thought to be held: what is offered to it reaches nobody, and waits again.
        await gate.push(holding, "offered")
        assert await holding.poll_until(a, "offered") == ["offered"]
        # What was only written by a replica that died is not delivered.
        found = await gate.until_state(a, "read", "uncertain")
        assert "delivered" not in events(found)
        assert await reading.poll_until(a, "read") == ["read"]


async def test_mode_http_goes_by_any_replica_and_leaves_nothing_behind(tmp_path: Path, nats: NatsServer) -> None:
    """The development controller has the vendor's HTTP API, too."""
    async with gateway(tmp_path, nats.url) as gate:
        a, b = await gate.add("a", "b")
        await gate.settled(a, b)
        agent = gate.agent(1)
        await agent.register(a)
        owner, other = await elsewhere(gate, agent)
        await gate.push(agent, "c-1")
        await gate.until_state(other, "c-1", "queued")
        for replica in (a, b):
            replica.write({"mode": "http", "fallback": {"url": gate.controller.url}})
            replica.send(signal.SIGHUP)
            await replica.event("config_reloaded", mode="http")
        assert await agent.heartbeat(other) < 300
        assert await agent.poll(other) == ["c-1"]
        assert await agent.result(other, "c-1") == 1
        await gate.until_state(owner, "c-1", *ENDED)
        results = [each for each in journal(tmp_path) if each.get("type") == "command_result"]
        assert [each["payload"]["command_id"] for each in results] == ["c-1"]
        assert await agent.poll(owner) == []
        # What the vendor's API handed out goes back there.
        path = f"{agent.cluster_id}/commands/unknown/result"
        await agent.call(other, "POST", path, {"success": True})
        results = [each for each in journal(tmp_path) if each.get("type") == "command_result"]
        assert [bool(each["connection"]) for each in results] == [True, False]


async def test_another_number_of_shards_is_refused(tmp_path: Path, nats: NatsServer) -> None:
    async with gateway(tmp_path, nats.url) as gate:
        await gate.add("a")
    folder = tmp_path / "other"
    folder.mkdir()
    config = {"store": {"url": nats.url, "replicas": 1}, "shards": {"count": 4, "lease_s": 7}}
    async with Shim(folder, config) as shim:
        await shim.launch()
        assert await shim.wait() == 2
        (refused,) = shim.events("config_refused")
        assert "shards.count: the replicas of this NATS account use 8" in refused["error"]
        assert "shards.lease_s" in refused["error"]


async def test_a_cluster_of_nats_servers_loses_one_of_its_nodes(tmp_path: Path) -> None:
    folder = tmp_path / "nats"
    folder.mkdir()
    servers = cluster(folder)
    with running(*servers):
        async with gateway(tmp_path, ",".join(server.url for server in servers), count=3, replicas=3) as gate:
            a, b = await gate.add("a", "b")
            await gate.settled(a, b)
            agent = gate.agent(1)
            await agent.register(a)
            servers[0].kill()
            assert await agent.heartbeat(b) == 204
            await gate.push(agent, "c-1")
            assert await agent.poll_until(b, "c-1") == ["c-1"]
            await agent.result(a, "c-1")
            assert sum(await gate.settled(a, b)) == 3
            assert_no_double_owner(tmp_path)
