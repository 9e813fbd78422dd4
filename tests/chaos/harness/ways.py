"""The same bytes on a connection in different ways: whole, cut, byte by byte, behind and before other requests."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

from shim.agent_api import AgentServer
from tests.chaos.harness.http_requests import pieces_of
from tests.chaos.harness.memory_tls import TlsEnd, client_context, secured
from tests.chaos.harness.memory_transport import MemoryTransport

OVER_S = 30.0  # virtual: longer than an unfinished request or an unread reply is waited for
TURNS = 40
"""Turns of the event loop in which everything happens that needs no time."""
LONGEST_BYTE_BY_BYTE = 1500

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_HEAD = re.compile(rb"(HTTP/\d\.\d [^\r\n]*)\r\n((?:[^\r\n]+\r\n)*)\r\n")
_GENERATED = re.compile(rb"Date: .*|X-Request-Id: [0-9a-f]{8}-[0-9a-f]+")
# The refusal of a request that cannot be read, without what differs between the two reasons.
_LINE_TOO_LONG = re.compile(
    rb"HTTP/1\.1 (431 [^\r]*|400 Bad Request)((?:\r\n[^\r\n]+)*?)\r\nContent-Length: \d+((?:\r\n[^\r\n]+)*)\r\n\r\n"
    rb'(\{[^}]*"error":")(malformed request|a line of the request is too long)"'
)
_MALFORMED = rb'HTTP/1.1 400 Bad Request\2\3\r\n\r\n\4malformed request"'

Segments = list[list[bytes]]
"""Pieces that arrive together, before the server has done anything; then it does all it can, and the next arrive."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of requests: the bytes that came back on a connection, and their effects in the server."""

    replies: bytes
    closed: bool
    effects: tuple[Any, ...]

    @property
    def calls(self) -> list[Any]:
        """The calls among the effects."""
        return [effect for effect in self.effects if effect[0] == "call"]


class Peer:
    """A client of a server in memory. `effects` takes what the server has done since the last time."""

    def __init__(self, connect: Callable[[], asyncio.Protocol], effects: Callable[[], tuple[Any, ...]]) -> None:
        self.connect = connect
        self.effects = effects

    async def _open(self) -> MemoryTransport | TlsEnd:
        """Return the client's end of a new connection."""
        return MemoryTransport(self.connect())

    async def play(self, segments: Segments) -> Outcome:
        """Send segments on a connection of their own, wait until nothing follows, and hang up."""
        self.effects()
        transport = await self._open()
        for segment in segments:
            transport.send(segment)
            for _ in range(TURNS):
                await asyncio.sleep(0)
        await asyncio.sleep(OVER_S)
        closed = transport.is_closing()
        transport.hang_up()
        await asyncio.sleep(OVER_S)
        return Outcome(_normalised(bytes(transport.written)), closed, self.effects())


class TlsPeer(Peer):
    """A client of the same server by TLS."""

    def __init__(self, peer: Peer, context: ssl.SSLContext, rng: Random) -> None:
        super().__init__(peer.connect, peer.effects)
        self._context, self._rng = context, Random(rng.getrandbits(32))

    async def _open(self) -> TlsEnd:
        end = TlsEnd(secured(self.connect(), self._context), client_context(), self._rng)
        await end.handshake()
        return end


def _normalised(replies: bytes) -> bytes:
    """Return replies without interim ones, and with sorted headers of which none depends on time.

    A line that is too long and malformed behind its limit is one or the other: it depends on the cut what the parser
    sees first.
    """

    def sort(head: re.Match[bytes]) -> bytes:
        lines = sorted(line for line in head[2].split(b"\r\n") if line and not _GENERATED.fullmatch(line))
        return b"\r\n".join([head[1], *lines, b"", b""])

    return _LINE_TOO_LONG.sub(_MALFORMED, _HEAD.sub(sort, replies.replace(_CONTINUE, b"")))


@asynccontextmanager
async def serving(server: AgentServer, effects: Callable[[], tuple[Any, ...]]) -> AsyncIterator[Peer]:
    """A peer of a server in memory."""
    unused = socket.socket()
    unused.setblocking(False)
    unused.bind(("127.0.0.1", 0))
    server._sockets = [unused]  # otherwise a thread would look the address up, which has no place in virtual time
    await server.start()
    assert server._web is not None
    try:
        yield Peer(server._web, effects)
    finally:
        await server.stop(0)


def one_by_one(requests: Iterable[bytes]) -> Segments:
    """Each request whole, after the one before it was answered."""
    return [[request] for request in requests]


def cut_one_by_one(requests: Iterable[bytes], rng: Random) -> Segments:
    """Each request in pieces, after the one before it was answered."""
    return [[piece] for request in requests for piece in pieces_of(request, rng)]


def pipelined(requests: list[bytes], rng: Random) -> Iterator[tuple[str, Segments]]:
    """All requests without waiting for an answer, joined and cut in many ways."""
    joined = b"".join(requests)
    yield "joined", [[joined]]
    yield "one after the other at once", [requests]
    yield "cut", [pieces_of(joined, rng)]
    yield "cut, with time in between", [[piece] for piece in pieces_of(joined, rng)]
    if len(joined) <= LONGEST_BYTE_BY_BYTE:
        yield "byte by byte", [[bytes([byte]) for byte in joined]]
