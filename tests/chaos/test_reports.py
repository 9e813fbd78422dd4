"""Nothing is dropped silently: the controller hears of every command that ends without its agent.

Rules: docs/reference/protocol.md#3-commands.
"""

from __future__ import annotations

import asyncio

from shim.core.link_state import LinkState
from tests.support.virtual import run_virtual
from tests.support.world import World


def test_a_command_that_expires_after_its_agent_died_is_reported_although_the_link_was_closed_as_idle() -> None:
    async def scenario() -> None:
        world = World().start()
        agent = world.agent()
        await agent.register()
        await agent.heartbeat()
        world.controller.push("c1", cluster_id=agent.cluster_id, ttl_seconds=3600)
        await asyncio.sleep(600)
        assert [link.state for link in world.bridge.links] == [LinkState.IDLE]
        assert await world.state("c1") == "queued"

        await asyncio.sleep(3000)
        await world.controller.until("command_result", within_s=20)
        assert [result["code"] for result in world.controller.results("c1")] == ["expired"]
        beats_before = len(world.controller.got("heartbeat"))
        await asyncio.sleep(600)
        assert [link.state for link in world.bridge.links] == [LinkState.IDLE]
        assert len(world.controller.got("heartbeat")) == beats_before  # nobody was vouched for
        await world.stop()

    run_virtual(scenario())
