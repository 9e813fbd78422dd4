"""The gateway redirect: a session's traffic moves to the address in the reply to its registration.

See docs/reference/protocol.md#22-gateway-redirect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from shim.bridge.context import BridgeContext
from shim.bridge.links import LinkContext, UpstreamLink
from shim.bridge.upstream_connection import ConnectionEnd, UpstreamConnection
from shim.config.settings import is_loopback
from shim.core.backoff import Backoff, FailureKind
from shim.core.bounds import MAX_LOGGED_CHARS, MAX_URL_CHARS, cut
from shim.core.liveness import LivenessState
from shim.core.records import SessionKey
from shim.core.sessions import Session
from shim.errors import ShimError
from shim.hosts import plain_host
from shim.log import get
from shim.ports import DialFailure, DialRequest, WebSocket
from shim.protocol.http import host_of, ws_url
from shim.protocol.upstream_message import Message

if TYPE_CHECKING:
    from publicsuffixlist import PublicSuffixList

log = get(__name__)


class GatewayConnection:
    """One session's gateway connection, open or being dialled."""

    def __init__(self, session: Session, link: UpstreamLink, url: str, backoff: Backoff) -> None:
        self.session = session
        self.link = link
        self.url = url
        self.backoff = backoff
        self.connection: UpstreamConnection | None = None
        self.dial = 0
        self.opened_at: float | None = None
        self.waiting = False
        self.token = ""

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


class GatewayConnections:
    """The gateway connections of all sessions.

    `receive` handles the messages of all gateways; the bridge sets it before the first dial.
    """

    receive: Callable[[UpstreamConnection, Message, GatewayConnection, float], None]

    def __init__(self, ctx: BridgeContext, shared: LinkContext) -> None:
        self._ctx = ctx
        self._shared = shared
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
            gateway = self._gateways[session.key] = session.gateway = GatewayConnection(
                session, link, url, Backoff(self._ctx.backoff_policy, self._ctx.rng)
            )
        elif gateway.url == url and (gateway.connection is not None or gateway.waiting):
            return
        gateway.url, gateway.link = url, link
        self._close(gateway)
        if not gateway.waiting:
            self._dial(gateway)

    def token_changed(self) -> None:
        """Register every routed session with the controller again, with the new configured token."""
        for gateway in list(self._gateways.values()):
            self.return_to_controller(gateway)

    def return_to_controller(self, gateway: GatewayConnection) -> None:
        """Close a session's gateway and register the session with the controller, which may name another gateway."""
        self.forget(gateway.session.key)
        self._ctx.events.put(GatewayLost(gateway, self._ctx.now))

    def forget(self, key: SessionKey) -> None:
        """Close the gateway of a session, without a report."""
        gateway = self._gateways.pop(key, None)
        if gateway is not None:
            gateway.session.gateway = None
            gateway.dial = -1
            self._close(gateway)

    def sweep(self) -> None:
        """Close the gateways of sessions that are no longer fresh; their next call goes to the controller."""
        for key, gateway in list(self._gateways.items()):
            if not gateway.session.fresh(self._ctx.now):
                gateway.session.announced_on = 0
                self.forget(key)

    def stop(self) -> None:
        """Close all gateways."""
        for key in list(self._gateways):
            self.forget(key)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _allowed(self, url: str) -> bool:
        upstream = self._ctx.settings.upstream
        try:
            scheme, host = urlsplit(ws_url(url)).scheme, host_of(url)
        except ValueError:
            return False
        if scheme == "ws" and not is_loopback(host) and not upstream.allow_insecure:
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

    def _dial(self, gateway: GatewayConnection) -> None:
        gateway.dial += 1
        dial = gateway.dial
        try:
            token = gateway.link.token if self._ctx.settings.upstream.own_tokens else self._ctx.read_token()
        except ShimError as error:
            log.error("token_unreadable", dedupe_key="gateway", error=str(error))
            self._retry_later(gateway)
            return
        gateway.token = token
        path = "" if urlsplit(gateway.url).path.strip("/") else "/ws"
        uuid = gateway.session.reply.get("cluster_uuid") or gateway.session.upstream_cluster_id
        label = f"gateway {gateway.session.key.ident}"
        serial, acks = next(self._shared.serials), gateway.link.acks
        connection = UpstreamConnection(self._ctx, serial, label, self, self._ctx.now, used_to_ack=acks)
        spec = DialRequest(ws_url(gateway.url, path), token, True, False, (("cluster_uuid", uuid),))
        gateway.connection = connection
        self._ctx.upstream.dial(spec, connection, lambda outcome: self._dialled(gateway, dial, connection, outcome))

    def _dialled(
        self, gateway: GatewayConnection, dial: int, connection: UpstreamConnection, outcome: WebSocket | DialFailure
    ) -> None:
        if gateway.dial != dial:
            if not isinstance(outcome, DialFailure):
                outcome.close(1000)
            return
        if isinstance(outcome, DialFailure):
            self._ctx.metrics.gateway.labels("failed").inc()
            about = f"{host_of(gateway.url)} {outcome.reason}"
            log.warning("gateway_dial_failed", dedupe_key=about, reason=outcome.reason, status=outcome.status)
            gateway.connection = None
            self._retry_later(gateway)
            return
        self._ctx.metrics.gateway.labels("ok").inc()
        now = gateway.opened_at = self._ctx.now
        connection.bind(outcome, now)
        log.info("gateway_open", session=gateway.session.key.ident, host=host_of(gateway.url))
        self._ctx.events.put(GatewayOpened(gateway))

    def _close(self, gateway: GatewayConnection) -> None:
        connection, gateway.connection = gateway.connection, None
        gateway.opened_at = None
        if connection is not None:
            connection.close(1000)
            self._ctx.events.put(GatewayClosed(connection))

    def _retry_later(self, gateway: GatewayConnection) -> None:
        """Return the session to its link and dial the gateway again after a delay."""
        stable_s = self._ctx.settings.upstream.reconnect.stable_after_s
        if gateway.opened_at is not None and self._ctx.now - gateway.opened_at >= stable_s:
            gateway.backoff.reset()
        connection, gateway.connection = gateway.connection, None
        gateway.opened_at = None
        gateway.waiting = True
        if connection is not None:
            self._ctx.events.put(GatewayClosed(connection))
            self._ctx.events.put(GatewayLost(gateway, self._ctx.now))
        dial = gateway.dial

        def again() -> None:
            gateway.waiting = False
            if (
                gateway.dial == dial
                and self._gateways.get(gateway.session.key) is gateway
                and gateway.session.fresh(self._ctx.now)
            ):
                self._dial(gateway)

        self._ctx.timers.call_later(gateway.backoff.next_delay_s(FailureKind.REFUSED), again)

    # --- connection.ConnectionOwner -----------------------------------------------------------------------------------

    def _gateway_of(self, connection: UpstreamConnection) -> GatewayConnection | None:
        return next((gateway for gateway in self._gateways.values() if gateway.connection is connection), None)

    def connection_message(self, connection: UpstreamConnection, message: Message, now: float) -> None:
        """Handle a message from a gateway; one on a replaced connection is dropped."""
        gateway = self._gateway_of(connection)
        if gateway is not None:
            self.receive(connection, message, gateway, now)

    def connection_broken(self, connection: UpstreamConnection, verdict: LivenessState, now: float) -> None:
        """Close a connection that the liveness check found dead, and dial again later."""
        self._ctx.metrics.disconnects.labels(verdict.value).inc()
        connection.close(0)
        self._lost(connection, verdict.value)

    def connection_closed(self, connection: UpstreamConnection, ending: ConnectionEnd, now: float) -> None:
        """Dial again later, because the peer or the network closed the connection."""
        self._ctx.metrics.disconnects.labels(ending.metric).inc()
        self._lost(connection, ending.text, ending)

    def _lost(self, connection: UpstreamConnection, reason: str, ending: ConnectionEnd | None = None) -> None:
        gateway = self._gateway_of(connection)
        if gateway is not None:
            detail = {"detail": ending.detail(gateway.token)} if ending is not None and ending.reason else {}
            log.warning("gateway_lost", session=gateway.session.key.ident, reason=reason, **detail)
            self._retry_later(gateway)
