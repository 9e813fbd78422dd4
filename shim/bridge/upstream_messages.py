"""Handle messages from the controller, one method per type. Unknown or malformed messages are counted and dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from shim.bridge.command_queues import CommandIntake
from shim.bridge.context import BridgeContext
from shim.bridge.gateway_redirect import GatewayConnection, GatewayConnections
from shim.bridge.heartbeats import HeartbeatForwarder
from shim.bridge.links import LINK_KIND, LinkPool, UpstreamLink
from shim.bridge.long_polls import PollHolds
from shim.bridge.registration import PendingRegistration, Registrations
from shim.bridge.rejections import Refusal, Rejections
from shim.bridge.session_registry import SessionRegistry
from shim.bridge.upstream_connection import UpstreamConnection
from shim.core.bounds import MAX_REQUEST_ID_CHARS, MAX_SHOWN_CHARS, cut
from shim.core.records import SessionKey
from shim.core.session_standing import TroubleKind
from shim.core.sessions import Session
from shim.log import get
from shim.protocol.command_message import MalformedCommand, parse_command
from shim.protocol.controller_replies import LEFTOVER_TYPES, REFUSED_TYPES, error_text, forgotten, refuse, tunnel_state
from shim.protocol.malformed_frames import OUT_OF_RANGE
from shim.protocol.rfc3339 import rfc3339
from shim.protocol.upstream_message import Message


class LinkMessageSource:
    """The source of messages from a link's own connection."""

    def __init__(
        self, link: UpstreamLink, links: LinkPool, gateways: GatewayConnections, presence: HeartbeatForwarder
    ) -> None:
        self.owner = link.owner
        self._link = link
        self._links = links
        self._gateways = gateways
        self._presence = presence

    @property
    def rejection_key(self) -> SessionKey:
        """The link itself; see `MessageSource.rejection_key`."""
        return SessionKey(self.owner, LINK_KIND, self._link.name)

    def sessions(self) -> Iterable[Session]:
        """Return the sessions that use the link."""
        return self._links.sessions_of(self._link)

    def gateway_offered(self, session: Session, url: str) -> None:
        """Route the session to the gateway."""
        self._gateways.redirect(session, self._link, url)

    def introduce(self, session: Session) -> None:
        """Register the session again."""
        self._presence.announce(session)


class GatewayMessageSource:
    """The source of messages from a gateway's connection, which carries one session and no registrations."""

    def __init__(self, gateway: GatewayConnection, gateways: GatewayConnections) -> None:
        self.owner = gateway.session.key.owner
        self._leg = gateway
        self._gateways = gateways

    @property
    def rejection_key(self) -> SessionKey:
        """The gateway's session; see `MessageSource.rejection_key`."""
        return self._leg.session.key

    def sessions(self) -> Iterable[Session]:
        """Return the gateway's only session."""
        return (self._leg.session,)

    def gateway_offered(self, session: Session, url: str) -> None:
        """Do nothing: no registration is sent over a gateway."""

    def introduce(self, session: Session) -> None:
        """Register the session with the controller, which may name another gateway."""
        self._gateways.return_to_controller(self._leg)


log = get(__name__)

MAX_UNKNOWN_TYPES = 64


class MessageSource(Protocol):
    """The connection that a message arrived on."""

    @property
    def owner(self) -> str:
        """The owner of the connection's sessions."""

    @property
    def rejection_key(self) -> SessionKey:
        """The key under which rejections without a session are stored, so that they are sent to the same peer."""

    def sessions(self) -> Iterable[Session]:
        """Return the sessions whose traffic the connection carries."""

    def gateway_offered(self, session: Session, url: str) -> None:
        """Handle that the reply to a registration named a gateway."""

    def introduce(self, session: Session) -> None:
        """Register a session with the controller again."""


class UpstreamMessageHandler:
    """Handler of the controller's messages. No method waits: slow work is passed to other parts."""

    def __init__(
        self,
        ctx: BridgeContext,
        registrations: Registrations,
        session_registry: SessionRegistry,
        intake: CommandIntake,
        refusals: Rejections,
        holding: PollHolds,
    ) -> None:
        self._ctx = ctx
        self._registrations = registrations
        self._session_registry = session_registry
        self._intake = intake
        self._refusals = refusals
        self._holding = holding
        self._unknown: set[str] = set()
        self._handlers: dict[str, Callable[[UpstreamConnection, Message, MessageSource], None]] = {
            "register_success": self._register_success,
            "register_in_progress": self._register_in_progress,
            "heartbeat_ack": self._nothing,
            "pong": self._nothing,
            "ping": self._ping,
            "error": self._error,
            "tunnel_status": self._tunnel_status,
        }

    def handle(self, connection: UpstreamConnection, message: Message, source: MessageSource) -> None:
        """Handle one message.

        A message that cannot be used is counted and dropped. Only a command is answered in that case: the controller
        waits for its result.
        """
        if message.fault and message.fault != OUT_OF_RANGE and message.type not in self._ctx.settings.commands.types:
            connection.on_bad_frame("not_json")
            return
        handler = self._handlers.get(message.type)
        if handler is not None:
            handler(connection, message, source)
        elif message.type in self._ctx.settings.commands.types:
            self._command(connection, message, source)
        elif message.type in REFUSED_TYPES:
            self._refuse(connection, message)
        elif message.type in LEFTOVER_TYPES:
            self._ctx.metrics.leftovers.inc()
        else:
            self._unknown_type(message)

    # --- by type ------------------------------------------------------------------------------------------------------

    def _nothing(self, connection: UpstreamConnection, message: Message, source: MessageSource) -> None:
        """Ignore the message. Its arrival has already reset the liveness timer."""

    def _register_in_progress(self, connection: UpstreamConnection, message: Message, source: MessageSource) -> None:
        self._registrations.in_progress(message)

    def _register_success(self, connection: UpstreamConnection, message: Message, source: MessageSource) -> None:
        job: PendingRegistration | None = self._registrations.succeeded(connection, message)
        url = message.payload.get("gateway_ws_url")
        if job is not None and job.session is not None and isinstance(url, str) and url:
            source.gateway_offered(job.session, url)

    def _ping(self, connection: UpstreamConnection, message: Message, source: MessageSource) -> None:
        request_id = message.request_id[:MAX_REQUEST_ID_CHARS]
        connection.send("pong", {"timestamp": rfc3339(self._ctx.clock.wall_s())}, request_id)

    def _error(self, connection: UpstreamConnection, message: Message, source: MessageSource) -> None:
        if self._registrations.refused(connection, message):
            return
        self._ctx.metrics.upstream_errors.inc()
        about = connection.heartbeat_failed(message.request_id)
        text = error_text(message.payload, self._ctx.masked)
        if forgotten(message.payload):
            for session in source.sessions():
                if (about is None or session.key == about) and session.fresh(self._ctx.now):
                    if about is None:
                        session.coverage.refused()
                    session.standing.fail(TroubleKind.UNKNOWN, text, self._ctx.now)
                    source.introduce(session)
            return
        refused = self._ctx.sessions.get(about) if about is not None else None
        if refused is not None:
            refused.standing.fail(TroubleKind.HEARTBEATS_REFUSED, text, self._ctx.now)
        log.warning("upstream_error", dedupe_key=text, error=text)

    def _tunnel_status(self, connection: UpstreamConnection, message: Message, source: MessageSource) -> None:
        session = self._target(source, message.payload)
        if isinstance(session, Session):
            state = tunnel_state(message.payload)
            if state is None:
                log.warning("tunnel_status_too_large", dedupe_key=session.key.ident, session=session.key.ident)
            elif self._session_registry.set_tunnel(session, state):
                self._holding.tunnel_changed(session.key)
        else:
            log.warning("tunnel_status_without_target", dedupe_key=session, code=session)

    def _command(self, connection: UpstreamConnection, message: Message, source: MessageSource) -> None:
        wall = self._ctx.clock.wall_s()
        new_id = self._ctx.new_id
        try:
            command = parse_command(message, wall, self._ctx.settings.commands.ttl_s, new_id)
        except MalformedCommand as error:
            request_id = message.request_id[:MAX_REQUEST_ID_CHARS]
            self._reject(source, error.command_id or request_id or new_id(), request_id, "malformed", str(error))
            return
        session = self._target(source, {"cluster_id": command.cluster_id, "agent_id": command.agent_id})
        if not isinstance(session, Session):
            self._reject(source, command.id, message.request_id, session, "no such agent is served here")
            return

        def settled(safe: bool) -> None:
            if safe and self._ctx.settings.upstream.send_command_ack:
                connection.send("command_ack", {"command_id": command.id}, message.request_id)

        self._intake.arrive(session, command, message.request_id, settled)

    def _target(self, source: MessageSource, payload: dict[str, Any]) -> Session | str:
        """Return the session that a message is meant for, or the code of a rejection.

        See target in docs/reference/protocol.md#3-commands.
        """
        cluster_id = _text(payload.get("cluster_id"))
        agent_id = _text(payload.get("agent_id"))
        if cluster_id or agent_id:
            found = self._ctx.sessions.find(source.owner, cluster_id, agent_id)
            return found[0] if found else "unknown_agent"
        sessions = list(source.sessions())
        fresh = [session for session in sessions if session.fresh(self._ctx.now)]
        if len(fresh) > 1:
            return "ambiguous_target"
        if fresh:
            return fresh[0]
        return max(sessions, key=lambda s: (s.contact_at or 0.0, s.last_seen_unix), default="unknown_agent")

    def _reject(self, source: MessageSource, command_id: str, request_id: str, code: str, error: str) -> None:
        self._refusals.refuse(Refusal(source.rejection_key, command_id, request_id, code, error))

    def _refuse(self, connection: UpstreamConnection, message: Message) -> None:
        self._ctx.metrics.refused.labels(message.type).inc()
        refusal = refuse(message.type, message.request_id, message.payload)
        if refusal is not None:
            kind, request_id, payload = refusal
            connection.send(kind, payload, request_id)

    def _unknown_type(self, message: Message) -> None:
        """Count a message of an unknown type; log each type once, up to `MAX_UNKNOWN_TYPES` types."""
        self._ctx.metrics.unknown_types.inc()
        kind = cut(message.type, MAX_SHOWN_CHARS)
        if kind not in self._unknown and len(self._unknown) < MAX_UNKNOWN_TYPES:
            self._unknown.add(kind)
            log.warning("unknown_type", type=kind)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else ""
