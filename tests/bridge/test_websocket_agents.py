"""Agents with a WebSocket client of their own end the legacy sessions that they replace.

Rules: docs/reference/protocol.md#5-an-agent-that-has-migrated-already.
"""

from __future__ import annotations

import pytest

from shim.bridge.websocket_agents import MAX_AGENTS, WebSocketEvent
from tests.bridge.test_links import living
from tests.support.world import TOKEN, World


@pytest.mark.parametrize("by", ["cluster_id", "agent_id", "name"])
async def test_a_legacy_session_of_the_same_identity_is_migrated_until_its_agent_calls_again(
    world: World, by: str
) -> None:
    agent = await living(world)
    session = world.session(agent.cluster_id)
    known = {"cluster_id": agent.cluster_id, "agent_id": agent.agent_id, "name": agent.name}
    world.bridge.websocket_agents.record(WebSocketEvent("registers", TOKEN, {by: known[by]}, anew=True))
    assert session.migrated_at == world.now
    assert not session.fresh(world.now), "no heartbeat is sent for it"
    await agent.heartbeat()
    assert session.migrated_at is None
    assert session.fresh(world.now)


async def test_an_agent_of_another_identity_ends_nothing(world: World) -> None:
    agent = await living(world)
    world.bridge.websocket_agents.record(WebSocketEvent("registers", TOKEN, {"name": "another"}, anew=True))
    assert world.session(agent.cluster_id).migrated_at is None


async def test_connections_are_counted_and_an_accepted_agent_has_its_cluster(world: World) -> None:
    agents, payload = world.bridge.websocket_agents, {"name": "new", "agent_id": "pod-9"}
    agents.record(WebSocketEvent("registers", TOKEN, payload, anew=True))
    agents.record(WebSocketEvent("registers", TOKEN, payload, anew=False))
    agents.record(WebSocketEvent("registered", TOKEN, payload, "c-9"))
    [known] = agents
    assert (known.connections, known.accepted, known.cluster_id) == (1, True, "c-9")
    agents.record(WebSocketEvent("closed", TOKEN, payload))
    agents.record(WebSocketEvent("closed", TOKEN, payload))
    assert known.connections == 0


async def test_the_list_is_bounded_and_the_longest_unseen_make_room(world: World) -> None:
    agents = world.bridge.websocket_agents
    for number in range(MAX_AGENTS + 1):
        agents.record(WebSocketEvent("registers", TOKEN, {"name": f"n{number}"}, anew=True))
        await world.pass_s(0.01)
    names = {agent.name for agent in agents}
    assert (len(names), "n0" in names, f"n{MAX_AGENTS}" in names) == (MAX_AGENTS, False, True)
