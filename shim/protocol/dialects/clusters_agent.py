"""Dialect `/api/v1/clusters/agent/…` (B1, B2, B4 to B7 and the documented poll): sessions by cluster id.

Routes: docs/reference/protocol.md#1-legacy-side.
"""

from __future__ import annotations

from shim.core.agent_calls import AgentCall, PollCall, SessionTarget, TargetKind, TunnelInfoCall
from shim.protocol.dialects import Call, Route, _shared

NAME = "clusters_agent"

ROUTES: tuple[Route, ...] = (
    Route("POST", "/api/v1/clusters/agent/register", "register"),
    Route("POST", "/api/v1/clusters/agent/{cluster_id}/heartbeat", "heartbeat"),
    Route("GET", "/api/v1/clusters/agent/{cluster_id}/poll", "poll"),
    Route("GET", "/api/v1/clusters/agent/{cluster_id}/tunnel-info", "tunnel_info"),
    Route("POST", "/api/v1/clusters/agent/{cluster_id}/commands/{command_id}/result", "result"),
)

render = _shared.render


def parse(operation: str, call: Call) -> AgentCall:
    """Convert a request to a call. Raises `AgentError` (400) for a malformed request."""
    if operation == "register":
        return _shared.read_register(NAME, call)
    target = SessionTarget(TargetKind.CLUSTER, call.params["cluster_id"])
    if operation == "heartbeat":
        # The cluster id of the path takes precedence over the body's.
        body = _shared.bounded_object(call)
        given = body.get("agent_id")
        agent_id = given if isinstance(given, str) else _shared.text(given)
        return _shared.read_heartbeat(
            NAME, target, agent_id and _shared.valid_id(agent_id, "agent_id"), body, size_bytes=call.size_bytes
        )
    if operation == "poll":
        return PollCall(NAME, target)
    if operation == "tunnel_info":
        return TunnelInfoCall(target)
    return _shared.read_result(NAME, target, call)
