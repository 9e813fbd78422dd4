"""The gateway redirect: a cluster's traffic moves to the address its registration names (protocol.md §2.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from shim.bridge.connection import Connection
from shim.bridge.context import Context
from shim.bridge.links import LinkRunner
from shim.core.backoff import Backoff, FailureKind
from shim.core.liveness import Verdict
from shim.core.records import SessionKey
from shim.core.sessions import Session
from shim.core.urls import host_of, ws_url
from shim.errors import ShimError
from shim.logs import get
from shim.messages import Message
from shim.ports import DialFailure, DialSpec, Socket
from shim.settings import is_loopback

log = get(__name__)


class Leg:
    """One session's gateway connection, open or being dialled."""

    def __init__(self, session: Session, runner: LinkRunner, url: str, backoff: Backoff) -> None:
        self.session = session
        self.runner = runner
        self.url = url
        self.backoff = backoff
        self.connection: Connection | None = None
        self.dial = 0
        self.opened_at: float | None = None
        self.waiting = False


class Gateways:
    """All gateway legs. The listener's callbacks are those of a link."""

    def __init__(
        self,
        ctx: Context,
        serials: Iterator[int],
        up: Callable[[Leg], None],
        down: Callable[[Leg, Connection], None],
        message: Callable[[Connection, Message, Leg], None],
        fenced: Callable[[Connection, tuple[int, ...]], None],
    ) -> None:
        self._ctx = ctx
        self._serials = serials
        self._up = up
        self._down = down
        self._message = message
        self._fenced = fenced
        self._legs: dict[SessionKey, Leg] = {}

    def connection_of(self, key: SessionKey) -> Connection | None:
        """The open gateway connection of a session."""
        leg = self._legs.get(key)
        return leg.connection if leg is not None and leg.opened_at is not None else None

    def open_legs(self) -> int:
        """How many are open or being dialled (they count as links)."""
        return sum(1 for leg in self._legs.values() if not leg.waiting)

    def offered(self, session: Session, runner: LinkRunner, url: str) -> None:
        """A `register_success` named a gateway: go there, if the token may."""
        if not self._allowed(url):
            self._ctx.metrics.gateway.labels("host_refused").inc()
            log.error("gateway_refused", host=host_of(url), hint="add the host to upstream.gateway_hosts")
            return
        leg = self._legs.get(session.key)
        if leg is None:
            leg = self._legs[session.key] = Leg(session, runner, url, Backoff(self._ctx.backoff_policy, self._ctx.rng))
        elif leg.url == url and (leg.connection is not None or leg.waiting):
            return
        leg.url, leg.runner = url, runner
        self._drop(leg)
        if not leg.waiting:
            self._dial(leg)

    def forget(self, key: SessionKey) -> None:
        """The session is gone."""
        leg = self._legs.pop(key, None)
        if leg is not None:
            leg.dial = -1
            self._drop(leg)

    def sweep(self, now: float) -> None:
        """A gateway of a session that is not fresh any more is closed; its next call leads through the controller."""
        for key, leg in list(self._legs.items()):
            if not leg.session.fresh(now):
                self.forget(key)

    def stop(self) -> None:
        """Close all."""
        for key in list(self._legs):
            self.forget(key)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _allowed(self, url: str) -> bool:
        upstream = self._ctx.settings.upstream
        host, scheme = host_of(url), urlsplit(url).scheme
        if scheme not in ("ws", "wss", "http", "https") or not host:
            return False
        if scheme in ("ws", "http") and not is_loopback(host) and not upstream.allow_insecure:
            return False
        if upstream.gateway_hosts:
            return any(host == h or (h.startswith("*.") and host.endswith(h[1:])) for h in upstream.gateway_hosts)
        return same_registrable_domain(host, host_of(upstream.url))

    def _dial(self, leg: Leg) -> None:
        leg.dial += 1
        dial = leg.dial
        try:
            token = leg.runner.token if self._ctx.settings.upstream.own_tokens else self._ctx.read_token()
        except ShimError as error:
            log.error("token_unreadable", error=str(error))
            self._back(leg)
            return
        path = "" if urlsplit(leg.url).path.strip("/") else "/ws"
        uuid = leg.session.reply.get("cluster_uuid") or leg.session.upstream_cluster_id
        connection = Connection(self._ctx, next(self._serials), f"gateway {leg.session.key.ident}", self)
        spec = DialSpec(ws_url(leg.url, path), token, True, False, (("cluster_uuid", uuid),))
        leg.connection = connection
        self._ctx.upstream.dial(spec, connection, lambda outcome: self._dialled(leg, dial, connection, outcome))

    def _dialled(self, leg: Leg, dial: int, connection: Connection, outcome: Socket | DialFailure) -> None:
        if leg.dial != dial:
            if not isinstance(outcome, DialFailure):
                outcome.close(1000)
            return
        if isinstance(outcome, DialFailure):
            self._ctx.metrics.gateway.labels("failed").inc()
            log.warning("gateway_dial_failed", reason=outcome.reason, status=outcome.status)
            leg.connection = None
            self._back(leg)
            return
        self._ctx.metrics.gateway.labels("ok").inc()
        leg.opened_at = self._ctx.now
        connection.bind(outcome)
        log.info("gateway_open", session=leg.session.key.ident, host=host_of(leg.url))
        self._up(leg)

    def _drop(self, leg: Leg) -> None:
        connection, leg.connection = leg.connection, None
        leg.opened_at = None
        if connection is not None:
            connection.close(1000)
            self._down(leg, connection)

    def _back(self, leg: Leg) -> None:
        """The gateway does not serve: back to the controller with a full registration; try again later."""
        stable_s = self._ctx.settings.upstream.reconnect.stable_after_s
        if leg.opened_at is not None and self._ctx.now - leg.opened_at >= stable_s:
            leg.backoff.reset()
        connection, leg.connection = leg.connection, None
        leg.opened_at = None
        leg.waiting = True
        if connection is not None:
            self._down(leg, connection)
        dial = leg.dial

        def again() -> None:
            leg.waiting = False
            if leg.dial == dial and self._legs.get(leg.session.key) is leg and leg.session.fresh(self._ctx.now):
                self._dial(leg)

        self._ctx.timers.call_later(leg.backoff.next_delay_s(FailureKind.REFUSED), again)

    # --- connection.ConnectionOwner -----------------------------------------------------------------------------------

    def _leg_of(self, connection: Connection) -> Leg | None:
        return next((leg for leg in self._legs.values() if leg.connection is connection), None)

    def connection_message(self, connection: Connection, message: Message) -> None:
        """Hand on."""
        leg = self._leg_of(connection)
        if leg is not None:
            self._message(connection, message, leg)

    def connection_fenced(self, connection: Connection, seqs: tuple[int, ...]) -> None:
        """Hand on."""
        self._fenced(connection, seqs)

    def connection_broken(self, connection: Connection, verdict: Verdict) -> None:
        """The watchdog condemned it."""
        self._ctx.metrics.disconnects.labels(verdict.value).inc()
        connection.close(0)
        self._lost(connection, verdict.value)

    def connection_closed(self, connection: Connection, by_close_frame: bool, code: int) -> None:
        """It is gone."""
        self._ctx.metrics.disconnects.labels("closed" if by_close_frame else "lost").inc()
        self._lost(connection, f"closed {code}" if by_close_frame else "connection lost")

    def _lost(self, connection: Connection, reason: str) -> None:
        leg = self._leg_of(connection)
        if leg is not None:
            log.warning("gateway_lost", session=leg.session.key.ident, reason=reason)
            self._back(leg)


def same_registrable_domain(host: str, other: str) -> bool:
    """Whether two hosts belong to one registrant by the Public Suffix List; addresses and bare names must be equal."""
    if host == other:
        return True
    # Imported here because the list costs memory that most shims never need.
    from publicsuffixlist import PublicSuffixList

    suffixes = PublicSuffixList()
    domain = suffixes.privatesuffix(host)
    return domain is not None and domain == suffixes.privatesuffix(other) and not host.replace(".", "").isdigit()
