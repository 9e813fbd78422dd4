"""The outbox: command results on their way from the agent to the controller, stored until it has received them.

Results are sent in order, and sent again on the next connection until they are confirmed. See
docs/reference/protocol.md#3-commands.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from typing import Any

import msgspec
from msgspec.structs import replace

from shim.bridge.context import ENVELOPE_BYTES, BridgeContext, Moment, resolve
from shim.bridge.upstream_connection import UpstreamConnection
from shim.core.bounds import MAX_ID_BYTES, MAX_LOGGED_CHARS, cut
from shim.core.records import (
    AddTrace,
    CloseOutbox,
    OutboxEntry,
    PutOutbox,
    PutResult,
    ReadOutbox,
    ResultOutcome,
    SessionKey,
)
from shim.core.sessions import Session
from shim.errors import StoreError
from shim.log import get
from shim.protocol.rfc3339 import rfc3339
from shim.protocol.upstream_message import fit

log = get(__name__)

PAGE = 32
WINDOW_BYTES = 8 * 1024 * 1024
MAX_UNPERSISTED = 1000
RETRY_S = 5.0

Route = Callable[[SessionKey], UpstreamConnection | None]
MAX_UNTRACED = 256
LOGGED_PER_MINUTE = 100
REASONS = {
    "expired": "it had expired before it arrived",
    "queue_full": "the queue for this cluster is full",
    "store_unavailable": "the queue cannot be written",
}
DRAINED = "the shim is being drained and takes no new commands"


class OutboxRecord(msgspec.Struct):
    """One stored result that the controller is not known to have.

    `sent_on` is the serial of the connection that carried it last, 0 if none did. `posted_at` is the arrival of the
    agent's result in monotonic seconds, if the link was up then and the result was not sent yet.
    """

    session: SessionKey
    command_id: str
    sent_on: int = 0
    size_bytes: int = 0
    posted_at: float | None = None


class _UnpersistedReport(msgspec.Struct):
    """One report that is not stored; `sent_on` as in `OutboxRecord`."""

    session: SessionKey
    request_id: str
    payload: dict[str, Any]
    sent_on: int = 0


class Outbox:
    """All unconfirmed `command_result` messages.

    Only the numbers of stored results are kept in memory; the payloads are read from disk when they are sent.
    `CommandDelivery` sets `answered`, which is called for each result that was stored: it is evidence of delivery.
    """

    answered: Callable[[SessionKey, str], None]

    def __init__(self, ctx: BridgeContext, route: Route) -> None:
        self._ctx = ctx
        self._route = route
        self._entries: dict[int, OutboxRecord] = {}
        self._reading: dict[str, int] = {}  # owner -> last seq read
        self._read_again: set[str] = set()
        self._then: dict[str, list[Callable[[], object]]] = {}
        self._in_flight: dict[int, int] = {}  # connection serial -> bytes sent and not confirmed
        self._blocked: dict[str, int] = {}  # owner -> where to read on once there is room
        self._unread: set[str] = set()
        self._closing: set[int] = set()
        self._unpersisted: dict[int, _UnpersistedReport] = {}  # by numbers below zero, the oldest first
        self._last_number = 0
        self._outstanding: Counter[tuple[SessionKey, str]] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def empty(self) -> bool:
        """True if the controller has received everything, including what an earlier process stored."""
        return not (self._entries or self._unread or self._reading or self._closing or self._unpersisted)

    def has_stored_entries(self, owners: tuple[str, ...]) -> None:
        """Record that the store holds unsent results of these owners from an earlier process."""
        self._unread.update(owners)

    def unsent_for(self, owner: str) -> bool:
        """Return True if a result of this owner has never been sent."""
        unpersisted = any(each.sent_on == 0 and each.session.owner == owner for each in self._unpersisted.values())
        stored = any(e.sent_on == 0 and e.session.owner == owner for e in self._entries.values())
        return owner in self._unread or unpersisted or stored

    async def post_result(
        self, session: Session, command_id: str, body: dict[str, Any], at: Moment, *, online: bool
    ) -> None:
        """Store an agent's result and send it to the controller. Raises `StoreError`; the agent then posts it again.

        `online` is True if the session's link is up: only then is the time until the result is sent observed.
        """
        ids = {"command_id": command_id, "cluster_id": session.upstream_cluster_id, "agent_id": session.agent_id}
        payload = {**ids, **body}
        payload.setdefault("timestamp", rfc3339(at.unix))
        success = body.get("success") is True
        step = self._ctx.step(session.key, (command_id,), at.unix, "result", "success" if success else "failure")
        stored: asyncio.Future[StoreError | None] = asyncio.get_running_loop().create_future()
        done = partial(self._result_stored, session, command_id, success, at.now if online else None, stored)
        self._ctx.store.submit(PutResult(session.key, command_id, payload, at.unix), step, done=done)
        error = await stored
        if error is not None:
            self._ctx.refused_bytes = max(self._ctx.refused_bytes, len(msgspec.json.encode(payload)))
            raise error

    def _result_stored(
        self,
        session: Session,
        command_id: str,
        success: bool,
        posted_at: float | None,
        stored: asyncio.Future[StoreError | None],
        outcome: ResultOutcome | StoreError,
    ) -> None:
        """Answer the agent, and send a result that was just stored, even if its agent has hung up meanwhile."""
        # First, so that a defect in what follows does not keep the agent waiting: the result is on disk.
        resolve(stored, outcome if isinstance(outcome, StoreError) else None)
        if not isinstance(outcome, StoreError):
            key = session.home  # the session may have been superseded during the write
            kind = "repeat" if outcome.entry is None else "known" if outcome.known else "unknown"
            self._ctx.metrics.results.labels(kind, "true" if success else "false").inc()
            log.info("result_stored", command=command_id, session=key.ident, known=outcome.known)
            if outcome.entry is not None:
                self.added(replace(outcome.entry, session=key), posted_at)
            self.answered(key, command_id)

    def added(self, entry: OutboxEntry, posted_at: float | None = None) -> None:
        """Send a result that was just stored, unless a read of the outbox is under way that will reach it.

        `posted_at` as in `OutboxRecord`.
        """
        self._add(entry.seq, OutboxRecord(entry.session, entry.command_id, posted_at=posted_at))
        if entry.session.owner not in self._reading:
            self._send(entry)

    def _add(self, seq: int, entry: OutboxRecord) -> None:
        self._entries[seq] = entry
        self._outstanding[entry.session, entry.command_id] += 1

    def _no_longer_outstanding(self, session: SessionKey, command_id: str) -> None:
        self._outstanding[session, command_id] -= 1
        if self._outstanding[session, command_id] <= 0:
            del self._outstanding[session, command_id]

    def start_sending(self, owner: str, then: Callable[[], object] | None = None) -> None:
        """Send everything of this owner that its current connection has not carried; call `then` afterwards."""
        if then is not None:
            self._then.setdefault(owner, []).append(then)
        for seq, report in list(self._unpersisted.items()):
            if report.session.owner == owner:
                self._send_report(seq, report)
        self._start_reading(owner, 0)

    def _start_reading(self, owner: str, after: int) -> None:
        if owner in self._reading:
            self._read_again.add(owner)
            return
        self._blocked.pop(owner, None)
        self._reading[owner] = after
        self._read(owner)

    def confirmed(self, seqs: tuple[int, ...]) -> None:
        """Close the results that the controller has received."""
        closing: dict[int, OutboxRecord] = {}
        for seq in seqs:
            self._unpersisted.pop(seq, None)
            if (entry := self._entries.pop(seq, None)) is not None:
                closing[seq] = entry
                self._no_longer_outstanding(entry.session, entry.command_id)
                if entry.sent_on in self._in_flight:
                    self._in_flight[entry.sent_on] -= entry.size_bytes
        self._closing.update(closing)
        for owner, after in list(self._blocked.items()):
            self._start_reading(owner, after)
        if closing:
            wall = self._ctx.clock.wall_s()
            steps = [self._ctx.step(each.session, (each.command_id,), wall, "closed") for each in closing.values()]
            done = partial(self._closed, closing)
            self._ctx.store.submit(CloseOutbox(tuple(closing), wall), *steps, done=done)

    def _closed(self, closing: dict[int, OutboxRecord], outcome: StoreError | None) -> None:
        """Forget results that the store has closed. If it failed, they are sent again after the next connect."""
        self._closing.difference_update(closing)
        for seq, entry in closing.items():
            if outcome is not None:
                self._add(seq, entry)  # a result is accepted twice
            else:
                self._ctx.metrics.commands.labels("closed").inc()
                log.info("result_closed", command=entry.command_id, session=entry.session.ident)

    def resend(self, key: SessionKey, command_id: str, request_id: str, payload: dict[str, Any]) -> None:
        """Send a stored result again, because the controller sent its command again."""
        if not self._outstanding[key, command_id]:
            self._outstanding[key, command_id] += 1  # the command may arrive once more before the result is stored
            put = PutOutbox(key, command_id, request_id, payload)
            self._ctx.store.submit(put, done=partial(self._resend_stored, put))

    def _resend_stored(self, put: PutOutbox, outcome: OutboxEntry | StoreError) -> None:
        self._no_longer_outstanding(put.session, put.command_id)
        self._report_stored(put, outcome)

    def move(self, source: SessionKey, target: SessionKey) -> None:
        """Send the results of the superseded session `source` over the connection of `target`."""
        moved = [entry for entry in self._entries.values() if entry.session == source]
        for entry in moved:
            self._no_longer_outstanding(entry.session, entry.command_id)
            entry.session = target
            self._outstanding[entry.session, entry.command_id] += 1
        for report in self._unpersisted.values():
            if report.session == source:
                report.session = target
        if moved or source.owner in self._unread:
            self.start_sending(target.owner)

    def connection_closed(self, connection: UpstreamConnection) -> None:
        """Release the send window of a closed connection; its unconfirmed results are sent on the next one."""
        self._in_flight.pop(connection.serial, None)

    def report_failure(
        self, key: SessionKey, session: Session | None, command_id: str, request_id: str, *, code: str, error: str
    ) -> None:
        """Report to the controller that a command ended without its agent's result.

        The report is stored first. If the store fails, it is sent without being stored: a report that may be lost is
        better than none.
        """
        wall = self._ctx.clock.wall_s()
        payload = self.failure_payload(session, command_id, wall, code=code, error=error)
        step = self._ctx.step(key, (command_id,), wall, "reported", code)
        put = PutOutbox(key, command_id, request_id, payload)
        self._ctx.store.submit(put, step, done=partial(self._report_stored, put))

    def _report_stored(self, put: PutOutbox, outcome: OutboxEntry | StoreError) -> None:
        if isinstance(outcome, StoreError):
            self.send_unpersisted(put.session, put.request_id, put.payload)
        else:
            self.added(outcome)

    def send_unpersisted(
        self, key: SessionKey, request_id: str, payload: dict[str, Any], *, again: bool = True
    ) -> None:
        """Send a report that is not stored; the newest `MAX_UNPERSISTED` are kept in memory until they are confirmed.

        With `again=False` a report that could be sent is not kept: it is not repeated after a reconnect.
        """
        connection = self._route(key)
        if connection is not None and not again:
            connection.send("command_result", payload, request_id)
            return
        self._last_number -= 1
        report = self._unpersisted[self._last_number] = _UnpersistedReport(key, request_id, payload)
        if len(self._unpersisted) > MAX_UNPERSISTED:
            del self._unpersisted[next(iter(self._unpersisted))]
        self._send_report(self._last_number, report)

    def _send_report(self, seq: int, report: _UnpersistedReport) -> None:
        connection = self._route(report.session)
        if connection is not None and report.sent_on != connection.serial:
            report.sent_on = connection.serial
            connection.send_result(seq, report.request_id, report.payload)

    def failure_payload(
        self, session: Session | None, command_id: str, wall: float, *, code: str, error: str
    ) -> dict[str, Any]:
        """Return the payload of a `command_result` that the shim creates itself."""
        payload: dict[str, Any] = {"command_id": command_id}
        if session is not None:
            payload["cluster_id"] = session.upstream_cluster_id
            payload["agent_id"] = session.agent_id
        payload["success"] = False
        payload["code"] = code
        payload["error"] = error
        payload["timestamp"] = rfc3339(wall)
        return payload

    # --- reading stored results ---------------------------------------------------------------------------------------

    def _read(self, owner: str) -> None:
        self._ctx.store.submit(ReadOutbox(owner, self._reading[owner], PAGE), done=partial(self._page_read, owner))

    def _page_read(self, owner: str, page: list[OutboxEntry] | StoreError) -> None:
        if isinstance(page, StoreError):
            log.warning("outbox_unreadable", dedupe_key=owner, error=str(page))
            self._ctx.timers.call_later(RETRY_S, partial(self.start_sending, owner))
            self._end_reading(owner)
            return
        for entry in page:
            if entry.seq in self._closing:
                continue
            if entry.seq not in self._entries:
                self._add(entry.seq, OutboxRecord(entry.session, entry.command_id))
            if not self._send(entry):
                self._blocked[owner] = entry.seq - 1
                self._unread.add(owner)
                self._end_reading(owner)
                return
        if len(page) == PAGE:
            self._reading[owner] = page[-1].seq
            self._read(owner)
        else:
            self._unread.discard(owner)
            self._end_reading(owner)

    def _end_reading(self, owner: str) -> None:
        del self._reading[owner]
        if owner in self._read_again:
            self._read_again.discard(owner)
            self._start_reading(owner, 0)
            return
        for then in self._then.pop(owner, ()):
            then()

    def _send(self, entry: OutboxEntry) -> bool:
        """Send a result if its connection is open and has not carried it yet.

        Returns False if the result has to wait because too many bytes are unconfirmed on the connection.
        """
        connection = self._route(entry.session)
        known = self._entries.get(entry.seq)
        if connection is None or known is None or known.sent_on == connection.serial:
            return True
        in_flight = self._in_flight.get(connection.serial, 0)
        if in_flight >= WINDOW_BYTES:
            self._blocked.setdefault(entry.session.owner, entry.seq - 1)
            return False
        known.sent_on = connection.serial
        known.size_bytes = sum(len(v) for v in entry.payload.values() if isinstance(v, str)) + ENVELOPE_BYTES
        self._in_flight[connection.serial] = in_flight + known.size_bytes
        connection.send_result(entry.seq, entry.request_id, self._as_sent(entry))
        if known.posted_at is not None:
            self._ctx.metrics.message_seconds.labels("up").observe(self._ctx.now - known.posted_at)
            known.posted_at = None
        return True

    def _as_sent(self, entry: OutboxEntry) -> dict[str, Any]:
        """Return the payload with the controller's current cluster id, shortened to the configured maximum."""
        payload, session = entry.payload, self._ctx.sessions.get(entry.session)
        if session is not None and session.upstream_cluster_id:
            payload = {**payload, "cluster_id": session.upstream_cluster_id}
        return fit(payload, self._ctx.settings.upstream.max_send_bytes - ENVELOPE_BYTES)


class Rejection(msgspec.Struct, frozen=True):
    """One rejected command.

    `code` and `error` are sent to the controller; the trace is stored under `key`.
    """

    key: SessionKey
    command_id: str
    request_id: str
    code: str
    error: str
    session: Session | None = None


class Rejections:
    """Reporter of rejected commands, bounded so that a flood of them delays no accepted command.

    A controller can send commands faster than the disk can store traces. Every rejection is reported. While the disk is
    busy with earlier traces, only the newest `MAX_UNTRACED` are kept: an operator looks for a recent command. Log lines
    are limited to `LOGGED_PER_MINUTE`; the remaining ones are counted.
    """

    def __init__(self, ctx: BridgeContext, outbox: Outbox) -> None:
        self._ctx = ctx
        self._outbox = outbox
        self._untraced: deque[tuple[Rejection, float]] = deque(maxlen=MAX_UNTRACED)
        self._tracing = False
        self._minute = -1
        self._logged = 0

    def reject(self, rejection: Rejection, *, report: bool = True) -> None:
        """Count, log and trace a rejection and report it to the controller.

        With `report=False` nothing is reported: a command that came by HTTP has no way back.
        """
        code, wall = rejection.code, self._ctx.clock.wall_s()
        self._ctx.metrics.commands.labels("expired" if code == "expired" else f"rejected_{code}").inc()
        self._log(rejection)
        if report:
            payload = self._outbox.failure_payload(
                rejection.session, rejection.command_id, wall, code=code, error=rejection.error
            )
            self._outbox.send_unpersisted(rejection.key, rejection.request_id, payload)
        self._untraced.append((rejection, wall))
        self._trace()

    def _log(self, rejection: Rejection) -> None:
        minute = int(self._ctx.now // 60)
        if minute != self._minute:
            self._minute, self._logged = minute, 0
        self._logged += 1
        log.warning(
            "command_rejected",
            dedupe_key=None if self._logged <= LOGGED_PER_MINUTE else rejection.code,
            command=cut(rejection.command_id, MAX_LOGGED_CHARS),
            session=rejection.key.ident,
            code=rejection.code,
        )

    def _trace(self) -> None:
        """Submit all waiting traces in one transaction, unless the previous transaction is still pending."""
        if self._tracing or not self._untraced:
            return
        self._tracing = True
        traces = list(self._traces())
        self._untraced.clear()
        self._ctx.store.submit(*traces, done=self._traced)

    def _traced(self, _outcome: StoreError | None) -> None:
        self._tracing = False
        self._trace()

    def _traces(self) -> Iterator[AddTrace]:
        """Yield one operation for each run of rejections that share session, time and code."""
        for (key, wall, code), group in groupby(self._untraced, lambda each: (each[0].key, each[1], each[0].code)):
            ids = tuple(cut(rejection.command_id, MAX_ID_BYTES) for rejection, _ in group)
            yield self._ctx.step(key, ids, wall, "reported", code)
