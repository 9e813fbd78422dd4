"""The command store of one shard on PostgreSQL."""

from __future__ import annotations

from shim.config import settings
from shim.core.records import StoreContents
from shim.store.database import Partition
from shim.store.delivery import CallThreadsafe
from shim.store.postgres.engine import PATIENCE_S, PostgresEngine
from shim.store.queued import QueuedStore
from shim.store.writer import CommitProbe, Writer

CLOSE_S = 3.0


class PostgresStore(QueuedStore):
    """A `ports.CommandStore` for who holds the shard's lease. `database.prepare` has been called in this process."""

    def __init__(
        self,
        configured: settings.Store,
        post: CallThreadsafe,
        probe: CommitProbe | None,
        partition: Partition,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """`patience_s` is how long a submission waits for a database that does not answer, before it is refused."""
        super().__init__(post)
        self._engine = PostgresEngine(configured, partition, patience_s)
        self._probe = probe

    def open(self) -> StoreContents:
        """Read what the shard holds (`ports.CommandStore`). Raises `StoreFenced` where the lease is another's."""
        loaded = self._engine.open()
        writer = Writer(self._engine, self._post, self._probe)
        self._engine.refuse = writer.refuse_waiting
        self._start(writer)
        return loaded

    def close(self) -> None:
        """Carry out what was submitted and close (`ports.CommandStore`).

        A COMMIT that the server does not answer is not waited for: what becomes of it is seen at the next opening.
        """
        self._engine.give_up()
        self._stop(CLOSE_S)
