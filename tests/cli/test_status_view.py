"""Text of `agent-shim status`, of a shim in virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from shim.cli.status import plain, view
from shim.management.status_builder import StatusBuilder
from shim.management.subject import Subject
from tests.support.virtual import run_virtual
from tests.support.world import World, settings


def status_after(life: Callable[[World], Awaitable[Any]], **sections: Any) -> dict[str, Any]:
    """The status of a shim after this life of its agents."""

    async def run() -> dict[str, Any]:
        world = World(settings(**sections)).start()
        builder = StatusBuilder(Subject.of(world.bridge), {"listen": "127.0.0.1:7080"})
        builder.start()
        await world.settle()
        await life(world)
        status: dict[str, Any] = msgspec.to_builtins(builder.take([]))
        builder.stop()
        await world.stop()
        return status

    return run_virtual(run())


async def two_minutes(world: World) -> None:
    agent = world.agent()
    await agent.register()
    await agent.live(120)


async def over_an_hour_with_missed_heartbeats(world: World) -> None:
    agent = world.agent()
    await agent.register()
    await agent.live(60)
    world.controller.manners.acks = False
    await agent.live(600)
    world.controller.manners.acks = True
    await agent.live(3_900)


def test_the_objectives_are_one_line_in_the_first_hour() -> None:
    found = dict(view(status_after(two_minutes)).lines)
    assert found["objectives"] == "last 2 min: connections 100 %, no reconnects, heartbeats 100 %, no messages"
    assert "" not in found


def test_later_they_are_two_lines_and_say_what_was_missed() -> None:
    shown = view(status_after(over_an_hour_with_missed_heartbeats)).lines
    hour, day = [text for name, text in shown if name in ("objectives", "")]
    assert hour.startswith("last 1 h: no connections, ")
    assert "heartbeats 100 %, no messages" in hour
    assert day.startswith("last 1 h 16 min: connections ")
    assert " % (missed, more than 99.9 % wanted), no messages" in day


def test_a_rollout_is_a_line() -> None:
    status = status_after(two_minutes, rollout={"percent": 10, "include": ["prod"]})
    assert dict(view(status).lines)["rollout"].startswith("10 % and lists: 1 of 1 agent inside, hash ")
    assert "rollout     10 %" in plain(view(status))


def test_without_a_rollout_there_is_no_line() -> None:
    assert "rollout" not in dict(view(status_after(two_minutes)).lines)


def test_a_status_of_an_older_shim_is_shown() -> None:
    status = status_after(two_minutes)
    for name in ("objectives", "rollout"):
        del status[name]
    assert {"objectives", "rollout"}.isdisjoint(dict(view(status).lines))


@pytest.mark.parametrize("mode", ["http", "auto"])
def test_after_the_sunset_the_mode_in_force_is_named_before_the_one_that_is_set(mode: str) -> None:
    status = status_after(two_minutes, mode=mode, sunset={"at": "2001-01-01"})
    shim = dict(view(status).lines)["shim"]
    assert f", by WebSocket because sunset.at has passed (mode {mode} is set), up " in shim


def test_before_the_sunset_the_mode_is_the_one_that_is_set() -> None:
    shim = dict(view(status_after(two_minutes, mode="auto", sunset={"at": "2999-01-01"})).lines)["shim"]
    assert ", mode auto, up " in shim


def test_after_the_sunset_a_percentage_is_only_set() -> None:
    status = status_after(two_minutes, rollout={"percent": 10}, sunset={"at": "2001-01-01"})
    shown = dict(view(status).lines)
    assert shown["rollout"].startswith("10 % is set, but sunset.at has passed: 1 of 1 agent inside")
    assert ", mode websocket, up " in shown["shim"]
