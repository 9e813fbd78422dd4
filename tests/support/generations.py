"""The legacy agents, generation by generation: what each one calls, and what it makes of the answer.

Rules: docs/reference/legacy-agents.md#1-legacy-http-endpoints.

`GENERATIONS` are the vendor's stock agents; `GUIDE` is a client that follows the guide's documented API, in Go as well.
`Generation.read` tells whether an agent would be content with a reply, take it for an error it lives with, or could not
decode it: a reply of the last kind must never be seen by any agent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tests.support.gojson import GoError, Map, Shape, Time, decode

_ZERO_TIME = "0001-01-01T00:00:00Z"
_NOW = "2026-11-23T05:08:13.482301563Z"
_PORTS = {"kubernetes_api": 6443, "kubelet": 10250, "agent_http": 8080}
_SPECS = {"cpu_cores": 4, "memory_gb": 16, "disk_gb": 100, "os": "linux"}
_URL_SAFE = re.compile(r"[A-Za-z0-9\-._~!$&'()*+,;=:@]+", re.ASCII)

_ENVELOPE: dict[str, Shape] = {"success": bool, "message": str}
_REGISTER_B1 = _ENVELOPE | {"cluster": {"id": str, "name": str}}
_REGISTER_B2 = _ENVELOPE | {"cluster": {"id": str, "name": str, "token": str, "api_server": str}}
_CLUSTER_TEXTS = ["id", "uuid", "name", "status", "tunnel_status", "agent_id", "agent_hostname", "agent_version"]
_CLUSTER_TEXTS += ["cloud_provider", "region", "cluster_version", "token", "api_server"]
_REGISTER_B4 = (
    _ENVELOPE
    | dict.fromkeys(["cluster_id", "cluster_uuid", "name", "status", "tunnel_url", "api_server"], str)
    | {
        "cluster": dict.fromkeys(_CLUSTER_TEXTS, str) | {"workspace_id": int, "registered_at": Time},
        "data": {"cluster_id": str, "status": str, "tunnel_url": str, "registered_at": Time},
    }
)
_COMMAND = {"id": str, "type": str, "payload": Map, "created_at": Time}
_COMMANDS: dict[str, Shape] = {"commands": [_COMMAND]}
_GUIDE_POLL = _ENVELOPE | _COMMANDS | {"status": str, "poll_frequency": int}
_TUNNEL = {
    "status": str,
    "forwards": [{"name": str, "remote_port": int}],
    "credentials": str,
    "poll_frequency": int,
    "tunnel_server_addr": str,
    "server_fingerprint": str,
}
_TUNNEL_INFO = _ENVELOPE | dict.fromkeys(("cluster_id", "status", "tunnel_url", "api_server"), str)


class Verdict(Enum):
    """The result of an agent's decoding of a reply."""

    CONTENT = "content"
    REFUSED = "refused"  # an error status that it logs and survives, or exits over as it is meant to
    BROKEN = "broken"  # meant as a success, but the agent cannot take it for one


@dataclass(frozen=True, slots=True)
class Reading:
    """A verdict, with what the agent read (a register's cluster id, a poll's commands) or the reason against it."""

    verdict: Verdict
    value: Any = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """A call as the agent sends it. Every call but `health` has the Bearer header."""

    method: str
    path: str
    user_agent: str
    body: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Who:
    """The ids that a call is filled in with."""

    agent_id: str = "agent-1"
    cluster_id: str = "c-1"
    name: str = "prod-cluster"
    command_id: str = "cmd-1"


@dataclass(frozen=True, slots=True)
class Generation:
    """One generation: its routes by operation, and the struct its register reply is decoded into (`None`: none)."""

    label: str
    dialect: str
    routes: dict[str, tuple[str, str]]
    register_shape: dict[str, Shape] | None = None

    @property
    def nested_id(self) -> bool:
        """B1 to B3 read `cluster.id`, later ones the top level's `cluster_id`."""
        return self.register_shape is not None and "cluster_id" not in self.register_shape

    def request(self, operation: str, who: Who) -> Request:
        """The call that this generation makes for `operation`."""
        method, pattern = self.routes[operation]
        path = pattern.format(agent_id=who.agent_id, cluster_id=who.cluster_id, command_id=who.command_id)
        agents = {"register": "PipeOps-Agent/1.28.3", "tunnel_poll": "PipeOps-Agent/1.0"}
        body = _body(self, operation, who) if method == "POST" else None
        return Request(method, path, agents.get(operation, "Go-http-client/1.1"), body)

    def read(self, operation: str, status: int, body: bytes) -> Reading:
        """Decode a reply to `operation` as this generation does."""
        if operation == "register":
            return _read_register(self, status, body)
        if operation in ("heartbeat", "status", "result"):
            return _by_status(status, (200, 204))
        if status != 200:
            return _by_status(status, (200,))
        shapes = {"tunnel_poll": _TUNNEL, "tunnel_info": _TUNNEL_INFO}
        if operation == "health":
            return Reading(Verdict.CONTENT)
        poll = _GUIDE_POLL if self.label == "guide" else _COMMANDS
        try:
            read = decode(body, shapes.get(operation, poll)) or {}
        except GoError as error:
            return Reading(Verdict.BROKEN, reason=str(error))
        return Reading(Verdict.CONTENT, read.get("commands", []) if operation == "poll" else read)


def _by_status(status: int, good: tuple[int, ...]) -> Reading:
    if status in good:
        return Reading(Verdict.CONTENT)
    verdict = Verdict.REFUSED if status >= 400 else Verdict.BROKEN
    return Reading(verdict, reason=f"status {status}")


def _read_register(generation: Generation, status: int, body: bytes) -> Reading:
    shape = generation.register_shape
    if shape is None:
        return _by_status(status, (200, 201))
    if status not in (200, 201, 409):
        return _by_status(status, (200, 201))
    bad = Verdict.REFUSED if status == 409 else Verdict.BROKEN
    try:
        read = decode(body, shape) or {}
    except GoError as error:
        return Reading(bad, reason=str(error))
    cluster_id = read.get("cluster", {}).get("id", "") if generation.nested_id else read.get("cluster_id", "")
    if not cluster_id:
        return Reading(bad, reason="no cluster id")
    if not _URL_SAFE.fullmatch(cluster_id) or cluster_id in (".", ".."):
        return Reading(Verdict.BROKEN, reason="the cluster id cannot stand in a path")
    return Reading(Verdict.CONTENT, cluster_id)


def _body(generation: Generation, operation: str, who: Who) -> dict[str, Any]:
    if operation == "register":
        return register_body(generation.label, who)
    if operation == "heartbeat":
        return heartbeat_body(generation.dialect, who)
    if operation == "status":
        lists = dict.fromkeys(("nodes", "namespaces", "deployments", "services", "pods"))
        return lists | {
            "metrics": {"cpu_usage": 0, "memory_usage": 0, "pod_count": 0, "node_count": 0},
            "timestamp": _NOW,
        }
    return {"success": True, "output": "done", "timestamp": _NOW}


def register_body(label: str, who: Who) -> dict[str, Any]:
    """The register body of one generation, as docs/reference/legacy-agents.md#11-register lists its fields."""
    if label.startswith("A"):
        return {
            "id": who.agent_id,
            "name": "pipeops-agent",
            "cluster_name": who.name,
            "version": "v1.2.3",
            "labels": {"hostname": "node-1", "agent.pipeops.io/version": "v1.2.3"},
            "status": "registering",
            "last_seen": _NOW,
            "control_plane_url": "",
        }
    common = {
        "agent_id": who.agent_id,
        "name": who.name,
        "k8s_version": "v1.28.3+k3s1",
        "labels": {"hostname": "node-1", "agent.pipeops.io/version": "v1.2.3"},
        "server_ip": "10.0.0.7",
        "hostname": "node-1",
        "server_specs": _SPECS,
        "last_seen": _ZERO_TIME,
    }
    if label in ("B1", "B2", "B3"):
        return common | {"tunnel_config": _PORTS} | ({"token": "sa-token"} if label == "B3" else {})
    if label == "guide":
        return {"agent_id": who.agent_id, "name": who.name, "k8s_version": "1.27.0", "agent_version": "1.0.0"}
    body = common | {
        "server_code": "10.0.0.7",
        "k8s_service_token": "sa-token",
        "region": "agent-managed",
        "cloud_provider": "agent",
        "metadata": {"agent_mode": "vm-agent", "registration_timestamp": "2026-11-23T05:08:14Z"},
        "agent_version": "v1.2.3",
        "tunnel_port_config": _PORTS,
    }
    return body | (_MONITORING_B5 if label == "B5" else {})


_MONITORING_B5 = {
    "prometheus_url": "http://prometheus:9090",
    "prometheus_username": "admin",
    "prometheus_password": "monitoring-password",
    "prometheus_ssl": False,
    "tunnel_prometheus_port": 9090,
    "opencost_url": "http://opencost:9003",
    "opencost_password": "monitoring-password",
}


def heartbeat_body(dialect: str, who: Who) -> dict[str, Any]:
    """The heartbeat body of a dialect's agents (docs/reference/legacy-agents.md#12-heartbeat)."""
    if dialect == "agents":
        return {
            "agent_id": who.agent_id,
            "cluster_name": who.name,
            "status": "connected",
            "proxy_status": "direct",
            "timestamp": _NOW,
            "metadata": {"version": "v1.2.3"},
        }
    usage = {"cpu_usage": "0%", "memory_usage": "0%"}
    body = {
        "cluster_id": who.cluster_id,
        "agent_id": who.agent_id,
        "status": "healthy",
        "tunnel_status": "connected",
        "timestamp": _NOW,
        "metadata": {"version": "v1.2.3", "k8s_nodes": 3, "k8s_pods": 25, **usage},
    }
    return body | ({"token": "cluster-token"} if dialect == "clusters" else {})


_HEALTH = {"health": ("GET", "/api/v1/health")}
_TUNNEL_POLL = {"tunnel_poll": ("GET", "/api/agents/{agent_id}/tunnel/status")}
_A = {
    "register": ("POST", "/api/v1/agents/register"),
    "heartbeat": ("POST", "/api/v1/agents/{agent_id}/heartbeat"),
}
_STATUS = {"status": ("POST", "/api/v1/agents/{agent_id}/status")}
_A_COMMANDS = {
    "poll": ("GET", "/api/v1/agents/{agent_id}/commands"),
    "result": ("POST", "/api/v1/agents/{agent_id}/commands/{command_id}/result"),
}
_B = {
    "register": ("POST", "/api/v1/clusters/agent/register"),
    "heartbeat": ("POST", "/api/v1/clusters/agent/{cluster_id}/heartbeat"),
}
_B3 = {"register": ("POST", "/clusters/{agent_id}"), "heartbeat": ("POST", "/clusters/{agent_id}/heartbeat")}
_DOCUMENTED = {
    "poll": ("GET", "/api/v1/clusters/agent/{cluster_id}/poll"),
    "tunnel_info": ("GET", "/api/v1/clusters/agent/{cluster_id}/tunnel-info"),
    "result": ("POST", "/api/v1/clusters/agent/{cluster_id}/commands/{command_id}/result"),
}

GUIDE = Generation("guide", "clusters_agent", _HEALTH | _B | _DOCUMENTED, _REGISTER_B4)
GENERATIONS = (
    Generation("A1", "agents", _HEALTH | _A | _STATUS | _A_COMMANDS),
    Generation("A2", "agents", _HEALTH | _A | _STATUS | _A_COMMANDS | _TUNNEL_POLL),
    Generation("A3", "agents", _HEALTH | _A | _A_COMMANDS | _TUNNEL_POLL),
    Generation("A4", "agents", _HEALTH | _A | _TUNNEL_POLL),
    Generation("B1", "clusters_agent", _HEALTH | _B | _TUNNEL_POLL, _REGISTER_B1),
    Generation("B2", "clusters_agent", _HEALTH | _B | _TUNNEL_POLL, _REGISTER_B2),
    Generation("B3", "clusters", _HEALTH | _B3 | _TUNNEL_POLL, _REGISTER_B2),
    *(
        Generation(label, "clusters_agent", _HEALTH | _B | _TUNNEL_POLL, _REGISTER_B4)
        for label in ("B4", "B5", "B6", "B7")
    ),
)
ALL = (*GENERATIONS, GUIDE)
