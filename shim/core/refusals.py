"""How the shim refuses what only a WebSocket agent can serve: the controller must not wait (wire-facts §3.3)."""

from __future__ import annotations

from typing import Any

from shim.core.bounds import MAX_REQUEST_ID_CHARS

REASON = "this cluster is served by a legacy agent through agent-shim; it cannot serve proxied traffic"

REFUSED_TYPES = frozenset({"proxy_request", "proxy_websocket_start", "ws_start", "tcp_tunnel_start"})
LEFTOVER_TYPES = frozenset(
    {
        "proxy_request_chunk",
        "proxy_request_stream_end",
        "proxy_cancel",
        "proxy_stream_data",
        "proxy_websocket_data",
        "ws_data",
        "proxy_websocket_close",
        "ws_close",
        "tcp_tunnel_data",
        "tcp_tunnel_close",
        "udp_tunnel_data",
        "gateway_hello",
    }
)

Refusal = tuple[str, str, dict[str, Any]]


def refuse(kind: str, request_id: str, payload: dict[str, Any]) -> Refusal | None:
    """Return the refusal's (type, request_id, payload), or `None` where a real agent would not answer either.

    Ids go back cut to `MAX_REQUEST_ID_CHARS`.
    """
    request_id = request_id[:MAX_REQUEST_ID_CHARS]
    if kind == "proxy_request":
        if not request_id or not payload:
            return None
        streams = payload.get("supports_response_streaming") is True
        return ("proxy_response_abort" if streams else "proxy_error", request_id, {"error": REASON})
    if kind == "tcp_tunnel_start":
        if not request_id:
            return None
        return "tcp_tunnel_close", request_id, {"reason": "connection_failed", "error": REASON}
    stream_id = payload.get("stream_id")
    answered_id = stream_id[:MAX_REQUEST_ID_CHARS] if isinstance(stream_id, str) and stream_id else request_id
    if not answered_id:
        return None
    return "proxy_error", answered_id, {"request_id": answered_id, "error": REASON}
