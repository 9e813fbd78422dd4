"""The four objectives and the commands without result over windows of time, in virtual time."""

from __future__ import annotations

from typing import Any

import pytest

from shim.management.objectives import CODES, ROW_S, ObjectiveWindows
from shim.metrics import COMMAND_EVENTS
from shim.ports import DialFailure
from tests.bridge.conftest import MakeWorld
from tests.management.conftest import MakePage, Page
from tests.support.world import World


def measured(page: Page, objective: str, window: str = "1h") -> dict[str, Any]:
    found = {each["name"]: each for each in page.status()["objectives"]}
    measurement: dict[str, Any] = found[objective]["windows"][window]
    return measurement


def test_every_ending_that_the_shim_makes_itself_has_a_code() -> None:
    assert set(CODES) == {each for each in COMMAND_EVENTS if each.startswith("rejected_")} | {"expired", "dead"}


async def test_an_objective_without_samples_is_unknown(page: Page) -> None:
    found = page.status()["objectives"]
    assert [each["name"] for each in found] == [
        "connection_success",
        "reconnection",
        "heartbeat_success",
        "message_latency",
    ]
    assert measured(page, "heartbeat_success") == {
        "state": "unknown",
        "measured": None,
        "good": 0,
        "samples": 0,
        "observed_s": 0.0,
    }


async def test_a_shim_that_works_meets_its_objectives(world: World, make_page: MakePage) -> None:
    page = make_page(world)
    agent = world.agent()
    await agent.register()
    await agent.live(120)
    world.controller.socket.lose()
    await agent.live(180)
    heartbeats = measured(page, "heartbeat_success")
    assert heartbeats["state"] == "met"
    assert heartbeats["samples"] == heartbeats["good"] >= 50
    assert heartbeats["observed_s"] == pytest.approx(300, abs=1)
    assert measured(page, "reconnection") == {**heartbeats, "good": 1, "samples": 1}
    assert measured(page, "connection_success")["measured"] == 1
    assert measured(page, "message_latency")["state"] == "unknown"
    assert measured(page, "message_latency", "24h")["observed_s"] == heartbeats["observed_s"]


async def test_attempts_that_the_controller_refuses_miss_the_objective(
    make_world: MakeWorld, make_page: MakePage
) -> None:
    world = await make_world()
    page = make_page(world)
    agent = world.agent()
    await agent.register()
    world.controller.go_away(DialFailure("tls"))
    await agent.live(60)
    found = measured(page, "connection_success")
    assert found["state"] == "missed"
    assert found["samples"] > found["good"]
    assert found["measured"] == found["good"] / found["samples"] < 0.99


async def test_what_is_older_than_the_window_does_not_count(world: World, make_page: MakePage) -> None:
    page = make_page(world)
    agent = world.agent()
    await agent.register()
    await agent.live(60)
    world.controller.manners.acks = False
    await agent.live(600)
    assert measured(page, "heartbeat_success")["state"] == "missed"
    world.controller.manners.acks = True
    await agent.live(3_800)
    hour, day = measured(page, "heartbeat_success"), measured(page, "heartbeat_success", "24h")
    assert (hour["state"], day["state"]) == ("met", "missed")
    assert 3_600 <= hour["observed_s"] <= 3_600 + ROW_S + 5
    assert day["observed_s"] == pytest.approx(4_460, abs=5)


async def test_commands_without_result_are_counted_by_the_code_of_their_result(
    make_world: MakeWorld, make_page: MakePage
) -> None:
    world = await make_world(commands={"ttl_s": 60})
    page = make_page(world)
    agent = world.agent()
    await agent.register()
    world.controller.push("k1", type="x", payload={})
    world.controller.push("k2", type="x", payload={}, cluster_id="nobody")
    await agent.live(120)
    found = page.status()["commands"]["without_result"]
    assert found["1h"]["total"] == found["24h"]["total"] == 2
    assert {code: number for code, number in found["1h"]["codes"].items() if number} == {
        "expired": 1,
        "unknown_agent": 1,
    }
    await world.pass_s(3_700)
    found = page.status()["commands"]["without_result"]
    assert (found["1h"]["total"], found["24h"]["total"]) == (0, 2)


async def test_a_day_and_more_is_kept_in_one_row_a_minute(world: World) -> None:
    windows = ObjectiveWindows(world.bridge.ctx.metrics, 0.0)
    for second in range(0, 90_000, 60):
        windows.record(float(second))
    assert len(windows) == 1_441
    assert windows.without_result(90_000.0)["24h"]["observed_s"] == pytest.approx(86_400, abs=ROW_S)
