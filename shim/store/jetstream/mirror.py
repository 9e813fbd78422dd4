"""What the streams hold, as tables in memory: operations are carried out here first, by the code of the SQLite store.

Triggers note which rows an operation touched; those are what is written to JetStream. A transaction stays open until
that has happened or has failed, so that the mirror never holds what was refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shim.core.records import Loaded, Operation
from shim.store import schema
from shim.store.jetstream import images
from shim.store.jetstream.images import Image
from shim.store.jetstream.layout import Kind, RowKey
from shim.store.loading import load
from shim.store.operations import Operations

# Without a key: inside a trigger an upsert's policy would take the place of `OR IGNORE`.
_TOUCHED = "CREATE TEMP TABLE touched (kind TEXT, first, second)"
_COMMAND = "SELECT '{kind}', session, id FROM commands WHERE seq = {row}.command"
# (table, event, condition, kinds, key columns, rows)
_WATCHED: tuple[tuple[str, str, str, str, str, str], ...] = (
    ("commands", "INSERT", "", "wcr", "{row}.session, {row}.id", "NEW"),
    ("commands", "DELETE", "", "wcr", "{row}.session, {row}.id", "OLD"),
    ("commands", "UPDATE", "", "c", "{row}.session, {row}.id", "NEW"),
    ("commands", "UPDATE OF result", "", "r", "{row}.session, {row}.id", "NEW"),
    ("commands", "UPDATE OF session", "WHEN OLD.session <> NEW.session", "wcr", "{row}.session, {row}.id", "OLD NEW"),
    ("outbox", "INSERT", "", "o", "{row}.session, {row}.seq", "NEW"),
    ("outbox", "DELETE", "", "o", "{row}.session, {row}.seq", "OLD"),
    ("outbox", "UPDATE", "", "o", "{row}.session, {row}.seq", "OLD NEW"),
    ("unknown_results", "INSERT", "", "u", "{row}.session, {row}.command_id", "NEW"),
    ("unknown_results", "DELETE", "", "u", "{row}.session, {row}.command_id", "OLD"),
    ("unknown_results", "UPDATE", "", "u", "{row}.session, {row}.command_id", "OLD NEW"),
    ("lone_traces", "INSERT", "", "l", "{row}.session, {row}.command_id", "NEW"),
    ("lone_traces", "DELETE", "", "l", "{row}.session, {row}.command_id", "OLD"),
    ("lone_traces", "UPDATE", "", "l", "{row}.session, {row}.command_id", "OLD NEW"),
    ("sessions", "INSERT", "", "s", "{row}.session, ''", "NEW"),
    ("sessions", "DELETE", "", "s", "{row}.session, ''", "OLD"),
    ("sessions", "UPDATE", "", "s", "{row}.session, ''", "OLD NEW"),
    ("aliases", "INSERT", "", "a", "{row}.owner, {row}.agent_id", "NEW"),
    ("aliases", "DELETE", "", "a", "{row}.owner, {row}.agent_id", "OLD"),
    ("aliases", "UPDATE", "", "a", "{row}.owner, {row}.agent_id", "OLD NEW"),
    ("tunnels", "INSERT", "", "t", "{row}.session, ''", "NEW"),
    ("tunnels", "DELETE", "", "t", "{row}.session, ''", "OLD"),
    ("tunnels", "UPDATE", "", "t", "{row}.session, ''", "OLD NEW"),
    ("quarantine", "INSERT", "", "q", "{row}.id, ''", "NEW"),
    ("quarantine", "UPDATE", "", "q", "{row}.id, ''", "NEW"),
    ("meta", "INSERT", "WHEN NEW.key = 'owner_key'", "m", "{row}.key, ''", "NEW"),
)


def _triggers() -> Iterable[str]:
    for number, (table, event, condition, kinds, columns, rows) in enumerate(_WATCHED):
        notes = "".join(
            f"INSERT INTO touched SELECT '{kind}', {columns.format(row=row)}; "
            for row in rows.split()
            for kind in kinds
        )
        yield f"CREATE TEMP TRIGGER watch_{number} AFTER {event} ON main.{table} {condition} BEGIN {notes} END"
    for row, event in (("NEW", "INSERT"), ("OLD", "DELETE")):
        note = f"INSERT INTO touched {_COMMAND.format(kind='c', row=row)};"
        yield f"CREATE TEMP TRIGGER watch_trace_{event} AFTER {event} ON main.traces BEGIN {note} END"


class Mirror:
    """Used in one thread. `begin` … `carry_out`* … `commit` or `roll_back`."""

    def __init__(self) -> None:
        self._connection = schema.connect("file::memory:", timeout_s=0.0)
        schema.migrate(self._connection)
        self._connection.execute("PRAGMA temp_store = MEMORY")
        self._cursor = self._connection.cursor()
        self._operations = Operations(self._cursor)
        self._has_savepoint = False

    def fill(self, rows: Iterable[Image], high: Mapping[str, int]) -> tuple[Loaded, int]:
        """Take what the streams hold, once. Returns what the core wants of it, and how many rows were no use.

        What loading changes (the key at the first opening, rows put aside) is the next `changes()`.
        """
        self._cursor.execute("BEGIN")
        refused = images.insert(self._cursor, rows)
        for table in ("commands", "outbox"):
            (highest,) = self._cursor.execute(f"SELECT coalesce(max(seq), 0) FROM {table}").fetchone()  # noqa: S608 - names of ours
            self._cursor.execute("DELETE FROM sqlite_sequence WHERE name = ?", (table,))
            number = max(highest, high.get(table, 0))
            self._cursor.execute("INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)", (table, number))
        self._cursor.execute("COMMIT")
        self._cursor.execute(_TOUCHED)
        for trigger in _triggers():
            self._cursor.execute(trigger)
        return load(self._connection), refused

    def begin(self) -> None:
        self._cursor.execute("BEGIN")
        self._has_savepoint = False

    def carry_out(self, operations: Sequence[Operation]) -> tuple[list[Any], dict[RowKey, bytes | None]]:
        """One result per operation, and the rows that they changed; on any exception nothing happened."""
        if self._has_savepoint:
            self._cursor.execute("RELEASE submission")
        self._cursor.execute("SAVEPOINT submission")
        self._has_savepoint = True
        try:
            results = self._operations.carry_out(operations)
            return results, self.changes()
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """As if the last `carry_out` of this transaction had never been."""
        self._cursor.execute("ROLLBACK TO submission")

    def changes(self) -> dict[RowKey, bytes | None]:
        """Rows touched since the last call, as they are now; `None` where one is gone."""
        touched = self._cursor.execute("SELECT DISTINCT kind, first, second FROM touched").fetchall()
        self._cursor.execute("DELETE FROM touched")
        keys = (RowKey(Kind(kind), str(first), str(second)) for kind, first, second in touched)
        return {key: images.read(self._cursor, key) for key in keys}

    def high(self) -> dict[str, int]:
        """The highest numbers given so far."""
        return dict(self._cursor.execute("SELECT name, seq FROM sqlite_sequence WHERE name IN ('commands', 'outbox')"))

    def commit(self) -> None:
        self._cursor.execute("COMMIT")

    def roll_back(self) -> None:
        if self._connection.in_transaction:
            self._cursor.execute("ROLLBACK")

    def close(self) -> None:
        self._connection.close()
