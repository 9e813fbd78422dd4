"""Per-session command queues: how commands come in, change state and expire."""

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
    """How a command ended, other than by its agent's result; `code` and `error` are for the controller."""

    key: SessionKey
    record: CommandRecord
    state: CommandState
    code: str
    error: str


class CommandQueues:
    """One `CommandQueue` per session, made on first use."""

    def __init__(self, ctx: BridgeContext, outbox: Outbox) -> None:
        self._ctx = ctx
        self.outbox = outbox
        self._queues: dict[SessionKey, CommandQueue] = {}
        self._expiries: list[tuple[float, int, SessionKey, str]] = []
        self._timer_at: float | None = None
        self._unstored: dict[tuple[SessionKey, str], _FinalState] = {}
        self._wall_offset_s = ctx.clock.wall_s() - ctx.now

    def get(self, key: SessionKey) -> CommandQueue | None:
        """A session's queue, if it has one."""
        return self._queues.get(key)

    def get_or_create(self, key: SessionKey) -> CommandQueue:
        """A session's queue."""
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = CommandQueue()
        return queue

    def pop(self, key: SessionKey) -> CommandQueue | None:
        """Take a session's queue away."""
        return self._queues.pop(key, None)

    def items(self) -> Iterable[tuple[SessionKey, CommandQueue]]:
        """All queues that hold something."""
        return [(key, queue) for key, queue in self._queues.items() if len(queue)]

    def values(self) -> Iterable[CommandQueue]:
        """The queues alone."""
        return [queue for _, queue in self.items()]

    def add(self, record: CommandRecord, expires_at: float) -> QueuedCommand:
        """Take in a stored command; `expires_at` is monotonic."""
        live = self.get_or_create(record.session).add(record, expires_at, self._ctx.now)
        self.schedule_expiry(record.session, live)
        return live

    # --- what befalls commands ----------------------------------------------------------------------------------------

    def record_transition(
        self, key: SessionKey, ids: tuple[str, ...], state: CommandState, event: str, *, detail: str, attempts: int = 0
    ) -> None:
        """Count, store and trace one step of some commands; nothing happens without ids."""
        if ids:
            self.count(event, len(ids))
            wall = self._ctx.clock.wall_s()
            trace = AddTrace(key, ids, TraceEntry(wall, event, detail))
            self._ctx.store.submit([MarkCommands(key, ids, state, wall, attempts), trace])

    def handle_uncertain(self, key: SessionKey, doubt: UncertainOutcome, reason: str) -> None:
        """Commands without evidence: some will be offered again, some are given up."""
        again = tuple(live.record.id for live in doubt.again)
        if again:
            log.warning("commands_uncertain", session=key.ident, commands=len(again), reason=reason)
            self.record_transition(key, again, CommandState.UNCERTAIN, "uncertain", detail=reason)
        for live in doubt.dead:
            self.finish(
                key, live, CommandState.DEAD, "undeliverable", f"given up after {live.attempts} offers: {reason}"
            )

    def finish(self, key: SessionKey, live: QueuedCommand, state: CommandState, code: str, error: str) -> None:
        """A command that left its queue ends EXPIRED or DEAD, and the controller is told."""
        log.warning("command_ended", command=live.record.id, session=key.ident, code=code)
        self.count(state.value)
        self._store(_FinalState(key, live.record, state, code, error), again=False)

    def _store(self, ending: _FinalState, *, again: bool) -> None:
        """The end and its report, together. Where the disk refuses, the controller is told at once, and it is tried

        again until the disk takes it: what was told may not have arrived, and would come back after a restart.
        """
        key, record = ending.key, ending.record
        wall, name = self._ctx.clock.wall_s(), (record.id,)
        steps = (
            MarkCommands(key, name, ending.state, wall),
            AddTrace(key, name, TraceEntry(wall, ending.state.value, ending.error)),
        )
        session = self._ctx.sessions.get(key)
        report = self.outbox.failure_payload(key, session, record.id, code=ending.code, error=ending.error)
        told = record.via != VIA_HTTP  # the vendor's HTTP API has no way to be told

        self._ctx.arriving.add(0)

        def done(stored: bool) -> None:
            self._ctx.arriving.remove(0)
            if stored:
                self._retry()
                return
            self._unstored[key, record.id] = ending
            if told and not again:
                self.outbox.send_unpersisted(
                    key, record.request_id, report, again=False
                )  # it is reported again from disk

        if told:
            self.outbox.end(key, record.request_id, report, steps, done)
        else:
            self._ctx.store.submit(steps, lambda outcome: done(not isinstance(outcome, StoreError)))

    def _retry(self) -> None:
        """Try one end that the disk has refused; once it is taken, the others follow."""
        if self._unstored:
            name = next(iter(self._unstored))
            self._store(self._unstored.pop(name), again=True)

    def answered(self, key: SessionKey, command_id: str) -> None:
        """The agent's result is on disk: it counts for more than an end that is not."""
        self._unstored.pop((key, command_id), None)

    def moved(self, source: SessionKey, target: SessionKey) -> None:
        """The session `source` was superseded."""
        for key, command_id in [name for name in self._unstored if name[0] == source]:
            ending = self._unstored.pop((key, command_id))
            self._unstored[target, command_id] = replace(ending, key=target)

    def end_session(self, key: SessionKey) -> None:
        """The session is deleted: its commands end EXPIRED."""
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
        """Count an event in the life of commands."""
        self._ctx.metrics.commands.labels(event).inc(number)

    # --- expiry -------------------------------------------------------------------------------------------------------

    def schedule_expiry(self, key: SessionKey, live: QueuedCommand) -> None:
        """Let a command expire in time."""
        heapq.heappush(self._expiries, (live.expires_at, live.seq, key, live.record.id))
        if len(self._expiries) > EXPIRY_SLACK and len(self._expiries) > 2 * sum(map(len, self._queues.values())):
            # Most commands are fetched long before they expire: forget the dates of those that are.
            self._expiries = [entry for entry in self._expiries if self._held(entry[2], entry[3])]
            heapq.heapify(self._expiries)
        self._arm()

    def expire(self, key: SessionKey, command_id: str) -> None:
        """Its time is over; only a QUEUED command expires."""
        queue = self._queues.get(key)
        live = queue.expire(command_id) if queue is not None else None
        if live is not None:
            self.finish(key, live, CommandState.EXPIRED, "expired", "not fetched in time")

    def sweep(self) -> None:
        """Store what the disk refused, and notice that the wall clock was set: a machine may start with a wrong one.

        Commands loaded from disk expire by it; what arrived in this process does not.
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
        """Let the disk catch up, so that nobody's result waits behind thousands of commands that expired at once."""
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
    """A command that is being taken in, or refused. `at` is when it came, in monotonic seconds."""

    session: Session
    record: CommandRecord
    at: float
    settled: Callable[[bool], None] | None


class CommandIntake:
    """Takes commands in. `wake` is called when a session's queue has something new to offer."""

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
        """Take in what the store holds after a restart; offered commands are uncertain now."""
        now, wall = self._ctx.now, self._ctx.clock.wall_s()
        for record in records:
            live = self._queues.add(record, now + (record.expires_wall - wall))
            live.replies = 1  # nobody remembers whether an agent that hung up got it all the same
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
        """Take a command for this session. `settled(True)` is called when it is safe, also for a duplicate.

        Refusals go to the controller with their code (`expired`, `queue_full`, `store_unavailable`) and are not stored;
        `settled(False)` is called. `via` as in `CommandRecord`; who sent a command by HTTP cannot be told.

        While the intake is `closed` only what is known already is taken (a duplicate must not be refused), and what an
        agent is fetching by HTTP just now. The same goes for what has expired already and for a full queue.
        """
        arrival = _Arrival(session, self._record(session, command, request_id, via), self._ctx.now, settled)
        record = arrival.record
        queue, by_http = self._queues.get_or_create(session.key), via == VIA_HTTP
        live = queue.get(record.id)
        if live is not None:
            self._settle(arrival, PutOutcome(live.seq, duplicate=True, state=live.state))
        elif self._ctx.arriving.exhausted:
            self._refuse(arrival, "store_unavailable")
        elif record.expires_wall <= record.arrived_wall and not by_http:
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
            arrived_wall=self._ctx.clock.wall_s(),
            expires_wall=command.expires_wall,
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
                log.error("command_not_stored", about=str(outcome), command=record.id, error=str(outcome))
                self._refuse(arrival, "store_unavailable")
            else:
                self._settle(arrival, outcome[0])

        trace = AddTrace(record.session, (record.id,), TraceEntry(record.arrived_wall, "arrived", record.type))
        self._ctx.store.submit([PutCommand(record), trace], done)

    def _take_if_known(self, arrival: _Arrival, code: str, error: str) -> None:
        """Take nothing new; what was taken before is a duplicate all the same."""
        # The payload is of no use any more, and many of these may wait for the disk at a time.
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
        expires_at = arrived_at + (record.expires_wall - record.arrived_wall)
        live = self._queues.add(replace_fields(record, session=key, seq=put.seq), expires_at)
        live.arrived_at = arrived_at
        if self._ctx.sessions.get(key) is None:
            self._queues.end_session(key)
        self._wake(key)

    def _home_of(self, session: Session) -> SessionKey:
        """Where a command belongs whose session was superseded while the disk was at it."""
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
        self._refusals.refuse(refusal, told=record.via != VIA_HTTP)
        if arrival.settled is not None:
            arrival.settled(False)


def _size_bytes(command: ParsedCommand) -> int:
    """What the command adds to a poll reply, its comma included."""
    fields = {"id": command.id, "type": command.type, "payload": command.payload, "created_at": command.created_at}
    return len(msgspec.json.encode(fields)) + 1


UNPOLLED_WARNING_S = 600.0


class UnpolledCommandsWarning:
    """Commands wait and their agent has not polled for 10 minutes: said once (protocol.md §1)."""

    def __init__(self, ctx: BridgeContext, queues: CommandQueues) -> None:
        self._ctx = ctx
        self._queues = queues
        self.sessions: set[SessionKey] = set()

    def check(self) -> None:
        """Say what is new."""
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
