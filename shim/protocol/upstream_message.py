"""JSON envelope of the upstream WebSocket (docs/reference/protocol.md#2-upstream-side-the-websocket).

`{"type": str, "request_id": str?, "payload": object, "timestamp": RFC 3339}`, in text and in binary frames. The payload
of a result that is too long for `upstream.max_send_bytes` is shortened (`fit`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from shim.core import bounds
from shim.errors import MessageError
from shim.protocol import lenient_json

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
_encoder = msgspec.json.Encoder()
NOTES_BYTES = 256
"""Bytes reserved for the fields that report what was cut."""
_TEXTS = ("output", "error")
MAX_VALUES = 1024
"""Values that are read from one frame."""
MAX_BYTES = 524_288
"""Bytes beyond which a frame is only searched for ids: decoding it in Python would block the event loop."""
SKIMMED_CHARS = 131_072
"""Characters from the start of a value in which its ids are searched."""
OUT_OF_RANGE = "a number is beyond what agents can decode"
TOO_DEEP = "the command is nested too deeply"
TOO_MANY = f"the message has more than {bounds.MAX_VALUES} values"
TOO_LARGE = "the message cannot be read, and is too large to find out why"
NO_JSON = "the message is not valid JSON"
_MAX_DIGITS = 309  # of a whole number that may still fit a float64
_LONG = re.compile(r"\d{310}")
_SPACE = re.compile(r"[ \t\r\n\ufeff\x1e\0]*")  # between values: also marks, record separators and padding
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+', re.DOTALL)


class Message(msgspec.Struct, frozen=True):
    """One envelope. `payload` is always an object (`null` and absent become `{}`); `timestamp` is the sender's text.

    `fault` is why the payload is unusable although its ids could be read, else empty. `replaced` is true if bytes that
    were no UTF-8 became U+FFFD.
    """

    type: str
    payload: dict[str, Any] = msgspec.field(default_factory=dict)
    request_id: str = ""
    timestamp: str = ""
    fault: str = ""
    replaced: bool = False


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
        found = [_salvaged(*each) for each in values_of(frame, TOO_MANY)]
        return found or (MessageError("too_many_values"),)
    try:
        return (decode(frame),)
    except MessageError as error:
        if error.kind != "not_json":
            raw = lenient_json.decode(frame)
            listed = isinstance(raw, list) and raw and all(isinstance(each, dict) for each in raw)
            return [_message_or_error(each) for each in (raw if listed else [raw])]
    found = [_salvaged(*each) for each in values_of(frame)]
    return found or (MessageError("not_json"),)


def _message_or_error(raw: Any) -> Message | MessageError:
    """Convert a JSON value to an envelope. One whose payload is no object is returned if it can be answered."""
    try:
        return _message(raw)
    except MessageError as error:
        if not isinstance(raw, dict) or raw.get("payload") is None:
            return error
        return _answerable({**raw, "payload": None}, "the payload must be an object") or error


def _salvaged(value: Any, fault: str) -> Message | MessageError:
    if not fault:
        return _message_or_error(value)
    return _answerable(value, fault) or MessageError("not_json")


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


_Salvaged = tuple[Any, str]


def values_of(frame: bytes, fault: str = "") -> Iterator[_Salvaged]:
    """Yield the values of a frame in order, each with its fault. Text that is no JSON raises nothing.

    With a fault a value is incomplete: numbers are missing, or everything but its scalars. With the argument `fault`,
    which every value then has, nothing but ids is read.
    """
    text = lenient_json.as_characters(frame).decode()
    at = 0
    for _ in range(MAX_VALUES):
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]  # the pattern also matches the empty string
        if at >= len(text):
            return
        found, end = _read(text, at, fault)
        if found is not None:
            yield found
        if end is None:
            return
        at = end


def _read(text: str, at: int, fault: str) -> tuple[_Salvaged | None, int | None]:
    """Return the value that begins at `at` and its end, `None` if the end is unknown."""
    if fault or len(text) > MAX_BYTES:
        return _skim(text, at, fault or TOO_LARGE)
    out_of_range: list[str] = []

    def number(digits: str) -> Any:
        """Convert a number, and note one beyond a float64."""
        value = int(digits) if len(digits) <= _MAX_DIGITS and digits.lstrip("-").isdigit() else float(digits)
        if value in (float("inf"), float("-inf")):
            out_of_range.append(digits)
            return None
        return value

    def constant(name: str) -> Any:  # NaN and Infinity are no JSON, but Python programs write them
        """Note a constant, which JSON does not have."""
        out_of_range.append(name)

    # `int` is faster than `number`, and safe unless an integer has more digits than a float64 can.
    whole = number if _LONG.search(text) else int
    decoder = json.JSONDecoder(parse_int=whole, parse_float=number, parse_constant=constant)
    try:
        value, end = decoder.raw_decode(text, at)
    except RecursionError:
        return _skim(text, at, TOO_DEEP)
    except ValueError:
        return _skim(text, at, NO_JSON)
    return (value, OUT_OF_RANGE if out_of_range else ""), end


def _skim(text: str, at: int, fault: str) -> tuple[_Salvaged | None, int | None]:
    """Return the scalars of the object that begins at `at`, and those of its `payload`, without decoding the rest."""
    envelope: dict[str, Any] = {}
    payload: dict[str, Any] = {}
    depth, key, in_payload, end = 0, None, False, None
    for match in _TOKEN.finditer(text, at, min(len(text), at + SKIMMED_CHARS)):
        lexeme = match[0]
        if lexeme in "{[":
            depth += 1
            if depth == 1 and lexeme == "[":
                return None, None
            in_payload = lexeme == "{" and key == "payload" if depth == 2 else in_payload
            key = None
        elif lexeme in "}]":
            depth, key = depth - 1, None
            if depth <= 0:
                end = match.end()
                break
        elif lexeme == ",":
            key = None
        elif lexeme != ":" and (depth == 1 or (depth == 2 and in_payload)):
            if key is None:
                key = _scalar(lexeme)
            else:
                (envelope if depth == 1 else payload)[str(key)] = _scalar(lexeme)
    return (({**envelope, "payload": payload}, fault) if envelope else None), end


def _scalar(token: str) -> Any:
    """Return the value of a scalar. A number that is no integer is returned as text, so that an id stays an id."""
    try:
        value = json.loads(token)
    except (ValueError, RecursionError):
        return token
    return token if isinstance(value, float) else value
