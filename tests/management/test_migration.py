"""The migration panel: who calls what, and whether the shim may go."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from shim.bridge.session_registry import RouteUsage
from shim.config.settings import Sunset
from shim.core.agent_calls import SessionTarget, TargetKind, TunnelInfoCall
from shim.core.records import SessionKey
from shim.management.migration import migration, paths, sunset
from shim.management.subject import Subject
from shim.protocol import dialects
from tests.bridge.conftest import MakeWorld
from tests.support.virtual import WALL_AT_START_S
from tests.support.world import World

DAY_S = 86_400.0


def panel(world: World, started_ago_s: float = 0.0) -> dict[str, Any]:
    wall = world.clock.wall_s()
    found: dict[str, Any] = msgspec.to_builtins(migration(Subject.of(world.bridge), wall, wall - started_ago_s))
    return found


def calls(found: dict[str, Any]) -> dict[str, int]:
    return {f"{route['method']} {route['path']}": route["calls"] for route in found["routes"]}


async def test_calls_are_counted_by_dialect_route_and_agent(world: World) -> None:
    new, old = world.agent(name="new"), world.agent(dialect="agents", agent_id="a-1", name="old")
    for agent in (new, old):
        await agent.register()
        for _ in range(3):
            await agent.heartbeat()
            await world.pass_s(5)
        await agent.poll()
    await old.status(nodes=3)
    await new.tunnel_poll()
    await new.outcome(TunnelInfoCall(SessionTarget(TargetKind.CLUSTER, new.cluster_id)))
    await new.result("k1")
    found = panel(world)
    assert calls(found) == {
        "POST /api/v1/agents/register": 1,
        "POST /api/v1/agents/{agent_id}/heartbeat": 3,
        "POST /api/v1/agents/{agent_id}/status": 1,
        "GET /api/v1/agents/{agent_id}/commands": 1,
        "POST /api/v1/clusters/agent/register": 1,
        "POST /api/v1/clusters/agent/{cluster_id}/heartbeat": 3,
        "GET /api/v1/clusters/agent/{cluster_id}/poll": 1,
        "GET /api/v1/clusters/agent/{cluster_id}/tunnel-info": 1,
        "POST /api/v1/clusters/agent/{cluster_id}/commands/{command_id}/result": 1,
        "GET /api/agents/{agent_id}/tunnel/status": 1,
    }
    by_name = {agent["name"]: agent for agent in found["agents"]["items"]}
    beats = next(route for route in by_name["new"]["routes"] if route["operation"] == "heartbeat")
    assert (beats["calls"], beats["every_s"]) == (3, 5.0)
    assert next(route for route in by_name["old"]["routes"] if route["operation"] == "register")["every_s"] is None
    assert by_name["old"]["calls"] == 6
    assert by_name["old"]["last"] == pytest.approx(world.clock.wall_s(), abs=1)


async def test_a_registration_from_the_store_is_a_call_too(world: World) -> None:
    agent = world.agent()
    await agent.register()
    world.controller.go_away()
    await world.pass_s(1)
    await agent.register()
    assert calls(panel(world))["POST /api/v1/clusters/agent/register"] == 2


async def test_a_tunnel_poll_of_an_unknown_agent_is_seen(world: World) -> None:
    agent = world.agent(agent_id="stranger")
    await agent.tunnel_poll()
    assert [(agent["id"], agent["dialect"]) for agent in panel(world)["agents"]["items"]] == [("stranger", None)]


def test_every_route_of_every_dialect_has_its_path() -> None:
    assert len(paths()) == sum(len(dialect.ROUTES) for dialect in dialects.load())
    assert paths()["clusters", "register"] == ("POST", "/clusters/{agent_id}")


async def test_while_agents_call_the_shim_is_needed_and_a_quiet_day_later_not(world: World) -> None:
    agent = world.agent()
    await agent.register()
    await agent.heartbeat()
    assert panel(world, DAY_S)["reasons"] == ["1 agent called in the last 24 h, the last one 0 s ago"]
    world.clock.wall_offset_s += DAY_S - 60
    assert panel(world, 2 * DAY_S)["reasons"] == ["1 agent called in the last 24 h, the last one 23 h 59 min ago"]
    world.clock.wall_offset_s += 120
    assert panel(world, 2 * DAY_S)["removable"] is True


async def test_a_shim_that_has_hardly_watched_knows_nothing(world: World) -> None:
    assert panel(world, 3600)["reasons"] == ["no call in the 1 h since the start: wait until it is 24 h"]
    assert panel(world, DAY_S)["removable"] is True


async def test_when_an_agent_was_seen_survives_a_restart(world: World) -> None:
    agent = world.agent(name="prod")
    await agent.register()
    await world.pass_s(3600)
    await world.restart()
    found = panel(world)
    assert found["routes"] == []
    assert [(each["name"], each["calls"]) for each in found["agents"]["items"]] == [("prod", 0)]
    assert found["reasons"] == ["1 agent called in the last 24 h, the last one 1 h ago"]


async def test_what_waits_here_keeps_the_shim(make_world: MakeWorld) -> None:
    world = await make_world(commands={"ttl_s": 10 * DAY_S})
    agent = world.agent()
    await agent.register()
    await agent.heartbeat()
    world.controller.push("k1", cluster_id=agent.cluster_id)
    world.controller.push("k2", cluster_id=agent.cluster_id)
    await world.settle()
    world.clock.wall_offset_s += DAY_S + 60
    assert panel(world, 2 * DAY_S)["reasons"] == ["2 commands wait to be fetched"]
    world.controller.go_away()
    await agent.poll()
    await agent.result("k1")
    await world.settle()
    assert "results are not confirmed by the controller yet" in panel(world, 2 * DAY_S)["reasons"]


async def test_agents_that_are_gone_are_forgotten(make_world: MakeWorld) -> None:
    world = await make_world(sessions={"retain_s": DAY_S})
    await world.agent().register()
    world.clock.wall_offset_s += 2 * DAY_S
    await world.pass_s(700)
    assert panel(world)["agents"]["total"] == 0


def test_the_sunset_is_counted_in_days() -> None:
    wall = WALL_AT_START_S
    configured = Sunset(deprecation_at="2026-11-24", at="2026-12-24T21:28:03Z", link="https://vendor.test/end")
    found = sunset(configured, wall)
    assert found["days_left"] == pytest.approx(30)
    assert (found["link"], found["deprecated_at"] < wall) == ("https://vendor.test/end", True)
    assert sunset(Sunset(at="2026-11-23"), wall)["days_left"] < 0
    assert sunset(Sunset(), wall) == {"deprecated_at": None, "at": None, "days_left": None, "link": None}


def test_usage_is_bounded_by_agents() -> None:
    usage = RouteUsage(max_agents=2)
    for ident in ("a", "b", "a", "c"):
        usage.note(SessionKey("default", "agent", ident), "agents", "poll", 1.0)
    assert [key.ident for key, _ in usage] == ["b", "c"]
