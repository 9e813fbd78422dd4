"""Places of agents in the rollout, as the status shows them."""

from __future__ import annotations

import pytest

from shim.core.failover import bucket
from tests.bridge.conftest import MakeWorld
from tests.management.conftest import MakePage


async def test_an_agent_has_its_place_by_the_name_of_its_cluster(make_world: MakeWorld, make_page: MakePage) -> None:
    world = await make_world(rollout={"percent": 50})
    page = make_page(world)
    await world.agent(name="prod-cluster").register()
    found = page.status()["rollout"]
    place = round(bucket("prod-cluster"), 2)
    assert found["agents"] == {
        "total": 1,
        "inside": int(place < 50),
        "items": [{"name": "prod-cluster", "hash": place, "inside": place < 50}],
    }
    assert (found["percent"], found["hash"], found["inside"]) == (50, place, place < 50)


@pytest.mark.parametrize("inside, lists", [(True, {"include": ["prod*"]}), (False, {"exclude": ["prod"]})])
async def test_lists_come_before_the_hash(
    inside: bool, lists: dict[str, list[str]], make_world: MakeWorld, make_page: MakePage
) -> None:
    world = await make_world(rollout={"percent": 0 if inside else 100, **lists})
    page = make_page(world)
    await world.agent().register()
    found = page.status()["rollout"]
    assert found["inside"] is inside
    assert {name: found[name] for name in lists} == lists


async def test_after_the_sunset_all_agents_are_inside(make_world: MakeWorld, make_page: MakePage) -> None:
    world = await make_world(mode="http", rollout={"percent": 0}, sunset={"at": "2026-11-23"})
    page = make_page(world)
    await world.agent().register()
    found = page.status()
    assert (found["rollout"]["inside"], found["sessions"]["fresh"]) == (True, 1)
    assert found["overall"]["text"] == "All is well: the controller is connected, 1 agent alive."


async def test_agents_on_both_sides_have_no_common_place(make_world: MakeWorld, make_page: MakePage) -> None:
    world = await make_world(rollout={"percent": 0, "include": ["prod"]})
    page = make_page(world)
    await world.agent().register()
    await world.agent(agent_id="pod-2", name="stage").register()
    found = page.status()["rollout"]
    assert (found["hash"], found["inside"]) == (None, None)
    assert (found["agents"]["total"], found["agents"]["inside"]) == (2, 1)


async def test_the_configured_name_is_placed_before_the_first_call(make_world: MakeWorld, make_page: MakePage) -> None:
    world = await make_world(identity={"name": "prod-cluster"}, rollout={"percent": 0})
    found = make_page(world).status()["rollout"]
    assert [place["name"] for place in found["agents"]["items"]] == ["prod-cluster"]
    assert found["inside"] is False


async def test_without_a_name_there_is_no_place(make_world: MakeWorld, make_page: MakePage) -> None:
    found = make_page(await make_world()).status()["rollout"]
    assert (found["hash"], found["inside"], found["agents"]["total"]) == (None, None, 0)
