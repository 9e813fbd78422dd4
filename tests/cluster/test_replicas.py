"""Several replicas as processes on a real PostgreSQL: any serves any agent, one owns each shard, whatever dies."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import defaultdict
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.processes import Shim
from tests.support.replicas import SHARDS, WAIT_S, Agent, Gateway, any_certificate, gateway

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(180)]

ENDED = ("answered", "closed")
"""The controller has the result, or will: a connection that acknowledges heartbeats must do so once more."""
LONG = {"hold": 25, "max_hold_s": 25}


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
    """The owner of an agent's shard, and another replica."""
    owner = await gate.owner(agent)
    return owner, next(replica for replica in gate.replicas.values() if replica is not owner)


async def owned_by(gate: Gateway, replica: Shim, agents: list[Agent]) -> list[Agent]:
    return [agent for agent in agents if await gate.owner(agent) is replica]


async def test_any_replica_serves_any_agent(tmp_path: Path, pg_url: str) -> None:
    async with gateway(tmp_path, pg_url, poll=LONG) as gate:
        a, b = await gate.add("a", "b")
        assert await gate.settled(a, b) == [SHARDS // 2, SHARDS // 2]
        agents = [gate.agent(number) for number in range(8)]
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


async def test_a_paused_owner_sends_nothing_more(tmp_path: Path, pg_url: str) -> None:
    async with gateway(tmp_path, pg_url, lease_s=5) as gate:
        a, b = await gate.add("a", "b")
        await gate.settled(a, b)
        agents = [gate.agent(number) for number in range(6)]
        for agent in agents:
            await agent.register(a)
        agent = agents[0]
        owner, other = await elsewhere(gate, agent)
        await gate.push(agent, "c-1")
        await gate.until_state(other, "c-1", "queued")
        for _ in range(2):
            assert await agent.heartbeat(other) == 204
        owner.send(signal.SIGSTOP)
        assert await agent.heartbeat(other) == 204  # nobody answers, and agents need not wait
        assert await agent.poll_until(other, "c-1") == ["c-1"]
        await agent.result(other, "c-1")
        for each in agents:
            assert await each.heartbeat(other) == 204
        assert await gate.settled(other) == [SHARDS]
        found = await gate.until_state(other, "c-1", *ENDED)
        assert events(found).count("offered") == 1
        owner.send(signal.SIGCONT)
        await owner.event("lease_lost")
        assert await gate.settled(owner, other) == [SHARDS // 2, SHARDS // 2]
        for each in agents:
            assert await each.heartbeat(owner) == 204
            await gate.owner(each)
        assert assert_no_double_owner(tmp_path) >= 1


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


async def test_the_forwarder_dies_and_its_agents_commands_do_not(tmp_path: Path, pg_url: str) -> None:
    async with gateway(tmp_path, pg_url, poll=LONG) as gate:
        a, b = await gate.add("a", "b")
        await gate.settled(a, b)
        agents = [gate.agent(number) for number in range(8)]
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


async def test_the_forwarder_is_paused_with_the_reply_in_hand(tmp_path: Path, pg_url: str) -> None:
    """The agent gives the forwarder up: what it never saw is not lost, and nothing says that it was delivered."""
    commands = {"evidence_s": 60}
    async with gateway(tmp_path, pg_url, poll=LONG, lease_s=600, commands=commands) as gate:
        a, b = await gate.add("a", "b")
        await gate.settled(a, b)
        agents = [gate.agent(number) for number in range(8)]
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


async def test_mode_http_goes_by_the_owner_whichever_replica_is_asked(tmp_path: Path, pg_url: str) -> None:
    """The development controller has the vendor's HTTP API, too."""
    async with gateway(tmp_path, pg_url) as gate:
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
        # everything is passed on in this mode, but not what is a note between replicas
        assert (await agent.raw(other, "NOTIFY", "/written"))[0] == 405
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


async def test_auto_fails_over_and_back_behind_a_forwarding_replica(tmp_path: Path, pg_url: str) -> None:
    """The link is the owner's, and so is the vendor's HTTP API while the link is away; the agent knows of neither."""
    async with gateway(tmp_path, pg_url, poll={"hold": "off"}) as gate:
        controller = gate.controller
        gate.configure(
            mode="auto",
            fallback={"url": controller.url, "after_s": 0.2, "hold_down_s": 0.2},
            upstream={"url": controller.url, "heartbeat_interval_s": 0.1},
        )
        a, b = await gate.add("a", "b")
        await gate.settled(a, b)
        agent = gate.agent(1)
        await agent.register(a)
        owner, other = await elsewhere(gate, agent)
        await gate.until_online(owner)

        async def beat_until(*ways: str) -> None:
            async with asyncio.timeout(WAIT_S):
                while [event["way"] for event in owner.events("failover")] != [*ways]:
                    assert await agent.heartbeat(other) in (200, 204, 503)

        # The WebSocket goes away, and the vendor's HTTP API stays.
        await controller.control("POST", "/control/faults", {"kind": "refuse", "status": 503})
        await controller.control("POST", "/control/drop", {"how": "abort"})
        await beat_until("http")
        await controller.control("POST", "/control/legacy/commands", {"ident": agent.cluster_id, "id": "by-http"})
        assert await agent.poll_until(other, "by-http") == ["by-http"]
        assert await agent.result(other, "by-http") == 1
        # It comes back, and after a while so do the calls.
        await controller.control("DELETE", "/control/faults")
        await beat_until("http", "websocket")
        await gate.push(agent, "by-link")
        assert await agent.poll_until(other, "by-link") == ["by-link"]
        assert await agent.result(other, "by-link") == 1
        await gate.until_state(other, "by-link", *ENDED)
        results = [each for each in journal(tmp_path) if each.get("type") == "command_result"]
        assert {each["payload"]["command_id"]: bool(each["connection"]) for each in results} == {
            "by-http": False,
            "by-link": True,
        }
        assert not other.events("failover")


async def test_a_partial_rollout_works_through_any_replica(tmp_path: Path, pg_url: str) -> None:
    async with gateway(tmp_path, pg_url) as gate:
        gate.configure(mode="auto", fallback={"url": gate.controller.url}, rollout={"exclude": ["cluster-2"]})
        a, b = await gate.add("a", "b")
        await gate.settled(a, b)
        inside, outside = gate.agent(1), gate.agent(2)
        for agent in (inside, outside):
            await agent.register(b)
            for replica in (a, b, a, b):
                assert await agent.heartbeat(replica) < 300
        await gate.push(inside, "c-1")
        assert await inside.poll_until(a, "c-1") == ["c-1"]
        assert await inside.result(b, "c-1") == 1
        await gate.until_state(a, "c-1", *ENDED)
        by_http = [each["path"] for each in journal(tmp_path) if each.get("path", "").endswith("/heartbeat")]
        assert not any(inside.cluster_id in path for path in by_http)


async def test_an_agent_that_speaks_websocket_is_carried_by_any_replica_and_known_to_the_owner(
    tmp_path: Path, pg_url: str
) -> None:
    async with gateway(tmp_path, pg_url) as gate:
        a, b = await gate.add("a", "b")
        await gate.settled(a, b)
        agent = gate.agent(1)
        await agent.register(a)
        owner, other = await elsewhere(gate, agent)
        async with agent.websocket(other) as socket:
            payload = {"agent_id": agent.agent_id, "name": agent.name, "cluster_id": agent.cluster_id}
            await socket.send_json({"type": "register", "request_id": "r-1", "payload": payload})
            answer = await socket.receive_json(timeout=120)
            assert (answer["type"], answer["request_id"]) == ("register_success", "r-1")
            await gate.until_websocket_agents(owner, 1)
            assert (await gate.admin(other, "/status.json"))["websocket_agents"]["items"] == []


async def test_a_person_may_ask_any_replica(tmp_path: Path, pg_url: str) -> None:
    async with gateway(tmp_path, pg_url) as gate:
        a, b = await gate.add("a", "b")
        await gate.settled(a, b)
        agent = gate.agent(1)
        await agent.register(a)
        owner, other = await elsewhere(gate, agent)
        await gate.push(agent, "c-1")
        await gate.until_state(other, "c-1", "queued")
        reply = await gate.do(other, "POST", "/commands/c-1/purge")
        assert reply[0] == 200, reply
        assert reply[1]["command"]["state"] == "dead"
        assert (await gate.do(other, "POST", "/commands/c-1/redeliver"))[1]["command"]["state"] == "queued"
        assert (await gate.do(other, "POST", "/commands/nobody/purge"))[0] == 404
        assert (await gate.do(other, "POST", f"/agents/{agent.agent_id}/forget"))[0] == 409  # it calls
        assert await agent.poll_until(owner, "c-1") == ["c-1"]
        await agent.result(owner, "c-1")
        await gate.until_state(owner, "c-1", *ENDED)
        status, reply = await gate.do(other, "POST", "/drain", {"timeout_s": 60})
        assert (status, reply["drain"]["state"]) == (200, "draining")
        await gate.until_drain(owner, "draining", "drained")
        assert (await gate.do(owner, "DELETE", "/drain"))[0] == 200
        await gate.until_drain(other, "off")


async def test_replicas_with_other_settings_are_refused_by_the_name_of_the_key(tmp_path: Path, pg_url: str) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    async with gateway(tmp_path, pg_url) as gate:
        (a,) = await gate.add("a")
        await gate.settled(a)
        config = {
            "store": {"url": pg_url},
            "cluster": {"port": 0, "lease_s": 7},
            "upstream": {"url": "wss://elsewhere.example", "token": "t"},
        }
        async with Shim(folder, config) as shim:
            await shim.launch()
            assert await shim.wait() == 2
            (refused,) = shim.events("config_refused")
            for key in ("cluster.lease_s", "upstream.url", "upstream.token"):
                assert f"{key}: the replicas that run on this database have another value" in refused["error"]
        assert [each["name"] for each in (await gate.status(a))["replicas"]] == ["a"]


@pytest.mark.parametrize(
    "first",
    [
        b"GET /api/v1/health HTTP/1.1\r\nHost: x\r\n\r\n",
        b"NOTIFY /join HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong\r\n\r\n",
        b"NOTIFY /join HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /operate HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
    ],
)
async def test_who_is_no_member_is_cut_off(tmp_path: Path, pg_url: str, first: bytes) -> None:
    async with gateway(tmp_path, pg_url) as gate:
        (a,) = await gate.add("a")
        host, _, port = (await a.event("serving"))["cluster"].rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port), ssl=any_certificate())
        writer.write(first + b"GET /api/v1/health HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(60):
            with suppress(ConnectionError):  # a reset says the same
                assert await reader.read() == b""
        writer.close()
