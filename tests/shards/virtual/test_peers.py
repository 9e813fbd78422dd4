"""An agent's calls on one replica, its link on another: what is lost, late or dead on the way between them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from shim.core.calls import Accepted, Commands, Failed, PollCall, RegisterCall, StatusCall
from shim.messages import Message
from shim.ports import Client
from shim.shards.relay import RemoteLease
from shim.shards.wire import Answered, Ask, encode, pack
from tests.support.peers import Peers
from tests.support.world import settings

POLL = {"hold": 20, "max_hold_s": 20, "max_bytes": 1_048_576}


@pytest_asyncio.fixture
async def peers() -> AsyncIterator[Peers]:
    made = Peers(settings(poll=POLL, commands={"evidence_s": 60}))
    await made.settle()
    await made.register()
    await made.heartbeat()
    await made.settle()
    yield made
    await made.close()


async def offered(peers: Peers, command: str) -> Any:
    """A poll's answer with this command."""
    poll = peers.poll()
    await peers.settle()
    peers.controller.push(command, cluster_id=peers.cluster_id)
    answer = await poll
    assert [each.id for each in answer.outcome.commands] == [command]
    assert isinstance(answer.lease, RemoteLease)
    return answer


async def test_a_held_poll_is_woken_at_the_owner_and_the_next_request_is_evidence(peers: Peers) -> None:
    answer = await offered(peers, "c-1")
    peers.asker.replicas.written(answer.lease)
    peers.asker.replicas.next_request(peers.client.connection)
    assert isinstance(await peers.result("c-1"), Accepted)
    assert await peers.trace("c-1") == ["arrived", "offered", "delivered", "result"]


async def test_a_later_poll_is_evidence_once_the_owners_clock_is_known(peers: Peers) -> None:
    answer = await offered(peers, "c-1")
    peers.asker.replicas.written(answer.lease)
    await peers.pass_s(1.0)
    peers.poll()
    await peers.settle()
    assert (await peers.trace("c-1"))[-1] == "delivered"


async def test_a_connection_that_closed_cleanly_has_been_read_by_the_next_poll(peers: Peers) -> None:
    for command, clean in (("c-1", True), ("c-2", False)):
        answer = await offered(peers, command)
        peers.asker.replicas.written(answer.lease)
        peers.asker.replicas.connection_closed(peers.client.connection, clean)
        poll = peers.poll()
        await peers.settle()
        assert ("delivered" in await peers.trace(command)) == clean
        poll.cancel()
        await peers.settle()


async def test_what_was_not_written_waits_again_at_once(peers: Peers) -> None:
    answer = await offered(peers, "c-1")
    peers.asker.replicas.unwritten(answer.lease)
    await peers.settle()
    assert (await peers.trace("c-1"))[-1] == "requeued"
    assert [each.id for each in (await peers.poll()).outcome.commands] == ["c-1"]


async def test_an_agent_that_hangs_up_frees_its_poll_at_the_owner(peers: Peers) -> None:
    poll = peers.poll()
    await peers.settle()
    assert peers.shard.bridge.delivery.held() == 1
    poll.cancel()
    await peers.settle()
    assert peers.shard.bridge.delivery.held() == 0
    assert len(peers.asker.relay) == 0


async def test_an_agent_that_hangs_up_just_as_the_answer_comes_has_got_nothing(peers: Peers) -> None:
    poll = peers.poll()
    await peers.settle()
    peers.net.swallows = True  # the agent's leaving crosses the offer
    poll.cancel()
    await peers.settle()
    peers.net.swallows = False
    peers.controller.push("c-1", cluster_id=peers.cluster_id)
    await peers.settle()
    assert await peers.trace("c-1") == ["arrived", "offered", "requeued"]


async def test_a_reply_that_reaches_nobody_was_no_attempt(peers: Peers) -> None:
    peers.poll()
    await peers.settle()
    peers.net.dead.add("asker")
    peers.controller.push("c-1", cluster_id=peers.cluster_id)
    await peers.settle()
    assert await peers.trace("c-1") == ["arrived", "offered", "requeued"]


async def test_a_reply_whose_fate_nobody_tells_is_in_doubt(peers: Peers) -> None:
    peers.poll()
    await peers.settle()
    peers.net.swallows = True
    peers.controller.push("c-1", cluster_id=peers.cluster_id)
    await peers.pass_s(9.0)
    assert (await peers.trace("c-1"))[-1] == "offered"
    await peers.pass_s(2.0)
    assert (await peers.trace("c-1"))[-1] == "uncertain"


@pytest.mark.parametrize("written", [True, False])
async def test_a_replica_that_dies_takes_its_evidence_with_it(peers: Peers, written: bool) -> None:
    answer = await offered(peers, "c-1")
    if written:
        peers.asker.replicas.written(answer.lease)
        await peers.settle()
    held = peers.poll()
    await peers.settle()
    for _ in range(3):
        await peers.pass_s(2.0)
        peers.announce(living=("owner",))
    peers.owner.table.forget()
    peers.owner.ears.look()
    await peers.pass_s(0.1)
    assert (await peers.trace("c-1"))[-1] == "uncertain"
    assert peers.shard.bridge.delivery.held() == 0
    held.cancel()


async def test_the_owner_dies_and_calls_wait_for_the_next_one(peers: Peers) -> None:
    poll = peers.poll()
    await peers.settle()
    peers.net.dead.add("owner")
    for _ in range(3):
        await peers.pass_s(2.0)
        peers.announce(living=("asker",), holder="")
    peers.asker.table.forget()
    peers.asker.ears.look()
    await peers.settle()
    assert not poll.done(), "it waits for the next owner"
    assert isinstance(await peers.heartbeat(), Accepted)
    shard = peers.own(peers.asker)
    peers.announce(living=("asker",), holder="asker")
    await peers.settle()
    await peers.pass_s(0.5)
    assert shard.bridge.delivery.held() == 1
    poll.cancel()


async def test_without_an_owner_nothing_is_made_up(peers: Peers) -> None:
    peers.announce(holder="")
    poll = peers.poll()
    result = peers.loop.create_task(peers.result("c-1"))
    status = StatusCall("agents", peers.target, {"pods": []})
    register = RegisterCall("clusters_agent", "pod-1", "prod", {"agent_id": "pod-1", "name": "prod"})
    others = [
        peers.loop.create_task(peers.asker.replicas.call(peers.client, call, peers.loop.time()))
        for call in (status, register)
    ]
    before = peers.loop.time()
    assert isinstance(await peers.heartbeat(), Accepted)
    assert peers.loop.time() - before < 1.0
    for _ in range(6):
        await peers.pass_s(2.0)
        peers.announce(holder="")
    assert (await poll).outcome == Commands((), 5)
    assert (await result).status == 503
    assert (await result).retry_after_s
    assert isinstance((await others[0]).outcome, Accepted)
    assert (await others[1]).outcome.status == 503
    peers.settings = settings(poll=POLL, heartbeat={"when_link_down": "fail"})
    assert (await peers.heartbeat()).status == 503


async def test_an_answer_that_does_not_come_is_not_waited_for(peers: Peers) -> None:
    peers.net.swallows = True
    before = peers.loop.time()
    assert isinstance(await peers.heartbeat(), Accepted)
    assert peers.loop.time() - before < 2.0
    assert (await peers.result("c-1")).status == 503
    assert len(peers.asker.relay) == 0


async def test_a_lost_connection_to_nats_ends_what_is_under_way(peers: Peers) -> None:
    result = peers.loop.create_task(peers.result("c-1"))
    await asyncio.sleep(0)
    peers.asker.bus.is_up = False
    peers.asker.ears.down()
    assert (await result).status == 503


async def test_an_owner_without_nats_takes_its_offer_back(peers: Peers) -> None:
    peers.poll()
    await peers.settle()
    peers.owner.bus.is_up = False
    peers.controller.push("c-1", cluster_id=peers.cluster_id)
    await peers.settle()
    assert await peers.trace("c-1") == ["arrived", "offered", "requeued"]


async def test_a_lease_that_ended_meanwhile_takes_the_offer_back(peers: Peers) -> None:
    local = peers.owner.replicas.call(
        Client(peers.client.token, 3), PollCall("clusters_agent", peers.target), peers.loop.time()
    )
    task = peers.loop.create_task(local)
    await peers.settle()
    peers.shard.term.end()
    peers.controller.push("c-1", cluster_id=peers.cluster_id)
    answer = await task
    assert answer.outcome == Commands((), 5)
    assert answer.lease is None


async def test_a_shard_that_is_not_here_is_not_served(peers: Peers) -> None:
    peers.shard.serving = False
    poll = peers.poll()
    await peers.pass_s(11.0)
    assert (await poll).outcome == Commands((), 5)


async def test_calls_and_replies_of_any_size_are_relayed(peers: Peers) -> None:
    peers.poll()
    await peers.settle()
    peers.controller.push("c-1", cluster_id=peers.cluster_id, payload={"text": "x" * 200_000})
    await peers.settle()
    assert (await peers.trace("c-1"))[-1] == "offered"
    huge = StatusCall("agents", peers.target, {"text": "x" * 5_000_000})
    answer = await peers.asker.replicas.call(peers.client, huge, peers.loop.time())
    assert isinstance(answer.outcome, Failed)
    assert answer.outcome.status == 413


async def test_messages_that_make_no_sense_are_dropped(peers: Peers) -> None:
    ears = peers.owner.ears
    kind, body = pack(Accepted())
    for said in (
        Ask(1, 0, b"t", 1, None, "nothing", body),
        Answered(99, 0.0, kind, body, 5),
        Answered(99, 0.0, "poll", body),
    ):
        for message in encode("asker", said, 1, 65_536):
            ears.message(message)
    ears.message(b"nonsense")
    ears.unreachable("a99")
    ears.unreachable("l99")
    await peers.settle()
    assert isinstance(await peers.heartbeat(), Accepted)


async def test_an_answer_that_cannot_be_read_counts_as_lost(peers: Peers) -> None:
    peers.net.swallows = True
    result = peers.loop.create_task(peers.result("c-1"))
    await peers.settle()
    peers.net.swallows = False
    (number,) = peers.asker.relay._pending
    _, body = pack(Accepted())
    for message in encode("owner", Answered(number, 0.0, "commands", body, 5), 1, 65_536):
        peers.asker.ears.message(message)
    assert (await result).status == 503


async def test_the_next_owner_is_told_of_living_agents(peers: Peers) -> None:
    run = peers.spawn("vouching", peers.asker.vouching.run())
    await peers.settle()
    stored = peers.shard.recent
    peers.shard.stop()
    peers.announce(holder="")
    await peers.pass_s(2.0)
    registered = len(peers.controller.got("register"))
    shard = peers.own(peers.owner)
    del stored
    session = next(iter(peers.shard.bridge.sessions))
    shard.bridge.sessions.add(type(session)(session.key, session.dialect))
    (fresh,) = shard.bridge.sessions
    fresh.registration, fresh.reply = session.registration, session.reply
    fresh.upstream_cluster_id = session.upstream_cluster_id
    peers.announce()
    await peers.pass_s(2.0)
    assert len(peers.controller.got("register")) == registered + 1
    assert fresh.contact_at is not None
    assert fresh.contact_at <= peers.loop.time() - 2.0
    run.cancel()


async def test_the_fence_lets_nothing_out(peers: Peers) -> None:
    sent = len(peers.controller.got("heartbeat"))
    socket = next(iter(peers.shard._fence.sockets))
    peers.shard.term.end()
    socket.send(Message("heartbeat", {}))
    socket.ping(b"x")
    peers.shard._fence.dial(peers.controller.dials[0].spec, None, lambda _: None)  # type: ignore[arg-type]
    await peers.settle()
    assert len(peers.controller.got("heartbeat")) == sent
    assert not list(peers.controller.open_sockets())
    peers.shard.cut()


async def test_who_waits_for_a_command_hears_of_every_replica(peers: Peers) -> None:
    await offered(peers, "c-1")
    assert [each["id"] for each in await peers.asker.lookup.everywhere("c-1")] == ["c-1"]
    assert [each["id"] for each in await peers.owner.lookup.everywhere("c-1")] == ["c-1"]
    peers.net.swallows = True
    assert await peers.asker.lookup.everywhere("c-1") == []
