"""The wall clock steps: what arrived in this process keeps its time, what came from disk follows the clock."""

from __future__ import annotations

import asyncio

import pytest

from shim.bridge.scheduler import TICK_S
from tests.support.virtual import run_virtual
from tests.support.world import World

HOURS_S = 3600.0


def test_a_command_that_arrived_here_lives_as_long_as_was_said_whatever_the_wall_clock_does() -> None:
    async def scenario() -> None:
        world = World().start()
        agent = world.agent()
        await agent.register()
        await agent.heartbeat()
        world.controller.push("c1", cluster_id=agent.cluster_id, ttl_seconds=60)
        await world.settle()
        world.clock.wall_offset_s = 6 * HOURS_S
        await asyncio.sleep(50)
        assert await world.state("c1") == "queued"
        world.clock.wall_offset_s = -6 * HOURS_S
        await asyncio.sleep(11)
        assert await world.state("c1") == "expired"
        await world.stop()

    run_virtual(scenario())


def test_a_command_from_disk_expires_by_the_wall_clock_also_when_that_is_set_right_only_later() -> None:
    async def scenario() -> None:
        world = World().start()
        agent = world.agent()
        await agent.register()
        for command_id, ttl_s in (("short", 60), ("long", 7200)):
            world.controller.push(command_id, cluster_id=agent.cluster_id, ttl_seconds=ttl_s)
        await world.settle()
        await world.crash()

        world.clock.wall_offset_s = -6 * HOURS_S  # the machine comes back with a wrong clock
        world.start()
        await asyncio.sleep(120)
        assert await world.state("short") == "queued"
        world.clock.wall_offset_s = 0
        await asyncio.sleep(TICK_S + 1)
        assert (await world.state("short"), await world.state("long")) == ("expired", "queued")
        await world.controller.until("command_result", within_s=10)
        assert [result["code"] for result in world.controller.results("short")] == ["expired"]

        world.clock.wall_offset_s = 6 * HOURS_S
        await asyncio.sleep(TICK_S + 1)
        assert await world.state("long") == "expired"
        await world.stop()

    run_virtual(scenario())


@pytest.mark.parametrize("wrong_h", [-4.5, 4.5])
def test_a_clock_that_is_set_while_the_store_opens_does_not_move_what_is_on_disk(wrong_h: float) -> None:
    """The clock is wrong at the start, slow when the store has opened, and then set right."""

    async def scenario() -> None:
        world = World().start()
        agent = world.agent()
        await agent.register()
        for command_id, ttl_s in (("short", 60), ("long", 7200)):
            world.controller.push(command_id, cluster_id=agent.cluster_id, ttl_seconds=ttl_s)
        await world.settle()
        await world.crash()

        def opening() -> None:
            world.clock.wall_offset_s = -4.5 * HOURS_S

        world.clock.wall_offset_s = wrong_h * HOURS_S
        world.start(opening)
        await asyncio.sleep(1)
        world.clock.wall_offset_s = 0
        await asyncio.sleep(TICK_S + 60)
        assert (await world.state("short"), await world.state("long")) == ("expired", "queued")
        await asyncio.sleep(7200)
        assert await world.state("long") == "expired"
        await world.stop()

    run_virtual(scenario())
