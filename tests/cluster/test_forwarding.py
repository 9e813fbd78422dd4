"""Requests through a replica that does not own the agent's shard."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

pytest.importorskip("psycopg")

from shim.clock import Clock
from shim.cluster.forwarding import ReplicaForwarder
from shim.core.shards import Member
from shim.errors import AgentError
from shim.metrics import ClusterMetrics, Metrics
from shim.ports import Caller, ProxyRequest
from tests.agent_api.test_internal import HEARTBEAT, Owner, owner
from tests.chaos.harness.waiting import last
from tests.support.processes import Shim
from tests.support.replicas import ENDED, LONG, SHARDS, Agent, Gateway, elsewhere, events, gateway, owned_by


class Locator:
    """The view of a replica that has not seen yet that an owner lost its shards."""

    def __init__(self, owning: Member) -> None:
        self._owner = owning

    def is_elsewhere(self, token: str) -> bool:
        return True

    def remote_owner(self, token: str) -> Member:
        return self._owner


class Membership:
    leaving = False

    def refresh_soon(self) -> None:
        pass

    async def wait_for_change(self, at_most_s: float) -> None:
        await asyncio.sleep(at_most_s)


def forwarder_to(owning: Owner) -> ReplicaForwarder:
    locator: Any = Locator(owning.member)
    membership: Any = Membership()
    metrics = ClusterMetrics(Metrics(CollectorRegistry()))
    return ReplicaForwarder(locator, membership, owning.pool, Clock(), metrics, lambda: 60.0)


async def test_an_agent_never_gets_the_refusal_of_a_replica_that_lost_the_shard() -> None:
    async with owner(owns=False) as owning:
        forwarder = forwarder_to(owning)
        await owning.pool.open_heartbeats(owning.member)
        answer: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        assert forwarder.forward_now("t", HEARTBEAT, answer.set_result)
        async with asyncio.timeout(60):
            assert await answer is None  # the heartbeat is sent again as a normal request


async def test_a_body_in_pieces_that_a_wrong_owner_has_begun_to_read_is_not_sent_without_its_beginning() -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b'{"agent_id":'
        await asyncio.Event().wait()

    async with owner(owns=False) as owning:
        headers = (("Host", "x"), ("Authorization", "Bearer t"))
        request = ProxyRequest("POST", "/api/v1/agents/a/status", headers, body(), Caller("t", 1), None, 0.0)
        with pytest.raises(AgentError) as refused:
            await forwarder_to(owning).forward(request, "status")
    assert (refused.value.status, refused.value.retry_after_s) == (503, 3)


# --- on real processes ----------------------------------------------------------------------------------------------


@pytest.mark.needs("postgresql")
@pytest.mark.timeout(180)
async def test_any_replica_serves_any_agent(tmp_path: Path, pg_url: str) -> None:
    async with gateway(tmp_path, pg_url, poll=LONG) as gate:
        a, b = await gate.add("a", "b")
        assert await gate.settled(a, b) == [SHARDS // 2, SHARDS // 2]
        agents = [gate.agent(number) for number in range(20)]
        for number, agent in enumerate(agents):
            await agent.register((a, b)[number % 2])
        owners = [await gate.owner(agent) for agent in agents]
        assert len({owner.url for owner in owners}) == 2, "one replica has all tokens"

        agent = agents[0]
        owner, other = await elsewhere(gate, agent)
        held = asyncio.create_task(agent.poll_until(other, "c-1"))
        await gate.until_held(owner)
        await gate.push(agent, "c-1")
        assert await held == ["c-1"]
        assert await agent.result(other, "c-1") == 1
        for _ in range(3):  # the first takes the long way, the others share one connection
            assert await agent.heartbeat(other) == 204
        for replica in (owner, other):
            found = await gate.until_state(replica, "c-1", *ENDED)
            assert events(found)[:4] == ["arrived", "offered", "delivered", "result"]
            assert found["trace"][2]["detail"] == "next request"
        status, _ = await agent.call(other, "GET", f"{agent.cluster_id}/tunnel-info")
        assert status == 200
        # An agent that leaves during a held poll frees it at the owner.
        held = asyncio.create_task(agent.poll(other))
        await gate.until_held(owner)
        held.cancel()
        await gate.until_held(owner, 0)
        await gate.push(agent, "c-2")
        found = await gate.until_state(owner, "c-2", "queued")
        assert found["attempts"] == 0
        assert 'agent_shim_forwarded_requests_total{outcome="answered"} ' in await gate.metrics(other)
        await gate.until_ready(other)


@pytest.mark.needs("postgresql")
@pytest.mark.timeout(180)
async def test_a_body_of_any_size_reaches_the_owner(tmp_path: Path, pg_url: str) -> None:
    async with gateway(tmp_path, pg_url, listen={"port": 0, "max_status_body_bytes": 3_000_000}) as gate:
        a, b = await gate.add("a", "b")
        await gate.settled(a, b)
        agent = gate.agent(1)
        await agent.register(a)
        _, other = await elsewhere(gate, agent)
        body = {"agent_id": agent.agent_id, "name": agent.name, "metadata": {"note": "x" * 20_000}}
        assert (await agent.call(other, "POST", "register", body))[0] == 200
        # status reports may be larger than what is sent on whole: they are sent on in pieces
        path = f"/api/v1/agents/{agent.agent_id}/status"
        assert (await agent.raw(other, "POST", path, {"nodes": "x" * 2_000_000}))[0] in (200, 204)
        status, reply = await agent.raw(other, "POST", path, {"nodes": "x" * 4_000_000})
        assert (status, reply["error"]) == (413, "the body is too large")


@pytest.mark.needs("postgresql")
@pytest.mark.timeout(180)
async def test_an_ingress_may_mix_agents_on_one_connection(tmp_path: Path, pg_url: str) -> None:
    async with gateway(tmp_path, pg_url, poll={"hold": "off"}) as gate:
        a, b = await gate.add("a", "b")
        await gate.settled(a, b)
        agents = [gate.agent(number) for number in range(6)]
        for agent in agents:
            await agent.register(a)
            await gate.push(agent, f"c-{agent.agent_id}")
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as ingress:
            for agent in agents:
                agent.through(ingress)
            for agent in agents:
                assert await agent.poll_until(b, f"c-{agent.agent_id}") == [f"c-{agent.agent_id}"]
            for agent in agents:
                assert await agent.heartbeat(b) in (200, 204)
        for agent in agents:
            found = await gate.until_state(a, f"c-{agent.agent_id}", "delivered")
            assert found["attempts"] == 1


@pytest.mark.needs("postgresql")
@pytest.mark.timeout(180)
async def test_the_forwarder_dies_and_its_agents_commands_do_not(tmp_path: Path, pg_url: str) -> None:
    async with gateway(tmp_path, pg_url, poll=LONG) as gate:
        a, b = await gate.add("a", "b")
        await gate.settled(a, b)
        agents = [gate.agent(number) for number in range(20)]
        for agent in agents:
            await agent.register(a)
        holding, reading = (await owned_by(gate, a, agents))[:2]
        await gate.push(reading, "read")
        await gate.until_state(a, "read", "queued")
        assert await reading.poll(b) == ["read"]
        held = asyncio.create_task(holding.poll(b))
        await gate.until_held(a)
        await b.kill()
        with pytest.raises(aiohttp.ClientError):
            await held
        await gate.push(holding, "offered")
        assert await holding.poll_until(a, "offered") == ["offered"]
        # What was only written by a replica that died is not delivered.
        found = await gate.until_state(a, "read", "uncertain")
        assert "delivered" not in events(found)
        assert await reading.poll_until(a, "read") == ["read"]


@pytest.mark.needs("postgresql")
@pytest.mark.timeout(180)
async def test_the_forwarder_is_paused_with_the_reply_in_hand(tmp_path: Path, pg_url: str) -> None:
    """The agent gives the forwarder up: what it never saw is not lost, and nothing says that it was delivered."""
    commands = {"evidence_s": 60}
    async with gateway(tmp_path, pg_url, poll=LONG, lease_s=600, commands=commands) as gate:
        a, b = await gate.add("a", "b")
        await gate.settled(a, b)
        agents = [gate.agent(number) for number in range(20)]
        for agent in agents:
            await agent.register(a)
        agent = (await owned_by(gate, a, agents))[0]
        held = asyncio.create_task(agent.poll(b))
        await gate.until_held(a)
        b.send(signal.SIGSTOP)
        await gate.push(agent, "c-1")
        await gate.until_state(a, "c-1", "offered")  # the reply is in the kernel of the forwarder's connection
        held.cancel()
        # The forwarder wakes long before its lease is over, and finds that its agent is gone.
        b.send(signal.SIGCONT)
        assert await agent.poll_until(a, "c-1") == ["c-1"]
        await agent.result(a, "c-1")
        found = await gate.until_state(a, "c-1", *ENDED)
        story = events(found)
        assert story.count("offered") == 2
        assert "delivered" not in story[: story.index("offered", story.index("offered") + 1)]


async def raw_poll(agent: Agent, replica: Shim) -> asyncio.StreamWriter:
    """Poll on a connection of its own, and return it when the reply has begun to arrive."""
    host, _, port = replica.url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1)
    path = f"/api/v1/clusters/agent/{agent.cluster_id}/poll"
    head = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: {agent.headers['Authorization']}\r\n\r\n"
    writer.write(head.encode())
    async with asyncio.timeout(60):
        assert await reader.readexactly(15) == b"HTTP/1.1 200 OK"
    return writer


async def until_handed_over(gate: Gateway, owner: Shim, count: int) -> None:
    """Wait until the owner has been told that a reply was written."""
    line = f'agent_shim_command_hand_over_seconds_count{{dialect="clusters_agent"}} {float(count)}'
    async with asyncio.timeout(60):
        while line not in await gate.metrics(owner):
            await last(0.05)


@pytest.mark.needs("postgresql")
@pytest.mark.timeout(240)
async def test_a_poll_elsewhere_is_evidence_once_the_forwarder_confirms_that_its_connection_is_open(
    tmp_path: Path, pg_url: str
) -> None:
    """A forwarder that is paused cannot tell that its agent went without reading: silence is no confirmation."""
    options = {"poll": {"hold": "off"}, "commands": {"evidence_s": 8}}
    async with gateway(tmp_path, pg_url, lease_s=600, **options) as gate:
        a, b = await gate.add("a", "b")
        await gate.settled(a, b)
        agents = [gate.agent(number) for number in range(20)]
        for agent in agents:
            await agent.register(a)
        agent, other = (await owned_by(gate, a, agents))[:2]

        await gate.push(other, "open")
        await gate.until_state(a, "open", "queued")
        connection = await raw_poll(other, b)
        await until_handed_over(gate, a, 1)
        found = await gate.trace(a, "open")
        while found[0]["state"] == "offered":
            assert await other.poll(a) == []
            found = await gate.trace(a, "open")
        assert (found[0]["state"], found[0]["trace"][-1]["detail"]) == ("delivered", "poll")
        connection.close()

        await gate.push(agent, "unread")
        await gate.until_state(a, "unread", "queued")
        connection = await raw_poll(agent, b)
        await until_handed_over(gate, a, 2)
        b.send(signal.SIGSTOP)
        connection.transport.abort()  # a reset, as of a process that dies with the reply unread
        assert await agent.poll_until(a, "unread") == ["unread"]
        b.send(signal.SIGCONT)
        await agent.result(a, "unread")
        story = events(await gate.until_state(a, "unread", *ENDED))
        assert story.count("offered") == 2
        assert "delivered" not in story[: story.index("offered", story.index("offered") + 1)]
