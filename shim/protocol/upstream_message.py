"""JSON envelope of the upstream WebSocket (docs/reference/protocol.md#2-upstream-side-the-websocket).

`{"type": str, "request_id": str?, "payload": object, "timestamp": RFC 3339}`, in text and in binary frames. The payload
of a result that is too long for `upstream.max_send_bytes` is shortened (`fit`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from shim.errors import MessageError
from shim.protocol import lenient_json, malformed_frames

# Types that the vendor documents or the shim sends. A controller may send other types.
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
    """One envelope. `payload` is always an object (`null` and absent become `{}`); `timestamp` is the sender's text.

    `fault` is why the payload is unusable although its ids could be read, else empty. `replaced` is true if bytes that
    were no UTF-8 became U+FFFD.
    """

    type: str
    payload: dict[str, Any] = field(default_factory=dict)
    request_id: str = ""
    timestamp: str = ""
    fault: str = ""
    replaced: bool = False


_encoder = msgspec.json.Encoder()


def decode(frame: str | bytes) -> Message:
    """Decode one frame. Raises `MessageError` with kind `not_json`, `not_object`, `no_type` or `bad_payload`.

    A numeric `request_id` becomes a string, and a timestamp that is no string is dropped: real controllers send both.
    """
    replacements: list[None] = []
    try:
        raw = lenient_json.decode(frame, lambda: replacements.append(None))
    except (ValueError, RecursionError):
        raise MessageError("not_json") from None
    return _message(raw, replaced=bool(replacements))


def decode_frame(frame: bytes) -> Sequence[Message | MessageError]:
    """Decode all messages of a frame, usually one. A malformed message is returned as an error in its place.

    An unusable message that has an id is returned with its `fault`, so that it can be answered.
    """
    if lenient_json.has_too_many_values(frame):
        found = [_salvaged(each) for each in malformed_frames.values_of(frame, malformed_frames.TOO_MANY)]
        return found or (MessageError("too_many_values"),)
    try:
        return (decode(frame),)
    except MessageError as error:
        if error.kind != "not_json":
            return (_named(frame) or error,)
    found = [_salvaged(each) for each in malformed_frames.values_of(frame)]
    return found or (MessageError("not_json"),)


def _named(frame: bytes) -> Message | None:
    """Return a message whose payload is no object if it has a `request_id` for a reply, else `None`."""
    raw = lenient_json.decode(frame)
    if not isinstance(raw, dict) or raw.get("payload") is None:
        return None
    return _answerable({**raw, "payload": None}, "the payload must be an object")


def _salvaged(found: malformed_frames.Salvaged) -> Message | MessageError:
    if not found.fault:
        try:
            return _message(found.value)
        except MessageError as error:
            return error
    return _answerable(found.value, found.fault) or MessageError("not_json")


def _answerable(raw: Any, fault: str) -> Message | None:
    """Return a message with a fault if it has an id for a reply, else `None`."""
    try:
        message = _message(raw, fault=fault)
    except MessageError:
        return None
    named = message.request_id or any(message.payload.get(key) for key in ("command_id", "id"))
    return message if named else None


def _message(raw: Any, *, fault: str = "", replaced: bool = False) -> Message:
    """Convert a JSON value to an envelope. Raises `MessageError`."""
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
        fault=fault,
        replaced=replaced,
    )


def encode(message: Message) -> bytes:
    """Encode an envelope for one text frame. An empty `request_id` is left out."""
    out: dict[str, Any] = {"type": message.type}
    if message.request_id:
        out["request_id"] = message.request_id
    out["payload"] = message.payload
    out["timestamp"] = message.timestamp
    return _encoder.encode(out)


NOTES_BYTES = 256
"""Bytes reserved for the fields that report what was cut."""

_TEXTS = ("output", "error")


def fit(payload: dict[str, Any], limit_bytes: int) -> dict[str, Any]:
    """Return the payload, or a copy whose JSON is no longer than `limit_bytes`.

    The copy has shorter texts, and no metadata if the rest would still be too long. Its `metadata` reports what was cut
    as `output_truncated_bytes`, `error_truncated_bytes` and `metadata_dropped_bytes`.
    """
    if _size(payload) <= limit_bytes:
        return payload
    texts = {key: payload[key] for key in _TEXTS if isinstance(payload.get(key), str)}
    rest = {key: value for key, value in payload.items() if key not in texts}
    notes: dict[str, int] = {}
    metadata = payload.get("metadata") or {}
    if _size(rest) + NOTES_BYTES > limit_bytes // 2:
        notes["metadata_dropped_bytes"] = _size(metadata)
        metadata = {}
        rest["metadata"] = metadata
    room = max(0, limit_bytes - _size(rest) - NOTES_BYTES)
    for number, key in enumerate(sorted(texts, key=lambda each: len(texts[each]))):
        rest[key] = _cut(texts[key], room // (len(texts) - number))
        room -= _size(rest[key])
        lost_bytes = len(texts[key].encode("utf-8", "replace")) - len(rest[key].encode("utf-8", "replace"))
        if lost_bytes:
            notes[f"{key}_truncated_bytes"] = lost_bytes
    rest["metadata"] = {**metadata, **notes}
    return rest


def _cut(text: str, room_bytes: int) -> str:
    """Return the longest beginning of a text whose JSON has at most `room_bytes` bytes."""
    while (size := _size(text)) > room_bytes and text:
        text = text[: min(len(text) - 1, len(text) * room_bytes // size)]
    return text


def _size(value: Any) -> int:
    return len(msgspec.json.encode(value))
