"""Records as rows: encoding, decoding, the quarantine of rows that cannot be decoded, and the contents at start-up.

Every column is validated, because SQLite does not enforce column types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import msgspec

from shim.core.records import (
    ARRIVED,
    CommandRecord,
    CommandState,
    PutCommand,
    SessionKey,
    SessionRecord,
    StoreContents,
    TraceEntry,
)
from shim.errors import ShimError
from shim.protocol.lenient_json import to_float
from shim.store.database import Database

COMMAND_COLUMNS = (
    "seq, session, id, request_id, state, attempts, arrived, expires, size_bytes, type, created_at, payload, via"
)
SESSION_COLUMNS = "session, dialect, agent_id, upstream_cluster_id, last_seen, superseded_by, registration, reply, hold"

encode_json = msgspec.json.Encoder().encode
_decode_object = msgspec.json.Decoder(dict[str, Any], float_hook=to_float).decode
# Limit for the steps in a command's row, because each step writes the row anew. Further steps are rows of `traces`.
MAX_STEPS_CHARS = 1000
_decode_steps = msgspec.json.Decoder(list[tuple[float, str, str]]).decode
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


# In the thread that imports this: msgspec builds what it knows of a type at its first use, which is not safe in several
# threads at once, and each shard has a thread.
for _kind in (_CommandRow, _SessionRow, _AliasRow, _TunnelRow, _OutboxKeys):
    msgspec.json.Decoder(_kind)


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


def insert_parameters(operation: PutCommand) -> tuple[Any, ...]:
    """Return the parameters of `operations.INSERT_COMMAND`."""
    record, offered = operation.record, operation.offered
    return (
        str(record.session),
        record.id,
        record.request_id,
        record.state._value_,  # `value` is a property call, too slow for a line that runs for every command
        record.attempts,
        record.arrived_unix,
        record.arrived_unix,
        record.expires_unix,
        record.size_bytes,
        record.type,
        record.created_at,
        encode_json(record.payload),
        record.via,
        ARRIVED,
        encode_step(offered) if offered is not None else "",
    )


def encode_step(entry: TraceEntry) -> str:
    """Return a step as it is appended to the column `steps`."""
    return encode_json((entry.wall, entry.event, entry.detail)).decode() + ","


def decode_steps(column: Any) -> list[TraceEntry]:
    """Decode the column `steps`. An unreadable one has no steps."""
    try:
        steps = _decode_steps(f"[{column.rstrip(', ')}]")
    except (AttributeError, msgspec.MsgspecError, TypeError, ValueError, RecursionError):
        return []
    return [TraceEntry(*step) for step in steps]


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


# --- quarantine -------------------------------------------------------------------------------------------------------

MAX_QUARANTINED = 256
MAX_COLUMN_CHARS = 64 * 1024
"""Limit per column: the beginning is enough for an operator to recognise the row."""
_QUARANTINE = (
    "INSERT INTO quarantine (origin, session, command_id, request_id, reason, content, pending)"
    " VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)"
)
_TRIM_QUARANTINE = (
    "DELETE FROM quarantine WHERE {mine} AND NOT pending AND id <="
    " (SELECT id FROM quarantine WHERE {mine} AND NOT pending ORDER BY id DESC LIMIT 1 OFFSET ?1)"
)
_PENDING = "SELECT session, command_id, request_id FROM quarantine WHERE {mine} AND pending ORDER BY id"

QuarantinedCommand = tuple[SessionKey | None, str, str]


def quarantine(database: Database, origin: str, content: dict[str, Any], reason: str) -> QuarantinedCommand:
    """Store the columns of a row of the table `origin`. The caller deletes the row itself.

    Returns (session, command id, request id) as far as these are readable. A command whose session and id are readable
    stays pending until a `PutOutbox` for it is stored, so that the controller gets an answer. Columns are cut at
    `MAX_COLUMN_CHARS`. Of the rows that are not pending, the newest `MAX_QUARANTINED` are kept.
    """
    session, request_id = _readable(content, "session"), _readable(content, "request_id")
    command_id = _readable(content, "id" if origin == "commands" else "command_id")
    try:
        key = parse_key(session)
    except UndecodableRow:
        key = None
    pending = origin == "commands" and key is not None and bool(command_id)
    database.execute(
        _QUARANTINE, (origin, session, command_id, request_id, reason, encode_json(_cut(content)), pending)
    )
    database.execute(_TRIM_QUARANTINE.format(mine=database.mine), (MAX_QUARANTINED,))
    return key, command_id, request_id


def _cut(content: dict[str, Any]) -> dict[str, Any]:
    long = {name: value for name, value in content.items() if isinstance(value, str | bytes)}
    return {**content, **{name: value[:MAX_COLUMN_CHARS] for name, value in long.items()}}


def _readable(content: dict[str, Any], column: str) -> str:
    value = content.get(column)
    return value if isinstance(value, str) else ""


def _pending(database: Database) -> list[QuarantinedCommand]:
    """Return the quarantined commands that the controller has no answer for, oldest first."""
    found = database.execute(_PENDING.format(mine=database.mine)).fetchall()
    return [(parse_key(session), command_id, request_id) for session, command_id, request_id in found]


# --- contents at start-up ---------------------------------------------------------------------------------------------

_Record = TypeVar("_Record")


class _Table(msgspec.Struct, frozen=True):
    """A query of one table: `columns` of the rows that meet `condition`, sorted by `order`. `id` is the key column."""

    name: str
    id: str
    columns: str
    order: str
    condition: str = "{mine}"

    def query(self, database: Database) -> str:
        """Return the SQL of the query for this database."""
        # Only constants of this module and of the engine become SQL, never input.
        condition = self.condition.format(mine=database.mine, live=database.live)
        return f"SELECT {self.id}, {self.columns} FROM {self.name} WHERE {condition} ORDER BY {self.order}"  # noqa: S608 - constants


_COMMANDS = _Table(
    "commands",
    "seq",
    COMMAND_COLUMNS,
    order="seq",
    condition="{mine} AND {live}",
)
_SESSIONS = _Table("sessions", "id", SESSION_COLUMNS, order="session")
_ALIASES = _Table("aliases", "id", "owner, agent_id, session", order="owner, agent_id")
_TUNNELS = _Table("tunnels", "id", "session, payload", order="session")
_OUTBOX = _Table("outbox", "seq", "owner, session, command_id, request_id", order="seq")


class _Reader:
    """Reader of tables that moves rows it cannot decode to the quarantine."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.quarantined = 0
        self.unanswerable: list[QuarantinedCommand] = []

    def read(self, table: _Table, decode: Callable[[tuple[Any, ...]], _Record]) -> list[_Record]:
        """Return the decoded rows of a table; those that cannot be decoded are moved to the quarantine."""
        records = []
        bad = []
        # One row at a time: rows that cannot be decoded may be large, and together more than the memory has room for.
        found = self._database.execute(table.query(self._database))
        while (columns := found.fetchone()) is not None:
            number, *row = columns
            try:
                records.append(decode(tuple(row)))
            except UndecodableRow as error:
                bad.append((number, str(error)))
        for number, reason in bad:
            self._put_aside(table, number, reason)
        return records

    def _put_aside(self, table: _Table, number: int, reason: str) -> None:
        query = f"SELECT {table.columns} FROM {table.name} WHERE {table.id} = ?1"  # noqa: S608 - constants
        row = self._database.execute(query, (number,)).fetchone()
        content = dict(zip(table.columns.split(", "), row, strict=True))
        command = quarantine(self._database, table.name, content, reason)
        self._database.execute(f"DELETE FROM {table.name} WHERE {table.id} = ?1", (number,))  # noqa: S608 - constants
        self.quarantined += 1
        if table is _COMMANDS and (command[0] is None or not command[1]):
            self.unanswerable.append(command)


def load(database: Database, key: bytes) -> StoreContents:
    """Read all that the core needs at start-up, in a transaction that the caller begins and ends."""
    reader = _Reader(database)
    sessions = reader.read(_SESSIONS, session)
    aliases = reader.read(_ALIASES, alias)
    tunnels = reader.read(_TUNNELS, tunnel)
    commands = reader.read(_COMMANDS, command)
    owners = sorted(set(reader.read(_OUTBOX, outbox_owner)))
    pending = _pending(database)
    return StoreContents(
        key=key,
        sessions=tuple(sessions),
        aliases=tuple(aliases),
        tunnels=tuple(tunnels),
        commands=tuple(commands),
        outbox_owners=tuple(owners),
        quarantined=reader.quarantined,
        quarantined_commands=(*reader.unanswerable, *pending),
    )
