"""The gateway redirect: a session's traffic moves to the address in the reply to its registration.

See docs/reference/protocol.md#22-gateway-redirect.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from shim.bridge.context import BridgeContext
from shim.bridge.links import LinkContext, UpstreamLink
from shim.bridge.upstream_connection import ConnectionEnd, UpstreamConnection
from shim.core.backoff import Backoff, FailureKind
from shim.core.bounds import MAX_LOGGED_CHARS, MAX_URL_CHARS, cut
from shim.core.liveness import LivenessState
from shim.core.records import SessionKey
from shim.core.sessions import Session
from shim.errors import ShimError
from shim.hosts import is_loopback, plain_host
from shim.log import get
from shim.ports import DialFailure, DialRequest, WebSocket
from shim.protocol.http import host_of, ws_url
from shim.protocol.upstream_message import Message

if TYPE_CHECKING:
    from publicsuffixlist import PublicSuffixList

log = get(__name__)


class GatewayOpened(NamedTuple):
    """The handshake of a gateway succeeded: it carries the traffic of its session from now on."""

    gateway: GatewayConnection


class GatewayClosed(NamedTuple):
    """The connection of a gateway ended, closed by the shim, the peer or the network."""

    connection: UpstreamConnection


class GatewayLost(NamedTuple):
    """A gateway no longer serves its session."""

    gateway: GatewayConnection
    now: float


class GatewayConnection:
    """One session's gateway: its connection, open or being dialled, and the delays between dials.

    Messages on a replaced connection are ignored: its peer no longer serves the session.
    """

    def __init__(self, ctx: BridgeContext, pool: GatewayConnections, session: Session, link: UpstreamLink) -> None:
        self.session = session
        self.link = link
        self.url = ""
        self.connection: UpstreamConnection | None = None
        self.opened_at: float | None = None
        self._ctx = ctx
        self._pool = pool
        self._backoff = Backoff(ctx.backoff_policy, ctx.rng)
        self._token = ""
        self._waiting = False
        self._forgotten = False

    @property
    def owner(self) -> str:
        """The owner of the session."""
        return self.session.key.owner

    @property
    def rejection_key(self) -> SessionKey:
        """The session's key, under which rejections without a session are stored: they are sent to the same peer."""
        return self.session.key

    @property
    def routed(self) -> bool:
        """True while the session's traffic goes to the gateway: it is open or being dialled."""
        return self.connection is not None

    @property
    def up_connection(self) -> UpstreamConnection | None:
        """The connection for heartbeats and results, or None while it is being dialled."""
        return self.connection if self.opened_at is not None else None

    def redirect(self, link: UpstreamLink, url: str) -> None:
        """Dial the gateway at `url`, unless it is open, being dialled or waiting for its next dial."""
        if self.url == url and (self.connection is not None or self._waiting):
            return
        self.link, self.url = link, url
        self.close()
        if not self._waiting:
            self._dial()

    def close(self) -> None:
        """Close the connection, or give up its dial."""
        if self.connection is not None:
            self.connection.close(1000)
            self._drop_connection()

    def forget(self) -> None:
        """Close the connection and never dial again."""
        self._forgotten = True
        self.session.gateway = None
        self.close()

    def _drop_connection(self) -> None:
        connection, self.connection = self.connection, None
        self.opened_at = None
        if connection is not None:
            self._ctx.events.put(GatewayClosed(connection))

    # --- dialling -----------------------------------------------------------------------------------------------------

    def _dial(self) -> None:
        now = self._ctx.now
        try:
            self._token = self.link.token if self._ctx.settings.upstream.own_tokens else self._ctx.read_token()
        except ShimError as error:
            log.error("token_unreadable", dedupe_key="gateway", error=str(error))
            self._retry_later(now)
            return
        path = "" if urlsplit(self.url).path.strip("/") else "/ws"
        uuid = self.session.reply.get("cluster_uuid") or self.session.upstream_cluster_id
        label = f"gateway {self.session.key.ident}"
        serial = next(self._pool.shared.serials)
        connection = UpstreamConnection(self._ctx, serial, label, self, now, used_to_ack=self.link.acks)
        spec = DialRequest(ws_url(self.url, path), self._token, True, False, (("cluster_uuid", uuid),))
        self.connection = connection
        self._ctx.upstream.dial(spec, connection, partial(self._dialled, connection))

    def _dialled(self, connection: UpstreamConnection, outcome: WebSocket | DialFailure) -> None:
        if connection is not self.connection:
            if not isinstance(outcome, DialFailure):
                outcome.close(1000)
            return
        now = self._ctx.now
        if isinstance(outcome, DialFailure):
            self._ctx.metrics.gateway.labels("failed").inc()
            key = f"{host_of(self.url)} {outcome.reason}"
            log.warning("gateway_dial_failed", dedupe_key=key, reason=outcome.reason, status=outcome.status)
            self.connection = None
            self._retry_later(now)
            return
        self._ctx.metrics.gateway.labels("ok").inc()
        self.opened_at = now
        connection.bind(outcome, now)
        log.info("gateway_open", session=self.session.key.ident, host=host_of(self.url))
        self._ctx.events.put(GatewayOpened(self))

    def _retry_later(self, now: float) -> None:
        """Return the session to its link and dial the gateway again after a delay."""
        stable_s = self._ctx.settings.upstream.reconnect.stable_after_s
        if self.opened_at is not None and now - self.opened_at >= stable_s:
            self._backoff.reset()
        self._waiting = True
        if self.connection is not None:
            self._drop_connection()
            self._ctx.events.put(GatewayLost(self, now))
        self._ctx.timers.call_later(self._backoff.next_delay_s(FailureKind.REFUSED), self._retry)

    def _retry(self) -> None:
        self._waiting = False
        if not self._forgotten and self.session.fresh(self._ctx.now):
            self._dial()

    # --- upstream_connection.ConnectionOwner --------------------------------------------------------------------------

    def connection_message(self, connection: UpstreamConnection, message: Message, now: float) -> None:
        """Pass on a message."""
        if connection is self.connection:
            self._pool.receive(connection, message, self, now)

    def connection_broken(self, connection: UpstreamConnection, verdict: LivenessState, now: float) -> None:
        """Close a connection that the liveness check found dead, and dial again later."""
        self._ctx.metrics.disconnects.labels(verdict.value).inc()
        connection.close(0)
        self._lost(connection, verdict.value, "", now)

    def connection_closed(self, connection: UpstreamConnection, ending: ConnectionEnd, now: float) -> None:
        """Dial again later, because the peer or the network closed the connection."""
        self._ctx.metrics.disconnects.labels(ending.metric).inc()
        self._lost(connection, ending.text, ending.detail(self._token), now)

    def _lost(self, connection: UpstreamConnection, reason: str, text: str, now: float) -> None:
        if connection is self.connection:
            detail = {"detail": text} if text else {}
            log.warning("gateway_lost", session=self.session.key.ident, reason=reason, **detail)
            self._retry_later(now)


class GatewayConnections:
    """The gateways of all sessions.

    `receive` handles the messages of all gateways; the bridge sets it before the first dial.
    """

    receive: Callable[[UpstreamConnection, Message, GatewayConnection, float], None]

    def __init__(self, ctx: BridgeContext, shared: LinkContext) -> None:
        self.shared = shared
        self._ctx = ctx
        self._gateways: dict[SessionKey, GatewayConnection] = {}
        self._suffixes: PublicSuffixList | None = None

    def redirect(self, session: Session, link: UpstreamLink, url: str) -> None:
        """Dial the gateway that a `register_success` named, if the token may be sent to its host."""
        if len(url) > MAX_URL_CHARS or not self._allowed(url):
            self._ctx.metrics.gateway.labels("host_refused").inc()
            host = cut(host_of(url), MAX_LOGGED_CHARS)
            log.error("gateway_refused", dedupe_key=host, host=host, hint="add the host to upstream.gateway_hosts")
            return
        gateway = self._gateways.get(session.key)
        if gateway is None:
            gateway = self._gateways[session.key] = GatewayConnection(self._ctx, self, session, link)
            session.gateway = gateway
        gateway.redirect(link, url)

    def token_changed(self) -> None:
        """Register every routed session with the controller again, with the new configured token."""
        for gateway in list(self._gateways.values()):
            self.return_to_controller(gateway)

    def return_to_controller(self, gateway: GatewayConnection) -> None:
        """Close a session's gateway and register the session with the controller, which may name another gateway."""
        self.forget(gateway.session.key)
        self._ctx.events.put(GatewayLost(gateway, self._ctx.now))

    def forget(self, key: SessionKey) -> None:
        """Close the gateway of a session without registering the session again."""
        gateway = self._gateways.pop(key, None)
        if gateway is not None:
            gateway.forget()

    def sweep(self) -> None:
        """Close the gateways of sessions that are no longer fresh; their next call goes to the controller."""
        now = self._ctx.now
        for key, gateway in list(self._gateways.items()):
            if not gateway.session.fresh(now):
                gateway.session.announced_on = 0
                self.forget(key)

    def stop(self) -> None:
        """Close all gateways."""
        for key in list(self._gateways):
            self.forget(key)

    def _allowed(self, url: str) -> bool:
        upstream = self._ctx.settings.upstream
        try:
            parts, host = urlsplit(ws_url(url)), host_of(url)
        except ValueError:
            return False
        if parts.scheme == "ws" and not is_loopback(parts.hostname or "") and not upstream.allow_insecure:
            return False
        if upstream.gateway_hosts:
            allowed = map(plain_host, upstream.gateway_hosts)
            return any(host == each or (each.startswith("*.") and host.endswith(each[1:])) for each in allowed)
        return self._same_registrable_domain(host, host_of(upstream.url))

    def _same_registrable_domain(self, host: str, other: str) -> bool:
        """Return True if two hosts have the same registrable domain in the Public Suffix List.

        Addresses and names without a dot must be equal.
        """
        if host == other:
            return True
        if ":" in host or host.replace(".", "").isdigit():
            return False
        if self._suffixes is None:
            # Imported here because the list costs memory that most shims never need.
            from publicsuffixlist import PublicSuffixList

            self._suffixes = PublicSuffixList()
        domain = self._suffixes.privatesuffix(host)
        return domain is not None and domain == self._suffixes.privatesuffix(other)
