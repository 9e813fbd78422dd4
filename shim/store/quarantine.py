"""Rows that cannot be decoded are kept for people to look at, out of the way of everything else."""

from __future__ import annotations

import sqlite3
from typing import Any

from shim.core.records import SessionKey
from shim.store.rows import UndecodableRow, encode_json, parse_key

QuarantinedCommand = tuple[SessionKey | None, str, str]


def keep(cursor: sqlite3.Cursor, origin: str, content: dict[str, Any], reason: str) -> QuarantinedCommand:
    """Store the columns of a row of the table `origin`; the caller takes the row itself away.

    Returns what can be read of (session, command id, request id). The row of a command stays pending, if these suffice
    to answer the controller, until `answered`.
    """
    session, request_id = _readable(content, "session"), _readable(content, "request_id")
    command_id = _readable(content, "id" if origin == "commands" else "command_id")
    try:
        key = parse_key(session)
    except UndecodableRow:
        key = None
    pending = origin == "commands" and key is not None and bool(command_id)
    cursor.execute(
        "INSERT INTO quarantine (origin, session, command_id, request_id, reason, content, pending)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (origin, session, command_id, request_id, reason, encode_json(content), int(pending)),
    )
    return key, command_id, request_id


def _readable(content: dict[str, Any], column: str) -> str:
    value = content.get(column)
    return value if isinstance(value, str) else ""


def pending(cursor: sqlite3.Cursor) -> list[QuarantinedCommand]:
    """The commands that the controller has not been told about, oldest first."""
    rows = cursor.execute("SELECT session, command_id, request_id FROM quarantine WHERE pending ORDER BY id")
    return [(parse_key(session), command_id, request_id) for session, command_id, request_id in rows]
