"""The upstream envelope (protocol.md §2): the only place that knows the JSON of the WebSocket side.

`{"type": str, "request_id": str?, "payload": object, "timestamp": RFC 3339}`, in text and in binary frames.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from shim import jsontext
from shim.errors import MessageError

# What the vendor documents and what the shim answers with; a controller may send anything else.
KNOWN_TYPES = frozenset(
    {
        "register",
        "register_success",
        "register_in_progress",
        "heartbeat",
        "heartbeat_ack",
        "status",
        "command",
        "command_ack",
        "command_result",
        "tunnel_status",
        "ping",
        "pong",
        "error",
        "proxy_request",
        "proxy_error",
        "proxy_response_abort",
        "tcp_tunnel_start",
        "tcp_tunnel_close",
        "proxy_websocket_start",
        "ws_start",
    }
)


@dataclass(frozen=True, slots=True)
class Message:
    """One envelope. `payload` is always an object (`null` and absent become `{}`); `timestamp` is the sender's text."""

    type: str
    payload: dict[str, Any] = field(default_factory=dict)
    request_id: str = ""
    timestamp: str = ""


_encoder = msgspec.json.Encoder()


def decode(frame: str | bytes) -> Message:
    """Decode one frame. Raises `MessageError` with kind `not_json`, `not_object`, `no_type` or `bad_payload`.

    Lenient where a real controller may be: a numeric `request_id` becomes a string, a timestamp that is no string is
    dropped.
    """
    try:
        raw = jsontext.decode(frame)
    except (ValueError, RecursionError):
        raise MessageError("not_json") from None
    if not isinstance(raw, dict):
        raise MessageError("not_object")
    kind = raw.get("type")
    if not isinstance(kind, str) or not kind:
        raise MessageError("no_type")
    payload = raw.get("payload")
    if payload is None:
        payload = {}
    if not isinstance(payload, dict):
        raise MessageError("bad_payload")
    request_id = raw.get("request_id")
    if isinstance(request_id, (int, float)) and not isinstance(request_id, bool):
        request_id = str(request_id)
    timestamp = raw.get("timestamp")
    return Message(
        type=kind,
        payload=payload,
        request_id=request_id if isinstance(request_id, str) else "",
        timestamp=timestamp if isinstance(timestamp, str) else "",
    )


def encode(message: Message) -> bytes:
    """Encode for one text frame; an empty `request_id` is left out."""
    out: dict[str, Any] = {"type": message.type}
    if message.request_id:
        out["request_id"] = message.request_id
    out["payload"] = message.payload
    out["timestamp"] = message.timestamp
    return _encoder.encode(out)
