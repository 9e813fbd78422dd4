"""What counts as evidence that an agent has a command, and what does not (docs/reference/protocol.md#3-commands)."""

from __future__ import annotations

import asyncio

import pytest

from shim.core.agent_calls import PollCall
from shim.ports import Caller, CallResult
from tests.support.virtual import run_virtual
from tests.support.world import Agent, World


async def _started() -> tuple[World, Agent]:
    world = World().start()
    await world.settle()
    agent = world.agent()
    await agent.register()
    await agent.heartbeat()
    world.controller.push("c1", cluster_id=agent.cluster_id)
    await world.settle()
    return world, agent


async def _poll(world: World, agent: Agent, connection: int, arrived_s: float) -> CallResult:
    call = PollCall(agent.dialect, agent.target)
    answer = world.bridge.calls.call(Caller(agent.token, connection), call, arrived_s, world.now)
    return answer if isinstance(answer, CallResult) else await answer


@pytest.mark.parametrize("same_connection", [True, False])
def test_a_poll_that_was_sent_before_the_reply_was_written_is_no_evidence(same_connection: bool) -> None:
    async def scenario() -> None:
        world, agent = await _started()
        first = agent.connection
        second = first if same_connection else world.connection()
        sent_at = world.now
        offered = await _poll(world, agent, first, sent_at)
        assert offered.receipt is not None
        await asyncio.sleep(0.01)
        world.bridge.delivery.written(offered.receipt, lambda: world.now)
        overlapping = await _poll(world, agent, second, sent_at)
        assert overlapping.receipt is None
        assert await world.state("c1") == "offered"
        world.bridge.delivery.connection_closed(first, clean=False)  # the agent died over it, with the reply unread

        await asyncio.sleep(world.settings.commands.evidence_s + 1)
        again = await agent.poll()
        assert again == ["c1"]
        await world.stop()

    run_virtual(scenario())


def test_a_poll_that_was_sent_after_it_is() -> None:
    async def scenario() -> None:
        world, agent = await _started()
        offered = await _poll(world, agent, agent.connection, world.now)
        assert offered.receipt is not None
        world.bridge.delivery.written(offered.receipt, lambda: world.now)
        await asyncio.sleep(0.05)
        await _poll(world, agent, world.connection(), world.now)
        assert await world.state("c1") == "delivered"
        await world.stop()

    run_virtual(scenario())
