"""Decoding of rows into records. Every column is validated, because SQLite does not enforce column types."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import msgspec

from shim.core.records import CommandRecord, CommandState, SessionKey, SessionRecord, TraceEntry
from shim.errors import ShimError
from shim.protocol.lenient_json import to_float

COMMAND_COLUMNS = (
    "seq, session, id, request_id, state, attempts, arrived, expires, size_bytes, type, created_at, payload, via"
)
SESSION_COLUMNS = "session, dialect, agent_id, upstream_cluster_id, last_seen, superseded_by, registration, reply, hold"

encode_json = msgspec.json.Encoder().encode
_decode_object = msgspec.json.Decoder(dict[str, Any], float_hook=to_float).decode
_Row = TypeVar("_Row", bound=tuple[Any, ...])


class UndecodableRow(ShimError):
    """A row cannot be decoded. The message gives the reason without any content of the row."""


class _CommandRow(NamedTuple):
    seq: int
    session: str
    id: str
    request_id: str
    state: str
    attempts: int
    arrived: float
    expires: float
    size_bytes: int
    type: str
    created_at: str
    payload: Any
    via: str


class _SessionRow(NamedTuple):
    session: str
    dialect: str
    agent_id: str
    upstream_cluster_id: str
    last_seen: float
    superseded_by: str
    registration: Any
    reply: Any
    hold: Any


class _AliasRow(NamedTuple):
    owner: str
    agent_id: str
    session: str


class _TunnelRow(NamedTuple):
    session: str
    payload: Any


class _OutboxKeys(NamedTuple):
    owner: str
    session: str
    command_id: str
    request_id: str


def _typed(row: tuple[Any, ...], kind: type[_Row]) -> _Row:
    try:
        typed: _Row = msgspec.convert(row, kind)
    except msgspec.ValidationError as error:
        raise UndecodableRow(f"a column has the wrong type: {error}") from None
    return typed


def decode_object(column: Any) -> dict[str, Any]:
    """Decode a column that holds a JSON object. Raises `UndecodableRow`."""
    try:
        return _decode_object(column)
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError) as error:
        raise UndecodableRow(f"no JSON object: {type(error).__name__}") from None


def optional_object(column: Any) -> dict[str, Any] | None:
    """Decode a column that holds a JSON object, or return `None` if it is empty or unreadable."""
    try:
        return decode_object(column)
    except UndecodableRow:
        return None


def parse_key(text: str) -> SessionKey:
    """Decode a column that holds a session key. Raises `UndecodableRow`."""
    try:
        return SessionKey.parse(text)
    except ValueError:
        raise UndecodableRow("no session key") from None


def command(row: tuple[Any, ...]) -> CommandRecord:
    """Decode a row of `COMMAND_COLUMNS`. Raises `UndecodableRow`."""
    typed = _typed(row, _CommandRow)
    try:
        state = CommandState(typed.state)
    except ValueError:
        raise UndecodableRow("no known state") from None
    return CommandRecord(
        session=parse_key(typed.session),
        id=typed.id,
        type=typed.type,
        payload=decode_object(typed.payload),
        created_at=typed.created_at,
        arrived_unix=typed.arrived,
        expires_unix=typed.expires,
        request_id=typed.request_id,
        size_bytes=typed.size_bytes,
        state=state,
        attempts=typed.attempts,
        seq=typed.seq,
        via=typed.via,
    )


def session(row: tuple[Any, ...]) -> SessionRecord:
    """Decode a row of `SESSION_COLUMNS`. Raises `UndecodableRow`."""
    typed = _typed(row, _SessionRow)
    if typed.superseded_by:
        parse_key(typed.superseded_by)
    return SessionRecord(
        key=parse_key(typed.session),
        dialect=typed.dialect,
        agent_id=typed.agent_id,
        upstream_cluster_id=typed.upstream_cluster_id,
        last_seen_unix=typed.last_seen,
        registration=decode_object(typed.registration),
        reply=decode_object(typed.reply),
        hold=decode_object(typed.hold),
        superseded_by=typed.superseded_by,
    )


def alias(row: tuple[Any, ...]) -> tuple[str, str, SessionKey]:
    """Decode a row of (owner, agent id, session). Raises `UndecodableRow`."""
    typed = _typed(row, _AliasRow)
    return typed.owner, typed.agent_id, parse_key(typed.session)


def tunnel(row: tuple[Any, ...]) -> tuple[SessionKey, dict[str, Any]]:
    """Decode a row of (session, payload). Raises `UndecodableRow`."""
    typed = _typed(row, _TunnelRow)
    return parse_key(typed.session), decode_object(typed.payload)


def outbox_owner(row: tuple[Any, ...]) -> str:
    """Return the owner of a row (owner, session, command_id, request_id). Raises `UndecodableRow`."""
    typed = _typed(row, _OutboxKeys)
    parse_key(typed.session)
    return typed.owner


def never_stored(key: SessionKey, command_id: str, trace: list[TraceEntry]) -> CommandRecord:
    """Return the record that `FindCommand` reports for a command of which only trace steps are stored."""
    wall = trace[0].wall
    return CommandRecord(
        session=key,
        id=command_id,
        type="",
        payload={},
        created_at="",
        arrived_unix=wall,
        expires_unix=wall,
        state=CommandState.DEAD,
    )
