"""Results reach the controller at least once, and are closed when it has them.

Rules: docs/reference/protocol.md#3-commands, CLOSED.
"""

from __future__ import annotations

import pytest

from shim.bridge.outbox import WINDOW_BYTES
from shim.bridge.upstream_connection import ResultsConfirmed
from shim.core.agent_calls import Accepted
from shim.core.records import AddTrace, CloseOutbox, Operation, PutOutbox, ReadOutbox, SessionKey, TraceEntry
from shim.protocol.rfc3339 import parse_rfc3339
from tests.bridge.conftest import MakeWorld
from tests.support.world import Agent, World


async def answered(world: World, *commands: str, output: str = "done") -> Agent:
    """A living agent that has posted these results."""
    agent = world.agent()
    await agent.register()
    await agent.heartbeat()
    for command_id in commands:
        world.controller.push(command_id)
    await world.settle()
    await agent.poll()
    for command_id in commands:
        assert await agent.result(command_id, output=output) == Accepted()
    await world.settle()
    return agent


def sent(world: World, command_id: str) -> int:
    return len(world.controller.results(command_id))


async def test_a_pong_closes_where_the_controller_acknowledges_nothing(world: World) -> None:
    world.controller.manners.acks = False
    await answered(world, "k1")
    assert await world.state("k1") == "answered", "the first acknowledgement may still come"
    await world.pass_s(30)
    assert await world.state("k1") == "closed"


async def test_only_a_later_acknowledgement_does_where_it_acknowledges(world: World) -> None:
    agent = await answered(world, "k1")
    assert await world.state("k1") == "answered", "pongs may come from a proxy whose application stalled"
    await agent.live(40)
    assert await world.state("k1") == "closed"
    assert sent(world, "k1") == 1


async def test_the_acknowledgement_of_an_earlier_heartbeat_closes_nothing(world: World) -> None:
    agent = await answered(world)
    world.controller.manners.acks = False
    await world.pass_s(30)
    await agent.heartbeat()
    await world.settle()
    earlier = world.controller.got("heartbeat")[-1]
    await agent.result("k9")
    await world.settle()
    world.controller.socket.says("heartbeat_ack", {}, earlier.request_id)
    await world.settle()
    assert not world.bridge.outbox.empty
    world.controller.manners.acks = True
    await agent.live(40)
    assert world.bridge.outbox.empty


async def test_the_acknowledgement_of_a_status_report_is_not_taken_for_a_heartbeats(world: World) -> None:
    agent = world.agent(dialect="agents", agent_id="a-1")
    await agent.register()
    await agent.heartbeat()
    await world.settle()
    world.controller.manners.acks = False
    await agent.status(pods=1)
    await agent.result("k9")
    await world.pass_s(30)
    await agent.heartbeat()
    await world.settle()
    [report] = world.controller.got("status")
    assert report.request_id
    world.controller.socket.says("heartbeat_ack")  # does not say which: it may be the report's
    await world.settle()
    assert not world.bridge.outbox.empty
    world.controller.manners.acks = True
    await agent.live(40)
    assert world.bridge.outbox.empty


async def test_a_pong_before_the_application_has_spoken_proves_nothing(world: World) -> None:
    agent = await answered(world, "k1")
    world.controller.go_away()
    await world.settle()
    await agent.result("k2")
    await world.restart()  # nothing is fresh: no registration, no heartbeat is sent
    world.controller.come_back()
    world.controller.manners.acks = False
    await world.pass_s(10)
    assert sent(world, "k2") == 1
    assert not world.bridge.outbox.empty
    world.controller.socket.says("ping", {})
    await world.settle()
    assert world.bridge.outbox.empty


async def test_until_then_it_is_sent_again_after_each_reconnect(world: World) -> None:
    world.controller.manners.pongs = world.controller.manners.acks = False
    agent = await answered(world, "k1")
    for round_ in range(2, 5):
        world.controller.socket.lose()
        await agent.live(5)
        assert sent(world, "k1") == round_
    world.controller.manners.acks = True
    world.controller.socket.lose()
    await agent.live(5)
    assert await world.state("k1") == "closed", "the heartbeat after it was acknowledged"
    world.controller.socket.lose()
    await agent.live(5)
    assert sent(world, "k1") == 5


async def test_what_was_sent_into_a_dying_connection_is_sent_again(world: World) -> None:
    agent = await answered(world)
    world.controller.socket.swallows = True
    await agent.result("k1")
    await world.settle()
    world.controller.socket.lose()
    await agent.live(5)
    assert sent(world, "k1") == 1


async def test_results_wait_on_disk_while_the_link_is_down_also_through_a_restart(world: World) -> None:
    agent = await answered(world)
    world.controller.go_away()
    await world.settle()
    for number in range(100):
        await agent.result(f"k{number}")
    await world.restart()
    world.controller.come_back()
    await world.pass_s(10)
    order = [message.payload["command_id"] for message in world.controller.got("command_result")]
    assert order == [f"k{number}" for number in range(100)]
    await agent.live(40)
    assert world.bridge.outbox.empty


async def test_replayed_registrations_go_before_results(world: World) -> None:
    world.controller.manners.pongs = world.controller.manners.acks = False
    agent = await answered(world, "k1")
    before = len(world.controller.log)
    world.controller.socket.lose()
    await agent.live(5)
    kinds = [entry.message.type for entry in world.controller.log[before:]]
    assert kinds == ["register", "command_result", "heartbeat"]


async def test_long_results_do_not_pile_up_on_the_connection(world: World) -> None:
    world.controller.manners.acks = world.controller.manners.pongs = False
    agent = await answered(world, *(f"k{n}" for n in range(20)), output="x" * 900_000)
    assert len(world.controller.got("command_result")) < 12
    await world.pass_s(11)  # no acknowledgement came
    for _ in range(8):
        for payload in list(world.controller.socket.pings):
            world.controller.socket.pong(payload)
        await world.settle()
    assert len(world.controller.got("command_result")) == 20
    assert agent.world.bridge.outbox.empty


async def test_as_many_bytes_follow_as_were_confirmed(world: World) -> None:
    world.controller.manners.acks = world.controller.manners.pongs = False
    await answered(world, *(f"k{n}" for n in range(20)), output="x" * 900_000)
    counts = [len(world.controller.got("command_result"))]
    for confirmed in (1, 2):
        seqs = tuple(world.bridge.outbox._entries)[:confirmed]
        world.bridge.ctx.events.put(ResultsConfirmed(seqs))
        await world.settle()
        counts.append(len(world.controller.got("command_result")))
    full = WINDOW_BYTES // 900_000 + 1
    assert counts == [full, full + 1, full + 3]


async def test_a_result_longer_than_the_controller_takes_is_cut_and_says_so(make_world: MakeWorld) -> None:
    world = await make_world(upstream={"max_send_bytes": 65_536})
    await answered(world, "k1", output="x" * 100_000)
    [result] = world.controller.results("k1")
    assert 60_000 < len(result["output"]) < 65_536
    assert result["metadata"] == {"output_truncated_bytes": 100_000 - len(result["output"])}


# --- a store that refuses ---------------------------------------------------------------------------------------------


async def test_a_close_that_the_disk_refuses_is_made_up_for(world: World) -> None:
    agent = await answered(world, "k1")
    world.store.failing = lambda operations: isinstance(operations[0], CloseOutbox)
    await agent.live(40)
    assert await world.state("k1") == "answered"
    world.store.heal()
    world.controller.socket.lose()
    await agent.live(40)
    assert sent(world, "k1") == 2
    assert await world.state("k1") == "closed"
    assert world.bridge.outbox.empty


async def test_an_outbox_that_cannot_be_read_is_read_later(world: World) -> None:
    agent = await answered(world)
    world.controller.go_away()
    await world.settle()
    await agent.result("k1")
    world.store.failing = lambda operations: isinstance(operations[0], ReadOutbox)
    world.controller.come_back()
    await agent.live(10)
    assert sent(world, "k1") == 0
    world.store.heal()
    await agent.live(10)
    assert sent(world, "k1") == 1


def no_outbox(operations: list[Operation]) -> bool:
    return isinstance(operations[0], PutOutbox)


async def test_what_cannot_be_stored_is_told_at_once(world: World) -> None:
    world.store.failing = no_outbox  # type: ignore[assignment]
    world.controller.push("k1")
    await world.settle()
    assert [result["code"] for result in world.controller.results("k1")] == ["unknown_agent"]


async def test_or_when_there_is_a_connection_again(world: World) -> None:
    agent = await answered(world)
    world.controller.push("k1", ttl_seconds=10)
    await world.settle()
    world.controller.go_away()
    world.store.fail()
    await agent.live(15)
    world.controller.come_back()
    await agent.live(10)
    assert [result["code"] for result in world.controller.results("k1")] == ["expired"]


async def test_an_end_that_the_disk_refused_is_reported_until_it_has_arrived(world: World) -> None:
    agent = await answered(world)
    world.controller.push("k1", ttl_seconds=10)
    world.controller.push("k2", ttl_seconds=10)
    await world.settle()
    world.store.fail()
    world.controller.manners.pongs = world.controller.manners.acks = False
    await agent.live(15)
    assert len(world.controller.results("k1")) == 1, "told at once"
    assert await world.state("k1") == "queued", "nothing of it is on disk"
    world.controller.socket.lose()  # and nobody knows whether that arrived
    world.store.heal()
    world.controller.manners.pongs = world.controller.manners.acks = True
    await agent.live(60)
    assert [await world.state(each) for each in ("k1", "k2")] == ["expired", "expired"]
    assert {result["code"] for result in world.controller.results("k1")} == {"expired"}
    assert len(world.controller.results("k1")) == 2, "once more from disk, and confirmed"
    await world.restart()
    await agent.live(10)
    assert len(world.controller.results("k1")) == 2


async def test_a_result_outweighs_an_end_that_the_disk_refused(world: World) -> None:
    agent = await answered(world)
    world.controller.push("k1", ttl_seconds=10)
    await world.settle()
    world.store.fail()
    await agent.live(15)
    world.store.heal()
    await agent.result("k1")
    await agent.live(60)
    assert [result.get("code") for result in world.controller.results("k1")] == ["expired", None]
    assert await world.state("k1") == "closed"


async def test_a_page_read_before_a_close_does_not_send_the_closed_again(world: World) -> None:
    agent = await answered(world, "k1")
    world.store.slow = True
    world.bridge.outbox.start_sending("default")  # the page is read, but has not arrived
    await agent.live(40)  # the acknowledgement closes it meanwhile
    world.store.catch_up()
    await world.settle()
    assert sent(world, "k1") == 1
    assert world.bridge.outbox.empty


async def test_a_connection_that_comes_up_while_the_disk_is_read_gets_everything(world: World) -> None:
    world.controller.manners.pongs = world.controller.manners.acks = False
    agent = await answered(world, *(f"k{n}" for n in range(40)))
    world.store.slow = True
    before = len(world.controller.log)
    for _ in range(3):
        world.controller.socket.lose()
        await agent.live(5)
    world.store.catch_up()
    await agent.live(5)
    sent_again = [message.payload["command_id"] for message in world.controller.got("command_result", before)]
    assert sorted(sent_again) == sorted(f"k{n}" for n in range(40))


@pytest.mark.parametrize("late", [False, True])
async def test_nothing_is_left_when_all_is_confirmed(world: World, late: bool) -> None:
    agent = await answered(world, *(f"k{n}" for n in range(40)))
    world.store.slow = late
    await agent.live(40)
    world.store.catch_up()
    await world.settle()
    assert world.bridge.outbox.empty
    assert len(world.bridge.outbox) == 0


async def test_a_result_is_sent_again_for_each_time_that_its_command_comes_again(world: World) -> None:
    """Once is enough while the result is on its way; when it has arrived, a command that comes again wants it again."""
    agent = await answered(world, "k1")
    world.controller.push("k1")
    await world.settle()
    assert sent(world, "k1") == 1, "it is on its way already"
    for times in (2, 3, 4):
        await agent.live(40)
        for _ in range(2):
            world.controller.push("k1")
        await world.settle()
        assert sent(world, "k1") == times
    assert {message.request_id for message in world.controller.got("command_result")} == {"r-k1"}
    await agent.live(40)
    assert world.bridge.outbox.empty


async def test_a_result_is_sent_again_although_the_disk_refuses_to_store_that(world: World) -> None:
    agent = await answered(world, "k1")
    await agent.live(40)
    world.store.failing = no_outbox
    world.controller.push("k1")
    await world.settle()
    assert sent(world, "k1") == 2
    assert world.controller.results("k1")[1]["output"] == "done"
    await agent.live(40)
    world.controller.push("k1")
    await world.settle()
    assert sent(world, "k1") == 3, "it is not taken for one on its way"


async def test_results_that_were_never_sent_are_known_by_owner(make_world: MakeWorld) -> None:
    world = await make_world()
    agent = await answered(world, "k1")
    owner, outbox = world.session(agent.cluster_id).key.owner, world.bridge.outbox
    assert not outbox.unsent_for(owner), "it was sent, and is not confirmed yet"
    await agent.live(40)
    assert not outbox.unsent_for(owner)
    world.controller.go_away()
    await world.settle()
    await agent.result("k2")
    await world.settle()
    assert outbox.unsent_for(owner)
    assert not outbox.unsent_for("somebody else")
    await world.restart()
    assert world.bridge.outbox.unsent_for(owner), "what an earlier process stored was not read yet"
    world.controller.come_back()
    await agent.live(40)
    assert sent(world, "k2") == 1
    assert not world.bridge.outbox.unsent_for(owner)


async def test_a_report_that_is_not_stored_waits_for_a_connection_of_its_owner(world: World) -> None:
    agent = await answered(world)
    world.controller.push("k1", ttl_seconds=10)
    await world.settle()
    world.controller.go_away()
    world.store.fail()
    await agent.live(15)
    owner = world.session(agent.cluster_id).key.owner
    assert world.bridge.outbox.unsent_for(owner)
    assert not world.bridge.outbox.unsent_for("somebody else")
    world.controller.come_back()
    await agent.live(10)
    assert not world.bridge.outbox.unsent_for(owner)
    world.store.heal()
    await agent.live(60)
    assert world.bridge.outbox.empty, "its arrival is noticed like that of a stored one"


async def test_a_report_of_the_shim_names_command_agent_and_reason(world: World) -> None:
    agent = await answered(world)
    world.controller.socket.says(
        "command", {"command_id": "k1", "type": "t", "cluster_id": agent.cluster_id, "ttl_seconds": 0}, "r-77"
    )
    await world.settle()
    [message] = world.controller.got("command_result")
    timestamp = message.payload["timestamp"]
    assert message.request_id == "r-77"
    assert message.payload == {
        "command_id": "k1",
        "cluster_id": agent.cluster_id,
        "agent_id": agent.agent_id,
        "success": False,
        "code": "expired",
        "error": "it had expired before it arrived",
        "timestamp": timestamp,
    }
    assert parse_rfc3339(timestamp) == pytest.approx(world.clock.wall_s(), abs=1)
    traced = TraceEntry(world.clock.wall_s(), "reported", "expired")
    assert AddTrace(world.session(agent.cluster_id).key, ("k1",), traced) in world.store.log
    assert world.metric("commands_total", event="expired") == 1
    world.controller.push("k2", cluster_id="nobody")
    await world.settle()
    assert world.metric("commands_total", event="rejected_unknown_agent") == 1
    assert world.metric("commands_total", event="expired") == 1


async def test_the_time_of_a_result_from_its_agent_to_the_controller_is_measured_once(world: World) -> None:
    await world.pass_s(500.0)
    agent = await answered(world, "k1")
    world.controller.socket.lose()
    await agent.live(10)
    assert sent(world, "k1") == 2
    assert world.metric("message_latency_seconds_count", direction="up") == 1
    assert world.metric("message_latency_seconds_sum", direction="up") < 1
    assert len(world.bridge.outbox._in_flight) == 1, "nothing is kept of the connection that is closed"


async def test_a_result_goes_up_with_the_cluster_id_that_the_controller_uses_now(world: World) -> None:
    agent = await answered(world)
    world.controller.go_away()
    await world.settle()
    await agent.result("k1", cluster_id="the agent's own")
    session = world.session(agent.cluster_id)
    world.bridge.ctx.sessions.set_upstream_id(session, "c-new")
    world.controller.come_back()
    await agent.live(10)
    assert world.controller.results("k1")[0]["cluster_id"] == session.upstream_cluster_id != "the agent's own"


@pytest.mark.parametrize("stored", [True, False])
async def test_the_end_of_a_command_without_its_agents_result_is_reported(world: World, stored: bool) -> None:
    agent = await answered(world)
    session, outbox = world.session(agent.cluster_id), world.bridge.outbox
    if not stored:
        world.store.fail()
    world.store.log.clear()
    wall_s = world.clock.wall_s()
    outbox.report_failure(session.key, session, "k1", "r-1", code="malformed", error="it could not be read")
    await world.settle()
    [message] = world.controller.got("command_result")
    assert message.request_id == "r-1"
    assert (message.payload["agent_id"], message.payload["cluster_id"]) == (agent.agent_id, agent.cluster_id)
    assert (message.payload["command_id"], message.payload["code"]) == ("k1", "malformed")
    assert message.payload["error"] == "it could not be read"
    assert (len(outbox) == 1) is stored
    if stored:
        assert [each.command_id for each in world.store.log if isinstance(each, PutOutbox)] == ["k1"]
        traced = AddTrace(session.key, ("k1",), TraceEntry(wall_s, "reported", "malformed"))
        assert [each for each in world.store.log if isinstance(each, AddTrace)] == [traced]
    else:
        assert max(outbox._unpersisted) < 0, "its number is none of a stored result"
    outbox.start_sending(session.key.owner)
    await world.settle()
    assert sent(world, "k1") == 1, "this connection has carried it"
    world.store.heal()
    await agent.live(40)
    assert outbox.empty


async def test_an_end_that_the_disk_refuses_is_told_with_the_request_of_its_command(world: World) -> None:
    agent = await answered(world)
    world.controller.push("k1", ttl_seconds=10)
    await world.settle()
    world.store.fail()
    await agent.live(15)
    assert [message.request_id for message in world.controller.got("command_result")] == ["r-k1"]


async def test_results_of_a_superseded_session_are_outstanding_for_its_successor(world: World) -> None:
    world.controller.manners.acks = world.controller.manners.pongs = False
    agent = await answered(world, "k1", "k2")
    source, outbox = world.session(agent.cluster_id).key, world.bridge.outbox
    target = SessionKey(source.owner, "cluster", "c-new")
    outbox.move(source, target)
    assert dict(outbox._outstanding) == {(target, "k1"): 1, (target, "k2"): 1}


async def test_a_command_that_comes_again_does_not_repeat_a_result_of_an_earlier_process_on_its_way(
    world: World,
) -> None:
    agent = await answered(world)
    world.controller.push("k1")
    await world.settle()
    await agent.poll()
    world.controller.go_away()
    await world.settle()
    await agent.result("k1")
    await world.restart()
    world.controller.manners.acks = world.controller.manners.pongs = False
    world.controller.come_back()
    await agent.live(10)
    assert sent(world, "k1") == 1
    world.controller.push("k1")
    await world.settle()
    assert sent(world, "k1") == 1
