"""The one thread that writes: what waits when it becomes free shares one commit."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import msgspec

from shim.core.records import Operation
from shim.errors import StoreError
from shim.ports import StoreDone
from shim.store.delivery import CallbackQueue, Post, store_error
from shim.store.operations import Operations

# Submissions that share a commit. A commit of that many costs little more for each than one of thousands, and what is
# submitted meanwhile, an agent's result say, does not wait for long.
MAX_BATCH = 256

CORRUPT = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_Submission = tuple[Sequence[Operation], StoreDone | None]
_Outcome = list[Any] | StoreError
_COMMON = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_READONLY,
    }
)


class CommitProbe(msgspec.Struct, frozen=True):
    """Watches commits: `observe(commit_s, operations)` is called on the event loop after each one that succeeded.

    `commit_s` is the time by `monotonic` (seconds) from the beginning of the transaction to its sync, with any wait for
    another process; `operations` is how many it carried out. `failed(submissions)` is called with how many could not be
    carried out, `corrupt(error)` after each that shows that the database is damaged: nothing will be stored any more.
    """

    monotonic: Callable[[], float]
    observe: Callable[[float, int], None]
    failed: Callable[[int], None] | None = None
    corrupt: Callable[[StoreError], None] | None = None


class Writer:
    """Owns a connection from `start()` on, until `close()`."""

    def __init__(self, connection: sqlite3.Connection, post: Post, probe: CommitProbe | None) -> None:
        self._connection = connection
        self._cursor = connection.cursor()
        self._operations = Operations(self._cursor)
        self._callbacks = CallbackQueue(post)
        self._probe = probe
        self._queue: SimpleQueue[_Submission | None] = SimpleQueue()
        # A daemon, so that a process which dies without `close()` does not hang; the database survives that.
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, submission: _Submission) -> None:
        """Queue a submission; not after `close()`."""
        self._queue.put(submission)

    def close(self) -> None:
        """Wait until everything submitted is carried out and the connection is closed."""
        self._queue.put(None)
        self._thread.join()

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        running = True
        while running:
            batch = self._next_batch()
            submissions = [each for each in batch if each is not None]
            running = len(submissions) == len(batch)
            if submissions:
                self._serve(submissions)
        with contextlib.suppress(sqlite3.Error):
            self._cursor.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()

    def _next_batch(self) -> list[_Submission | None]:
        batch = [self._queue.get()]
        with contextlib.suppress(Empty):
            while len(batch) < MAX_BATCH:
                batch.append(self._queue.get_nowait())
        return batch

    def _serve(self, batch: list[_Submission]) -> None:
        callbacks: list[Callable[[], None]] = []
        for outcome, (_, done) in zip(self._outcomes(batch, callbacks), batch, strict=True):
            if done is not None:
                callbacks.append(partial(done, outcome))
        self._callbacks.add(callbacks)

    def _outcomes(self, batch: list[_Submission], callbacks: list[Callable[[], None]]) -> list[_Outcome]:
        """Carry out a batch; what the probe is to be told is appended to `callbacks`.

        A batch that fails is halved until what cannot be stored stands alone. Savepoints would do the same at the price
        of a copy of every page that is touched, paid by every commit for a case that hardly ever comes.
        """
        try:
            return self._commit(batch, callbacks)
        except Exception as error:  # noqa: BLE001 - whatever it was, this thread must live to serve the next batch
            self._roll_back()
            failure = store_error(error)
            if len(batch) == 1 or _concerns_all(error):
                callbacks.extend(self._bad_news(error, failure, len(batch)))
                return [failure] * len(batch)
        half = len(batch) // 2
        return self._outcomes(batch[:half], callbacks) + self._outcomes(batch[half:], callbacks)

    def _bad_news(self, error: Exception, failure: StoreError, submissions: int) -> Iterator[Callable[[], None]]:
        probe = self._probe
        if probe is not None and probe.failed is not None:
            yield partial(probe.failed, submissions)
        if probe is not None and probe.corrupt is not None and _primary(error) in CORRUPT:
            yield partial(probe.corrupt, failure)

    def _commit(self, batch: list[_Submission], callbacks: list[Callable[[], None]]) -> list[_Outcome]:
        probe = self._probe
        started = probe.monotonic() if probe is not None else 0.0
        self._cursor.execute("BEGIN IMMEDIATE")
        outcomes: list[_Outcome] = [self._operations.carry_out(operations) for operations, _ in batch]
        self._cursor.execute("COMMIT")
        if probe is not None:
            carried_out = sum(len(operations) for operations, _ in batch)
            callbacks.append(partial(probe.observe, probe.monotonic() - started, carried_out))
        return outcomes

    def _roll_back(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            if self._connection.in_transaction:
                self._cursor.execute("ROLLBACK")


def _concerns_all(error: Exception) -> bool:
    """Whether a smaller transaction would fail for the same reason: the database is locked, read-only or broken.

    A full disk may still have room for a small one; anything else is the fault of one submission.
    """
    return _primary(error) in _COMMON


def _primary(error: Exception) -> int:
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF
