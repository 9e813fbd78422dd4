"""One upstream link at run time: its state machine, connection, timers and metrics.

A link performs what `shim.core.link_state` decides, and reports to the rest of the bridge by events, which
`bridge.event_handlers` handles. See docs/reference/protocol.md#2-upstream-side-the-websocket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from shim.bridge.context import BridgeContext
from shim.bridge.upstream_connection import ConnectionEnd, UpstreamConnection
from shim.core import link_state as ev
from shim.core.backoff import Backoff, DialOutcome, failure_name, is_controller_unreachable
from shim.core.link_state import LinkHistory, LinkState, LinkStateMachine, phase_of
from shim.core.liveness import LivenessState
from shim.core.records import SessionKey
from shim.errors import IllegalTransition, ShimError
from shim.log import get
from shim.ports import DialFailure, DialRequest, Timer, WebSocket
from shim.protocol.http import ws_url
from shim.protocol.upstream_message import Message

log = get(__name__)
LINK_KIND = "link"
"""Kind of a `SessionKey` that names a link: rejections of commands without a session are stored under it."""
_CONNECTED = frozenset({LinkState.ONLINE, LinkState.REPLAYING})


class LinkMetrics:
    """Recorder of one link's metrics.

    `received_since(at)` returns True if any link received a frame after the monotonic time `at`.
    """

    def __init__(self, ctx: BridgeContext, received_since: Callable[[float], bool]) -> None:
        self._ctx = ctx
        self._received_since = received_since
        self._begun_at: float | None = None  # while an attempt is under way
        self._opened_at: float | None = None
        self._lost_at: float | None = None  # while a link that was online is to come back
        self._worked_at: float | None = None
        self._unreachable_since: float | None = None
        self._refused = False
        self.reason = "other"

    def dial_started(self, now: float) -> None:
        """Record the start of an attempt; the second dial of `upstream.auth: auto` belongs to the same attempt."""
        if self._begun_at is None:
            self._begun_at = now

    def handshake_failed(self, failure: DialFailure) -> None:
        """Count a failed handshake."""
        self.reason = failure_name(failure.reason, failure.status)
        self._ctx.metrics.dials.labels(self.reason).inc()

    def dial_failed(self, failure: DialFailure, now: float) -> None:
        """Record the end of an attempt in which every way to present the token failed; `failure` is the last one."""
        begun_at, self._begun_at = self._begun_at, None
        if begun_at is None or failure.reason == "token":
            return  # the token could not be read, so the controller was not dialled
        since_working_s = None if self._worked_at is None else now - self._worked_at
        unreachable = is_controller_unreachable(failure.reason, failure.status, since_working_s)
        outcome = DialOutcome.UNREACHABLE if unreachable and not self._received_since(begun_at) else DialOutcome.FAILED
        if outcome is DialOutcome.UNREACHABLE:
            self._unreachable_since = begun_at
        else:
            self._refused = True
        self._ctx.metrics.attempts.labels(outcome.value).inc()

    def handshake_succeeded(self, now: float) -> None:
        """Count a successful handshake."""
        self._ctx.metrics.dials.labels("ok").inc()
        self._opened_at = now

    def came_online(self, now: float) -> None:
        """Record that the attempt succeeded: all fresh sessions are registered."""
        metrics = self._ctx.metrics
        if self._begun_at is not None:
            metrics.attempts.labels(DialOutcome.OK.value).inc()
        self._begun_at = None
        if self._lost_at is not None:
            metrics.reconnect_seconds.observe(now - self._lost_at)
            if not self._refused:
                # The controller was unreachable when the last unsuccessful attempt began, and returned some time later.
                # A refusal in between shows that it returned before: the time of its return is unknown then.
                metrics.return_seconds.observe(now - max(self._lost_at, self._unreachable_since or self._lost_at))
        self._lost_at = self._unreachable_since = None
        self._refused = False

    def connection_lost(self, reason: str, now: float) -> None:
        """Record that the connection ended and the shim did not close it."""
        metrics = self._ctx.metrics
        self.reason = reason
        metrics.disconnects.labels(reason).inc()
        opened_at, self._opened_at = self._opened_at, None
        if opened_at is not None and now - opened_at < self._ctx.settings.upstream.reconnect.stable_after_s:
            metrics.early_disconnects.inc()
        if self._begun_at is not None:  # the handshake succeeded, but the link did not come online
            metrics.attempts.labels(DialOutcome.FAILED.value).inc()
            self._refused = True
            self._begun_at = None
        else:
            self._lost_at = now
        self._worked_at = now

    def closed_by_shim(self) -> None:
        """Record that the shim closed the connection itself or stopped dialling: no return is to be measured."""
        self._begun_at = self._opened_at = self._lost_at = None


class LinkOpened(NamedTuple):
    """The handshake of a link succeeded."""

    link: UpstreamLink
    now: float


class LinkOnline(NamedTuple):
    """A link may carry heartbeats and results."""

    link: UpstreamLink


class LinkLost(NamedTuple):
    """The connection of a link ended, closed by the shim, the peer or the network."""

    link: UpstreamLink
    connection: UpstreamConnection


class RetryDue(NamedTuple):
    """The delay before the next dial of a link is over."""

    link: UpstreamLink
    now: float


class TokenRefused(NamedTuple):
    """The controller refused the token of a link in every way of presenting it."""

    link: UpstreamLink


class TokenAccepted(NamedTuple):
    """The controller accepted an agent's own token for the first time."""

    link: UpstreamLink


class LinkContext:
    """State that all links share: the numbers of their connections, and the handler of their messages.

    `received_since(at)` returns True if a frame arrived on any link after the monotonic time `at`. The bridge sets
    `receive` before the first dial.
    """

    receive: Callable[[UpstreamConnection, Message, UpstreamLink, float], None]

    def __init__(self, serials: Iterator[int], received_since: Callable[[float], bool]) -> None:
        self.serials = serials
        self.received_since = received_since


class UpstreamLink:
    """One link to the controller. `token` is held in memory only.

    `connection` is the open connection, `up_connection` the same one while it may carry heartbeats and results: None
    while registrations are still being replayed. `changed_at` is the monotonic time since when the link has been
    online, or was first needed without being online. `acks` is True if the controller acknowledges heartbeats, as far
    as earlier connections have shown, or None.
    """

    def __init__(self, ctx: BridgeContext, owner: str, name: str, token: str, shared: LinkContext) -> None:
        self.owner = owner
        self.name = name
        self.token = token
        self.connection: UpstreamConnection | None = None
        self.up_connection: UpstreamConnection | None = None
        self.acks: bool | None = None
        self._ctx = ctx
        self._shared = shared
        upstream, now = ctx.settings.upstream, ctx.now
        backoff = Backoff(ctx.backoff_policy, ctx.rng)
        self.machine = LinkStateMachine(upstream.auth, backoff, own_token=upstream.own_tokens)
        self.needed_at = self.changed_at = now
        self.history = LinkHistory(now)
        self.metrics = LinkMetrics(ctx, shared.received_since)
        self.last_failure = ""
        self.last_detail = ""
        self.stopped = False
        self._dial = 0
        self._timers: dict[str, Timer] = {}

    @property
    def state(self) -> LinkState:
        """The state of the link's state machine."""
        return self.machine.state

    @property
    def online(self) -> bool:
        """True if heartbeats and results may be sent."""
        return self.machine.state is LinkState.ONLINE

    @property
    def unreachable(self) -> str:
        """The reason for agents while the link is down; it may name a key of the shim's own configuration.

        The controller's words in a close frame are left out: they may repeat a secret of another agent.
        """
        detail = "" if self.last_failure.startswith("closed") else self.last_detail
        return f"the controller cannot be reached{': ' if detail else ''}{detail}"

    @property
    def rejection_key(self) -> SessionKey:
        """The key under which rejections without a session are stored, so that they are sent to the same peer."""
        return SessionKey(self.owner, LINK_KIND, self.name)

    def ensure_connected(self, now: float) -> None:
        """Dial the link if it is idle, because an agent called."""
        self.needed_at = now
        if self.machine.state is LinkState.IDLE:
            self.apply(ev.AgentCalled(), now)

    def apply(self, event: ev.LinkEvent, now: float) -> None:
        """Pass an event to the state machine and perform the resulting effects.

        Never raises: an event that is illegal in the current state is logged and ignored.
        """
        before = self.machine.state
        try:
            effects = self.machine.handle(event, now)
        except IllegalTransition as error:
            log.error("illegal_transition", link=self.name, error=str(error))
            return
        state = self.machine.state
        self.up_connection = self.connection if state is LinkState.ONLINE else None
        if state is not before:
            # A link that was given up while it was down is as little online as before when it is needed again.
            if LinkState.ONLINE in (before, state) or (before is LinkState.IDLE and not self.last_failure):
                self.changed_at = now
            # Logged at level info if a connection came or went, else at level debug.
            matters = before in _CONNECTED or state in (LinkState.ONLINE, LinkState.IDLE, LinkState.STOPPED)
            (log.info if matters else log.debug)("link_state", link=self.name, state=state.value, was=before.value)
        if state is LinkState.ONLINE and not self.machine.refused:
            self.last_failure = self.last_detail = ""
        self.history.enter(phase_of(self.machine), now, self.last_failure)
        for effect in effects:
            self._perform(effect, now)

    def close_unneeded(self, now: float) -> None:
        """Close the link, or stop dialling it, until an agent calls again."""
        self.metrics.closed_by_shim()
        if self.machine.state is not LinkState.IDLE:
            self.apply(ev.IdleTimeout(), now)

    def stop(self, now: float) -> None:
        """Close the connection with code 1000 and never dial again."""
        self.stopped = True
        self.apply(ev.Stop(), now)
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    # --- performing effects -------------------------------------------------------------------------------------------

    def _perform(self, effect: ev.LinkEffect, now: float) -> None:
        """Perform an effect on the link's own socket and timers here; queue an event for all others."""
        put = self._ctx.events.put
        match effect:
            case ev.Dial():
                self._start_dial(effect, now)
            case ev.CancelDial():
                self._dial += 1
            case ev.StartRetryTimer():
                self._arm("retry", effect.delay_s, lambda: put(RetryDue(self, self._ctx.now)))
                self._ctx.metrics.retries.labels(self.metrics.reason).inc()
                log.debug("link_retry", link=self.name, delay_s=round(effect.delay_s, 3), failure=self.last_failure)
            case ev.CancelRetryTimer():
                self._disarm("retry")
            case ev.StartReplay():
                self._arm("stable", self._ctx.settings.upstream.reconnect.stable_after_s, self._stable)
                put(LinkOpened(self, now))
            case ev.Online():
                self.metrics.came_online(now)
                put(LinkOnline(self))
            case ev.Offline():
                self._drop_connection()
            case ev.CloseSocket():
                self._close_socket(effect.code)
            case ev.AuthRejected():
                put(TokenRefused(self))
            case ev.TokenAccepted():
                put(TokenAccepted(self))

    def _start_dial(self, effect: ev.Dial, now: float) -> None:
        self._dial += 1
        dial = self._dial
        self.metrics.dial_started(now)
        upstream = self._ctx.settings.upstream
        try:
            if not upstream.own_tokens:
                self.token = self._ctx.read_token()
        except ShimError as error:
            failure = DialFailure("token", detail=str(error))
            self.last_failure, self.last_detail = failure.reason, failure.detail
            log.error("token_unreadable", dedupe_key=self.name, link=self.name, error=failure.detail)
            self._ctx.timers.call_later(0, lambda: self._dial_failed(dial, failure))
            return
        serial = next(self._shared.serials)
        connection = UpstreamConnection(self._ctx, serial, self.name, self, now, used_to_ack=self.acks)
        spec = DialRequest(ws_url(upstream.url, upstream.path), self.token, effect.in_header, effect.in_query)
        self._ctx.upstream.dial(spec, connection, lambda outcome: self._dialled(dial, connection, outcome))

    def _dialled(self, dial: int, connection: UpstreamConnection, outcome: WebSocket | DialFailure) -> None:
        if isinstance(outcome, DialFailure):
            self._dial_failed(dial, outcome)
        elif dial != self._dial or self.machine.state is not LinkState.OPENING:
            outcome.close(1000)
        else:
            now = self._ctx.now
            self.metrics.handshake_succeeded(now)
            self.connection = connection
            connection.bind(outcome, now)
            self.apply(ev.Opened(), now)

    def _dial_failed(self, dial: int, failure: DialFailure) -> None:
        self.metrics.handshake_failed(failure)
        if dial != self._dial:
            return
        now = self._ctx.now
        self.last_failure = f"{failure.reason} {failure.status}" if failure.status else failure.reason
        self.last_detail = "" if failure.status else failure.detail
        why, key = self.last_failure, f"{self.name} {self.last_failure}"
        log.warning("dial_failed", dedupe_key=key, link=self.name, reason=why, detail=failure.detail)
        self.apply(ev.DialFailed(failure.status, failure.retry_after_s), now)
        # Still OPENING means that the other way to present the token is being tried: the attempt goes on.
        if self.machine.state is not LinkState.OPENING:
            self.metrics.dial_failed(failure, now)

    def _close_socket(self, code: int) -> None:
        if code:
            self.metrics.closed_by_shim()
        if self.connection is not None:
            self.connection.close(code)

    def _drop_connection(self) -> None:
        connection, self.connection = self.connection, None
        self._disarm("stable")
        if connection is not None:
            learnt = connection.acks_learnt
            if learnt is not None:
                self.acks = learnt
            self._ctx.events.put(LinkLost(self, connection))

    def _stable(self) -> None:
        if self.machine.connected:
            self.apply(ev.StableTimerFired(), self._ctx.now)

    def _arm(self, name: str, delay_s: float, callback: Callable[[], None]) -> None:
        self._disarm(name)
        if not self.stopped:
            self._timers[name] = self._ctx.timers.call_later(delay_s, callback)

    def _disarm(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    # --- upstream_connection.ConnectionOwner --------------------------------------------------------------------------

    def connection_message(self, connection: UpstreamConnection, message: Message, now: float) -> None:
        """Pass on a message, after recording that the token is accepted.

        `register_success` shows that, and so does the first `heartbeat_ack` or command. A command is stored with the
        session that it is for: after a crash, a poll would not find it without its session.
        """
        if connection is self.connection:
            if message.type == "register_success":
                self.apply(ev.Registered(), now)
            elif (self.machine.refused or self.machine.accepted_at is None) and (
                message.type == "heartbeat_ack" or message.type in self._ctx.settings.commands.types
            ):
                self.apply(ev.Acknowledged(), now)
        self._shared.receive(connection, message, self, now)

    def connection_broken(self, connection: UpstreamConnection, verdict: LivenessState, now: float) -> None:
        """Reconnect, because the liveness check found the connection dead."""
        if connection is self.connection:
            self.last_failure, self.last_detail = verdict.value, ""
            self.metrics.connection_lost(verdict.value, now)
            log.warning("link_broken", link=self.name, reason=verdict.value)
            self.apply(ev.WatchdogFailed(), now)

    def connection_closed(self, connection: UpstreamConnection, ending: ConnectionEnd, now: float) -> None:
        """Reconnect, because the peer or the network closed the connection."""
        if connection is not self.connection:
            return
        contended = self.machine.contended
        self.last_failure, self.last_detail = ending.text, ending.detail(self.token)
        self.metrics.connection_lost(ending.metric, now)
        detail = {"detail": self.last_detail} if self.last_detail else {}
        log.warning("link_lost", link=self.name, reason=self.last_failure, **detail)
        self.apply(ev.Lost(ending.by_close_frame, ending.code), now)
        if self.machine.contended and not contended:
            log.error(
                "link_contended",
                link=self.name,
                hint="stop the other process that registers with this identity: the controller closes our connections",
            )
