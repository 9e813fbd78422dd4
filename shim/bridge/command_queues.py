"""The command queues of all sessions: transitions, final states, expiry; waiting polls, and offers without evidence."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count
from typing import Any

import msgspec
from msgspec.structs import replace

from shim.bridge.context import BridgeContext, Moment
from shim.bridge.outbox import Outbox
from shim.core.command_queue import Batch, CommandQueue, QueuedCommand, UncertainOutcome
from shim.core.records import (
    VIA_HTTP,
    CommandRecord,
    CommandState,
    MarkCommands,
    OutboxEntry,
    PutOutbox,
    SessionKey,
)
from shim.core.sessions import Session
from shim.errors import StoreError
from shim.log import get
from shim.ports import Timer, Timers

log = get(__name__)

EXPIRY_SLACK = 4096
EXPIRED_PER_TURN = 64
REST_S = 0.01
MAX_TIMER_S = 86_400.0
WALL_STEP_S = 1.0
UNPOLLED_WARNING_S = 600.0


class _FinalState(msgspec.Struct, frozen=True):
    """The final state of a command that ended without a result of its agent.

    `code` and `error` are sent to the controller.
    """

    session: SessionKey
    record: CommandRecord
    state: CommandState
    code: str
    error: str


class CommandQueues:
    """The queues of all sessions; a `CommandQueue` is created on first use."""

    def __init__(self, ctx: BridgeContext, outbox: Outbox) -> None:
        self._ctx = ctx
        self._outbox = outbox
        self._queues: dict[SessionKey, CommandQueue] = {}
        self._expiries: list[tuple[float, int, SessionKey, str]] = []
        self._scheduled = 0
        self._timer_at: float | None = None
        self._unstored: dict[tuple[SessionKey, str], _FinalState | MarkCommands] = {}
        self._homes: dict[int, SessionKey] = {}  # by the number of a write that is under way
        self._numbers = count(1)
        self._wall_offset_s = 0.0
        self.unpolled: set[SessionKey] = set()

    def get(self, key: SessionKey) -> CommandQueue | None:
        """Return the queue of a session, or None if the session has none."""
        return self._queues.get(key)

    def get_or_create(self, key: SessionKey) -> CommandQueue:
        """Return the queue of a session; create it if necessary."""
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = CommandQueue(key)
        return queue

    def items(self) -> Iterable[tuple[SessionKey, CommandQueue]]:
        """Return every non-empty queue with its session key."""
        return [(key, queue) for key, queue in self._queues.items() if len(queue)]

    def __len__(self) -> int:
        """Return the number of commands in all queues."""
        return sum(map(len, self._queues.values()))

    def add(self, record: CommandRecord, expires_at: float, now: float) -> QueuedCommand:
        """Queue a stored command and schedule its expiry; the times are monotonic."""
        queued = self.get_or_create(record.session).add(record, expires_at, now)
        self.schedule_expiry(record.session, queued, now)
        return queued

    def add_stored(
        self, session: Session, record: CommandRecord, expires_at: float, now: float
    ) -> QueuedCommand | None:
        """Queue a command that was stored for a session, which may have been superseded during the write.

        Returns None if its successor has the command: the store keeps only the successor's.
        """
        key = session.home
        if self.get_or_create(key).get(record.id) is not None:
            return None
        return self.add(replace(record, session=key), expires_at, now)

    def load(self, records: tuple[CommandRecord, ...]) -> None:
        """Queue the stored commands after a restart; commands in an offer become uncertain."""
        at = self._ctx.moment()
        # Measured now: the store may have taken long to open, and the wall clock been set meanwhile.
        self._wall_offset_s = at.unix - at.now
        for record in records:
            queued = self.add(record, at.now + (record.expires_unix - at.unix), at.now)
            # The previous process may have put the command into a reply that the agent received. Counting one reply
            # keeps a result from being taken as evidence for the whole reply of a later offer.
            queued.replies = 1
        for key, queue in self._queues.items():
            outcome = queue.recover_after_restart(self._ctx.queue_policy)
            self.handle_uncertain(key, outcome, "restart", at.unix)

    def move(self, source: SessionKey, target: SessionKey, at: Moment) -> None:
        """Move the commands of the superseded session `source` to `target`."""
        for key, command_id in [name for name in self._unstored if name[0] == source]:
            unstored = self._unstored.pop((key, command_id))
            self._unstored[target, command_id] = replace(unstored, session=target)
        self._homes.update({number: target for number, key in self._homes.items() if key == source})
        queue = self._queues.pop(source, None)
        if queue is None:
            return
        if queue.offer is not None:
            outcome = queue.mark_uncertain(queue.offer, "superseded", self._ctx.queue_policy)
            self.handle_uncertain(target, outcome, "superseded", at.unix)
        successor = self.get_or_create(target)
        queue.move_to(successor)
        for queued in successor.all():
            self.schedule_expiry(target, queued, at.now)

    # --- state transitions --------------------------------------------------------------------------------------------

    def record_transition(self, mark: MarkCommands) -> None:
        """Count and store one transition of commands; do nothing without ids."""
        if mark.ids:
            self.count(mark.step.event, len(mark.ids))
            self.store_mark(mark)

    def store_mark(self, mark: MarkCommands) -> None:
        """Store a change of commands. One by which they leave the queue is repeated until it is stored."""
        leaves = mark.state in (CommandState.DELIVERED, CommandState.CLOSED)
        done = partial(self._mark_stored, self._write(mark.session), mark) if leaves else None
        self._ctx.store.submit(mark, done=done)

    def _write(self, key: SessionKey) -> int:
        """Return the number of a write for a session, which may be superseded before the store answers."""
        number = next(self._numbers)
        self._homes[number] = key
        return number

    def _mark_stored(self, number: int, mark: MarkCommands, outcome: StoreError | None) -> None:
        """Keep the change of commands that have left the queue if the store refused it, until a retry succeeds.

        Otherwise a restart would offer the commands again.
        """
        key = self._homes.pop(number)
        if outcome is None:
            self._retry()
            return
        for command_id in mark.ids:
            self._unstored[key, command_id] = replace(mark, session=key, ids=(command_id,))

    def handle_uncertain(self, key: SessionKey, outcome: UncertainOutcome, reason: str, wall: float) -> None:
        """Record commands without evidence of delivery: some will be offered again, the others end as DEAD."""
        again = tuple(queued.record.id for queued in outcome.again)
        if again:
            log.warning("commands_uncertain", session=key.ident, commands=len(again), reason=reason)
            self.record_transition(self._ctx.mark(key, again, CommandState.UNCERTAIN, wall, "uncertain", reason))
        for queued in outcome.dead:
            error = f"given up after {queued.attempts} offers: {reason}"
            self.finish(key, queued, CommandState.DEAD, "undeliverable", error)

    def count(self, event: str, number: int = 1) -> None:
        """Count an event in the metric `agent_shim_commands`."""
        self._ctx.metrics.commands.labels(event).inc(number)

    # --- final states without a result --------------------------------------------------------------------------------

    def finish(self, key: SessionKey, queued: QueuedCommand, state: CommandState, code: str, error: str) -> None:
        """End a command as EXPIRED or DEAD after its removal from the queue, and report that to the controller."""
        log.warning("command_ended", command=queued.record.id, session=key.ident, code=code)
        self.count(state.value)
        self._store(_FinalState(key, queued.record, state, code, error), again=False)

    def _store(self, ending: _FinalState, *, again: bool) -> None:
        """Store the final state and its report to the controller in one transaction.

        If the store fails, send the report anyway and keep the final state for a retry: without it, a restart would
        deliver the command again.
        """
        key, record, ids = ending.session, ending.record, (ending.record.id,)
        wall = self._ctx.clock.wall_s()
        session = self._ctx.sessions.get(key)
        report = self._outbox.failure_payload(session, record.id, wall, code=ending.code, error=ending.error)
        mark = self._ctx.mark(key, ids, ending.state, wall, ending.state.value, ending.error)
        self._ctx.arriving.add(0)
        number = self._write(key)
        if record.via == VIA_HTTP:  # the vendor's HTTP API has no way to receive a report
            self._ctx.store.submit(mark, done=partial(self._final_state_stored, number, ending, None))
        else:
            reported = self._ctx.step(key, ids, wall, "reported", ending.code)
            put = PutOutbox(key, record.id, record.request_id, report)
            done = partial(self._final_state_stored, number, ending, None if again else report)
            self._ctx.store.submit(put, mark, reported, done=done)

    def _final_state_stored(
        self, number: int, ending: _FinalState, report: dict[str, Any] | None, outcome: OutboxEntry | StoreError | None
    ) -> None:
        """Send the report. If the store failed, keep the final state, and send `report` unless it is None."""
        self._ctx.arriving.remove(0)
        key = self._homes.pop(number)
        if isinstance(outcome, StoreError):
            self._unstored[key, ending.record.id] = replace(ending, session=key)
            if report is not None:
                # The report is not kept in memory: the successful retry sends it again, from disk.
                self._outbox.send_unpersisted(key, ending.record.request_id, report, again=False)
            return
        if outcome is not None:
            self._outbox.added(replace(outcome, session=key))
        self._retry()

    def _retry(self) -> None:
        """Retry one change that the store refused; its success triggers the next retry."""
        if self._unstored:
            unstored = self._unstored.pop(next(iter(self._unstored)))
            if isinstance(unstored, MarkCommands):
                self.store_mark(unstored)
            else:
                self._store(unstored, again=True)

    def is_live(self, key: SessionKey, command_id: str) -> bool:
        """Return True if a restart could offer a command again: it waits, or its end could not be stored yet."""
        return self._held(key, command_id) or (key, command_id) in self._unstored

    def answered(self, key: SessionKey, command_id: str) -> None:
        """Drop an unstored change of a command whose result is stored: the result takes precedence."""
        self._unstored.pop((key, command_id), None)

    def end_session(self, key: SessionKey) -> None:
        """End all commands of a deleted session as EXPIRED."""
        queue = self._queues.pop(key, None)
        error = "the agent was not seen for too long, or was forgotten by an operator"
        for queued in queue.forget_all() if queue is not None else ():
            self.finish(key, queued, CommandState.EXPIRED, "expired", error)

    # --- expiry -------------------------------------------------------------------------------------------------------

    def schedule_expiry(self, key: SessionKey, queued: QueuedCommand, now: float) -> None:
        """Schedule the expiry of a command; `now` is monotonic."""
        heapq.heappush(self._expiries, (queued.expires_at, queued.seq, key, queued.record.id))
        self._scheduled += 1
        if self._scheduled >= EXPIRY_SLACK:
            self._scheduled = 0
            self._drop_settled()
        self._arm(now)

    def _drop_settled(self) -> None:
        """Rebuild the heap without commands that have left their queue, if they are more than half of it.

        Most commands are fetched long before they expire. Counting those that wait takes a look at every session's
        queue, so it is done once in `EXPIRY_SLACK` commands.
        """
        if len(self._expiries) > 2 * len(self):
            self._expiries = [entry for entry in self._expiries if self._held(entry[2], entry[3])]
            heapq.heapify(self._expiries)

    def expire(self, key: SessionKey, command_id: str) -> None:
        """Expire a command whose time has passed; a command that is not QUEUED is left alone."""
        queue = self._queues.get(key)
        queued = queue.expire(command_id) if queue is not None else None
        if queued is not None:
            self.finish(key, queued, CommandState.EXPIRED, "expired", "not fetched in time")

    def expire_overdue(self, key: SessionKey, commands: tuple[QueuedCommand, ...], now: float) -> None:
        """Expire those commands whose time ended while they were offered."""
        for queued in commands:
            if queued.state is CommandState.QUEUED and queued.expires_at <= now:
                self.expire(key, queued.record.id)

    def sweep(self) -> None:
        """Retry refused writes and adjust expiry times if the wall clock was set.

        A machine may boot with a wrong clock. Commands loaded from disk expire by wall-clock time and are shifted;
        those that arrived in this process expire by monotonic time and are not.
        """
        self._retry()
        at = self._ctx.moment()
        by_s = at.unix - at.now - self._wall_offset_s
        if abs(by_s) < WALL_STEP_S:
            return
        self._wall_offset_s += by_s
        log.warning("wall_clock_stepped", by_s=round(by_s, 3))
        for key, queue in self.items():
            for queued in queue.all():
                if queued.arrived_at is None:
                    queued.expires_at -= by_s
                    self.schedule_expiry(key, queued, at.now)

    def warn_unpolled(self) -> Iterator[None]:
        """Log each session once whose commands wait and whose agent has not polled for 10 minutes.

        The status shows these sessions earlier. See docs/reference/protocol.md#1-legacy-side.
        """
        overdue = set()
        for key, queue in self.items():
            yield
            if unpolled_s(self._ctx.sessions.get(key), queue, self._ctx.now) < UNPOLLED_WARNING_S:
                continue
            overdue.add(key)
            if key not in self.unpolled:
                log.warning(
                    "commands_not_polled",
                    session=key.ident,
                    commands=len(queue),
                    hint="this agent has not polled for 10 minutes; stock agents never fetch commands",
                )
        self.unpolled = overdue

    def _held(self, key: SessionKey, command_id: str) -> bool:
        queue = self._queues.get(key)
        return queue is not None and queue.get(command_id) is not None

    def _arm(self, now: float) -> None:
        if not self._expiries:
            return
        due_at = self._expiries[0][0]
        if self._timer_at is not None and self._timer_at <= due_at:
            return
        self._timer_at = due_at
        delay_s = min(max(due_at - now, 0.0), MAX_TIMER_S)
        self._ctx.timers.call_later(delay_s, partial(self._due, due_at))

    def _rest(self, now: float) -> None:
        """Pause expiry until the store has caught up.

        Otherwise an agent's result would wait behind the writes of thousands of commands that expired together.
        """
        resume_at = self._timer_at = now + REST_S
        self._ctx.timers.call_later(REST_S, partial(self._due, resume_at))

    def _due(self, armed_for: float) -> None:
        if self._timer_at != armed_for:
            return
        self._timer_at = None
        now = self._ctx.now
        for _ in range(EXPIRED_PER_TURN):
            if not self._expiries or self._expiries[0][0] > now:
                break
            if not self._ctx.arriving.has_room:
                self._rest(now)
                return
            _, _, key, command_id = heapq.heappop(self._expiries)
            queue = self._queues.get(key)
            queued = queue.get(command_id) if queue is not None else None
            if queued is not None and queued.expires_at <= now:
                self.expire(key, command_id)
        self._arm(now)


def unpolled_s(session: Session | None, queue: CommandQueue, now: float) -> float:
    """Return the seconds for which commands have waited without a poll; 0 if none waits or a poll is held."""
    since = queue.waiting_since
    if session is None or since is None or session.held:
        return 0.0
    return now - max(since, session.poll_at or 0.0)


class PendingPoll:
    """A poll that waits for its answer.

    `offered` is resolved with a batch, or with None for an empty answer. `batch` is set while the offer is being
    stored; it is the caller's once the poll has returned. `arrived_s` is the arrival in monotonic seconds.
    """

    __slots__ = ("arrived_s", "batch", "connection", "offered")

    def __init__(self, connection: int, arrived_s: float) -> None:
        self.connection = connection
        self.arrived_s = arrived_s
        self.offered: asyncio.Future[Batch | None] = asyncio.get_running_loop().create_future()
        self.batch: Batch | None = None

    def answer(self, batch: Batch | None) -> None:
        """Resolve the poll; do nothing if it is resolved already."""
        if not self.offered.done():
            self.offered.set_result(batch)


class AwaitedEvidence:
    """Written offers by the connection that carried them, each with a time limit for its evidence.

    An offer is kept only as long as evidence of it matters. Its connection may show none by itself, because its agent
    pipelines, and may be open for weeks.
    """

    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self._by_connection: dict[int, list[Batch]] = {}
        self._limits: dict[int, Timer] = {}

    def add(self, batch: Batch, limit_s: float, overdue: Callable[[Batch], object]) -> None:
        """Await evidence of an offer. Call `overdue` after `limit_s` seconds without it."""
        self._by_connection.setdefault(batch.connection, []).append(batch)
        self._limits[batch.number] = self._timers.call_later(limit_s, partial(self._overdue, batch, overdue))

    def _overdue(self, batch: Batch, overdue: Callable[[Batch], object]) -> None:
        del self._limits[batch.number]
        overdue(batch)

    def on(self, connection: int) -> tuple[Batch, ...]:
        """Return the offers of a connection."""
        return tuple(self._by_connection.get(connection, ()))

    def take(self, connection: int) -> list[Batch]:
        """Return the offers of a connection, and expect nothing more from it. Their time limits go on."""
        return self._by_connection.pop(connection, [])

    def settle(self, batch: Batch) -> None:
        """Await no more evidence of an offer. Idempotent."""
        limit = self._limits.pop(batch.number, None)
        if limit is not None:
            limit.cancel()
        awaiting = self._by_connection.get(batch.connection, [])
        if batch in awaiting:
            awaiting.remove(batch)
            if not awaiting:
                del self._by_connection[batch.connection]

    def __len__(self) -> int:
        """Return the number of offers that are kept for their connections or their time limits."""
        return max(len(self._limits), sum(map(len, self._by_connection.values())))
