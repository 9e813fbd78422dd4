"""Table of rows that cannot be decoded, kept for operators to inspect."""

from __future__ import annotations

from typing import Any

from shim.core.records import SessionKey
from shim.store.database import Database
from shim.store.rows import UndecodableRow, encode_json, parse_key

MAX_ROWS = 256
MAX_COLUMN_CHARS = 64 * 1024
"""Limit per column: the beginning is enough for an operator to recognise the row."""
_INSERT = (
    "INSERT INTO quarantine (origin, session, command_id, request_id, reason, content, pending)"
    " VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)"
)
_TRIM = (
    "DELETE FROM quarantine WHERE {mine} AND NOT pending AND id <="
    " (SELECT id FROM quarantine WHERE {mine} AND NOT pending ORDER BY id DESC LIMIT 1 OFFSET ?1)"
)
_PENDING = "SELECT session, command_id, request_id FROM quarantine WHERE {mine} AND pending ORDER BY id"

QuarantinedCommand = tuple[SessionKey | None, str, str]


def keep(database: Database, origin: str, content: dict[str, Any], reason: str) -> QuarantinedCommand:
    """Store the columns of a row of the table `origin`. The caller deletes the row itself.

    Returns (session, command id, request id) as far as these are readable. A command whose session and id are readable
    stays pending until a `PutOutbox` for it is stored, so that the controller gets an answer. Columns are cut at
    `MAX_COLUMN_CHARS`. Of the rows that are not pending, the newest `MAX_ROWS` are kept.
    """
    session, request_id = _readable(content, "session"), _readable(content, "request_id")
    command_id = _readable(content, "id" if origin == "commands" else "command_id")
    try:
        key = parse_key(session)
    except UndecodableRow:
        key = None
    pending = origin == "commands" and key is not None and bool(command_id)
    database.execute(_INSERT, (origin, session, command_id, request_id, reason, encode_json(_cut(content)), pending))
    database.execute(_TRIM.format(mine=database.mine), (MAX_ROWS,))
    return key, command_id, request_id


def _cut(content: dict[str, Any]) -> dict[str, Any]:
    long = {name: value for name, value in content.items() if isinstance(value, str | bytes)}
    return {**content, **{name: value[:MAX_COLUMN_CHARS] for name, value in long.items()}}


def _readable(content: dict[str, Any], column: str) -> str:
    value = content.get(column)
    return value if isinstance(value, str) else ""


def pending(database: Database) -> list[QuarantinedCommand]:
    """Return the quarantined commands that the controller has no answer for, oldest first."""
    rows = database.execute(_PENDING.format(mine=database.mine)).fetchall()
    return [(parse_key(session), command_id, request_id) for session, command_id, request_id in rows]
