"""Dialect `/clusters/{agent_id}…` (B3): the agent id in the path, the cluster id in a heartbeat's body.

Sessions: docs/reference/protocol.md#16-owners-sessions-aliases.
"""

from __future__ import annotations

from shim.core.agent_calls import AgentCall, SessionTarget, TargetKind
from shim.protocol.dialects import Call, Route, _shared

NAME = "clusters"

ROUTES: tuple[Route, ...] = (
    Route("POST", "/clusters/{agent_id}", "register"),
    Route("POST", "/clusters/{agent_id}/heartbeat", "heartbeat"),
)

render = _shared.render


def parse(operation: str, call: Call) -> AgentCall:
    """Convert a request to a call. Raises `AgentError` (400) for a malformed request."""
    if operation == "register":
        # Only this generation sends the ServiceAccount token as `token`.
        return _shared.read_register(NAME, call, secret_keys=("token", "k8s_service_token"))
    agent_id = call.params["agent_id"]
    body = _shared.bounded_object(call)
    cluster_id = _shared.text(body.get("cluster_id"))
    target = (
        SessionTarget(TargetKind.CLUSTER, _shared.valid_id(cluster_id, "cluster_id"))
        if cluster_id
        else SessionTarget(TargetKind.ALIAS, agent_id)
    )
    # Heartbeats repeat the ServiceAccount token. After a restart of the shim they are the only source of it, because
    # registrations are stored without it.
    return _shared.read_heartbeat(
        NAME, target, agent_id, body, size_bytes=call.size_bytes, secret=_shared.text(body.get("token"))
    )
