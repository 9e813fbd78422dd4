"""Copy a whole store, file or database, into an empty one: `agent-shim store copy`.

The target is written in one transaction and read back before the commit. An interrupted copy therefore leaves the
target unchanged and can be started again. Both stores are locked during the copy.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec

from shim.config import settings
from shim.errors import StoreError
from shim.store import schema
from shim.store.schema import TABLES, Table
from shim.store.sqlite import SqliteStore


class End(Protocol):
    """Source or target of a copy, in an open transaction."""

    def key(self) -> bytes | None:
        """Return the key for owner ids, `None` if the store was never used."""

    def read(self, table: Table) -> Iterator[tuple[Any, ...]]:
        """Yield all rows of a table in the order of its key columns."""

    def write(self, table: Table, rows: Iterator[tuple[Any, ...]]) -> None:
        """Insert rows into an empty table."""

    def finish(self, key: bytes) -> None:
        """Set the key for owner ids and commit the transaction."""


def copy(source: settings.Store, target: settings.Store) -> dict[str, tuple[int, int]]:
    """Copy one store into another, which must be empty. Blocks.

    Returns the number of copied rows of each table, and of rows left out because a column has the wrong type. Raises
    `StoreError`; the target is then unchanged.
    """
    copied_rows: dict[str, int] = {}
    left_out = Counter[str]()
    with ExitStack() as stack:
        origin = stack.enter_context(_opened(source, "--from"))
        copied = stack.enter_context(_opened(target, "--to"))
        for table in TABLES:
            if next(copied.read(table), None) is not None:
                raise StoreError(f"--to: the store is not empty: there are rows in {table.name}")
        key = origin.key()
        if key is None:
            raise StoreError("--from: the store was never used")
        for table in TABLES:
            read, written = hashlib.sha256(), hashlib.sha256()
            copied.write(table, _digested(_fitting(table, origin, left_out), read))
            copied_rows[table.name] = sum(1 for _ in _digested(copied.read(table), written))
            if read.digest() != written.digest():
                raise StoreError(f"--to: what was written to {table.name} is not what was read: nothing was kept")
        copied.finish(key)
    return {name: (rows, left_out[name]) for name, rows in copied_rows.items()}


def _fitting(table: Table, origin: End, left_out: Counter[str]) -> Iterator[tuple[Any, ...]]:
    for row in origin.read(table):
        if table.fits(row):
            # PostgreSQL rejects NUL characters in text: replace each with the visible symbol for NUL.
            yield tuple(each.replace("\0", "␀") if isinstance(each, str) else each for each in row)
        else:
            left_out[table.name] += 1


def _digested(rows: Iterator[tuple[Any, ...]], digest: hashlib._Hash) -> Iterator[tuple[Any, ...]]:
    """Yield the rows unchanged, and add each to the digest."""
    for row in rows:
        plain = [int(each) if isinstance(each, bool) else each for each in row]  # SQLite has integers only
        digest.update(msgspec.msgpack.encode(plain))
        yield row


@contextmanager
def _opened(configured: settings.Store, option: str) -> Iterator[End]:
    if not configured.url:
        with _file(Path(configured.path), option) as end:
            yield end
        return
    try:
        from shim.store.postgres.offline import copy_end  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise StoreError(f"{option} needs the extra agent-shim[postgres]: {error.name} is not installed") from error
    with copy_end(configured, option) as end:
        yield end


class _File:
    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def key(self) -> bytes | None:
        """Return the key for owner ids, or None if there is none (`End.key`)."""
        row = self._connection.execute("SELECT value FROM meta WHERE key = 'owner_key'").fetchone()
        return row[0] if row is not None and isinstance(row[0], bytes) else None

    def read(self, table: Table) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of a table in order."""
        yield from self._connection.cursor().execute(table.select)

    def write(self, table: Table, rows: Iterator[tuple[Any, ...]]) -> None:
        """Insert rows into a table."""
        marks = ", ".join("?" * len(table.names))
        statement = f"INSERT INTO {table.name} ({', '.join(table.names)}) VALUES ({marks})"  # noqa: S608 - constants
        self._connection.executemany(statement, rows)

    def finish(self, key: bytes) -> None:
        """Store the key for owner ids and commit."""
        self._connection.execute("UPDATE meta SET value = ? WHERE key = 'owner_key'", (key,))
        self._connection.execute("COMMIT")


@contextmanager
def _file(path: Path, option: str) -> Iterator[_File]:
    """Open a file for copying.

    A `SqliteStore` stays open on it during the copy: the store migrates the schema and holds the lock that keeps
    other processes out.
    """
    if option == "--from" and not path.exists():
        raise StoreError(f"{option}: there is no such file")
    # The path may be a slip of the pen: a file that is no database must not be moved aside, and an empty one be copied.
    store = SqliteStore(path, lambda _callback: None, replace_corrupt=False)
    try:
        store.open()
    except StoreError as error:
        raise StoreError(f"{option}: {error}; {path} is left as it is") from error
    try:
        uri = f"{path.resolve().as_uri()}?mode=rw"
        with closing(schema.connect(uri, 5.0)) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")
            yield _File(connection)
    finally:
        store.close()
