"""Connections to other replicas: replies cut into pieces anywhere, bodies in pieces, losses at any moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("cryptography")

from shim.agent_api.internal import Note, note
from shim.cluster.connection_pool import (
    MAX_UNANSWERED,
    ConnectionPool,
    HeartbeatConnection,
    ReplicaConnection,
    ReplicaLost,
    ReplicaReply,
)
from shim.core.shards import Member
from shim.errors import AgentError
from tests.support.replicas import any_certificate, gateway

CASES = {
    b"HTTP/1.1 204 No Content\r\nDate: now\r\n\r\n": (204, b""),
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello": (200, b"hello"),
    b"HTTP/1.1 503 \r\nContent-Length: 0\r\n\r\n": (503, b""),
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\n\r\n": (
        200,
        b"abc0123456789",
    ),
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n": (304, b""),
}
REQUEST = b"GET /x HTTP/1.1\r\nHost: replica\r\n\r\n"


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.paused = False
        self.ended = ""

    def write(self, data: Any) -> None:
        self.sent += bytes(data)

    def is_closing(self) -> bool:
        return bool(self.ended)

    def close(self) -> None:
        self.ended = self.ended or "closed"

    def abort(self) -> None:
        self.ended = "aborted"

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


def connected() -> tuple[ReplicaConnection, Wire, list[ReplicaConnection]]:
    lost: list[ReplicaConnection] = []
    connection, wire = ReplicaConnection("owner", lost.append), Wire()
    connection.connection_made(wire)
    return connection, wire, lost


async def exchanged(connection: ReplicaConnection, pieces: list[bytes], **options: Any) -> ReplicaReply:
    asked = asyncio.ensure_future(connection.exchange(REQUEST, **options))
    await asyncio.sleep(0)
    for piece in pieces:
        connection.data_received(piece)
    return await asked


@given(st.sampled_from(sorted(CASES)), st.data())
def test_a_reply_is_read_wherever_it_is_cut(reply: bytes, data: st.DataObject) -> None:
    pieces, rest = [], reply
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        pieces.append(rest[:size])
        rest = rest[size:]

    async def scenario() -> None:
        connection, wire, _ = connected()
        found = await exchanged(connection, pieces)
        assert (found.status, await found.read()) == CASES[reply]
        assert wire.sent == REQUEST
        assert connection.reusable

    asyncio.run(scenario())


async def test_a_head_request_has_no_body_whatever_its_length_says() -> None:
    connection, _, _ = connected()
    found = await exchanged(connection, [b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"], head_only=True)
    assert (await found.read(), found.header("content-length")) == (b"", "500")
    assert connection.reusable


async def test_a_body_without_a_length_ends_with_the_connection() -> None:
    connection, _, lost = connected()
    found = await exchanged(connection, [b"HTTP/1.1 200 OK\r\n\r\nso much"])
    assert found.length is None
    connection.connection_lost(None)
    assert await found.read() == b"so much"
    assert lost == [connection]
    assert not connection.reusable


@pytest.mark.parametrize("end", [None, ConnectionResetError()])
async def test_a_body_that_breaks_off_is_not_whole(end: Exception | None) -> None:
    connection, _, _ = connected()
    found = await exchanged(connection, [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"])
    reading = asyncio.ensure_future(found.read())
    await asyncio.sleep(0)
    connection.connection_lost(end)
    with pytest.raises(ReplicaLost) as lost:
        await reading
    assert lost.value.sent


async def test_a_body_with_a_bad_chunk_is_not_whole() -> None:
    connection, wire, _ = connected()
    found = await exchanged(connection, [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"])
    reading = asyncio.ensure_future(found.read())
    await asyncio.sleep(0)
    connection.data_received(b"no size\r\n")
    assert wire.ended
    connection.connection_lost(None)
    async with asyncio.timeout(60):
        with pytest.raises(ReplicaLost):
            await reading


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_a_reader_learns_that_the_pool_ended_the_connection(how: str) -> None:
    connection, wire, _ = connected()
    found = await exchanged(connection, [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"])
    getattr(connection, how)()
    assert wire.ended
    connection.connection_lost(None)
    with pytest.raises(ReplicaLost):
        await found.read()


@pytest.mark.parametrize(
    "bytes_in",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\n",
        b"x" * 70_000,
    ],
)
async def test_what_is_no_reply_is_refused(bytes_in: bytes) -> None:
    connection, _, _ = connected()
    with pytest.raises(ReplicaLost):
        await exchanged(connection, [bytes_in])
    assert not connection.reusable


async def test_a_connection_that_is_lost_before_the_reply_tells_that_the_request_was_sent() -> None:
    connection, _, _ = connected()
    asked = asyncio.ensure_future(connection.exchange(REQUEST))
    await asyncio.sleep(0)
    connection.connection_lost(ConnectionResetError())
    with pytest.raises(ReplicaLost) as lost:
        await asked
    assert lost.value.sent


async def test_bytes_that_nobody_asked_for_end_the_use_of_a_connection() -> None:
    connection, _, _ = connected()
    found = await exchanged(connection, [b"HTTP/1.1 204 No Content\r\n\r\n"])
    assert await found.read() == b""
    connection.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert not connection.reusable


async def test_a_body_in_pieces_is_sent_in_chunks() -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"one"
        yield b"and two"

    connection, wire, _ = connected()
    asked = asyncio.ensure_future(connection.exchange(REQUEST, body()))
    async with asyncio.timeout(30):
        while not wire.sent.endswith(b"0\r\n\r\n"):  # noqa: ASYNC110 - another task writes
            await asyncio.sleep(0)
    connection.data_received(b"HTTP/1.1 204 No Content\r\n\r\n")
    assert (await asked).status == 204
    assert wire.sent == REQUEST + b"3\r\none\r\n7\r\nand two\r\n0\r\n\r\n"
    assert connection.reusable


async def test_an_early_answer_ends_the_sending_and_the_use_of_the_connection() -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"one"
        await asyncio.Event().wait()

    connection, _, _ = connected()
    asked = asyncio.ensure_future(connection.exchange(REQUEST, body()))
    await asyncio.sleep(0)
    connection.data_received(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
    assert (await asked).status == 413
    assert not connection.reusable


async def test_a_fault_of_the_agents_body_is_the_agents() -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"one"
        raise AgentError(413, "the body is too large")

    connection, _, _ = connected()
    with pytest.raises(AgentError) as refused:
        await connection.exchange(REQUEST, body())
    assert refused.value.status == 413
    assert not connection.reusable


async def test_a_note_is_sent_unless_the_connection_is_gone() -> None:
    connection, wire, _ = connected()
    connection.notify(Note.WRITTEN)
    assert wire.sent == note(Note.WRITTEN)
    connection.connection_lost(None)
    connection.notify(Note.NEXT)
    assert wire.sent == note(Note.WRITTEN)


async def test_heartbeats_are_answered_in_their_order_wherever_the_replies_are_cut() -> None:
    ended: list[bool] = []
    connection, wire = HeartbeatConnection(lambda: ended.append(True)), Wire()
    connection.connection_made(wire)
    found: list[bytes | None] = []
    for number in range(3):
        connection.send(b"request %d;" % number, found.append)
    await asyncio.sleep(0)
    assert wire.sent == b"request 0;request 1;request 2;"
    replies = [b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.1 400 Bad\r\ncontent-length: 2\r\n\r\n{}"]
    for byte in b"".join(replies):
        connection.data_received(bytes([byte]))
    assert found == replies
    connection.connection_lost(None)
    assert found == [*replies, None]
    assert ended == [True]
    assert not connection.has_room


async def test_too_many_heartbeats_without_a_reply_need_another_way() -> None:
    connection = HeartbeatConnection(lambda: None)
    connection.connection_made(Wire())
    for _ in range(MAX_UNANSWERED):
        assert connection.has_room
        connection.send(b"", lambda _: None)
    assert not connection.has_room


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", ""])
async def test_a_replica_that_cannot_be_reached_was_sent_nothing(address: str) -> None:
    pool, member = ConnectionPool(), Member("gone", "gone", address, "fingerprint")
    with pytest.raises(ReplicaLost) as lost:
        await pool.acquire(member)
    assert not lost.value.sent
    await pool.open_heartbeats(member)
    assert pool.heartbeats("gone") is None


# --- on real processes ----------------------------------------------------------------------------------------------


@pytest.mark.needs("postgresql")
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "first",
    [
        b"GET /api/v1/health HTTP/1.1\r\nHost: x\r\n\r\n",
        b"NOTIFY /join HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong\r\n\r\n",
        b"NOTIFY /join HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /operate HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
    ],
)
async def test_who_is_no_member_is_cut_off(tmp_path: Path, pg_url: str, first: bytes) -> None:
    async with gateway(tmp_path, pg_url) as gate:
        (a,) = await gate.add("a")
        host, _, port = (await a.event("serving"))["cluster"].rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port), ssl=any_certificate())
        writer.write(first + b"GET /api/v1/health HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(60):
            with suppress(ConnectionError):  # a reset says the same
                assert await reader.read() == b""
        writer.close()
