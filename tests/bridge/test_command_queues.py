"""The queues of all sessions: bounds, expiry, and the recovery of stored commands after a restart."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from shim.bridge.command_queues import EXPIRY_SLACK
from shim.core.agent_calls import PollCall
from tests.bridge.conftest import MakeWorld, codes, given, living, offered
from tests.support.stores import put
from tests.support.world import World, traces


async def test_after_max_attempts_it_is_dead_and_the_controller_is_told(make_world: MakeWorld) -> None:
    world = await make_world(commands={"max_attempts": 3})
    agent = await given(world, "k1", "k2")
    for attempt in range(3):
        assert await agent.poll() == ["k1", "k2"], attempt
        agent.reconnect(clean=False)
        await agent.live(61)
    assert await agent.poll() == []
    await agent.live(30)
    assert await world.state("k1") == "dead"
    [result] = world.controller.results("k1")
    assert (result["success"], result["code"]) == (False, "undeliverable")


async def test_a_restart_makes_an_offer_uncertain(world: World) -> None:
    agent = await offered(world)
    await world.crash()
    world.start()
    await world.settle()
    assert await world.state("k1") == "uncertain"
    assert await agent.poll() == ["k1"]
    assert traces(world, "k1") == ["uncertain: restart", "offered: attempt 2, restart"]


async def test_after_a_restart_attempts_count_on(make_world: MakeWorld) -> None:
    world = await make_world(commands={"max_attempts": 3})
    agent = await given(world, "k1")
    for _ in range(3):
        assert await agent.poll() == ["k1"]
        await world.crash()
        world.start()
        await world.settle()
    assert await agent.poll() == []
    await world.settle()
    assert codes(world, "k1") == ["undeliverable"]


# --- ends -------------------------------------------------------------------------------------------------------------


async def test_a_command_that_is_not_fetched_in_time_expires(world: World) -> None:
    agent = await given(world, "k1", ttl_seconds=60)
    await agent.live(61)
    assert await agent.poll() == []
    assert await world.state("k1") == "expired"
    assert codes(world, "k1") == ["expired"]


async def test_only_queued_commands_expire(world: World) -> None:
    agent = await given(world, "k1", ttl_seconds=30)
    assert await agent.poll() == ["k1"]
    agent.reconnect(clean=False)
    await agent.live(70)
    assert await world.state("k1") == "uncertain"
    assert await agent.poll() == ["k1"]


async def test_one_that_comes_back_after_its_time_expires_at_once(world: World) -> None:
    agent = await given(world, "k1", ttl_seconds=30)
    answer = await agent.call(PollCall("clusters_agent", agent.target))
    await world.pass_s(31)
    assert answer.receipt is not None
    world.bridge.delivery.unwritten(answer.receipt)
    await world.settle()
    assert await world.state("k1") == "expired"


async def test_expiry_survives_a_restart(world: World) -> None:
    agent = await given(world, "k1", "k2", ttl_seconds=100)
    await world.stop()
    await world.pass_s(90)
    world.start()
    await agent.live(11)
    assert codes(world, "k1") == ["expired"]
    assert codes(world, "k2") == ["expired"]


async def test_very_late_expiries_do_not_upset_the_timers(world: World) -> None:
    agent = await given(world, "k1", ttl_seconds=9e9)
    world.controller.push("k2", ttl_seconds=40)
    await agent.live(50)
    assert codes(world, "k2") == ["expired"]
    assert await agent.poll() == ["k1"]


@pytest.mark.parametrize("settings", [{"max_queued": 2}, {"max_queued_bytes": 1400}])
async def test_the_queue_is_bounded(make_world: MakeWorld, settings: dict[str, int]) -> None:
    world = await make_world(commands=settings)
    agent = await given(world, "k1", "k2", "k3", payload={"data": "x" * 600})
    assert codes(world, "k3") == ["queue_full"]
    world.controller.push("k1", payload={"data": "x" * 600})
    await world.settle()
    assert not codes(world, "k1"), "a duplicate is none too many"
    assert await agent.poll() == ["k1", "k2"]
    await agent.heartbeat()
    world.controller.push("k3", payload={"data": "x" * 600})
    await world.settle()
    assert await agent.poll() == ["k3"]


async def test_bounds_hold_for_a_burst_on_its_way_to_the_disk(make_world: MakeWorld) -> None:
    world = await make_world(commands={"max_queued": 3})
    await living(world)
    world.store.slow = True
    for number in range(6):
        world.controller.push(f"k{number}")
    await world.settle()
    world.store.catch_up()
    await world.settle()
    assert [codes(world, f"k{n}") for n in range(6)] == [[], [], [], ["queue_full"], ["queue_full"], ["queue_full"]]


# --- the log ----------------------------------------------------------------------------------------------------------


async def test_commands_that_nobody_polls_for_are_said_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    def warnings() -> int:
        return [record.getMessage() for record in caplog.records].count("commands_not_polled")

    agent = await given(world, "k1")
    await agent.live(595)
    assert warnings() == 0
    await agent.live(30)
    assert warnings() == 1
    assert world.bridge.queues.unpolled == {world.session("c-1").key}
    await agent.live(1000, every_s=30)
    assert warnings() == 1
    await agent.poll()
    await agent.live(20)
    assert not world.bridge.queues.unpolled
    world.controller.push("k2")
    await agent.live(550)
    assert warnings() == 1, "it has not waited for ten minutes"
    await agent.live(100)
    assert warnings() == 2


async def test_settled_commands_leave_the_list_of_expiries(world: World) -> None:
    """Those that were fetched long before they expire must not fill the memory."""
    queues, record, now = world.bridge.queues, put("k").record, world.loop.time()
    for number in range(3 * EXPIRY_SLACK):
        queues.add(replace(record, id=f"k{number}", seq=number), now + 1e6, now)
        queues.get_or_create(record.session).expire(f"k{number}")
    assert len(queues._expiries) <= EXPIRY_SLACK
