"""The internal listener, called by another replica's connections: what their notes mean, and what silence means."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

pytest.importorskip("cryptography")

from shim.agent_api import Backends
from shim.agent_api.internal import (
    ARRIVAL_HEADER,
    CLOCK_HEADER,
    NOT_AT_ONCE,
    OPERATOR,
    RECEIPT_HEADER,
    ClusterListener,
    Note,
    arrival,
)
from shim.cluster.connection_pool import ConnectionPool, ReplicaConnection, ReplicaLost, make_identity
from shim.config.settings import Listen
from shim.core.call_records import RecentCalls
from shim.core.shards import Member
from shim.metrics import Metrics
from shim.protocol import dialects
from tests.support.frontend import Board, offering

SECRET = "the members' secret"
AGENT = "Authorization: Bearer t\r\n"


def request(line: str, *headers: str, body: bytes = b"") -> bytes:
    lines = [f"{line} HTTP/1.1", "Host: x", AGENT.strip(), *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


POLL = request("GET /api/v1/clusters/agent/c1/poll")
HEARTBEAT = request("POST /api/v1/clusters/agent/c1/heartbeat", body=b'{"status":"healthy"}')


class Owner:
    """The owner of all shards with an agent service by hand, and another replica's way to it."""

    def __init__(self, board: Board, member: Member) -> None:
        self.board = board
        self.member = member
        self.pool = ConnectionPool()
        self.operated: list[tuple[str, bytes]] = []
        self.refused_calls = RecentCalls()

    async def offered(self) -> ReplicaConnection:
        """A connection that carried a reply with commands."""
        connection = await self.pool.acquire(self.member)
        reply = await connection.exchange(POLL)
        assert reply.header(RECEIPT_HEADER.lower()) == "1"
        assert b"cmd-" in await reply.read()
        return connection


@asynccontextmanager
async def owner(*, owns: bool = True) -> AsyncIterator[Owner]:
    board, (context, fingerprint) = Board(), make_identity(0.0)
    board.script = offering()
    operated: list[tuple[str, bytes]] = []
    refused_calls = RecentCalls()

    async def operate(path: str, body: bytes) -> tuple[int, bytes]:
        operated.append((path, body))
        return 409, b'{"error":"no"}'

    listener = ClusterListener(
        Listen(port=0),
        Backends(board, board),
        dialects.load(),
        Metrics(CollectorRegistry()),
        context=context,
        secret=lambda: SECRET,
        owned=lambda token: owns and token == "t",
        operate=operate,
        refused_calls=refused_calls,
    )
    host, port = await listener.start()
    made = Owner(board, Member("owner", "owner", f"{host}:{port}", fingerprint))
    made.pool.secret, made.operated, made.refused_calls = SECRET, operated, refused_calls
    try:
        yield made
    finally:
        made.pool.close()
        await listener.stop()


@pytest.mark.parametrize(
    "notes, steps",
    [
        ((Note.UNWRITTEN,), ["unwritten"]),
        ((Note.WRITTEN, Note.NEXT), ["written", "next"]),
        ((Note.WRITTEN, Note.CLOSED_CLEANLY), ["written", "clean"]),
        ((Note.WRITTEN, Note.CLOSED), ["written", "reset"]),
    ],
)
async def test_a_note_is_the_evidence(notes: tuple[Note, ...], steps: list[str]) -> None:
    async with owner() as owning:
        connection = await owning.offered()
        for note in notes:
            connection.notify(note)
        await owning.board.until(steps[-1])
        assert owning.board.steps == ["call", *steps]
        # The end of the connection adds nothing, and a note about no reply is ignored.
        connection.notify(Note.NEXT)
        owning.pool.release(connection)
        await owning.offered()
        assert owning.board.steps == ["call", *steps, "call"]


@pytest.mark.parametrize("notes", [(), (Note.WRITTEN,)])
async def test_silence_at_the_end_of_the_connection_means_that_nobody_knows(notes: tuple[Note, ...]) -> None:
    async with owner() as owning:
        connection = await owning.offered()
        for note in notes:
            connection.notify(note)
            await owning.board.until("written")
        connection.abort()
        await owning.board.until("reset")
        assert owning.board.steps == ["call", "written", "reset"]
        assert owning.board.log[-1][2] is None


async def test_a_note_tells_until_when_the_agents_connection_was_open() -> None:
    async with owner() as owning:
        connection = await owning.offered()
        connection.notify_open(1.0)  # before the reply was written: of no meaning
        connection.notify(Note.WRITTEN)
        for impossible in (math.nan, math.inf, asyncio.get_running_loop().time() + 3600):
            connection.notify_open(impossible)
        connection.notify_open(12.5)
        await owning.board.until("open")
        assert owning.board.steps == ["call", "written", "open"]
        assert owning.board.log[-1][2] == 12.5
        connection.notify(Note.NEXT)
        connection.notify_open(13.5)  # nothing waits for it any more
        owning.pool.release(connection)
        await owning.offered()
        assert owning.board.steps == ["call", "written", "open", "next", "call"]


async def test_notes_that_came_before_the_end_count() -> None:
    async with owner() as owning:
        connection = await owning.offered()
        connection.notify(Note.WRITTEN)
        connection.notify(Note.CLOSED_CLEANLY)
        connection.close()
        await owning.board.until("clean")
        assert owning.board.steps == ["call", "written", "clean"]


async def test_a_forwarded_request_arrived_when_the_other_replica_says() -> None:
    async with owner() as owning:
        connection = await owning.pool.acquire(owning.member)
        now = asyncio.get_running_loop().time()
        for bound, latest in ((now - 50, now - 49), (None, float("-inf"))):
            # A poll that may have come before a reply is no evidence: the earlier bound counts.
            head = request("GET /api/v1/clusters/agent/c1/poll", f"{ARRIVAL_HEADER}: {arrival(2.0, bound)}")
            reply = await connection.exchange(head)
            await reply.read()
            connection.notify(Note.UNWRITTEN)
            assert owning.board.arrivals_s[-1] <= latest
            clock = float(reply.header(CLOCK_HEADER.lower()) or "nan")
            assert clock >= now


async def test_a_request_for_a_shard_of_another_replica_is_not_forwarded_again() -> None:
    async with owner(owns=False) as owning:
        connection = await owning.pool.acquire(owning.member)
        result = request("POST /api/v1/clusters/agent/c1/commands/c/result", body=b'{"success":true}')
        for whole in (POLL, result, HEARTBEAT):
            reply = await connection.exchange(whole)
            assert reply.status == 421
            await reply.read()
        assert owning.board.calls == []
        # No agent sees these replies: they must not appear among the calls of agents that were refused.
        assert owning.refused_calls.last_minute(asyncio.get_running_loop().time()) == []


async def test_heartbeats_of_many_agents_share_a_connection_and_polls_do_not() -> None:
    async with owner() as owning:
        owning.board.script = Board().script
        await owning.pool.open_heartbeats(owning.member)
        heartbeats = owning.pool.heartbeats("owner")
        assert heartbeats is not None
        loop = asyncio.get_running_loop()
        replies: list[asyncio.Future[bytes | None]] = [loop.create_future() for _ in range(3)]
        for sent, reply in zip((HEARTBEAT, HEARTBEAT, POLL.replace(b"GET", b"PUT")), replies, strict=True):
            heartbeats.send(sent, reply.set_result)
        async with asyncio.timeout(60):
            found: list[Any] = await asyncio.gather(*replies)
        assert [each[:12] for each in found[:2]] == [b"HTTP/1.1 200"] * 2
        owning.board.script = offering()  # it has to wait now, and is sent again in another way
        late = loop.create_future()
        heartbeats.send(HEARTBEAT, late.set_result)
        async with asyncio.timeout(60):
            assert (await late).startswith(NOT_AT_ONCE)


async def test_operators_requests_need_a_connection_of_their_own() -> None:
    async with owner() as owning:
        for_operators = ConnectionPool(OPERATOR)
        for_operators.secret = SECRET
        connection = await for_operators.acquire(owning.member)
        reply = await connection.exchange(request("POST /purge/c%2F1", body=b"{}"))
        assert (reply.status, await reply.read()) == (409, b'{"error":"no"}')
        assert owning.operated == [("/purge/c%2F1", b"{}")]
        ordinary = await owning.pool.acquire(owning.member)
        assert (await ordinary.exchange(request("POST /purge/c%2F1", body=b"{}"))).status == 404
        assert len(owning.operated) == 1
        for_operators.close()


async def test_without_the_secret_nothing_is_answered() -> None:
    async with owner() as owning:
        owning.pool.secret = "guessed"
        connection = await owning.pool.acquire(owning.member)
        with pytest.raises(ReplicaLost):
            await connection.exchange(POLL)
        assert owning.board.calls == []
