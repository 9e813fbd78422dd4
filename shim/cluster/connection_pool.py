"""Connections to other replicas' internal listeners: one request at a time on each, and notes about its reply.

A connection carries requests of different agents, one after another. A reply with commands pairs the connection with
the agent's connection that carries the reply. Until there is evidence of delivery, only notes are sent on a paired
connection: the owner identifies the reply by the connection on which a note arrives.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import ssl
import tempfile
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar, cast

from aiohttp import hdrs
from aiohttp.client_exceptions import ClientError, ClientPayloadError
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import RawResponseMessage, StreamWriter
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from shim.agent_api.internal import HEARTBEATS, Note, note
from shim.core.shards import Member
from shim.errors import AgentError
from shim.protocol.http import header_text

LASTS = timedelta(days=3650)
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - a file that only we may read, for the moment in which it is loaded
CONNECT_S = 2.0
IDLE_S = 30.0
MAX_IDLE = 256
MAX_UNANSWERED = 4096  # heartbeats on one connection
MAX_HEAD_BYTES = 65_536
MAX_HEADERS = 4096
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
Done = Callable[[bytes | None], None]
P = TypeVar("P", bound=asyncio.BaseProtocol)


def fingerprint_of(certificate: bytes) -> str:
    """Return the fingerprint of a certificate (DER)."""
    return hashlib.sha256(certificate).hexdigest()


def make_identity(wall_s: float) -> tuple[ssl.SSLContext, str]:
    """Make a key and a certificate. Return a server's TLS context that uses them, and the fingerprint."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "agent-shim replica")])
    now = datetime.fromtimestamp(wall_s, UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + LASTS)
        .sign(key, hashes.SHA256())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # nobody resumes a session, and each ticket is kept for as long as its connection
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _load(context, certificate.public_bytes(serialization.Encoding.PEM) + private)
    return context, fingerprint_of(certificate.public_bytes(serialization.Encoding.DER))


def _load(context: ssl.SSLContext, pem: bytes) -> None:
    """Load a certificate with its key by a temporary file: `ssl` needs one. Shared memory works on a read-only root."""
    folder = SHARED_MEMORY if Path(SHARED_MEMORY).is_dir() else None
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(pem)
        file.flush()
        context.load_cert_chain(file.name)


class ReplicaLost(Exception):
    """Another replica did not answer a request.

    `sent` is true if it may have carried the request out, or read a part of a streamed body.
    """

    def __init__(self, *, sent: bool) -> None:
        super().__init__("the connection to the owner was lost")
        self.sent = sent


@dataclass(frozen=True, slots=True)
class ReplicaReply:
    """Head of a reply, and the reader of its body. `length` is the size of the body, `None` if not announced."""

    status: int
    headers: tuple[tuple[str, str], ...]
    length: int | None
    body: StreamReader = field(repr=False)

    def header(self, name: str) -> str | None:
        """Return the first header of this (lower-case) name."""
        return next((value for each, value in self.headers if each.lower() == name), None)

    async def read(self) -> bytes:
        """Return the whole body. Raises `ReplicaLost` if it breaks off."""
        try:
            return await self.body.read()
        except (ClientError, OSError):
            raise ReplicaLost(sent=True) from None


class ReplicaConnection(ResponseHandler):
    """One connection to the replica with the member name `process`. aiohttp's client protocol reads the replies."""

    def __init__(self, process: str, on_lost: Callable[[ReplicaConnection], None]) -> None:
        super().__init__(asyncio.get_running_loop())
        self.process = process
        self.idle_since_s = 0.0
        self._on_lost = on_lost

    def connection_lost(self, exc: BaseException | None) -> None:
        """End the request in progress with an error."""
        body = self._payload
        super().connection_lost(exc)
        # aiohttp does not end a body whose framing it could not read: whoever reads it would wait for ever.
        if body is not None and not body.is_eof() and body.exception() is None:
            body.set_exception(ClientPayloadError("the reply broke off"))
        self._on_lost(self)

    def close(self) -> None:
        """Close the connection after sending what is buffered, notes included."""
        # aiohttp's own `close` and `abort` forget the reply, so that whoever reads its body would wait for ever.
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        """Drop the connection at once."""
        if self.transport is not None:
            self.transport.abort()

    @property
    def reusable(self) -> bool:
        """True if the connection can carry another request."""
        return self.is_connected() and not self.should_close

    def notify(self, kind: Note) -> None:
        """Send a note to the owner about the delivery of its reply."""
        self._write(note(kind))

    def notify_open(self, until: float) -> None:
        """Send a note to the owner: up to `until`, on its clock, the agent's connection was certainly open."""
        self._write(note(Note.OPEN, f"?{until:.6f}"))

    def _write(self, data: bytes) -> None:
        """Send bytes. On a lost connection they are dropped: the reader of the reply learns of the loss."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    async def exchange(
        self, head: bytes, body: bytes | AsyncIterator[bytes] = b"", *, head_only: bool = False
    ) -> ReplicaReply:
        """Send a request and return its reply as soon as the head is here. `head_only` is set for a HEAD request.

        Raises `ReplicaLost`, and the `AgentError` that reading `body` in pieces raised.
        """
        self.set_response_params(
            skip_payload=head_only,
            read_until_eof=True,
            auto_decompress=False,
            max_line_size=MAX_HEAD_BYTES,
            max_field_size=MAX_HEAD_BYTES,
            max_headers=MAX_HEADERS,
        )
        if isinstance(body, bytes):
            self._write(head + body)
            return await self._reply()
        self._write(head)
        async with asyncio.TaskGroup() as tasks:
            sending = tasks.create_task(self._send(body))
            try:
                reply: ReplicaReply | Exception = await self._reply()
            except (ReplicaLost, AgentError) as error:
                reply = error
            if not sending.done():  # the owner has answered early: the rest of the body is not sent
                self.force_close()
                sending.cancel()
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def _reply(self) -> ReplicaReply:
        try:
            message, body = await self.read()
        except (ClientError, HttpProcessingError, OSError):
            raise ReplicaLost(sent=True) from None
        return _decoded(message, body)

    async def _send(self, body: AsyncIterator[bytes]) -> None:
        writer = StreamWriter(self, self._loop)
        writer.enable_chunking()
        try:
            async for piece in body:
                await writer.write(piece)
            await writer.write_eof()
        except AgentError as error:
            self.set_exception(error)  # raised to the reader of the reply
        except ConnectionError:
            return  # `connection_lost` raises it to the reader of the reply


def _decoded(message: RawResponseMessage, body: StreamReader) -> ReplicaReply:
    headers = tuple((header_text(name), header_text(value)) for name, value in message.raw_headers)
    length = message.headers.get(hdrs.CONTENT_LENGTH)
    if body is EMPTY_PAYLOAD:
        size: int | None = 0
    else:
        size = None if length is None or message.chunked else int(length)
    return ReplicaReply(message.code, headers, size, body)


class HeartbeatConnection(asyncio.Protocol):
    """One pipelined connection to a replica for the heartbeats of all agents. Simultaneous requests share one write.

    A heartbeat's reply carries no commands. It needs no evidence of delivery, so agents can share the connection.
    """

    def __init__(self, on_lost: Callable[[], object]) -> None:
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._requests: list[bytes] = []
        self._unanswered: deque[Done] = deque()
        self._buffer = b""

    @property
    def has_room(self) -> bool:
        """True if another request may be sent."""
        return self._transport is not None and len(self._unanswered) < MAX_UNANSWERED

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport (`asyncio.Protocol`)."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, _exc: BaseException | None) -> None:
        """Have all heartbeats without a reply be sent in another way."""
        self._transport = None
        self._on_lost()
        unanswered, self._unanswered = self._unanswered, deque()
        for done in unanswered:
            done(None)

    def send(self, request: bytes, done: Done) -> None:
        """Send a whole request. `done` gets the bytes of its reply, or `None` if the connection is lost."""
        self._unanswered.append(done)
        self._requests.append(request)
        if len(self._requests) == 1:
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        requests, self._requests = self._requests, []
        if self._transport is not None:
            self._transport.write(b"".join(requests))

    def data_received(self, data: bytes) -> None:
        """Pass each complete reply to the oldest heartbeat without one."""
        buffer = self._buffer + data if self._buffer else data
        start = 0
        while self._unanswered:
            end = _end_of_reply(buffer, start)
            if not end:
                break
            self._unanswered.popleft()(buffer[start:end])
            start = end
        self._buffer = buffer[start:]

    def abort(self) -> None:
        """Drop the connection."""
        if self._transport is not None:
            self._transport.abort()


def _end_of_reply(data: bytes, start: int) -> int:
    """Return the end of the small reply that begins at `start`, or 0 if it is incomplete."""
    end = data.find(b"\r\n\r\n", start) + 4
    if end < 4:
        return 0
    length = _LENGTH.search(data, start, end)
    end += int(length[1]) if length is not None else 0
    return end if end <= len(data) else 0


class ConnectionPool:
    """All connections to other replicas. Set `secret`, the proof of membership, before the first one."""

    def __init__(self, purpose: str = "") -> None:
        """Make an empty pool. `purpose` is `OPERATOR` for connections that carry admin orders, not agents' requests."""
        self.secret = ""
        self._query = purpose and f"?{purpose}"
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        # Members have self-signed certificates. `_connect` compares the fingerprint with the member's row in the
        # database instead.
        self._context.check_hostname = False
        self._context.verify_mode = ssl.CERT_NONE
        self._open: set[ReplicaConnection] = set()
        self._idle: defaultdict[str, list[ReplicaConnection]] = defaultdict(list)
        self._heartbeats: dict[str, HeartbeatConnection | None] = {}  # `None` while a connection is being opened

    async def acquire(self, member: Member) -> ReplicaConnection:
        """Return a connection for one request. Raises `ReplicaLost` (`sent` is false)."""
        idle = self._idle[member.process]
        while idle:
            connection = idle.pop()
            if connection.reusable:
                return connection
            connection.close()
        connection = await self._connect(member, lambda: ReplicaConnection(member.process, self._discard), self._query)
        self._open.add(connection)
        return connection

    async def _connect(self, member: Member, make: Callable[[], P], query: str) -> P:
        """Connect to a member's internal listener and authenticate. Raises `ReplicaLost` (`sent` is false)."""
        host, _, port = member.address.rpartition(":")
        try:
            async with asyncio.timeout(CONNECT_S):
                transport, protocol = await asyncio.get_running_loop().create_connection(
                    make, host.strip("[]"), int(port), ssl=self._context
                )
        except (OSError, TimeoutError, ValueError):
            raise ReplicaLost(sent=False) from None
        tls = transport.get_extra_info("ssl_object")
        if fingerprint_of(tls.getpeercert(binary_form=True) or b"") != member.fingerprint:
            transport.abort()
            raise ReplicaLost(sent=False)
        transport.write(note(Note.JOIN, query, headers=f"Authorization: Bearer {self.secret}\r\n"))
        return protocol

    def release(self, connection: ReplicaConnection) -> None:
        """Return a connection to the pool, or close it if it cannot be used again."""
        idle = self._idle[connection.process]
        if connection.reusable and len(idle) < MAX_IDLE:
            connection.idle_since_s = asyncio.get_running_loop().time()
            idle.append(connection)
        else:
            connection.close()

    def _discard(self, connection: ReplicaConnection) -> None:
        self._open.discard(connection)
        idle = self._idle[connection.process]
        if connection in idle:
            idle.remove(connection)

    def heartbeats(self, process: str) -> HeartbeatConnection | None:
        """Return the connection for heartbeats to this replica, unless too many requests wait on it."""
        connection = self._heartbeats.get(process)
        return connection if connection is not None and connection.has_room else None

    async def open_heartbeats(self, member: Member) -> None:
        """Open a connection for heartbeats, unless one is open or being opened."""
        process = member.process
        if process in self._heartbeats:
            return
        self._heartbeats[process] = None
        connection = HeartbeatConnection(lambda: self._heartbeats.pop(process, None))
        try:
            self._heartbeats[process] = await self._connect(member, lambda: connection, f"?{HEARTBEATS}")
        except ReplicaLost:
            return
        finally:
            if not connection.has_room:  # not connected, or lost meanwhile
                self._heartbeats.pop(process, None)

    def sweep(self, living: frozenset[str], now: float) -> None:
        """Drop connections to replicas that are gone, and close those unused for `IDLE_S`."""
        for connection in [each for each in self._open if each.process not in living]:
            connection.abort()
        for process, heartbeats in list(self._heartbeats.items()):
            if process not in living and heartbeats is not None:
                heartbeats.abort()
        for process, idle in list(self._idle.items()):
            for connection in [each for each in idle if now - each.idle_since_s > IDLE_S]:
                idle.remove(connection)
                connection.close()
            if process not in living and not idle:
                del self._idle[process]

    def close(self) -> None:
        """Close all connections."""
        for connection in list(self._open):
            connection.close()
        for heartbeats in list(self._heartbeats.values()):
            if heartbeats is not None:
                heartbeats.abort()
