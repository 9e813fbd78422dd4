"""Drain, purge, redeliver: by hand, durable, and never behind the controller's back."""

from __future__ import annotations

import asyncio

import pytest

from shim.bridge.admin_actions import DrainState
from shim.core.records import CommandState
from shim.errors import OperatorError
from tests.bridge.conftest import MakeWorld
from tests.support.world import Agent, World, traces


async def polling(world: World, *commands: str, **fields: str) -> Agent:
    """A registered agent for which these commands wait."""
    agent = world.agent(**fields)
    await agent.register()
    await agent.heartbeat()
    for command_id in commands:
        world.controller.push(command_id, cluster_id=agent.cluster_id)
    await world.settle()
    return agent


async def refused(world: World, status: int, *args: str, redeliver: bool = False) -> str:
    operator = world.bridge.admin_actions
    with pytest.raises(OperatorError) as caught:
        await (operator.redeliver(*args) if redeliver else operator.purge(*args))
    assert caught.value.status == status
    return str(caught.value)


# --- drain ------------------------------------------------------------------------------------------------------------


async def test_a_drain_ends_when_agents_have_their_commands_and_the_controller_its_results(world: World) -> None:
    agent = await polling(world, "k1", "k2")
    started = world.bridge.admin_actions.drain(60.0)
    assert (started.state, started.commands, started.results) == (DrainState.DRAINING, 2, 0)
    await world.pass_s(5)
    assert await agent.poll() == ["k1", "k2"]
    await agent.result("k1")
    await agent.live(40)  # the acknowledgement of a heartbeat is the fence behind which the controller has the result
    progress = world.bridge.admin_actions.progress()
    assert (progress.state, progress.commands, progress.results) == (DrainState.DRAINED, 0, 0)


async def test_new_commands_are_refused_and_known_ones_are_duplicates(world: World) -> None:
    agent = await polling(world, "k1", "k2")
    assert await agent.poll() == ["k1", "k2"]
    await agent.result("k1")
    await world.settle()
    sent_before = len(world.controller.results("k1"))

    world.bridge.admin_actions.drain(60.0)
    for command_id in ("k1", "k2", "k3"):
        world.controller.push(command_id, cluster_id=agent.cluster_id)
    await world.settle()

    (refusal,) = world.controller.results("k3")
    assert (refusal["success"], refusal["code"]) == (False, "queue_full")
    assert "drained" in refusal["error"]
    assert world.controller.results("k2") == []
    assert len(world.controller.results("k1")) >= sent_before
    assert world.metric("commands_total", event="duplicate") == 2
    assert world.bridge.admin_actions.progress().refused == 1
    assert await agent.poll() == []


async def test_a_drain_that_is_not_over_in_time_says_so_and_goes_on(world: World) -> None:
    agent = await polling(world, "k1")
    world.bridge.admin_actions.drain(10.0)
    await world.pass_s(11)
    assert world.bridge.admin_actions.progress().state is DrainState.TIMED_OUT
    world.controller.push("k2", cluster_id=agent.cluster_id)
    await world.settle()
    assert world.controller.results("k2")[0]["code"] == "queue_full"
    assert await agent.poll() == ["k1"]
    assert await agent.poll() == []
    await agent.live(40)
    assert world.bridge.admin_actions.progress().state is DrainState.DRAINED


async def test_results_that_nobody_has_yet_keep_a_drain_from_ending(world: World) -> None:
    agent = await polling(world, "k1")
    await agent.poll()
    world.controller.go_away()
    await world.pass_s(1)
    await agent.result("k1")
    world.bridge.admin_actions.drain(600.0)
    await world.pass_s(30)
    progress = world.bridge.admin_actions.progress()
    assert (progress.state, progress.results) == (DrainState.DRAINING, 1)
    world.controller.come_back()
    await agent.live(60)
    assert world.bridge.admin_actions.progress().state is DrainState.DRAINED
    assert world.controller.results("k1")[0]["success"] is True


async def test_a_cancelled_drain_takes_commands_again(world: World) -> None:
    agent = await polling(world)
    world.bridge.admin_actions.drain(60.0)
    assert world.bridge.admin_actions.resume().state is DrainState.OFF
    world.controller.push("k1", cluster_id=agent.cluster_id)
    await world.settle()
    assert await agent.poll() == ["k1"]


async def test_a_restarted_shim_is_not_drained(world: World) -> None:
    agent = await polling(world)
    world.bridge.admin_actions.drain(60.0)
    await world.restart()
    await agent.heartbeat()
    await world.settle()
    assert not world.bridge.admin_actions.draining
    world.controller.push("k1", cluster_id=agent.cluster_id)
    await world.settle()
    assert await agent.poll() == ["k1"]


async def test_a_full_disk_refuses_while_draining(world: World) -> None:
    agent = await polling(world)
    world.bridge.admin_actions.drain(60.0)
    world.store.fail()
    world.controller.push("k1", cluster_id=agent.cluster_id)
    await world.settle()
    assert world.controller.results("k1")[0]["code"] == "queue_full"
    world.store.heal()


# --- purge ------------------------------------------------------------------------------------------------------------


async def test_a_purged_command_is_dead_on_disk_and_the_controller_is_told(world: World) -> None:
    agent = await polling(world, "k1", "k2")
    record = await world.bridge.admin_actions.purge("k1", reason="a typo\nof mine")
    await world.settle()
    assert (record.state, await world.state("k1")) == (CommandState.DEAD, "dead")
    (told,) = world.controller.results("k1")
    assert (told["success"], told["code"]) == (False, "undeliverable")
    assert told["error"] == "purged by an operator: a typoof mine"
    assert "dead: purged by an operator: a typoof mine" in traces(world, "k1")
    await world.restart()
    assert await agent.poll() == ["k2"]


async def test_an_uncertain_command_can_be_purged_and_an_offered_one_not(make_world: MakeWorld) -> None:
    world = await make_world(commands={"evidence_s": 60})
    agent = await polling(world, "k1")
    assert await agent.poll() == ["k1"]
    assert "in a reply that the agent may have" in await refused(world, 409, "k1")
    agent.reconnect(clean=False)
    await world.pass_s(61)
    assert await world.state("k1") == "uncertain"
    await world.bridge.admin_actions.purge("k1")
    assert await world.state("k1") == "dead"
    assert await agent.poll() == []


async def test_what_is_not_waiting_cannot_be_purged(world: World) -> None:
    agent = await polling(world, "k1")
    await agent.poll()
    await agent.heartbeat()
    await world.settle()
    assert "it was delivered" in await refused(world, 409, "k1")
    assert "known" in await refused(world, 404, "nobody")
    assert "session" in await refused(world, 404, "k1", "another")


async def test_the_same_id_at_two_agents_needs_a_session(world: World) -> None:
    one = await polling(world, "k1")
    two = await polling(world, "k1", agent_id="pod-2", name="staging")
    text = await refused(world, 409, "k1")
    assert one.cluster_id in text
    assert two.cluster_id in text
    await world.bridge.admin_actions.purge("k1", two.cluster_id)
    assert await two.poll() == []
    assert await one.poll() == ["k1"]


async def test_a_purge_that_the_disk_refused_is_no_success(world: World) -> None:
    await polling(world, "k1")
    world.store.failing = lambda operations: any(type(each).__name__ == "MarkCommands" for each in operations)
    assert "disk" in await refused(world, 503, "k1")
    world.store.fail()
    assert "store" in await refused(world, 503, "k1")
    world.store.heal()


# --- redeliver --------------------------------------------------------------------------------------------------------


async def test_a_dead_command_is_delivered_again_also_after_a_restart(make_world: MakeWorld) -> None:
    world = await make_world(commands={"max_attempts": 1, "evidence_s": 5})
    agent = await polling(world, "k1")
    assert await agent.poll() == ["k1"]
    agent.reconnect(clean=False)
    await world.pass_s(6)
    assert await world.state("k1") == "dead"

    record = await world.bridge.admin_actions.redeliver("k1", reason="the agent was down")
    assert (record.state, record.attempts) == (CommandState.QUEUED, 0)
    assert traces(world, "k1")[-1] == "redeliver: by an operator: the agent was down; before that, it was given up"
    await world.restart()
    await agent.heartbeat()
    assert await agent.poll() == ["k1"]
    await agent.result("k1")
    await world.settle()
    assert world.controller.results("k1")[-1]["success"] is True


async def test_an_expired_command_gets_a_new_time_to_live(make_world: MakeWorld) -> None:
    world = await make_world(commands={"ttl_s": 100})
    agent = await polling(world, "k1")
    await world.pass_s(101)
    assert await world.state("k1") == "expired"
    await world.bridge.admin_actions.redeliver("k1")
    await world.pass_s(90)
    await world.restart()
    await agent.heartbeat()
    await world.settle()
    assert await world.state("k1") == "queued"
    await world.pass_s(11)
    assert await world.state("k1") == "expired"


async def test_a_held_poll_gets_a_redelivered_command_at_once(make_world: MakeWorld) -> None:
    world = await make_world(poll={"hold": 20})
    agent = await polling(world, "k1")
    assert await agent.poll() == ["k1"]
    held = agent.poll_task()
    await world.settle()
    assert await world.state("k1") == "delivered"
    await world.bridge.admin_actions.redeliver("k1")
    assert [command.id for command in agent.take(await held)] == ["k1"]


async def test_what_is_redelivered_while_its_agent_gets_another_cluster_id_goes_to_that_one(world: World) -> None:
    agent = await polling(world, "k1")
    assert await agent.poll() == ["k1"]
    await agent.heartbeat()
    await world.settle()
    assert await world.state("k1") == "delivered"
    world.store.slow = True
    asking = world.loop.create_task(world.bridge.admin_actions.redeliver("k1"))
    await world.settle()
    world.store.catch_up()  # it was looked up
    world.store.slow = True
    await world.settle()
    world.controller.manners.cluster_id = lambda payload: "c-new"
    await agent.register()
    await world.until(lambda: [each.key.ident for each in world.bridge.ctx.sessions] == ["c-new"])
    world.store.catch_up()
    await asking
    await world.settle()
    assert await agent.poll() == ["k1"]


async def test_a_late_result_of_what_is_redelivered_is_no_evidence_for_what_comes_with_it(world: World) -> None:
    agent = await polling(world)
    world.controller.push("k1", cluster_id=agent.cluster_id)
    await world.settle()
    assert await agent.poll() == ["k1"]
    await agent.heartbeat()
    await world.settle()
    await world.bridge.admin_actions.redeliver("k1")
    world.controller.push("k2", cluster_id=agent.cluster_id)
    await world.settle()
    assert await agent.poll() == ["k1", "k2"]
    agent.reconnect(clean=False)  # it has not read the reply
    await world.agent(cluster_id=agent.cluster_id).result("k1")
    await world.settle()
    assert (await world.state("k1"), await world.state("k2")) == ("answered", "offered")
    await agent.live(61)
    assert await agent.poll() == ["k2"]


async def test_what_is_redelivered_while_its_agent_is_forgotten_ends(world: World) -> None:
    agent = await polling(world, "k1")
    assert await agent.poll() == ["k1"]
    await agent.heartbeat()
    await world.settle()
    session = world.session(agent.cluster_id)
    world.store.slow = True
    asking = world.loop.create_task(world.bridge.admin_actions.redeliver("k1"))
    await world.settle()
    world.store.catch_up()
    world.store.slow = True
    await world.settle()
    forgetting = world.loop.create_task(world.bridge.session_registry.forget(session))
    await world.settle()
    world.store.catch_up()
    await asyncio.gather(asking, forgetting)
    await world.settle()
    assert await world.state("k1") == "expired"
    assert len(world.bridge.queues) == 0


async def test_what_has_a_result_or_still_waits_is_not_redelivered(world: World) -> None:
    agent = await polling(world, "k1", "k2")
    assert "it waits for its agent" in await refused(world, 409, "k1", redeliver=True)
    await agent.poll()
    await agent.result("k1")
    await world.settle()
    assert "its agent has answered it" in await refused(world, 409, "k1", redeliver=True)
    assert await refused(world, 404, "nobody", redeliver=True)


async def test_a_rejected_command_was_never_stored(world: World) -> None:
    await polling(world)
    world.controller.push("k1", cluster_id="unknown")
    await world.settle()
    assert "rejected" in await refused(world, 409, "k1", redeliver=True)


async def test_nothing_is_redelivered_while_draining_or_into_a_full_queue(make_world: MakeWorld) -> None:
    world = await make_world(commands={"max_queued": 1})
    agent = await polling(world, "k1")
    await agent.poll()
    await agent.heartbeat()
    world.controller.push("k2", cluster_id=agent.cluster_id)
    await world.settle()
    assert "full" in await refused(world, 409, "k1", redeliver=True)
    world.bridge.admin_actions.drain(60.0)
    assert "drain" in await refused(world, 409, "k1", redeliver=True)


async def test_two_at_once_queue_it_once(world: World) -> None:
    agent = await polling(world, "k1")
    await agent.poll()
    await agent.heartbeat()
    await world.settle()
    operator = world.bridge.admin_actions
    outcomes = await asyncio.gather(operator.redeliver("k1"), operator.redeliver("k1"), return_exceptions=True)
    assert sum(isinstance(outcome, OperatorError) for outcome in outcomes) == 1
    assert await agent.poll() == ["k1"]
    assert await agent.poll() == []


# --- forgetting an agent ----------------------------------------------------------------------------------------------


async def test_an_agent_that_is_gone_is_forgotten_with_what_waits_for_it(world: World) -> None:
    await polling(world, "k1", name="gone")
    other = await polling(world, name="stays", agent_id="pod-2")
    await other.live(60)
    key = await world.bridge.admin_actions.forget("gone")
    assert await world.state("k1") == "expired"
    await world.settle()
    assert [result["code"] for result in world.controller.results("k1")] == ["expired"]
    assert [session.key.ident for session in world.bridge.sessions] == [other.cluster_id]
    await world.restart()
    assert world.bridge.sessions.get(key) is None


@pytest.mark.parametrize("by", ["name", "cluster id", "agent id", "whole key"])
async def test_an_agent_is_named_as_people_know_it(world: World, by: str) -> None:
    agent = await polling(world, name="prod")
    key = world.session(agent.cluster_id).key
    await world.pass_s(100)
    names = {"name": "prod", "cluster id": agent.cluster_id, "agent id": "pod-1", "whole key": str(key)}
    assert await world.bridge.admin_actions.forget(names[by]) == key


async def test_who_still_calls_is_ambiguous_or_unknown_is_not_forgotten(world: World) -> None:
    agent = await polling(world, name="prod")
    forget = world.bridge.admin_actions.forget
    with pytest.raises(OperatorError, match="stop it first"):
        await forget("prod")
    await world.agent(agent_id="tunnel-only").tunnel_poll()
    with pytest.raises(OperatorError, match="stop it first"):
        await forget("tunnel-only")
    with pytest.raises(OperatorError, match="no agent of this name"):
        await forget("nobody")
    world.controller.manners.cluster_id = lambda payload: "c-other"
    await polling(world, name="prod", agent_id="pod-9")
    await world.pass_s(100)
    with pytest.raises(OperatorError, match="2 agents have this name"):
        await forget("prod")
    assert agent.cluster_id in {session.key.ident for session in world.bridge.sessions}


async def test_the_disk_may_refuse_to_forget(world: World) -> None:
    agent = await polling(world, name="prod")
    await world.pass_s(100)
    world.store.fail()
    with pytest.raises(OperatorError, match="back after a restart"):
        await world.bridge.admin_actions.forget(agent.cluster_id)
