"""Offers that the disk takes no record of: what may be repeated goes out from memory, what must not waits."""

from __future__ import annotations

from tests.support.virtual import run_virtual
from tests.support.world import World, settings


def test_on_a_full_disk_everything_goes_out_up_to_the_first_command_that_must_not_be_repeated() -> None:
    async def scenario() -> None:
        world = World(settings(commands={"at_most_once": ["once"]})).start()
        agent = world.agent()
        await agent.register()
        await agent.heartbeat()
        for command_id, kind in (("a", "work"), ("b", "work"), ("c", "once"), ("d", "work")):
            world.controller.push(command_id, cluster_id=agent.cluster_id, type=kind)
        await world.settle()

        world.store.fail()
        assert await agent.poll() == ["a", "b"]
        await world.pass_s(5)
        assert await agent.poll() == []  # the once-only one waits, and what came after it
        await agent.result("a")
        world.store.heal()
        await world.pass_s(5)
        assert await agent.poll() == ["c", "d"]
        await world.pass_s(5)
        assert await agent.poll() == []
        assert [await world.state(each) for each in "cd"] == ["delivered", "delivered"]
        await world.stop()

    run_virtual(scenario())


def test_a_command_that_waited_for_the_disk_has_not_used_up_an_attempt() -> None:
    async def scenario() -> None:
        world = World(settings(commands={"at_most_once": ["once"]})).start()
        agent = world.agent()
        await agent.register()
        await agent.heartbeat()
        world.controller.push("c", cluster_id=agent.cluster_id, type="once")
        await world.settle()
        world.store.fail()
        for _ in range(10):
            assert await agent.poll() == []
            await world.pass_s(5)
        world.store.heal()
        assert await agent.poll() == ["c"]
        assert (await world.trace("c")).count("offered") == 1
        await world.stop()

    run_virtual(scenario())
