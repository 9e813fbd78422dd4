"""Heartbeats and status reports go up for living agents, and never for dead ones.

Rules: docs/reference/protocol.md#12-heartbeat-status-results-the-short-answers, #21-link-life.
"""

from __future__ import annotations

import pytest

from shim.core.agent_calls import Accepted, Failed
from tests.bridge.conftest import MakeWorld
from tests.support.upstream import GONE, REFUSED
from tests.support.world import Agent, World


async def registered(world: World, **fields: str) -> Agent:
    agent = world.agent(**fields)
    await agent.register()
    return agent


# --- what goes up -----------------------------------------------------------------------------------------------------


async def test_five_second_heartbeats_are_coalesced(world: World) -> None:
    agent = await registered(world)
    start = world.now
    await agent.live(120)
    sent = [at - start for at in world.controller.times("heartbeat")]
    assert sent == pytest.approx([0, 30, 60, 90])


async def test_thirty_second_heartbeats_all_go_up(world: World) -> None:
    agent = await registered(world)
    await agent.live(120, every_s=30)
    assert len(world.controller.got("heartbeat")) == 4


async def test_a_heartbeat_says_what_the_agent_says(world: World) -> None:
    agent = await registered(world)
    await agent.heartbeat(metadata={"k8s_nodes": 3})
    await world.settle()
    [sent] = world.controller.got("heartbeat")
    assert sent.payload == {
        "cluster_id": "c-1",
        "agent_id": "pod-1",
        "status": "healthy",
        "tunnel_status": "connected",
        "metadata": {"k8s_nodes": 3},
    }
    assert sent.request_id


@pytest.mark.parametrize("words", [{"status": "degraded"}, {"tunnel_status": "disconnected"}])
async def test_a_change_of_status_goes_up_at_once(world: World, words: dict[str, str]) -> None:
    agent = await registered(world)
    await agent.heartbeat()
    await world.pass_s(5)
    await agent.heartbeat(**words)
    await world.settle()
    assert len(world.controller.got("heartbeat")) == 2
    await world.pass_s(5)
    await agent.heartbeat(**words)
    await world.settle()
    assert len(world.controller.got("heartbeat")) == 2


async def test_a_registration_alone_is_no_heartbeat(world: World) -> None:
    await registered(world)
    await world.pass_s(60)
    assert not world.controller.got("heartbeat")


async def test_an_agent_that_only_polls_lives_too(world: World) -> None:
    agent = await registered(world)
    for _ in range(5):
        await agent.poll()
        await world.pass_s(15)
    beats = world.controller.got("heartbeat")
    assert len(beats) >= 2
    assert "status" not in beats[0].payload


async def test_nothing_is_said_for_an_agent_that_does_not_call(world: World) -> None:
    agent = await registered(world)
    await agent.live(60)
    world.controller.log.clear()
    await world.pass_s(300)
    assert not world.controller.got("heartbeat")


# --- while the link is away -------------------------------------------------------------------------------------------


async def test_heartbeats_are_accepted_while_the_link_is_down(world: World) -> None:
    agent = await registered(world)
    world.controller.go_away()
    await world.pass_s(10)
    assert await agent.heartbeat() == Accepted()


async def test_or_refused_where_that_is_wanted(make_world: MakeWorld) -> None:
    world = await make_world(heartbeat={"when_link_down": "fail"})
    agent = await registered(world)
    assert await agent.heartbeat() == Accepted()
    world.controller.go_away()
    for _ in range(40):
        await world.pass_s(0.25)
        outcome = await agent.heartbeat()
        assert isinstance(outcome, Failed), "also while a dial is under way"
        assert (outcome.status, outcome.retry_after_s) == (503, 5)
    world.controller.come_back()
    await world.pass_s(10)
    assert await agent.heartbeat() == Accepted()


async def test_what_the_controller_said_when_it_closed_is_not_told_to_agents(make_world: MakeWorld) -> None:
    world = await make_world(heartbeat={"when_link_down": "fail"})
    agent = await registered(world)
    world.controller.manners.dial = GONE
    world.controller.socket.lose(by_close_frame=True, code=1011, reason="another agent's secret hunter2")
    await world.settle()
    (link,) = world.bridge.links
    assert "hunter2" in link.last_detail, "the status has it"
    outcome = await agent.heartbeat()
    assert isinstance(outcome, Failed)
    assert outcome.error == "the controller cannot be reached"


async def test_the_first_dial_is_no_failure_yet(make_world: MakeWorld) -> None:
    world = await make_world(upstream={"token": ""}, heartbeat={"when_link_down": "fail"})
    assert await world.agent(cluster_id="c-1", token="own").heartbeat() == Accepted()


async def test_a_refused_token_shows_in_heartbeats_while_polls_drain_and_results_are_stored(world: World) -> None:
    agent = await registered(world)
    await agent.heartbeat()
    world.controller.push("k1", payload={})
    await world.settle()
    world.controller.go_away(REFUSED)
    await world.pass_s(10)
    outcome = await agent.heartbeat()
    assert isinstance(outcome, Failed)
    assert outcome.status == 401
    assert await agent.poll() == ["k1"]
    assert await agent.result("k1") == Accepted()
    world.controller.come_back()
    await world.pass_s(60)
    assert await agent.heartbeat() == Accepted()
    await world.settle()
    assert world.controller.results("k1")[0]["success"] is True


async def test_a_refusal_counts_until_the_token_is_accepted(world: World) -> None:
    agent = await registered(world)
    world.controller.go_away(REFUSED)
    await world.pass_s(10)
    world.controller.manners.dial = GONE
    await world.pass_s(60)
    outcome = await agent.heartbeat()
    assert isinstance(outcome, Failed)
    assert outcome.status == 401


# --- after a reconnect ------------------------------------------------------------------------------------------------


async def test_registrations_are_replayed_first_then_the_newest_heartbeat_of_each(world: World) -> None:
    agents = [await registered(world, name=f"n{n}", agent_id=f"pod-{n}") for n in range(3)]
    for agent in agents:
        await agent.heartbeat()
    await world.settle()
    before = len(world.controller.log)
    world.controller.socket.lose()
    await world.settle()
    for agent in agents:
        await agent.heartbeat(status="newest")
    await world.pass_s(5)
    kinds = [sent.message.type for sent in world.controller.log[before:]]
    assert kinds == ["register"] * 3 + ["heartbeat"] * 3
    assert {m.payload["status"] for m in world.controller.got("heartbeat", before)} == {"newest"}
    assert {m.payload["cluster_id"] for m in world.controller.got("register", before)} == {"c-1", "c-2", "c-3"}


async def test_a_session_that_is_not_fresh_is_not_replayed_until_its_agent_calls(world: World) -> None:
    agent = await registered(world)
    await agent.heartbeat()
    world.controller.go_away()
    await world.pass_s(60)
    world.controller.come_back()
    await world.pass_s(10)
    assert len(world.controller.got("register")) == 1
    await agent.heartbeat()
    await world.settle()
    kinds = [sent.message.type for sent in world.controller.log][-2:]
    assert kinds == ["register", "heartbeat"]


async def test_many_sessions_are_replayed_a_window_at_a_time(world: World) -> None:
    agents = [await registered(world, name=f"n{n}", agent_id=f"pod-{n}") for n in range(70)]
    for agent in agents:
        await agent.heartbeat()
    world.controller.manners.registers = False
    world.controller.socket.lose()
    await world.pass_s(3)
    assert len(world.controller.held_registers) == 32
    world.controller.answer_register()
    await world.settle()
    assert len(world.controller.held_registers) == 32
    assert len(world.controller.got("register")) == 70 + 33


async def test_a_replay_that_is_not_answered_holds_up_nobody(world: World) -> None:
    agent = await registered(world)
    await agent.heartbeat()
    world.controller.manners.registers = False
    world.controller.socket.lose()
    await world.pass_s(1)
    reconnected = len(world.controller.log)
    await agent.live(20)
    assert world.controller.got("heartbeat", reconnected), "ten seconds later it counts as told"


async def test_a_session_whose_replay_failed_goes_on(world: World) -> None:
    agent = await registered(world)
    await agent.heartbeat()
    world.controller.manners.registers = False
    world.controller.socket.lose()
    await world.pass_s(2)
    socket, message = world.controller.held_registers[-1]
    before = len(world.controller.log)
    socket.says("error", {"error": "database busy"}, message.request_id)
    await world.settle()
    assert len(world.controller.got("heartbeat", before)) == 1


# --- status reports ---------------------------------------------------------------------------------------------------


async def old_agent(world: World) -> Agent:
    agent = await registered(world, dialect="agents", agent_id="a-1")
    await agent.heartbeat()
    await world.settle()
    return agent


async def test_status_reports_are_coalesced_to_one_in_thirty_seconds(world: World) -> None:
    agent = await old_agent(world)
    for number in range(8):
        assert await agent.status(pods=number) == Accepted()
        await world.pass_s(9)
    await world.pass_s(30)
    assert [m.payload["pods"] for m in world.controller.got("status")] == [0, 3, 6, 7]


async def test_a_report_that_comes_before_an_adopted_agents_registration_follows_it(world: World) -> None:
    agent = world.agent(dialect="agents", agent_id="a-1", name="prod")
    await agent.heartbeat()
    await agent.status(pods=1)
    await agent.status(pods=2)
    assert not world.controller.got("status"), "the controller does not know the agent yet"
    await world.settle()
    assert [sent.message.type for sent in world.controller.log] == ["register", "heartbeat", "status"]
    assert [m.payload["pods"] for m in world.controller.got("status")] == [2]
    assert world.metric("status_dropped_total") == 0


async def test_a_report_of_an_agent_that_cannot_be_registered_is_counted_and_not_kept(world: World) -> None:
    agent = world.agent(dialect="agents", agent_id="a-1", name="")
    await agent.heartbeat()
    await agent.status(pods=1)
    await world.settle()
    assert not world.controller.got("status")
    assert world.metric("status_dropped_total") == 1


async def test_a_report_that_is_too_long_or_unwanted_is_counted(make_world: MakeWorld) -> None:
    world = await make_world(upstream={"max_send_bytes": 65_536})
    agent = await old_agent(world)
    await agent.status(pods="x" * 65_500)
    assert not world.controller.got("status")
    assert world.metric("status_dropped_total") == 1
    await agent.status(pods="x" * 64_000)
    await world.settle()
    assert len(world.controller.got("status")) == 1


async def test_status_reports_can_be_turned_off(make_world: MakeWorld) -> None:
    world = await make_world(upstream={"send_status": False})
    await (await old_agent(world)).status(pods=1)
    await world.pass_s(60)
    assert not world.controller.got("status")


async def test_no_report_for_an_agent_that_is_gone_or_a_link_that_is_down(world: World) -> None:
    agent = await old_agent(world)
    await agent.status(pods=1)
    await agent.status(pods=2)
    world.controller.go_away()
    await world.pass_s(60)
    assert [m.payload["pods"] for m in world.controller.got("status")] == [1]
    assert world.metric("status_dropped_total") == 1
