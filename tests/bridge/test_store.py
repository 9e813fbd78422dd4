"""The bridge and its store: the real one, a full one, a slow one, a damaged one.

Rules: docs/reference/protocol.md#3-commands.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from shim.bridge.outbox import REASONS
from shim.bridge.scheduler import TICK_S
from shim.core.agent_calls import Accepted, Failed, Registered
from shim.core.records import CommandState, MoveSession, Prune, SessionKey, StoreContents
from shim.ports import CommandStore
from shim.store.sqlite import SqliteStore
from tests.bridge.conftest import MakeWorld, codes, given, living
from tests.support.memory_store import MemoryStore
from tests.support.world import World


def sqlite(path: Path) -> Callable[[], CommandStore]:
    return lambda: SqliteStore(path / "shim.db", asyncio.get_running_loop().call_soon_threadsafe)


async def test_the_whole_life_on_sqlite_through_a_stop_and_a_crash(make_world: MakeWorld, tmp_path: Path) -> None:
    world = await make_world(make_store=sqlite(tmp_path))
    agent = await living(world)
    for number in range(5):
        world.controller.push(f"k{number}", payload={"n": number})
    await world.settle()
    await world.restart()
    assert await agent.poll() == [f"k{number}" for number in range(5)]
    await agent.result("k0", output="done")
    await world.settle()
    await world.crash()
    world.start()
    await agent.live(40)
    assert [result["output"] for result in world.controller.results("k0")][:1] == ["done"]
    assert await world.state("k0") == "closed"
    assert await world.state("k1") == "delivered", "the result proved the whole reply, and that is on disk"
    world.controller.push("k0")
    world.controller.push("k1")
    await world.settle()
    assert await agent.poll() == []
    assert await world.trace("k0") == ["arrived", "offered", "delivered", "result", "closed", "arrived"]


async def test_sessions_aliases_and_tunnels_come_back_from_sqlite(make_world: MakeWorld, tmp_path: Path) -> None:
    world = await make_world(make_store=sqlite(tmp_path))
    agent = await living(world)
    world.controller.socket.says("tunnel_status", {"cluster_id": "c-1", "status": "ACTIVE"})
    await world.settle()
    await world.restart()
    world.controller.manners.registers = False
    assert getattr(await agent.tunnel_poll(), "payload", None) == {"status": "ACTIVE"}
    outcome = await world.agent(agent_id="pod-2").register()
    assert isinstance(outcome, Registered)
    assert (outcome.cached, outcome.cluster_id, outcome.workspace_id) == (True, "c-1", 7)


# --- a full disk ------------------------------------------------------------------------------------------------------


async def test_a_full_disk_refuses_commands_and_serves_everything_else(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    agent = await living(world)
    world.controller.push("k1")
    await world.settle()
    world.store.fail()
    world.controller.push("k2")
    await world.settle()
    [refused] = world.controller.results("k2")
    assert (refused["code"], refused["error"]) == ("store_unavailable", REASONS["store_unavailable"])
    assert await agent.poll() == ["k1"], "what was queued before is still delivered"
    assert await agent.heartbeat() == Accepted()
    outcome = await agent.result("k1")
    assert isinstance(outcome, Failed)
    assert (outcome.status, outcome.retry_after_s) == (503, 5)
    await agent.live(40)
    assert len(world.controller.got("heartbeat")) >= 2
    world.store.heal()
    assert await agent.result("k1") == Accepted()
    world.controller.push("k2")
    await world.settle()
    assert await agent.poll() == ["k2"]
    assert len(world.controller.results("k1")) == 1
    offers = [each.fields for each in caplog.records if each.getMessage() == "command_offered"]  # type: ignore[attr-defined]
    assert [(each["command"], each["recorded"]) for each in offers] == [("k1", False), ("k2", True)]


async def test_the_largest_command_or_result_that_a_full_disk_refused_is_remembered_for_readiness(world: World) -> None:
    agent = await living(world)
    world.store.fail()
    sizes = []
    for size_bytes in (2000, 1000):
        world.controller.push(f"k{size_bytes}", payload={"data": "x" * size_bytes})
        await world.settle()
        sizes.append(world.bridge.ctx.refused_bytes)
    for size_bytes in (4000, 3000):
        assert isinstance(await agent.result("k1", output="x" * size_bytes), Failed)
        sizes.append(world.bridge.ctx.refused_bytes)
    assert 2000 <= sizes[0] == sizes[1] < 4000 <= sizes[2] == sizes[3]


@pytest.mark.parametrize("offer_is_stored", [True, False])
async def test_what_was_delivered_while_the_disk_was_full_does_not_come_again(
    world: World, offer_is_stored: bool
) -> None:
    agent = await given(world, "k1", "k2")
    if not offer_is_stored:
        world.store.fail()
    assert await agent.poll() == ["k1", "k2"]
    world.store.fail()
    assert await agent.poll() == []
    await agent.live(20)
    assert await world.state("k1") == ("offered" if offer_is_stored else "queued")
    world.store.heal()
    await agent.live(10)
    assert [await world.state(name) for name in ("k1", "k2")] == ["delivered"] * 2
    await world.restart()
    assert await agent.poll() == []


async def test_a_result_is_not_undone_by_the_delivery_that_the_disk_refused_before(world: World) -> None:
    agent = await given(world, "k1")
    assert await agent.poll() == ["k1"]
    world.store.fail()
    assert await agent.poll() == []
    world.store.heal()
    assert await agent.result("k1") == Accepted()
    await agent.live(40)
    assert await world.state("k1") == "closed"


async def test_a_delivery_that_the_disk_refused_moves_with_its_session(world: World) -> None:
    agent = await given(world, "k1")
    successor = await living(world, agent_id="pod-2", name="new")
    assert await agent.poll() == ["k1"]
    world.store.fail()
    assert await agent.poll() == []
    await world.settle()
    world.store.heal()
    source, target = (world.session(each.cluster_id).key for each in (agent, successor))
    world.bridge.ctx.store.submit(MoveSession(source, target))
    world.bridge.delivery.move(source, target)
    await successor.live(10)
    assert [(record.session, record.state) for record, _, _ in await world.store.find("k1")] == [
        (target, CommandState.DELIVERED)
    ]


@pytest.mark.parametrize("ends", ["delivered", "dead"])
@pytest.mark.parametrize("move_is_refused", [True, False])
async def test_an_end_that_the_disk_refuses_during_a_move_is_stored_for_the_successor(
    world: World, ends: str, move_is_refused: bool
) -> None:
    agent = await given(world, "k1", "k2")
    former = agent.cluster_id
    if ends == "delivered":
        assert await agent.poll() == ["k1", "k2"]
    world.store.slow = True
    world.store.fail()
    if ends == "delivered":
        await agent.heartbeat()
    else:
        purging = world.loop.create_task(world.bridge.admin_actions.purge("k1"))
    await world.settle()
    world.store.failing = lambda operations: move_is_refused and isinstance(operations[0], MoveSession)
    world.controller.manners.cluster_id = lambda payload: "c-new"
    await agent.register()
    await world.until(lambda: [each.key.ident for each in world.bridge.ctx.sessions] == ["c-new"])
    assert former != agent.cluster_id == "c-new"
    world.store.catch_up()
    await world.settle()
    world.controller.push("k3")
    await world.settle()
    assert ("k3" in await agent.poll()) is not move_is_refused, "nothing is stored before the move"
    await agent.heartbeat()
    world.store.heal()
    await agent.live(20)
    found = [(record.session.ident, record.state.value) for record, _, _ in await world.store.find("k1")]
    assert found == [("c-new", ends)]
    if ends == "dead":
        await asyncio.gather(purging, return_exceptions=True)


async def test_what_must_not_be_repeated_is_not_offered_without_a_record(make_world: MakeWorld) -> None:
    world = await make_world(commands={"at_most_once": ["once"]})
    agent = await living(world)
    world.controller.push("k1", type="once", ttl_seconds=100)
    await world.settle()
    world.store.fail()
    assert await agent.poll() == []
    world.store.heal()
    assert await agent.poll() == ["k1"]


async def test_and_expires_in_time_all_the_same(make_world: MakeWorld) -> None:
    world = await make_world(commands={"at_most_once": ["once"]})
    agent = await living(world)
    world.controller.push("k1", type="once", ttl_seconds=10)
    await world.settle()
    world.store.fail()
    world.store.slow = True
    poll = agent.poll_task()
    await world.pass_s(11)
    assert world.metric("commands_total", event="expired") == 0, "as long as its offer is being stored"
    world.store.heal()
    world.store.catch_up()
    assert (await poll).receipt is None
    await agent.live(5)
    assert await agent.poll() == []
    assert codes(world, "k1") == ["expired"]


async def test_what_a_full_disk_refused_of_sessions_is_stored_when_it_has_room(world: World) -> None:
    world.store.fail()
    agents = [await living(world, name=f"n{n}", agent_id=f"pod-{n}") for n in range(5)]
    world.controller.socket.says("tunnel_status", {"cluster_id": agents[2].cluster_id, "status": "ACTIVE"})
    await world.pass_s(10)
    world.store.heal()
    await world.pass_s(TICK_S + 1)
    await world.restart()
    assert {session.key.ident for session in world.bridge.ctx.sessions} == {agent.cluster_id for agent in agents}
    assert world.bridge.ctx.sessions.alias("default", "pod-3") is world.session(agents[3].cluster_id)
    assert world.session(agents[2].cluster_id).tunnel == {"status": "ACTIVE"}


# --- a slow disk ------------------------------------------------------------------------------------------------------


async def test_a_command_whose_session_gave_way_meanwhile_goes_to_the_successor(world: World) -> None:
    world.controller.manners.cluster_id = lambda payload: "c-1"
    await living(world, dialect="agents", agent_id="a-1")
    new = await living(world, dialect="agents", agent_id="a-2")
    await new.live(30, every_s=10)
    world.controller.push("k1", agent_id="a-1")
    world.store.slow = True
    await new.live(30, every_s=10)
    assert [session.key.ident for session in world.bridge.ctx.sessions] == ["a-2"]
    world.store.catch_up()
    await world.settle()
    assert await new.poll() == ["k1"]


async def test_a_command_follows_its_agent_through_two_sessions_that_gave_way_meanwhile(world: World) -> None:
    agent = await given(world, "k1")
    assert await agent.poll() == ["k1"]
    world.store.slow = True
    world.controller.push("k2", cluster_id="c-1")
    world.controller.push("k1", cluster_id="c-1")
    posting = world.loop.create_task(agent.result("k1"))
    await world.settle()
    for cluster_id in ("c-2", "c-3"):
        world.controller.manners.cluster_id = lambda payload, given=cluster_id: given
        await agent.register()
    assert [session.key.ident for session in world.bridge.ctx.sessions] == [agent.cluster_id] == ["c-3"]
    world.store.catch_up()
    assert await posting == Accepted()
    await world.settle()
    assert await agent.poll() == ["k2"]
    await agent.live(5)
    assert codes(world, "k2") == []
    found = [(record.session.ident, record.state.value) for record, _, _ in await world.store.find("k2")]
    assert found == [("c-3", "delivered")]


async def test_a_command_whose_session_was_deleted_meanwhile_expires(make_world: MakeWorld) -> None:
    world = await make_world(sessions={"retain_s": 60})
    await living(world)
    await world.pass_s(590)
    world.store.slow = True
    world.controller.come_back()
    world.bridge.links.get("default", "default", "").ensure_connected(world.now)
    await world.settle()
    world.controller.push("k1", cluster_id="c-1")
    await world.pass_s(20)
    assert len(world.bridge.ctx.sessions) == 0
    world.store.catch_up()
    await world.settle()
    assert [result["code"] for result in world.controller.results("k1")] == ["expired"]


async def test_what_ended_is_forgotten_after_its_time(make_world: MakeWorld) -> None:
    world = await make_world(commands={"retain_s": 100, "dedupe_s": 7200})
    await world.pass_s(1300)
    pruned = [operation for operation in world.store.log if isinstance(operation, Prune)]
    assert [world.clock.wall_s() - operation.before_unix for operation in pruned] == pytest.approx(
        [7200 + 700, 7200 + 100], abs=2
    )


# --- a damaged one ----------------------------------------------------------------------------------------------------


class Damaged(MemoryStore):
    """Opens as one that found rows which are no commands."""

    def open(self) -> StoreContents:
        key = SessionKey("default", "cluster", "c-1")
        return replace(
            super().open(),
            quarantined=3,
            quarantined_commands=((key, "k1", "r-1"), (None, "k2", ""), (key, "", "r-3")),
        )


async def test_a_row_that_is_no_command_is_answered_malformed(make_world: MakeWorld) -> None:
    world = await make_world(make_store=lambda: Damaged(asyncio.get_running_loop().call_soon))
    await world.settle()
    [result] = world.controller.got("command_result")
    assert result.request_id == "r-1"
    assert (result.payload["command_id"], result.payload["code"]) == ("k1", "malformed")
