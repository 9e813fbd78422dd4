"""Hours of held polls in virtual time: serial agents, loops of one rate, heartbeats upstream meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise

from tests.bridge.conftest import MakeWorld
from tests.support.world import World

AUTO = {"hold": "auto"}
INTERVAL_S = 5.0


async def every(world: World, interval_s: float, call: Callable[[], Awaitable[object]], for_s: float) -> list[float]:
    """A loop as Go's `time.Ticker` drives it: a tick that comes during a call waits, further ones are lost."""
    started, due_s, end_s = [], world.now + interval_s, world.now + for_s
    while world.now < end_s:
        await world.pass_s(max(0.0, due_s - world.now))
        started.append(world.now)
        await call()
        while due_s + interval_s <= world.now:
            due_s += interval_s
        due_s += interval_s if due_s <= started[-1] else 0.0
    return started


async def test_a_serial_agents_heartbeats_wait_for_a_held_poll_once_and_never_again(make_world: MakeWorld) -> None:
    world = await make_world(poll=AUTO)
    agent = world.agent()
    await agent.register()
    beats: list[float] = []

    async def both() -> None:
        beats.append(world.now)
        await agent.heartbeat()
        await agent.poll()

    await every(world, INTERVAL_S, both, 1200.0)
    late = [after - before for before, after in pairwise(beats) if after - before > INTERVAL_S + 0.1]
    assert len(late) <= 1
    assert max(late, default=0) <= 2 * INTERVAL_S
    session = world.session(agent.cluster_id)
    assert session.hold.serial
    assert session.hold.limit_s(20.0) == INTERVAL_S - 1


async def test_two_loops_of_one_rate_are_held_as_long_as_any(make_world: MakeWorld) -> None:
    world = await make_world(poll=AUTO)
    agent = world.agent()
    await agent.register()

    async def beating() -> None:
        await every(world, INTERVAL_S, agent.heartbeat, 600.0)

    poller = world.agent(cluster_id=agent.cluster_id)
    beats = asyncio.create_task(beating())  # each heartbeat comes just before a poll
    await world.pass_s(0.01)
    await every(world, INTERVAL_S, poller.poll, 600.0)
    await beats
    assert world.session(agent.cluster_id).hold.limit_s(20.0) == 20.0


async def test_the_controller_hears_of_an_agent_that_only_polls(make_world: MakeWorld) -> None:
    world = await make_world(poll={"hold": 25.0, "max_hold_s": 25.0})
    agent = world.agent()
    await agent.register()
    await agent.heartbeat()
    for _ in range(20):
        await agent.poll()
    gaps = [after - before for before, after in pairwise(world.controller.times("heartbeat"))]
    assert len(gaps) > 10
    assert max(gaps) <= 33.0


async def test_a_heartbeat_during_a_held_tunnel_poll_tells_nothing_about_other_polls(make_world: MakeWorld) -> None:
    world = await make_world(poll=AUTO | {"hold_tunnel": True})
    agent = world.agent()
    await agent.register()
    await agent.tunnel_poll()
    tunnel = asyncio.create_task(agent.tunnel_poll())
    for _ in range(5):
        await agent.heartbeat()
        await world.pass_s(0.1)
    session = world.session(agent.cluster_id)
    assert not session.tunnel_hold.serial
    assert session.hold.serial
    await tunnel


async def test_an_agent_that_gives_up_first_is_held_less(make_world: MakeWorld) -> None:
    world = await make_world(poll=AUTO)
    agent = world.agent()
    await agent.register()
    for _ in range(2):
        await agent.poll()
    session = world.session(agent.cluster_id)
    assert session.hold.limit_s(20.0) == 16.0
    poll = agent.poll_task()
    await world.pass_s(6.0)
    poll.cancel()
    await world.settle()
    assert session.hold.limit_s(20.0) == 2.5  # half of its ceiling, which is 6 s minus 1 s
    await world.restart()
    assert world.session(agent.cluster_id).hold.limit_s(20.0) == 2.5


async def test_a_stop_teaches_nothing(make_world: MakeWorld) -> None:
    world = await make_world(poll=AUTO)
    agent = world.agent()
    await agent.register()
    await agent.poll()
    poll = agent.poll_task()
    await world.pass_s(0.5)
    await world.stop()
    assert (await poll).receipt is None
    poll = agent.poll_task()
    assert agent.take(await poll) == ()
    world.start()
    await world.settle()
    assert world.session(agent.cluster_id).hold.ceiling_s is None
