"""Upstream links at run time: one per token, or one per session with `upstream.share_link: false`.

A link performs what `shim.core.link_state` decides, and reports to the rest of the bridge by events, which
`bridge.event_handlers` handles. See docs/reference/protocol.md#2-upstream-side-the-websocket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from hashlib import sha256
from itertools import count

from shim.bridge.context import DEFAULT_OWNER, BridgeContext
from shim.bridge.events import (
    LinkLost,
    LinkOnline,
    LinkOpened,
    LinkRemoved,
    RetryDue,
    TokenAccepted,
    TokenRefused,
)
from shim.bridge.link_metrics import LinkMetrics
from shim.bridge.upstream_connection import ConnectionEnd, UpstreamConnection
from shim.core import link_state as ev
from shim.core.backoff import Backoff
from shim.core.link_history import LinkHistory, phase_of
from shim.core.link_state import LinkPolicy, LinkState, LinkStateMachine
from shim.core.liveness import LivenessState
from shim.core.records import SessionKey
from shim.core.sessions import Session
from shim.core.shard_assignment import owner_id
from shim.errors import AgentError, IllegalTransition, ShimError
from shim.log import get
from shim.ports import Caller, DialFailure, DialRequest, Timer, WebSocket
from shim.protocol.http import ws_url
from shim.protocol.upstream_message import Message

log = get(__name__)

IDLE_CHECK_S = 5.0
_CONNECTED = frozenset({LinkState.ONLINE, LinkState.REPLAYING})


class UpstreamLink:
    """One link: its state machine, connection and timers. `token` is held in memory only.

    `acks` is True if the controller acknowledges heartbeats, as far as earlier connections have shown, or None.
    """

    def __init__(self, ctx: BridgeContext, owner: str, name: str, token: str, pool: LinkPool) -> None:
        self.owner = owner
        self.name = name
        self.token = token
        self.connection: UpstreamConnection | None = None
        self.acks: bool | None = None
        self._ctx = ctx
        self._pool = pool
        upstream, now = ctx.settings.upstream, ctx.now
        self.machine = LinkStateMachine(
            LinkPolicy(upstream.auth, upstream.own_tokens), Backoff(ctx.backoff_policy, ctx.rng)
        )
        self.needed_at = now
        self.history = LinkHistory(now)
        self.metrics = LinkMetrics(ctx, pool.received_since)
        self.last_failure = ""
        self.last_detail = ""
        self.stopped = False
        self._dial = 0
        self._timers: dict[str, Timer] = {}
        self._arm("idle", IDLE_CHECK_S, self._check_idle)

    @property
    def state(self) -> LinkState:
        """The state of the link's state machine."""
        return self.machine.state

    @property
    def online(self) -> bool:
        """True if heartbeats and results may be sent."""
        return self.machine.state is LinkState.ONLINE

    @property
    def up_connection(self) -> UpstreamConnection | None:
        """The connection for heartbeats and results, or None while registrations are still being replayed."""
        return self.connection if self.machine.state is LinkState.ONLINE else None

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
        if state is not before:
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
                put(LinkOnline(self, now))
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
            self.last_failure, self.last_detail = "token", ""
            log.error("token_unreadable", dedupe_key=self.name, link=self.name, error=str(error))
            self._ctx.timers.call_later(0, lambda: self._dial_failed(dial, DialFailure("token")))
            return
        serial = next(self._pool.serials)
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
            if connection.acks_learnt is not None:
                self.acks = connection.acks_learnt
            self._ctx.events.put(LinkLost(self, connection))

    def _stable(self) -> None:
        if self.machine.connected:
            self.apply(ev.StableTimerFired(), self._ctx.now)

    def _check_idle(self) -> None:
        self._arm("idle", IDLE_CHECK_S, self._check_idle)
        now, idle_close_s = self._ctx.now, self._ctx.settings.upstream.idle_close_s
        if self._pool.in_use(self, now):
            self.needed_at = now
            if self.machine.state is LinkState.IDLE and self.machine.accepted_at is not None:
                # A command ended while the link was idle and no agent called: connect in order to report that.
                self.apply(ev.AgentCalled(), now)
        elif idle_close_s and now - self.needed_at >= idle_close_s:
            self.close_unneeded(now)

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

        `register_success` shows that, and so does the first `heartbeat_ack`.
        """
        if self.machine.connected:
            if message.type == "register_success":
                self.apply(ev.Registered(), now)
            elif message.type == "heartbeat_ack" and (self.machine.refused or self.machine.accepted_at is None):
                self.apply(ev.Acknowledged(), now)
        self._pool.receive(connection, message, self, now)

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


BUSY_RETRY_AFTER_S = 30
UNVERIFIED_KEPT_S = 30.0
MAX_TURNED_AWAY = 4096
LINK_KIND = "link"
"""Kind of a `SessionKey` that names a link: rejections of commands without a session are stored under it."""


MessageReceiver = Callable[[UpstreamConnection, Message, UpstreamLink, float], None]


class LinkPool:
    """All links, by name.

    `receive` handles the messages of all links. `has_unsent_results(owner)` returns True if a result of this owner was
    never sent. The bridge sets both before the first dial.
    """

    receive: MessageReceiver
    has_unsent_results: Callable[[str], bool]

    def __init__(self, ctx: BridgeContext) -> None:
        self.serials = count(1)
        self._ctx = ctx
        self._links: dict[str, UpstreamLink] = {}
        self._turned_away: dict[str, float] = {}  # until when a token is not dialled again
        self._hashed_owner = lru_cache(maxsize=4096)(lambda token: owner_id(ctx.owner_key, token))

    def __iter__(self) -> Iterator[UpstreamLink]:
        return iter(list(self._links.values()))

    def __len__(self) -> int:
        return len(self._links)

    def name_for(self, owner: str, identity: str) -> str:
        """Return the name of a link: its owner, or a hash of the session's identity if links are not shared."""
        if self._ctx.settings.upstream.share_link:
            return owner
        return f"{owner}:{sha256(identity.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"

    def owner_of(self, token: str) -> str | None:
        """Return the owner of the sessions that a caller may use, or None if a required token is missing."""
        if not self._ctx.settings.upstream.own_tokens:
            return DEFAULT_OWNER
        return self._hashed_owner(token) if token else None

    # --- sessions and their links -------------------------------------------------------------------------------------

    def link_name(self, session: Session) -> str:
        """Return the name of the session's link: that of the link it has, else the name that its key gives."""
        return session.link.name if session.link is not None else self.name_for(session.key.owner, str(session.key))

    def link_of(self, session: Session) -> UpstreamLink | None:
        """Return the link of a session, or None if it does not exist."""
        link: UpstreamLink | None = session.link
        if link is None or link.stopped:
            link = self._links.get(self.link_name(session))
            session.link = link or session.link
        return link

    def link_for(self, session: Session, client: Caller, now: float) -> UpstreamLink:
        """Return the link of a session whose agent has just called, and connect the link if necessary.

        Raises `AgentError`: 503 if there are too many links, 401 for a token that was refused recently.
        """
        link: UpstreamLink | None = session.link
        if link is None or link.stopped:
            link = session.link = self.get(session.key.owner, self.link_name(session), client.token)
        if session.gateway is None or not session.gateway.routed:
            link.ensure_connected(now)
        return link

    def sessions_of(self, link: UpstreamLink) -> list[Session]:
        """Return the sessions that belong to this link."""
        owned = self._ctx.sessions.of_owner(link.owner)
        if link.name == link.owner:
            return list(owned)
        return [session for session in owned if self.link_name(session) == link.name]

    def connection_of(self, session: Session) -> UpstreamConnection | None:
        """Return the connection for a session's heartbeats and results: its gateway's, else its link's.

        None means that neither is open.
        """
        if session.gateway is not None and session.gateway.up_connection is not None:
            connection: UpstreamConnection = session.gateway.up_connection
            return connection
        link = self.link_of(session)
        return link.up_connection if link is not None else None

    def connection_for_key(self, key: SessionKey) -> UpstreamConnection | None:
        """Return the connection for an outbox entry, whose session may have been removed.

        A key of kind `link` names the link itself. For a removed session any open link of its owner is used.
        """
        if key.kind == LINK_KIND:
            link = self._links.get(key.ident)
            return link.up_connection if link is not None else None
        session = self._ctx.sessions.get(key)
        if session is not None:
            return self.connection_of(session)
        return next((link.up_connection for link in self if link.owner == key.owner and link.up_connection), None)

    # --- the use of a link --------------------------------------------------------------------------------------------

    def in_use(self, link: UpstreamLink, now: float) -> bool:
        """Return True if a fresh session uses the link or a stored result was never sent.

        A session that is routed to a gateway does not use its link.
        """
        if any(session.fresh(now) and not _is_routed(session) for session in self.sessions_of(link)):
            return True
        return self.has_unsent_results(link.owner)

    def replaced_by_gateways(self, link: UpstreamLink, now: float) -> bool:
        """Return True if every fresh session of a link is routed to a gateway and no stored result is unsent."""
        fresh = [session for session in self.sessions_of(link) if session.fresh(now)]
        return bool(fresh) and all(map(_is_routed, fresh)) and not self.has_unsent_results(link.owner)

    def received_since(self, at_s: float) -> bool:
        """Return True if a frame arrived on any link after the monotonic time `at_s`."""
        return any(link.connection is not None and link.connection.heard_at > at_s for link in self)

    # --- creation and removal -----------------------------------------------------------------------------------------

    def find(self, name: str) -> UpstreamLink | None:
        """Return the link of this name, or None."""
        return self._links.get(name)

    def get(self, owner: str, name: str, token: str) -> UpstreamLink:
        """Return the link of this name; create it if necessary.

        Raises `AgentError`: 503 if there are `upstream.max_links` links in use, 401 for a token that was refused
        recently.
        """
        link = self._links.get(name)
        if link is None:
            if self._ctx.now < self._turned_away.get(name, 0.0):
                raise AgentError(401, "the controller refuses the token")
            if len(self._links) >= self._ctx.settings.upstream.max_links and not self._drop_one():
                raise AgentError(503, "too many upstream links", retry_after_s=BUSY_RETRY_AFTER_S)
            link = self._links[name] = UpstreamLink(self._ctx, owner, name, token, self)
            if self._ctx.settings.upstream.own_tokens:
                self._ctx.redaction.add(token)  # masked in logs and replies until the link is removed
        return link

    def _drop_one(self) -> bool:
        """Remove a dispensable link to make room for another; return False if all are in use.

        The link of a token that was refused and never accepted is removed even while its agent calls: anybody can
        invent such a token. The token is not dialled again for a while, so that the controller sees no more dials than
        with unlimited links.
        """
        for dispensable in (self._is_idle, self._is_made_up, self._is_useless):
            found = min(filter(dispensable, self), key=lambda link: link.needed_at, default=None)
            if found is not None:
                if self._is_made_up(found):
                    self._turned_away[found.name] = self._ctx.now + self._ctx.backoff_policy.contended_s
                    while len(self._turned_away) > MAX_TURNED_AWAY:
                        del self._turned_away[next(iter(self._turned_away))]
                self._drop(found)
                return True
        return False

    def _is_idle(self, link: UpstreamLink) -> bool:
        return link.state is LinkState.IDLE

    def _is_made_up(self, link: UpstreamLink) -> bool:
        machine = link.machine
        return self._ctx.settings.upstream.own_tokens and machine.refused and machine.accepted_at is None

    def _is_useless(self, link: UpstreamLink) -> bool:
        return link.machine.refused and not self.in_use(link, self._ctx.now)

    def _drop(self, link: UpstreamLink) -> None:
        link.stop(self._ctx.now)
        del self._links[link.name]
        if self._ctx.settings.upstream.own_tokens and all(other.token != link.token for other in self):
            self._ctx.redaction.discard(link.token)
        self._ctx.events.put(LinkRemoved(link))

    def token_accepted(self, owner: str) -> bool:
        """Return True if the controller has accepted the owner's token since start-up.

        A configured token counts as accepted.
        """
        if not self._ctx.settings.upstream.own_tokens:
            return True
        return any(link.owner == owner and link.machine.accepted_at is not None for link in self._links.values())

    def sweep(self) -> None:
        """Remove links and tokens that were never accepted and whose agents have stopped calling."""
        if not self._ctx.settings.upstream.own_tokens:
            return
        now = self._ctx.now
        for link in self:
            unneeded = link.machine.accepted_at is None and not self.in_use(link, now)
            if unneeded and now - link.needed_at >= UNVERIFIED_KEPT_S:
                self._drop(link)

    def token_changed(self) -> None:
        """Dial every link again with the new configured token."""
        for link in self:
            link.apply(ev.TokenChanged(), self._ctx.now)

    def stop(self) -> None:
        """Close all links."""
        for link in self:
            link.stop(self._ctx.now)


def _is_routed(session: Session) -> bool:
    return session.gateway is not None and session.gateway.routed
