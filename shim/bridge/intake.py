"""Commands on their way in: disk first, then the session's queue, then the waiting poll (protocol.md §3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec

from shim.bridge.context import Context
from shim.bridge.outbox import Outbox
from shim.bridge.queues import Queues
from shim.core.normalise import Normalised
from shim.core.records import (
    VIA_HTTP,
    AddTrace,
    CommandRecord,
    FindCommand,
    PutCommand,
    PutOutcome,
    SessionKey,
    TraceEntry,
)
from shim.core.sessions import Session
from shim.errors import StoreError
from shim.logs import get

log = get(__name__)

REFUSALS = {
    "queue_full": "the queue for this cluster is full",
    "store_unavailable": "the queue cannot be written",
}
DRAINED = "the shim is being drained and takes no new commands"


class Intake:
    """Takes commands in. `wake` is called when a session's queue has something new to offer."""

    def __init__(self, ctx: Context, queues: Queues, outbox: Outbox, wake: Callable[[SessionKey], None]) -> None:
        self._ctx = ctx
        self._queues = queues
        self._outbox = outbox
        self._wake = wake
        self.closed = False
        self.refused_by_drain = 0

    def load(self, records: tuple[CommandRecord, ...]) -> None:
        """Take in what the store holds after a restart; offered commands are uncertain now."""
        now, wall = self._ctx.now, self._ctx.clock.wall_s()
        for record in records:
            live = self._queues.admit(record, now + (record.expires_wall - wall))
            live.replies = 1  # nobody remembers whether an agent that hung up got it all the same
        for key, queue in self._queues.items():
            self._queues.doubted(key, queue.judge_loaded(self._ctx.queue_policy), "restart")

    def arrive(
        self,
        session: Session,
        command: Normalised,
        request_id: str,
        settled: Callable[[bool], None] | None = None,
        via: str = "",
    ) -> None:
        """A command for this session. `settled(True)` is called when it is safe, also for a duplicate.

        Refusals go to the controller with their code (`queue_full`, `store_unavailable`), and `settled(False)` is
        called. `via` as in `CommandRecord`; who sent a command by HTTP cannot be told.

        While the intake is `closed` only what is known already is taken (a duplicate must not be refused), and what an
        agent is fetching by HTTP just now.
        """
        record = CommandRecord(
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
        full = not self._queues.of(session.key).room_for(record.size_bytes, self._ctx.queue_policy)
        drained = self.closed and via != VIA_HTTP
        if full or drained:
            self._take_if_known(session, record, settled, DRAINED if drained else REFUSALS["queue_full"])
        else:
            self._take(session, record, settled)

    def _take(self, session: Session, record: CommandRecord, settled: Callable[[bool], None] | None) -> None:
        queue, arrived_at = self._queues.of(session.key), self._ctx.now
        queue.reserve(record.size_bytes)

        def done(outcome: list[Any] | StoreError) -> None:
            queue.release(record.size_bytes)
            if isinstance(outcome, StoreError):
                log.error("command_not_stored", command=record.id, error=str(outcome))
                self._refuse(session, record, "store_unavailable")
            else:
                self._stored(session, record, outcome[0], arrived_at)
            if settled is not None:
                settled(not isinstance(outcome, StoreError))

        trace = AddTrace(session.key, (record.id,), TraceEntry(record.arrived_wall, "arrived", record.type))
        self._ctx.store.submit([PutCommand(record), trace], done)

    def _take_if_known(
        self, session: Session, record: CommandRecord, settled: Callable[[bool], None] | None, error: str
    ) -> None:
        """Nothing new is taken; what was taken before is a duplicate all the same."""

        def done(outcome: list[Any] | StoreError) -> None:
            found = [] if isinstance(outcome, StoreError) else outcome[0]
            known = [(old, result) for old, result, _ in found if old.session == record.session and old.seq]
            for old, result in known:
                self._stored(session, record, PutOutcome(old.seq, True, old.state, result), self._ctx.now)
            if not known:
                self.refused_by_drain += error is DRAINED
                self._refuse(session, record, "queue_full", error)
            if settled is not None:
                settled(bool(known))

        self._ctx.store.submit([FindCommand(record.id)], done)

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
        live = self._queues.admit(replace(record, session=key, seq=put.seq), expires_at)
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

    def _refuse(self, session: Session, record: CommandRecord, code: str, error: str = "") -> None:
        self._queues.count(f"rejected_{code}")
        log.warning("command_rejected", command=record.id, session=session.key.ident, code=code)
        if record.via != VIA_HTTP:
            error = error or REFUSALS[code]
            self._outbox.report(session.key, session, record.id, record.request_id, code=code, error=error)


def _size_bytes(command: Normalised) -> int:
    """What the command adds to a poll reply, its comma included."""
    fields = {"id": command.id, "type": command.type, "payload": command.payload, "created_at": command.created_at}
    return len(msgspec.json.encode(fields)) + 1
