"""The way of a command to its agent, from its arrival to the evidence of its delivery; `Outbox` has its result's.

| step | method | stored state |
|---|---|---|
| the controller sends a command | `arrive` | |
| the command is stored | `_store`, `_put_done`, `_stored` | QUEUED |
| it is put into the reply to a poll | `_offer`, `_offer_recorded` | OFFERED |
| both at once, for a poll that is held | `_store`, `_put_done`, `_offer_stored` | OFFERED |
| the reply is written | `written` | OFFERED |
| there is evidence that the agent has received it | `_delivered` | DELIVERED |
| the agent posts its result | `Outbox.post_result`, `answered` | ANSWERED |
| the controller confirms the result | `Outbox.confirmed` | CLOSED |

A command leaves this way if it is rejected (`_refuse`), if its reply is not written (`unwritten`), if there is no
evidence in time (`_evidence_due`), or if it expires or is given up (`CommandQueues.finish`). The states and events are
those of `core.command_queue.TRANSITIONS`, the rules those of docs/reference/protocol.md#3-commands.

A reply that was written to the kernel is no proof that the agent has read it. An offer counts as delivered only on
evidence: the next request on the connection, a later poll, or a result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import count, groupby

import msgspec
from msgspec.structs import replace

from shim.bridge.command_queues import AwaitedEvidence, CommandQueues, PendingPoll
from shim.bridge.context import BridgeContext, Moment
from shim.bridge.outbox import DRAINED, REASONS, Outbox, Rejection, Rejections
from shim.core.command_queue import Batch, CommandQueue, OpenUntil, QueuedCommand, QueuePolicy
from shim.core.records import (
    VIA_HTTP,
    CommandRecord,
    CommandState,
    LookUpCommand,
    PutCommand,
    PutOutcome,
    SessionKey,
    TraceEntry,
)
from shim.core.sessions import Session
from shim.errors import StoreError
from shim.log import get
from shim.metrics import LabelledHistogram
from shim.protocol.command_message import ParsedCommand

log = get(__name__)

MAX_HAND_OVER_SAMPLES = 1024


class _Arrival(msgspec.Struct):
    """One command that is being accepted or rejected. `at` is its arrival in monotonic seconds.

    `offer` is the held poll that it is stored for as offered, with the step of that offer.
    """

    session: Session
    record: CommandRecord
    at: float
    settled: Callable[[bool], None]
    offer: tuple[PendingPoll, TraceEntry] | None = None


def _attempt(offered: QueuedCommand) -> str:
    """Return the detail of a command's step `offered`."""
    return f"attempt {offered.attempts}" + (f", {offered.reason}" if offered.reason else "")


class CommandDelivery:
    """The commands of all sessions on their way, the waiting polls, and the offers without evidence.

    Its methods are synchronous. They submit writes and replies in order and never wait for them. While it is `closed`,
    new commands are rejected, and counted in `refused_by_drain`.
    """

    def __init__(self, ctx: BridgeContext, queues: CommandQueues, outbox: Outbox, rejections: Rejections) -> None:
        self._ctx = ctx
        self._queues = queues
        self._outbox = outbox
        self._rejections = rejections
        self._polls: dict[SessionKey, PendingPoll] = {}
        self.evidence = AwaitedEvidence(ctx.timers)
        outbox.answered = self.answered
        self._numbers = count(1)
        self.hand_overs_s: deque[float] = deque(maxlen=MAX_HAND_OVER_SAMPLES)
        self.closed = False
        self.refused_by_drain = 0

    # --- arrival: rejected or stored ----------------------------------------------------------------------------------

    def arrive(
        self,
        session: Session,
        command: ParsedCommand,
        request_id: str,
        at: Moment,
        settled: Callable[[bool], None],
        via: str = "",
    ) -> None:
        """Accept or reject a command for this session.

        `settled(True)` is called once the command is stored, also for a duplicate. A rejection (`expired`,
        `queue_full`, `store_unavailable`) is reported to the controller, is not stored, and calls `settled(False)`.
        `via` is the same as in `CommandRecord`: a command that came by HTTP cannot be reported.

        A command that is known already is a duplicate and never rejected. So it is looked up before it is rejected as
        expired, because the queue is full, or because of a drain. Commands that an agent is fetching by HTTP are
        accepted even during a drain or after they have expired.
        """
        record = command.record(session.key, request_id, at.unix, via)
        arrival = _Arrival(session, record, at.now, settled)
        queue, by_http = self._queues.get_or_create(session.key), via == VIA_HTTP
        queued = queue.get(record.id)
        if queued is not None:
            self._known(arrival, PutOutcome(queued.seq, duplicate=True, state=queued.state))
        elif self._ctx.arriving.exhausted:
            self._refuse(arrival, "store_unavailable")
        elif record.expires_unix <= record.arrived_unix and not by_http:
            self._look_up(arrival, "expired", REASONS["expired"])
        elif self.closed and not by_http:
            self._look_up(arrival, "queue_full", DRAINED)
        elif not queue.room_for(record.size_bytes, self._ctx.queue_policy):
            self._look_up(arrival, "queue_full", REASONS["queue_full"])
        else:
            self._store(arrival, queue)

    def _store(self, arrival: _Arrival, queue: CommandQueue) -> None:
        """Store a command. If it is the only one and a poll is held, store it as offered: one commit less to wait for.

        The poll stays held until the command is stored.
        """
        record = arrival.record
        put, poll = PutCommand(record), self._polls.get(record.session)
        if poll is not None and queue.is_idle():
            offered = TraceEntry(record.arrived_unix, "offered", "attempt 1")
            arrival.offer = poll, offered
            put = PutCommand(replace(record, state=CommandState.OFFERED, attempts=1), offered)
        queue.reserve(record.size_bytes)
        self._ctx.arriving.add(record.size_bytes)
        self._ctx.show_step(record.session, (record.id,), put.arrived)
        self._ctx.store.submit(put, done=partial(self._put_done, arrival, queue))

    def _put_done(self, arrival: _Arrival, queue: CommandQueue, outcome: PutOutcome | StoreError) -> None:
        record = arrival.record
        queue.release(record.size_bytes)
        self._ctx.arriving.remove(record.size_bytes)
        if isinstance(outcome, StoreError):
            log.error("command_not_stored", dedupe_key=str(outcome), command=record.id, error=str(outcome))
            self._ctx.refused_bytes = max(self._ctx.refused_bytes, record.size_bytes)
            self._refuse(arrival, "store_unavailable")
        elif outcome.duplicate:
            self._known(arrival, outcome)
        else:
            self._stored(arrival, outcome.seq)

    def _stored(self, arrival: _Arrival, seq: int) -> None:
        """Queue a command that was just stored, and offer it if a poll is held."""
        record, at = arrival.record, self._ctx.moment()
        expires_at = arrival.at + (record.expires_unix - record.arrived_unix)
        queued = self._queues.add_stored(arrival.session, replace(record, seq=seq), expires_at, at.now)
        if queued is None:
            self._known(arrival, PutOutcome(seq, duplicate=True))
            return
        queued.arrived_at, key = arrival.at, queued.record.session
        arrival.settled(True)
        self._queues.count("queued")
        log.info("command_queued", command=record.id, type=record.type, session=key.ident)
        if arrival.offer is not None:
            self._offer_stored(queued, *arrival.offer, at)
        self._offer_or_end(key, at)

    def requeued(self, session: Session, record: CommandRecord, at: Moment) -> None:
        """Queue a command that an operator has queued again in the store, and offer it if a poll is held."""
        queued = self._queues.add_stored(session, record, at.now + record.expires_unix - at.unix, at.now)
        if queued is not None:
            # An earlier reply contained the command: its late result must not be evidence for the whole next reply.
            queued.replies = 1
            self._offer_or_end(queued.record.session, at)

    def _offer_or_end(self, key: SessionKey, at: Moment) -> None:
        """Offer a command that was just queued if a poll is held; end it if its session was removed meanwhile."""
        if self._ctx.sessions.get(key) is None:
            self._queues.end_session(key)
        self.try_offer(key, at)

    def _offer_stored(self, queued: QueuedCommand, poll: PendingPoll, offered: TraceEntry, at: Moment) -> None:
        """Answer the held poll with a command that was stored as offered, or requeue it if that is no longer possible.

        During the write the poll may have ended, or another command may have come to the queue, as by a move.
        """
        key, ids = queued.record.session, (queued.record.id,)
        self._ctx.show_step(key, ids, offered)
        queue = self._queues.get_or_create(key)
        if self._polls.get(key) is poll and queue.all() == (queued,):
            del self._polls[key]
            poll.batch = queue.take(next(self._numbers), poll.connection, poll.arrived_s, self._ctx.queue_policy)
            self._answer(poll, at.now, recorded=True)
        else:
            back = self._ctx.mark(key, ids, CommandState.QUEUED, at.unix, "requeued", "not written", attempts=-1)
            self._queues.record_transition(back)

    def _look_up(self, arrival: _Arrival, code: str, error: str) -> None:
        """Look up a command that may not be accepted: a known one is a duplicate, any other is rejected."""
        # The payload is not needed for the lookup. Thousands of these may wait for the disk at a time: free its memory.
        record = arrival.record = replace(arrival.record, payload={})
        self._ctx.arriving.add(0)
        done = partial(self._looked_up, arrival, code, error)
        self._ctx.store.submit(LookUpCommand(record.session, record.id), done=done)

    def _looked_up(self, arrival: _Arrival, code: str, error: str, outcome: PutOutcome | StoreError | None) -> None:
        self._ctx.arriving.remove(0)
        if isinstance(outcome, PutOutcome):
            self._known(arrival, outcome)
        else:
            self.refused_by_drain += error is DRAINED
            self._refuse(arrival, code, error)

    def _known(self, arrival: _Arrival, known: PutOutcome) -> None:
        """Acknowledge a duplicate. If its result is known, send that again."""
        record = arrival.record
        arrival.settled(True)
        self._queues.count("duplicate")
        log.info("command_duplicate", command=record.id, session=record.session.ident, state=known.state.value)
        if known.result is not None:
            self._outbox.resend(record.session, record.id, record.request_id, known.result)

    def _refuse(self, arrival: _Arrival, code: str, error: str = "") -> None:
        record, error = arrival.record, error or REASONS[code]
        arrival.settled(False)
        rejection = Rejection(record.session, record.id, record.request_id, code, error, session=arrival.session)
        self._rejections.reject(rejection, report=record.via != VIA_HTTP)

    # --- polls --------------------------------------------------------------------------------------------------------

    def held(self) -> int:
        """Return the number of held polls."""
        return len(self._polls)

    def has_pending(self, key: SessionKey) -> bool:
        """Return True if a poll would have an effect: commands wait or are offered, or another poll is held."""
        queue = self._queues.get(key)
        return key in self._polls or (queue is not None and len(queue) > 0)

    def poll(self, key: SessionKey, connection: int, arrived_s: float, *, hold: bool) -> PendingPoll:
        """Start a poll: offer the waiting commands, or hold the poll if `hold` is set, or answer it empty.

        The poll may be evidence for the session's previous offer. A held poll of the same session is answered empty.
        Polls are described in docs/reference/protocol.md#13-poll.
        """
        queue, at = self._queues.get(key), self._ctx.moment()
        if queue is not None and queue.offer is not None and queue.offer.is_read_at_poll(arrived_s, at.now):
            self._delivered(queue, queue.offer, "poll", at)
        older = self._polls.pop(key, None)
        if older is not None:
            older.answer(None)
        poll = PendingPoll(connection, at.now)
        if queue is not None and queue.waiting():
            self._offer(queue, poll, at)
        elif hold:
            self._polls[key] = poll
        else:
            poll.answer(None)
        return poll

    def cancel_poll(self, key: SessionKey, poll: PendingPoll) -> None:
        """Cancel a waiting poll and requeue the commands of an offer that is not written yet."""
        if self._polls.get(key) is poll:
            del self._polls[key]
        if poll.batch is not None:
            self.unwritten(poll.batch)
            poll.batch = None
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

    # --- offer --------------------------------------------------------------------------------------------------------

    def try_offer(self, key: SessionKey, at: Moment) -> None:
        """Offer the waiting commands of a session to its held poll, if it has both."""
        poll = self._polls.get(key)
        queue = self._queues.get(key)
        if poll is not None and queue is not None and queue.waiting():
            del self._polls[key]
            self._offer(queue, poll, at)

    def _offer(self, queue: CommandQueue, poll: PendingPoll, at: Moment) -> None:
        policy = self._ctx.queue_policy
        batch = poll.batch = queue.take(next(self._numbers), poll.connection, poll.arrived_s, policy)
        if batch is None:
            poll.answer(None)
            return
        marks = []
        for detail, commands in groupby(batch.commands, _attempt):
            ids = tuple(queued.record.id for queued in commands)
            marks.append(self._ctx.mark(queue.key, ids, CommandState.OFFERED, at.unix, "offered", detail, attempts=1))
        self._ctx.store.submit(*marks, done=partial(self._offer_recorded, queue, poll, batch, policy))

    def _offer_recorded(
        self, queue: CommandQueue, poll: PendingPoll, batch: Batch, policy: QueuePolicy, outcome: StoreError | None
    ) -> None:
        """Answer the poll. If the store failed, answer it with what may be sent without a record."""
        if poll.batch is not batch:
            return  # the poll was cancelled during the write, and its commands are queued again
        now = self._ctx.now
        if outcome is not None:
            poll.batch = self._offer_without_record(queue, batch, policy, now)
        self._answer(poll, now, recorded=outcome is None)

    def _answer(self, poll: PendingPoll, now: float, *, recorded: bool) -> None:
        """Answer a poll with its offer. `recorded` is the same as in `_observe_offer`."""
        poll.answer(poll.batch)
        if poll.batch is not None:
            self._observe_offer(poll.batch, now, recorded=recorded)

    def _offer_without_record(self, queue: CommandQueue, batch: Batch, policy: QueuePolicy, now: float) -> Batch | None:
        """Return the part of an offer that may be sent although the store failed to record it.

        Types in `commands.at_most_once` are withheld: after a crash they would be delivered again.
        """
        rest = queue.unrecorded(batch, policy)
        log.error("offer_not_stored", session=batch.key.ident, offered=len(rest.ids) if rest else 0)
        self._queues.expire_overdue(batch.key, batch.commands, now)
        return rest

    def _observe_offer(self, batch: Batch, now: float, *, recorded: bool) -> None:
        """Count and log an offer.

        `recorded` is False if the store failed: after a crash the offer will not count as an attempt.
        """
        self._observe_age(batch, self._ctx.metrics.offer_seconds, now)
        for queued in batch.commands:
            self._queues.count("offered" if queued.attempts == 1 else "redelivered")
            log.info(
                "command_offered",
                command=queued.record.id,
                attempt=queued.attempts,
                reason=queued.reason,
                recorded=recorded,
            )

    def _observe_age(self, batch: Batch, seconds: LabelledHistogram, now: float) -> None:
        """Observe the age of the commands that are offered for the first time."""
        session = self._ctx.sessions.get(batch.key)
        if session is None:
            return
        child, metrics = seconds.labels(session.dialect), self._ctx.metrics
        for queued in batch.commands:
            if queued.arrived_at is None or queued.reason:
                continue
            age_s = now - queued.arrived_at
            child.observe(age_s)
            if seconds is metrics.hand_over_seconds:
                self.hand_overs_s.append(age_s)
                if batch.polled_at <= queued.arrived_at:
                    metrics.message_seconds.labels("down").observe(age_s)

    # --- the reply: written or not ------------------------------------------------------------------------------------

    def written(self, batch: Batch, open_until: OpenUntil) -> None:
        """Wait for evidence of delivery: the whole reply was passed to the kernel."""
        now = batch.written_at = self._ctx.now
        batch.open_until = open_until
        self.evidence.add(batch, self._ctx.settings.commands.evidence_s, self._evidence_due)
        self._observe_age(batch, self._ctx.metrics.hand_over_seconds, now)

    def unwritten(self, batch: Batch) -> None:
        """Requeue an offer that did not reach the agent, in its old place and without counting an attempt."""
        queue = self._queues.get(batch.key)
        if queue is None or batch.written_at is not None:
            return
        key, at = batch.key, self._ctx.moment()
        back = queue.unwritten(batch)
        for state in (CommandState.QUEUED, CommandState.UNCERTAIN):
            ids = tuple(queued.record.id for queued in back if queued.state is state)
            mark = self._ctx.mark(key, ids, state, at.unix, "requeued", "not written", attempts=-1)
            self._queues.record_transition(mark)
        for queued in back:
            log.info("command_requeued", command=queued.record.id, session=key.ident, attempt=queued.attempts + 1)
        self._queues.expire_overdue(key, back, at.now)
        self.try_offer(key, at)

    # --- evidence -----------------------------------------------------------------------------------------------------

    def next_request(self, connection: int) -> None:
        """Mark the offers of a connection as delivered.

        An agent sends the next request on the same connection only after reading the whole previous reply.
        """
        at = self._ctx.moment()
        for batch in self.evidence.take(connection):
            queue = self._queues.get(batch.key)
            if queue is not None:
                self._delivered(queue, batch, "next request", at)

    def connection_open(self, connection: int, until_s: float) -> bool:
        """Mark offers as delivered whose connection was open at `until_s`, after a later poll.

        Returns False if no offer on this connection has such a poll or can get one: a poll after the offer has become
        uncertain is none.
        """
        awaited = False
        for batch in self.evidence.on(connection):
            queue = self._queues.get(batch.key)
            if queue is not None and batch.is_confirmed_by_open_at(until_s):
                self._delivered(queue, batch, "poll", self._ctx.moment())
            elif queue is not None:
                awaited |= queue.offer is batch or batch.unconfirmed_poll_at is not None
        return awaited

    def connection_closed(self, connection: int, clean: bool | None) -> None:
        """Record how the connection of an offer ended.

        After a clean close a later poll of the session is evidence, also one that came before the close: the agent's
        kernel had acknowledged the whole reply. After a reset it is not, because the reply may have been discarded
        unread. If the replica that served the connection is gone (`clean` is None), no evidence can come any longer, so
        the offers are uncertain at once.
        """
        for batch in self.evidence.take(connection):
            queue = self._queues.get(batch.key)
            if clean is None:
                self.evidence.settle(batch)
                self._evidence_due(batch)
            elif clean and queue is not None and batch.unconfirmed_poll_at is not None:
                self._delivered(queue, batch, "poll", self._ctx.moment())
            else:
                batch.cleanly_closed = clean

    def _delivered(self, queue: CommandQueue, batch: Batch, evidence: str, at: Moment) -> None:
        self.evidence.settle(batch)
        self._record_delivered(queue.key, queue.delivered(batch), evidence, at)
        self.try_offer(queue.key, at)

    def _record_delivered(
        self, key: SessionKey, commands: tuple[QueuedCommand, ...], evidence: str, at: Moment
    ) -> None:
        ids = tuple(queued.record.id for queued in commands)
        self._queues.record_transition(self._ctx.mark(key, ids, CommandState.DELIVERED, at.unix, "delivered", evidence))
        for command_id in ids:
            log.info("command_delivered", command=command_id, session=key.ident, evidence=evidence)

    def _evidence_due(self, batch: Batch) -> None:
        """Treat an offer as uncertain: there was no evidence for it in time."""
        queue = self._queues.get(batch.key)
        if queue is None or queue.offer is not batch:
            self.evidence.settle(batch)
            return
        at = self._ctx.moment()
        uncertain = queue.mark_uncertain(batch, "no evidence", self._ctx.queue_policy)
        self._queues.handle_uncertain(batch.key, uncertain, "no evidence", at.unix)
        self.try_offer(batch.key, at)

    def answered(self, key: SessionKey, command_id: str) -> None:
        """Mark a command as answered, and all commands of the same reply as delivered."""
        self._queues.answered(key, command_id)
        queue = self._queues.get(key)
        if queue is not None:
            at, offer = self._ctx.moment(), queue.offer
            self._record_delivered(key, queue.answered(command_id), "result", at)
            if offer is not None and queue.offer is not offer:
                self.evidence.settle(offer)
            self.try_offer(key, at)

    def move(self, source: SessionKey, target: SessionKey) -> None:
        """Move the commands of the superseded session `source` to `target`."""
        poll = self._polls.pop(source, None)
        if poll is not None:
            poll.answer(None)
        at = self._ctx.moment()
        self._queues.move(source, target, at)
        self.try_offer(target, at)
