"""Truncation of `command_result` payloads to `upstream.max_send_bytes`."""

from __future__ import annotations

from typing import Any

import msgspec

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
