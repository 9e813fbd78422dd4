"""Per-session command queues: arrival, state transitions and expiry of commands."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from msgspec.structs import replace as replace_fields

from shim.bridge.context import BridgeContext
from shim.bridge.outbox import Outbox
from shim.bridge.rejections import Refusal, Rejections
from shim.core.command_queue import CommandQueue, QueuedCommand, UncertainOutcome
from shim.core.records import (
    VIA_HTTP,
    AddTrace,
    CommandRecord,
    CommandState,
    LookUpCommand,
    MarkCommands,
    PutCommand,
    PutOutcome,
    SessionKey,
    TraceEntry,
)
from shim.core.sessions import Session
from shim.errors import StoreError
from shim.log import get
from shim.protocol.command_message import ParsedCommand

log = get(__name__)

EXPIRY_SLACK = 4096
EXPIRED_PER_TURN = 64
REST_S = 0.01
MAX_TIMER_S = 86_400.0
WALL_STEP_S = 1.0


@dataclass(frozen=True, slots=True)
class _FinalState:
    """The final state of a command that ended without a result of its agent.

    `code` and `error` are sent to the controller.
    """

    key: SessionKey
    record: CommandRecord
    state: CommandState
    code: str
    error: str


class CommandQueues:
    """The queues of all sessions; a `CommandQueue` is created on first use."""

    def __init__(self, ctx: BridgeContext, outbox: Outbox) -> None:
        self._ctx = ctx
        self.outbox = outbox
        self._queues: dict[SessionKey, CommandQueue] = {}
        self._expiries: list[tuple[float, int, SessionKey, str]] = []
        self._timer_at: float | None = None
        self._unstored: dict[tuple[SessionKey, str], _FinalState] = {}
        self._wall_offset_s = ctx.clock.wall_s() - ctx.now

    def get(self, key: SessionKey) -> CommandQueue | None:
        """Return the queue of a session, or None if the session has none."""
        return self._queues.get(key)

    def get_or_create(self, key: SessionKey) -> CommandQueue:
        """Return the queue of a session; create it if necessary."""
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = CommandQueue()
        return queue

    def pop(self, key: SessionKey) -> CommandQueue | None:
        """Remove and return the queue of a session."""
        return self._queues.pop(key, None)

    def items(self) -> Iterable[tuple[SessionKey, CommandQueue]]:
        """Return every non-empty queue with its session key."""
        return [(key, queue) for key, queue in self._queues.items() if len(queue)]

    def values(self) -> Iterable[CommandQueue]:
        """Return every non-empty queue."""
        return [queue for _, queue in self.items()]

    def add(self, record: CommandRecord, expires_at: float) -> QueuedCommand:
        """Queue a stored command and schedule its expiry; `expires_at` is monotonic."""
        live = self.get_or_create(record.session).add(record, expires_at, self._ctx.now)
        self.schedule_expiry(record.session, live)
        return live

    # --- state transitions --------------------------------------------------------------------------------------------

    def record_transition(
        self, key: SessionKey, ids: tuple[str, ...], state: CommandState, event: str, *, detail: str, attempts: int = 0
    ) -> None:
        """Count, store and trace one transition of the given commands; do nothing without ids."""
        if ids:
            self.count(event, len(ids))
            wall = self._ctx.clock.wall_s()
            trace = AddTrace(key, ids, TraceEntry(wall, event, detail))
            self._ctx.store.submit([MarkCommands(key, ids, state, wall, attempts), trace])

    def handle_uncertain(self, key: SessionKey, doubt: UncertainOutcome, reason: str) -> None:
        """Record commands without evidence of delivery: some will be offered again, the others end as DEAD."""
        again = tuple(live.record.id for live in doubt.again)
        if again:
            log.warning("commands_uncertain", session=key.ident, commands=len(again), reason=reason)
            self.record_transition(key, again, CommandState.UNCERTAIN, "uncertain", detail=reason)
        for live in doubt.dead:
            self.finish(
                key, live, CommandState.DEAD, "undeliverable", f"given up after {live.attempts} offers: {reason}"
            )

    def finish(self, key: SessionKey, live: QueuedCommand, state: CommandState, code: str, error: str) -> None:
        """End a command as EXPIRED or DEAD after its removal from the queue, and report that to the controller."""
        log.warning("command_ended", command=live.record.id, session=key.ident, code=code)
        self.count(state.value)
        self._store(_FinalState(key, live.record, state, code, error), again=False)

    def _store(self, ending: _FinalState, *, again: bool) -> None:
        """Store the final state and its report to the controller in one transaction.

        If the store fails, send the report anyway and keep the final state for a retry: without it, a restart would
        deliver the command again.
        """
        key, record = ending.key, ending.record
        wall, name = self._ctx.clock.wall_s(), (record.id,)
        steps = (
            MarkCommands(key, name, ending.state, wall),
            AddTrace(key, name, TraceEntry(wall, ending.state.value, ending.error)),
        )
        session = self._ctx.sessions.get(key)
        report = self.outbox.failure_payload(key, session, record.id, code=ending.code, error=ending.error)
        reportable = record.via != VIA_HTTP  # the vendor's HTTP API has no way to receive a report

        self._ctx.arriving.add(0)

        def done(stored: bool) -> None:
            self._ctx.arriving.remove(0)
            if stored:
                self._retry()
                return
            self._unstored[key, record.id] = ending
            if reportable and not again:
                self.outbox.send_unpersisted(
                    key, record.request_id, report, again=False
                )  # not kept in memory: the successful retry reports it again, from disk

        if reportable:
            self.outbox.end(key, record.request_id, report, steps, done)
        else:
            self._ctx.store.submit(steps, lambda outcome: done(not isinstance(outcome, StoreError)))

    def _retry(self) -> None:
        """Retry one final state that the store refused; its success triggers the next retry."""
        if self._unstored:
            name = next(iter(self._unstored))
            self._store(self._unstored.pop(name), again=True)

    def answered(self, key: SessionKey, command_id: str) -> None:
        """Drop an unstored final state of a command whose result is stored: the result takes precedence."""
        self._unstored.pop((key, command_id), None)

    def moved(self, source: SessionKey, target: SessionKey) -> None:
        """Move the unstored final states of the superseded session `source` to `target`."""
        for key, command_id in [name for name in self._unstored if name[0] == source]:
            ending = self._unstored.pop((key, command_id))
            self._unstored[target, command_id] = replace(ending, key=target)

    def end_session(self, key: SessionKey) -> None:
        """End all commands of a deleted session as EXPIRED."""
        queue = self.pop(key)
        for live in queue.forget_all() if queue is not None else ():
            self.finish(
                key,
                live,
                CommandState.EXPIRED,
                "expired",
                "the agent was not seen for too long, or was forgotten by an operator",
            )

    def count(self, event: str, number: int = 1) -> None:
        """Count an event in the metric `agent_shim_commands`."""
        self._ctx.metrics.commands.labels(event).inc(number)

    # --- expiry -------------------------------------------------------------------------------------------------------

    def schedule_expiry(self, key: SessionKey, live: QueuedCommand) -> None:
        """Schedule the expiry of a command."""
        heapq.heappush(self._expiries, (live.expires_at, live.seq, key, live.record.id))
        if len(self._expiries) > EXPIRY_SLACK and len(self._expiries) > 2 * sum(map(len, self._queues.values())):
            # Most commands are fetched long before they expire, and their entries stay in the heap. Rebuild the heap
            # without them when they are more than half of it, which costs amortised constant time per command.
            self._expiries = [entry for entry in self._expiries if self._held(entry[2], entry[3])]
            heapq.heapify(self._expiries)
        self._arm()

    def expire(self, key: SessionKey, command_id: str) -> None:
        """Expire a command whose time has passed; a command that is not QUEUED is left alone."""
        queue = self._queues.get(key)
        live = queue.expire(command_id) if queue is not None else None
        if live is not None:
            self.finish(key, live, CommandState.EXPIRED, "expired", "not fetched in time")

    def sweep(self) -> None:
        """Retry refused writes and adjust expiry times if the wall clock was set.

        A machine may boot with a wrong clock. Commands loaded from disk expire by wall-clock time and are shifted;
        those that arrived in this process expire by monotonic time and are not.
        """
        self._retry()
        by_s = self._ctx.clock.wall_s() - self._ctx.now - self._wall_offset_s
        if abs(by_s) < WALL_STEP_S:
            return
        self._wall_offset_s += by_s
        log.warning("wall_clock_stepped", by_s=round(by_s, 3))
        for key, queue in self.items():
            for live in queue.all():
                if live.arrived_at is None:
                    live.expires_at -= by_s
                    self.schedule_expiry(key, live)

    def _held(self, key: SessionKey, command_id: str) -> bool:
        queue = self._queues.get(key)
        return queue is not None and queue.get(command_id) is not None

    def _arm(self) -> None:
        if not self._expiries:
            return
        due_at = self._expiries[0][0]
        if self._timer_at is not None and self._timer_at <= due_at:
            return
        self._timer_at = due_at
        delay_s = min(max(due_at - self._ctx.now, 0.0), MAX_TIMER_S)
        self._ctx.timers.call_later(delay_s, lambda: self._due(due_at))

    def _rest(self) -> None:
        """Pause expiry until the store has caught up.

        Otherwise an agent's result would wait behind the writes of thousands of commands that expired together.
        """
        resume_at = self._timer_at = self._ctx.now + REST_S
        self._ctx.timers.call_later(REST_S, lambda: self._due(resume_at))

    def _due(self, armed_for: float) -> None:
        if self._timer_at != armed_for:
            return
        self._timer_at = None
        for _ in range(EXPIRED_PER_TURN):
            if not self._expiries or self._expiries[0][0] > self._ctx.now:
                break
            if not self._ctx.arriving.has_room:
                self._rest()
                return
            _, _, key, command_id = heapq.heappop(self._expiries)
            queue = self._queues.get(key)
            live = queue.get(command_id) if queue is not None else None
            if live is not None and live.expires_at <= self._ctx.now:
                self.expire(key, command_id)
        self._arm()


REFUSALS = {
    "expired": "it had expired before it arrived",
    "queue_full": "the queue for this cluster is full",
    "store_unavailable": "the queue cannot be written",
}
DRAINED = "the shim is being drained and takes no new commands"


@dataclass(slots=True)
class _Arrival:
    """One command that is being accepted or rejected. `at` is its arrival in monotonic seconds."""

    session: Session
    record: CommandRecord
    at: float
    settled: Callable[[bool], None] | None


class CommandIntake:
    """Acceptance of arriving commands.

    `wake` is called when a session's queue has something new to offer.
    """

    def __init__(
        self,
        ctx: BridgeContext,
        queues: CommandQueues,
        outbox: Outbox,
        refusals: Rejections,
        wake: Callable[[SessionKey], None],
    ) -> None:
        self._ctx = ctx
        self._queues = queues
        self._outbox = outbox
        self._refusals = refusals
        self._wake = wake
        self.closed = False
        self.refused_by_drain = 0

    def load(self, records: tuple[CommandRecord, ...]) -> None:
        """Queue the stored commands after a restart; commands in an offer become uncertain."""
        now, wall = self._ctx.now, self._ctx.clock.wall_s()
        for record in records:
            live = self._queues.add(record, now + (record.expires_unix - wall))
            # The previous process may have put the command into a reply that the agent received. Counting one reply
            # keeps a result from being taken as evidence for the whole reply of a later offer.
            live.replies = 1
        for key, queue in self._queues.items():
            self._queues.handle_uncertain(key, queue.recover_after_restart(self._ctx.queue_policy), "restart")

    def arrive(
        self,
        session: Session,
        command: ParsedCommand,
        request_id: str,
        settled: Callable[[bool], None] | None = None,
        via: str = "",
    ) -> None:
        """Accept or reject a command for this session.

        `settled(True)` is called once the command is stored, also for a duplicate. A rejection (`expired`,
        `queue_full`, `store_unavailable`) is reported to the controller, is not stored, and calls `settled(False)`.
        `via` is the same as in `CommandRecord`: a command that came by HTTP cannot be reported.

        A command that is known already is a duplicate and never rejected. So it is looked up before it is rejected as
        expired, because the queue is full, or because the intake is `closed`. Commands that an agent is fetching by
        HTTP are accepted even while the intake is closed or after they have expired.
        """
        arrival = _Arrival(session, self._record(session, command, request_id, via), self._ctx.now, settled)
        record = arrival.record
        queue, by_http = self._queues.get_or_create(session.key), via == VIA_HTTP
        live = queue.get(record.id)
        if live is not None:
            self._settle(arrival, PutOutcome(live.seq, duplicate=True, state=live.state))
        elif self._ctx.arriving.exhausted:
            self._refuse(arrival, "store_unavailable")
        elif record.expires_unix <= record.arrived_unix and not by_http:
            self._take_if_known(arrival, "expired", REFUSALS["expired"])
        elif self.closed and not by_http:
            self._take_if_known(arrival, "queue_full", DRAINED)
        elif not queue.room_for(record.size_bytes, self._ctx.queue_policy):
            self._take_if_known(arrival, "queue_full", REFUSALS["queue_full"])
        else:
            self._take(arrival)

    def _record(self, session: Session, command: ParsedCommand, request_id: str, via: str) -> CommandRecord:
        return CommandRecord(
            session=session.key,
            id=command.id,
            type=command.type,
            payload=command.payload,
            created_at=command.created_at,
            arrived_unix=self._ctx.clock.wall_s(),
            expires_unix=command.expires_unix,
            request_id=request_id,
            size_bytes=_size_bytes(command),
            via=via,
        )

    def _take(self, arrival: _Arrival) -> None:
        record = arrival.record
        queue = self._queues.get_or_create(record.session)
        queue.reserve(record.size_bytes)
        self._ctx.arriving.add(record.size_bytes)

        def done(outcome: list[Any] | StoreError) -> None:
            queue.release(record.size_bytes)
            self._ctx.arriving.remove(record.size_bytes)
            if isinstance(outcome, StoreError):
                log.error("command_not_stored", dedupe_key=str(outcome), command=record.id, error=str(outcome))
                self._refuse(arrival, "store_unavailable")
            else:
                self._settle(arrival, outcome[0])

        trace = AddTrace(record.session, (record.id,), TraceEntry(record.arrived_unix, "arrived", record.type))
        self._ctx.store.submit([PutCommand(record), trace], done)

    def _take_if_known(self, arrival: _Arrival, code: str, error: str) -> None:
        """Look up a command that may not be accepted: a known one is a duplicate, any other is rejected."""
        # The payload is not needed for the lookup. Thousands of these may wait for the disk at a time: free its memory.
        arrival.record = replace_fields(arrival.record, payload={})
        self._ctx.arriving.add(0)

        def done(outcome: list[Any] | StoreError) -> None:
            self._ctx.arriving.remove(0)
            if not isinstance(outcome, StoreError) and outcome[0] is not None:
                self._settle(arrival, outcome[0])
            else:
                self.refused_by_drain += error is DRAINED
                self._refuse(arrival, code, error)

        self._ctx.store.submit([LookUpCommand(arrival.record.session, arrival.record.id)], done)

    def _settle(self, arrival: _Arrival, put: PutOutcome) -> None:
        self._stored(arrival.session, arrival.record, put, arrival.at)
        if arrival.settled is not None:
            arrival.settled(True)

    def _stored(self, session: Session, record: CommandRecord, put: PutOutcome, arrived_at: float) -> None:
        if put.duplicate:
            key = session.key
            self._queues.count("duplicate")
            log.info("command_duplicate", command=record.id, session=key.ident, state=put.state.value)
            if put.result is not None:
                self._outbox.resend(key, record.id, record.request_id, put.result)
            return
        key = self._home_of(session)
        self._queues.count("queued")
        log.info("command_queued", command=record.id, type=record.type, session=key.ident)
        expires_at = arrived_at + (record.expires_unix - record.arrived_unix)
        live = self._queues.add(replace_fields(record, session=key, seq=put.seq), expires_at)
        live.arrived_at = arrived_at
        if self._ctx.sessions.get(key) is None:
            self._queues.end_session(key)
        self._wake(key)

    def _home_of(self, session: Session) -> SessionKey:
        """Return the session that a command belongs to, following supersessions during the write."""
        while self._ctx.sessions.get(session.key) is not session and session.superseded_by is not None:
            successor = self._ctx.sessions.get(session.superseded_by)
            if successor is None:
                return session.superseded_by
            session = successor
        return session.key

    def _refuse(self, arrival: _Arrival, code: str, error: str = "") -> None:
        record = arrival.record
        refusal = Refusal(
            record.session, record.id, record.request_id, code, error or REFUSALS[code], session=arrival.session
        )
        self._refusals.refuse(refusal, report=record.via != VIA_HTTP)
        if arrival.settled is not None:
            arrival.settled(False)


def _size_bytes(command: ParsedCommand) -> int:
    """Return the number of bytes that a command adds to a poll reply, including its comma."""
    fields = {"id": command.id, "type": command.type, "payload": command.payload, "created_at": command.created_at}
    return len(msgspec.json.encode(fields)) + 1


UNPOLLED_WARNING_S = 600.0


class UnpolledCommandsWarning:
    """Warning about sessions whose commands wait while their agent has not polled for 10 minutes.

    Each such session is logged once and shown in the status. See docs/reference/protocol.md#1-legacy-side.
    """

    def __init__(self, ctx: BridgeContext, queues: CommandQueues) -> None:
        self._ctx = ctx
        self._queues = queues
        self.sessions: set[SessionKey] = set()

    def check(self) -> None:
        """Log the sessions that became overdue since the last check."""
        overdue = set()
        for key, queue in self._queues.items():
            session, since = self._ctx.sessions.get(key), queue.waiting_since
            if session is None or since is None or session.held:
                continue
            if self._ctx.now - max(since, session.poll_at or 0.0) < UNPOLLED_WARNING_S:
                continue
            overdue.add(key)
            if key not in self.sessions:
                log.warning(
                    "commands_not_polled",
                    session=key.ident,
                    commands=len(queue),
                    hint="this agent has not polled for 10 minutes; stock agents never fetch commands",
                )
        self.sessions = overdue
