"""An SQLite database as the operations see it. Commands that arrive together are inserted by one statement.

The thread of the store releases the interpreter lock (GIL) for each statement and must wait for it afterwards, while
the event loop is busy with what arrives meanwhile. So the number of statements counts more than what they do.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from shim.core.records import AddTrace, Operation, PutCommand, PutOutcome, WriteProbe
from shim.store.database import Finish, Rows, nothing
from shim.store.operations import COMMAND_COLUMNS, Operations
from shim.store.rows import insert_parameters, is_first_step

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


# A new command's submission, which waits for others, and the parameters of its row.
_Put = tuple[Sequence[Any], tuple[Any, ...]]


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
            if len(operations) == 2:
                first, step = operations
                if isinstance(first, PutCommand) and isinstance(step, AddTrace) and is_first_step(first.record, step):
                    puts.append((operations, insert_parameters(first.record, step.entry.event)))
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
        for (_, step), row in puts:
            outcome = self.look_up_known(row[:2])()
            if inserted and outcome.seq >= first_seq and outcome.seq not in new:
                new.add(outcome.seq)
                outcomes.append(PutOutcome(outcome.seq))
            else:
                self.add_trace(step)
                outcomes.append(outcome)
        return outcomes


@cache
def _insert(size: int) -> str:
    row = f"({', '.join('?' * (COMMAND_COLUMNS.count(',') + 1))})"
    rows = ", ".join([row] * size)
    return f"INSERT INTO commands ({COMMAND_COLUMNS}) VALUES {rows} ON CONFLICT (session, id) DO NOTHING"  # noqa: S608 - constants
