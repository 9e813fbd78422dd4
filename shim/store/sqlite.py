"""The command store on SQLite: one file, write-ahead log, every commit synced before anybody is told."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from shim.core.records import Loaded, Operation
from shim.errors import StoreError
from shim.ports import StoreDone
from shim.store import files, schema
from shim.store.delivery import Post, deliver, store_error
from shim.store.loading import load
from shim.store.lock import StoreLock
from shim.store.writer import CORRUPT, CommitProbe, Writer

BUSY_TIMEOUT_S = 5.0
# What a damaged file is found by. A plain SQL error means that tables or columns are not what the version says.
_CORRUPT = CORRUPT | {sqlite3.SQLITE_ERROR}
_WAL_LIMIT_BYTES = 16 * 1024 * 1024


class _CorruptError(StoreError):
    """The file is no database of ours any more."""


@contextmanager
def _translated() -> Iterator[None]:
    """Tell damage from trouble that passes (locked, full, unreadable)."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"the file at store.path cannot be used: {error.strerror}") from error
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _CORRUPT:
            raise _CorruptError(str(store_error(error))) from error
        raise store_error(error) from error


class SqliteStore:
    """A `ports.CommandStore` in the file at `path`. It is opened once, by one process at a time.

    `busy_timeout_s` is how long a commit waits for another program that holds the database: a backup, say.
    """

    def __init__(
        self,
        path: Path,
        post: Post,
        probe: CommitProbe | None = None,
        busy_timeout_s: float = BUSY_TIMEOUT_S,
    ) -> None:
        self._path = path
        self._post = post
        self._probe = probe
        self._busy_timeout_s = busy_timeout_s
        self._lock = StoreLock(path)
        # Nothing may be queued behind the end of the queue.
        self._gate = threading.Lock()
        self._writer: Writer | None = None

    def open(self) -> Loaded:
        """See `ports.CommandStore`. A corrupt database is moved aside and replaced by a new one."""
        with _translated():
            warnings = files.prepare_directory(self._path)
            warnings += self._lock.acquire()
        try:
            return self._open_or_replace(warnings)
        except BaseException:
            self._lock.release()
            raise

    def _open_or_replace(self, warnings: tuple[str, ...]) -> Loaded:
        moved_aside = ""
        try:
            connection, loaded = self._open()
        except _CorruptError:
            with _translated():
                moved_aside = str(files.move_aside(self._path))
            try:
                connection, loaded = self._open()
            except StoreError as error:
                raise StoreError(f"{error} (the corrupt database was moved to {moved_aside})") from error
        self._writer = Writer(connection, self._post, self._probe)
        self._writer.start()
        return replace(loaded, moved_aside=moved_aside, warnings=warnings + loaded.warnings)

    def submit(self, operations: Sequence[Operation], done: StoreDone | None = None) -> None:
        """See `ports.CommandStore`; a store that is not open answers with a `StoreError`."""
        with self._gate:
            if self._writer is not None:
                self._writer.submit((tuple(operations), done))
                return
        if done is not None:
            deliver(self._post, [partial(done, StoreError("the store is not open"))])

    def close(self) -> None:
        """See `ports.CommandStore`; may be called from any thread."""
        with self._gate:
            writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        self._lock.release()

    def _open(self) -> tuple[sqlite3.Connection, Loaded]:
        with _translated():
            if self._path.exists():
                if files.is_garbage(self._path):
                    raise _CorruptError("the file is no database")
                schema.check_untouched(self._path, self._busy_timeout_s)
            files.create(self._path)
            connection = schema.connect(f"{self._path.absolute().as_uri()}?mode=rw", self._busy_timeout_s)
            try:
                loaded = self._prepare(connection)
            except BaseException:
                connection.close()
                raise
        return connection, loaded

    def _prepare(self, connection: sqlite3.Connection) -> Loaded:
        if self._path.stat().st_size == 0:
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # only before anything was read or written
        schema.check_version(connection)
        if files.is_ragged(self._path, connection.execute("PRAGMA page_size").fetchone()[0]):
            raise _CorruptError("the database is cut")
        _configure(connection)
        if connection.execute("PRAGMA quick_check(1)").fetchall() != [("ok",)]:
            raise _CorruptError("the database failed its integrity check")
        schema.migrate(connection)
        loaded = load(connection)
        files.make_private(self._path)
        return replace(loaded, warnings=files.others_files(self._path))


def _configure(connection: sqlite3.Connection) -> None:
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise StoreError("the file system of store.path cannot carry a write-ahead log")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA wal_autocheckpoint = 2000")  # pages: 8 MiB
    connection.execute("PRAGMA cache_size = -2048")  # KiB
    connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")
    connection.execute("PRAGMA temp_store = MEMORY")  # a full disk must not stop a rollback
