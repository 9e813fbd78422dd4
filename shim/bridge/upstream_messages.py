"""Handle messages from the controller, one method per type. Unknown or malformed messages are counted and dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from shim.bridge.context import BridgeContext, Moment
from shim.bridge.delivery import CommandDelivery
from shim.bridge.gateway_redirect import GatewayConnection
from shim.bridge.link_pool import LinkPool
from shim.bridge.links import UpstreamLink
from shim.bridge.long_polls import LongPolls
from shim.bridge.outbox import Rejection, Rejections
from shim.bridge.registration import PendingRegistration, Registrations
from shim.bridge.session_registry import SessionRegistry
from shim.bridge.upstream_connection import UpstreamConnection
from shim.core.agent_calls import Failed
from shim.core.bounds import MAX_REQUEST_ID_CHARS, MAX_SHOWN_CHARS, cut
from shim.core.sessions import Session, recency
from shim.core.standing import TroubleKind
from shim.log import get
from shim.protocol.command_message import MalformedCommand, parse_command
from shim.protocol.controller_replies import (
    LEFTOVER_TYPES,
    REFUSED_TYPES,
    conflict_reply,
    error_status,
    error_text,
    forgotten,
    refuse,
    register_reply,
    tunnel_state,
)
from shim.protocol.rfc3339 import rfc3339
from shim.protocol.upstream_message import OUT_OF_RANGE, Message

log = get(__name__)

MAX_UNKNOWN_TYPES = 64

MessageSource = UpstreamLink | GatewayConnection
"""The link or the gateway on whose connection a message arrived."""


class SessionUnknown(NamedTuple):
    """The controller answered that it does not know a session; `source` carried the answer."""

    session: Session
    source: MessageSource


class GatewayNamed(NamedTuple):
    """The reply to a session's registration named a gateway for its traffic."""

    session: Session
    link: UpstreamLink
    url: str


class UpstreamMessageHandler:
    """Handler of the controller's messages. No method waits: slow work is passed to other parts."""

    def __init__(
        self,
        ctx: BridgeContext,
        links: LinkPool,
        registrations: Registrations,
        session_registry: SessionRegistry,
        delivery: CommandDelivery,
        rejections: Rejections,
        long_polls: LongPolls,
    ) -> None:
        self._ctx = ctx
        self._links = links
        self._registrations = registrations
        self._session_registry = session_registry
        self._delivery = delivery
        self._rejections = rejections
        self._long_polls = long_polls
        self._unknown: set[str] = set()
        self._handlers: dict[str, Callable[[UpstreamConnection, Message, MessageSource, float], None]] = {
            "register_success": self._register_success,
            "register_in_progress": self._register_in_progress,
            "heartbeat_ack": self._nothing,
            "pong": self._nothing,
            "ping": self._ping,
            "error": self._error,
            "tunnel_status": self._tunnel_status,
        }

    def handle(self, connection: UpstreamConnection, message: Message, source: MessageSource, now: float) -> None:
        """Handle one message that arrived at `now` (monotonic seconds).

        A message that cannot be used is counted and dropped. Only a command is answered in that case: the controller
        waits for its result.
        """
        if message.fault and message.fault != OUT_OF_RANGE and message.type not in self._ctx.settings.commands.types:
            connection.on_bad_frame("not_json")
            return
        handler = self._handlers.get(message.type)
        if handler is not None:
            handler(connection, message, source, now)
        elif message.type in self._ctx.settings.commands.types:
            self._command(connection, message, source, now)
        elif message.type in REFUSED_TYPES:
            self._refuse(connection, message)
        elif message.type in LEFTOVER_TYPES:
            self._ctx.metrics.leftovers.inc()
        else:
            self._unknown_type(message)

    # --- by type ------------------------------------------------------------------------------------------------------

    def _nothing(self, connection: UpstreamConnection, message: Message, source: MessageSource, now: float) -> None:
        """Ignore the message. Its arrival has already reset the liveness timer."""

    def _register_in_progress(
        self, connection: UpstreamConnection, message: Message, source: MessageSource, now: float
    ) -> None:
        self._registrations.in_progress(message, now)

    def _register_success(
        self, connection: UpstreamConnection, message: Message, source: MessageSource, now: float
    ) -> None:
        """Store the session of an accepted registration and answer its agent.

        No registration is sent over a gateway, so only the reply on a link may name a gateway.
        """
        job = self._registrations.find(message.request_id)
        if job is None:
            return
        reply = register_reply(message.payload)
        if not reply:
            failed = Failed(502, "the controller answered without a usable cluster id")
            self._registrations.fail(job, failed, connection, now)
            return
        outcome = self._session_registry.register(job, reply)
        self._registrations.succeed(job, outcome, connection, now)
        url = message.payload.get("gateway_ws_url")
        if job.session is not None and isinstance(url, str) and url and isinstance(source, UpstreamLink):
            self._ctx.events.put(GatewayNamed(job.session, source, url))

    def _register_refused(
        self, connection: UpstreamConnection, message: Message, job: PendingRegistration, now: float
    ) -> None:
        """Answer the agent of a refused registration; a 409 with a cluster id is stored as a registration."""
        status = error_status(message.payload)
        text = error_text(message.payload, lambda text: self._ctx.masked(text, job.link.token, job.secret))
        session = str(job.identity[-1])
        log.warning("register_failed", dedupe_key=f"{session} {status}", status=status, error=text, session=session)
        reply = conflict_reply(message.payload) if status == 409 else {}
        if reply:
            self._session_registry.register(job, reply, conflict=True)
        self._registrations.fail(job, Failed(status, text, cluster_id=reply.get("cluster_id", "")), connection, now)

    def _ping(self, connection: UpstreamConnection, message: Message, source: MessageSource, now: float) -> None:
        request_id = message.request_id[:MAX_REQUEST_ID_CHARS]
        connection.send("pong", {"timestamp": rfc3339(self._ctx.clock.wall_s())}, request_id)

    def _error(self, connection: UpstreamConnection, message: Message, source: MessageSource, now: float) -> None:
        """Handle the refusal of a registration or of a heartbeat, or that the controller does not know a session."""
        job = self._registrations.find(message.request_id)
        if job is not None:
            self._register_refused(connection, message, job, now)
            return
        self._ctx.metrics.upstream_errors.inc()
        key = connection.heartbeat_failed(message.request_id)
        text = error_text(message.payload, self._ctx.masked)
        if forgotten(message.payload):
            for session in self._sessions_of(source):
                if (key is None or session.key == key) and session.fresh(now):
                    if key is None:
                        session.coverage.refused()
                    session.standing.fail(TroubleKind.UNKNOWN, text, now)
                    self._ctx.events.put(SessionUnknown(session, source))
            return
        refused = self._ctx.sessions.get(key) if key is not None else None
        if refused is not None:
            refused.standing.fail(TroubleKind.HEARTBEATS_REFUSED, text, now)
        log.warning("upstream_error", dedupe_key=text, error=text)

    def _sessions_of(self, source: MessageSource) -> Sequence[Session]:
        """Return the sessions whose traffic the connection carries."""
        return (source.session,) if isinstance(source, GatewayConnection) else self._links.sessions_of(source)

    def _tunnel_status(
        self, connection: UpstreamConnection, message: Message, source: MessageSource, now: float
    ) -> None:
        session = self._target(source, message.payload, now)
        if isinstance(session, Session):
            state = tunnel_state(message.payload)
            changed = None if state is None else self._session_registry.set_tunnel(session, state)
            if changed is None:
                log.warning("tunnel_status_too_large", dedupe_key=session.key.ident, session=session.key.ident)
            elif changed:
                self._long_polls.tunnel_changed(session.key)
        else:
            log.warning("tunnel_status_without_target", dedupe_key=session, code=session)

    def _command(self, connection: UpstreamConnection, message: Message, source: MessageSource, now: float) -> None:
        at = Moment(now, self._ctx.clock.wall_s())
        new_id = self._ctx.new_id
        try:
            command = parse_command(message, at.unix, self._ctx.settings.commands.ttl_s, new_id)
        except MalformedCommand as error:
            request_id = message.request_id[:MAX_REQUEST_ID_CHARS]
            self._reject(source, error.command_id or request_id or new_id(), request_id, "malformed", str(error))
            return
        session = self._target(source, {"cluster_id": command.cluster_id, "agent_id": command.agent_id}, now)
        if not isinstance(session, Session):
            self._reject(source, command.id, message.request_id, session, "no such agent is served here")
            return

        def settled(safe: bool) -> None:
            """Acknowledge the command if the configuration asks for it and the command is safe on disk."""
            if safe and self._ctx.settings.upstream.send_command_ack:
                connection.send("command_ack", {"command_id": command.id}, message.request_id)

        self._delivery.arrive(session, command, message.request_id, at, settled)

    def _target(self, source: MessageSource, payload: dict[str, Any], now: float) -> Session | str:
        """Return the session that a message is meant for, or the code of a rejection.

        See target in docs/reference/protocol.md#3-commands.
        """
        cluster_id = _text(payload.get("cluster_id"))
        agent_id = _text(payload.get("agent_id"))
        if cluster_id or agent_id:
            found = self._ctx.sessions.find(source.owner, cluster_id, agent_id)
            return found[0] if found else "unknown_agent"
        sessions = self._sessions_of(source)
        fresh = [session for session in sessions if session.fresh(now)]
        if len(fresh) > 1:
            return "ambiguous_target"
        if fresh:
            return fresh[0]
        return max(sessions, key=recency, default="unknown_agent")

    def _reject(self, source: MessageSource, command_id: str, request_id: str, code: str, error: str) -> None:
        self._rejections.reject(Rejection(source.rejection_key, command_id, request_id, code, error))

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
