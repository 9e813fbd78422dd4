"""Command store on SQLite: one file with a write-ahead log. A commit is synced to disk before it is reported."""

from __future__ import annotations

import errno
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from shim.clock import Clock
from shim.core.records import MoveSession, Operation, PutCommand, PutOutcome, StoreContents, WriteProbe
from shim.errors import StoreError
from shim.store import files, rows, schema
from shim.store.database import Database, Finish, Rows, nothing
from shim.store.files import StoreLock
from shim.store.operations import COMMAND_COLUMNS, Operations
from shim.store.rows import insert_parameters
from shim.store.writer import (
    UNOBSERVED,
    CallThreadsafe,
    CommitProbe,
    Failure,
    QueuedStore,
    Writer,
    run_on_loop,
    store_error,
)

BUSY_TIMEOUT_S = 5.0
CORRUPT = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
# Errors at opening that show a corrupt file. A plain SQL error means that tables or columns do not match the version.
_CORRUPT = CORRUPT | {sqlite3.SQLITE_ERROR}
# Errors that a smaller transaction would meet as well. A full disk is not among them, because a small transaction may
# still fit. All other errors are caused by one submission.
_COMMON = CORRUPT | {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_READONLY,
}
# Errors of SQLite and the system's errors with the same remedy.
_LIKE = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EACCES,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
    sqlite3.SQLITE_PERM: errno.EACCES,
}
_KEY_BYTES = 32
# Size above which the write-ahead log is truncated, and the change of its size that is reported.
LOG_LIMIT_BYTES = 16 * 1024 * 1024
_LOG_STEP_BYTES = 1024 * 1024


class _CorruptError(StoreError):
    """The database file is corrupt."""


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Raise `_CorruptError` for a corrupt database, `StoreError` for other errors (locked, full, unreadable)."""
    try:
        yield
    except OSError as error:
        todo = files.advice(error, path)
        raise StoreError(f"store.path {path} cannot be used: {error.strerror}: {todo}") from error
    except sqlite3.Error as error:
        code = _code_of(error)
        if code in _CORRUPT:
            raise _CorruptError(str(store_error(error))) from error
        raise StoreError(f"store.path {path} cannot be used: {store_error(error)}: {_advice(code, path)}") from error


def _code_of(error: Exception) -> int:
    """Return the primary error code of SQLite; 0 if the error is not its own."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _advice(code: int, path: Path) -> str:
    """Return a hint on how to solve an error of SQLite at opening."""
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return "end the program that holds it (a backup, a sqlite3 shell)"
    return files.advice(OSError(_LIKE.get(code, errno.EIO), ""), path)


class SqliteStore(QueuedStore):
    """A `ports.CommandStore` in the file at `path`, which only one process may open at a time.

    A commit waits up to `busy_timeout_s` for another program that locks the database, such as a backup. Without
    `replace_corrupt` a corrupt database, or a file that is none, is left as it is, and `open` raises `StoreError`.
    """

    def __init__(
        self,
        path: Path,
        call_threadsafe: CallThreadsafe,
        probe: CommitProbe = UNOBSERVED,
        busy_timeout_s: float = BUSY_TIMEOUT_S,
        *,
        replace_corrupt: bool = True,
    ) -> None:
        super().__init__(call_threadsafe)
        self._path = path
        self._probe = probe
        self._busy_timeout_s = busy_timeout_s
        self._replace_corrupt = replace_corrupt
        self._lock: StoreLock | None = None

    def open(self) -> StoreContents:
        """Open the database (`ports.CommandStore`). Rename a corrupt one and start with an empty one."""
        with _translated(self._path):
            # Resolve symbolic links, as SQLite does: its log and our lock file are beside the target.
            self._path = Path(os.path.realpath(self._path))
            files.require_regular_files(self._path)
            warnings = files.prepare_directory(self._path)
            lock = StoreLock(self._path)
            warnings += lock.acquire()
        try:
            loaded = self._open_or_replace(lock, warnings)
        except BaseException:
            lock.release()
            raise
        self._lock = lock
        return loaded

    def _open_or_replace(self, lock: StoreLock, warnings: tuple[str, ...]) -> StoreContents:
        moved_aside = ""
        try:
            connection, loaded = self._open(lock)
        except _CorruptError:
            if not self._replace_corrupt:
                raise
            with _translated(self._path):
                moved_aside = str(files.move_aside(self._path))
            lock.release_database()
            try:
                connection, loaded = self._open(lock)
            except StoreError as error:
                raise StoreError(f"{error} (the corrupt database was moved to {moved_aside})") from error
        log = WriteAheadLog(self._report_log)
        engine = SqliteEngine(connection, files.OpenFiles(self._path, Clock.monotonic_s), log)
        self._start(Writer(engine, self._call_threadsafe, self._probe))
        return replace(loaded, moved_aside=moved_aside, warnings=warnings + loaded.warnings)

    def _report_log(self, size_bytes: int, pinned: bool) -> None:
        run_on_loop(self._call_threadsafe, [partial(self._probe.log, size_bytes, pinned)])

    def close(self) -> None:
        """Carry out all submissions and close (`ports.CommandStore`). May be called from any thread."""
        self._stop()
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    def _open(self, lock: StoreLock) -> tuple[sqlite3.Connection, StoreContents]:
        with _translated(self._path):
            exists = self._path.exists()
            warnings = lock.acquire_database() if exists else ()
            if exists:
                files.require_no_text(self._path)
                if files.has_bad_header(self._path):
                    raise _CorruptError("the file is no database")
                schema.check_untouched(self._path, self._busy_timeout_s)
            files.create(self._path)
            if not exists:
                warnings = lock.acquire_database()
            connection = schema.connect(f"{self._path.absolute().as_uri()}?mode=rw", self._busy_timeout_s)
            try:
                loaded = self._prepare(connection)
            except BaseException:
                connection.close()
                raise
        return connection, replace(loaded, warnings=warnings + loaded.warnings)

    def _prepare(self, connection: sqlite3.Connection) -> StoreContents:
        if self._path.stat().st_size == 0:
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # has no effect after the first read or write
        schema.check_version(connection)
        if files.is_truncated(self._path, connection.execute("PRAGMA page_size").fetchone()[0]):
            raise _CorruptError("the database is cut")
        _configure(connection)
        if connection.execute("PRAGMA quick_check(1)").fetchall() != [("ok",)]:
            raise _CorruptError("the database failed its integrity check")
        schema.migrate(connection)
        loaded = _load(connection)
        files.make_private(self._path)
        return replace(loaded, warnings=files.foreign_owner_warnings(self._path))


class InMemoryStore(QueuedStore):
    """A `ports.CommandStore` on a database in memory, for trials without a disk. Its content ends with `close()`."""

    def __init__(self, call_threadsafe: CallThreadsafe, probe: CommitProbe) -> None:
        super().__init__(call_threadsafe)
        self._probe = probe

    def open(self) -> StoreContents:
        """Make an empty database (`ports.CommandStore`)."""
        connection = schema.connect("file::memory:", BUSY_TIMEOUT_S)
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # else memory of deleted rows is never released
        connection.execute("PRAGMA temp_store = MEMORY")
        schema.migrate(connection)
        loaded = _load(connection)
        self._start(Writer(SqliteEngine(connection), self._call_threadsafe, self._probe))
        return loaded

    def close(self) -> None:
        """Carry out all submissions and close (`ports.CommandStore`)."""
        self._stop()


class SqliteEngine:
    """A `store.writer.Engine` that carries out each batch in one synced commit.

    `open_files` detects that the files of the connection's database were replaced. A database in memory has neither
    files nor a log.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        open_files: files.OpenFiles | None = None,
        log: WriteAheadLog | None = None,
    ) -> None:
        self._connection = connection
        self._files = open_files
        self._log = log
        self._database = SqliteDatabase(connection)
        self._operations = SqliteOperations(self._database)

    def commit(self, batch: Sequence[Sequence[Operation]]) -> list[Any]:
        """Carry out a batch (`store.writer.Engine`). Raises `ReplacedError` if the files are no longer those opened."""
        try:
            return self._commit(batch)
        except sqlite3.Error as error:
            self.roll_back()
            if _code_of(error) != sqlite3.SQLITE_FULL or not self._makes_room_for_moves(batch):
                raise
        return self._commit(batch)

    def _makes_room_for_moves(self, batch: Sequence[Sequence[Operation]]) -> bool:
        """Empty the log for a move that does not fit behind what is in it; return True if that gave it more room.

        All changes wait for a move (`store.writer.Writer`), so no later commit would cause the checkpoint instead.
        """
        if self._log is None or not any(isinstance(operations[0], MoveSession) for operations in batch):
            return False
        return self._log.empty(self._connection)

    def _commit(self, batch: Sequence[Sequence[Operation]]) -> list[Any]:
        execute = self._database.execute
        log_bytes = None if self._files is None else self._files.check()
        execute("BEGIN IMMEDIATE")
        results = self._operations.carry_out_batch(batch)
        execute("COMMIT")
        if self._log is not None and log_bytes is not None:
            self._log.check(self._connection, log_bytes)
        return results

    def roll_back(self) -> None:
        """Roll back, if a transaction is open."""
        with suppress(sqlite3.Error):
            if self._connection.in_transaction:
                self._database.execute("ROLLBACK")

    def failure(self, error: Exception) -> Failure:
        """Convert an exception of `commit` by its SQLite error code."""
        if isinstance(error, files.ReplacedError):
            return Failure(error, affects_whole_batch=True, temporary=True)
        code = _code_of(error)
        common, corrupt = code in _COMMON, code in CORRUPT
        temporary = (common and not corrupt) or code == sqlite3.SQLITE_FULL
        return Failure(store_error(error), affects_whole_batch=common, temporary=temporary, corrupt=corrupt)

    def close(self) -> None:
        """Move the write-ahead log into the database as far as possible, and close the connection."""
        with suppress(sqlite3.Error):
            self._database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        with suppress(sqlite3.Error):
            self._connection.close()


def _load(connection: sqlite3.Connection) -> StoreContents:
    database = SqliteDatabase(connection)
    database.execute("BEGIN IMMEDIATE")
    key, damaged = _owner_key(database)
    loaded = rows.load(database, key)
    database.execute("COMMIT")
    return replace(loaded, quarantined=loaded.quarantined + damaged)


def _owner_key(database: Database) -> tuple[bytes, int]:
    """Read the key for owner ids. Make a new one if there is none, or none of the right form.

    Returns the key and the number of rows that were quarantined.
    """
    row = database.execute("SELECT value FROM meta WHERE key = 'owner_key'").fetchone()
    if row is not None and isinstance(row[0], bytes) and len(row[0]) == _KEY_BYTES:
        return row[0], 0
    if row is not None:
        rows.quarantine(database, "meta", {"key": "owner_key"}, "not a key of 32 bytes")
    key = secrets.token_bytes(_KEY_BYTES)
    database.execute(SAVE_META, ("owner_key", key))
    return key, int(row is not None)


def _configure(connection: sqlite3.Connection) -> None:
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise StoreError("the file system of store.path cannot carry a write-ahead log")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA wal_autocheckpoint = 2000")  # pages: 8 MiB
    connection.execute("PRAGMA cache_size = -2048")  # KiB
    connection.execute(f"PRAGMA journal_size_limit = {LOG_LIMIT_BYTES}")
    connection.execute("PRAGMA temp_store = MEMORY")  # a rollback must work on a full disk


class WriteAheadLog:
    """Size limit of SQLite's write-ahead log. Used by the writer's thread only.

    A commit is appended to the log. A checkpoint copies it into the database, and the log is reused from its start.
    Another program with an open read transaction still needs the old content: until that transaction ends, the log
    cannot be reused and grows with every commit.

    `report(size_bytes, pinned)` is called when `pinned` has changed, or the size by 1 MiB or more. `pinned` is true
    while a reader prevents the truncation.
    """

    def __init__(self, report: Callable[[int, bool], object]) -> None:
        self._report = report
        self._reported = (-1, False)

    def check(self, connection: sqlite3.Connection, size_bytes: int) -> None:
        """Truncate the log if it is too large, and report its size. Must be called outside of a transaction."""
        pinned = False
        if size_bytes > LOG_LIMIT_BYTES:
            pinned = not _truncate(connection)
            size_bytes = size_bytes if pinned else 0
        reported_bytes, reported_pinned = self._reported
        if pinned != reported_pinned or abs(size_bytes - reported_bytes) >= _LOG_STEP_BYTES:
            self._reported = (size_bytes, pinned)
            self._report(size_bytes, pinned)

    def empty(self, connection: sqlite3.Connection) -> bool:
        """Checkpoint the log, so that it is written from its start again. Must be called outside of a transaction.

        Returns False if that is not possible, or the log was empty already.
        """
        with suppress(sqlite3.Error):  # a disk may have no room for the database's new pages either
            _, pages, checkpointed = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            return bool(pages) and pages == checkpointed
        return False


def _truncate(connection: sqlite3.Connection) -> bool:
    """Checkpoint and truncate the log without waiting for readers. Return whether that succeeded."""
    (busy_ms,) = connection.execute("PRAGMA busy_timeout").fetchone()
    connection.execute("PRAGMA busy_timeout = 0").fetchall()
    try:
        with suppress(sqlite3.Error):  # the next commit reports the error
            busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            return not busy
        return False
    finally:
        connection.execute(f"PRAGMA busy_timeout = {busy_ms}").fetchall()


# --- the database, as the operations see it ---------------------------------------------------------------------------

# The thread of the store releases the interpreter lock (GIL) for each statement and must wait for it afterwards, while
# the event loop is busy with what arrives meanwhile. So the number of statements counts more than what they do, and
# commands that arrive together are inserted by one.

SAVE_META = "INSERT INTO meta (key, value) VALUES (?1, ?2) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
# Free pages that one `Prune` returns to the file system: enough to keep up, few enough not to delay commits. The next
# constant is the number of free pages that the file keeps for reuse.
_VACUUM_PAGES = 1000
_KEPT_PAGES = 2500
# Rows per statement. Each size is a statement of its own, which is prepared once. Most batches have up to 16.
_SIZES = (128, 64, 32, *range(16, 0, -1))
_NEWEST = "SELECT min(seq) FROM (SELECT seq FROM commands ORDER BY seq DESC LIMIT ?1)"


class SqliteDatabase:
    """A `store.database.Database` in which every row belongs to the store."""

    mine = "true"
    # Written with NOT IN, so that `load` also reads rows with an unknown state and quarantines them.
    live = "state NOT IN ('delivered', 'answered', 'closed', 'expired', 'dead')"

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._cursor = connection.cursor()
        self.execute: Callable[..., Rows] = self._cursor.execute

    def insert(self, statement: str, parameters: Sequence[Any]) -> int | None:
        """Insert a row and return its `seq`, or None if it conflicts with an existing one."""
        cursor = self._cursor
        cursor.execute(statement, parameters)
        return cursor.lastrowid if cursor.rowcount else None

    def insert_many(self, statement: str, parameters: Sequence[Any]) -> tuple[int, int]:
        """Insert several rows; return how many were inserted, and the `seq` of the last one."""
        cursor = self._cursor
        cursor.execute(statement, parameters)
        return cursor.rowcount, cursor.lastrowid or 0

    def touch(self, operation: WriteProbe) -> Finish[None]:
        """Write the time, or zeros of the wanted size, into the table `meta`."""
        self.execute(SAVE_META, ("touched", bytes(operation.size_bytes) or operation.wall))
        return nothing

    def reclaim(self) -> None:
        """Return up to `_VACUUM_PAGES` free pages to the file system, beyond those kept for new rows."""
        (free,) = self.execute("PRAGMA freelist_count").fetchone()
        for _ in range(min(free - _KEPT_PAGES, _VACUUM_PAGES)):
            self.execute("PRAGMA incremental_vacuum(1)")  # frees one page whatever N is: Python steps a pragma once


# A new command, which waits for others, and the parameters of its row.
_Put = tuple[PutCommand, tuple[Any, ...]]


class SqliteOperations(Operations):
    """The operations, with a way to carry out many submissions in few statements."""

    def __init__(self, database: SqliteDatabase) -> None:
        super().__init__(database)
        self._sqlite = database

    def carry_out_batch(self, batch: Sequence[Sequence[Operation]]) -> list[Any]:
        """Carry out submissions in order and return the result of each one's first operation."""
        results: list[Any] = []
        puts: list[_Put] = []
        for operations in batch:
            first = operations[0]
            if len(operations) == 1 and isinstance(first, PutCommand):
                puts.append((first, insert_parameters(first)))
                continue
            if puts:
                results += self._put_all(puts)
                puts.clear()
            results.append(self.carry_out(operations))
        return results + self._put_all(puts)

    def _put_all(self, puts: Sequence[_Put]) -> list[PutOutcome]:
        outcomes: list[PutOutcome] = []
        start = 0
        while start < len(puts):
            size = next(each for each in _SIZES if each <= len(puts) - start)
            part = puts[start : start + size]
            start += size
            inserted, last_seq = self._sqlite.insert_many(_insert(size), [v for _, row in part for v in row])
            if inserted == size:
                # The rows of one statement have consecutive numbers: nobody else inserts meanwhile.
                outcomes += map(PutOutcome, range(last_seq - size + 1, last_seq + 1))
            else:
                outcomes += self._with_duplicates(part, inserted)
        return outcomes

    def _with_duplicates(self, puts: Sequence[_Put], inserted: int) -> list[PutOutcome]:
        """Return the outcomes of an insert that left out commands whose id was known. The newest rows are its rows."""
        (first_seq,) = self._execute(_NEWEST, (inserted,)).fetchone()
        new: set[int] = set()
        outcomes = []
        for operation, _ in puts:
            outcome = self.look_up_known(operation)
            if inserted and outcome.seq >= first_seq and outcome.seq not in new:
                new.add(outcome.seq)
                outcomes.append(PutOutcome(outcome.seq))
            else:
                self.trace_arrival(operation)
                outcomes.append(outcome)
        return outcomes


@cache
def _insert(size: int) -> str:
    row = f"({', '.join('?' * (COMMAND_COLUMNS.count(',') + 1))})"
    values = ", ".join([row] * size)
    return f"INSERT INTO commands ({COMMAND_COLUMNS}) VALUES {values} ON CONFLICT (session, id) DO NOTHING"  # noqa: S608 - constants
