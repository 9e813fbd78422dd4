"""Parser of the controller's replies, and the refusals of requests that a legacy agent cannot serve."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

from shim.core.bounds import (
    MAX_KEPT_BYTES,
    MAX_KEPT_VALUES,
    MAX_NAME_CHARS,
    MAX_REQUEST_ID_CHARS,
    MAX_URL_CHARS,
    MAX_WORD_CHARS,
)
from shim.protocol import rfc3339
from shim.protocol.lenient_json import has_too_many_values

# RFC 3986: the characters of a path segment that need no escaping. Agents insert their cluster id without escaping.
_URL_SAFE = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9\-._~!$&'()*+,;=:@]{1,256}", re.ASCII)
_PATTERNS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (401, ("unauthor", "invalid token", "forbidden")),
    (409, ("already", "conflict", "not unique")),
    (400, ("required", "invalid", "missing", "validation")),
)
_STATUS_OF_CODE = {400: 400, 401: 401, 403: 401, 409: 409, 422: 400}
_STATUS_OF_WORD = {str(code): status for code, status in _STATUS_OF_CODE.items()}
FORGOTTEN = ("not registered", "cluster not found")
TUNNEL_KEYS = (
    "status",
    "forwards",
    "credentials",
    "poll_frequency",
    "tunnel_server_addr",
    "server_fingerprint",
)
MAX_ERROR_CHARS = 200
MAX_MASKED_CHARS = 16_384
_REPLY_TEXTS = {
    "name": MAX_NAME_CHARS,
    "status": MAX_WORD_CHARS,
    "tunnel_url": MAX_URL_CHARS,
    "api_server": MAX_URL_CHARS,
}


def url_safe_id(value: Any) -> str:
    """Return an id that agents may insert into a path without escaping, else `""`."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return value if isinstance(value, str) and _URL_SAFE.fullmatch(value) else ""


def integer(value: Any) -> int | None:
    """Return a number that Go decodes into an `int` (64 bits, no fraction), `None` for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if -(2**63) <= value < 2**63 else None


def register_reply(payload: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a `register_success` that agents may receive, each of its exact type.

    Returns `{}` without a usable cluster id. `token` and `gateway_ws_url` are never included.
    """
    cluster_id = url_safe_id(payload.get("cluster_id"))
    if not cluster_id:
        return {}
    reply: dict[str, Any] = {
        "cluster_id": cluster_id,
        "cluster_uuid": url_safe_id(payload.get("cluster_uuid")) or cluster_id,
    }
    for key, limit_chars in _REPLY_TEXTS.items():
        value = payload.get(key)
        if isinstance(value, str) and len(value) <= limit_chars:
            reply[key] = value
    workspace_id = integer(payload.get("workspace_id"))
    if workspace_id is not None:
        reply["workspace_id"] = workspace_id
    if rfc3339.parse(payload.get("registered_at")) is not None:
        reply["registered_at"] = payload["registered_at"]
    return reply


def error_text(payload: dict[str, Any], mask: Callable[[str], str] = str) -> str:
    """Return the text of an error, printable and cut to `MAX_ERROR_CHARS`.

    `mask` removes secrets before the text is cut: a secret that was cut would not be recognised, and most of it shown.
    """
    for key in ("error", "message"):
        value = payload.get(key)
        if isinstance(value, str) and value:
            shown = mask(value[:MAX_MASKED_CHARS])[:MAX_ERROR_CHARS]
            return "".join(c if c.isprintable() else " " for c in shown)
    return "the controller reported an error"


def error_status(payload: dict[str, Any]) -> int:
    """Return the HTTP status for an agent (docs/reference/protocol.md#11-register).

    `code` decides if there is one, else the first pattern that the text contains.
    """
    code = payload.get("code")
    if isinstance(code, (int, float)) and not isinstance(code, bool) and code:
        return _STATUS_OF_CODE.get(int(code), 502)
    if isinstance(code, str) and code:
        return _STATUS_OF_WORD.get(code) or _by_words(code.replace("_", " ").replace("-", " "))
    return _by_words(error_text(payload))


def _by_words(text: str) -> int:
    folded = text.casefold()
    for status, words in _PATTERNS:
        if any(word in folded for word in words):
            return status
    return 502


def forgotten(payload: dict[str, Any]) -> bool:
    """Return True if an error means that the controller does not know the cluster."""
    folded = error_text(payload).casefold()
    return any(words in folded for words in FORGOTTEN)


def conflict_reply(payload: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the existing cluster in a conflict, as `register_reply` does; `{}` without an id.

    `message` and `status` of a conflict describe the error, not the cluster, so they are left out.
    """
    cluster = payload.get("cluster")
    nested = cluster if isinstance(cluster, dict) else {}
    cluster_id = url_safe_id(payload.get("cluster_id")) or url_safe_id(nested.get("id"))
    fields = {"cluster_uuid": nested.get("uuid"), "name": nested.get("name"), **payload, "cluster_id": cluster_id}
    return register_reply({key: value for key, value in fields.items() if key != "status"})


def tunnel_state(payload: dict[str, Any]) -> dict[str, Any] | None:
    """Return the tunnel's fields of a `tunnel_status`, `None` if they are too large to be kept for each agent.

    The dialects remove values that agents cannot decode.
    """
    state = {key: payload[key] for key in TUNNEL_KEYS if key in payload}
    encoded = msgspec.json.encode(state)
    too_large = len(encoded) > MAX_KEPT_BYTES or has_too_many_values(encoded, MAX_KEPT_VALUES)
    return None if too_large else state


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
    """Return the (type, request_id, payload) of a refusal, `None` if a real agent would not answer either.

    Ids are repeated up to `MAX_REQUEST_ID_CHARS` characters.
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
