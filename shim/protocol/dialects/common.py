"""Routes that several generations share: the tunnel poll (A2 to B7) and the health check.

Rules: docs/reference/protocol.md#15-tunnel-poll.
"""

from __future__ import annotations

from shim.core.agent_calls import AgentCall, HealthCall, SessionTarget, TargetKind, TunnelPollCall
from shim.protocol.dialects import Call, Route, _shared

NAME = "common"

ROUTES: tuple[Route, ...] = (
    Route("GET", "/api/agents/{agent_id}/tunnel/status", "tunnel_poll"),
    Route("GET", "/api/v1/health", "health", open=True),
)

render = _shared.render


def parse(operation: str, call: Call) -> AgentCall:
    """Convert a request to a call.

    The tunnel poll has only the agent id, even for agents whose session is keyed by cluster id. So the id may be an
    alias.
    """
    if operation == "tunnel_poll":
        return TunnelPollCall(SessionTarget(TargetKind.ALIAS, call.params["agent_id"]))
    return HealthCall()
