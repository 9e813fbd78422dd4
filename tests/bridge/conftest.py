"""All tests here run in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import pytest

from shim.ports import CommandStore
from tests.support.virtual import VirtualLoop
from tests.support.world import Agent, World, settings

MakeWorld = Callable[..., Awaitable[World]]


def pytest_asyncio_loop_factories(config: Any, item: Any) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"virtual": VirtualLoop}


@pytest.fixture
async def make_world() -> AsyncIterator[MakeWorld]:
    """Makes worlds, started and settled; at the end stops them and holds them to leaving nothing behind."""
    worlds: list[World] = []

    async def make(make_store: Callable[[], CommandStore] | None = None, **sections: Any) -> World:
        world = World(settings(**sections), make_store)
        worlds.append(world)
        world.start()
        await world.settle()
        return world

    yield make
    for world in worlds:
        if world.running:
            await world.stop()
        assert not world.faults, world.faults
        assert world.has_defects or not world.defects(), "an exception was caught, logged and counted as a defect"
        assert not world.timers.pending(), world.timers.pending()


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    """A shim with a configured token, online, without agents."""
    return await make_world()


async def living(world: World, **fields: str) -> Agent:
    agent = world.agent(**fields)
    await agent.register()
    await agent.heartbeat()
    await world.settle()
    return agent


async def given(world: World, *commands: str, **payload: Any) -> Agent:
    """A living agent for which these commands wait."""
    agent = await living(world)
    for command_id in commands:
        world.controller.push(command_id, **payload)
    await world.settle()
    return agent


def codes(world: World, command_id: str) -> list[str]:
    return [result.get("code", "") for result in world.controller.results(command_id)]


async def offered(world: World) -> Agent:
    agent = await given(world, "k1")
    assert await agent.poll() == ["k1"]
    assert await world.state("k1") == "offered"
    return agent
