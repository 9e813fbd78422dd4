"""When a result counts as having reached the controller (docs/reference/protocol.md#3-commands, CLOSED)."""

from __future__ import annotations

import asyncio

from tests.support.virtual import run_virtual
from tests.support.world import Agent, World


async def _answered(world: World, agent: Agent, command_id: str) -> None:
    world.controller.push(command_id, cluster_id=agent.cluster_id)
    await world.settle()
    assert await agent.poll() == [command_id]
    await agent.result(command_id)
    await world.settle()


async def _living() -> tuple[World, Agent]:
    world = World().start()
    agent = world.agent()
    await agent.register()
    await agent.heartbeat()
    await world.settle()
    return world, agent


async def _reconnected(world: World) -> None:
    world.controller.socket.lose()
    await world.settle()
    await world.until(lambda: world.controller.sockets[-1].open)
    await world.settle()


def test_a_pong_proves_nothing_on_a_new_connection_whose_application_stalls_before_its_first_acknowledgement() -> None:
    async def scenario() -> None:
        world, agent = await _living()
        manners = world.controller.manners
        manners.acks = False  # from now on only the proxy in front of the controller answers
        await _reconnected(world)
        await agent.heartbeat()
        await _answered(world, agent, "c1")
        await asyncio.sleep(5)
        assert await world.state("c1") == "answered"

        manners.acks = True
        await _reconnected(world)
        await asyncio.sleep(1)
        assert await world.state("c1") == "closed"
        assert len(world.controller.results("c1")) == 2  # sent again: once too often rather than never
        await world.stop()

    run_virtual(scenario())


def test_a_peer_that_never_acknowledged_is_believed_its_pongs() -> None:
    async def scenario() -> None:
        world = World().start()
        world.controller.manners.acks = False
        agent = world.agent()
        await agent.register()
        await agent.heartbeat()
        await _answered(world, agent, "c1")
        await asyncio.sleep(30)
        assert await world.state("c1") == "closed"
        assert len(world.controller.results("c1")) == 1
        await world.stop()

    run_virtual(scenario())


def test_a_peer_that_no_longer_acknowledges_is_taken_for_stalled_once_and_then_believed_its_pongs() -> None:
    async def scenario() -> None:
        world, agent = await _living()
        world.controller.manners.acks = False
        await _reconnected(world)
        await agent.heartbeat()
        await _answered(world, agent, "c1")
        assert await world.state("c1") == "answered"
        dials = len(world.controller.dials)
        await agent.live(600, every_s=30)
        assert await world.state("c1") == "closed"
        assert len(world.controller.results("c1")) == 2
        assert len(world.controller.dials) == dials + 1  # taken for stalled once, then for what it is
        await world.stop()

    run_virtual(scenario())
