"""Offers wait for evidence as long as it matters, and no longer."""

from __future__ import annotations

from shim.bridge.command_queues import AwaitedEvidence
from shim.core.command_queue import Batch
from shim.core.records import SessionKey
from tests.bridge.conftest import living
from tests.support.world import World


async def test_offers_that_are_settled_are_not_kept_for_a_connection_that_never_shows_evidence(world: World) -> None:
    """An agent that pipelines gives no evidence by its connection, which may be open for weeks."""
    agent = await living(world)
    agent.pipelines = True
    evidence = world.bridge.delivery.evidence
    for number in range(20):
        world.controller.push(f"k{number}")
        await world.settle()
        assert await agent.poll() == [f"k{number}"]
        assert len(evidence) == 1
        if number % 2:
            await agent.result(f"k{number}")
        else:
            await world.pass_s(5)  # the next poll is later than the reply
            assert await agent.poll() == []
        await world.settle()
        assert len(evidence) == 0


async def test_each_offer_has_a_time_limit_unless_it_is_settled_before(world: World) -> None:
    evidence = AwaitedEvidence(world.bridge.ctx.timers)
    key = SessionKey("owner", "session", "cluster")
    first, second = (Batch(key, number, (), 7, 0.0) for number in (101, 102))
    overdue: list[Batch] = []
    for batch in (first, second):
        evidence.add(batch, 60, overdue.append)
    assert evidence.on(7) == (first, second)
    evidence.settle(first)
    evidence.settle(first)
    await world.pass_s(61)
    assert overdue == [second]
    assert evidence.take(7) == [second], "late evidence still counts"
    assert len(evidence) == 0
