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
        if not self.closed or via == VIA_HTTP:
            self._take(session, command, request_id, settled, via)
            return

        def looked_up(outcome: list[Any] | StoreError) -> None:
            found = [] if isinstance(outcome, StoreError) else outcome[0]
            if any(record.session == session.key and record.seq for record, _, _ in found):
                self._take(session, command, request_id, settled, via)
                return
            self.refused_by_drain += 1
            self._refuse(session, command.id, request_id, "queue_full", via, DRAINED)
            if settled is not None:
                settled(False)

        self._ctx.store.submit([FindCommand(command.id)], looked_up)

    def _take(
        self,
        session: Session,
        command: Normalised,
        request_id: str,
        settled: Callable[[bool], None] | None,
        via: str,
    ) -> None:
        key = session.key
        now, wall = self._ctx.now, self._ctx.clock.wall_s()
        size_bytes = len(msgspec.json.encode(command.payload)) + len(command.id) + len(command.type)
        queue = self._queues.of(key)
        if not queue.room_for(size_bytes, self._ctx.queue_policy) and queue.get(command.id) is None:
            self._refuse(session, command.id, request_id, "queue_full", via)
            if settled is not None:
                settled(False)
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
            via=via,
        )
        queue.reserve(size_bytes)

        def done(outcome: list[Any] | StoreError) -> None:
            queue.release(size_bytes)
            if isinstance(outcome, StoreError):
                log.error("command_not_stored", command=command.id, error=str(outcome))
                self._refuse(session, command.id, request_id, "store_unavailable", via)
            else:
                self._stored(session, record, outcome[0], now)
            if settled is not None:
                settled(not isinstance(outcome, StoreError))

        trace = AddTrace(key, (record.id,), TraceEntry(wall, "arrived", record.type))
        self._ctx.store.submit([PutCommand(record), trace], done)

    def _stored(self, session: Session, record: CommandRecord, put: PutOutcome, arrived_at: float) -> None:
        key = session.key
        if put.duplicate:
            self._queues.count("duplicate")
            log.info("command_duplicate", command=record.id, session=key.ident, state=put.state.value)
            if put.result is not None:
                self._outbox.resend(key, record.id, record.request_id, put.result)
            return
        self._queues.count("queued")
        log.info("command_queued", command=record.id, type=record.type, session=key.ident)
        expires_at = arrived_at + (record.expires_wall - record.arrived_wall)
        live = self._queues.admit(replace(record, seq=put.seq), expires_at)
        live.arrived_at = arrived_at
        self._wake(key)

    def _refuse(self, session: Session, command_id: str, request_id: str, code: str, via: str, error: str = "") -> None:
        self._queues.count(f"rejected_{code}")
        log.warning("command_rejected", command=command_id, session=session.key.ident, code=code)
        if via != VIA_HTTP:
            self._outbox.report(session.key, session, command_id, request_id, code=code, error=error or REFUSALS[code])
