"""Requests of agents as bytes: the shapes of the generation B4+.

Rules: docs/reference/legacy-agents.md#1-legacy-http-endpoints.
"""

from __future__ import annotations

import json

from bench.servers import TOKEN, Server

GO = "Go-http-client/1.1"
PATH = "/api/v1/clusters/agent"


def cluster(number: int) -> str:
    return f"cluster-{number:05d}"


def heartbeat(server: Server, number: int, token: str = TOKEN) -> bytes:
    """A heartbeat as B4+ sends it every 5 s."""
    body = {
        "cluster_id": cluster(number),
        "agent_id": f"agent-{number:05d}",
        "status": "healthy",
        "tunnel_status": "connected",
        "timestamp": "2026-11-24T21:28:03.123456789Z",
        "metadata": {
            "version": "v1.28.3+k3s1",
            "k8s_nodes": 3,
            "k8s_pods": 27,
            "cpu_usage": 12.5,
            "memory_usage": 40.25,
        },
    }
    return request(server, "POST", f"{PATH}/{cluster(number)}/heartbeat", json.dumps(body).encode(), token)


def poll(server: Server, number: int, path: str = "poll", token: str = TOKEN) -> bytes:
    """A poll for commands as the guide documents it."""
    return request(server, "GET", f"{PATH}/{cluster(number)}/{path}", b"", token)


def request(server: Server, method: str, path: str, body: bytes = b"", token: str = TOKEN) -> bytes:
    """A request as Go's client writes it."""
    length = f"Content-Length: {len(body)}\r\nContent-Type: application/json\r\n" if method == "POST" else ""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: {server.host}:{server.port}\r\nUser-Agent: {GO}\r\n"
        f"{length}Authorization: Bearer {token}\r\nAccept-Encoding: gzip\r\n\r\n"
    )
    return head.encode() + body
