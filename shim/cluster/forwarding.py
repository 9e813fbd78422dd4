"""Forwarding of requests to the replica that owns the caller's shard."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus

from shim.agent_api.internal import (
    ARRIVAL_HEADER,
    CLOCK_HEADER,
    METHOD,
    NOT_AT_ONCE,
    OWN_HEADERS,
    RECEIPT_HEADER,
    Note,
    arrival,
)
from shim.agent_api.response_writer import MISDIRECTED
from shim.cluster.connection_pool import ConnectionPool, ReplicaConnection, ReplicaLost, ReplicaReply
from shim.cluster.membership import Membership
from shim.cluster.shard_manager import ShardLocator
from shim.core.command_queue import OpenUntil
from shim.core.shards import ClockOffset, Member
from shim.errors import AgentError
from shim.metrics import ClusterMetrics
from shim.ports import Clock, ProxyRequest, ProxyResponse
from shim.protocol.http import header_bytes

PATIENCE_S = 10.0
"""How long a call waits for an owner: longer than a takeover takes, shorter than agents wait for an answer."""
AGAIN_S = 0.2
ANSWER_S = 1.0
"""Limit from the arrival of a heartbeat to its answer, whatever the owner does.

Rules: docs/reference/protocol.md#12-heartbeat-status-results-the-short-answers.
"""
SWEEP_S = 0.25
RETRY_AFTER_S = 3
WHOLE_BYTES = 262_144
TICK_S = 0.1
STOOD_STILL_S = 0.3
_HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding"})
_NOT_SENT = _HOP_BY_HOP | {"content-length", "expect", "proxy-connection", "te", "trailer", "upgrade"}
# The owner cannot answer at once, or has just lost the shard: the heartbeat is sent again as a normal request.
_NO_ANSWER = (NOT_AT_ONCE, b"HTTP/1.1 %d " % MISDIRECTED)
# Idempotent operations, which may be repeated if their answer was lost.
_REPEATABLE = frozenset({"register", "heartbeat", "status", "poll", "result", "tunnel_poll", "tunnel_info", "health"})


@dataclass(frozen=True, slots=True)
class RemoteReceipt:
    """Receipt for a reply of another replica, which identifies it by the connection that carried it.

    `connection` is the agent's. The owner cannot see what becomes of its reply, so each step is sent to it as a note.
    A connection is used again only after the last note about its reply. The offer is uncertain at `due_s` (monotonic
    seconds), if it is not settled before.
    """

    pool: ConnectionPool
    carrier: ReplicaConnection
    connection: int
    offset: ClockOffset
    due_s: float

    def written(self, _open_until: OpenUntil) -> None:
        """Notify the owner that its reply was handed to the kernel."""
        self.carrier.notify(Note.WRITTEN)

    def connection_open(self, until_s: float) -> bool:
        """Notify the owner up to when the agent's connection was open; False once no report can be evidence any longer.

        An unknown time (-inf) is not sent, and ends nothing: the next report may know it again.
        """
        on_owners_clock = self.offset.to_peer(until_s)
        if on_owners_clock is not None and math.isfinite(on_owners_clock):
            self.carrier.notify_open(on_owners_clock)
        return until_s < self.due_s

    def unwritten(self) -> None:
        """Notify the owner that its reply was not written."""
        self._end(Note.UNWRITTEN)

    def next_request(self) -> None:
        """Notify the owner that the agent sent another request, which is evidence that it has read the reply."""
        self._end(Note.NEXT)

    def connection_closed(self, clean: bool | None) -> None:
        """Notify the owner of the end of the agent's connection."""
        self._end(Note.CLOSED_CLEANLY if clean else Note.CLOSED)

    def _end(self, kind: Note) -> None:
        self.carrier.notify(kind)
        self.pool.release(self.carrier)


class _Heartbeat:
    """A forwarded heartbeat, answered once: by its owner, or by `None` at `due_s`."""

    __slots__ = ("_done", "due_s")

    def __init__(self, done: Callable[[bytes | None], None], due_s: float) -> None:
        self._done: Callable[[bytes | None], None] | None = done
        self.due_s = due_s

    @property
    def answered(self) -> bool:
        """True once the agent has its reply, or a handler task makes it."""
        return self._done is None

    def answer(self, reply: bytes | None) -> None:
        """Answer the agent once. With None, a handler task serves the heartbeat."""
        done, self._done = self._done, None
        if done is not None:
            done(None if reply is None or reply.startswith(_NO_ANSWER) else reply)


class ReplicaForwarder:
    """`ports.Forwarder`: the way of a call to the replica that owns the caller's shard."""

    def __init__(
        self,
        locator: ShardLocator,
        membership: Membership,
        pool: ConnectionPool,
        clock: Clock,
        metrics: ClusterMetrics,
        evidence_s: Callable[[], float],
    ) -> None:
        self._locator = locator
        self._membership = membership
        self._pool = pool
        self._clock = clock
        self._metrics = metrics
        self._evidence_s = evidence_s
        self._answered = metrics.forwarded.labels("answered")
        self._offsets: defaultdict[str, ClockOffset] = defaultdict(ClockOffset)
        self._heartbeats: list[_Heartbeat] = []
        self._ticked_at = clock.monotonic_s()

    # --- ports.Forwarder ----------------------------------------------------------------------------------------------

    def elsewhere(self, token: str) -> bool:
        """Return whether this replica cannot carry out calls with this token now."""
        return self._locator.is_elsewhere(token)

    def forward_now(self, token: str, request: bytes, done: Callable[[bytes | None], None]) -> bool:
        """Forward a heartbeat if a connection for heartbeats to the owner is open. Return false otherwise."""
        owner = self._locator.remote_owner(token)
        connection = None if owner is None or self._membership.leaving else self._pool.heartbeats(owner.process)
        if connection is None:
            return False
        heartbeat = _Heartbeat(done, self._clock.monotonic_s() + ANSWER_S)
        self._heartbeats.append(heartbeat)
        self._answered.inc()
        connection.send(request, heartbeat.answer)
        return True

    async def forward(self, request: ProxyRequest, operation: str) -> ProxyResponse | None:
        """Forward a request to the owner. Try again, also at a new owner, until one answers or the time is over.

        Returns `None` if the request is to be answered here. Raises `AgentError` if an owner may have carried out a
        request that must not be repeated.
        """
        if request.method == METHOD:
            raise AgentError(405, "method not allowed")  # notes between replicas use this method
        now_s = self._clock.monotonic_s
        token, arrived_s = request.caller.token, self._arrival(request.arrived_s)
        is_heartbeat = operation == "heartbeat"
        until_s = now_s() + (AGAIN_S if is_heartbeat else PATIENCE_S)
        while self._locator.is_elsewhere(token) and not self._membership.leaving:
            answer_s = request.arrived_s + ANSWER_S - now_s() if is_heartbeat else None
            owner = self._locator.remote_owner(token)
            if owner is not None and (answer_s is None or answer_s > 0):
                try:
                    return await self._ask(owner, request, arrived_s, answer_s)
                except ReplicaLost as lost:
                    repeatable = operation in _REPEATABLE and isinstance(request.body, bytes)
                    if lost.sent and not repeatable:
                        self._metrics.forwarded.labels("lost").inc()
                        raise AgentError(
                            503, "the replica that owns the agent's link is gone", retry_after_s=RETRY_AFTER_S
                        ) from None
            left_s = until_s - now_s()
            if left_s <= 0 or (answer_s is not None and answer_s <= 0):
                self._metrics.forwarded.labels("no_owner").inc()
                return None
            await self._membership.wait_for_change(min(left_s, AGAIN_S))
        return None

    # --- one request --------------------------------------------------------------------------------------------------

    def _arrival(self, arrived_s: float) -> float:
        """Return a lower bound for the arrival of a request.

        After a pause of this process, a request may have waited in the kernel since the last tick before the pause.
        """
        stood_still = self._clock.monotonic_s() - self._ticked_at > STOOD_STILL_S
        return min(arrived_s, self._ticked_at) if stood_still else arrived_s

    async def _ask(
        self, owner: Member, request: ProxyRequest, arrived_s: float, limit_s: float | None
    ) -> ProxyResponse:
        """Send a request to an owner and return its reply. `limit_s` is set for heartbeats. Raises `ReplicaLost`."""
        try:
            async with asyncio.timeout(limit_s):
                if limit_s is not None:
                    await self._pool.open_heartbeats(owner)
                connection = await self._pool.acquire(owner)
                try:
                    reply = await self._exchange(connection, request, arrived_s)
                except BaseException:
                    # The agent has not seen a reply, so the owner may offer its commands again at once.
                    connection.notify(Note.UNWRITTEN)
                    connection.close()
                    raise
        except TimeoutError:
            raise ReplicaLost(sent=True) from None
        self._answered.inc()
        return reply

    async def _exchange(self, connection: ReplicaConnection, request: ProxyRequest, arrived_s: float) -> ProxyResponse:
        now, offset = self._clock.monotonic_s(), self._offsets[connection.process]
        head = _head(request, arrival(now - arrived_s, offset.to_peer(arrived_s)))
        reply = await connection.exchange(head, request.body, head_only=request.method == "HEAD")
        self._update_offset(offset, reply)
        if reply.status == MISDIRECTED:
            self._membership.refresh_soon()
            # Some pieces of a streamed body are gone: the next owner would get the request without them.
            raise ReplicaLost(sent=not isinstance(request.body, bytes))
        headers = tuple((name, value) for name, value in reply.headers if name.lower() not in _HOP_BY_HOP | OWN_HEADERS)
        # The owner rejected the body. It would close its own agents' connections, so this connection closes as well.
        closes = reply.status >= HTTPStatus.BAD_REQUEST and reply.header("connection") == "close"
        respond = partial(ProxyResponse, reply.status, headers, complete=True, closes=closes)
        offers = reply.header(RECEIPT_HEADER.lower()) is not None
        if not offers and (reply.length is None or reply.length > WHOLE_BYTES):
            return respond(self._stream(connection, reply))
        body = await reply.read()
        if offers:
            due_s = self._clock.monotonic_s() + self._evidence_s()
            receipt = RemoteReceipt(self._pool, connection, request.caller.connection, offset, due_s)
            return respond(body, receipt)
        self._pool.release(connection)
        return respond(body)

    async def _stream(self, connection: ReplicaConnection, reply: ReplicaReply) -> AsyncGenerator[bytes, None]:
        try:
            async for piece in reply.body.iter_any():
                yield piece
        finally:
            self._pool.release(connection)  # closes the connection unless the reply was read to its end

    def _update_offset(self, offset: ClockOffset, reply: ReplicaReply) -> None:
        with suppress(ValueError):
            offset.update(float(reply.header(CLOCK_HEADER.lower()) or ""), self._clock.monotonic_s())

    # --- background task ----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Close unused connections and end overdue heartbeats, until cancelled."""
        swept_at = 0.0
        while True:
            await asyncio.sleep(TICK_S)
            now = self._ticked_at = self._clock.monotonic_s()
            if now - swept_at < SWEEP_S:
                continue
            swept_at = now
            living = frozenset(self._membership.view.members)
            self._pool.sweep(living, now)
            for process in [each for each in self._offsets if each not in living]:
                del self._offsets[process]
            for heartbeat in self._heartbeats:
                if heartbeat.due_s <= now:
                    heartbeat.answer(None)
            self._heartbeats = [each for each in self._heartbeats if not each.answered]


def _head(request: ProxyRequest, arrived: str) -> bytes:
    """Return the head of a request for the owner, without the headers that concern the agent's connection."""
    lines = [f"{request.method} {request.target} HTTP/1.1", f"{ARRIVAL_HEADER}: {arrived}"]
    lines += [f"{name}: {value}" for name, value in request.headers if name.lower() not in _NOT_SENT | OWN_HEADERS]
    if not any(name.lower() == "host" for name, _ in request.headers):
        lines.append("Host: owner")  # an agent's HTTP/1.0 needs none
    if not isinstance(request.body, bytes):
        lines.append("Transfer-Encoding: chunked")
    elif request.body or request.method not in ("GET", "HEAD"):
        lines.append(f"Content-Length: {len(request.body)}")
    return header_bytes("\r\n".join(lines) + "\r\n\r\n")
