"""The life of a command through the bridge (docs/reference/protocol.md#13-poll, #3-commands)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from shim.bridge.delivery import MAX_HAND_OVER_SAMPLES
from shim.bridge.outbox import DRAINED
from shim.core.agent_calls import Accepted, Commands, PollCall
from shim.core.command_queue import Batch, unknown_open
from shim.core.records import CommandState, SessionKey, TraceEntry
from shim.ports import CallResult
from shim.protocol.rfc3339 import rfc3339
from tests.bridge.conftest import MakeWorld, codes, given, living, offered
from tests.support.world import Agent, World, traces

# --- the normal life --------------------------------------------------------------------------------------------------


async def test_from_the_controller_to_the_agent_and_back(world: World) -> None:
    agent = await living(world)
    world.controller.push("k1", type="scale", payload={"replicas": 3}, created_at="2026-11-24T21:00:00Z")
    await world.settle()
    [command] = await agent.poll_commands()
    assert (command.id, command.type, command.payload) == ("k1", "scale", {"replicas": 3})
    assert command.created_at == "2026-11-24T21:00:00Z"
    assert await agent.result("k1", output="done", metadata={"took": 1}) == Accepted()
    await agent.live(40)
    [result] = world.controller.got("command_result")
    assert result.request_id == "r-k1"
    assert result.payload == {
        "command_id": "k1",
        "cluster_id": "c-1",
        "agent_id": "pod-1",
        "success": True,
        "output": "done",
        "metadata": {"took": 1},
        "timestamp": result.payload["timestamp"],
    }
    assert await world.trace("k1") == ["arrived", "offered", "delivered", "result", "closed"]
    assert await world.state("k1") == "closed"
    [(record, _, _)] = await world.store.find("k1")
    assert record.via == "", "not by HTTP"


async def test_first_come_first_served_and_within_the_bounds_of_a_reply(make_world: MakeWorld) -> None:
    world = await make_world(poll={"max_batch": 3})
    agent = await given(world, *(f"k{n}" for n in range(7)))
    polls = [await agent.poll() for _ in range(4)]
    assert polls == [["k0", "k1", "k2"], ["k3", "k4", "k5"], ["k6"], []]


async def test_a_reply_holds_no_more_bytes_than_allowed_but_at_least_one(make_world: MakeWorld) -> None:
    world = await make_world(poll={"max_bytes": 4096})
    agent = await living(world)
    for number, size in enumerate((1000, 1000, 1000, 1000, 9000, 10)):
        world.controller.push(f"k{number}", payload={"data": "x" * size})
    await world.settle()
    polls = [await agent.poll() for _ in range(3)]
    assert polls == [["k0", "k1", "k2"], ["k3"], ["k4"]]


async def test_acks_go_up_only_when_the_command_is_on_disk(make_world: MakeWorld) -> None:
    world = await make_world(upstream={"send_command_ack": True})
    await living(world)
    world.store.slow = True
    world.controller.push("k1")
    await world.settle()
    assert not world.controller.got("command_ack")
    world.store.catch_up()
    await world.settle()
    [ack] = world.controller.got("command_ack")
    assert (ack.payload, ack.request_id) == ({"command_id": "k1"}, "r-k1")
    world.controller.push("k1")
    await world.settle()
    assert len(world.controller.got("command_ack")) == 2, "a duplicate is safe as well"


async def test_agents_that_never_post_results_leave_commands_delivered(make_world: MakeWorld) -> None:
    world = await make_world(commands={"retain_s": 3600, "dedupe_s": 3600})
    agent = await given(world, "k1")
    await agent.poll()
    await agent.live(1000, every_s=30)
    assert await world.state("k1") == "delivered"
    await agent.live(5000, every_s=30)
    assert await world.state("k1") == ""
    world.controller.push("k1")
    await world.settle()
    assert await agent.poll() == ["k1"], "after dedupe_s it is another command"


async def test_other_message_types_may_be_commands(make_world: MakeWorld) -> None:
    world = await make_world(commands={"types": ["command", "task"]})
    agent = await living(world)
    world.controller.socket.says("task", {"id": "k1"})
    await world.settle()
    assert await agent.poll() == ["k1"]


async def test_the_next_request_on_the_same_connection_is_evidence(world: World) -> None:
    agent = await offered(world)
    await agent.heartbeat()
    await world.settle()
    assert await world.state("k1") == "delivered"
    assert "delivered: next request" in traces(world, "k1")


async def test_a_heartbeat_on_another_connection_is_none(world: World) -> None:
    await offered(world)
    other = world.agent(cluster_id="c-1")
    await other.heartbeat()
    await world.settle()
    assert await world.state("k1") == "offered"


@pytest.mark.parametrize("clean, state", [(True, "delivered"), (False, "offered")])
async def test_a_later_poll_is_evidence_if_the_connection_ended_cleanly(world: World, clean: bool, state: str) -> None:
    agent = await offered(world)
    agent.reconnect(clean=clean)
    assert await agent.poll() == []
    await world.settle()
    assert await world.state("k1") == state


async def test_a_later_poll_is_evidence_while_the_connection_is_open(world: World) -> None:
    await offered(world)
    other = world.agent(cluster_id="c-1")
    assert await other.poll() == []
    await world.settle()
    assert await world.state("k1") == "offered"  # it may have been sent before that reply was read
    await world.pass_s(0.05)
    assert await other.poll() == []
    await world.settle()
    assert await world.state("k1") == "delivered"
    assert traces(world, "k1")[-1] == "delivered: poll"


async def test_a_poll_that_overlaps_is_no_evidence(world: World) -> None:
    agent = await living(world)
    start = world.now
    world.controller.push("k1")
    await world.settle()
    await world.pass_s(1)
    assert await agent.poll() == ["k1"]
    other = world.agent(cluster_id="c-1")
    answer = await other.call(PollCall("clusters_agent", other.target), arrived_s=start)
    assert answer.receipt is None
    await world.settle()
    assert await world.state("k1") == "offered"


async def test_a_result_is_evidence_for_the_whole_reply(world: World) -> None:
    agent = await given(world, "k1", "k2")
    assert await agent.poll() == ["k1", "k2"]
    agent.reconnect(clean=False)
    await agent.result("k1")
    await world.settle()
    assert await world.state("k2") == "delivered"
    assert "delivered: result" in traces(world, "k2")


async def test_without_evidence_nothing_newer_is_offered(world: World) -> None:
    agent = await offered(world)
    agent.reconnect(clean=False)
    world.controller.push("k2")
    await world.settle()
    assert await agent.poll() == []
    await world.pass_s(61)
    assert await agent.poll() == ["k1", "k2"]


# --- replies that do not arrive ---------------------------------------------------------------------------------------


async def test_an_unwritten_reply_is_queued_again_at_once_and_was_no_attempt(world: World) -> None:
    agent = await given(world, "k1", "k2")
    for _ in range(20):
        assert [command.id for command in await agent.poll_unwritten()] == ["k1", "k2"]
        await world.settle()
        assert await world.state("k1") == "queued"
    [(record, _, _)] = await world.store.find("k1")
    assert record.attempts == 0
    assert await agent.poll() == ["k1", "k2"]
    assert traces(world, "k1")[-2:] == ["requeued: not written", "offered: attempt 1"]
    await world.settle()
    [(record, _, _)] = await world.store.find("k1")
    assert record.attempts == 1, "a restart would count the attempts of the record"


async def test_an_agent_that_hangs_up_while_the_offer_goes_to_disk_swallows_nothing(world: World) -> None:
    agent = await given(world, "k1")
    world.store.slow = True
    poll = agent.poll_task()
    await world.settle()
    poll.cancel()
    await world.settle()
    world.store.catch_up()
    await world.settle()
    assert await world.state("k1") == "queued"
    assert await agent.poll() == ["k1"]


async def test_the_cancellation_may_meet_the_answer(world: World) -> None:
    agent = await given(world, "k1")
    world.store.slow = True
    poll = agent.poll_task()
    await world.settle()
    world.store.catch_up()  # the answer is ready, its task has not run yet
    poll.cancel()
    with pytest.raises(asyncio.CancelledError):
        await poll
    await world.settle()
    assert await world.state("k1") == "queued"


async def test_an_agent_that_hangs_up_on_a_held_poll_swallows_nothing(make_world: MakeWorld) -> None:
    world = await make_world(poll={"hold": 20})
    agent = await living(world)
    poll = agent.poll_task()
    await world.pass_s(3)
    poll.cancel()
    world.controller.push("k1")
    await world.settle()
    assert await agent.poll() == ["k1"]


async def test_a_held_poll_gets_the_command_at_once(make_world: MakeWorld) -> None:
    world = await make_world(poll={"hold": 20})
    agent = await living(world)
    poll = agent.poll_task()
    await world.pass_s(7)
    world.controller.push("k1")
    await world.settle()
    assert [command.id for command in agent.take(poll.result())] == ["k1"]


# --- a command that finds its poll waiting is stored as offered -------------------------------------------------------


async def waiting(make_world: MakeWorld, **commands: Any) -> tuple[World, Agent, asyncio.Task[CallResult]]:
    """An agent whose poll is held, before a store that answers late."""
    world = await make_world(poll={"hold": 20}, commands=commands)
    agent = await living(world)
    poll = agent.poll_task()
    await world.pass_s(1)
    world.store.slow = True
    return world, agent, poll


async def test_a_command_for_a_held_poll_costs_one_write(
    make_world: MakeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    world, agent, poll = await waiting(make_world)
    before = len(world.store.log)
    world.controller.push("k1", type="scale")
    await world.settle()
    assert not poll.done(), "the command is not on disk yet"
    world.store.catch_up()
    assert await ids_of(world, agent, poll) == ["k1"]
    assert len(world.store.log) == before + 1
    [(record, _, trace)] = await world.store.find("k1")
    assert (record.state, record.attempts) == (CommandState.OFFERED, 1)
    assert [(step.event, step.detail) for step in trace] == [("arrived", "scale"), ("offered", "attempt 1")]
    assert [step.wall for step in trace] == [record.arrived_unix] * 2
    [offer] = [each.fields for each in caplog.records if each.getMessage() == "command_offered"]  # type: ignore[attr-defined]
    assert offer["recorded"] is True
    assert [step.event for step in world.bridge.ctx.recent_commands] == ["offered"]
    assert world.metric("commands_total", event="offered") == 1
    assert await agent.poll() == []
    await world.settle()
    assert await world.state("k1") == "delivered"


async def test_a_command_behind_an_offer_without_evidence_is_not_stored_as_offered(make_world: MakeWorld) -> None:
    """The offer's only command has its result, but the command was in two replies: the result may follow the first."""
    world = await make_world(poll={"hold": 20})
    agent = await given(world, "k1")
    assert [command.id for command in await agent.poll_unwritten()] == ["k1"]
    assert await agent.poll() == ["k1"]
    await world.agent(cluster_id=agent.cluster_id).result("k1")
    agent.reconnect(clean=False)
    held = agent.poll_task()
    await world.pass_s(1)
    world.controller.push("k2")
    await world.settle()
    assert not held.done(), "no newer command is offered before the evidence is due"
    [(record, _, trace)] = await world.store.find("k2")
    assert (record.state, record.attempts) == (CommandState.QUEUED, 0)
    assert [step.event for step in trace] == ["arrived"]


async def test_each_offer_of_many_held_polls_has_a_time_limit_of_its_own(make_world: MakeWorld) -> None:
    world = await make_world(poll={"hold": 20})
    agents = [await living(world), await living(world, cluster_id="c-2", agent_id="pod-2", name="other")]
    polls = [agent.poll_task() for agent in agents]
    await world.pass_s(1)
    for number, agent in enumerate(agents):
        world.controller.push(f"k{number}", cluster_id=agent.cluster_id)
    await world.settle()
    for agent, poll in zip(agents, polls, strict=True):
        agent.take(poll.result())
        agent.reconnect(clean=False)
    await world.pass_s(61)
    assert [traces(world, name)[-1] for name in ("k0", "k1")] == ["uncertain: no evidence"] * 2


async def test_what_comes_during_the_write_waits_for_the_next_poll(make_world: MakeWorld) -> None:
    world, agent, poll = await waiting(make_world)
    for name in ("k1", "k2", "k3"):
        world.controller.push(name)
    await world.settle()
    world.store.catch_up()
    assert await ids_of(world, agent, poll) == ["k1"]
    assert await agent.poll() == ["k2", "k3"]
    assert traces(world, "k2") == ["arrived: command", "offered: attempt 1"]


async def hangs_up(world: World, poll: asyncio.Task[CallResult]) -> None:
    poll.cancel()


async def polls_again(world: World, poll: asyncio.Task[CallResult]) -> None:
    second = world.agent().poll_task()
    await world.settle()
    assert poll.result().outcome == Commands((), 5)
    second.cancel()


async def hold_ends(world: World, poll: asyncio.Task[CallResult]) -> None:
    await world.pass_s(20)
    assert poll.result().outcome == Commands((), 5)


@pytest.mark.parametrize("ends", [hangs_up, polls_again, hold_ends])
async def test_a_poll_that_ends_during_the_write_swallows_nothing(
    make_world: MakeWorld, ends: Callable[[World, asyncio.Task[CallResult]], Awaitable[None]]
) -> None:
    world, agent, poll = await waiting(make_world)
    world.controller.push("k1")
    await world.settle()
    await ends(world, poll)
    await world.settle()
    world.store.catch_up()
    await world.settle()
    [(record, _, trace)] = await world.store.find("k1")
    assert (record.state, record.attempts) == (CommandState.QUEUED, 0)
    assert [step.wall > record.arrived_unix for step in trace[2:]] == [ends is hold_ends]
    assert await agent.poll() == ["k1"]
    tried = ["offered: attempt 1", "requeued: not written", "offered: attempt 1"]
    assert traces(world, "k1") == ["arrived: command", *tried]


async def test_a_newer_poll_gets_what_was_stored_for_the_older_one(make_world: MakeWorld) -> None:
    world, agent, _poll = await waiting(make_world)
    world.controller.push("k1")
    await world.settle()
    newer = agent.poll_task()
    await world.settle()
    world.store.catch_up()
    assert await ids_of(world, agent, newer) == ["k1"]
    [(record, _, _)] = await world.store.find("k1")
    assert (record.state, record.attempts) == (CommandState.OFFERED, 1)


async def test_a_command_that_came_to_the_queue_meanwhile_is_offered_with_it_in_order(make_world: MakeWorld) -> None:
    world = await make_world(poll={"hold": 20})
    agent = await living(world)
    source = await living(world, cluster_id="c-2", agent_id="pod-2", name="other")
    world.controller.push("k1", cluster_id=source.cluster_id)
    poll = agent.poll_task()
    await world.pass_s(1)
    world.store.slow = True
    world.controller.push("k2", cluster_id=agent.cluster_id)
    await world.settle()
    world.bridge.delivery.move(world.session(source.cluster_id).key, world.session(agent.cluster_id).key)
    world.store.catch_up()
    assert await ids_of(world, agent, poll) == ["k1"], "it was offered before the write was answered"
    assert await agent.poll() == ["k2"]
    [(record, _, _)] = await world.store.find("k2")
    assert (record.state, record.attempts) == (CommandState.OFFERED, 1)


async def test_a_full_disk_leaves_the_poll_held(make_world: MakeWorld) -> None:
    world, agent, poll = await waiting(make_world)
    world.store.slow = False
    world.store.fail()
    world.controller.push("k1")
    await world.settle()
    assert codes(world, "k1") == ["store_unavailable"]
    assert not poll.done()
    world.store.heal()
    world.controller.push("k2")
    assert await ids_of(world, agent, poll) == ["k2"]


async def test_a_duplicate_leaves_the_poll_held_and_the_command_as_it_is(make_world: MakeWorld) -> None:
    world = await make_world(poll={"hold": 20})
    agent = await given(world, "k1")
    assert await agent.poll() == ["k1"]
    poll = agent.poll_task()
    await world.settle()
    assert await world.state("k1") == "delivered"
    world.controller.push("k1")
    await world.settle()
    assert not poll.done()
    assert await world.state("k1") == "delivered"
    world.controller.push("k2")
    assert await ids_of(world, agent, poll) == ["k2"]


@pytest.mark.parametrize("once, state", [([], "offered"), (["command"], "dead")])
async def test_a_crash_behind_the_write_leaves_it_unknown_if_the_agent_has_it(
    make_world: MakeWorld, once: list[str], state: str
) -> None:
    world, agent, poll = await waiting(make_world, at_most_once=once)
    world.controller.push("k1")
    await world.settle()
    await world.crash()
    poll.cancel()
    world.start()
    await world.settle()
    poll = agent.poll_task()
    await world.pass_s(21)
    assert [each.id for each in agent.take(poll.result())] == ([] if once else ["k1"])
    await world.settle()
    assert await world.state("k1") == state


async def test_a_session_that_is_forgotten_during_the_write_ends_its_command(make_world: MakeWorld) -> None:
    world, agent, _poll = await waiting(make_world)
    world.controller.push("k1")
    await world.settle()
    forgotten = asyncio.create_task(world.bridge.session_registry.forget(world.session(agent.cluster_id)))
    await world.settle()
    world.store.catch_up()
    await forgotten
    await world.settle()
    assert await world.state("k1") == "expired"
    assert codes(world, "k1") == ["expired"]


async def test_a_reply_that_was_written_is_not_withdrawn(world: World) -> None:
    agent = await offered(world)
    offer = offer_of(world, agent)
    world.bridge.delivery.unwritten(offer)
    await world.settle()
    assert await world.state("k1") == "offered"
    assert offer_of(world, agent) is offer


def offer_of(world: World, agent: Agent) -> Batch:
    queue = world.bridge.queues.get(world.session(agent.cluster_id).key)
    assert queue is not None
    assert queue.offer is not None
    return queue.offer


async def test_each_step_has_its_time_and_an_attempt_less_is_one(world: World) -> None:
    agent = await offered(world)
    agent.reconnect(clean=False)
    start = world.clock.wall_s()
    await world.pass_s(70)
    await agent.poll_unwritten()
    await world.settle()
    [(record, _, trace)] = await world.store.find("k1")
    assert (record.state.value, record.attempts) == ("uncertain", 1)
    assert [entry.event for entry in trace][-3:] == ["uncertain", "offered", "requeued"]
    assert [entry.wall - start for entry in trace][-3:] == pytest.approx([60, 70, 70], abs=0.1)


# --- what ends an offer gives what waits to a held poll ---------------------------------------------------------------


async def held_behind_an_offer(make_world: MakeWorld) -> tuple[World, Agent, Agent, asyncio.Task[CallResult]]:
    """An agent that has read `k1` without evidence, and polls on another connection while `k2` waits."""
    world = await make_world(poll={"hold": 20})
    agent = await given(world, "k1")
    other = world.agent(cluster_id=agent.cluster_id)
    poll = agent.poll_task()
    await world.settle()
    held = other.poll_task()  # arrives in the same moment: it does not show that the reply was read
    agent.take(poll.result())
    world.controller.push("k2")
    await world.settle()
    assert not held.done()
    return world, agent, other, held


async def ids_of(world: World, other: Agent, held: asyncio.Task[CallResult]) -> list[str]:
    """The commands that a held poll has got without any time passing."""
    await world.settle()
    return [command.id for command in other.take(held.result())]


async def test_evidence_lets_a_held_poll_have_what_waits(make_world: MakeWorld) -> None:
    world, agent, other, held = await held_behind_an_offer(make_world)
    await agent.heartbeat()
    assert await ids_of(world, other, held) == ["k2"]


async def test_a_result_lets_a_held_poll_have_what_waits(make_world: MakeWorld) -> None:
    world, agent, other, held = await held_behind_an_offer(make_world)
    agent.reconnect(clean=False)
    await agent.result("k1")
    assert await ids_of(world, other, held) == ["k2"]


async def test_the_loss_of_the_replica_that_served_the_offer_makes_it_uncertain_at_once(make_world: MakeWorld) -> None:
    world, agent, other, held = await held_behind_an_offer(make_world)
    world.bridge.delivery.connection_closed(agent.connection, None)
    assert await ids_of(world, other, held) == ["k1", "k2"]
    assert traces(world, "k1")[-2:] == ["uncertain: no evidence", "offered: attempt 2, no evidence"]


async def test_an_offer_that_becomes_uncertain_goes_to_a_held_poll(make_world: MakeWorld) -> None:
    world, agent, other, held = await held_behind_an_offer(make_world)
    agent.reconnect(clean=False)
    await world.pass_s(45)
    assert held.result().outcome == Commands((), 5)
    held = other.poll_task()
    await world.pass_s(15.1)
    assert await ids_of(world, other, held) == ["k1", "k2"]


async def test_an_unwritten_reply_goes_to_a_held_poll(make_world: MakeWorld) -> None:
    world = await make_world(poll={"hold": 20})
    agent = await given(world, "k1")
    poll = agent.poll_task()
    await world.settle()
    held = agent.poll_task()
    await world.settle()
    assert not held.done()
    world.bridge.delivery.unwritten(cast("Batch", poll.result().receipt))
    assert await ids_of(world, agent, held) == ["k1"]


async def test_a_second_poll_of_an_agent_answers_the_first_empty(make_world: MakeWorld) -> None:
    world = await make_world(poll={"hold": 20})
    agent = await living(world)
    first = agent.poll_task()
    await world.settle()
    second = agent.poll_task()
    await world.settle()
    assert first.result().outcome == Commands((), 5)
    assert not second.done()
    world.controller.push("k1")
    assert await ids_of(world, agent, second) == ["k1"]


async def test_what_a_successor_takes_over_goes_to_its_held_poll_and_the_former_poll_ends(
    make_world: MakeWorld,
) -> None:
    world = await make_world(poll={"hold": 20})
    agent = await given(world, "k1")
    successor = await living(world, agent_id="pod-2", name="new")
    assert await agent.poll() == ["k1"]
    other = world.agent(cluster_id=agent.cluster_id)
    held, held_by_successor = other.poll_task(), successor.poll_task()
    await world.settle()
    world.bridge.delivery.move(world.session(agent.cluster_id).key, world.session(successor.cluster_id).key)
    assert await ids_of(world, successor, held_by_successor) == ["k1"]
    assert held.result().outcome == Commands((), 5)
    assert traces(world, "k1")[-2:] == ["uncertain: superseded", "offered: attempt 2, superseded"]
    await successor.live(70)
    assert len(world.bridge.delivery.evidence) == 0, "the former offer is not kept either"


async def test_a_command_that_is_stored_while_its_session_moves_to_one_that_has_it_is_queued_once(
    world: World,
) -> None:
    world.controller.manners.cluster_id = lambda payload: f"of-{payload['agent_id']}"
    agent, successor = await living(world), await living(world, agent_id="pod-2")
    former, ident = agent.cluster_id, successor.cluster_id
    assert former != ident
    world.controller.push("k1", cluster_id=ident)
    await world.settle()
    world.store.slow = True
    world.controller.push("k1", cluster_id=former)
    await world.settle()
    world.controller.manners.cluster_id = lambda payload: ident
    await agent.register()
    await world.until(lambda: [each.key.ident for each in world.bridge.ctx.sessions] == [ident])
    world.store.catch_up()
    await world.settle()
    assert await world.state("k1") == "queued", "the store has it once"
    assert await successor.poll() == ["k1"]
    await successor.heartbeat()
    assert await successor.poll() == []
    assert world.metric("commands_total", event="duplicate") == 1


@pytest.mark.parametrize("state", ["delivered", "uncertain"])
async def test_a_result_is_the_end_whatever_shows_while_it_is_stored(world: World, state: str) -> None:
    agent = await given(world, "k1")
    assert await agent.poll() == ["k1"]
    world.store.slow = True
    posting = world.loop.create_task(world.agent(cluster_id=agent.cluster_id).result("k1"))
    await world.settle()
    if state == "delivered":
        await agent.heartbeat()
    else:
        await world.pass_s(70)
    world.store.catch_up()
    await world.settle()
    assert posting.result() == Accepted()
    assert await agent.poll() == []
    await agent.live(40)
    assert await world.state("k1") == "closed"
    await world.restart()
    await agent.heartbeat()
    assert await agent.poll() == []


async def test_a_result_that_is_stored_while_its_session_moves_ends_the_command_there(world: World) -> None:
    agent = await given(world, "k1")
    assert await agent.poll() == ["k1"]
    former = world.agent(cluster_id=agent.cluster_id)
    world.store.slow = True
    posting = world.loop.create_task(former.result("k1"))
    await world.settle()
    world.controller.manners.cluster_id = lambda payload: "c-new"
    await agent.register()
    await world.until(lambda: [each.key.ident for each in world.bridge.ctx.sessions] == ["c-new"])
    world.store.catch_up()
    await world.settle()
    assert posting.result() == Accepted()
    assert await agent.poll() == []
    assert len(world.bridge.queues) == 0
    await agent.live(40)
    assert await world.state("k1") == "closed"


# --- polls while the state of the reply's connection is unknown -------------------------------------------------------


async def test_a_later_poll_is_evidence_once_a_report_shows_that_the_connection_was_open(world: World) -> None:
    agent = await given(world, "k1")
    agent.connection, before = -7, world.now - 1
    agent.open_until = lambda: before
    assert await agent.poll() == ["k1"]
    await world.pass_s(1)
    assert await world.agent(cluster_id=agent.cluster_id).poll() == []
    delivery, polled_at = world.bridge.delivery, world.now
    await world.pass_s(5)
    for connection, until_s, awaited in ((-7, polled_at - 0.5, True), (-8, world.now, False)):
        assert delivery.connection_open(connection, until_s) is awaited
        await world.settle()
        assert await world.state("k1") == "offered"
    assert not delivery.connection_open(-7, world.now)
    await world.settle()
    [(_, _, trace)] = await world.store.find("k1")
    assert (trace[-1].event, trace[-1].detail, trace[-1].wall) == ("delivered", "poll", world.clock.wall_s())


async def test_reports_of_an_open_connection_end_when_none_can_be_evidence_any_longer(world: World) -> None:
    agent = await given(world, "k1")
    agent.open_until = unknown_open
    assert await agent.poll() == ["k1"]
    assert world.bridge.delivery.connection_open(agent.connection, world.now)
    await world.pass_s(70)
    assert await world.state("k1") == "uncertain"
    assert not world.bridge.delivery.connection_open(agent.connection, world.now)
    await agent.heartbeat()
    await world.settle()
    assert await world.state("k1") == "delivered", "the next request is evidence still"


async def test_a_report_after_the_time_limit_confirms_a_poll_before_it(world: World) -> None:
    agent = await given(world, "k1")
    agent.open_until = unknown_open
    assert await agent.poll() == ["k1"]
    await world.pass_s(50)
    assert await world.agent(cluster_id=agent.cluster_id).poll() == []
    await world.pass_s(20)
    delivery = world.bridge.delivery
    assert delivery.connection_open(agent.connection, world.now - 60)
    assert not delivery.connection_open(agent.connection, world.now)
    await world.settle()
    assert await world.state("k1") == "delivered"


@pytest.mark.parametrize("clean", [True, False])
async def test_a_waiting_poll_is_evidence_once_the_connection_before_it_is_closed_cleanly(
    make_world: MakeWorld, clean: bool
) -> None:
    world = await make_world(poll={"hold": 20})
    agent = await given(world, "k1")
    agent.open_until = unknown_open
    assert await agent.poll() == ["k1"]
    await world.pass_s(1)
    other = world.agent(cluster_id=agent.cluster_id)
    held = other.poll_task()
    world.controller.push("k2")
    await world.settle()
    agent.reconnect(clean)
    await world.settle()
    assert await world.state("k1") == ("delivered" if clean else "offered")
    assert held.done() is clean
    if not clean:
        await world.pass_s(20)
    assert await ids_of(world, other, held) == (["k2"] if clean else [])


# --- defects in what follows a write ----------------------------------------------------------------------------------


def defect_at(world: World, step: str) -> None:
    """Let whatever observes the steps of commands fail at this one."""

    def note(key: SessionKey, ids: tuple[str, ...], entry: TraceEntry) -> None:
        if entry.event == step:
            raise RuntimeError("a defect")

    world.bridge.ctx.note_step = note


async def test_an_agent_whose_result_is_stored_is_answered_in_spite_of_a_defect(world: World) -> None:
    agent = await given(world, "k1", "k2")
    await agent.poll()
    defect_at(world, "delivered")
    posting = world.loop.create_task(world.agent(cluster_id=agent.cluster_id).result("k1"))
    await world.settle()
    assert posting.done()
    assert posting.result() == Accepted()
    assert len(world.faults) == 1
    world.faults.clear()


async def test_a_stored_command_is_acknowledged_in_spite_of_a_defect(make_world: MakeWorld) -> None:
    world = await make_world(upstream={"send_command_ack": True}, poll={"hold": 20})
    agent = await living(world)
    held = agent.poll_task()
    await world.settle()
    defect_at(world, "offered")
    world.controller.push("k1")
    await world.settle()
    assert len(world.controller.got("command_ack")) == 1
    held.cancel()
    await world.settle()
    world.faults.clear()


# --- what is counted and traced ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("success", [True, False])
async def test_the_life_of_a_command_is_counted_and_traced(world: World, success: bool) -> None:
    agent = await given(world, "k1", type="scale")
    assert await agent.poll() == ["k1"]
    await agent.result("k1", success)
    await agent.result("k1", success)
    await agent.result("k0", success)
    await agent.live(40)
    assert traces(world, "k1") == [
        "arrived: scale",
        "offered: attempt 1",
        "delivered: next request",
        f"result: {'success' if success else 'failure'}",
        f"result: {'success' if success else 'failure'}",
        "closed: ",
    ]
    counted = {event: world.metric("commands_total", event=event) for event in ("queued", "offered", "redelivered")}
    assert counted == {"queued": 1, "offered": 1, "redelivered": 0}
    assert world.metric("commands_total", event="closed") == 2, "the result of an unknown command is closed as well"
    for kind in ("known", "repeat", "unknown"):
        assert world.metric("results_total", kind=kind, success=str(success).lower()) == 1


async def test_the_age_of_each_command_is_observed_once_also_beside_one_that_is_offered_again(world: World) -> None:
    agent = await offered(world)
    agent.reconnect(clean=False)
    await world.pass_s(61)
    world.controller.push("k2")
    await world.settle()
    assert await agent.poll() == ["k1", "k2"]
    for metric in ("command_offer_seconds_count", "command_hand_over_seconds_count"):
        assert world.metric(metric, dialect="clusters_agent") == 2


async def test_a_command_is_handed_over_when_its_reply_is_written(make_world: MakeWorld) -> None:
    world = await make_world(poll={"hold": 20})
    agent = await living(world)
    poll = agent.poll_task()
    await world.pass_s(1)
    world.controller.push("k1")
    await world.pass_s(2)  # the offer is made, its reply not yet written
    agent.take(poll.result())
    assert world.metric("command_offer_seconds_sum", dialect="clusters_agent") == pytest.approx(0, abs=0.1)
    assert list(world.bridge.delivery.hand_overs_s) == [pytest.approx(2, abs=0.1)]
    for metric, labels in (
        ("command_hand_over_seconds", {"dialect": "clusters_agent"}),
        ("message_latency_seconds", {"direction": "down"}),
    ):
        assert world.metric(f"{metric}_count", **labels) == 1
        assert world.metric(f"{metric}_sum", **labels) == pytest.approx(2, abs=0.1)


async def test_the_hand_over_times_that_nobody_takes_are_bounded(make_world: MakeWorld) -> None:
    world = await make_world(commands={"max_queued": 2000}, poll={"max_batch": 1000})
    agent = await given(world, *(f"k{n}" for n in range(MAX_HAND_OVER_SAMPLES + 5)))
    polls = [await agent.poll() for _ in range(2)]
    assert sum(map(len, polls)) == MAX_HAND_OVER_SAMPLES + 5
    assert len(world.bridge.delivery.hand_overs_s) == MAX_HAND_OVER_SAMPLES


async def test_a_result_without_a_time_gets_the_time_of_its_arrival(world: World) -> None:
    agent = await offered(world)
    at = rfc3339(world.clock.wall_s())
    await agent.result("k1")
    await agent.live(40)
    [result] = world.controller.results("k1")
    assert result["timestamp"] == at


async def test_a_drain_counts_each_command_that_it_refuses(world: World) -> None:
    await living(world)
    world.bridge.delivery.closed = True
    for command_id in ("k1", "k2", "k3"):
        world.controller.push(command_id)
    await world.settle()
    assert world.bridge.delivery.refused_by_drain == 3
    assert [world.controller.results(each)[0]["error"] for each in ("k1", "k3")] == [DRAINED, DRAINED]


# --- doubt ------------------------------------------------------------------------------------------------------------


async def test_without_evidence_in_time_it_is_offered_again_with_a_reason(world: World) -> None:
    agent = await offered(world)
    agent.reconnect(clean=False)
    await world.pass_s(59.9)
    assert await world.state("k1") == "offered"
    await world.pass_s(0.2)
    assert await world.state("k1") == "uncertain"
    assert await agent.poll() == ["k1"]
    assert traces(world, "k1")[-2:] == ["uncertain: no evidence", "offered: attempt 2, no evidence"]
    assert world.metric("commands_total", event="redelivered") == 1


async def test_a_result_that_may_belong_to_an_earlier_reply_leaves_the_rest_of_the_offer_its_time(world: World) -> None:
    agent = await given(world, "k1", "k2")
    assert await agent.poll() == ["k1", "k2"]
    agent.reconnect(clean=False)
    await world.pass_s(61)
    assert await agent.poll() == ["k1", "k2"]
    agent.reconnect(clean=False)
    await agent.result("k1")
    await world.settle()
    assert await world.state("k2") == "offered"
    await world.pass_s(61)
    assert await agent.poll() == ["k2"]


async def test_a_slow_agent_on_a_kept_connection_gets_nothing_twice(world: World) -> None:
    agent = await offered(world)
    await world.pass_s(90)
    assert await agent.poll() == []
    await world.settle()
    assert await world.state("k1") == "delivered"


@pytest.mark.parametrize("settings", [{"at_most_once": ["once"]}, {"uncertain": "dead"}])
async def test_some_are_never_offered_twice(make_world: MakeWorld, settings: dict[str, Any]) -> None:
    world = await make_world(commands=settings)
    agent = await given(world, "k1", type="once")
    assert await agent.poll() == ["k1"]
    agent.reconnect(clean=False)
    await world.pass_s(61)
    assert await agent.poll() == []
    await world.settle()
    assert codes(world, "k1") == ["undeliverable"]
    assert await agent.result("k1") == Accepted()
    await world.settle()
    assert await world.state("k1") == "answered", "a valid result is stored in every state"


async def test_a_crash_before_the_reply_was_read_loses_nothing(world: World) -> None:
    agent = await given(world, "k1", "k2")
    poll = agent.poll_task()
    await world.crash()
    poll.cancel()
    world.start()
    await world.settle()
    assert await agent.poll() == ["k1", "k2"]


# --- duplicates -------------------------------------------------------------------------------------------------------


async def test_a_duplicate_is_not_queued_twice(world: World) -> None:
    agent = await given(world, "k1", "k1")
    world.controller.push("k1")
    await world.settle()
    assert await agent.poll() == ["k1"]
    await agent.heartbeat()
    world.controller.push("k1")
    await world.settle()
    assert await agent.poll() == []
    assert world.metric("commands_total", event="duplicate") == 3


async def test_not_even_across_restarts_and_its_result_is_sent_again(world: World) -> None:
    agent = await given(world, "k1")
    await agent.poll()
    await agent.result("k1", output="once")
    await agent.live(40)
    await world.restart()
    await agent.live(10)
    assert len(world.controller.results("k1")) == 1
    world.controller.push("k1")
    await world.settle()
    assert await agent.poll() == []
    first, second = world.controller.results("k1")
    assert first["output"] == second["output"] == "once"
    await agent.live(40)
    assert await world.state("k1") == "closed"
    assert world.bridge.outbox.empty


async def test_the_same_id_for_two_agents_is_two_commands(world: World) -> None:
    one = await living(world, name="one")
    two = await living(world, name="two", agent_id="pod-2")
    world.controller.push("k1", cluster_id=one.cluster_id)
    world.controller.push("k1", cluster_id=two.cluster_id)
    await world.settle()
    assert await one.poll() == ["k1"]
    assert await two.poll() == ["k1"]


# --- results ----------------------------------------------------------------------------------------------------------


async def test_the_first_result_wins_and_repeats_are_idempotent(world: World) -> None:
    agent = await given(world, "k1")
    await agent.poll()
    assert await agent.result("k1", output="first") == Accepted()
    assert await agent.result("k1", output="second") == Accepted()
    await agent.live(40)
    assert await agent.result("k1", output="third") == Accepted()
    await agent.live(40)
    assert [result["output"] for result in world.controller.results("k1")] == ["first"]
    assert world.metric("results_total", kind="repeat", success="true") == 2


async def test_a_result_for_a_queued_command_ends_its_waiting(world: World) -> None:
    agent = await given(world, "k1")
    await agent.result("k1")
    assert await agent.poll() == []
    assert await world.state("k1") == "answered"


async def test_a_result_after_expiry_still_reaches_the_controller(world: World) -> None:
    agent = await given(world, "k1", ttl_seconds=10)
    await agent.live(15)
    await agent.result("k1", output="late")
    await world.settle()
    assert codes(world, "k1") == ["expired", ""]


async def test_results_of_unknown_commands_are_forwarded_once(world: World) -> None:
    agent = await living(world)
    await agent.result("k9")
    await agent.result("k9")
    await world.settle()
    assert codes(world, "k9") == ["unknown_command"]


async def test_an_agent_that_hangs_up_has_posted_its_result_all_the_same(world: World) -> None:
    agent = await given(world, "k1")
    await agent.poll()
    world.store.slow = True
    post = world.loop.create_task(agent.result("k1"))
    await world.settle()
    post.cancel()
    world.store.catch_up()
    await world.settle()
    assert len(world.controller.results("k1")) == 1


# --- targets ----------------------------------------------------------------------------------------------------------


async def test_without_a_target_the_only_fresh_session_is_meant(world: World) -> None:
    first = await living(world, name="one")
    await world.pass_s(60)
    second = await living(world, name="two", agent_id="pod-2")
    world.controller.push("k1")
    await world.settle()
    assert await second.poll() == ["k1"]
    await world.pass_s(60)
    world.controller.push("k2")
    await world.settle()
    assert await first.poll() == []
    assert await second.poll() == ["k2"], "none fresh: the most recently seen"


async def test_with_several_fresh_ones_it_is_ambiguous(world: World) -> None:
    one = await living(world, name="one")
    two = await living(world, name="two", agent_id="pod-2")
    world.controller.push("k1")
    world.controller.push("k2", cluster_id="c-9")
    world.controller.push("k3", agent_id="pod-2")
    await world.settle()
    assert codes(world, "k1") == ["ambiguous_target"]
    assert codes(world, "k2") == ["unknown_agent"]
    assert await one.poll() == []
    assert await two.poll() == ["k3"]


async def test_without_any_session_nobody_is_meant(world: World) -> None:
    world.controller.push("k1")
    await world.settle()
    assert codes(world, "k1") == ["unknown_agent"]


@pytest.mark.parametrize(
    "payload", [{"id": "a/b"}, {"id": "x" * 300}, {"id": "k1", "type": 5}, {"id": "k1", "payload": {"n": 10**400}}]
)
async def test_what_cannot_be_shaped_is_rejected_and_poisons_nothing(world: World, payload: dict[str, Any]) -> None:
    agent = await living(world)
    world.controller.socket.says("command", payload, "r1")
    world.controller.push("k2")
    await world.settle()
    assert await agent.poll() == ["k2"]
    [rejected] = world.controller.got("command_result")
    assert rejected.payload["code"] == "malformed"
    assert rejected.request_id == "r1"
    assert rejected.payload["command_id"] == payload["id"]


DEEP = b"[" * 5000 + b"]" * 5000


@pytest.mark.parametrize(
    "frame, error",
    [
        (b'{"type":"command","request_id":"r1","payload":{"id":"k1","n":1e400}}', "a number"),
        (b'{"type":"command","request_id":"r1","payload":{"id":"k1","n":-1e999}}', "a number"),
        (b'{"type":"command","request_id":"r1","payload":{"id":"k1","n":%b}}' % (b"9" * 5000), "a number"),
        (b'{"type":"command","request_id":"r1","payload":{"id":"k1","n":NaN}}', "a number"),
        (b'{"type":"command","request_id":"r1","payload":{"id":"k1","n":%b}}' % DEEP, "nested"),
        (b'{"payload":{"n":%b,"id":"k1"},"type":"command","request_id":"r1"}' % DEEP, "nested"),
        (b'{"type":"command","request_id":"r1","payload":{"id":"k1","n":[1,}}', "not valid JSON"),
        (b'{"type":"command","request_id":"r1","payload":{"id":"k1","text":"half', "not valid JSON"),
        (b'{"type":"command","request_id":"r1","id":"k1","payload":["k1"]}', "must be an object"),
    ],
)
async def test_what_cannot_be_read_is_rejected_by_the_ids_in_it(world: World, frame: bytes, error: str) -> None:
    agent = await living(world)
    world.controller.socket.says_bytes(frame)
    world.controller.push("k2")
    await world.settle()
    assert await agent.poll() == ["k2"]
    [rejected] = world.controller.got("command_result")
    assert rejected.payload["code"] == "malformed"
    assert error in rejected.payload["error"]
    assert rejected.request_id == "r1"
    assert rejected.payload["command_id"] in ("k1", "r1")


async def test_two_messages_of_one_frame_are_both_taken(world: World) -> None:
    agent = await living(world)
    first = b'{"type":"command","request_id":"r1","payload":{"id":"k1","text":"caf\xe9"}}'
    broken = b'{"type":"command","request_id":"r2","payload":{"id":"k2","n":1e400}}'
    third = b'{"type":"command","request_id":"r3","payload":{"id":"k3"}}'
    world.controller.socket.says_bytes(b"\xef\xbb\xbf" + first + broken + b"\r\n" + third)
    await world.settle()
    assert await agent.poll() == ["k1", "k3"]
    assert codes(world, "k2") == ["malformed"]


async def test_other_messages_that_cannot_be_read_are_counted_and_survived(world: World) -> None:
    agent = await living(world)
    world.controller.socket.says_bytes(b'{"type":"ping","request_id":"p1","payload":{"n":%b}}' % DEEP)
    world.controller.socket.says_bytes(b'{"type":"ping","request_id":"p2","payload":{"n":1e400}}')
    world.controller.socket.says_bytes(b'{"type":"ping","payload":"x"}')
    await world.settle()
    assert [message.request_id for message in world.controller.got("pong")] == ["p2"]
    assert world.metric("upstream_bad_frames_total", kind="not_json") == 1
    assert world.metric("upstream_bad_frames_total", kind="bad_payload") == 1
    assert await agent.poll() == []
