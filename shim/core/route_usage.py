"""Usage of the legacy routes by agent, for the migration panel. Times are Unix seconds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shim.core.agent_calls import (
    AgentCall,
    HealthCall,
    HeartbeatCall,
    PollCall,
    RegisterCall,
    ResultCall,
    StatusCall,
    TunnelInfoCall,
    TunnelPollCall,
)
from shim.core.records import SessionKey

MAX_AGENTS = 10_000

Route = tuple[str, str]
"""(dialect, operation) as in `dialects`."""

_OPERATIONS: dict[type[AgentCall], str] = {
    RegisterCall: "register",
    HeartbeatCall: "heartbeat",
    StatusCall: "status",
    PollCall: "poll",
    ResultCall: "result",
    TunnelPollCall: "tunnel_poll",
    TunnelInfoCall: "tunnel_info",
    HealthCall: "health",
}
_DIALECTS: dict[type[AgentCall], str] = {
    TunnelPollCall: "common",
    TunnelInfoCall: "clusters_agent",
    HealthCall: "common",
}


def route_of(call: AgentCall) -> Route:
    """Return the route of a call. A call type without a dialect field has only one route."""
    kind = type(call)
    dialect: str = _DIALECTS[kind] if kind in _DIALECTS else getattr(call, "dialect", "")
    return dialect, _OPERATIONS[kind]


@dataclass(slots=True)
class RouteUse:
    """Calls of one route by one agent since this process started."""

    count: int
    first_unix: float
    last_unix: float
    route: Route = ("", "")


class RouteUsage:
    """Counter of calls by agent and route. Beyond `max_agents` the agent that was added first is dropped."""

    def __init__(self, max_agents: int = MAX_AGENTS) -> None:
        self._max_agents = max_agents
        self._agents: dict[SessionKey, list[RouteUse]] = {}  # lists, because an agent uses too few routes for a dict
        self._routes: dict[Route, Route] = {}

    def note(self, key: SessionKey, dialect: str, operation: str, wall: float) -> None:
        """Count a call. Every request calls this, so it must be fast."""
        uses = self._agents.get(key)
        if uses is None:
            uses = self._add(key)
        route = (dialect, operation)
        for use in uses:
            if use.route == route:
                use.count += 1
                use.last_unix = wall
                return
        uses.append(RouteUse(1, wall, wall, self._routes.setdefault(route, route)))

    def forget(self, key: SessionKey) -> None:
        """Drop a session that was deleted or has another key now."""
        self._agents.pop(key, None)

    def __iter__(self) -> Iterator[tuple[SessionKey, dict[Route, RouteUse]]]:
        return iter([(key, {use.route: use for use in uses}) for key, uses in self._agents.items()])

    def _add(self, key: SessionKey) -> list[RouteUse]:
        if len(self._agents) >= self._max_agents:
            del self._agents[next(iter(self._agents))]
        uses = self._agents[key] = []
        return uses
