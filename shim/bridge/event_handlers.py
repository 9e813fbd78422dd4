"""Handlers of events: one function for each event of a link, a gateway or a registration (`bridge.events`).

Each function is the only place that lists what follows from its event, in the order in which it is done.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import msgspec

from shim.bridge.context import BridgeContext
from shim.bridge.gateway_redirect import (
    GatewayClosed,
    GatewayConnection,
    GatewayConnections,
    GatewayLost,
    GatewayOpened,
)
from shim.bridge.heartbeats import HeartbeatForwarder
from shim.bridge.link_pool import LinkPool, LinkRemoved
from shim.bridge.links import (
    LinkLost,
    LinkOnline,
    LinkOpened,
    RetryDue,
    TokenAccepted,
    TokenRefused,
    UpstreamLink,
)
from shim.bridge.outbox import Outbox
from shim.bridge.registration import Registrations, ReplayFinished, SessionAnnounced
from shim.bridge.session_registry import SessionRegistry
from shim.bridge.upstream_connection import ResultsConfirmed
from shim.bridge.upstream_messages import GatewayNamed, SessionUnknown
from shim.core import link_state
from shim.core.link_state import LinkState
from shim.core.sessions import Session
from shim.log import get

log = get(__name__)


class ResultsSent(NamedTuple):
    """The stored results of a link that came online are sent."""

    link: UpstreamLink


class EventHandlers(msgspec.Struct, frozen=True):
    """Handlers of all events. `install` makes them those of the bridge's queue."""

    ctx: BridgeContext
    links: LinkPool
    gateways: GatewayConnections
    registrations: Registrations
    session_registry: SessionRegistry
    outbox: Outbox
    heartbeats: HeartbeatForwarder

    def install(self) -> None:
        """Handle all events of the queue from now on."""
        self.ctx.events.handlers = {
            LinkOpened: self.link_opened,
            ReplayFinished: self.replay_finished,
            LinkOnline: self.link_online,
            ResultsSent: self.results_sent,
            ResultsConfirmed: self.results_confirmed,
            LinkLost: self.link_lost,
            RetryDue: self.retry_due,
            TokenRefused: self.token_refused,
            TokenAccepted: self.token_accepted,
            LinkRemoved: self.link_removed,
            SessionAnnounced: self.session_announced,
            SessionUnknown: self.session_unknown,
            GatewayNamed: self.gateway_named,
            GatewayOpened: self.gateway_opened,
            GatewayClosed: self.gateway_closed,
            GatewayLost: self.gateway_lost,
        }

    # --- links --------------------------------------------------------------------------------------------------------

    def link_opened(self, event: LinkOpened) -> None:
        """Replay the registrations of the fresh sessions, then `replay_finished` follows."""
        if event.link.connection is not None:
            self.registrations.replay(event.link, self._to_replay(event.link, event.now), event.now)

    def replay_finished(self, event: ReplayFinished) -> None:
        """Bring the link online, unless it was lost again."""
        if event.link.state is LinkState.REPLAYING:
            event.link.apply(link_state.Replayed(), event.now)

    def link_online(self, event: LinkOnline) -> None:
        """Send the stored results first, then `results_sent` follows.

        Agents' calls need nothing more: a held poll waits for commands, which the controller sends by itself.
        """
        self.outbox.start_sending(event.link.owner, partial(self.ctx.events.put, ResultsSent(event.link)))

    def results_sent(self, event: ResultsSent) -> None:
        """Send the newest heartbeat of each fresh session, and the status reports that were waiting for the link."""
        connection = event.link.up_connection
        if connection is not None:
            self.heartbeats.online(self.links.sessions_of(event.link), connection)

    def results_confirmed(self, event: ResultsConfirmed) -> None:
        """Close the results, so that they are not sent again on the next connection."""
        self.outbox.confirmed(event.seqs)

    def link_lost(self, event: LinkLost) -> None:
        """Keep the registrations and results that were waiting for a reply on the connection for the next one."""
        self.registrations.link_lost(event.link)
        self.outbox.connection_closed(event.connection)

    def retry_due(self, event: RetryDue) -> None:
        """Dial again, unless gateways carry all traffic: then the link stays idle until it is needed."""
        link, now = event.link, event.now
        if link.state is not LinkState.WAITING:
            return
        if self.links.replaced_by_gateways(link, now) and not self.registrations.waiting_for(link):
            link.close_unneeded(now)
        else:
            link.apply(link_state.RetryDue(), now)

    def token_refused(self, event: TokenRefused) -> None:
        """Log that the token is refused and answer the agents whose registrations wait."""
        whose = "the agent's own token" if self.ctx.settings.upstream.own_tokens else "upstream.token"
        name, hint = event.link.name, f"check {whose} and its permissions"
        log.error("token_refused", dedupe_key=name, link=name, hint=hint)
        self.registrations.link_refused(event.link)

    def token_accepted(self, event: TokenAccepted) -> None:
        """Store the sessions that were adopted before the token was accepted."""
        self.session_registry.on_token_accepted(event.link.owner)

    def link_removed(self, event: LinkRemoved) -> None:
        """Delete the unverified sessions of the owner, if this was its last link."""
        owner = event.link.owner
        if all(link.owner != owner for link in self.links):
            self.session_registry.on_owner_removed(owner)

    # --- sessions -----------------------------------------------------------------------------------------------------

    def session_announced(self, event: SessionAnnounced) -> None:
        """Send the newest heartbeat of a session that the controller knows now."""
        self.heartbeats.session_announced(event.session, event.connection)

    def session_unknown(self, event: SessionUnknown) -> None:
        """Register a session again with the controller, which may name another gateway."""
        if isinstance(event.source, GatewayConnection):
            self.gateways.return_to_controller(event.source)
        else:
            self.heartbeats.announce(event.session)

    def _to_replay(self, link: UpstreamLink, now: float) -> list[tuple[Session, dict[str, Any]]]:
        """Return the sessions to register after a connect, each with the payload of its `register`.

        A session whose gateway is open is left out: the controller behind the gateway knows it already.
        """
        identity = self.heartbeats.identity()
        found = []
        for session in self.links.sessions_of(link):
            by_gateway = session.gateway is not None and session.gateway.up_connection is not None
            known = session.registration or session.key.kind == "agent"
            if known and not by_gateway and session.fresh(now):
                payload = session.register_payload(identity)
                if payload is not None:
                    found.append((session, payload))
        return found

    # --- gateways -----------------------------------------------------------------------------------------------------

    def gateway_named(self, event: GatewayNamed) -> None:
        """Dial the gateway, if the token may be sent to its host."""
        self.gateways.redirect(event.session, event.link, event.url)

    def gateway_opened(self, event: GatewayOpened) -> None:
        """Send the results and then the newest heartbeat over the gateway."""
        session = event.gateway.session
        self.outbox.start_sending(session.key.owner, lambda: self.heartbeats.send_newest(session, self.ctx.now))

    def gateway_closed(self, event: GatewayClosed) -> None:
        """Keep the results that were waiting for confirmation on the connection for the next one."""
        self.outbox.connection_closed(event.connection)

    def gateway_lost(self, event: GatewayLost) -> None:
        """Send the unconfirmed results over the link and register the session with the controller again."""
        gateway, session = event.gateway, event.gateway.session
        self.outbox.start_sending(session.key.owner)
        if session.fresh(event.now):
            session.announced_on = 0
            gateway.link.ensure_connected(event.now)
            self.heartbeats.announce(session)
