"""Dialect `/api/v1/agents/…` (A1 to A4): sessions by agent id, because these agents know no cluster id.

Routes: docs/reference/protocol.md#1-legacy-side.
"""

from __future__ import annotations

from shim.core.agent_calls import AgentCall, PollCall, SessionTarget, StatusCall, TargetKind
from shim.protocol.dialects import Call, Route, _shared

NAME = "agents"

ROUTES: tuple[Route, ...] = (
    Route("POST", "/api/v1/agents/register", "register"),
    Route("POST", "/api/v1/agents/{agent_id}/heartbeat", "heartbeat"),
    Route("POST", "/api/v1/agents/{agent_id}/status", "status", large=True),
    Route("GET", "/api/v1/agents/{agent_id}/commands", "poll"),
    Route("POST", "/api/v1/agents/{agent_id}/commands/{command_id}/result", "result"),
)

render = _shared.render


def parse(operation: str, call: Call) -> AgentCall:
    """Convert a request to a call. Raises `AgentError` (400) for a malformed request."""
    if operation == "register":
        return _shared.read_register(NAME, call, known_by_agent=True)
    agent_id = call.params["agent_id"]
    target = SessionTarget(TargetKind.AGENT, agent_id)
    if operation == "heartbeat":
        # These agents have no tunnel, so the status is fixed. Their `proxy_status` is no tunnel status
        # (docs/reference/protocol.md#2-upstream-side-the-websocket).
        body = _shared.bounded_object(call)
        return _shared.read_heartbeat(
            NAME, target, agent_id, body, size_bytes=call.size_bytes, tunnel_status="disconnected"
        )
    if operation == "status":
        return StatusCall(NAME, target, _shared.body_object(call))
    if operation == "poll":
        return PollCall(NAME, target)
    return _shared.read_result(NAME, target, call)
