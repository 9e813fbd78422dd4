"""Whose session a call means, and what becomes of sessions (docs/reference/protocol.md#16-owners-sessions-aliases)."""

from __future__ import annotations

from typing import Any

import pytest

from shim.core.agent_calls import Registered
from shim.core.records import SessionKey
from tests.bridge.conftest import MakeWorld
from tests.support.upstream import REFUSED
from tests.support.world import Agent, World

OWN = {"upstream": {"token": ""}}


async def registered(world: World, **fields: str) -> Agent:
    agent = world.agent(**fields)
    assert isinstance(await agent.register(), Registered)
    return agent


# --- owners -----------------------------------------------------------------------------------------------------------


async def test_own_tokens_see_nothing_of_each_other(make_world: MakeWorld) -> None:
    world = await make_world(**OWN)
    world.controller.manners.cluster_id = lambda payload: "c-" + payload["name"]
    mine = await registered(world, token="mine", name="mine")
    await mine.heartbeat()
    world.controller.push("k1", payload={})
    world.controller.socket.says("tunnel_status", {"status": "REQUIRED"})
    await world.settle()
    thief = world.agent(token="theirs", agent_id="pod-1", cluster_id=mine.cluster_id)
    assert await thief.poll() == []
    assert getattr(await thief.tunnel_poll(), "payload", "") is None
    assert await mine.poll() == ["k1"]
    assert getattr(await mine.tunnel_poll(), "payload", None) == {"status": "REQUIRED"}
    await thief.result("k1", output="forged")
    await world.settle()
    assert [result["code"] for result in world.controller.results("k1")] == ["unknown_command"]
    assert "answered" not in await world.state("k1")
    assert {dial.spec.token for dial in world.controller.dials} == {"mine", "theirs"}


async def test_a_command_on_one_owners_link_never_reaches_another(make_world: MakeWorld) -> None:
    world = await make_world(**OWN)
    one = await registered(world, token="one", name="one")
    two = await registered(world, token="two", name="two", agent_id="pod-2")
    for agent in (one, two):
        await agent.heartbeat()
    world.controller.push("k1", cluster_id=one.cluster_id)  # on the link of `two`
    world.controller.push("k2", agent_id="pod-1")
    await world.settle()
    assert await one.poll() == []
    assert await two.poll() == []
    assert {r["code"] for k in ("k1", "k2") for r in world.controller.results(k)} == {"unknown_agent"}


async def test_own_tokens_are_never_stored(make_world: MakeWorld) -> None:
    world = await make_world(**OWN)
    agent = await registered(world, token="very-secret")
    await agent.heartbeat()
    await world.settle()
    assert "very-secret" not in repr(world.store.log)
    await world.restart()
    assert len(world.controller.dials) == 1, "after a restart it is dialled at the agent's first call"
    await agent.heartbeat()
    await world.settle()
    assert len(world.controller.dials) == 2


async def test_the_configured_owner_survives_its_tokens_rotation(world: World) -> None:
    agent = await registered(world)
    world.token = "rotated"
    await world.restart()
    world.controller.push("k1", cluster_id=agent.cluster_id)
    await world.settle()
    assert await agent.poll() == ["k1"]
    assert world.controller.dials[-1].spec.token == "rotated"


# --- keys and aliases -------------------------------------------------------------------------------------------------


async def test_a_cluster_stays_one_session_when_its_agent_id_changes(world: World) -> None:
    await registered(world, agent_id="pod-1")
    again = await registered(world, agent_id="pod-2")
    assert len(world.bridge.ctx.sessions) == 1
    assert world.session(again.cluster_id).agent_id == "pod-2"
    for agent_id in ("pod-1", "pod-2"):
        found = world.bridge.ctx.sessions.find("default", "", agent_id)
        assert [session.key.ident for session in found] == ["c-1"]


async def test_an_agent_that_is_known_by_its_id_alone_is_found_by_alias(world: World) -> None:
    await registered(world, dialect="clusters", agent_id="b3")
    nameless = world.agent(dialect="clusters", agent_id="b3")  # sends no cluster id
    await nameless.heartbeat(status="by-alias")
    await world.settle()
    assert world.controller.got("heartbeat")[-1].payload["cluster_id"] == "c-1"
    assert len(world.bridge.ctx.sessions) == 1


async def test_aliases_and_tunnel_states_survive_a_restart(world: World) -> None:
    await registered(world, dialect="clusters", agent_id="b3")
    world.controller.socket.says("tunnel_status", {"cluster_id": "c-1", "status": "ACTIVE"})
    await world.settle()
    await world.restart()
    agent = world.agent(dialect="clusters", agent_id="b3")
    assert getattr(await agent.tunnel_poll(), "payload", None) == {"status": "ACTIVE"}
    await agent.heartbeat()
    assert len(world.bridge.ctx.sessions) == 1


async def test_an_agent_id_that_moves_between_living_sessions_is_counted(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    one = await registered(world, agent_id="pod-1", name="one")
    two = await registered(world, agent_id="pod-2", name="two")
    two.agent_id = "pod-1"
    await two.heartbeat()
    assert world.metric("alias_conflicts_total") == 1
    assert "agent_id_reassigned" in [record.getMessage() for record in caplog.records]
    assert world.bridge.ctx.sessions.alias("default", "pod-1") is world.session(two.cluster_id)
    await world.pass_s(60)
    one.agent_id = "pod-1"
    await one.heartbeat()
    assert world.metric("alias_conflicts_total") == 1, "the other one is not fresh any more"


# --- the controller's id ----------------------------------------------------------------------------------------------


async def test_an_agent_never_sees_its_cluster_id_change(world: World) -> None:
    agent = await registered(world)
    await agent.heartbeat()
    world.controller.manners.cluster_id = lambda payload: "c-new"
    world.controller.socket.lose()
    await world.pass_s(3)
    assert world.session("c-1").upstream_cluster_id == "c-new"
    assert world.controller.got("heartbeat")[-1].payload["cluster_id"] == "c-new"
    world.controller.push("k1", cluster_id="c-new")
    world.controller.push("k2", cluster_id="c-1")
    await world.settle()
    assert await agent.poll() == ["k1", "k2"]
    await agent.result("k1")
    await world.settle()
    assert world.controller.results("k1")[0]["cluster_id"] == "c-new"
    world.controller.go_away()
    await world.settle()
    restarted = world.agent(agent_id="pod-2")
    outcome = await restarted.register()
    assert isinstance(outcome, Registered)
    assert (outcome.cluster_id, outcome.cached) == ("c-1", True)


async def test_an_agent_that_registers_with_its_own_id_is_registered_under_the_controllers(world: World) -> None:
    agent = await registered(world)
    await agent.heartbeat()
    world.controller.manners.cluster_id = lambda payload: "c-new"
    world.controller.socket.lose()
    await world.pass_s(3)
    agent.extra = {"cluster_id": "c-1"}
    await agent.register()
    assert world.controller.got("register")[-1].payload["cluster_id"] == "c-new"
    stranger = world.agent(name="other", agent_id="pod-9")
    stranger.extra = {"cluster_id": "c-unknown"}
    await stranger.register()
    assert world.controller.got("register")[-1].payload["cluster_id"] == "c-unknown"


# --- succession -------------------------------------------------------------------------------------------------------


def same_cluster(payload: dict[str, Any]) -> str:
    return "c-1"


async def test_a_new_agent_of_the_cluster_supersedes_one_that_is_gone(world: World) -> None:
    world.controller.manners.cluster_id = same_cluster
    old = await registered(world, dialect="agents", agent_id="a-1")
    await old.heartbeat()
    world.controller.push("k1", agent_id="a-1")
    world.controller.push("k2", agent_id="a-1")
    world.controller.socket.says("tunnel_status", {"agent_id": "a-1", "status": "ACTIVE"})
    await world.settle()
    await old.poll_unwritten()
    new = await registered(world, dialect="agents", agent_id="a-2")
    assert await new.poll() == [], "as long as the old one is fresh"
    await new.live(50, every_s=10)
    assert [session.key.ident for session in world.bridge.ctx.sessions] == ["a-2"]
    assert await new.poll() == ["k1", "k2"]
    assert getattr(await new.tunnel_poll(), "payload", None) == {"status": "ACTIVE"}
    assert world.bridge.ctx.sessions.alias("default", "a-1") is world.session("a-2")
    await world.restart()
    assert [session.key.ident for session in world.bridge.ctx.sessions] == ["a-2"]


async def test_an_id_that_was_handed_out_and_forgotten_by_a_killed_shim_still_leads_to_its_cluster(
    world: World,
) -> None:
    old = await registered(world)
    await old.heartbeat()
    world.controller.manners.cluster_id = lambda payload: "c-new"
    world.controller.socket.lose()
    await world.until(lambda: world.session(old.cluster_id).upstream_cluster_id == "c-new")
    world.controller.push("k1", cluster_id="c-new")
    await world.settle()
    world.store.fail()
    new = await registered(world)
    assert new.cluster_id == "c-new"
    await world.crash()  # nothing of the new session is on disk
    world.start()
    world.store.heal()
    said = len(world.controller.log)
    await new.heartbeat()
    await world.pass_s(2)
    assert await new.poll() == ["k1"]
    assert [session.key.ident for session in world.bridge.ctx.sessions] == ["c-new"]
    spoken = [m.message.type for m in world.controller.log[said:] if m.message.type in ("register", "heartbeat")]
    assert spoken[0] == "register", "what the shim knows of the cluster is told first"
    assert "heartbeat" in spoken


async def test_a_succession_that_the_disk_refused_is_stored_later(world: World) -> None:
    world.controller.manners.cluster_id = same_cluster
    old = await registered(world, dialect="agents", agent_id="a-1")
    world.controller.push("k1", agent_id="a-1")
    await old.heartbeat()
    new = await registered(world, dialect="agents", agent_id="a-2")
    world.store.fail()
    await new.live(50, every_s=10)
    assert [session.key.ident for session in world.bridge.ctx.sessions] == ["a-2"]
    world.store.heal()
    await world.pass_s(3)
    await world.restart()
    assert [session.key.ident for session in world.bridge.ctx.sessions] == ["a-2"]
    assert await new.poll() == ["k1"]


async def test_what_was_offered_to_the_old_one_is_uncertain_for_the_new(make_world: MakeWorld) -> None:
    world = await make_world(commands={"at_most_once": ["once"]})
    world.controller.manners.cluster_id = same_cluster
    old = await registered(world, dialect="agents", agent_id="a-1")
    world.controller.push("k1", agent_id="a-1", type="exec")
    world.controller.push("k2", agent_id="a-1", type="once")
    await world.settle()
    assert await old.poll() == ["k1", "k2"]
    new = await registered(world, dialect="agents", agent_id="a-2")
    await new.live(50, every_s=10)
    assert await new.poll() == ["k1"]
    assert await world.state("k2") == "dead"
    await world.settle()
    assert [r["code"] for r in world.controller.results("k2")] == ["undeliverable"]


async def test_results_of_the_old_one_go_up_by_the_new_ones_way(make_world: MakeWorld) -> None:
    world = await make_world(**OWN)
    world.controller.manners.cluster_id = same_cluster
    old = await registered(world, token="old")
    await old.heartbeat()
    world.controller.manners.pongs = world.controller.manners.acks = False
    world.controller.push("k1", payload={})
    await world.settle()
    await old.poll()
    await old.result("k1")
    await world.settle()
    world.controller.sockets[0].lose()
    world.controller.manners.refuse = lambda spec: None if spec.token == "new" else REFUSED
    new = await registered(world, token="new")
    before = len(world.controller.log)
    await new.live(60)
    assert [m.payload["command_id"] for m in world.controller.got("command_result", before)] == ["k1"]


async def test_a_session_moves_to_a_new_token_only_with_the_controllers_word(make_world: MakeWorld) -> None:
    world = await make_world(**OWN)
    old = await registered(world, token="old")
    world.controller.push("k1", payload={})
    await world.settle()
    other = world.agent(token="other", cluster_id=old.cluster_id)
    await other.live(60)
    assert await other.poll() == [], "calling with its id is not enough"
    new = world.agent(token="new", agent_id="pod-9")
    world.controller.manners.cluster_id = same_cluster
    await new.register()
    await new.live(10)
    assert await new.poll() == ["k1"]


async def test_two_clusters_of_one_name_stay_apart(world: World) -> None:
    world.controller.manners.cluster_id = lambda payload: "c-" + payload["agent_id"]
    one = await registered(world, agent_id="pod-1", name="prod")
    world.controller.push("k1", cluster_id=one.cluster_id)
    two = await registered(world, agent_id="pod-2", name="prod")
    await two.live(60)
    assert await two.poll() == []
    assert await one.poll() == ["k1"]


async def test_repeating_an_older_registration_does_not_take_over_the_newer(world: World) -> None:
    world.controller.manners.cluster_id = same_cluster
    old = await registered(world, dialect="agents", agent_id="a-1")
    new = await registered(world, dialect="agents", agent_id="a-2")
    await new.heartbeat()
    await old.heartbeat()
    world.controller.socket.lose()
    await world.pass_s(3)
    await old.live(40)
    assert world.session("a-1").superseded_by == SessionKey("default", "agent", "a-2")
    assert world.session("a-2").superseded_by is None
    await registered(world, dialect="agents", agent_id="a-1")
    assert world.session("a-1").superseded_by is None, "but when it registers itself, it is the newest"


# --- retention --------------------------------------------------------------------------------------------------------


async def test_sessions_unseen_for_too_long_are_deleted_and_their_commands_expire(make_world: MakeWorld) -> None:
    world = await make_world(sessions={"retain_s": 3600})
    gone, stays = await registered(world, name="gone"), await registered(world, name="stays", agent_id="pod-2")
    world.controller.push("k1", cluster_id=gone.cluster_id)
    world.controller.push("k2", cluster_id=gone.cluster_id)
    await world.settle()
    assert await gone.poll() == ["k1", "k2"]
    await gone.result("k1")
    await stays.live(5000, every_s=30)
    assert [session.key.ident for session in world.bridge.ctx.sessions] == [stays.cluster_id]
    assert await world.state("k1") == "closed"
    assert await world.state("k2") == "delivered"
    world.controller.push("k3", cluster_id=gone.cluster_id)
    await world.settle()
    assert [r["code"] for r in world.controller.results("k3")] == ["unknown_agent"]
    await world.restart()
    assert [session.key.ident for session in world.bridge.ctx.sessions] == [stays.cluster_id]


async def test_what_still_waits_for_a_deleted_session_ends_expired(make_world: MakeWorld) -> None:
    world = await make_world(sessions={"retain_s": 3600})
    gone, stays = await registered(world, name="gone"), await registered(world, name="stays", agent_id="pod-2")
    world.controller.push("k1", cluster_id=gone.cluster_id)
    await stays.live(5000, every_s=30)
    assert await world.state("k1") == "expired"
    assert [r["code"] for r in world.controller.results("k1")] == ["expired"]
