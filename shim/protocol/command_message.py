"""Normalisation of the controller's `command` messages (docs/reference/protocol.md#3-commands)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import msgspec

from shim.core.agent_calls import OfferedCommand
from shim.core.bounds import MAX_DEPTH, MAX_ID_BYTES, MAX_REQUEST_ID_CHARS, MAX_WORD_CHARS
from shim.core.records import CommandRecord, SessionKey
from shim.errors import ShimError
from shim.protocol import rfc3339 as form
from shim.protocol.lenient_json import memory_of_values
from shim.protocol.rfc3339 import parse_rfc3339, rfc3339
from shim.protocol.upstream_message import Message

MAX_ECHO_CHARS = 1024
"""Characters of an unusable id that are repeated in the rejection."""
MAX_NUMBER = int(1.7976931348623157e308)

_PAYLOAD_KEYS = ("payload", "params", "args")
_OWN_KEYS = frozenset(_PAYLOAD_KEYS) | frozenset(
    {
        "command_id",
        "id",
        "type",
        "command",
        "action",
        "created_at",
        "expires_at",
        "ttl_seconds",
        "cluster_id",
        "agent_id",
    }
)
_UNFIT = frozenset("/?#%")


class MalformedCommand(ShimError):
    """A command that cannot be brought into the shape that every agent decodes.

    `command_id` is the controller's id for it, even if the id is the fault; empty without an id.
    """

    def __init__(self, reason: str, command_id: str) -> None:
        super().__init__(reason)
        self.command_id = command_id


class ParsedCommand(msgspec.Struct, frozen=True):
    """A normalised command. `created_at` is RFC 3339 UTC, `expires_unix` Unix seconds; the target ids may be empty."""

    id: str
    type: str
    payload: dict[str, Any]
    created_at: str
    expires_unix: float
    cluster_id: str
    agent_id: str

    def record(self, session: SessionKey, request_id: str, arrived_unix: float, via: str) -> CommandRecord:
        """Return the command as it is stored.

        Its size is what it adds to a poll reply, including its comma. Very many values add to it what they take in
        memory, because waiting commands are kept there.
        """
        encoded = msgspec.json.encode(OfferedCommand(self.id, self.type, self.payload, self.created_at))
        return CommandRecord(
            session=session,
            id=self.id,
            type=self.type,
            payload=self.payload,
            created_at=self.created_at,
            arrived_unix=arrived_unix,
            expires_unix=self.expires_unix,
            request_id=request_id,
            size_bytes=len(encoded) + 1 + memory_of_values(encoded),
            via=via,
        )


def parse_command(message: Message, wall: float, ttl_s: float, new_id: Callable[[], str]) -> ParsedCommand:
    """Normalise a command that arrived at `wall` (Unix seconds). Raises `MalformedCommand`."""
    payload = message.payload
    command_id = _command_id(payload, message.request_id, new_id)
    if message.fault:
        raise MalformedCommand(message.fault, command_id)
    if len(message.request_id) > MAX_REQUEST_ID_CHARS:
        raise MalformedCommand(f"the request_id may have {MAX_REQUEST_ID_CHARS} characters", command_id)
    _check_decodable(payload, command_id)
    kind = _command_type(payload, command_id)
    return ParsedCommand(
        id=command_id,
        type=kind,
        payload=_command_payload(payload),
        created_at=_created_at(payload, message.timestamp, wall),
        expires_unix=_expires_unix(payload, message.timestamp, wall, ttl_s),
        cluster_id=_scalar(payload.get("cluster_id")),
        agent_id=_scalar(payload.get("agent_id")),
    )


def _check_decodable(payload: dict[str, Any], command_id: str) -> None:
    """Reject a command that would make an agent drop its whole batch.

    That is a number that does not fit Go's float64, or nesting beyond `MAX_DEPTH`. Raises `MalformedCommand`.
    """
    level = list(payload.values())
    for _ in range(MAX_DEPTH):
        # A command may have millions of values, and the event loop is blocked meanwhile. So each level is processed by
        # functions in C, without a step of the interpreter per value.
        kinds = set(map(type, level))
        if int in kinds:
            numbers = level if kinds == {int} else [value for value in level if type(value) is int]
            if max(numbers) > MAX_NUMBER or min(numbers) < -MAX_NUMBER:
                raise MalformedCommand("a number is beyond what agents can decode", command_id)
        if kinds.isdisjoint((dict, list)):
            return
        outer = [value for value in level if isinstance(value, (dict, list))]
        level = list(chain.from_iterable(each.values() if isinstance(each, dict) else each for each in outer))
    raise MalformedCommand("the command is nested too deeply", command_id)


def _scalar(value: Any) -> str:
    """Return a string or number as text, `""` for anything else."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else ""


def _command_id(payload: dict[str, Any], request_id: str, new_id: Callable[[], str]) -> str:
    for value in (payload.get("command_id"), payload.get("id"), request_id):
        found = _scalar(value)
        if found:
            # Agents insert the id into the path of their result without escaping. A command whose id cannot be part of
            # a path could never be answered.
            if len(found.encode("utf-8", "replace")) > MAX_ID_BYTES or not found.isprintable() or _UNFIT & set(found):
                raise MalformedCommand(
                    "the command id must be 1-256 printable bytes without any of / ? # %", found[:MAX_ECHO_CHARS]
                )
            if found in (".", ".."):
                raise MalformedCommand("the command id must not be a dot segment", found)
            return found
    return new_id()


def _command_type(payload: dict[str, Any], command_id: str) -> str:
    present = [payload[key] for key in ("type", "command", "action") if payload.get(key) not in (None, "")]
    for value in present:
        if isinstance(value, str):
            if len(value) > MAX_WORD_CHARS:
                raise MalformedCommand(f"the command type may have {MAX_WORD_CHARS} characters", command_id)
            return value
    if present:
        raise MalformedCommand("the command type must be a string", command_id)
    return "command"


def _command_payload(payload: dict[str, Any]) -> dict[str, Any]:
    for key in _PAYLOAD_KEYS:
        value = payload.get(key)
        if value is not None:
            return value if isinstance(value, dict) else {"value": value}
    return {key: value for key, value in payload.items() if key not in _OWN_KEYS}


def _created_at(payload: dict[str, Any], timestamp: str, wall: float) -> str:
    for value in (payload.get("created_at"), timestamp):
        moment = form.parse(value)
        if moment is not None:
            try:
                return form.utc_text(moment)
            except OverflowError:
                continue
    return rfc3339(wall)


def _expires_unix(payload: dict[str, Any], timestamp: str, wall: float, ttl_s: float) -> float:
    expires = parse_rfc3339(payload.get("expires_at"))
    if expires is not None:
        # The controller's clock may be wrong, so only the time between sending and expiry counts.
        sent = parse_rfc3339(timestamp)
        return expires + (wall - sent) if sent is not None else expires
    ttl = payload.get("ttl_seconds")
    if isinstance(ttl, (int, float)) and not isinstance(ttl, bool) and 0 <= ttl < 1e10:
        return wall + ttl
    return wall + ttl_s
