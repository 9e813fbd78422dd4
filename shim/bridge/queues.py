"""The queues of all sessions, what befalls their commands, and when they expire (protocol.md §3)."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, replace

from shim.bridge.context import BridgeContext
from shim.bridge.outbox import Outbox
from shim.core.commands import CommandQueue, UncertainOutcome, QueuedCommand
from shim.core.records import VIA_HTTP, AddTrace, CommandRecord, MarkCommands, SessionKey, CommandState, TraceEntry
from shim.errors import StoreError
from shim.logs import get

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
            self.finish(key, live, CommandState.DEAD, "undeliverable", f"given up after {live.attempts} offers: {reason}")

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
                self.outbox.send_unpersisted(key, record.request_id, report, again=False)  # it is reported again from disk

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
