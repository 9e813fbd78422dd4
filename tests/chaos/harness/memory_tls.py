"""TLS in memory: the test's end of a connection whose records are cut anywhere on their way."""

from __future__ import annotations

import asyncio
import ssl
from asyncio.sslproto import SSLProtocol
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from random import Random
from typing import Any

from tests.chaos.harness.http_requests import pieces_of
from tests.chaos.harness.memory_transport import MemoryTransport


def client_context() -> ssl.SSLContext:
    """Return a client's context that accepts every certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def secured(
    protocol: asyncio.Protocol, context: ssl.SSLContext, waiter: asyncio.Future[None] | None = None
) -> SSLProtocol:
    """Return asyncio's TLS around one of the shim's protocols, as a server or a client by the kind of the context."""
    server_side = context.protocol is ssl.PROTOCOL_TLS_SERVER
    return SSLProtocol(asyncio.get_running_loop(), protocol, context, waiter, server_side=server_side)


class _TappedTransport(MemoryTransport):
    """A transport that reports all that the shim writes."""

    def __init__(self, protocol: Any, on_write: Callable[[], None]) -> None:
        self._on_write = on_write
        super().__init__(protocol)

    def write(self, data: Any) -> None:
        super().write(data)
        self._loop.call_soon(self._on_write)


class TlsEnd:
    """The test's end of a TLS connection, with the interface of `MemoryTransport` in plaintext.

    Each piece that is sent becomes at least one record. The bytes of the records of a segment are cut anew, and arrive
    at once or in several turns of the event loop.
    """

    def __init__(self, protocol: SSLProtocol, context: ssl.SSLContext, rng: Random) -> None:
        """Connect to the shim's end; `context` is for this end.

        `rng` is none of hypothesis, which requires that the same numbers are drawn again: a handshake's size is random.
        """
        self.written = bytearray()
        self._loop, self._rng = asyncio.get_running_loop(), rng
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        server_side = context.protocol is ssl.PROTOCOL_TLS_SERVER
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._queue: deque[bytes] = deque()
        self._taken_bytes = 0
        self._opened = asyncio.Event()
        self._closed = False
        self._transport = _TappedTransport(protocol, self._take)
        self._take()

    async def handshake(self) -> None:
        """Wait until the connection is open at both ends."""
        await self._opened.wait()

    def send(self, pieces: Iterable[bytes]) -> None:
        """Send pieces of plaintext."""
        if not self._closed:
            for piece in pieces:
                self._tls.write(piece)
            self._flush()

    def hang_up(self) -> None:
        """Close the connection as clients do: with a close alert, then FIN."""
        if not self._closed:
            self._closed = True
            with suppress(ssl.SSLError):  # the peer has not sent its own alert
                self._tls.unwrap()
            self._flush()
        self._transport.send(self._queue)
        self._queue.clear()
        self._transport.hang_up()

    def is_closing(self) -> bool:
        """Return True if the shim has closed the connection."""
        return self._closed or self._transport.is_closing()

    def _take(self) -> None:
        """Read what the shim has written."""
        written = self._transport.written
        self._incoming.write(bytes(written[self._taken_bytes :]))
        self._taken_bytes = len(written)
        try:
            if not self._opened.is_set():
                self._tls.do_handshake()
                self._opened.set()
            while data := self._tls.read():
                self.written += data
            raise ssl.SSLZeroReturnError
        except ssl.SSLWantReadError:
            self._flush()
        except ssl.SSLZeroReturnError:
            self._loop.call_soon(self.hang_up)

    def _flush(self) -> None:
        records = self._outgoing.read()
        if records:
            waits = bool(self._queue)
            self._queue.extend(pieces_of(records, self._rng))
            if not waits:
                self._deliver()

    def _deliver(self) -> None:
        while self._queue:
            self._transport.send([self._queue.popleft()])
            if self._queue and self._rng.random() < 0.5:
                self._loop.call_soon(self._deliver)
                return
