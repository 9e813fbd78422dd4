"""Delivery of commands to agents: polls, offers, and evidence that an agent has received an offer.

A reply that was written to the kernel is not proof that the agent read it. An offer counts as delivered only on
evidence, see docs/reference/protocol.md#3-commands. Polls are described in docs/reference/protocol.md#13-poll.
"""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import count
from typing import Any

from msgspec.structs import replace

from shim.bridge.command_queues import CommandQueues
from shim.bridge.context import BridgeContext
from shim.core.agent_calls import OfferedCommand
from shim.core.command_queue import Batch, CommandQueue, QueuedCommand, QueuePolicy
from shim.core.records import AddTrace, CommandState, MarkCommands, Operation, SessionKey, TraceEntry
from shim.counting import Spreads
from shim.errors import StoreError
from shim.log import get
from shim.ports import Timer

log = get(__name__)

MAX_HAND_OVER_SAMPLES = 1024


class OfferedBatch:
    """A batch of commands in a poll reply; the `ports.DeliveryReceipt` that the agent API passes back.

    `polled_at` is the arrival of its poll in monotonic seconds.
    """

    __slots__ = ("key", "offer", "polled_at")

    def __init__(self, key: SessionKey, offer: Batch, polled_at: float) -> None:
        self.key = key
        self.offer = offer
        self.polled_at = polled_at

    @property
    def commands(self) -> tuple[OfferedCommand, ...]:
        """The commands as the reply contains them."""
        return tuple(
            OfferedCommand(live.record.id, live.record.type, live.record.payload, live.record.created_at)
            for live in self.offer.commands
        )


class PendingPoll:
    """A poll that waits for its answer.

    `offered` is resolved with an offer, or with None for an empty answer. `offering` is set while the offer is being
    stored; it is the caller's once the poll has returned.
    """

    __slots__ = ("arrived_at", "connection", "offered", "offering")

    def __init__(self, connection: int, arrived_at: float) -> None:
        self.connection = connection
        self.arrived_at = arrived_at
        self.offered: asyncio.Future[OfferedBatch | None] = asyncio.get_running_loop().create_future()
        self.offering: OfferedBatch | None = None

    def answer(self, offering: OfferedBatch | None) -> None:
        """Resolve the poll; do nothing if it is resolved already."""
        if not self.offered.done():
            self.offered.set_result(offering)


class CommandDelivery:
    """The waiting polls and the unconfirmed offers of all sessions.

    Its methods are synchronous. They submit writes and replies in order and never wait for them.
    """

    def __init__(self, ctx: BridgeContext, queues: CommandQueues) -> None:
        self.outbox = queues.outbox
        self._ctx = ctx
        self._queues = queues
        self._polls: dict[SessionKey, PendingPoll] = {}
        self._by_connection: dict[int, list[OfferedBatch]] = {}
        self._evidence_timers: dict[int, Timer] = {}
        self._numbers = count(1)
        self.hand_overs_s: deque[float] = deque(maxlen=MAX_HAND_OVER_SAMPLES)

    def held(self) -> int:
        """Return the number of held polls."""
        return len(self._polls)

    # --- polls --------------------------------------------------------------------------------------------------------

    def has_pending(self, key: SessionKey) -> bool:
        """Return True if a poll would have an effect: commands wait or are offered, or another poll is held."""
        queue = self._queues.get(key)
        return key in self._polls or (queue is not None and len(queue) > 0)

    def poll(self, key: SessionKey, connection: int, arrived_s: float, *, hold: bool) -> PendingPoll:
        """Start a poll: offer the waiting commands, or hold the poll if `hold` is set, or answer it empty.

        The poll may be evidence for the session's previous offer. A held poll of the same session is answered empty.
        """
        queue = self._queues.get(key)
        if queue is not None and queue.offer is not None and queue.offer.is_acknowledged_by_poll_at(arrived_s):
            self._delivered(key, queue, queue.offer, "poll")
        older = self._polls.pop(key, None)
        if older is not None:
            older.answer(None)
        poll = PendingPoll(connection, self._ctx.now)
        if queue is not None and queue.waiting():
            self._offer(key, queue, poll)
        elif hold:
            self._polls[key] = poll
        else:
            poll.answer(None)
        return poll

    def cancel_poll(self, key: SessionKey, poll: PendingPoll) -> None:
        """Cancel a waiting poll and requeue the commands of an offer that is not written yet."""
        if self._polls.get(key) is poll:
            del self._polls[key]
        if poll.offering is not None:
            self.unwritten(poll.offering)
            poll.offering = None
        poll.answer(None)

    def expire_poll(self, key: SessionKey, poll: PendingPoll) -> None:
        """Answer a poll empty when its hold time ends, unless an offer for it is being stored."""
        if self._polls.get(key) is poll:
            del self._polls[key]
            poll.answer(None)

    def end_all(self) -> None:
        """Answer every held poll empty, because the shim stops."""
        for key, poll in list(self._polls.items()):
            self.expire_poll(key, poll)

    def try_offer(self, key: SessionKey) -> None:
        """Offer the waiting commands of a session to its held poll, if it has both."""
        poll = self._polls.get(key)
        queue = self._queues.get(key)
        if poll is not None and queue is not None and queue.waiting():
            del self._polls[key]
            self._offer(key, queue, poll)

    def _offer(self, key: SessionKey, queue: CommandQueue, poll: PendingPoll) -> None:
        policy = self._ctx.queue_policy
        offer = queue.take(next(self._numbers), poll.connection, policy)
        if offer is None:
            poll.answer(None)
            return
        offering = poll.offering = OfferedBatch(key, offer, poll.arrived_at)
        wall = self._ctx.clock.wall_s()
        operations: list[Operation] = [MarkCommands(key, offer.ids, CommandState.OFFERED, wall, attempts=1)]
        for live in offer.commands:
            detail = f"attempt {live.attempts}" + (f", {live.reason}" if live.reason else "")
            operations.append(AddTrace(key, (live.record.id,), TraceEntry(wall, "offered", detail)))

        def done(outcome: list[Any] | StoreError) -> None:
            if poll.offering is not offering:
                return  # the poll was cancelled during the write, and its commands are queued again
            recorded = not isinstance(outcome, StoreError)
            left = poll.offering = offering if recorded else self._offer_without_record(queue, offering, policy)
            if left is not None:
                self._observe_offer(left, recorded=recorded)
            poll.answer(left)

        self._ctx.store.submit(operations, done)

    def _offer_without_record(
        self, queue: CommandQueue, offering: OfferedBatch, policy: QueuePolicy
    ) -> OfferedBatch | None:
        """Return the part of an offer that may be sent although the store failed to record it.

        Types in `commands.at_most_once` are withheld: after a crash they would be delivered again.
        """
        offer = queue.unrecorded(offering.offer, policy)
        log.error("offer_not_stored", session=offering.key.ident, offered=len(offer.ids) if offer else 0)
        for live in offering.offer.commands:
            if live.state is CommandState.QUEUED and live.expires_at <= self._ctx.now:
                self._queues.expire(offering.key, live.record.id)
        return OfferedBatch(offering.key, offer, offering.polled_at) if offer is not None else None

    def _observe_offer(self, offering: OfferedBatch, *, recorded: bool) -> None:
        """Count and log an offer.

        `recorded` is False if the store failed: after a crash the offer will not count as an attempt.
        """
        self._observe_age(offering, self._ctx.metrics.offer_seconds)
        for live in offering.offer.commands:
            self._queues.count("offered" if live.attempts == 1 else "redelivered")
            log.info(
                "command_offered",
                command=live.record.id,
                attempt=live.attempts,
                reason=live.reason,
                recorded=recorded,
            )

    def _observe_age(self, offering: OfferedBatch, seconds: Spreads) -> None:
        """Observe the age of the commands that are offered for the first time."""
        session = self._ctx.sessions.get(offering.key)
        if session is None:
            return
        child, now, metrics = seconds.labels(session.dialect), self._ctx.now, self._ctx.metrics
        for live in offering.offer.commands:
            if live.arrived_at is None or live.reason:
                continue
            age_s = now - live.arrived_at
            child.observe(age_s)
            if seconds is metrics.hand_over_seconds:
                self.hand_overs_s.append(age_s)
                if offering.polled_at <= live.arrived_at:
                    metrics.message_seconds.labels("down").observe(age_s)

    # --- evidence -----------------------------------------------------------------------------------------------------

    def written(self, offering: OfferedBatch) -> None:
        """Wait for evidence of delivery: the whole reply was passed to the kernel."""
        offer = offering.offer
        offer.written_at = self._ctx.now
        self._by_connection.setdefault(offer.connection, []).append(offering)
        self._observe_age(offering, self._ctx.metrics.hand_over_seconds)
        self._evidence_timers[offer.number] = self._ctx.timers.call_later(
            self._ctx.settings.commands.evidence_s, lambda: self._evidence_due(offering)
        )

    def unwritten(self, offering: OfferedBatch) -> None:
        """Requeue an offer that did not reach the agent, in its old place and without counting an attempt."""
        key, offer = offering.key, offering.offer
        queue = self._queues.get(key)
        if queue is not None and offer.written_at is None:
            self._requeue(key, queue, offer)
            self.try_offer(key)

    def _requeue(self, key: SessionKey, queue: CommandQueue, offer: Batch) -> None:
        back = queue.unwritten(offer)
        for state in (CommandState.QUEUED, CommandState.UNCERTAIN):
            ids = tuple(live.record.id for live in back if live.state is state)
            self._queues.record_transition(key, ids, state, "requeued", detail="not written", attempts=-1)
        now = self._ctx.now
        for live in back:
            log.info("command_requeued", command=live.record.id, session=key.ident, attempt=live.attempts + 1)
            if live.state is CommandState.QUEUED and live.expires_at <= now:
                self._queues.expire(key, live.record.id)

    def next_request(self, connection: int) -> None:
        """Mark the offers of a connection as delivered.

        An agent sends the next request on the same connection only after reading the whole previous reply.
        """
        for offering in self._by_connection.pop(connection, ()):
            queue = self._queues.get(offering.key)
            if queue is not None:
                self._delivered(offering.key, queue, offering.offer, "next request")

    def connection_closed(self, connection: int, clean: bool) -> None:
        """Record how the connection of an offer ended.

        After a clean close the session's next poll is evidence: the agent's kernel had acknowledged the whole reply.
        After a reset it is not, because the reply may have been discarded unread.
        """
        for offering in self._by_connection.pop(connection, ()):
            offering.offer.cleanly_closed = clean

    def connection_lost(self, connection: int) -> None:
        """Treat the offers of a connection as uncertain at once: the replica that served the connection is gone."""
        for offering in self._by_connection.pop(connection, ()):
            self._evidence_due(offering)

    def answered(self, key: SessionKey, command_id: str) -> None:
        """Mark a command as answered, and all commands of the same reply as delivered."""
        self._queues.answered(key, command_id)
        queue = self._queues.get(key)
        if queue is not None:
            self._note_delivered(key, queue.answered(command_id), "result")
            self.try_offer(key)

    def _delivered(self, key: SessionKey, queue: CommandQueue, offer: Batch, evidence: str) -> None:
        timer = self._evidence_timers.pop(offer.number, None)
        if timer is not None:
            timer.cancel()
        self._note_delivered(key, queue.delivered(offer), evidence)
        self.try_offer(key)

    def _note_delivered(self, key: SessionKey, done: tuple[QueuedCommand, ...], evidence: str) -> None:
        ids = tuple(live.record.id for live in done)
        self._queues.record_transition(key, ids, CommandState.DELIVERED, "delivered", detail=evidence)
        for command_id in ids:
            log.info("command_delivered", command=command_id, session=key.ident, evidence=evidence)

    def _evidence_due(self, offering: OfferedBatch) -> None:
        self._evidence_timers.pop(offering.offer.number, None)
        queue = self._queues.get(offering.key)
        if queue is None or queue.offer is not offering.offer:
            return
        doubt = queue.mark_uncertain(offering.offer, "no evidence", self._ctx.queue_policy)
        self._queues.handle_uncertain(offering.key, doubt, "no evidence")
        self.try_offer(offering.key)

    def move(self, source: SessionKey, target: SessionKey) -> None:
        """Move the commands of the superseded session `source` to `target`."""
        poll = self._polls.pop(source, None)
        if poll is not None:
            poll.answer(None)
        self._queues.moved(source, target)
        queue = self._queues.pop(source)
        if queue is None:
            return
        if queue.offer is not None:
            doubt = queue.mark_uncertain(queue.offer, "superseded", self._ctx.queue_policy)
            self._queues.handle_uncertain(target, doubt, "superseded")
        successor = self._queues.get_or_create(target)
        queue.drain_to(successor, lambda record: replace(record, session=target))
        for live in successor.all():
            self._queues.schedule_expiry(target, live)
        self.try_offer(target)
