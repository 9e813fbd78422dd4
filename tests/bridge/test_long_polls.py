"""Hours of held polls in virtual time: serial agents, loops of one rate, heartbeats upstream meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise

import pytest

from shim.core.agent_calls import Commands, PollCall, TunnelState
from tests.bridge.conftest import MakeWorld
from tests.support.world import World, settings

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


def holds(world: World, ended: str) -> tuple[float, float]:
    """Number and seconds of the holds that ended in this way, as the metric has them."""
    name = "poll_hold_seconds"
    return world.metric(f"{name}_count", ended=ended), world.metric(f"{name}_sum", ended=ended)


async def test_the_time_of_each_hold_is_measured_by_what_ended_it(make_world: MakeWorld) -> None:
    world = await make_world(poll={"hold": 8.0})
    agent = world.agent()
    await agent.register()
    await world.pass_s(100.0)
    assert await agent.poll() == []
    assert holds(world, "replied") == (1, pytest.approx(8.0, abs=0.01))
    poll = agent.poll_task()
    await world.pass_s(3.0)
    poll.cancel()
    await world.settle()
    assert holds(world, "left") == (1, pytest.approx(3.0, abs=0.01))
    poll = agent.poll_task()
    await world.pass_s(1.0)
    world.controller.push("k1")
    await world.settle()
    assert [command.id for command in agent.take(await poll)] == ["k1"]
    assert holds(world, "replied") == (2, pytest.approx(9.0, abs=0.02))
    world.controller.push("k2")
    await world.settle()
    answer = await agent.call(PollCall(agent.dialect, agent.target))
    assert answer.receipt is not None
    assert isinstance(answer.outcome, Commands)
    assert answer.outcome.poll_frequency_s == world.settings.poll.frequency_s
    assert holds(world, "replied")[0] == 2, "a poll that is answered at once was not held"


async def test_a_poll_counts_as_a_use_of_its_route(make_world: MakeWorld) -> None:
    world = await make_world(poll={"hold": "off"})
    agent = world.agent()
    await agent.register()
    await world.pass_s(7.0)
    await agent.poll()
    session = world.session(agent.cluster_id)
    use = dict(world.bridge.session_registry.usage)[session.key][agent.dialect, "poll"]
    assert (use.count, use.first_unix) == (1, world.clock.wall_s())
    assert session.poll_at == world.now


async def test_a_tunnel_poll_is_held_until_its_state_changes_or_its_time_is_over(make_world: MakeWorld) -> None:
    world = await make_world(poll={"hold": 8.0, "hold_tunnel": True})
    agent = world.agent()
    await agent.register()
    await world.pass_s(100.0)
    began = world.now
    assert await agent.tunnel_poll() == TunnelState(None, 5)
    assert world.now == began, "the agent's first poll is answered at once"
    assert await agent.tunnel_poll() == TunnelState(None, 5)
    assert world.now == pytest.approx(began + 8.0, abs=0.01)
    poll = asyncio.create_task(agent.tunnel_poll())
    await world.pass_s(1.0)
    assert world.bridge.long_polls.held_tunnels() == 1
    world.controller.socket.says("tunnel_status", {"cluster_id": agent.cluster_id, "status": "ACTIVE"})
    assert await poll == TunnelState({"status": "ACTIVE"}, 5)
    assert holds(world, "replied") == (2, pytest.approx(9.0, abs=0.02))
    assert world.bridge.long_polls.held_tunnels() == 0
    earlier = asyncio.create_task(agent.tunnel_poll())
    await world.pass_s(1.0)
    later = asyncio.create_task(agent.tunnel_poll())
    await world.pass_s(0.01)
    assert earlier.done(), "an agent has one tunnel poll at a time"
    assert not later.done()
    await later


async def test_a_tunnel_poll_whose_agent_hangs_up_teaches_its_patience(make_world: MakeWorld) -> None:
    world = await make_world(poll=AUTO | {"hold_tunnel": True})
    agent = world.agent()
    await agent.register()
    for _ in range(4):
        await agent.tunnel_poll()
    session = world.session(agent.cluster_id)
    poll = asyncio.create_task(agent.tunnel_poll())
    await world.pass_s(6.0)
    poll.cancel()
    await world.settle()
    assert world.bridge.long_polls.held_tunnels() == 0
    assert session.tunnel_hold.limit_s(20.0) == 2.5
    assert session.hold.limit_s(20.0) == 4.0, "its other polls have an estimator of their own"
    assert holds(world, "left") == (1, pytest.approx(6.0, abs=0.01))
    await world.restart()
    assert world.session(agent.cluster_id).tunnel_hold.limit_s(20.0) == 2.5


async def test_tunnel_polls_are_not_held_unless_that_is_set(make_world: MakeWorld) -> None:
    for configured in ({"hold": 8.0}, {"hold": "off", "hold_tunnel": True}):
        world = await make_world(poll=configured)
        agent = world.agent()
        await agent.register()
        began = world.now
        for _ in range(3):
            await agent.tunnel_poll()
        assert world.now == began
        assert holds(world, "replied") == (0, 0)


async def test_a_hold_may_be_shorter_than_a_second(make_world: MakeWorld) -> None:
    world = await make_world(poll={"hold": 0.5, "hold_tunnel": True})
    agent = world.agent()
    await agent.register()
    await agent.tunnel_poll()
    began = world.now
    await agent.poll()
    assert world.now == pytest.approx(began + 0.5, abs=0.01)
    await agent.tunnel_poll()
    assert world.now == pytest.approx(began + 1.0, abs=0.02)


async def test_a_tunnel_poll_of_a_serial_agent_lets_its_heartbeats_pass(make_world: MakeWorld) -> None:
    world = await make_world(poll=AUTO | {"hold_tunnel": True})
    agent = world.agent()
    await agent.register()
    await agent.tunnel_poll()
    for _ in range(4):
        await agent.heartbeat()
        await world.pass_s(INTERVAL_S)
    began = world.now
    for _ in range(2):
        await agent.tunnel_poll()
    assert world.now - began < 2 * INTERVAL_S + 1.1
    assert world.session(agent.cluster_id).tunnel_hold.serial


async def test_an_agent_that_polls_first_is_served_in_its_dialect(world: World) -> None:
    agent = world.agent(dialect="agents", agent_id="a-9")
    await agent.poll()
    assert world.session("a-9").dialect == "agents"


async def test_a_stop_answers_held_tunnel_polls(make_world: MakeWorld) -> None:
    world = await make_world(poll={"hold": 20.0, "hold_tunnel": True})
    agent = world.agent()
    await agent.register()
    await agent.tunnel_poll()
    poll = asyncio.create_task(agent.tunnel_poll())
    await world.pass_s(1.0)
    began = world.now
    world.bridge.quiesce()
    assert await poll == TunnelState(None, 5)
    assert world.now == began


async def test_a_held_poll_ends_at_the_next_although_polls_are_no_longer_held(make_world: MakeWorld) -> None:
    world = await make_world(poll={"hold": 20.0})
    agent = world.agent()
    await agent.register()
    first = agent.poll_task()
    await world.pass_s(1.0)
    began = world.now
    world.bridge.ctx.settings = settings(poll={"hold": "off"})
    assert await world.agent(cluster_id=agent.cluster_id).poll() == []
    await world.settle()
    assert first.done()
    assert first.result().outcome == Commands((), 5)
    assert world.now == began
