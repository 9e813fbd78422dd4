"""Size limit of SQLite's write-ahead log.

A commit is appended to the log. A checkpoint copies it into the database, and the log is reused from its start. Another
program with an open read transaction still needs the old content. Until that transaction ends, the log cannot be reused
and grows with every commit.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import suppress

LIMIT_BYTES = 16 * 1024 * 1024
_TOLD_STEP_BYTES = 1024 * 1024


class WriteAheadLog:
    """Truncation of a log above `LIMIT_BYTES`, as soon as no reader needs it. Used by the writer's thread only.

    `tell(size_bytes, pinned)` is called when `pinned` has changed, or the size by 1 MiB or more. `pinned` is true while
    a reader prevents the truncation.
    """

    def __init__(self, tell: Callable[[int, bool], object]) -> None:
        self._tell = tell
        self._told = (-1, False)

    def look(self, connection: sqlite3.Connection, size_bytes: int) -> None:
        """Truncate the log if it is too large, and report its size. Must be called outside of a transaction."""
        pinned = False
        if size_bytes > LIMIT_BYTES:
            pinned = not _truncate(connection)
            size_bytes = size_bytes if pinned else 0
        told_bytes, told_pinned = self._told
        if pinned != told_pinned or abs(size_bytes - told_bytes) >= _TOLD_STEP_BYTES:
            self._told = (size_bytes, pinned)
            self._tell(size_bytes, pinned)


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
