"""One open upstream connection: message numbering, liveness, and confirmation of results.

The controller does not acknowledge results. A result is confirmed by the reply to a later message on the same
connection, because WebSocket messages arrive in order: the pong of a fence ping, or a `heartbeat_ack`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from shim.bridge.context import LATE_S, BridgeContext
from shim.core.liveness import MAX_TRACKED_HEARTBEATS, Liveness, LivenessState
from shim.core.records import SessionKey
from shim.core.text import printable
from shim.log import get
from shim.ports import Timer, WebSocket
from shim.protocol.rfc3339 import rfc3339
from shim.protocol.upstream_message import KNOWN_TYPES, Message
from shim.redaction import without_secrets

log = get(__name__)

MAX_CLOSE_REASON_CHARS = 123  # RFC 6455 section 5.5: a control frame has 125 bytes at most, two of them the code


def type_label(kind: str) -> str:
    """Return a metric label for a message type, from a bounded set."""
    return kind if kind in KNOWN_TYPES else "other"


class _InFlightHeartbeat(NamedTuple):
    """One heartbeat that is not acknowledged yet; `order` is its position among the connection's messages."""

    session: SessionKey
    order: int
    at: float
    answered: Callable[[bool], None]


class ResultsConfirmed(NamedTuple):
    """The controller has received these entries of the outbox."""

    seqs: tuple[int, ...]


class ConnectionEnd(NamedTuple):
    """The end of a connection, as in `ports.WebSocketListener.on_closed`."""

    by_close_frame: bool
    code: int
    reason: str

    @property
    def metric(self) -> str:
        """The `reason` label of `agent_shim_upstream_disconnects_total`."""
        return "closed" if self.by_close_frame else "lost"

    @property
    def text(self) -> str:
        """The end of the connection for logs and the status, without text from the controller."""
        if not self.by_close_frame:
            return "connection lost"
        return f"closed {self.code}" if self.code else "closed without a code"

    def detail(self, token: str) -> str:
        """Return the controller's close reason with secrets masked, bounded and in printable characters."""
        return printable(without_secrets(self.reason, token))[:MAX_CLOSE_REASON_CHARS] if self.reason else ""


class ConnectionOwner(Protocol):
    """The interface through which a connection reports its events."""

    def connection_message(self, connection: UpstreamConnection, message: Message, now: float) -> None:
        """Handle a message that arrived at `now` (monotonic seconds)."""

    def connection_broken(self, connection: UpstreamConnection, verdict: LivenessState, now: float) -> None:
        """Drop the connection, because the liveness check found it dead."""

    def connection_closed(self, connection: UpstreamConnection, ending: ConnectionEnd, now: float) -> None:
        """Handle that the peer or the network closed the connection."""


class UpstreamConnection:
    """Implementation of `ports.WebSocketListener`. `serial` is unique in the process and never 0.

    `used_to_ack` is True if this peer acknowledged heartbeats on earlier connections, None if that is unknown.
    """

    def __init__(
        self,
        ctx: BridgeContext,
        serial: int,
        label: str,
        owner: ConnectionOwner,
        now: float,
        *,
        used_to_ack: bool | None,
    ) -> None:
        upstream = ctx.settings.upstream
        self.serial = serial
        self.label = label
        self._ctx = ctx
        self._owner = owner
        self._socket: WebSocket | None = None
        self._watch: Timer | None = None
        self._check_at_s = now
        self._liveness = Liveness(
            now, upstream.ping_interval_s, upstream.read_timeout_s, 2 * upstream.heartbeat_interval_s, used_to_ack
        )
        self._order = 0
        self._heartbeats: dict[str, _InFlightHeartbeat] = {}
        self._statuses: deque[int] = deque(maxlen=MAX_TRACKED_HEARTBEATS)  # the orders of status reports
        self._results: deque[tuple[int, int]] = deque()  # (order, outbox seq)
        self._fence_ping: tuple[bytes, int] | None = None
        self._application_seen = False
        self._bad_kinds: set[str] = set()

    @property
    def heard_at(self) -> float:
        """The monotonic time of the last inbound frame, or of the dial before the first one."""
        return self._liveness.heard_at

    @property
    def acks_learnt(self) -> bool | None:
        """True or False if this connection has shown that the peer acknowledges heartbeats or not, else None."""
        return self._liveness.learnt

    def bind(self, socket: WebSocket, now: float) -> None:
        """Start to use the socket of a successful dial; the handshake's answer counts as the first frame."""
        self._socket = socket
        self._liveness.frame(now)
        self._check_at_s = now
        self._check(now)

    # --- sending ------------------------------------------------------------------------------------------------------

    def send(self, kind: str, payload: dict[str, Any], request_id: str = "") -> None:
        """Send one message; do nothing once the connection is closed."""
        if self._socket is None:
            return
        self._order += 1
        self._ctx.metrics.messages.labels("out", type_label(kind)).inc()
        self._socket.send(Message(kind, payload, request_id, rfc3339(self._ctx.clock.wall_s())))

    def send_heartbeat(
        self, key: SessionKey, payload: dict[str, Any], answered: Callable[[bool], None], now: float
    ) -> None:
        """Send a session's heartbeat.

        `answered(True)` is called when it is acknowledged, `answered(False)` when an `error` with its request id
        arrives.
        """
        request_id = self._ctx.new_id()
        self.send("heartbeat", payload, request_id)
        self._heartbeats[request_id] = _InFlightHeartbeat(key, self._order, now, answered)
        while len(self._heartbeats) > MAX_TRACKED_HEARTBEATS:
            del self._heartbeats[next(iter(self._heartbeats))]
        self._liveness.heartbeat_sent(request_id, now)

    def send_status(self, payload: dict[str, Any]) -> None:
        """Send a status report under a request id of its own.

        The controller acknowledges it with `heartbeat_ack` as well; the request id distinguishes the two.
        """
        self.send("status", payload, self._ctx.new_id())
        self._statuses.append(self._order)

    def heartbeat_failed(self, request_id: str) -> SessionKey | None:
        """Return the session of the heartbeat that an `error` with this request id answers, or None.

        The heartbeat's acknowledgement is no longer awaited.
        """
        sent = self._heartbeats.pop(request_id, None)
        if sent is None:
            return None
        self._liveness.answered(request_id)
        sent.answered(False)
        return sent.session

    def send_result(self, seq: int, request_id: str, payload: dict[str, Any]) -> None:
        """Send a `command_result`, followed by a fence ping whose pong confirms it.

        See CLOSED in docs/reference/protocol.md#3-commands.
        """
        if self._socket is None:
            return
        self.send("command_result", payload, request_id)
        self._results.append((self._order, seq))
        self._send_fence_ping()

    def _send_fence_ping(self) -> None:
        """Send a ping behind the unconfirmed results, unless one is unanswered.

        At most one fence ping is under way. Results that were sent after it get the next one.
        """
        if self._fence_ping is None and self._socket is not None and self._results:
            self._order += 1
            payload = b"fence-%d" % self._order
            self._fence_ping = (payload, self._order)
            self._socket.ping(payload)

    def close(self, code: int) -> None:
        """Close the connection without reporting its end; with code 0 it is aborted."""
        socket, self._socket = self._socket, None
        self._stop_watch()
        if socket is not None:
            if code:
                socket.close(code)
            else:
                socket.abort()

    # --- ports.WebSocketListener --------------------------------------------------------------------------------------

    def on_frame(self) -> None:
        """Record that a frame of any kind arrived."""
        self._liveness.frame(self._ctx.now)

    def has_room(self) -> bool:
        """Return False while too many commands are on their way to the disk."""
        return self._ctx.arriving.has_room

    def on_message(self, message: Message) -> None:
        """Handle an acknowledgement here, and pass every message to the owner."""
        if self._socket is None:
            return
        now = self._ctx.now
        if not self._application_seen:
            self._application_seen = True
            self._send_fence_ping()  # a pong before the first message did not count: ask again
        self._ctx.metrics.messages.labels("in", type_label(message.type)).inc()
        if message.replaced:
            self._ctx.metrics.invalid_characters.labels("controller").inc()
        if message.type == "heartbeat_ack":
            self._acked(message.request_id, now)
        self._owner.connection_message(self, message, now)

    def on_bad_frame(self, kind: str) -> None:
        """Count a frame that is no message; log it once per kind and connection."""
        self._ctx.metrics.bad_frames.labels(kind).inc()
        if kind not in self._bad_kinds:
            self._bad_kinds.add(kind)
            log.warning("frame_ignored", link=self.label, kind=kind)

    def on_pong(self, payload: bytes) -> None:
        """Confirm the results before a fence ping, if its pong counts.

        A pong shows only that the peer's WebSocket layer has read everything before its ping. A live proxy also answers
        pings for a stalled application. So a pong does not count if the application acknowledges heartbeats: then only
        acknowledgements do. Neither does it count before the application has sent a message, or while a first
        acknowledgement on this connection may still come.
        """
        if self._fence_ping is None or payload != self._fence_ping[0]:
            return
        order = self._fence_ping[1]
        self._fence_ping = None
        if self._application_seen and not self._liveness.may_ack(self._ctx.now):
            self._confirm_up_to(order)
        if self._results and self._results[-1][0] > order:
            self._send_fence_ping()

    def on_closed(self, by_close_frame: bool, code: int, reason: str) -> None:
        """Report the end of the connection to the owner, unless the shim closed it."""
        if self._socket is not None:
            self._socket = None
            self._stop_watch()
            self._owner.connection_closed(self, ConnectionEnd(by_close_frame, code, reason), self._ctx.now)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _acked(self, request_id: str, now: float) -> None:
        self._liveness.acked(request_id)
        named = bool(request_id)
        if not named and self._heartbeats:
            request_id = next(iter(self._heartbeats))
        found = self._heartbeats.pop(request_id, None)
        if found is None:
            return
        self._ctx.metrics.heartbeats_up.labels("acked").inc()
        self._ctx.metrics.heartbeat_ack_seconds.observe(now - found.at)
        found.answered(True)
        # An acknowledgement without an id may belong to a status report that was sent before the oldest heartbeat.
        # Confirm only the results before that report: confirming too few is safe, confirming too many loses results.
        in_doubt = not named and self._statuses and self._statuses[0] < found.order
        self._confirm_up_to(self._statuses.popleft() if in_doubt else found.order)

    def _confirm_up_to(self, order: int) -> None:
        seqs: list[int] = []
        while self._results and self._results[0][0] < order:
            seqs.append(self._results.popleft()[1])
        if seqs:
            self._ctx.events.put(ResultsConfirmed(tuple(seqs)))

    def _check(self, now: float) -> None:
        """Judge if the peer is alive, and ping it if that is due."""
        if self._socket is None:
            return
        if now - self._check_at_s > LATE_S:
            self._liveness.excuse(now)
        check = self._liveness.check(now)
        if check.verdict in (LivenessState.HALF_OPEN, LivenessState.STALLED):
            self._owner.connection_broken(self, check.verdict, now)
            return
        if check.verdict is LivenessState.PING:
            self._socket.ping(b"alive")
        self._send_fence_ping()  # repeats a fence whose pong came too early to count
        wait_s = max(check.next_s, 0.01)
        self._check_at_s = now + wait_s
        self._watch = self._ctx.timers.call_later(wait_s, lambda: self._check(self._ctx.now))

    def _stop_watch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
