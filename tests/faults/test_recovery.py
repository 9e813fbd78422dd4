"""How soon the shim is back after the controller was away, and how soon it finds out: real settings, virtual time.

protocol.md §2.1: back within 10 s of the controller's return, measured from the moment it can be reached; half-open
found in under 60 s, a stalled application behind a live proxy in under 90 s.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from shim.core.link import LinkState
from shim.ports import DialFailure
from tests.faults.report import percentile
from tests.support.upstream import FakeDial
from tests.support.virtual import run_virtual
from tests.support.world import Agent, World

OUTAGES = 1000
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


async def _living(world: World, every_s: tuple[float, ...]) -> list[asyncio.Task[None]]:
    """Agents that heartbeat for ever, each at its own pace."""
    agents = [world.agent(agent_id=f"pod-{n}", name=f"cluster-{n}") for n in range(len(every_s))]
    for agent in agents:
        await agent.register()
    return [world.loop.create_task(_beat(agent, pace_s)) for agent, pace_s in zip(agents, every_s, strict=True)]


async def _beat(agent: Agent, every_s: float) -> None:
    while True:
        await agent.heartbeat()
        await asyncio.sleep(every_s)


def _outage_s(rng: random.Random) -> float:
    """Mostly short ones, as they are; a tenth lasts minutes."""
    low, high = (SHORTEST_S, MOSTLY_S) if rng.random() < 0.9 else (MOSTLY_S, LONGEST_S)
    return low * (high / low) ** rng.random()


def _online(world: World) -> bool:
    return [link.state for link in world.bridge.links] == [LinkState.ONLINE]


def _timing_out(dial: FakeDial, loop: asyncio.AbstractEventLoop) -> None:
    """As packets that nobody answers do."""
    loop.call_later(CONNECT_TIMEOUT_S, lambda: dial.over or dial.fail(DialFailure("timeout")))


def _run(scenario: Callable[[World, random.Random], Awaitable[None]], seed: int) -> None:
    async def whole() -> None:
        rng = random.Random(seed)
        world = World(rng=rng.random).start()
        lives = await _living(world, (15.0, 30.0))
        await asyncio.sleep(60)
        await scenario(world, rng)
        for life in lives:
            life.cancel()
        await world.stop()
        assert not world.faults

    run_virtual(whole())


@pytest.mark.timeout(120)
def test_back_within_10_s_of_the_controllers_return_at_the_999th_of_1000() -> None:
    took_s: list[float] = []

    async def outages(world: World, rng: random.Random) -> None:
        controller = world.controller
        answered = controller.upstream.on_dial
        for _ in range(OUTAGES):
            silent = rng.random() < 0.3
            if silent:  # packets vanish: each dial lasts as long as its time-out, also that which is under way
                controller.upstream.on_dial = lambda dial: _timing_out(dial, world.loop)
            controller.go_away(rng.choice(LOSSES), by_close_frame=rng.random() < 0.2)
            await asyncio.sleep(_outage_s(rng))
            controller.come_back()
            controller.upstream.on_dial = answered
            back_at, beats = world.now, len(controller.got("heartbeat"))
            await world.until(lambda: _online(world), within_s=60)
            took_s.append(world.now - back_at)
            assert len(controller.got("heartbeat")) >= beats + 1  # said at once for those who are alive
            await asyncio.sleep(rng.choice((1.0, 31.0)))  # not always long enough to earn a new start of the backoff

    _run(outages, seed=1)
    assert len(took_s) == OUTAGES
    assert percentile(took_s, 0.999) < 10
    assert percentile(took_s, 0.5) < 4


def test_half_open_is_found_in_under_60_s() -> None:
    found_s: list[float] = []

    async def silences(world: World, rng: random.Random) -> None:
        for _ in range(100):
            await asyncio.sleep(rng.uniform(0, 90))
            socket = world.controller.socket
            socket.swallows = True
            began = world.now
            await world.until(lambda socket=socket: not socket.open, step_s=0.1)
            found_s.append(world.now - began)
            await world.until(lambda: _online(world), step_s=0.1)

    _run(silences, seed=2)
    assert max(found_s) < 60
    assert min(found_s) > 25  # never condemned before it was asked


def test_a_stalled_application_behind_a_live_proxy_is_found_in_under_90_s() -> None:
    found_s: list[float] = []

    async def stalls(world: World, rng: random.Random) -> None:
        for _ in range(100):
            await asyncio.sleep(rng.uniform(31, 90))
            socket = world.controller.socket
            world.controller.manners.acks = world.controller.manners.registers = False  # pings are still answered
            began = world.now
            await world.until(lambda socket=socket: not socket.open, step_s=0.1)
            found_s.append(world.now - began)
            world.controller.manners.acks = world.controller.manners.registers = True
            await world.until(lambda: _online(world), step_s=0.1)

    _run(stalls, seed=3)
    assert max(found_s) < 90
    assert min(found_s) > 27.5


def test_a_controller_that_never_acknowledges_is_not_taken_for_stalled() -> None:
    async def silence(world: World, rng: random.Random) -> None:
        world.controller.manners.acks = False
        world.controller.socket.lose()
        await world.settle()
        await world.until(lambda: _online(world))
        dials = len(world.controller.dials)
        await asyncio.sleep(1800)
        assert len(world.controller.dials) == dials

    _run(silence, seed=4)
