"""The sessions of all agents: adoption, identity and quotas."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest

from shim.bridge.scheduler import TICK_S
from shim.bridge.session_persistence import STORE_WAIT_S
from shim.bridge.session_registry import MAX_UNVERIFIED_SESSIONS
from shim.core.agent_calls import (
    Accepted,
    Commands,
    Failed,
    Outcome,
    PollCall,
    RegisterCall,
    Registered,
    SessionTarget,
    TargetKind,
    TunnelInfoCall,
    TunnelPollCall,
    TunnelState,
)
from shim.core.records import SaveAlias, SaveSession, SessionKey
from shim.ports import Caller, DialFailure, DialRequest
from tests.bridge.conftest import MakeWorld
from tests.support.upstream import REFUSED
from tests.support.world import Agent, World

# --- agents that did not register here --------------------------------------------------------------------------------


NAMED = {"identity": {"name": "configured", "region": "eu"}}


def saved(world: World, **fields: str) -> Agent:
    """An agent with a saved cluster id, unknown to the shim."""
    return world.agent(cluster_id="c-saved", **fields)


async def said_not_registered(world: World, agent: Agent, text: str = "cluster not registered") -> None:
    """The agent heartbeats, and the controller does not know it."""
    world.controller.manners.acks = False
    await world.settle()
    before = len(world.controller.log)
    await agent.heartbeat()
    await world.settle()
    [beat] = world.controller.got("heartbeat", before)
    world.controller.socket.says("error", {"error": text}, beat.request_id)
    await world.settle()


async def test_heartbeats_of_a_saved_cluster_id_go_up_without_a_registration(world: World) -> None:
    assert await saved(world).heartbeat() == Accepted()
    await world.settle()
    [sent] = world.controller.log
    assert sent.message.type == "heartbeat"
    assert sent.message.payload["cluster_id"] == "c-saved"
    assert world.metric("sessions_adopted_total") == 1


async def test_so_they_do_after_a_reconnect(world: World) -> None:
    agent = saved(world)
    await agent.heartbeat()
    world.controller.socket.lose()
    await world.pass_s(3)
    assert [sent.message.type for sent in world.controller.log] == ["heartbeat", "heartbeat"]


@pytest.mark.parametrize("text", ["Cluster NOT REGISTERED", "cluster not found: c-saved"])
async def test_what_the_controller_forgot_is_registered_from_what_is_known(make_world: MakeWorld, text: str) -> None:
    world = await make_world(**NAMED)
    agent = saved(world)
    await said_not_registered(world, agent, text)
    [register] = world.controller.got("register")
    assert register.payload == {
        "agent_id": "pod-1",
        "name": "configured",
        "region": "eu",
        "cluster_id": "c-saved",
    }
    await world.settle()
    assert [sent.message.type for sent in world.controller.log] == ["heartbeat", "register", "heartbeat"]
    await world.restart()
    await agent.heartbeat()
    await world.settle()
    assert len(world.controller.got("register")) == 2, "now it has a registration, which is replayed"


async def test_without_a_name_nothing_is_sent_and_the_log_says_what_to_set(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    agent = saved(world)
    for _ in range(3):
        await said_not_registered(world, agent)
        await world.pass_s(30)
    assert not world.controller.got("register")
    warnings = [record for record in caplog.records if record.getMessage() == "name_unknown"]
    assert len(warnings) == 1
    assert "identity.name" in warnings[0].fields["hint"]  # type: ignore[attr-defined]


async def test_a_registered_cluster_that_was_forgotten_is_registered_as_it_was(world: World) -> None:
    agent = world.agent()
    await agent.register("sa-token")
    await said_not_registered(world, agent)
    first, second = world.controller.got("register")
    assert second.payload == {**first.payload, "cluster_id": "c-1"}
    assert second.payload["k8s_service_token"] == "sa-token"


async def test_without_a_request_id_all_fresh_sessions_of_the_link_are_registered(world: World) -> None:
    agents = [world.agent(name=f"n{number}", agent_id=f"pod-{number}") for number in range(3)]
    for agent in agents:
        await agent.register()
        await agent.heartbeat()
        await world.pass_s(20)
    await agents[2].heartbeat()
    before = len(world.controller.log)
    world.controller.socket.says("error", {"error": "cluster not found"})
    await world.settle()
    assert {m.payload["name"] for m in world.controller.got("register", before)} == {"n1", "n2"}


async def test_with_a_request_id_only_the_session_that_asked_is(world: World) -> None:
    agents = [world.agent(name=f"n{n}", agent_id=f"pod-{n}") for n in range(2)]
    for agent in agents:
        await agent.register()
    await agents[1].heartbeat()
    before = len(world.controller.log)
    await said_not_registered(world, agents[0])
    assert [m.payload["name"] for m in world.controller.got("register", before)] == ["n0"]


async def test_a_controller_that_keeps_forgetting_is_not_flooded(world: World) -> None:
    agent = world.agent()
    await agent.register()
    await agent.heartbeat()
    before = len(world.controller.log)
    for _ in range(30):
        world.controller.socket.says("error", {"error": "cluster not registered"})
        await world.pass_s(1)
    assert len(world.controller.got("register", before)) == 3


async def test_other_errors_are_counted_and_survived(world: World) -> None:
    await saved(world).heartbeat()
    world.controller.socket.says("error", {"error": "something else"})
    world.controller.socket.says("error", {}, "foreign")
    await world.settle()
    assert world.metric("upstream_errors_total") == 2
    assert not world.controller.got("register")


# --- dialect agents ---------------------------------------------------------------------------------------------------


async def test_an_agent_without_a_cluster_id_is_registered_before_its_first_heartbeat(world: World) -> None:
    agent = world.agent(dialect="agents", agent_id="a-1", name="prod")
    await agent.heartbeat()
    await world.settle()
    register, beat = [sent.message for sent in world.controller.log]
    assert register.payload == {"name": "prod", "agent_id": "a-1"}
    assert beat.type == "heartbeat"
    assert (beat.payload["cluster_id"], beat.payload["tunnel_status"]) == ("c-1", "disconnected")


async def test_if_that_fails_it_is_tried_again_at_a_later_call(world: World) -> None:
    world.controller.manners.registers = False
    agent = world.agent(dialect="agents", agent_id="a-1")
    await agent.heartbeat()
    await world.settle()
    socket, message = world.controller.held_registers.popleft()
    socket.says("error", {"error": "database busy"}, message.request_id)
    await world.pass_s(5)
    world.controller.manners.registers = True
    await agent.heartbeat()
    await world.settle()
    assert len(world.controller.got("register")) == 1, "not within ten seconds"
    await world.pass_s(6)
    await agent.heartbeat()
    await world.settle()
    assert [sent.message.type for sent in world.controller.log] == ["register", "register", "heartbeat"]


async def test_without_any_name_it_is_served_but_not_spoken_for(world: World) -> None:
    agent = world.agent(dialect="agents", agent_id="a-1", name="")
    assert await agent.heartbeat() == Accepted()
    assert await agent.poll() == []
    await world.pass_s(40)
    assert not world.controller.log


# --- other calls ------------------------------------------------------------------------------------------------------


async def test_a_poll_of_an_unknown_id_adopts_it_and_is_answered_empty(world: World) -> None:
    agent = saved(world)
    assert await agent.poll() == []
    world.controller.push("k1", cluster_id="c-saved")
    await world.settle()
    assert await agent.poll() == ["k1"]


async def test_a_result_of_an_unknown_id_is_taken(world: World) -> None:
    assert await saved(world).result("k-old", output="done") == Accepted()
    await world.settle()
    [result] = world.controller.results("k-old")
    assert (result["code"], result["output"], result["cluster_id"]) == ("unknown_command", "done", "c-saved")


async def test_questions_adopt_nobody(world: World) -> None:
    agent = saved(world)
    assert await agent.outcome(TunnelPollCall(SessionTarget(TargetKind.ALIAS, "pod-1"))) == TunnelState(None, 5)
    outcome = await agent.outcome(TunnelInfoCall(SessionTarget(TargetKind.CLUSTER, "c-saved")))
    assert getattr(outcome, "status", 0) == 404
    assert len(world.bridge.ctx.sessions) == 0


async def test_a_restarted_shim_serves_agents_that_will_never_register_again(world: World) -> None:
    agent = world.agent()
    await agent.register()
    await agent.heartbeat()
    await world.restart()
    before = len(world.controller.log)
    await world.pass_s(30)
    assert not world.controller.log[before:], "it is not fresh before its agent calls"
    await agent.heartbeat()
    await world.settle()
    assert [sent.message.type for sent in world.controller.log[before:]] == ["register", "heartbeat"]
    assert world.controller.got("register")[-1].payload["k8s_version"] == "v1.28.3"


# --- which session a call belongs to ----------------------------------------------------------------------------------


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
    await world.pass_s(TICK_S + 1)
    await world.restart()
    assert [session.key.ident for session in world.bridge.ctx.sessions] == ["a-2"]
    assert await new.poll() == ["k1"]


async def test_a_registration_is_answered_when_it_is_on_disk(world: World) -> None:
    world.store.slow = True
    registering = asyncio.ensure_future(world.agent().register())
    await world.until(lambda: any(isinstance(each, SaveAlias) for each in world.store.log))
    await world.settle()
    assert not registering.done()
    world.store.catch_up()
    await world.settle()
    assert isinstance(registering.result(), Registered)


@pytest.mark.parametrize("broken", ["full", "hanging"])
async def test_a_disk_that_is_full_or_hangs_delays_a_registration_by_a_second_at_most(
    world: World, broken: str
) -> None:
    if broken == "full":
        world.store.fail()
    else:
        world.store.slow = True
    began_s = world.now
    assert isinstance(await world.agent().register(), Registered)
    assert world.now - began_s < (0.5 if broken == "full" else STORE_WAIT_S + 0.5)


async def test_the_wait_for_the_disk_ends_at_the_registrations_deadline(make_world: MakeWorld) -> None:
    world = await make_world(register={"deadline_s": 3})
    agent = await registered(world)
    world.controller.manners.registers = False  # so the answer comes from the store, at the deadline
    world.store.slow = True
    began_s = world.now
    assert isinstance(await agent.register(), Registered)
    assert world.now - began_s == pytest.approx(3, abs=0.1)


async def test_an_agent_that_hangs_up_while_its_registration_goes_to_disk_is_registered(world: World) -> None:
    agent = world.agent()
    world.store.slow = True
    registering = asyncio.ensure_future(agent.register())
    await world.until(lambda: any(isinstance(each, SaveAlias) for each in world.store.log))
    registering.cancel()
    await world.settle()
    world.store.catch_up()
    await world.restart()
    assert [session.registered_name for session in world.bridge.ctx.sessions] == [agent.name]


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
    world.controller.manners.pongs = world.controller.manners.acks = True
    new = await registered(world, token="new")
    before = len(world.controller.log)
    await new.live(60)
    assert len(world.controller.sockets) == 2, "the new one's link stays open: no reconnect sends the results"
    assert [m.payload["command_id"] for m in world.controller.got("command_result", before)] == ["k1"]
    await new.live(60)
    assert await world.state("k1") == "closed"


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


@pytest.mark.parametrize("restarted", [False, True])
async def test_what_waits_for_an_agent_that_lost_its_id_and_got_another_follows_it(
    world: World, restarted: bool
) -> None:
    old = await registered(world, agent_id="pod-1", name="prod")
    await old.heartbeat()
    world.controller.push("k1", cluster_id=old.cluster_id)
    await world.settle()
    if restarted:
        await world.restart()  # the old session is not fresh any more, so that nothing repeats its registration
    world.controller.manners.cluster_id = lambda payload: "c-new"
    new = await registered(world, agent_id="pod-1", name="prod")
    assert new.cluster_id == "c-new"
    world.controller.push("k2", cluster_id="c-new")
    await world.settle()
    assert await new.poll() == ["k1", "k2"]
    await world.restart()
    assert [session.key.ident for session in world.bridge.ctx.sessions] == ["c-new"]


async def gets_another_id(world: World) -> None:
    """A command waits for an agent that will get another cluster id when it registers again."""
    old = await registered(world, agent_id="pod-1", name="prod")
    world.controller.push("k1", cluster_id=old.cluster_id)
    await world.settle()
    await world.restart()
    world.controller.manners.cluster_id = lambda payload: "c-new"


@pytest.mark.parametrize("commits", range(8))
async def test_a_kill_between_two_commits_of_its_registration_leaves_nothing_behind(world: World, commits: int) -> None:
    await gets_another_id(world)
    left = iter(range(commits))
    world.store.failing = lambda operations: next(left, None) is None  # what comes later is not on disk
    await registered(world, agent_id="pod-1", name="prod")
    await world.crash()
    world.start()
    await world.settle()
    again = await registered(world, agent_id="pod-1", name="prod")
    await again.heartbeat()
    assert await again.poll() == ["k1"]


@pytest.mark.parametrize("commits", range(8))
async def test_so_does_a_kill_while_writes_that_were_refused_are_retried(world: World, commits: int) -> None:
    await gets_another_id(world)
    world.store.fail()
    await registered(world, agent_id="pod-1", name="prod")
    left = iter(range(commits))
    world.store.failing = lambda operations: next(left, None) is None
    await world.pass_s(2 * TICK_S)
    await world.crash()
    world.start()
    await world.settle()
    again = await registered(world, agent_id="pod-1", name="prod")
    await again.heartbeat()
    assert await again.poll() == ["k1"]


async def test_it_follows_at_once_where_a_repeated_registration_has_told_of_the_new_id_before(world: World) -> None:
    old = await registered(world, agent_id="pod-1", name="prod")
    await old.heartbeat()
    world.controller.manners.cluster_id = lambda payload: "c-new"
    world.controller.socket.lose()
    await world.until(lambda: world.session(old.cluster_id).upstream_cluster_id == "c-new")
    world.controller.push("k1", cluster_id="c-new")
    await world.settle()
    new = await registered(world, agent_id="pod-1", name="prod")
    world.controller.push("k2", cluster_id="c-new")
    await world.settle()
    assert await new.poll() == ["k1", "k2"]


async def test_it_follows_an_agent_that_got_its_new_id_by_http(world: World) -> None:
    agent = await registered(world, agent_id="pod-1", name="prod")
    world.controller.push("k1", cluster_id=agent.cluster_id)
    await world.settle()
    await world.restart()
    call = RegisterCall("clusters_agent", "pod-1", "prod", {"agent_id": "pod-1", "name": "prod"}, "", False)
    await world.bridge.http_fallback.registered(Caller(agent.token, agent.connection), call, {"cluster_id": "c-new"})
    agent.cluster_id = "c-new"
    await agent.live(10)
    assert await agent.poll() == ["k1"]


@pytest.mark.parametrize("restarts", [False, True])
async def test_what_waits_follows_a_successor_that_was_itself_superseded(world: World, restarts: bool) -> None:
    """The old pod still counts as alive when its successor's cluster gets another id."""
    world.controller.manners.cluster_id = same_cluster
    old = await registered(world, dialect="agents", agent_id="a-1")
    await old.heartbeat()
    world.controller.push("k1", agent_id="a-1")
    agent = await registered(world)
    assert agent.cluster_id == "c-1"
    world.controller.manners.cluster_id = lambda payload: "c-2"
    await agent.register()
    assert [session.key.ident for session in world.bridge.ctx.sessions] == ["a-1", "c-2"]
    if restarts:
        await world.crash()
        world.start()
    await agent.live(50, every_s=10)
    assert await agent.poll() == ["k1"]
    assert [session.key.ident for session in world.bridge.ctx.sessions] == ["c-2"]


async def test_a_session_whose_new_id_the_disk_refused_is_stored_with_its_successor(world: World) -> None:
    """A controller without its database, a full disk, a new pod and a kill, all within a moment."""
    old = await registered(world, dialect="agents", agent_id="a-1")
    world.controller.push("k1", agent_id="a-1")
    await world.settle()
    key = world.session("a-1").key
    world.controller.manners.cluster_id = lambda payload: "c-2"
    world.store.failing = lambda operations: (
        {each.record.key for each in operations if isinstance(each, SaveSession)} == {key}
    )
    await old.register()
    new = await registered(world, dialect="agents", agent_id="a-2")
    await world.crash()
    world.store.heal()
    world.start()
    await new.live(50, every_s=10)
    assert await new.poll() == ["k1"]


async def test_two_sessions_that_supersede_each_other_on_disk_become_one(world: World) -> None:
    """The disk refused one write of the later supersession and took the other; then the shim was killed."""
    world.controller.manners.cluster_id = same_cluster
    agents = [await registered(world, dialect="agents", agent_id=agent_id) for agent_id in ("a-1", "a-2")]
    first, second = (world.session(agent.agent_id) for agent in agents)
    world.controller.push("k1", agent_id="a-1")
    world.controller.push("k2", agent_id="a-2")
    await world.settle()
    for session, other in ((first, second), (second, first)):
        session.superseded_by = other.key
        world.store.submit(SaveSession(session.record()))
    await world.crash()
    world.start()
    await world.pass_s(TICK_S + 1)
    [left] = world.bridge.ctx.sessions
    [agent] = [agent for agent in agents if agent.agent_id == left.key.ident]
    assert sorted(await agent.poll()) == ["k1", "k2"]


async def test_of_sessions_that_follow_each_other_only_the_last_is_left_on_disk(world: World) -> None:
    """All moved at once: one that had moved was stored anew with the next, and came back after a restart."""
    agents = [
        await registered(world, dialect="agents", agent_id=f"a-{number}", name=f"n{number}") for number in range(7)
    ]
    sessions = [world.session(agent.agent_id) for agent in agents]
    for session, successor in pairwise(sessions):
        session.superseded_by = successor.key
        world.store.submit(SaveSession(session.record()))
    await world.crash()
    world.start()
    await world.pass_s(TICK_S + 1)
    await world.crash()
    assert [record.key.ident for record in world.store.open().sessions] == ["a-6"]


async def test_two_clusters_whose_agents_have_one_id_stay_apart(world: World) -> None:
    world.controller.manners.cluster_id = lambda payload: "c-" + payload["name"]
    one = await registered(world, agent_id="node-1", name="prod")
    world.controller.push("k1", cluster_id=one.cluster_id)
    two = await registered(world, agent_id="node-1", name="staging")
    await two.live(60)
    assert await two.poll() == []
    assert await one.poll() == ["k1"]


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


# --- how many sessions an owner may have ------------------------------------------------------------------------------


OWN: dict[str, Any] = {"upstream": {"token": ""}}


def refuse(world: World, *tokens: str) -> None:
    """The controller refuses these tokens."""

    def judge(spec: DialRequest) -> DialFailure | None:
        return REFUSED if spec.token in tokens else None

    world.controller.manners.refuse = judge


def status(outcome: Outcome) -> int:
    return outcome.status if isinstance(outcome, Failed) else 200


def stored(world: World) -> list[Any]:
    return [operation for operation in world.store.log if isinstance(operation, (SaveSession, SaveAlias))]


def sessions(world: World) -> list[str]:
    return sorted(session.key.ident for session in world.bridge.ctx.sessions)


async def beat(agent: Agent) -> int:
    return status(await agent.heartbeat())


async def polled(agent: Agent) -> Outcome:
    return await agent.outcome(PollCall(agent.dialect, agent.target))


# --- how many -----------------------------------------------------------------------------------------------------


async def test_an_owner_has_so_many_agents_and_the_next_is_refused(make_world: MakeWorld) -> None:
    world = await make_world(sessions={"max_per_owner": 3})
    agents = [world.agent(cluster_id=f"c-{n}", agent_id=f"pod-{n}") for n in range(5)]
    assert [await beat(agent) for agent in agents] == [200, 200, 200, 503, 503]
    outcome = await agents[3].heartbeat()
    assert isinstance(outcome, Failed)
    assert outcome.error == "too many agents: see sessions.max_per_owner"
    assert outcome.retry_after_s
    assert sessions(world) == ["c-0", "c-1", "c-2"]
    assert await beat(agents[0]) == 200, "those that are known are served"
    assert world.metric("sessions_refused_total") == 3


async def test_an_agent_beyond_the_bound_is_not_registered_upstream_either(make_world: MakeWorld) -> None:
    world = await make_world(sessions={"max_per_owner": 1})
    first, second = world.agent(name="one"), world.agent(name="two", agent_id="pod-2")
    assert status(await first.register()) == 200
    assert status(await second.register()) == 503
    assert status(await first.register()) == 200
    assert {message.payload["name"] for message in world.controller.got("register")} == {"one"}


async def test_polls_and_results_of_unknown_agents_count_too(make_world: MakeWorld) -> None:
    world = await make_world(sessions={"max_per_owner": 1})
    assert await beat(world.agent(cluster_id="c-1")) == 200
    other = world.agent(cluster_id="c-2")
    assert status(await polled(other)) == 503
    assert status(await other.result("k-1")) == 503


# --- agents' own tokens -------------------------------------------------------------------------------------------


async def test_a_refused_token_gets_401_and_nothing_of_it_is_kept(make_world: MakeWorld) -> None:
    world = await make_world(**OWN)
    refuse(world, "bad")
    stranger = world.agent(cluster_id="c-9", token="bad")
    assert await beat(stranger) == 200, "what the controller thinks of it is not known yet"
    await world.settle()
    assert await beat(stranger) == 401
    assert status(await polled(stranger)) == 401
    assert status(await stranger.result("k-1")) == 401
    assert status(await stranger.register()) == 401
    assert stored(world) == []
    await world.pass_s(120)
    assert (len(world.bridge.links), sessions(world)) == (0, [])
    assert stored(world) == []


async def test_a_token_that_was_never_judged_has_few_agents_and_no_results_on_disk(make_world: MakeWorld) -> None:
    world = await make_world(**OWN)
    world.controller.manners.dial = DialFailure("tcp")
    agents = [world.agent(cluster_id=f"c-{n}", token="new") for n in range(MAX_UNVERIFIED_SESSIONS + 1)]
    assert [await beat(agent) for agent in agents] == [200] * MAX_UNVERIFIED_SESSIONS + [503]
    assert status(await agents[0].result("k-1")) == 503
    assert stored(world) == []
    world.controller.come_back()
    await world.until(lambda: len(world.controller.sockets) == 1)
    await world.settle()
    kept = {each.record.key.ident for each in stored(world) if isinstance(each, SaveSession)}
    assert kept == {f"c-{n}" for n in range(MAX_UNVERIFIED_SESSIONS)}
    assert await beat(agents[-1]) == 200
    assert status(await agents[0].result("k-1")) == 200
    await world.restart()
    assert len(sessions(world)) == MAX_UNVERIFIED_SESSIONS + 1


async def test_a_known_agent_is_served_after_a_restart_although_its_token_is_refused_now(make_world: MakeWorld) -> None:
    world = await make_world(**OWN)
    agent = world.agent(token="mine")
    await agent.register()
    await agent.heartbeat()
    world.controller.push("k-1", cluster_id=agent.cluster_id)
    await world.settle()
    await world.restart()
    refuse(world, "mine")
    await beat(agent)
    await world.settle()
    assert await beat(agent) == 401
    assert await agent.poll() == ["k-1"]
    assert status(await agent.result("k-1")) == 200
    await world.pass_s(120)
    assert sessions(world) == [agent.cluster_id], "only what was adopted on an unproven token is forgotten"


@pytest.mark.parametrize("good", ["good", ""])
async def test_no_token_sees_another_tokens_agents(make_world: MakeWorld, good: str) -> None:
    world = await make_world(**OWN)
    mine, theirs = world.agent(token="mine"), world.agent(cluster_id="c-1", token=good)
    await mine.register()
    world.controller.push("k-1", cluster_id=mine.cluster_id)
    await world.settle()
    theirs.cluster_id = mine.cluster_id
    answer = await polled(theirs)
    assert answer == Commands((), 5) if good else status(answer) == 401
    assert isinstance(await mine.heartbeat(), Accepted)
