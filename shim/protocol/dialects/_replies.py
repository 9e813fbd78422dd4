"""Replies for all dialects, as supersets that every generation decodes (docs/reference/protocol.md#1-legacy-side).

All types are exact, whatever the controller sent. One wrong type makes a Go agent discard the whole reply, and some
agents exit then (docs/reference/legacy-agents.md#11-register).
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from shim.core.agent_calls import Accepted, Commands, Failed, Healthy, Outcome, Registered, TunnelInfo, TunnelState
from shim.protocol import rfc3339
from shim.protocol.controller_replies import integer, url_safe_id
from shim.protocol.dialects import Call, Reply, error_reply

_NO_CONTENT = Reply(204)
_ACCEPTED = Reply(200, {"success": True})


def render(operation: str, outcome: Outcome, call: Call) -> Reply:  # noqa: ARG001 - a dialect's own may need it
    """Return the reply to a call, which satisfies all generations and depends on the outcome alone."""
    match outcome:
        case Registered():
            return _registered(outcome)
        case Accepted():
            # Go agents do not read the body of a success. Go's client then drops the connection if there is one
            # (docs/reference/legacy-agents.md#10-common-to-all-ab-clients).
            return _NO_CONTENT if call.user_agent.startswith("Go-http-client") else _ACCEPTED
        case Commands():
            return Reply(200, _commands(outcome))
        case TunnelState():
            return Reply(200, _tunnel(outcome))
        case TunnelInfo():
            return Reply(200, _tunnel_info(outcome.registered))
        case Healthy():
            return Reply(200, {"status": "healthy"})
        case Failed():
            usable = url_safe_id(outcome.cluster_id)
            return error_reply(outcome if usable else replace(outcome, cluster_id=""))


def _registered(known: Registered) -> Reply:
    """Return a registration with its ids in both places that agents read, without token and gateway."""
    if not url_safe_id(known.cluster_id):
        return error_reply(Failed(502, "the controller returned a cluster id that agents cannot use"))
    cluster: dict[str, Any] = {
        "id": known.cluster_id,
        "uuid": known.cluster_uuid,
        "name": known.name,
        "status": known.status,
        "agent_id": known.agent_id,
    }
    data: dict[str, Any] = {"cluster_id": known.cluster_id, "status": known.status, "tunnel_url": known.tunnel_url}
    workspace_id = integer(known.workspace_id)
    if workspace_id is not None:
        cluster["workspace_id"] = workspace_id
    if rfc3339.parse(known.registered_at):
        cluster["registered_at"] = data["registered_at"] = known.registered_at
    return Reply(
        200,
        {
            "success": True,
            "message": "registered (cached)" if known.cached else "registered",
            "cluster_id": known.cluster_id,
            "cluster_uuid": known.cluster_uuid,
            "name": known.name,
            "status": known.status,
            "tunnel_url": known.tunnel_url,
            "api_server": known.api_server,
            "cluster": cluster,
            "data": data,
        },
    )


def _commands(answer: Commands) -> dict[str, Any]:
    return {
        "success": True,
        "commands": [
            {"id": c.id, "type": c.type, "payload": c.payload, "created_at": c.created_at} for c in answer.commands
        ],
        "status": "IDLE",
        "poll_frequency": answer.poll_frequency_s,
    }


def _tunnel(state: TunnelState) -> dict[str, Any]:
    """Return the controller's tunnel state without values that agents cannot decode.

    The fields are docs/reference/protocol.md#15-tunnel-poll.
    """
    payload = state.payload or {}
    out: dict[str, Any] = {"status": "IDLE", "poll_frequency": state.poll_frequency_s}
    for key in ("status", "credentials", "tunnel_server_addr", "server_fingerprint"):
        if isinstance(payload.get(key), str):
            out[key] = payload[key]
    frequency_s = integer(payload.get("poll_frequency"))
    if frequency_s is not None and frequency_s > 0:
        out["poll_frequency"] = frequency_s
    forwards = payload.get("forwards")
    if isinstance(forwards, list):
        out["forwards"] = [forward for forward in map(_forward, forwards) if forward]
    return out


def _forward(forward: Any) -> dict[str, Any] | None:
    port = integer(forward.get("remote_port")) if isinstance(forward, dict) else None
    if port is None or not isinstance(forward.get("name"), str):
        return None
    return {"name": forward["name"], "remote_port": port}


def _tunnel_info(known: Registered) -> dict[str, Any]:
    return {
        "success": True,
        "cluster_id": known.cluster_id,
        "status": known.status,
        "tunnel_url": known.tunnel_url,
        "api_server": known.api_server,
    }
