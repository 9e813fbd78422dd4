"""Command store of one shard on PostgreSQL."""

from __future__ import annotations

from shim.config import settings
from shim.core.records import StoreContents
from shim.store.database import Partition
from shim.store.postgres.engine import PATIENCE_S, PostgresEngine
from shim.store.writer import CallThreadsafe, CommitProbe, QueuedStore, Writer

CLOSE_S = 3.0


class PostgresStore(QueuedStore):
    """A `ports.CommandStore` for the holder of a shard's lease. Call `database.prepare` in this process first."""

    def __init__(
        self,
        configured: settings.Store,
        call_threadsafe: CallThreadsafe,
        probe: CommitProbe | None,
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
