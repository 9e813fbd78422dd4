"""Offers that were written and have no evidence of delivery yet.

Evidence itself is judged by `delivery.CommandDelivery` and, for a later poll, by `core.command_queue.Batch`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from shim.core.command_queue import Batch
from shim.ports import Timer, Timers


class AwaitedEvidence:
    """Written offers by the connection that carried them, each with a time limit for its evidence.

    An offer is kept only as long as evidence of it matters. Its connection may show none by itself, because its agent
    pipelines, and may be open for weeks.
    """

    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self._by_connection: dict[int, list[Batch]] = {}
        self._limits: dict[int, Timer] = {}

    def add(self, batch: Batch, limit_s: float, overdue: Callable[[Batch], object]) -> None:
        """Await evidence of an offer. Call `overdue` after `limit_s` seconds without it."""
        self._by_connection.setdefault(batch.connection, []).append(batch)
        self._limits[batch.number] = self._timers.call_later(limit_s, partial(self._overdue, batch, overdue))

    def _overdue(self, batch: Batch, overdue: Callable[[Batch], object]) -> None:
        del self._limits[batch.number]
        overdue(batch)

    def on(self, connection: int) -> tuple[Batch, ...]:
        """Return the offers of a connection."""
        return tuple(self._by_connection.get(connection, ()))

    def take(self, connection: int) -> list[Batch]:
        """Return the offers of a connection, and expect nothing more from it. Their time limits go on."""
        return self._by_connection.pop(connection, [])

    def settle(self, batch: Batch) -> None:
        """Await no more evidence of an offer. Idempotent."""
        limit = self._limits.pop(batch.number, None)
        if limit is not None:
            limit.cancel()
        awaiting = self._by_connection.get(batch.connection, [])
        if batch in awaiting:
            awaiting.remove(batch)
            if not awaiting:
                del self._by_connection[batch.connection]

    def __len__(self) -> int:
        """Return the number of offers that are kept for their connections or their time limits."""
        return max(len(self._limits), sum(map(len, self._by_connection.values())))
