"""Paths, headers and bodies of each generation (docs/reference/legacy-agents.md#1-legacy-http-endpoints).

Keys have the order of the fields in Go's structs, so that a body equals that of the real client byte for byte.
"""

from __future__ import annotations

from typing import Protocol

from devtools.agents.http_client import Request
from devtools.agents.replies import DecodeError, Registration, decode_registration, decode_registration_b3
from devtools.agents.requests import Identity, get, heartbeat_body, post, register_post, rfc3339

_SPECS = {"cpu_cores": 4, "memory_gb": 16, "disk_gb": 100, "os": "linux"}
_PORTS = {"kubernetes_api": 6443, "kubelet": 10250, "agent_http": 8080}
_NEVER = "0001-01-01T00:00:00Z"


class Generation(Protocol):
    """One generation. `now_s` is in wall-clock seconds; `cluster_id` is the agent's cluster id, or `""` without one."""

    NAME: str
    FATAL_REGISTER: bool  # the process exits if it cannot register
    KEEPS_ID: bool  # stores its cluster id across restarts; with one it never registers
    RETRIES: bool  # repeats a failed heartbeat before the next tick
    FIRST_AT_ONCE: bool  # the first heartbeat is sent before the first tick
    POLLS: bool  # has a route to poll for commands
    INTERVAL_S: float  # between heartbeats

    def register(self, who: Identity, now_s: float) -> Request:
        """Build the register request."""

    def registration(self, status: int, body: bytes, who: Identity) -> Registration:
        """Decode the registration from a response whose status is in the request's `success`.

        Raises `DecodeError` if the agent treats the response as a failure.
        """

    def heartbeat(self, who: Identity, cluster_id: str, now_s: float) -> Request:
        """Build the heartbeat request."""

    def poll(self, who: Identity, cluster_id: str) -> Request:
        """Build the poll for commands."""

    def result(self, who: Identity, cluster_id: str, command_id: str, body: bytes) -> Request:
        """Build the post of a command's result."""


class Agents:
    """Generation A: `/api/v1/agents/…`."""

    NAME = "agents"
    FATAL_REGISTER = KEEPS_ID = RETRIES = FIRST_AT_ONCE = False
    POLLS = True
    INTERVAL_S = 30.0

    def register(self, who: Identity, now_s: float) -> Request:
        body = {
            "id": who.agent_id,
            "name": who.agent_id,
            "cluster_name": who.cluster_name,
            "version": who.version,
            "labels": who.labels,
            "status": "registering",
            "last_seen": rfc3339(now_s),
            "control_plane_url": "",
        }
        return register_post("/api/v1/agents/register", who, who.version, body)

    def registration(self, status: int, body: bytes, who: Identity) -> Registration:
        return Registration()

    def heartbeat(self, who: Identity, cluster_id: str, now_s: float) -> Request:
        body = {
            "agent_id": who.agent_id,
            "cluster_name": who.cluster_name,
            "status": "connected",
            "proxy_status": "direct",
            "timestamp": rfc3339(now_s),
            "metadata": {"version": who.version},
        }
        return post(f"/api/v1/agents/{who.agent_id}/heartbeat", who.token, body, timeout_s=10)

    def poll(self, who: Identity, cluster_id: str) -> Request:
        return get(f"/api/v1/agents/{who.agent_id}/commands", who.token)

    def result(self, who: Identity, cluster_id: str, command_id: str, body: bytes) -> Request:
        return post(f"/api/v1/agents/{who.agent_id}/commands/{command_id}/result", who.token, body)


class ClustersAgent:
    """Generations B4 to B7: `/api/v1/clusters/agent/…`. Polls and results follow the vendor's guide."""

    NAME = "clusters_agent"
    FATAL_REGISTER = KEEPS_ID = RETRIES = FIRST_AT_ONCE = POLLS = True
    INTERVAL_S = 5.0

    def register(self, who: Identity, now_s: float) -> Request:
        token = {"k8s_service_token": who.service_token} if who.service_token else {}
        body = {
            "agent_id": who.agent_id,
            "name": who.cluster_name,
            "k8s_version": who.k8s_version,
            "server_ip": who.server_ip,
            "server_code": who.server_ip,
            **token,
            "region": "agent-managed",
            "cloud_provider": "agent",
            "metadata": {
                "agent_mode": "vm-agent",
                "registration_timestamp": rfc3339(now_s, fraction=False),
            },
            "hostname": who.hostname,
            "agent_version": who.version,
            "labels": who.labels,
            "tunnel_port_config": _PORTS,
            "server_specs": _SPECS,
            "last_seen": _NEVER,
        }
        return register_post("/api/v1/clusters/agent/register", who, who.k8s_version, body, conflict=True)

    def registration(self, status: int, body: bytes, who: Identity) -> Registration:
        return decode_registration(body)

    def heartbeat(self, who: Identity, cluster_id: str, now_s: float) -> Request:
        body = heartbeat_body(who, cluster_id, now_s, nodes=3, pods=25)
        return post(f"/api/v1/clusters/agent/{cluster_id}/heartbeat", who.token, body, timeout_s=10)

    def poll(self, who: Identity, cluster_id: str) -> Request:
        return get(f"/api/v1/clusters/agent/{cluster_id}/poll", who.token)

    def result(self, who: Identity, cluster_id: str, command_id: str, body: bytes) -> Request:
        return post(f"/api/v1/clusters/agent/{cluster_id}/commands/{command_id}/result", who.token, body)


class Clusters:
    """Generation B3: `/clusters/{agent_id}`, without a route to poll for commands."""

    NAME = "clusters"
    FATAL_REGISTER = FIRST_AT_ONCE = POLLS = False
    KEEPS_ID = RETRIES = True
    INTERVAL_S = 30.0

    def register(self, who: Identity, now_s: float) -> Request:
        token = {"token": who.service_token} if who.service_token else {}
        body = {
            "agent_id": who.agent_id,
            "name": who.cluster_name,
            "k8s_version": who.k8s_version,
            "labels": who.labels,
            "server_ip": who.server_ip,
            "hostname": who.hostname,
            "last_seen": _NEVER,
            "tunnel_config": _PORTS,
            "server_specs": _SPECS,
            **token,
        }
        return register_post(f"/clusters/{who.agent_id}", who, who.k8s_version, body, conflict=True)

    def registration(self, status: int, body: bytes, who: Identity) -> Registration:
        if status == 409:
            found = decode_registration_b3(body)
            if not found.cluster_id:
                raise DecodeError("a conflict without cluster.id")
            return found
        try:
            return decode_registration_b3(body)
        except DecodeError:
            # This generation continues without the id of the reply and uses its agent id as the cluster id.
            return Registration(who.agent_id)

    def heartbeat(self, who: Identity, cluster_id: str, now_s: float) -> Request:
        body = heartbeat_body(who, cluster_id, now_s, nodes=0, pods=0)
        if who.service_token:
            body["token"] = who.service_token
        return post(f"/clusters/{who.agent_id}/heartbeat", who.token, body, timeout_s=10)

    def poll(self, who: Identity, cluster_id: str) -> Request:
        raise NotImplementedError("agents of this generation have no commands")

    def result(self, who: Identity, cluster_id: str, command_id: str, body: bytes) -> Request:
        raise NotImplementedError("agents of this generation have no commands")


GENERATIONS: dict[str, Generation] = {kind.NAME: kind for kind in (ClustersAgent(), Agents(), Clusters())}
