"""Whose connection a message came in on (`inbound.Source`)."""

from __future__ import annotations

from collections.abc import Iterable

from shim.bridge.gateway import GatewayConnections, GatewayConnection
from shim.bridge.links import UpstreamLink
from shim.bridge.presence import HeartbeatForwarder
from shim.bridge.routes import LINK_KIND, LinkLookup
from shim.core.records import SessionKey
from shim.core.sessions import Session


class LinkMessageSource:
    """A link's own connection."""

    def __init__(self, runner: UpstreamLink, routes: LinkLookup, presence: HeartbeatForwarder) -> None:
        self.owner = runner.owner
        self._runner = runner
        self._routes = routes
        self._presence = presence

    @property
    def rejection_key(self) -> SessionKey:
        """See `inbound.Source`."""
        return SessionKey(self.owner, LINK_KIND, self._runner.name)

    def sessions(self) -> Iterable[Session]:
        """See `inbound.Source`."""
        return self._routes.sessions_of(self._runner)

    def gateway_offered(self, session: Session, url: str) -> None:
        """See `inbound.Source`."""
        self._routes.gateways.redirect(session, self._runner, url)

    def introduce(self, session: Session) -> None:
        """See `inbound.Source`."""
        self._presence.announce(session)


class GatewayMessageSource:
    """A gateway's connection, which carries one session and takes no registrations."""

    def __init__(self, leg: GatewayConnection, gateways: GatewayConnections) -> None:
        self.owner = leg.session.key.owner
        self._leg = leg
        self._gateways = gateways

    @property
    def rejection_key(self) -> SessionKey:
        """See `inbound.Source`."""
        return self._leg.session.key

    def sessions(self) -> Iterable[Session]:
        """See `inbound.Source`."""
        return (self._leg.session,)

    def gateway_offered(self, session: Session, url: str) -> None:
        """See `inbound.Source`; nothing registers here."""

    def introduce(self, session: Session) -> None:
        """See `inbound.Source`: the controller is told, and may name another gateway."""
        self._gateways.return_to_controller(self._leg)
