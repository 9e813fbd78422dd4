"""Commands that are refused on arrival: told at once, not stored, traced within bounds.

Rules: docs/reference/protocol.md#3-commands.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import pytest

from shim.bridge.outbox import LOGGED_PER_MINUTE, MAX_UNPERSISTED, MAX_UNTRACED
from shim.core.agent_calls import TunnelState
from shim.core.bounds import FREE_KEPT_BYTES, MAX_ALL_KEPT_BYTES, MAX_REQUEST_ID_CHARS
from shim.core.command_queue import ARRIVING_COMMANDS, MAX_ARRIVING_BYTES
from shim.core.records import AddTrace, LookUpCommand, PutCommand, PutOutbox
from shim.protocol.controller_replies import register_reply
from shim.protocol.upstream_message import encode
from tests.bridge.conftest import MakeWorld
from tests.bridge.test_delivery import codes, given, living
from tests.support.world import World


def stored(world: World, command_id: str) -> list[type[Any]]:
    """The operations about a command that wrote something, apart from its trace."""
    found = []
    for operation in world.store.log:
        match operation:
            case PutCommand(record=record) if record.id == command_id:
                found.append(PutCommand)
            case PutOutbox(command_id=named) if named == command_id:
                found.append(PutOutbox)
    return found


@pytest.mark.parametrize(
    "payload, code",
    [
        ({"ttl_seconds": 0}, "expired"),
        ({"expires_at": "2001-01-01T00:00:00Z"}, "expired"),
        ({"payload": {"data": "x" * 3000}}, "queue_full"),
        ({"type": 5}, "malformed"),
        ({"type": "x" * 257}, "malformed"),
        ({"cluster_id": "nobody"}, "unknown_agent"),
        ({"cluster_id": "x" * 1_000_000}, "unknown_agent"),
    ],
)
async def test_what_is_refused_on_arrival_is_told_and_traced_but_not_stored(
    make_world: MakeWorld, payload: dict[str, Any], code: str
) -> None:
    world = await make_world(commands={"max_queued_bytes": 2048})
    await living(world)
    world.controller.push("k1", **payload)
    await world.settle()
    assert codes(world, "k1") == [code]
    assert stored(world, "k1") == []
    assert await world.trace("k1") == ["reported"]
    arriving = world.bridge.ctx.arriving
    assert (arriving.commands, arriving.size_bytes) == (0, 0)


async def test_what_was_answered_is_no_refusal_when_it_comes_again_expired(world: World) -> None:
    agent = await given(world, "k1")
    await agent.poll()
    await agent.result("k1")
    await agent.live(40)
    world.controller.push("k1", ttl_seconds=0)
    await world.settle()
    assert codes(world, "k1") == ["", ""], "the controller gets the result once more"


async def test_a_refusal_that_may_not_have_arrived_is_sent_on_the_next_connection(world: World) -> None:
    agent = await living(world)
    world.controller.manners.pongs = world.controller.manners.acks = False
    world.controller.push("k1", type=5)
    await world.settle()
    assert codes(world, "k1") == ["malformed"]
    world.controller.manners.pongs = world.controller.manners.acks = True
    world.controller.socket.lose()
    await agent.live(60)
    assert codes(world, "k1") == ["malformed", "malformed"], "once more, and then it is confirmed"


async def test_traces_of_a_flood_are_bounded_while_the_disk_is_busy(world: World) -> None:
    await living(world)
    world.store.slow = True
    for number in range(3 * MAX_UNTRACED):
        world.controller.push(f"k{number}", type=5)
    await world.settle()
    world.store.catch_up()
    await world.settle()
    traced = [name for each in world.store.log if isinstance(each, AddTrace) for name in each.ids]
    assert traced == ["k0", *(f"k{n}" for n in range(2 * MAX_UNTRACED, 3 * MAX_UNTRACED))]
    assert len(world.controller.got("command_result")) == 3 * MAX_UNTRACED, "each is told all the same"


async def test_the_memory_of_refusals_that_nobody_confirms_is_bounded(world: World) -> None:
    agent = await living(world)
    world.controller.manners.pongs = world.controller.manners.acks = False
    for number in range(MAX_UNPERSISTED + 5):
        world.controller.push(f"k{number}", type=5)
    await world.settle()
    world.controller.manners.pongs = world.controller.manners.acks = True
    world.controller.socket.lose()
    await agent.live(60)
    again = [number for number in range(MAX_UNPERSISTED + 5) if len(codes(world, f"k{number}")) == 2]
    assert again == list(range(5, MAX_UNPERSISTED + 5)), "the newest are sent once more"


async def test_the_log_of_a_flood_is_bounded(world: World, caplog: pytest.LogCaptureFixture) -> None:
    await living(world)
    for number in range(LOGGED_PER_MINUTE + 20):
        world.controller.push(f"k{number}", type=5)
    await world.settle()
    lines = [record for record in caplog.records if record.getMessage() == "command_rejected"]
    in_full = [record for record in lines if getattr(record, "dedupe_key", None) is None]
    assert len(in_full) == LOGGED_PER_MINUTE
    assert {getattr(record, "dedupe_key", "") for record in lines[LOGGED_PER_MINUTE:]} == {"malformed"}, "one a minute"
    caplog.clear()
    await world.pass_s(30 - world.now % 60 + 60)  # to the middle of the next minute
    for number in range(LOGGED_PER_MINUTE + 20):
        await world.pass_s(0.01)
        world.controller.push(f"l{number}", type=5)
    await world.settle()
    lines = [record for record in caplog.records if record.getMessage() == "command_rejected"]
    assert len([record for record in lines if getattr(record, "dedupe_key", None) is None]) == LOGGED_PER_MINUTE


async def test_a_waiting_command_that_comes_again_costs_no_look_at_the_disk(world: World) -> None:
    await given(world, "k1")
    before = len(world.store.log)
    for _ in range(100):
        world.controller.push("k1")
    await world.settle()
    assert world.metric("commands_total", event="duplicate") == 100
    assert not [each for each in world.store.log[before:] if isinstance(each, PutCommand | LookUpCommand)]


async def test_an_answered_command_that_comes_again_and_again_is_resent_once(world: World) -> None:
    agent = await given(world, "k1")
    await agent.poll()
    await agent.result("k1")
    await agent.live(40)
    for _ in range(100):
        world.controller.push("k1")
    await world.settle()
    assert stored(world, "k1").count(PutOutbox) == 1
    assert len(world.controller.results("k1")) == 2


async def test_a_disk_that_stands_still_fills_no_memory(make_world: MakeWorld) -> None:
    world = await make_world(commands={"max_queued_bytes": 2 * MAX_ARRIVING_BYTES, "max_queued": 10_000})
    await living(world)
    world.store.slow = True
    size_bytes = 1024 * 1024
    for number in range(MAX_ARRIVING_BYTES // size_bytes + 2):
        world.controller.push(f"k{number}", payload={"data": "x" * size_bytes})
    await world.settle()
    assert world.bridge.ctx.arriving.size_bytes < MAX_ARRIVING_BYTES + 2 * size_bytes
    refused = [result.payload["command_id"] for result in world.controller.got("command_result")]
    assert refused == [f"k{MAX_ARRIVING_BYTES // size_bytes}", f"k{MAX_ARRIVING_BYTES // size_bytes + 1}"]
    assert codes(world, refused[0]) == ["store_unavailable"]
    world.store.catch_up()
    await world.settle()
    assert (world.bridge.ctx.arriving.commands, world.bridge.ctx.arriving.size_bytes) == (0, 0)


async def test_thousands_that_expire_at_once_end_a_few_at_a_time(make_world: MakeWorld) -> None:
    world = await make_world(commands={"max_queued": 2000})
    agent = await living(world)
    for number in range(1000):
        world.controller.push(f"k{number}", ttl_seconds=20)
    await world.settle()
    turns: list[float] = []

    def count_turns() -> None:
        turns.append(world.metric("commands_total", event="expired"))
        if turns[-1] < 1000:
            world.loop.call_later(0, count_turns)

    world.loop.call_later(20, count_turns)
    await agent.live(25)
    assert turns[-1] == 1000
    assert max(after - before for before, after in pairwise(turns)) <= 128


async def test_a_request_id_without_end_is_refused_and_goes_back_in_part(world: World) -> None:
    await living(world)
    world.controller.socket.says("command", {"command_id": "k1"}, "r" * 1_000_000)
    await world.settle()
    [refusal] = world.controller.got("command_result")
    assert (refusal.payload["command_id"], refusal.payload["code"]) == ("k1", "malformed")
    assert refusal.request_id == "r" * MAX_REQUEST_ID_CHARS


@pytest.mark.parametrize("kind", ["ping", "tcp_tunnel_start", "proxy_request", "ws_start"])
async def test_ids_without_end_go_back_in_part(world: World, kind: str) -> None:
    await living(world)
    before = len(world.controller.socket.sent)
    world.controller.socket.says(kind, {"stream_id": "s" * 1_000_000}, "r" * 1_000_000)
    await world.settle()
    [answer] = [sent.message for sent in world.controller.socket.sent[before:]]
    assert len(encode(answer)) < 4096


async def test_unknown_types_are_remembered_in_part(world: World, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(3):
        world.controller.socket.says("x" * 1_000_000 + str(number))
    await world.settle()
    lines = [record for record in caplog.records if record.getMessage() == "unknown_type"]
    assert len(lines) == 1, "they differ where nobody looks"


async def test_a_tunnel_state_without_end_is_not_kept(world: World) -> None:
    agent = await living(world)
    world.controller.socket.says("tunnel_status", {"status": "ACTIVE", "poll_frequency": 7})
    world.controller.socket.says("tunnel_status", {"status": "ACTIVE", "credentials": "x" * 1_000_000})
    await world.settle()
    assert world.session("c-1").tunnel == {"status": "ACTIVE", "poll_frequency": 7}
    assert await agent.tunnel_poll() == TunnelState({"status": "ACTIVE", "poll_frequency": 7}, 5)


async def test_a_tunnel_state_of_many_values_is_not_kept(world: World) -> None:
    """A decoded value takes many times its bytes, and a state is kept for each agent."""
    agent = await living(world)
    world.controller.socket.says("tunnel_status", {"status": "ACTIVE", "forwards": [[]] * 5000})
    await world.settle()
    assert world.session("c-1").tunnel is None
    assert await agent.tunnel_poll() == TunnelState(None, 5)


async def test_the_tunnel_states_of_all_agents_share_one_bound(world: World) -> None:
    agents = [world.agent(agent_id=f"pod-{number}", name=f"n-{number}") for number in range(130)]
    for agent in agents:
        await agent.register()
    large = {"status": "REQUIRED", "credentials": "x" * 60_000}
    for agent in agents:
        world.controller.socket.says("tunnel_status", {**large, "cluster_id": agent.cluster_id})
    await world.settle()
    kept = [agent for agent in agents if world.session(agent.cluster_id).tunnel is not None]
    assert len(kept) == MAX_ALL_KEPT_BYTES // (len(msgspec.json.encode(large)) - FREE_KEPT_BYTES)
    # a small one always has room, also in place of a large one
    for agent in agents:
        world.controller.socket.says("tunnel_status", {"status": "IDLE", "cluster_id": agent.cluster_id})
    world.controller.socket.says("tunnel_status", {**large, "cluster_id": agents[-1].cluster_id})
    await world.settle()
    assert [world.session(agent.cluster_id).tunnel for agent in agents] == [{"status": "IDLE"}] * 129 + [large]


async def test_texts_without_end_in_a_register_reply_are_left_out() -> None:
    texts = dict.fromkeys(("name", "status", "tunnel_url", "api_server"), "x" * 1_000_000)
    assert register_reply({"cluster_id": "c-1", **texts}) == {"cluster_id": "c-1", "cluster_uuid": "c-1"}


async def test_commands_that_expire_at_once_do_not_pile_up_before_a_slow_disk(make_world: MakeWorld) -> None:
    world = await make_world(commands={"max_queued": 2000})
    agent = await living(world)
    for number in range(1000):
        world.controller.push(f"k{number}", ttl_seconds=20)
    await world.settle()
    world.store.slow = True
    await world.pass_s(21)
    ended = [each for each in world.store.log if isinstance(each, PutOutbox)]
    assert len(ended) == ARRIVING_COMMANDS, "what an agent posts now waits behind these only"
    world.store.catch_up()
    await agent.live(10)
    assert world.metric("commands_total", event="expired") == 1000
