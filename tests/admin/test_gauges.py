"""The gauges say what the status says."""

from __future__ import annotations

from shim import __version__
from shim.admin.gauges import StatusCollector
from shim.management.health_summary import PROBLEMS
from tests.bridge.conftest import MakeWorld
from tests.management.conftest import MakePage, Page


def gauges(page: Page) -> dict[tuple[str, ...], float]:
    """The values by name and label values."""
    collector = StatusCollector(lambda: page.snapshots.take([]))
    return {
        (sample.name.removeprefix("agent_shim_"), *sample.labels.values()): sample.value
        for family in collector.collect()
        for sample in family.samples
    }


async def test_a_link_and_its_agents_are_counted(make_world: MakeWorld, make_page: MakePage) -> None:
    world = await make_world()
    page = make_page(world)
    one, two = world.agent(), world.agent(agent_id="pod-2", name="stage", dialect="agents")
    await one.register()
    await two.register()
    await one.poll()
    found = gauges(page)
    assert found["links", "online"] == 1
    assert found["links", "waiting"] == found["links_refused",] == found["links_contended",] == 0
    assert found["sessions", "clusters_agent", "true"] == found["sessions", "agents", "true"] == 1
    assert found["polling_sessions", "unknown"] == 1
    assert (found["build_info", __version__], found["mode", "websocket"], found["mode", "http"]) == (1, 1, 0)


async def test_the_end_of_the_http_api_is_told_if_it_is_configured(make_world: MakeWorld, make_page: MakePage) -> None:
    assert gauges(make_page(await make_world()))["sunset_timestamp_seconds",] == 0
    dated = make_page(await make_world(sunset={"at": "2001-01-01"}))
    assert gauges(dated)["sunset_timestamp_seconds",] == 978_307_200


async def test_commands_are_counted_by_state_with_the_age_of_the_oldest(
    make_world: MakeWorld, make_page: MakePage
) -> None:
    world = await make_world()
    page = make_page(world)
    agent = world.agent()
    await agent.register()
    world.controller.push("k1", type="x", payload={})
    world.controller.push("k2", type="x", payload={})
    await world.pass_s(30)
    found = gauges(page)
    assert found["commands_queued", "queued"] == 2
    assert 29 < found["command_oldest_seconds",] < 32
    assert found["queue_bytes",] > 0
    assert sorted(await agent.poll()) == ["k1", "k2"]
    found = gauges(page)
    assert (found["commands_queued", "queued"], found["commands_queued", "offered"]) == (0, 2)
    await agent.result("k1")
    assert gauges(page)["results_pending",] == 1


async def test_every_problem_has_a_gauge_and_those_of_now_are_1(make_world: MakeWorld, make_page: MakePage) -> None:
    world = await make_world()
    page = make_page(world)
    world.bridge.admin_actions.drain(60)
    found = gauges(page)
    assert {code for code in PROBLEMS if found["health_problem", code]} == {"draining"}
    assert len([name for name in found if name[0] == "health_problem"]) == len(PROBLEMS)
