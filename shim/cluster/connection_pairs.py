"""Connections to other replicas' internal listeners: one request at a time on each, and notes about its reply.

A connection carries requests of different agents, one after another. A reply with commands pairs the connection with
the agent's connection that carries the reply. Until there is evidence of delivery, only notes are sent on a paired
connection: the owner identifies the reply by the connection on which a note arrives.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TypeVar, cast

from shim.cluster.identity import fingerprint_of
from shim.core.leases import Member
from shim.errors import AgentError
from shim.protocol.reply_notes import HEARTBEATS, Note, note
from shim.protocol.reply_reader import ReplyError, ReplyHead, ReplyReader

CONNECT_S = 2.0
IDLE_S = 30.0
MAX_IDLE = 256
MAX_WAITING = 4096  # heartbeats without a reply
MAX_HELD_BYTES = 262_144  # of a reply that its agent does not read
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)

Done = Callable[[bytes | None], None]
P = TypeVar("P", bound=asyncio.Protocol)


class PairLost(Exception):
    """The connection to the owner failed. `sent` is true if the owner may have carried out the request."""

    def __init__(self, *, sent: bool) -> None:
        super().__init__("the connection to the owner was lost")
        self.sent = sent


class Pair(asyncio.Protocol):
    """One connection to an owner, whose member name is `process`."""

    def __init__(self, pairs: Pairs, process: str) -> None:
        self._pairs = pairs
        self.process = process
        self.idle_since = 0.0
        self.lost = False
        self._transport: asyncio.Transport | None = None
        self._reader: ReplyReader | None = None
        self._pieces: list[bytes] = []
        self._held = 0
        self._waiter: asyncio.Future[None] | None = None
        self._may_write = asyncio.Event()
        self._may_write.set()
        self._done: Done | None = None
        self._whole = b""
        self._fault: AgentError | None = None  # of the request's body
        self._early = False  # the reply came before the request's body was sent

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._done is not None:
            self._take_whole(data)
            return
        reader = self._reader
        if reader is None:
            self.abort()  # no request is open, so data is a protocol error
            return
        try:
            pieces = reader.feed(data)
        except ReplyError:
            self.abort()
            return
        self._pieces += pieces
        self._held += sum(map(len, pieces))
        if self._held > MAX_HELD_BYTES and self._transport is not None:
            self._transport.pause_reading()
        self._wake()

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    def eof_received(self) -> None:
        return None

    def connection_lost(self, _exc: BaseException | None) -> None:
        self.lost = True
        self._may_write.set()
        self._pairs.gone(self)
        if self._reader is not None:
            self._reader.closed()
        done, self._done = self._done, None
        if done is not None:
            done(None)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- one request ---

    def write(self, data: bytes) -> None:
        """Send bytes. On a lost connection they are dropped; `connection_lost` has reported the loss."""
        if self._transport is not None and not self.lost:
            self._transport.write(data)

    def tell(self, kind: Note) -> None:
        """Send a note to the owner about the delivery of its reply."""
        self.write(note(kind))

    def ask(self, request: bytes, done: Done) -> None:
        """Send a whole request with a small reply. `done` gets the reply's bytes, or `None` if the connection is lost.

        The caller must send nothing else until `done` is called.
        """
        self._done, self._whole = done, b""
        self.write(request)

    def _take_whole(self, data: bytes) -> None:
        self._whole = whole = self._whole + data if self._whole else data
        if not _end_of_reply(whole, 0):
            return
        done, self._done, self._whole = self._done, None, b""
        self._pairs.release(self)
        if done is not None:
            done(whole)

    def forget(self) -> None:
        """Cancel an `ask` without calling its `done`, and drop the connection."""
        self._done = None
        self.abort()

    async def exchange(self, head: bytes, body: bytes | AsyncIterator[bytes], *, head_only: bool) -> ReplyHead:
        """Send a request and return the head of its reply.

        Raises `PairLost`, and the `AgentError` that reading `body` in pieces raised.
        """
        self._reader, self._pieces, self._held = ReplyReader(head_only=head_only), [], 0
        if isinstance(body, bytes):
            self.write(head + body)
            reply = await self._head()
        else:
            self.write(head)
            async with asyncio.TaskGroup() as tasks:
                sending = tasks.create_task(self._send(body))
                reply = await self._head()
                self._early = not sending.done()
                sending.cancel()
        if self._fault is not None:
            raise self._fault
        if reply is None:
            raise PairLost(sent=True)
        return reply

    async def _send(self, body: AsyncIterator[bytes]) -> None:
        try:
            async for piece in body:
                self.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                await self._may_write.wait()
        except AgentError as error:
            self._fault = error
            self._wake()
        else:
            self.write(b"0\r\n\r\n")

    async def _head(self) -> ReplyHead | None:
        """Wait for the head of the reply. Return `None` if the connection is lost or sending the body fails."""
        while self._reader is not None and self._reader.head is None and not self.lost and self._fault is None:
            await self._change()
        return None if self._reader is None else self._reader.head

    async def _change(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield the body of the reply. Raises `ConnectionError` if the connection is lost before its end."""
        reader = self._reader
        while reader is not None:
            pieces, self._pieces, self._held = self._pieces, [], 0
            for piece in pieces:
                yield piece
            if self._pieces:
                continue
            if reader.done:
                return
            if self.lost:
                raise ConnectionError("the owner's reply broke off")
            if self._transport is not None:
                self._transport.resume_reading()
            await self._change()

    @property
    def reusable(self) -> bool:
        """True if the connection can carry another request."""
        reader = self._reader
        return not self.lost and not self._early and (reader is None or (reader.done and not reader.until_close))

    def reset(self) -> None:
        """Discard the last reply."""
        self._reader, self._pieces = None, []

    def close(self) -> None:
        """Close the connection after sending what is buffered, notes included."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Drop the connection."""
        if self._transport is not None:
            self._transport.abort()


class Lane(asyncio.Protocol):
    """One pipelined connection to an owner for the heartbeats of all agents. Simultaneous requests share one write.

    A heartbeat's reply carries no commands. It needs no evidence of delivery, so agents can share the connection.
    """

    def __init__(self, pairs: Pairs, process: str) -> None:
        self._pairs = pairs
        self.process = process
        self.lost = False
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._requests: list[bytes] = []
        self._waiting: deque[Done] = deque()
        self._buffer = b""

    def __len__(self) -> int:
        """Return the number of requests without a reply yet."""
        return len(self._waiting)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, _exc: BaseException | None) -> None:
        self.lost = True
        self._pairs.lane_gone(self)
        waiting, self._waiting = self._waiting, deque()
        for done in waiting:
            done(None)

    def send(self, request: bytes, done: Done) -> None:
        """Send a whole request. `done` gets the bytes of its reply, or `None` if the connection is lost."""
        self._waiting.append(done)
        self._requests.append(request)
        if len(self._requests) == 1:
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        requests, self._requests = self._requests, []
        if self._transport is not None and not self.lost:
            self._transport.write(b"".join(requests))

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        start = 0
        while self._waiting:
            end = _end_of_reply(buffer, start)
            if not end:
                break
            self._waiting.popleft()(buffer[start:end])
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


class Pairs:
    """All connections to other replicas. `secret` proves our membership; set it before the first connection."""

    def __init__(self, kind: str = "") -> None:
        """Make an empty pool. `kind` is `OPERATOR` for connections that carry admin orders, not agents' requests."""
        self.secret = ""
        self._kind = kind
        self._lanes: dict[str, Lane] = {}
        self._opening: set[str] = set()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        # Members have self-signed certificates. `_connect` compares the fingerprint with the member's row in the
        # database instead.
        self._context.check_hostname = False
        self._context.verify_mode = ssl.CERT_NONE
        self._idle: defaultdict[str, list[Pair]] = defaultdict(list)
        self._all: defaultdict[str, set[Pair]] = defaultdict(set)

    def __len__(self) -> int:
        """Return the number of open connections, without those for heartbeats."""
        return sum(map(len, self._all.values()))

    def idle(self, process: str) -> Pair | None:
        """Return an unused connection to this replica, if there is one."""
        waiting = self._idle.get(process)
        return waiting.pop() if waiting else None

    async def acquire(self, member: Member) -> Pair:
        """Return a connection for one request. Raises `PairLost` (`sent` is false)."""
        pair = self.idle(member.process)
        if pair is not None:
            return pair
        pair = await self._connect(member, lambda: Pair(self, member.process), self._kind)
        self._all[member.process].add(pair)
        return pair

    async def _connect(self, member: Member, make: Callable[[], P], kind: str) -> P:
        """Connect to a member's internal listener and authenticate. Raises `PairLost` (`sent` is false)."""
        host, _, port = member.address.rpartition(":")
        try:
            async with asyncio.timeout(CONNECT_S):
                transport, protocol = await asyncio.get_running_loop().create_connection(
                    make, host.strip("[]"), int(port), ssl=self._context
                )
        except (OSError, TimeoutError, ValueError):
            raise PairLost(sent=False) from None
        tls = transport.get_extra_info("ssl_object")
        if fingerprint_of(tls.getpeercert(binary_form=True) or b"") != member.fingerprint:
            transport.abort()
            raise PairLost(sent=False)
        proof = f"Authorization: Bearer {self.secret}\r\n"
        transport.write(note(Note.JOIN, kind and f"?{kind}", headers=proof))
        return protocol

    def lane(self, process: str) -> Lane | None:
        """Return the connection for heartbeats to this replica, unless too many requests wait on it."""
        lane = self._lanes.get(process)
        return lane if lane is not None and not lane.lost and len(lane) < MAX_WAITING else None

    async def open_lane(self, member: Member) -> None:
        """Open a connection for heartbeats, unless one is open or being opened."""
        if member.process in self._lanes or member.process in self._opening:
            return
        self._opening.add(member.process)
        try:
            lane = await self._connect(member, lambda: Lane(self, member.process), HEARTBEATS)
        except PairLost:
            return
        finally:
            self._opening.discard(member.process)
        if not lane.lost:
            self._lanes[member.process] = lane

    def lane_gone(self, lane: Lane) -> None:
        """Forget a connection for heartbeats that has ended."""
        if self._lanes.get(lane.process) is lane:
            del self._lanes[lane.process]

    def release(self, pair: Pair) -> None:
        """Return a connection to the pool, or close it if it cannot be used again."""
        waiting = self._idle[pair.process]
        if pair.reusable and len(waiting) < MAX_IDLE:
            pair.reset()
            pair.idle_since = asyncio.get_running_loop().time()
            waiting.append(pair)
        else:
            pair.close()

    def gone(self, pair: Pair) -> None:
        """Forget a connection that has ended."""
        self._all[pair.process].discard(pair)
        waiting = self._idle[pair.process]
        if pair in waiting:
            waiting.remove(pair)
        if not self._all[pair.process]:
            del self._all[pair.process], self._idle[pair.process]

    def sweep(self, living: frozenset[str], now: float) -> None:
        """Drop connections to replicas that are gone, and close those unused for `IDLE_S`."""
        for process in list(self._all):
            if process not in living:
                for pair in list(self._all[process]):
                    pair.abort()
        for process, lane in list(self._lanes.items()):
            if process not in living:
                lane.abort()
        for waiting in list(self._idle.values()):
            for pair in [each for each in waiting if now - each.idle_since > IDLE_S]:
                waiting.remove(pair)
                pair.close()

    def close(self) -> None:
        """Close all connections."""
        for pairs in list(self._all.values()):
            for pair in list(pairs):
                pair.close()
        for lane in list(self._lanes.values()):
            lane.abort()
