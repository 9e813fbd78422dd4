"""Heartbeats and status reports to the controller, for sessions whose agent is alive.

Every heartbeat is caused by a call of the agent, never by a timer alone: the shim must not report a dead agent as
alive. See docs/reference/protocol.md#21-link-life.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import msgspec

from shim.bridge.context import ENVELOPE_BYTES, BridgeContext
from shim.bridge.link_pool import LinkPool
from shim.bridge.registration import Registrations
from shim.bridge.scheduler import in_slices
from shim.bridge.upstream_connection import UpstreamConnection
from shim.core.agent_calls import TargetKind
from shim.core.bounds import MAX_ALL_KEPT_BYTES
from shim.core.records import SessionKey
from shim.core.sessions import Session
from shim.core.standing import ACK_GRACE_S, HeartbeatOutcome, TroubleKind
from shim.log import get

log = get(__name__)

STATUS_EVERY_S = 30.0


class HeartbeatForwarder:
    """Sender of heartbeats and status reports; decides when one is due."""

    def __init__(
        self,
        ctx: BridgeContext,
        registrations: Registrations,
        links: LinkPool,
    ) -> None:
        self._ctx = ctx
        self._registrations = registrations
        self._links = links
        self._held: dict[SessionKey, Session] = {}
        self._status: dict[SessionKey, dict[str, Any]] = {}
        self._status_sizes: dict[SessionKey, int] = {}
        self._status_bytes = 0
        self._status_at: dict[SessionKey, float] = {}
        self._status_timed: set[SessionKey] = set()
        self._acks_seen = False
        self._uncovered: set[Session] = set()
        self._covered = ctx.metrics.agent_heartbeats.labels(HeartbeatOutcome.ACKED.value)

    def identity(self) -> dict[str, Any]:
        """Return the configured `identity` of agents that never registered here, without its empty fields."""
        known = msgspec.structs.asdict(self._ctx.settings.identity)
        return {key: value for key, value in known.items() if value}

    # --- heartbeats ---------------------------------------------------------------------------------------------------

    def heartbeat(self, session: Session, now: float) -> None:
        """Record an agent's heartbeat and send one upstream if it is due.

        The controller is expected to acknowledge a heartbeat for this agent within one interval; the metric
        `agent_shim_agent_heartbeats` counts if it did.
        """
        connection = self.called(session, now)
        window_s = self._ctx.settings.upstream.heartbeat_interval_s + ACK_GRACE_S
        if session.coverage.record_heartbeat(now, connection, window_s):
            self._covered.inc()
        else:
            self._uncovered.add(session)

    def settle(self) -> Iterator[None]:
        """Count the agents' heartbeats whose interval has passed as acknowledged or not; called periodically."""
        now, window_s = self._ctx.now, self._window_s
        for session in list(self._uncovered):
            yield
            for outcome, number in session.coverage.settle(now, window_s, acks=self._acks_seen).items():
                self._ctx.metrics.agent_heartbeats.labels(outcome.value).inc(number)
            if not session.coverage.waiting:
                self._uncovered.discard(session)

    def unacknowledged(self) -> list[tuple[Session, float]]:
        """Return the agents whose heartbeats the controller does not acknowledge, and since when (monotonic)."""
        now, found = self._ctx.now, []
        for session in self._ctx.sessions:
            since = session.standing.unacknowledged_since(now, self._window_s) if session.fresh(now) else None
            if since is not None and self._links.connection_of(session) is not None:
                found.append((session, since))
        return found

    @property
    def _window_s(self) -> float:
        return self._ctx.settings.upstream.heartbeat_interval_s + ACK_GRACE_S

    def _answered(self, session: Session, sent_at: float, connection: UpstreamConnection, accepted: bool) -> None:
        if not accepted:
            session.coverage.refused(sent_at)
            return
        self._acks_seen = True
        session.standing.acknowledged()
        self._registrations.acknowledged(session)
        covered = session.coverage.acked(sent_at, connection, self._ctx.now, self._window_s)
        self._covered.inc(covered)

    def called(self, session: Session, now: float, *, force: bool = False) -> UpstreamConnection | None:
        """Send a heartbeat for a session whose agent is alive, if one is due and allowed.

        With `force` it is due in any case, because something changed. Returns the session's connection, or None. The
        agent has just called, or the caller has checked `Session.fresh`.
        """
        connection = self._links.connection_of(session)
        if connection is None:
            return None
        if session.heartbeat is None and session.poll_at is None:
            return connection  # the agent has only registered so far: wait for the data of its own first heartbeat
        due = force or session.heartbeat_due(now, self._ctx.settings.upstream.heartbeat_interval_s)
        if not due or not self._ensure_announced(session, connection):
            return connection
        session.sent_at = now
        session.last_sent_status = session.reported_status
        session.coverage.written(now, connection)
        session.standing.sent(now, connection.serial)
        self._ctx.metrics.heartbeats_up.labels("sent").inc()
        answered = partial(self._answered, session, now, connection)
        connection.send_heartbeat(session.key, session.heartbeat_payload(), answered, now)
        return connection

    def _ensure_announced(self, session: Session, connection: UpstreamConnection) -> bool:
        """Return True if the session may send heartbeats on this connection; otherwise register it first.

        The controller must know a session before its first heartbeat. Adopted cluster sessions without registration
        data are excepted: their heartbeats carry the agent's cluster id.
        """
        if self._is_announced(session, connection) and session.upstream_cluster_id:
            return True
        adopted = not session.registration
        if adopted and session.key.kind == TargetKind.CLUSTER.value:
            return True
        self.announce(session)
        return False

    def _is_announced(self, session: Session, connection: UpstreamConnection) -> bool:
        by_gateway = session.gateway is not None and session.gateway.up_connection is connection
        return by_gateway or session.announced_on == connection.serial

    def announce(self, session: Session) -> None:
        """Register a fresh session with the controller from what is known of it.

        Without a name nothing is sent, and a warning is logged once.
        """
        link = self._links.link_of(session)
        if link is None or link.connection is None or not session.fresh(self._ctx.now):
            return
        payload = session.register_payload(self.identity())
        if payload is not None:
            self._registrations.ask(session, link, payload)
        elif session.standing.fail(TroubleKind.NAME_UNKNOWN, "", self._ctx.now):
            log.warning("name_unknown", session=session.key.ident, hint="set identity.name in the configuration")

    def session_announced(self, session: Session, connection: UpstreamConnection) -> None:
        """Record that the controller knows the session on this connection, and send its newest heartbeat."""
        session.announced_on = connection.serial
        if self._links.connection_of(session) is connection:
            self.send_newest(session, self._ctx.now)

    def online(self, sessions: list[Session], connection: UpstreamConnection) -> None:
        """Send the newest heartbeat of each fresh session, unless this connection has carried one already."""
        in_slices(self._ctx, self._online(sessions, connection))

    def _online(self, sessions: list[Session], connection: UpstreamConnection) -> Iterator[None]:
        for session in sessions:
            if self._links.connection_of(session) is connection:
                self.send_newest(session, self._ctx.now, force=session.standing.sent_on != connection.serial)
            yield

    def send_newest(self, session: Session, now: float, *, force: bool = True) -> None:
        """Send the session's newest heartbeat and status report, if its agent is alive."""
        if session.fresh(now):
            self.called(session, now, force=force)
        if session.key not in self._status_timed:
            self._send_status(session)

    def hold_started(self, session: Session, now: float) -> None:
        """Count a held poll as contact with the agent while its connection is open."""
        session.held += 1
        self._held[session.key] = session
        self.called(session, now)

    def hold_ended(self, session: Session, now: float) -> None:
        """Record the last contact of a held poll.

        The connection was open until now, also if the agent disconnected: the agent was alive until then.
        """
        session.held -= 1
        if not session.held:
            self._held.pop(session.key, None)
        session.touch(now, self._ctx.clock.wall_s())
        self.called(session, now)

    def sweep(self) -> Iterator[None]:
        """Send the heartbeats that became due during held polls; called every few seconds."""
        for session in list(self._held.values()):
            yield
            if session.held:
                now = self._ctx.now
                session.touch(now, self._ctx.clock.wall_s())
                self.called(session, now)

    # --- status -------------------------------------------------------------------------------------------------------

    def status(self, session: Session, body: dict[str, Any]) -> None:
        """Send an agent's status report: the latest wins, at most one in 30 s.

        A report that is too large for the controller, or for the memory of unsent reports, is dropped and counted.
        """
        upstream = self._ctx.settings.upstream
        size_bytes = len(msgspec.json.encode(body))
        self._drop_status(session.key)
        too_large = size_bytes + ENVELOPE_BYTES > upstream.max_send_bytes
        if not upstream.send_status or too_large or self._status_bytes + size_bytes > MAX_ALL_KEPT_BYTES:
            self._ctx.metrics.status_dropped.inc()
            return
        self._status[session.key] = body
        self._status_sizes[session.key] = size_bytes
        self._status_bytes += size_bytes
        if session.key in self._status_timed:
            return
        last = self._status_at.get(session.key)
        wait_s = 0.0 if last is None else max(0.0, last + STATUS_EVERY_S - self._ctx.now)
        if wait_s:
            self._status_timed.add(session.key)
            self._ctx.timers.call_later(wait_s, lambda: self._status_due(session))
        else:
            self._send_status(session)

    def _status_due(self, session: Session) -> None:
        self._status_timed.discard(session.key)
        self._send_status(session)

    def _send_status(self, session: Session) -> None:
        connection = self._links.connection_of(session)
        if session.key not in self._status:
            return
        alive = connection is not None and session.fresh(self._ctx.now)
        announced = connection is not None and self._is_announced(session, connection)
        if alive and not announced and session.register_payload(self.identity()) is not None:
            return  # keep the report of an adopted agent: it is sent after the registration that its heartbeat causes
        body = self._status[session.key]
        self._drop_status(session.key)
        if connection is None or not alive or not announced:
            self._ctx.metrics.status_dropped.inc()
            return
        self._status_at[session.key] = self._ctx.now
        connection.send_status(body)

    def _drop_status(self, key: SessionKey) -> None:
        if self._status.pop(key, None) is not None:
            self._status_bytes -= self._status_sizes.pop(key)

    def forget(self, key: SessionKey) -> None:
        """Delete the status report of a session that was removed."""
        self._drop_status(key)
        self._status_at.pop(key, None)
