"""Commands on their way down: arrival, offer, evidence, expiry (protocol.md §1.3, §3)."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import count
from typing import Any

import msgspec

from shim.bridge.context import Context
from shim.bridge.outbox import Outbox
from shim.core.calls import OfferedCommand
from shim.core.commands import CommandQueue, Doubt, Live, Offer
from shim.core.normalise import Normalised
from shim.core.records import (
    AddTrace,
    CommandRecord,
    MarkCommands,
    Operation,
    PutCommand,
    PutOutcome,
    SessionKey,
    State,
    TraceEntry,
)
from shim.core.sessions import Session
from shim.errors import StoreError
from shim.logs import get
from shim.ports import Timer

log = get("commands")

EXPIRY_SLACK = 4096


class Offering:
    """A batch that a reply carries: what `ports.Lease` is to the frontend."""

    __slots__ = ("key", "offer")

    def __init__(self, key: SessionKey, offer: Offer) -> None:
        self.key = key
        self.offer = offer

    @property
    def commands(self) -> tuple[OfferedCommand, ...]:
        """The commands as they stand in the reply."""
        return tuple(
            OfferedCommand(live.record.id, live.record.type, live.record.payload, live.record.created_at)
            for live in self.offer.commands
        )


class Poll:
    """A poll that waits: `offered` is resolved with an offering, or with `None` for an empty answer."""

    __slots__ = ("connection", "offered", "offering")

    def __init__(self, connection: int) -> None:
        self.connection = connection
        self.offered: asyncio.Future[Offering | None] = asyncio.get_running_loop().create_future()
        self.offering: Offering | None = None

    def answer(self, offering: Offering | None) -> None:
        """Let the poll go on, once."""
        if not self.offered.done():
            self.offered.set_result(offering)


class Delivery:
    """All queues. Every method is synchronous: what it does to disk and network happens behind it, in order."""

    def __init__(self, ctx: Context, outbox: Outbox) -> None:
        self._ctx = ctx
        self._outbox = outbox
        self._queues: dict[SessionKey, CommandQueue] = {}
        self._polls: dict[SessionKey, Poll] = {}
        self._by_connection: dict[int, list[Offering]] = {}
        self._numbers = count(1)
        self._expiries: list[tuple[float, int, SessionKey, str]] = []
        self._timer_at: float | None = None
        self._evidence_timers: dict[int, Timer] = {}
        self.woken: Callable[[SessionKey], None] = lambda key: None

    # --- looking ------------------------------------------------------------------------------------------------------

    def queue(self, key: SessionKey) -> CommandQueue | None:
        """A session's queue, if it has one."""
        return self._queues.get(key)

    def queues(self) -> Iterable[tuple[SessionKey, CommandQueue]]:
        """All queues that hold something."""
        return [(key, queue) for key, queue in self._queues.items() if len(queue)]

    def held(self) -> int:
        """How many polls wait."""
        return len(self._polls)

    def _queue_of(self, key: SessionKey) -> CommandQueue:
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = CommandQueue()
        return queue

    # --- arrival ------------------------------------------------------------------------------------------------------

    def load(self, records: tuple[CommandRecord, ...]) -> None:
        """Take in what the store holds after a restart; offered commands are uncertain now (protocol.md §3)."""
        now, wall = self._ctx.now, self._ctx.clock.wall_s()
        for record in records:
            self._admit(record, now + (record.expires_wall - wall))
        for key, queue in list(self._queues.items()):
            self._doubted(key, queue.judge_loaded(self._ctx.queue_policy), "restart")

    def arrive(
        self, session: Session, command: Normalised, request_id: str, acked: Callable[[], None] | None = None
    ) -> None:
        """A command for this session: disk first, then its queue, then the waiting poll. `acked` is called when it is

        safe (also for a duplicate). Refusals go to the controller with their code.
        """
        key = session.key
        now, wall = self._ctx.now, self._ctx.clock.wall_s()
        size_bytes = len(msgspec.json.encode(command.payload)) + len(command.id) + len(command.type)
        queue = self._queue_of(key)
        if not queue.room_for(size_bytes, self._ctx.queue_policy) and queue.get(command.id) is None:
            self._refuse(session, command.id, request_id, "queue_full", "the queue for this cluster is full")
            return
        record = CommandRecord(
            session=key,
            id=command.id,
            type=command.type,
            payload=command.payload,
            created_at=command.created_at,
            arrived_wall=wall,
            expires_wall=command.expires_wall,
            request_id=request_id,
            size_bytes=size_bytes,
        )
        queue.reserve(size_bytes)
        expires_at = now + (command.expires_wall - wall)

        def done(outcome: list[Any] | StoreError) -> None:
            queue.release(size_bytes)
            if isinstance(outcome, StoreError):
                log.error("command_not_stored", command=command.id, error=str(outcome))
                self._refuse(session, command.id, request_id, "store_unavailable", "the queue cannot be written")
                return
            self._stored(session, record, outcome[0], expires_at, now)
            if acked is not None:
                acked()

        self._ctx.store.submit([PutCommand(record), self._trace(key, (record.id,), "arrived", record.type)], done)

    def _stored(
        self, session: Session, record: CommandRecord, put: PutOutcome, expires_at: float, arrived_at: float
    ) -> None:
        key = session.key
        if put.duplicate:
            self._count("duplicate")
            log.info("command_duplicate", command=record.id, session=key.ident, state=put.state.value)
            if put.result is not None:
                self._outbox.resend(key, record.id, record.request_id, put.result)
            return
        self._count("queued")
        log.info("command_queued", command=record.id, type=record.type, session=key.ident)
        live = self._admit(replace(record, session=key, seq=put.seq), expires_at)
        live.arrived_at = arrived_at
        if session.first_waiting_at is None:
            session.first_waiting_at = self._ctx.now
        self._wake(key)

    def _admit(self, record: CommandRecord, expires_at: float) -> Live:
        live = self._queue_of(record.session).add(record, expires_at)
        heapq.heappush(self._expiries, (expires_at, record.seq, record.session, record.id))
        if len(self._expiries) > 2 * self._live + EXPIRY_SLACK:
            self._compact()
        self._arm_expiry()
        return live

    @property
    def _live(self) -> int:
        return sum(map(len, self._queues.values())) if len(self._expiries) > EXPIRY_SLACK else EXPIRY_SLACK

    def _compact(self) -> None:
        """Most commands are fetched long before they expire: forget the dates of those that are."""
        self._expiries = [entry for entry in self._expiries if self._still_queued(entry[2], entry[3])]
        heapq.heapify(self._expiries)

    def _still_queued(self, key: SessionKey, command_id: str) -> bool:
        queue = self._queues.get(key)
        return queue is not None and queue.get(command_id) is not None

    def _refuse(self, session: Session, command_id: str, request_id: str, code: str, error: str) -> None:
        self._count(f"rejected_{code}")
        log.warning("command_rejected", command=command_id, session=session.key.ident, code=code)
        self._outbox.report(session.key, session, command_id, request_id, code=code, error=error)

    # --- polls --------------------------------------------------------------------------------------------------------

    def poll(self, key: SessionKey, connection: int, hold: bool) -> Poll:
        """A poll arrived: its earlier offer may be evidenced by it; then it gets what there is, or waits if `hold`.

        A poll of this session that waits already is answered empty.
        """
        queue = self._queues.get(key)
        if queue is not None and queue.offer is not None:
            offer = queue.offer
            if offer.written_at is not None and offer.cleanly_closed is not False:
                self._delivered(key, queue, offer, "poll")
        older = self._polls.pop(key, None)
        if older is not None:
            older.answer(None)
        poll = Poll(connection)
        if queue is not None and queue.waiting():
            self._offer(key, queue, poll)
        elif hold:
            self._polls[key] = poll
        else:
            poll.answer(None)
        return poll

    def abandon(self, key: SessionKey, poll: Poll) -> None:
        """The agent left, or the wait is over: a poll that waits no more gets nothing, and what was on its way to it

        is queued again at once.
        """
        if self._polls.get(key) is poll:
            del self._polls[key]
        if poll.offering is not None:
            self.unwritten(poll.offering)
            poll.offering = None
        poll.answer(None)

    def end_poll(self, key: SessionKey, poll: Poll) -> None:
        """The hold is over: answer empty, unless an offer is on its way already."""
        if self._polls.get(key) is poll:
            del self._polls[key]
            poll.answer(None)

    def end_all(self) -> None:
        """The shim stops: every held poll is answered empty."""
        for key, poll in list(self._polls.items()):
            self.end_poll(key, poll)

    def _wake(self, key: SessionKey) -> None:
        poll = self._polls.get(key)
        queue = self._queues.get(key)
        if poll is not None and queue is not None and queue.waiting():
            del self._polls[key]
            self._offer(key, queue, poll)

    def _offer(self, key: SessionKey, queue: CommandQueue, poll: Poll) -> None:
        policy = self._ctx.queue_policy
        offer = queue.take(next(self._numbers), poll.connection, policy)
        if offer is None:
            poll.answer(None)
            return
        offering = poll.offering = Offering(key, offer)
        wall = self._ctx.clock.wall_s()
        operations: list[Operation] = [MarkCommands(key, offer.ids, State.OFFERED, wall, attempts=1)]
        for live in offer.commands:
            detail = f"attempt {live.attempts}" + (f", {live.reason}" if live.reason else "")
            operations.append(self._trace(key, (live.record.id,), "offered", detail))

        def done(outcome: list[Any] | StoreError) -> None:
            if poll.offering is not offering:
                return  # abandoned meanwhile
            if isinstance(outcome, StoreError) and any(live.record.type in policy.at_most_once for live in offer.commands):
                # An offer that leaves no record could be repeated after a crash: not for these.
                log.error("offer_not_stored", session=key.ident, error=str(outcome))
                poll.offering = None
                queue.unwritten(offer)
                poll.answer(None)
                return
            self._observe_offer(offer)
            poll.answer(offering)

        self._ctx.store.submit(operations, done)

    def _observe_offer(self, offer: Offer) -> None:
        now = self._ctx.now
        for live in offer.commands:
            self._count("offered" if live.attempts == 1 else "redelivered")
            if live.arrived_at is not None and not live.reason:
                self._ctx.metrics.offer_seconds.observe(now - live.arrived_at)
            log.info("command_offered", command=live.record.id, attempt=live.attempts, reason=live.reason)

    # --- evidence -----------------------------------------------------------------------------------------------------

    def written(self, offering: Offering) -> None:
        """The reply is with the kernel: now wait for evidence."""
        offer = offering.offer
        offer.written_at = self._ctx.now
        self._by_connection.setdefault(offer.connection, []).append(offering)
        now = offer.written_at
        for live in offer.commands:
            if live.arrived_at is not None and not live.reason:
                self._ctx.metrics.hand_over_seconds.observe(now - live.arrived_at)
        self._evidence_timers[offer.number] = self._ctx.timers.call_later(
            self._ctx.settings.commands.evidence_s, lambda: self._evidence_due(offering)
        )

    def unwritten(self, offering: Offering) -> None:
        """The reply did not reach the agent: everything is queued again in its old place; that was no attempt."""
        key, offer = offering.key, offering.offer
        queue = self._queues.get(key)
        if queue is None or offer.written_at is not None:
            return
        back = queue.unwritten(offer)
        for state in (State.QUEUED, State.UNCERTAIN):
            ids = tuple(live.record.id for live in back if live.state is state)
            if ids:
                self._count("requeued", len(ids))
                wall = self._ctx.clock.wall_s()
                self._ctx.store.submit(
                    [MarkCommands(key, ids, state, wall, attempts=-1), self._trace(key, ids, "requeued", "not written")]
                )
        now = self._ctx.now
        for live in back:
            if live.state is State.QUEUED and live.expires_at <= now:
                self._expire(key, live.record.id)
        self._wake(key)

    def next_request(self, connection: int) -> None:
        """The agent goes on with the connection that carried a reply: it has read it."""
        for offering in self._by_connection.pop(connection, ()):
            queue = self._queues.get(offering.key)
            if queue is not None and queue.offer is offering.offer:
                self._delivered(offering.key, queue, offering.offer, "next request")

    def connection_closed(self, connection: int, clean: bool) -> None:
        """The connection that carried a reply is gone; if it was not closed cleanly, a later poll proves nothing."""
        for offering in self._by_connection.pop(connection, ()):
            offering.offer.cleanly_closed = clean

    def answered(self, key: SessionKey, command_id: str) -> None:
        """A result is on disk: the agent has the command, and the whole reply that it came in."""
        queue = self._queues.get(key)
        if queue is None:
            return
        queue.answered(command_id)
        if queue.offer is not None and command_id in queue.offer.ids:
            self._delivered(key, queue, queue.offer, "result")
        self._wake(key)

    def _delivered(self, key: SessionKey, queue: CommandQueue, offer: Offer, evidence: str) -> None:
        timer = self._evidence_timers.pop(offer.number, None)
        if timer is not None:
            timer.cancel()
        done = queue.delivered(offer)
        ids = tuple(live.record.id for live in done)
        if ids:
            self._count("delivered", len(ids))
            wall = self._ctx.clock.wall_s()
            self._ctx.store.submit(
                [MarkCommands(key, ids, State.DELIVERED, wall), self._trace(key, ids, "delivered", evidence)]
            )
        session = self._ctx.sessions.get(key)
        if session is not None:
            session.first_waiting_at = self._ctx.now if len(queue) else None
            session.waiting_reported = False
        self._wake(key)

    def _evidence_due(self, offering: Offering) -> None:
        self._evidence_timers.pop(offering.offer.number, None)
        queue = self._queues.get(offering.key)
        if queue is None or queue.offer is not offering.offer:
            return
        doubt = queue.doubt(offering.offer, "no evidence", self._ctx.queue_policy)
        self._doubted(offering.key, doubt, "no evidence")
        self._wake(offering.key)

    def _doubted(self, key: SessionKey, doubt: Doubt, reason: str) -> None:
        wall = self._ctx.clock.wall_s()
        again = tuple(live.record.id for live in doubt.again)
        if again:
            self._count("uncertain", len(again))
            log.warning("commands_uncertain", session=key.ident, commands=len(again), reason=reason)
            self._ctx.store.submit(
                [MarkCommands(key, again, State.UNCERTAIN, wall), self._trace(key, again, "uncertain", reason)]
            )
        for live in doubt.dead:
            self.end(key, live, State.DEAD, "undeliverable", f"given up after {live.attempts} offers: {reason}")

    # --- ends ---------------------------------------------------------------------------------------------------------

    def end(self, key: SessionKey, live: Live, state: State, code: str, error: str) -> None:
        """A command that left its queue ends EXPIRED or DEAD, and the controller is told."""
        self._count(state.value)
        log.warning("command_ended", command=live.record.id, session=key.ident, code=code)
        wall = self._ctx.clock.wall_s()
        self._ctx.store.submit(
            [
                MarkCommands(key, (live.record.id,), state, wall),
                self._trace(key, (live.record.id,), state.value, error),
            ]
        )
        session = self._ctx.sessions.get(key)
        self._outbox.report(key, session, live.record.id, live.record.request_id, code=code, error=error)

    def end_session(self, key: SessionKey) -> None:
        """The session is deleted: its commands end EXPIRED."""
        queue = self._queues.pop(key, None)
        for live in queue.all() if queue is not None else ():
            self.end(key, live, State.EXPIRED, "expired", "the agent was not seen for too long")

    def move(self, source: SessionKey, target: SessionKey) -> None:
        """The session `source` was superseded: its commands wait for `target` now."""
        poll = self._polls.pop(source, None)
        if poll is not None:
            poll.answer(None)
        queue = self._queues.pop(source, None)
        if queue is None:
            return
        successor = self._queue_of(target)
        queue.drain_to(successor, lambda record: replace(record, session=target))
        for live in successor.all():
            heapq.heappush(self._expiries, (live.expires_at, live.seq, target, live.record.id))
        self._arm_expiry()
        self._wake(target)

    def _expire(self, key: SessionKey, command_id: str) -> None:
        queue = self._queues.get(key)
        live = queue.expire(command_id) if queue is not None else None
        if live is not None:
            self.end(key, live, State.EXPIRED, "expired", "not fetched in time")

    def _arm_expiry(self) -> None:
        if not self._expiries:
            return
        due_at = self._expiries[0][0]
        if self._timer_at is not None and self._timer_at <= due_at:
            return
        self._timer_at = due_at
        self._ctx.timers.call_later(min(max(due_at - self._ctx.now, 0.0), 86_400.0), lambda: self._expire_due(due_at))

    def _expire_due(self, armed_for: float) -> None:
        if self._timer_at != armed_for:
            return
        self._timer_at = None
        now = self._ctx.now
        while self._expiries and self._expiries[0][0] <= now:
            _, _, key, command_id = heapq.heappop(self._expiries)
            self._expire(key, command_id)
        self._arm_expiry()

    def _trace(self, key: SessionKey, ids: tuple[str, ...], event: str, detail: str = "") -> AddTrace:
        return AddTrace(key, ids, TraceEntry(self._ctx.clock.wall_s(), event, detail))

    def _count(self, event: str, number: int = 1) -> None:
        self._ctx.metrics.commands.labels(event).inc(number)
