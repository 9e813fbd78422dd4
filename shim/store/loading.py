"""Reading of a database at start-up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from shim.core.records import StoreContents
from shim.store import quarantine, rows
from shim.store.database import Database
from shim.store.rows import UndecodableRow

_Record = TypeVar("_Record")


class _Table(msgspec.Struct, frozen=True):
    """A query of one table: `columns` of the rows that meet `condition`, sorted by `order`. `id` is the key column."""

    name: str
    id: str
    columns: str
    order: str
    condition: str = "{mine}"

    def query(self, database: Database) -> str:
        # Only constants of this module and of the engine become SQL, never input.
        condition = self.condition.format(mine=database.mine, live=database.live)
        return f"SELECT {self.id}, {self.columns} FROM {self.name} WHERE {condition} ORDER BY {self.order}"  # noqa: S608 - constants


_COMMANDS = _Table(
    "commands",
    "seq",
    rows.COMMAND_COLUMNS,
    order="seq",
    condition="{mine} AND {live}",
)
_SESSIONS = _Table("sessions", "id", rows.SESSION_COLUMNS, order="session")
_ALIASES = _Table("aliases", "id", "owner, agent_id, session", order="owner, agent_id")
_TUNNELS = _Table("tunnels", "id", "session, payload", order="session")
_OUTBOX = _Table("outbox", "seq", "owner, session, command_id, request_id", order="seq")


class _Reader:
    """Reader of tables that moves rows it cannot decode to the quarantine."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.quarantined = 0
        self.unanswerable: list[quarantine.QuarantinedCommand] = []

    def read(self, table: _Table, decode: Callable[[tuple[Any, ...]], _Record]) -> list[_Record]:
        records = []
        bad = []
        for number, *row in self._database.execute(table.query(self._database)).fetchall():
            try:
                records.append(decode(tuple(row)))
            except UndecodableRow as error:
                bad.append((number, row, str(error)))
        for number, row, reason in bad:
            self._put_aside(table, number, row, reason)
        return records

    def _put_aside(self, table: _Table, number: int, row: list[Any], reason: str) -> None:
        content = dict(zip(table.columns.split(", "), row, strict=True))
        command = quarantine.keep(self._database, table.name, content, reason)
        self._database.execute(f"DELETE FROM {table.name} WHERE {table.id} = ?1", (number,))  # noqa: S608 - constants
        self.quarantined += 1
        if table is _COMMANDS and (command[0] is None or not command[1]):
            self.unanswerable.append(command)


def load(database: Database, key: bytes) -> StoreContents:
    """Read all that the core needs at start-up, in a transaction that the caller begins and ends."""
    reader = _Reader(database)
    sessions = reader.read(_SESSIONS, rows.session)
    aliases = reader.read(_ALIASES, rows.alias)
    tunnels = reader.read(_TUNNELS, rows.tunnel)
    commands = reader.read(_COMMANDS, rows.command)
    owners = sorted(set(reader.read(_OUTBOX, rows.outbox_owner)))
    pending = quarantine.pending(database)
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
