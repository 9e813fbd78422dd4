"""Answers to each message of an agent (docs/reference/legacy-agents.md#3-websocket-api), faults included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from devtools.controller import faults as fault
from devtools.controller.active_faults import Scope
from devtools.controller.faults import Endpoint, How
from devtools.controller.history import Event
from devtools.controller.registry import Registration
from devtools.controller.state import ControllerState
from shim.protocol.rfc3339 import parse_rfc3339, rfc3339
from shim.protocol.upstream_message import Message

DECOY_TOKEN = "decoy-never-to-be-passed-down"  # noqa: S105 - it opens nothing
_HEARD = frozenset(
    {
        "pong",
        "proxy_response",
        "proxy_response_header",
        "proxy_response_chunk",
        "proxy_response_end",
        "proxy_response_abort",
        "proxy_error",
        "proxy_websocket_data",
        "proxy_websocket_close",
        "tcp_tunnel_data",
        "tcp_tunnel_close",
        "udp_tunnel_data",
        "gateway_hello_ack",
        "backpressure",
        "protocol_fallback",
    }
)


class Peer(Protocol):
    """The connection of a message. `clusters` maps the cluster ids used on it to their agent ids."""

    number: int
    endpoint: Endpoint
    owner: str
    clusters: dict[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """A message to send back, `delay_s` later."""

    message: Message
    delay_s: float = 0


@dataclass(frozen=True, slots=True)
class CloseAfterReply:
    """Instruction to end the connection once the preceding answer is written."""

    how: How
    code: int
    reason: str = ""


Answers = list[Answer | CloseAfterReply]


class MessageHandler:
    """Handler of messages. It updates registrations and commands, and returns the answers without sending them."""

    def __init__(self, state: ControllerState) -> None:
        self._registry = state.registry
        self._commands = state.commands
        self._faults = state.faults
        self._strict_clusters = state.options.strict_clusters
        self._decoy_token = state.options.decoy_token
        self.gateway_url = ""
        self._handlers: dict[str, Callable[[Peer, Message, Event], Answers]] = {
            "register": self._register,
            "heartbeat": self._heartbeat,
            "status": self._heartbeat,
            "ping": self._ping,
            "command_ack": self._command_answer,
            "command_result": self._command_answer,
        }

    def handle(self, peer: Peer, message: Message, event: Event) -> Answers:
        """Return the answers to one message; `event` is its record in the history."""
        if message.timestamp and parse_rfc3339(message.timestamp) is None:
            return [_error(message, "timestamp must be RFC 3339")]
        handler = self._handlers.get(message.type)
        if handler is not None:
            return handler(peer, message, event)
        return [] if message.type in _HEARD else [_error(message, "unknown message type")]

    def _scope(self, peer: Peer, message: Message) -> Scope:
        named = message.payload.get("agent_id")
        agents = {named} if isinstance(named, str) else set(peer.clusters.values())
        return Scope(peer.endpoint, peer.number, agents, message.type)

    # --- register -----------------------------------------------------------------------------------------------------

    def _register(self, peer: Peer, message: Message, _event: Event) -> Answers:
        scope = self._scope(peer, message)
        if self._faults.take(fault.NoRegisterAnswer, scope):
            return []
        if refused := self._faults.take(fault.RegisterError, scope):
            code = {"code": refused.code} if refused.code else {}
            return [_error(message, refused.error, **(code | refused.extra))]
        problem = self._register_problem(peer, message.payload)
        if problem:
            return [_error(message, problem)]
        answers: Answers = []
        delay_s = 0.0
        if busy := self._faults.take(fault.RegisterInProgress, scope):
            for number in range(busy.times):
                answers.append(
                    Answer(Message("register_in_progress", {}, message.request_id), number * busy.interval_s)
                )
            delay_s = busy.times * busy.interval_s
        new_id = self._faults.take(fault.NewClusterIds, scope) is not None
        known, again = self._registry.register(peer.owner, message.payload, new_id=new_id)
        self._speaks_for(peer, known)
        success = self._success(known, "re-registered" if again else "registered")
        if redirect := self._faults.take(fault.Gateway, scope):
            success["gateway_ws_url"] = redirect.url or self.gateway_url
        answers.append(Answer(Message("register_success", success, message.request_id), delay_s))
        if contended := self._faults.take(fault.CloseAfterRegister, scope):
            answers.append(CloseAfterReply(contended.how, contended.code))
        return answers

    def _register_problem(self, peer: Peer, payload: dict[str, Any]) -> str:
        """Return the reason for which a `register` is refused, or the empty string."""
        if peer.endpoint is Endpoint.GATEWAY:
            return "the gateway takes no registrations"
        for name in ("agent_id", "name"):
            if payload.get(name) in (None, ""):
                return f"missing required field: {name}"
            if not isinstance(payload[name], str):
                return f"invalid field: {name} must be a string"
        if not isinstance(payload.get("cluster_id") or "", str):
            return "invalid field: cluster_id must be a string"
        return ""

    def _success(self, known: Registration, status: str) -> dict[str, Any]:
        return {
            "cluster_id": known.cluster_id,
            "cluster_uuid": known.cluster_uuid,
            "name": known.name,
            "status": status,
            "tunnel_url": f"https://{known.cluster_id}.tunnel.invalid",
            "api_server": f"https://{known.cluster_id}.api.invalid",
            "workspace_id": known.workspace_id,
            "registered_at": known.registered_at,
        } | ({"token": DECOY_TOKEN} if self._decoy_token else {})

    def _speaks_for(self, peer: Peer, known: Registration) -> None:
        peer.clusters[known.cluster_id] = known.agent_id
        self._registry.presence(known.cluster_id).connection = peer.number

    # --- what needs a registration ------------------------------------------------------------------------------------

    def _cluster(self, peer: Peer, payload: dict[str, Any]) -> Registration | str | None:
        """Return the cluster of a payload: by `cluster_id`, else by `agent_id`, else the connection's latest.

        If there is none, return the text of the `error`, or `None` if that is no error.
        """
        named, agent_id = payload.get("cluster_id"), payload.get("agent_id")
        if isinstance(named, str) and named:
            known = self._registry.get(named)
            if known is not None and known.owner == peer.owner:
                return known
            return "cluster not found" if self._strict_clusters else None
        mine = [known for ident in peer.clusters if (known := self._registry.get(ident))]
        exact = [known for known in mine if known.agent_id == agent_id]
        if exact or (mine and not agent_id):
            return (exact or mine)[-1]
        return "cluster not registered" if self._strict_clusters else None

    def _refusal(self, peer: Peer, message: Message) -> Registration | str | None:
        forgotten = self._faults.take(fault.NotRegistered, self._scope(peer, message))
        return forgotten.error if forgotten else self._cluster(peer, message.payload)

    def _heartbeat(self, peer: Peer, message: Message, event: Event) -> Answers:
        known = self._refusal(peer, message)
        if isinstance(known, str):
            return [_error(message, known)]
        if known is not None:
            self._speaks_for(peer, known)
        if known is not None and message.type == "heartbeat":
            presence = self._registry.presence(known.cluster_id)
            presence.heartbeats += 1
            presence.last_heartbeat = {
                "n": event.n,
                "time": rfc3339(event.wall_s),
                "wall_s": event.wall_s,
                "monotonic_s": event.monotonic_s,
                "status": message.payload.get("status"),
                "tunnel_status": message.payload.get("tunnel_status"),
            }
        if self._faults.take(fault.NoHeartbeatAcks, self._scope(peer, message)):
            return []
        acknowledged = {"received_at": rfc3339(event.wall_s)}
        return [Answer(Message("heartbeat_ack", acknowledged, message.request_id))]

    def _command_answer(self, peer: Peer, message: Message, event: Event) -> Answers:
        """Record an acknowledgement or result in any case: the controller has received it, whatever it answers."""
        if not self._commands.answered(event):
            return [_error(message, "missing required field: command_id")]
        if message.type == "command_ack":
            return []
        known = self._refusal(peer, message)
        return [_error(message, known)] if isinstance(known, str) else []

    def _ping(self, _peer: Peer, message: Message, event: Event) -> Answers:
        return [Answer(Message("pong", {"timestamp": rfc3339(event.wall_s)}, message.request_id))]


def _error(message: Message, text: str, **more: Any) -> Answer:
    return Answer(Message("error", {"error": text} | more, message.request_id))
