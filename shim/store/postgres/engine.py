"""Commits of batches on PostgreSQL: two round trips and one sync each, fenced by the shard's lease.

The first round trip sends `BEGIN`, the fencing update of the lease's row, and the operations. The update finds no row
if another replica has taken the lease; then the batch fails. The second round trip sends `COMMIT`.

A connection lost in the first round trip has stored nothing, so the batch is repeated. The outcome of a `COMMIT`
without an answer is unknown. The fencing update has written the batch's number into the lease's row: if the row still
has that number, the batch was committed. The row is read in a transaction that itself waits for the standby, because a
plain SELECT also returns commits that a failover may undo.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import psycopg

from shim.clock import Clock
from shim.config import settings
from shim.core.records import Operation, StoreContents
from shim.errors import ConfigError, StoreError, StoreFenced
from shim.store.database import Finish, Partition
from shim.store.postgres.database import connect, refusal, require_sync, schema_version, state_refusal
from shim.store.postgres.dsn import application
from shim.store.postgres.groups import PostgresDatabase
from shim.store.postgres.hot import AFTER_FINISH, HotOperations
from shim.store.postgres.pipeline import ConnectionLost, Pipeline, StatementError, StatementResult
from shim.store.rows import load
from shim.store.writer import CallThreadsafe, CommitProbe, Failure, QueuedStore, Writer, store_error

PATIENCE_S = 8.0
"""Time that a submission waits for a database that does not answer, before it fails."""
_COMMIT_S = 15.0
"""Limit for the answer to a COMMIT, long enough to wait for a standby. After it, the connection is given up."""
_PAUSE_S = 0.3
_SESSION = {
    "statement_timeout": "8000",
    "lock_timeout": "4000",
    "idle_in_transaction_session_timeout": "5000",
    # Each statement is planned once, often while the tables are empty. Force plans that use the indexes.
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "random_page_cost": "0.1",
    "jit": "off",
}
# SQLSTATE classes of errors that one submission causes: its data, a constraint, a limit of the server.
_OWN_FAULT = ("22", "23", "54")

_FENCE = "UPDATE leases SET batch = ?1 WHERE shard = ?2 AND fence = ?3"
_OPEN = "UPDATE leases SET batch = batch + 1 WHERE shard = ?1 AND fence = ?2 RETURNING batch"
_LAST_BATCH = "SELECT batch FROM leases WHERE shard = ?1 AND fence = ?2 FOR UPDATE"
_OWNER_KEY = "SELECT owner_key FROM cluster"
# Ends the backends of our earlier connections. One that has not noticed the loss may still hold the lease's row locked,
# or still commit the batch in doubt.
_END_OTHERS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
    " AND application_name = current_setting('application_name') AND usename = current_user"
)
monotonic = Clock().monotonic_s
CLOSE_S = 3.0


class PostgresEngine:
    """A `store.writer.Engine` on PostgreSQL.

    `fail_waiting` is called with an error to fail the queued submissions while the database does not answer.
    """

    def __init__(self, configured: settings.Store, partition: Partition, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._configured = configured
        self._partition = partition
        self._key = (partition.shard, partition.fence)
        self._pipeline: Pipeline | None = None
        self._operations: HotOperations
        self._database: PostgresDatabase
        self._batch = 0
        self._down_since_s: float | None = None
        self._tried_s = 0.0
        self._cause = StoreError("the database does not answer")
        self._closing = threading.Event()
        self._fenced = False
        self.fail_waiting: Callable[[StoreError], None] = lambda _error: None

    # --- opening ------------------------------------------------------------------------------------------------------

    def open(self) -> StoreContents:
        """Connect and read the content of the shard. Raises `StoreError`, `StoreVersionError`, `StoreFenced`."""
        try:
            return self._open()
        except Exception as error:
            self._disconnect()
            raise self.failure(error).error from error

    def _open(self) -> StoreContents:
        pipeline = self._connect()
        execute = pipeline.execute
        execute("BEGIN")
        row = execute(_OPEN, self._key).fetchone()
        if row is None:
            raise StoreFenced("another replica has the shard")
        self._batch = row[0]
        key = execute(_OWNER_KEY).fetchone()
        loaded = load(self._database, bytes(key[0]) if key is not None else b"")
        execute("COMMIT")
        pipeline.sync(_COMMIT_S)
        return loaded

    # --- store.writer.Engine ------------------------------------------------------------------------------------------

    def commit(self, batch: Sequence[Sequence[Operation]]) -> list[Any]:
        """Carry out a batch (`store.writer.Engine`), again on a new connection if one is lost before its COMMIT."""
        if self._fenced:
            raise StoreFenced("another replica has the shard")
        while True:
            try:
                results = self._execute(self._connected(), batch)
            except ConnectionLost:
                # The COMMIT was not sent, so nothing is stored: repeat the batch on a new connection.
                self._disconnect()
                continue
            if self._commit() or self._was_committed():
                self._down_since_s = None
                return results

    def roll_back(self) -> None:
        """Roll back, or drop the connection if that fails."""
        pipeline = self._pipeline
        if pipeline is None:
            return
        self._database.clear_groups()
        try:
            with suppress(StatementError):
                pipeline.sync()  # statements queued before a later one could not be encoded
            pipeline.execute("ROLLBACK")
            pipeline.sync()
        except (ConnectionLost, StatementError):
            self._disconnect()

    def failure(self, error: Exception) -> Failure:
        """Convert an exception of `commit`; a fenced engine stays fenced."""
        if isinstance(error, StoreFenced):
            self._fenced = True
            return Failure(error, affects_whole_batch=True, fenced=True)
        if isinstance(error, StatementError):
            if error.state == "25006":
                self._disconnect()  # the server is no longer the primary: the next connection looks for the new one
            common = not error.state.startswith(_OWN_FAULT)
            return Failure(state_refusal(error.state), affects_whole_batch=common, temporary=common)
        if isinstance(error, psycopg.Error):
            return Failure(refusal(error), affects_whole_batch=True, temporary=True)
        if isinstance(error, ConnectionLost):
            return Failure(self._cause, affects_whole_batch=True, temporary=True)
        if isinstance(error, (StoreError, ConfigError)):
            cause = error if isinstance(error, StoreError) else StoreError(str(error))
            return Failure(cause, affects_whole_batch=True, temporary=True)
        return Failure(store_error(error))

    def close(self) -> None:
        """Close the connection."""
        self._disconnect()

    def stop_waiting(self) -> None:
        """Stop waiting for connections, except to resolve a COMMIT in doubt. May be called from any thread."""
        self._closing.set()

    # --- one transaction ----------------------------------------------------------------------------------------------

    def _execute(self, pipeline: Pipeline, batch: Sequence[Sequence[Operation]]) -> list[Any]:
        # Use a new number also for the repetition of a lost batch: `_was_committed` identifies a commit by its number.
        self._batch += 1
        pipeline.execute("BEGIN")
        fence = pipeline.execute(_FENCE, (self._batch, *self._key))
        results: list[Any] = []
        finishes: list[list[Finish[Any]]] = []
        for operations in batch:
            if AFTER_FINISH.isdisjoint(map(type, operations)):
                finishes.append(self._operations.begin(operations))
            else:
                results += self._finished(pipeline, fence, finishes)
                finishes = []
                results.append(self._operations.carry_out(operations))
        return results + self._finished(pipeline, fence, finishes)

    def _finished(
        self, pipeline: Pipeline, fence: StatementResult, finishes: Sequence[Sequence[Finish[Any]]]
    ) -> list[Any]:
        """Return the result of each submission's first operation.

        Raises `StoreFenced` if another replica has the shard.
        """
        self._database.send_groups()
        pipeline.sync()
        if fence.rowcount != 1:
            raise StoreFenced("another replica has the shard")
        results = [[finish() for finish in each] for each in finishes]
        return [first for first, *_ in results]

    def _commit(self) -> bool:
        """Send COMMIT and return true if it is durable.

        Returns false if it is in doubt. Either no answer came, or the server warned that it stopped waiting for the
        standby.
        """
        pipeline = self._pipeline
        if pipeline is None:
            return False
        pipeline.warned = False
        try:
            pipeline.execute("COMMIT")
            pipeline.sync(_COMMIT_S)
        except ConnectionLost:
            self._disconnect()
            return False
        return not pipeline.warned

    def _was_committed(self) -> bool:
        """Return whether a COMMIT in doubt was carried out. Retries until the database answers.

        Raises `StoreFenced` if another replica has taken the shard.
        """
        while True:
            try:
                pipeline = self._connected(patient=True)
                pipeline.execute(_END_OTHERS)
                pipeline.execute("BEGIN")
                row = pipeline.execute(_LAST_BATCH, self._key).fetchone()
                if row is None:
                    raise StoreFenced("another replica has the shard")
                if self._commit():
                    return bool(row[0] == self._batch)
            except ConnectionLost:
                self._disconnect()
            except StatementError:
                self.roll_back()  # an earlier backend that waits for its standby still locks the row
                self._wait()

    # --- the connection -----------------------------------------------------------------------------------------------

    def _connected(self, *, patient: bool = False) -> Pipeline:
        """Return the connection, made anew if it was lost.

        Raises `StoreError` after `patience_s` without a connection, unless `patient`; `StoreFenced` at any time.
        """
        while self._pipeline is None:
            if self._down_since_s is None:
                self._down_since_s = monotonic()
            late = self._closing.is_set() or monotonic() - self._down_since_s > self._patience_s
            if late and not patient and monotonic() - self._tried_s < _PAUSE_S:
                raise self._cause
            self._tried_s = monotonic()
            try:
                self._connect()
            except StoreFenced:
                raise
            except (psycopg.Error, ConnectionLost, StatementError, StoreError, ConfigError) as error:
                self._cause = self.failure(error).error
                self._disconnect()
                if late and not patient:
                    self.fail_waiting(self._cause)
                    raise self._cause from None
                self._wait()
        return self._pipeline

    def _connect(self) -> Pipeline:
        shard, _fence, process = self._partition
        connection = connect(
            self._configured, application(process, shard), **_SESSION, **{"agent_shim.shard": str(shard)}
        )
        try:
            schema_version(connection)
            require_sync(connection)
            pipeline = Pipeline(connection, self._tick)
        except BaseException:
            connection.close()
            raise
        self._pipeline = pipeline
        self._database = PostgresDatabase(pipeline, shard)
        self._operations = HotOperations(self._database)
        return pipeline

    def _disconnect(self) -> None:
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            pipeline.close()
            self._down_since_s = self._down_since_s or monotonic()

    def _wait(self) -> None:
        self._tick()
        threading.Event().wait(_PAUSE_S)

    def _tick(self) -> None:
        """Fail the queued submissions if the database has not answered for `patience_s`."""
        if self._down_since_s is None:
            self._down_since_s = monotonic()
        if monotonic() - self._down_since_s > self._patience_s:
            self.fail_waiting(self._cause)


class PostgresStore(QueuedStore):
    """A `ports.CommandStore` for the holder of a shard's lease. Call `database.prepare` in this process first."""

    def __init__(
        self,
        configured: settings.Store,
        call_threadsafe: CallThreadsafe,
        probe: CommitProbe,
        partition: Partition,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Make a store that is not open. A submission fails after `patience_s` without an answer of the database."""
        super().__init__(call_threadsafe)
        self._engine = PostgresEngine(configured, partition, patience_s)
        self._probe = probe

    def open(self) -> StoreContents:
        """Read the content of the shard (`ports.CommandStore`). Raises `StoreFenced` if another replica has it."""
        loaded = self._engine.open()
        writer = Writer(self._engine, self._call_threadsafe, self._probe)
        self._engine.fail_waiting = writer.fail_waiting
        self._start(writer)
        return loaded

    def close(self) -> None:
        """Carry out the submissions and close (`ports.CommandStore`). Waits up to `CLOSE_S`.

        A COMMIT without an answer may be carried out later or not; the next opening of the shard shows which.
        """
        self._engine.stop_waiting()
        self._stop(CLOSE_S)
