"""Forwarding of requests to the owner of the caller's shard, and the replies while no replica owns it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from shim.agent_api.internal import CLOCK_HEADER, LEASE_HEADER, NOT_AT_ONCE
from shim.agent_api.response_writer import MISDIRECTED
from shim.cluster.connection_pairs import Pair, PairLost, Pairs
from shim.cluster.metrics import ClusterMetrics
from shim.config.settings import Settings
from shim.core.agent_calls import Accepted, AgentCall, Commands, Failed, HeartbeatCall, Outcome, PollCall, StatusCall
from shim.core.leases import ClockOffset, Member
from shim.errors import AgentError
from shim.ports import Clock, Pending, ProxyRequest, ProxyResponse
from shim.protocol.reply_notes import METHOD, Note, came
from shim.protocol.reply_reader import ReplyHead
from shim.runtime import Spawn

PATIENCE_S = 10.0
"""How long a call waits for an owner: longer than a takeover takes, shorter than agents wait for an answer."""
AGAIN_S = 0.2
ANSWER_S = 1.0
"""How long the owner may take for a heartbeat, which is answered at once.

Rules: docs/reference/protocol.md#12-heartbeat-status-results-the-short-answers.
"""
SWEEP_S = 0.25
RETRY_AFTER_S = 3
WHOLE_BYTES = 262_144
TICK_S = 0.1
STOOD_STILL_S = 0.3
_HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", LEASE_HEADER.lower(), CLOCK_HEADER.lower()})
_NOT_SENT = _HOP_BY_HOP | {"content-length", "expect", "proxy-connection", "te", "trailer", "upgrade"}
# Idempotent operations, which may be repeated if their answer was lost.
_REPEATABLE = frozenset({"register", "heartbeat", "status", "poll", "result", "tunnel_poll", "tunnel_info", "health"})


class Directory(Protocol):
    """Interface to this replica's view of the owners of shards."""

    def place(self, token: str) -> int | None:
        """Return the shard of a caller, `None` without a token where one is needed."""

    def serves(self, shard: int) -> bool:
        """Return whether this replica owns the shard and can serve it now."""

    def owner(self, shard: int) -> Member | None:
        """Return the living replica that owns a shard, which may be this one."""

    def is_me(self, member: Member) -> bool:
        """Return whether `member` is this replica."""

    def outdated(self) -> None:
        """Request a new read of the leases, because the view named a wrong owner."""

    def living(self) -> frozenset[str]:
        """Return the processes of all replicas that live."""

    async def change(self, at_most_s: float) -> None:
        """Wait for a change of the view, at most the given time."""

    @property
    def stopping(self) -> bool:
        """True while this replica stops."""


@dataclass(frozen=True, slots=True, eq=False)
class RemoteReceipt:
    """A `ports.DeliveryReceipt` of another replica, which identifies it by the connection that carried its reply."""

    pair: Pair
    connection: int


class _Asked:
    """A forwarded heartbeat. `long_way` is called if the owner cannot answer it immediately."""

    __slots__ = ("_done", "_long_way", "due")

    def __init__(self, done: Callable[[bytes | None], None], long_way: Callable[[_Asked], None], due: float) -> None:
        self._done: Callable[[bytes | None], None] | None = done
        self._long_way = long_way
        self.due = due

    def answered(self, reply: bytes | None) -> None:
        if self._done is None:
            return
        if reply is not None and reply.startswith(NOT_AT_ONCE):
            self._long_way(self)
            return
        done, self._done = self._done, None
        # 421 means that the replica has lost the shard, so it counts as no answer
        done(reply if reply is not None and not reply.startswith(b"HTTP/1.1 421") else None)

    @property
    def over(self) -> bool:
        return self._done is None

    def forget(self) -> None:
        """Ignore a later answer."""
        self._done = None


class ReplicaForwarder:
    """Implements `ports.Forwarder`, and passes evidence of delivery to the replicas that made the replies."""

    def __init__(
        self,
        directory: Directory,
        pairs: Pairs,
        clock: Clock,
        settings: Callable[[], Settings],
        metrics: ClusterMetrics,
        spawn: Spawn,
    ) -> None:
        self._spawn = spawn
        self._answered = metrics.forwarded.labels("answered")
        self._directory = directory
        self._pairs = pairs
        self._clock = clock
        self._settings = settings
        self._metrics = metrics
        self._offsets: defaultdict[str, ClockOffset] = defaultdict(ClockOffset)
        self._carried: defaultdict[int, set[Pair]] = defaultdict(set)
        self._asked: list[_Asked] = []
        self._ticked_at = clock.monotonic_s()

    # --- ports.Forwarder ---

    def elsewhere(self, token: str) -> bool:
        """Return whether this replica cannot carry out calls with this token now."""
        shard = self._directory.place(token)
        return shard is not None and not self._directory.serves(shard)

    def owner_of(self, token: str) -> Member | None:
        """Return the replica that owns the shard of a token, `None` if that is this one or none."""
        shard = self._directory.place(token)
        owner = None if shard is None else self._directory.owner(shard)
        return None if owner is None or self._directory.is_me(owner) else owner

    def try_call_sync(self, token: str, request: bytes, done: Callable[[bytes | None], None]) -> Pending | None:
        """Forward a heartbeat if a connection for heartbeats to the owner is open. Return `None` otherwise."""
        owner = self.owner_of(token)
        lane = None if owner is None or self._directory.stopping else self._pairs.lane(owner.process)
        if owner is None or lane is None:
            return None

        def long_way(asked: _Asked) -> None:
            self._spawn("heartbeat", self._ask_alone(owner, request, asked))

        asked = _Asked(done, long_way, self._clock.monotonic_s() + ANSWER_S)
        self._asked.append(asked)
        self._answered.value += 1
        lane.send(request, asked.answered)
        return asked

    async def _ask_alone(self, owner: Member, request: bytes, asked: _Asked) -> None:
        try:
            pair = await self._pairs.acquire(owner)
        except PairLost:
            asked.answered(None)
        else:
            pair.ask(request, asked.answered)

    async def forward(self, request: ProxyRequest, operation: str) -> ProxyResponse | None:
        """Forward a request to the owner. Try again, also at a new owner, until one answers or the time is over.

        Returns `None` if the request is to be answered here. Raises `AgentError` if an owner may have carried out a
        request that must not be repeated.
        """
        if request.method == METHOD:
            raise AgentError(405, "method not allowed")  # notes between replicas use this method
        now_s = self._clock.monotonic_s
        arrived_s = self._arrival(request.arrived_s)
        token = request.client.token
        until = now_s() + (AGAIN_S if operation == "heartbeat" else PATIENCE_S)
        while True:
            if not self.elsewhere(token) or self._directory.stopping:
                return None
            owner = self.owner_of(token)
            if owner is not None:
                try:
                    return await self._ask(owner, request, arrived_s, operation)
                except PairLost as lost:
                    repeatable = operation in _REPEATABLE and isinstance(request.body, bytes)
                    if lost.sent and not repeatable:
                        self._metrics.forwarded.labels("lost").inc()
                        raise AgentError(
                            503, "the replica that owns the agent's link is gone", retry_after_s=RETRY_AFTER_S
                        ) from None
            left_s = until - now_s()
            if left_s <= 0:
                self._metrics.forwarded.labels("no_owner").inc()
                return None
            await self._directory.change(min(left_s, AGAIN_S))

    def without_owner(self, call: AgentCall) -> Outcome:
        """Return the answer to a call while no replica owns its shard. It never confirms that data is stored."""
        settings = self._settings()
        if isinstance(call, PollCall):
            return Commands((), settings.poll.frequency_s)
        if isinstance(call, (HeartbeatCall, StatusCall)) and settings.heartbeat.when_link_down == "accept":
            return Accepted()
        return Failed(503, "the agent's link is between two replicas", retry_after_s=RETRY_AFTER_S)

    # --- one request ---

    def _arrival(self, arrived_s: float) -> float:
        """Return a lower bound for the arrival of a request.

        After a pause of this process, a request may have waited in the kernel since the last tick before the pause.
        """
        stood_still = self._clock.monotonic_s() - self._ticked_at > STOOD_STILL_S
        return min(arrived_s, self._ticked_at) if stood_still else arrived_s

    async def _ask(self, owner: Member, request: ProxyRequest, arrived_s: float, operation: str) -> ProxyResponse:
        """Send a request to an owner and return its reply. Raises `PairLost`."""
        if operation == "heartbeat":
            await self._pairs.open_lane(owner)
        pair = await self._pairs.acquire(owner)
        offset = self._offsets[owner.process]
        age_s = self._clock.monotonic_s() - arrived_s
        start = came(age_s, offset.in_its_terms(arrived_s)) + _head(request)
        answered = False
        try:
            limit_s = ANSWER_S if operation == "heartbeat" else None
            async with asyncio.timeout(limit_s):
                reply = await self._reply(pair, request, start)
            answered = True
        except TimeoutError:
            raise PairLost(sent=True) from None
        finally:
            if not answered:
                # The agent has not seen a reply, so the owner may offer its commands again at once.
                pair.tell(Note.UNWRITTEN)
                pair.close()
        self._answered.value += 1
        return reply

    async def _reply(self, pair: Pair, request: ProxyRequest, start: bytes) -> ProxyResponse:
        head = await pair.exchange(start, request.body, head_only=request.method == "HEAD")
        self._hear(pair, head)
        if head.status == MISDIRECTED:
            with suppress(ConnectionError):
                async for _ in pair.pieces():
                    pass
            self._pairs.release(pair)
            self._directory.outdated()
            raise PairLost(sent=False)
        headers = tuple((name, value) for name, value in head.headers if name.lower() not in _HOP_BY_HOP)
        leased = head.header(LEASE_HEADER.lower()) is not None
        if not leased and (head.length is None or head.length > WHOLE_BYTES):
            return ProxyResponse(head.status, headers, self._stream(pair), complete=True)
        try:
            body = b"".join([piece async for piece in pair.pieces()])
        except ConnectionError:
            raise PairLost(sent=True) from None
        if leased:
            return ProxyResponse(
                head.status, headers, body, RemoteReceipt(pair, request.client.connection), complete=True
            )
        self._pairs.release(pair)
        return ProxyResponse(head.status, headers, body, complete=True)

    async def _stream(self, pair: Pair) -> AsyncGenerator[bytes, None]:
        try:
            async for piece in pair.pieces():
                yield piece
        finally:
            self._pairs.release(pair)  # closes the connection unless the reply was read to its end

    def _hear(self, pair: Pair, head: ReplyHead) -> None:
        clock = head.header(CLOCK_HEADER.lower())
        with suppress(ValueError, TypeError):
            self._offsets[pair.process].heard(float(clock or ""), self._clock.monotonic_s())

    # --- what became of replies ---

    def written(self, receipt: RemoteReceipt) -> None:
        """Notify the owner that its reply was handed to the kernel, and remember to notify it of later evidence."""
        receipt.pair.tell(Note.WRITTEN)
        self._carried[receipt.connection].add(receipt.pair)

    def unwritten(self, receipt: RemoteReceipt) -> None:
        """Notify the owner that its reply was not written."""
        receipt.pair.tell(Note.UNWRITTEN)
        self._pairs.release(receipt.pair)

    def next_request(self, connection: int) -> None:
        """Notify owners that the agent sent another request on a connection, evidence that it read their replies."""
        self._end(connection, Note.NEXT)

    def connection_closed(self, connection: int, clean: bool) -> None:
        """Notify owners that a connection was closed."""
        self._end(connection, Note.CLOSED_CLEANLY if clean else Note.CLOSED)

    def _end(self, connection: int, kind: Note) -> None:
        for pair in self._carried.pop(connection, ()):
            pair.tell(kind)
            self._pairs.release(pair)

    # --- looking after it ---

    async def run(self) -> None:
        """Close unused connections and end overdue heartbeats, until cancelled."""
        swept_at = 0.0
        while True:
            await asyncio.sleep(TICK_S)
            now = self._ticked_at = self._clock.monotonic_s()
            if now - swept_at < SWEEP_S:
                continue
            swept_at = now
            living = self._directory.living()
            self._pairs.sweep(living, now)
            for process in [each for each in self._offsets if each not in living]:
                del self._offsets[process]
            for asked in self._asked:
                if not asked.over and asked.due <= now:
                    asked.answered(None)
            self._asked = [asked for asked in self._asked if not asked.over]

    def close(self) -> None:
        """Close all connections to other replicas."""
        self._pairs.close()


def _head(request: ProxyRequest) -> bytes:
    """Return the head of a request for the owner, without the headers that concern the agent's connection."""
    lines = [f"{request.method} {request.target} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in request.headers if name.lower() not in _NOT_SENT]
    if not isinstance(request.body, bytes):
        lines.append("Transfer-Encoding: chunked")
    elif request.body or request.method not in ("GET", "HEAD"):
        lines.append(f"Content-Length: {len(request.body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")
