"""Agents that never register again are served all the same (docs/reference/protocol.md#14-adoption)."""

from __future__ import annotations

import pytest

from shim.core.agent_calls import Accepted, SessionTarget, TargetKind, TunnelInfoCall, TunnelPollCall, TunnelState
from tests.bridge.conftest import MakeWorld
from tests.support.world import Agent, World

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
