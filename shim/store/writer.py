"""The one thread that writes: what waits when it becomes free shares one commit."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from shim.core.records import Operation
from shim.errors import StoreError
from shim.ports import StoreDone
from shim.store.delivery import Post, deliver, store_error
from shim.store.operations import Operations

_Submission = tuple[Sequence[Operation], StoreDone | None]
_Outcome = list[Any] | StoreError


@dataclass(frozen=True, slots=True)
class CommitProbe:
    """Watches commits: `observe(commit_s, operations)` is called on the event loop after each one that succeeded.

    `commit_s` is the time by `monotonic` (seconds) from the beginning of the transaction to its sync, with any wait for
    another process; `operations` is how many it carried out.
    """

    monotonic: Callable[[], float]
    observe: Callable[[float, int], None]


class Writer:
    """Owns a connection from `start()` on, until `close()`."""

    def __init__(self, connection: sqlite3.Connection, post: Post, probe: CommitProbe | None) -> None:
        self._connection = connection
        self._cursor = connection.cursor()
        self._operations = Operations(self._cursor)
        self._post = post
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
            while True:
                batch.append(self._queue.get_nowait())
        return batch

    def _serve(self, batch: list[_Submission]) -> None:
        started = self._probe.monotonic() if self._probe is not None else 0.0
        callbacks: list[Callable[[], None]] = []
        outcomes: Sequence[_Outcome]
        try:
            outcomes = self._commit(batch)
        except Exception as error:  # noqa: BLE001 - whatever it was, this thread must live to serve the next batch
            self._roll_back()
            outcomes = [store_error(error)] * len(batch)
        else:
            if self._probe is not None:
                carried_out = sum(len(ops) for (ops, _), o in zip(batch, outcomes, strict=True) if isinstance(o, list))
                callbacks.append(partial(self._probe.observe, self._probe.monotonic() - started, carried_out))
        for (_, done), outcome in zip(batch, outcomes, strict=True):
            if done is not None:
                callbacks.append(partial(done, outcome))
        deliver(self._post, callbacks)

    def _commit(self, batch: list[_Submission]) -> Sequence[_Outcome]:
        """Carry a batch out. Raises where all of it failed."""
        self._cursor.execute("BEGIN IMMEDIATE")
        outcomes: Sequence[_Outcome]
        try:
            outcomes = [self._operations.carry_out(operations) for operations, _ in batch]
        except Exception:  # noqa: BLE001 - it is found again, and told, one by one
            # Savepoints cost a copy of every page that is touched: only when one of the batch is known to be poisoned.
            self._roll_back()
            self._cursor.execute("BEGIN IMMEDIATE")
            outcomes = [self._carry_out_alone(operations) for operations, _ in batch]
        self._cursor.execute("COMMIT")
        return outcomes

    def _carry_out_alone(self, operations: Sequence[Operation]) -> _Outcome:
        """Carry one submission out so that its failure leaves the others' work as it is."""
        self._cursor.execute("SAVEPOINT submission")
        try:
            results = self._operations.carry_out(operations)
        except Exception as error:
            if not self._connection.in_transaction:
                raise  # SQLite itself rolled everything back, the work of the others included
            self._cursor.execute("ROLLBACK TO submission")
            self._cursor.execute("RELEASE submission")
            return store_error(error)
        self._cursor.execute("RELEASE submission")
        return results

    def _roll_back(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            if self._connection.in_transaction:
                self._cursor.execute("ROLLBACK")
