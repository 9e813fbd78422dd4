"""Agents with a WebSocket client of their own that still call the shim and no longer need it.

See docs/reference/protocol.md#5-an-agent-that-has-migrated-already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import msgspec

from shim.bridge.context import BridgeContext
from shim.core.sessions import Session
from shim.core.text import shorten
from shim.log import get

log = get(__name__)

MAX_AGENTS = 1024


class WebSocketEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """Event on the connection of an agent that speaks WebSocket itself. `payload` is that of the agent's `register`.

    `registers`: the agent has sent a `register`; `anew` is true for the first one on its connection. `registered`: the
    controller has accepted it as `cluster_id`. `closed`: the connection of an agent that had registered was closed.
    """

    event: Literal["registers", "registered", "closed"]
    token: str
    payload: dict[str, Any]
    cluster_id: str = ""
    anew: bool = False

    def __repr__(self) -> str:
        return f"WebSocketEvent({self.event!r})"


class WebSocketAgent(msgspec.Struct):
    """One such agent.

    `since_unix` and `last_seen_unix` are Unix seconds; `accepted` is True once the controller has registered it.
    """

    name: str
    agent_id: str
    since_unix: float
    last_seen_unix: float
    cluster_id: str = ""
    accepted: bool = False
    connections: int = 0


class WebSocketAgents:
    """List of these agents for the status; ends the legacy sessions that they replace.

    `owner_of(token)` returns the owner whose sessions an agent with this token may replace.
    """

    def __init__(self, ctx: BridgeContext, owner_of: Callable[[str], str | None]) -> None:
        self._ctx = ctx
        self._owner_of = owner_of
        self._agents: dict[tuple[str, str], WebSocketAgent] = {}

    def __iter__(self) -> Iterator[WebSocketAgent]:
        return iter(list(self._agents.values()))

    def record(self, event: WebSocketEvent) -> None:
        """Record an event."""
        match event.event:
            case "registers":
                self._registers(event.token, event.payload, anew=event.anew)
            case "registered":
                self._registered(event.token, event.payload, event.cluster_id)
            case "closed":
                self._closed(event.token, event.payload)

    def _registers(self, token: str, payload: dict[str, Any], *, anew: bool) -> None:
        owner, wall = self._owner_of(token), self._ctx.clock.wall_s()
        if owner is None:
            return
        key = (owner, _identity(payload))
        agent = self._agents.get(key)
        if agent is None:
            while len(self._agents) >= MAX_AGENTS:
                del self._agents[min(self._agents, key=lambda known: self._agents[known].last_seen_unix)]
            agent = WebSocketAgent(_text(payload.get("name")), _text(payload.get("agent_id")), wall, wall)
            self._agents[key] = agent
            hint = "point its PIPEOPS_API_URL at the controller: it no longer needs the shim"
            log.info("websocket_agent", dedupe_key=agent.name, name=agent.name, agent=agent.agent_id, hint=hint)
        agent.last_seen_unix = wall
        agent.agent_id = _text(payload.get("agent_id")) or agent.agent_id
        agent.connections += anew
        self._end_sessions(owner, payload, _text(payload.get("cluster_id")))

    def _registered(self, token: str, payload: dict[str, Any], cluster_id: str) -> None:
        owner = self._owner_of(token)
        agent = self._agents.get((owner or "", _identity(payload)))
        if owner is not None and agent is not None:
            agent.accepted, agent.cluster_id = True, _text(cluster_id)
            agent.last_seen_unix = self._ctx.clock.wall_s()
            self._end_sessions(owner, payload, cluster_id)

    def _closed(self, token: str, payload: dict[str, Any]) -> None:
        agent = self._agents.get((self._owner_of(token) or "", _identity(payload)))
        if agent is not None:
            agent.connections = max(0, agent.connections - 1)
            agent.last_seen_unix = self._ctx.clock.wall_s()

    def _end_sessions(self, owner: str, payload: dict[str, Any], cluster_id: str) -> None:
        """Mark the legacy sessions of the same identity as migrated until their agents call again."""
        for session in self._sessions_of(owner, payload, cluster_id):
            if session.migrated_at is None:
                log.info("session_migrated", session=session.key.ident)
            session.migrate(self._ctx.now)

    def _sessions_of(self, owner: str, payload: dict[str, Any], cluster_id: str) -> list[Session]:
        sessions, name = self._ctx.sessions, payload.get("name")
        found = sessions.find(owner, cluster_id, "") if cluster_id else []
        if not found and isinstance(agent_id := payload.get("agent_id"), str):
            found = sessions.find(owner, "", agent_id)
        if not found and isinstance(name, str) and name:
            found = sessions.registered_as(owner, name)
        return found


def _identity(payload: dict[str, Any]) -> str:
    return _text(payload.get("name")) or _text(payload.get("agent_id"))


def _text(value: Any) -> str:
    return shorten(value) if isinstance(value, str) else ""
