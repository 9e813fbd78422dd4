"""Headers, bodies and formats of all generations (docs/reference/legacy-agents.md#10-common-to-all-ab-clients)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import msgspec

from devtools.agents.http_client import Request

_REGISTERED = frozenset({200, 201})
_ACCEPTED = frozenset({200, 204})
_GO = "Go-http-client/1.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Identity of an agent. `token` is its Bearer token, `service_token` the token of a Kubernetes ServiceAccount."""

    agent_id: str
    cluster_name: str
    token: str = field(repr=False)
    version: str = "v1.2.3"
    k8s_version: str = "v1.28.3+k3s1"
    hostname: str = "node-1"
    server_ip: str = "10.0.0.7"
    service_token: str = field(default="", repr=False)
    tunnel_enabled: bool = True

    @property
    def labels(self) -> dict[str, str]:
        return {"agent.pipeops.io/version": self.version, "hostname": self.hostname}

    @property
    def tunnel_status(self) -> str:
        """A configured value: it is unrelated to the tunnel's real state."""
        return "connected" if self.tunnel_enabled else "disconnected"


@dataclass(frozen=True, slots=True)
class Result:
    """Result of a command. Empty fields are left out, as with Go's `omitempty`."""

    success: bool = True
    output: str = ""
    error: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


def health() -> Request:
    """Build the health request, the only request without a token."""
    return get("/api/v1/health", "")


def tunnel_poll(who: Identity) -> Request:
    """Build the tunnel poll, which is the same in every generation."""
    return get(f"/api/agents/{who.agent_id}/tunnel/status", who.token, "PipeOps-Agent/1.0")


def status_report(who: Identity, now_s: float, report: dict[str, Any] | None = None) -> Request:
    """Build a cluster status report of the first A agents. Lists of `report` that are absent are sent as `null`."""
    given = report or {}
    body = {key: given.get(key) for key in ("nodes", "namespaces", "deployments", "services", "pods")}
    body["metrics"] = given.get("metrics", {"cpu_usage": 0, "memory_usage": 0, "pod_count": 0, "node_count": 0})
    body["timestamp"] = rfc3339(now_s)
    return post(f"/api/v1/agents/{who.agent_id}/status", who.token, body, timeout_s=15)


def result_body(result: Result, now_s: float) -> bytes:
    """Build the body of a result post."""
    body: dict[str, Any] = {"success": result.success}
    body |= {key: value for key in ("output", "error", "metadata") if (value := getattr(result, key))}
    return msgspec.json.encode(body | {"timestamp": rfc3339(now_s)})


def rfc3339(wall_s: float, *, fraction: bool = True) -> str:
    """Format a time as Go's RFC3339Nano in UTC (without trailing zeros), or as RFC3339 without a fraction."""
    seconds, nanos = divmod(int(wall_s * 1_000_000_000), 1_000_000_000)
    stamp = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    digits = f".{nanos:09d}".rstrip("0") if fraction and nanos else ""
    return f"{stamp}{digits}Z"


def get(path: str, token: str, user_agent: str = _GO) -> Request:
    """Build a GET request whose success is 200."""
    return Request("GET", path, headers(token, user_agent))


def headers(token: str, user_agent: str = _GO) -> tuple[tuple[str, str], ...]:
    """Build the headers of a request without a body, in wire order. Without a token there is no Authorization."""
    auth = (("Authorization", f"Bearer {token}"),) if token else ()
    return (("User-Agent", user_agent), *auth, ("Accept-Encoding", "gzip"))


def post(
    path: str, token: str, body: dict[str, Any] | bytes, *, timeout_s: float = 30, user_agent: str = _GO
) -> Request:
    """Build a POST request whose success is 200 or 204, with a body that is not read."""
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    *first, last = headers(token, user_agent)
    return Request(
        "POST",
        path,
        (*first, ("Content-Type", "application/json"), last),
        data,
        timeout_s,
        success=_ACCEPTED,
        reads_success=False,
    )


def register_post(path: str, who: Identity, version: str, body: dict[str, Any], *, conflict: bool = False) -> Request:
    """Build the register request, whose reply the agent reads. `version` is the generation's part of the User-Agent.

    With `conflict` a 409 may also be a success.
    """
    request = post(path, who.token, body, user_agent=f"PipeOps-Agent/{version}")
    return replace(request, success=_REGISTERED | {409} if conflict else _REGISTERED, reads_success=True)


def heartbeat_body(who: Identity, cluster_id: str, now_s: float, *, nodes: int, pods: int) -> dict[str, Any]:
    """Build the body of a heartbeat of generation B."""
    return {
        "cluster_id": cluster_id,
        "agent_id": who.agent_id,
        "status": "healthy",
        "tunnel_status": who.tunnel_status,
        "timestamp": rfc3339(now_s),
        "metadata": {
            "cpu_usage": "0%",
            "k8s_nodes": nodes,
            "k8s_pods": pods,
            "memory_usage": "0%",
            "version": who.version,
        },
    }
