"""Outages of the controller in virtual time, with the shim's real settings: how long to find out, and to return.

Two agents live through all of it, one that calls every 15 s and one that does every 30 s.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from shim.core.link_state import LinkState
from shim.ports import DialFailure
from tests.support.upstream import FakeDial
from tests.support.virtual import run_virtual
from tests.support.world import Agent, World

SHORTEST_S, MOSTLY_S, LONGEST_S = 2.0, 30.0, 600.0
CONNECT_TIMEOUT_S = 5.0
LOSSES = (
    DialFailure("tcp"),
    DialFailure("dns"),
    DialFailure("tls"),
    DialFailure("status", 502),
    DialFailure("status", 503),
    DialFailure("status", 404),  # shortly after a working link: it is being redeployed
)
Scenario = Callable[[World, random.Random], Awaitable[None]]


def play(scenario: Scenario, seed: int) -> None:
    """Play a scenario from the moment at which the link has been stable for long enough."""

    async def whole() -> None:
        rng = random.Random(seed)
        world = World(rng=rng.random).start()
        agents = [world.agent(agent_id=f"pod-{n}", name=f"cluster-{n}") for n in range(2)]
        for agent in agents:
            await agent.register()
        lives = [world.loop.create_task(_beat(agent, every_s)) for agent, every_s in zip(agents, (15, 30), strict=True)]
        await asyncio.sleep(60)
        await scenario(world, rng)
        for life in lives:
            life.cancel()
        await world.stop()
        assert not world.faults

    run_virtual(whole())


async def _beat(agent: Agent, every_s: float) -> None:
    while True:
        await agent.heartbeat()
        await asyncio.sleep(every_s)


def online(world: World) -> bool:
    return [link.state for link in world.bridge.links] == [LinkState.ONLINE]


def returns_s(outages: int, seed: int = 1) -> list[float]:
    """Seconds from each return of the controller to the link being online, with a heartbeat for those who live."""
    took_s: list[float] = []

    async def scenario(world: World, rng: random.Random) -> None:
        controller = world.controller
        answered = controller.upstream.on_dial
        for _ in range(outages):
            if rng.random() < 0.3:  # packets vanish: each dial lasts as long as its time-out, the last one too
                controller.upstream.on_dial = lambda dial: _time_out(dial, world.loop)
            controller.go_away(rng.choice(LOSSES), by_close_frame=rng.random() < 0.2)
            await asyncio.sleep(_outage_s(rng))
            controller.come_back()
            controller.upstream.on_dial = answered
            back_at, beats = world.now, len(controller.got("heartbeat"))
            await world.until(lambda: online(world), within_s=60)
            took_s.append(world.now - back_at)
            assert len(controller.got("heartbeat")) > beats
            await asyncio.sleep(rng.choice((1.0, 31.0)))  # not always long enough to earn a new start of the backoff

    play(scenario, seed)
    return took_s


def _outage_s(rng: random.Random) -> float:
    """Mostly short ones, as they are; a tenth lasts minutes."""
    low, high = (SHORTEST_S, MOSTLY_S) if rng.random() < 0.9 else (MOSTLY_S, LONGEST_S)
    return low * (high / low) ** rng.random()


def _time_out(dial: FakeDial, loop: asyncio.AbstractEventLoop) -> None:
    loop.call_later(CONNECT_TIMEOUT_S, lambda: dial.over or dial.fail(DialFailure("timeout")))


def half_open_s(times: int, seed: int = 2) -> list[float]:
    """Seconds until a connection on which nothing arrives any more, either way, is given up."""
    found_s: list[float] = []

    async def scenario(world: World, rng: random.Random) -> None:
        for _ in range(times):
            await asyncio.sleep(rng.uniform(0, 90))
            socket, began = world.controller.socket, world.now
            socket.swallows = True
            await world.until(lambda socket=socket: not socket.open, step_s=0.1)
            found_s.append(world.now - began)
            await world.until(lambda: online(world), step_s=0.1)

    play(scenario, seed)
    return found_s


def stalled_s(times: int, seed: int = 3) -> list[float]:
    """Seconds until an application that answers no message is given up, while its proxy answers pings."""
    found_s: list[float] = []

    async def scenario(world: World, rng: random.Random) -> None:
        manners = world.controller.manners
        for _ in range(times):
            await asyncio.sleep(rng.uniform(31, 90))
            socket, began = world.controller.socket, world.now
            manners.acks = manners.registers = False
            await world.until(lambda socket=socket: not socket.open, step_s=0.1)
            found_s.append(world.now - began)
            manners.acks = manners.registers = True
            await world.until(lambda: online(world), step_s=0.1)

    play(scenario, seed)
    return found_s
