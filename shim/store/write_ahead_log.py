"""Keep SQLite's write-ahead log short, and tell when somebody keeps it from that.

A commit goes to the log; a checkpoint carries it over into the database, and the log begins anew. Another program that
reads in a transaction sees the database as it was at its beginning: until it ends, the log cannot begin anew and grows
with every commit.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import suppress

LIMIT_BYTES = 16 * 1024 * 1024
_TOLD_STEP_BYTES = 1024 * 1024


class WriteAheadLog:
    """Truncates a log above `LIMIT_BYTES` as soon as no reader needs it. Used by the writer's thread.

    `tell(size_bytes, pinned)` is called when either has changed noticeably; `pinned`: a reader keeps the log from being
    truncated.
    """

    def __init__(self, tell: Callable[[int, bool], object]) -> None:
        self._tell = tell
        self._told = (-1, False)

    def look(self, connection: sqlite3.Connection, size_bytes: int) -> None:
        """Look at the log, whose size was taken a moment ago; outside of a transaction."""
        pinned = False
        if size_bytes > LIMIT_BYTES:
            pinned = not _truncate(connection)
            size_bytes = size_bytes if pinned else 0
        told_bytes, told_pinned = self._told
        if pinned != told_pinned or abs(size_bytes - told_bytes) >= _TOLD_STEP_BYTES:
            self._told = (size_bytes, pinned)
            self._tell(size_bytes, pinned)


def _truncate(connection: sqlite3.Connection) -> bool:
    """Carry the log over and empty it, without waiting for readers; return whether that was possible."""
    (busy_ms,) = connection.execute("PRAGMA busy_timeout").fetchone()
    connection.execute("PRAGMA busy_timeout = 0").fetchall()
    try:
        with suppress(sqlite3.Error):  # the next commit tells what is wrong
            busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            return not busy
        return False
    finally:
        connection.execute(f"PRAGMA busy_timeout = {busy_ms}").fetchall()
