"""Tables of the store, their migrations on SQLite, and the check of the schema version.

Migrations only add tables and columns, and every statement of this package names its columns. A shim can therefore use
the database of a later version as long as its `min_reader_version` is not above this shim's `SCHEMA_VERSION`.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from shim.core.shards import shard_of
from shim.errors import StoreError, StoreVersionError
from shim.store.files import has_log

APPLICATION_ID = 0x41534D31

# States of commands that have ended. A query uses the index for `Prune` only if it repeats this condition literally.
# `state <> 'queued'` is redundant; it lets SQLite skip the IN list for queued rows, a third of the cost of an insert.
ENDED = "state <> 'queued' AND state IN ('delivered', 'closed', 'expired', 'dead')"


class Migration(msgspec.Struct, frozen=True):
    """One version of the schema. `script` holds its statements, separated by semicolons that occur nowhere else.

    `min_reader_version` is the oldest schema version whose shim may still use the result. PostgreSQL has the same
    tables, with an additional column at `{shard}`. `sqlite` holds statements for SQLite only.
    """

    min_reader_version: int
    script: str
    sqlite: str = ""


_SQLITE_1 = f"""
PRAGMA application_id = {APPLICATION_ID};
CREATE TABLE meta (key TEXT PRIMARY KEY, value NOT NULL);
CREATE INDEX commands_ended ON commands (updated) WHERE {ENDED};
CREATE INDEX outbox_by_owner ON outbox (owner);
CREATE INDEX lone_traces_by_wall ON lone_traces (wall)
"""

_VERSION_1 = """
-- updated: wall time of the last change of state. result: repeats the payload of the outbox entry, which goes when the
-- controller has it, while a duplicate of the command must still be answered. first_step: the event of the first step
-- in the command's trace, if it happened at `arrived` with `type` for its detail, as nearly all do: that saves a row.
CREATE TABLE commands (
    {shard}seq INTEGER PRIMARY KEY AUTOINCREMENT,
    session TEXT NOT NULL,
    id TEXT NOT NULL,
    request_id TEXT NOT NULL,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    updated REAL NOT NULL,
    arrived REAL NOT NULL,
    expires REAL NOT NULL,
    size_bytes INTEGER NOT NULL,
    type TEXT NOT NULL,
    created_at TEXT NOT NULL,
    payload BLOB NOT NULL,
    via TEXT NOT NULL,
    first_step TEXT NOT NULL,
    result BLOB
);
CREATE UNIQUE INDEX commands_by_id ON commands (session, id);

CREATE TABLE outbox (
    {shard}seq INTEGER PRIMARY KEY AUTOINCREMENT,
    owner TEXT NOT NULL,
    session TEXT NOT NULL,
    command_id TEXT NOT NULL,
    request_id TEXT NOT NULL,
    payload BLOB NOT NULL
);
CREATE INDEX outbox_by_command ON outbox (session, command_id);

-- Results for ids that were not known: the first one was forwarded, repeats must not be.
CREATE TABLE unknown_results (
    {shard}session TEXT NOT NULL,
    command_id TEXT NOT NULL,
    wall REAL NOT NULL,
    PRIMARY KEY (session, command_id)
);

CREATE TABLE traces (
    id INTEGER PRIMARY KEY,
    command INTEGER NOT NULL,
    wall REAL NOT NULL,
    event TEXT NOT NULL,
    detail TEXT NOT NULL
);
CREATE INDEX traces_by_command ON traces (command);

-- Steps of commands that have no row: rejected ones, unknown ones.
CREATE TABLE lone_traces (
    {shard}id INTEGER PRIMARY KEY,
    session TEXT NOT NULL,
    command_id TEXT NOT NULL,
    wall REAL NOT NULL,
    event TEXT NOT NULL,
    detail TEXT NOT NULL
);
CREATE INDEX lone_traces_by_command ON lone_traces (session, command_id);

CREATE TABLE sessions (
    {shard}id INTEGER PRIMARY KEY,
    session TEXT NOT NULL UNIQUE,
    dialect TEXT NOT NULL,
    agent_id TEXT NOT NULL,
    upstream_cluster_id TEXT NOT NULL,
    last_seen REAL NOT NULL,
    superseded_by TEXT NOT NULL,
    registration BLOB NOT NULL,
    reply BLOB NOT NULL,
    hold BLOB NOT NULL
);

CREATE TABLE aliases (
    {shard}id INTEGER PRIMARY KEY,
    owner TEXT NOT NULL,
    agent_id TEXT NOT NULL,
    session TEXT NOT NULL,
    UNIQUE (owner, agent_id)
);
CREATE INDEX aliases_by_session ON aliases (session);

CREATE TABLE tunnels (
    {shard}id INTEGER PRIMARY KEY,
    session TEXT NOT NULL UNIQUE,
    payload BLOB NOT NULL
);

-- Rows that could not be decoded. pending: a command of which the controller has not been told yet.
CREATE TABLE quarantine (
    {shard}id INTEGER PRIMARY KEY,
    origin TEXT NOT NULL,
    session TEXT NOT NULL,
    command_id TEXT NOT NULL,
    request_id TEXT NOT NULL,
    reason TEXT NOT NULL,
    content BLOB NOT NULL,
    pending INTEGER NOT NULL
);
CREATE INDEX quarantine_pending ON quarantine (session, command_id) WHERE pending
"""

# steps: the steps of the trace after the first one, each a JSON array of `TraceEntry` followed by a comma. Nearly every
# step belongs to a change of the row, so it costs no row and no statement of its own. Further steps of a long trace
# are rows of `traces` (`rows.MAX_STEPS_CHARS`); on PostgreSQL a final space says so.
_VERSION_2 = "ALTER TABLE commands ADD COLUMN steps TEXT NOT NULL DEFAULT ''"

MIGRATIONS = (
    Migration(min_reader_version=1, script=_VERSION_1, sqlite=_SQLITE_1),
    Migration(min_reader_version=1, script=_VERSION_2),
)
SCHEMA_VERSION = len(MIGRATIONS)


def _number(connection: sqlite3.Connection, statement: str) -> int:
    row = connection.execute(statement).fetchone()
    return row[0] if row is not None and isinstance(row[0], int) else 0


def check_version(connection: sqlite3.Connection) -> None:
    """Raise `StoreVersionError` for a database that needs a newer shim, `StoreError` for another application's.

    A database without tables is new and passes.
    """
    if _number(connection, "SELECT count(*) FROM sqlite_master") == 0:
        return
    if _number(connection, "PRAGMA application_id") != APPLICATION_ID:
        raise StoreError("the file at store.path is the database of another application")
    wanted = _number(connection, "SELECT value FROM meta WHERE key = 'min_reader_version'")
    if wanted > SCHEMA_VERSION:
        raise StoreVersionError(
            f"the database needs a shim that knows schema version {wanted}; this one knows {SCHEMA_VERSION}"
        )


def check_untouched(path: Path, timeout_s: float) -> None:
    """Run `check_version` without creating or changing a file. Errors of SQLite are ignored.

    Such errors are reported when the file is opened for writing, under locks. If the `-wal` is empty, everything is in
    the file itself (`migrate` ensures that for the version), and `immutable` keeps SQLite from creating files.
    """
    uri = f"{path.absolute().as_uri()}?mode=ro{'' if has_log(path) else '&immutable=1'}"
    with contextlib.suppress(sqlite3.Error), contextlib.closing(connect(uri, timeout_s)) as connection:
        check_version(connection)


def connect(uri: str, timeout_s: float) -> sqlite3.Connection:
    """Open a connection without implicit transactions. It may be used in another thread and decodes any text."""
    connection = sqlite3.connect(uri, timeout=timeout_s, isolation_level=None, check_same_thread=False, uri=True)
    connection.text_factory = _text
    return connection


def _text(raw: bytes) -> str | bytes:
    """Decode a text column, or return its bytes if it is not UTF-8: one bad row must not fail the whole query."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def migrate(connection: sqlite3.Connection, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Apply the missing `migrations`, each in one transaction. Raises `sqlite3.Error`."""
    changed = False
    while _next_migration(connection, migrations):
        changed = True
    if changed:
        # The version must be in the database file itself, because `check_untouched` does not read an empty log.
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _next_migration(connection: sqlite3.Connection, migrations: Sequence[Migration]) -> bool:
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = _number(connection, "PRAGMA user_version")
        if version < len(migrations):
            migration = migrations[version]
            script = migration.script.replace("{shard}", "")
            for statement in [*script.split(";"), *migration.sqlite.split(";")]:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {version + 1}")
            connection.execute(
                "INSERT INTO meta (key, value) VALUES ('min_reader_version', ?)"
                " ON CONFLICT (key) DO UPDATE SET value = max(value, excluded.value)",
                (migrations[version].min_reader_version,),
            )
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return version < len(migrations)


_KINDS: dict[str, tuple[type, ...]] = {
    "t": (str,),
    "i": (int,),
    "f": (float, int),
    "b": (bytes,),
    "n": (bytes, type(None)),
    "o": (bool, int),
}


class Table(msgspec.Struct, frozen=True):
    """A table and its columns, each as `name:kind`. The first `key` columns define the order of rows."""

    name: str
    columns: str
    key: int = 1

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        return [each.partition(":")[0] for each in self.columns.split()]

    @property
    def select(self) -> str:
        """The SQL that reads all rows in the order of the key."""
        order = ", ".join(self.names[: self.key])
        return f"SELECT {', '.join(self.names)} FROM {self.name} ORDER BY {order}"  # noqa: S608 - constants

    def fits(self, row: Sequence[Any]) -> bool:
        """Return whether every column has its type, which SQLite does not enforce."""
        kinds = (each.partition(":")[2] for each in self.columns.split())
        return all(isinstance(value, _KINDS[kind]) for value, kind in zip(row, kinds, strict=True))


TABLES = (
    Table("sessions", "id:i session:t dialect:t agent_id:t upstream_cluster_id:t last_seen:f superseded_by:t"
          " registration:b reply:b hold:b"),
    Table("aliases", "id:i owner:t agent_id:t session:t"),
    Table("tunnels", "id:i session:t payload:b"),
    Table("commands", "seq:i session:t id:t request_id:t state:t attempts:i updated:f arrived:f expires:f size_bytes:i"
          " type:t created_at:t payload:b via:t first_step:t result:n steps:t"),
    Table("outbox", "seq:i owner:t session:t command_id:t request_id:t payload:b"),
    Table("unknown_results", "session:t command_id:t wall:f", key=2),
    Table("traces", "id:i command:i wall:f event:t detail:t"),
    Table("lone_traces", "id:i session:t command_id:t wall:f event:t detail:t"),
    Table("quarantine", "id:i origin:t session:t command_id:t request_id:t reason:t content:b pending:o"),
)  # fmt: skip


def shard_of_session(session: str, shards: int) -> int:
    """Return the shard of a session column. Text that is not a session key belongs to shard 0."""
    return shard_of(session.partition("/")[0], shards)
