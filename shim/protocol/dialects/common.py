"""Calls that several generations share: the tunnel poll (A2 to B7) and the health check (protocol.md §1, §1.5)."""

from __future__ import annotations

from shim.core.agent_calls import AgentCall, HealthCall, SessionTarget, TargetKind, TunnelPollCall
from shim.protocol.dialects import Call, Route, _replies

NAME = "common"

ROUTES: tuple[Route, ...] = (
    Route("GET", "/api/agents/{agent_id}/tunnel/status", "tunnel_poll"),
    Route("GET", "/api/v1/health", "health", open=True),
)

render = _replies.render


def parse(operation: str, call: Call) -> AgentCall:
    """Turn a request into a call. The tunnel poll knows only the agent id, also of agents that are known by cluster."""
    if operation == "tunnel_poll":
        return TunnelPollCall(SessionTarget(TargetKind.ALIAS, call.params["agent_id"]))
    return HealthCall()
