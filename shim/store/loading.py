"""What a database holds when it is opened."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from shim.core.records import Loaded
from shim.store import quarantine, rows
from shim.store.rows import UndecodableRow

_KEY_BYTES = 32
_Record = TypeVar("_Record")


class _Table(msgspec.Struct, frozen=True):
    """What to read of a table: `columns` of the rows that meet `condition`, sorted by `order`; `id` names a row."""

    name: str
    id: str
    columns: str
    order: str
    condition: str = "true"

    @property
    def query(self) -> str:
        # Constants of this module only; nothing that was ever input becomes SQL.
        return f"SELECT {self.id}, {self.columns} FROM {self.name} WHERE {self.condition} ORDER BY {self.order}"  # noqa: S608 - constants


# A state that nobody knows is among what is read, so that it is found.
_COMMANDS = _Table(
    "commands",
    "seq",
    rows.COMMAND_COLUMNS,
    order="seq",
    condition="state NOT IN ('delivered', 'answered', 'closed', 'expired', 'dead')",
)
_SESSIONS = _Table("sessions", "id", rows.SESSION_COLUMNS, order="session")
_ALIASES = _Table("aliases", "id", "owner, agent_id, session", order="owner, agent_id")
_TUNNELS = _Table("tunnels", "id", "session, payload", order="session")
_OUTBOX = _Table("outbox", "seq", "owner, session, command_id, request_id", order="seq")


class _Reader:
    """Reads tables and puts aside what cannot be decoded."""

    def __init__(self, cursor: sqlite3.Cursor) -> None:
        self._cursor = cursor
        self.quarantined = 0
        self.unanswerable: list[quarantine.QuarantinedCommand] = []

    def read(self, table: _Table, decode: Callable[[tuple[Any, ...]], _Record]) -> list[_Record]:
        records = []
        bad = []
        for number, *row in self._cursor.execute(table.query):
            try:
                records.append(decode(tuple(row)))
            except UndecodableRow as error:
                bad.append((number, row, str(error)))
        for number, row, reason in bad:
            self._put_aside(table, number, row, reason)
        return records

    def _put_aside(self, table: _Table, number: int, row: list[Any], reason: str) -> None:
        content = dict(zip(table.columns.split(", "), row, strict=True))
        command = quarantine.keep(self._cursor, table.name, content, reason)
        self._cursor.execute(f"DELETE FROM {table.name} WHERE {table.id} = ?", (number,))  # noqa: S608 - constants
        self.quarantined += 1
        if table is _COMMANDS and (command[0] is None or not command[1]):
            self.unanswerable.append(command)

    def key(self) -> bytes:
        """The store's key for owner ids; made at the first opening, and again where it is not what it should be."""
        row = self._cursor.execute("SELECT value FROM meta WHERE key = 'owner_key'").fetchone()
        if row is not None and isinstance(row[0], bytes) and len(row[0]) == _KEY_BYTES:
            return row[0]
        if row is not None:
            quarantine.keep(self._cursor, "meta", {"key": "owner_key"}, "not a key of 32 bytes")
            self.quarantined += 1
        key = secrets.token_bytes(_KEY_BYTES)
        self._cursor.execute("INSERT OR REPLACE INTO meta (key, value) VALUES ('owner_key', ?)", (key,))
        return key


def load(connection: sqlite3.Connection) -> Loaded:
    """Read everything that the core wants at the start, in one transaction. Raises `sqlite3.Error`."""
    cursor = connection.cursor()
    cursor.execute("BEGIN IMMEDIATE")
    reader = _Reader(cursor)
    key = reader.key()
    sessions = reader.read(_SESSIONS, rows.session)
    aliases = reader.read(_ALIASES, rows.alias)
    tunnels = reader.read(_TUNNELS, rows.tunnel)
    commands = reader.read(_COMMANDS, rows.command)
    owners = sorted(set(reader.read(_OUTBOX, rows.outbox_owner)))
    pending = quarantine.pending(cursor)
    cursor.execute("COMMIT")
    return Loaded(
        key=key,
        sessions=tuple(sessions),
        aliases=tuple(aliases),
        tunnels=tuple(tunnels),
        commands=tuple(commands),
        outbox_owners=tuple(owners),
        quarantined=reader.quarantined,
        quarantined_commands=(*reader.unanswerable, *pending),
    )
