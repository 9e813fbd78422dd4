"""Commands on their way in: disk first, then the session's queue, then the waiting poll (protocol.md §3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec.structs import replace

from shim.bridge.context import BridgeContext
from shim.bridge.outbox import Outbox
from shim.bridge.queues import CommandQueues
from shim.bridge.refusals import Refusal, Rejections
from shim.core.normalise import ParsedCommand
from shim.core.records import (
    VIA_HTTP,
    AddTrace,
    CommandRecord,
    LookUpCommand,
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
        self, ctx: BridgeContext, queues: CommandQueues, outbox: Outbox, refusals: Rejections, wake: Callable[[SessionKey], None]
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
        arrival.record = replace(arrival.record, payload={})
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
        live = self._queues.add(replace(record, session=key, seq=put.seq), expires_at)
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
