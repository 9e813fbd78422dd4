"""Who still uses which legacy route, and how often: what the migration panel shows. Pure; times are Unix seconds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from shim.core.calls import (
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
    """The route that a call came by; a call that does not name its dialect has only one."""
    kind = type(call)
    dialect: str = _DIALECTS[kind] if kind in _DIALECTS else getattr(call, "dialect", "")
    return dialect, _OPERATIONS[kind]


@dataclass(slots=True)
class Use:
    """How often an agent called a route since this process started."""

    count: int
    first_wall: float
    last_wall: float


class Usage:
    """Counts calls by agent and route. Of more than `max_agents` agents those that came first are forgotten."""

    def __init__(self, max_agents: int = MAX_AGENTS) -> None:
        self._max_agents = max_agents
        self._agents: OrderedDict[SessionKey, dict[Route, Use]] = OrderedDict()

    def note(self, key: SessionKey, dialect: str, operation: str, wall: float) -> None:
        """A call; this is on the path of every request."""
        routes = self._agents.get(key)
        if routes is None:
            routes = self._add(key)
        use = routes.get((dialect, operation))
        if use is None:
            routes[dialect, operation] = Use(1, wall, wall)
        else:
            use.count += 1
            use.last_wall = wall

    def forget(self, key: SessionKey) -> None:
        """The session is gone, or lives on under another key."""
        self._agents.pop(key, None)

    def __iter__(self) -> Iterator[tuple[SessionKey, dict[Route, Use]]]:
        return iter(list(self._agents.items()))

    def _add(self, key: SessionKey) -> dict[Route, Use]:
        if len(self._agents) >= self._max_agents:
            self._agents.popitem(last=False)
        routes = self._agents[key] = {}
        return routes
