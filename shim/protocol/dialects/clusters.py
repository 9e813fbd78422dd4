"""`/clusters/{agent_id}…` (B3): the agent id in the path, the cluster id in a heartbeat's body (protocol.md §1.6)."""

from __future__ import annotations

from shim.core.agent_calls import AgentCall, SessionTarget, TargetKind
from shim.protocol.dialects import Call, Route, _replies, _requests, valid_id

NAME = "clusters"

ROUTES: tuple[Route, ...] = (
    Route("POST", "/clusters/{agent_id}", "register"),
    Route("POST", "/clusters/{agent_id}/heartbeat", "heartbeat"),
)

render = _replies.render


def parse(operation: str, call: Call) -> AgentCall:
    """Turn a request into a call. Raises `AgentError` (400) for what cannot be understood."""
    if operation == "register":
        # this generation alone calls the ServiceAccount token `token`
        return _requests.read_register(NAME, call, secret_keys=("token", "k8s_service_token"))
    agent_id = call.params["agent_id"]
    body = _requests.bounded_object(call)
    cluster_id = _requests.text(body.get("cluster_id"))
    target = (
        SessionTarget(TargetKind.CLUSTER, valid_id(cluster_id, "cluster_id"))
        if cluster_id
        else SessionTarget(TargetKind.ALIAS, agent_id)
    )
    # it also repeats that token in its heartbeats, which is all there is of it after a restart of the shim
    return _requests.read_heartbeat(
        NAME, target, agent_id, body, size_bytes=call.size_bytes, secret=_requests.text(body.get("token"))
    )
