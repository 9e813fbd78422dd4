"""Store without content for the readiness probe: a write succeeds if the database answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from shim.core.records import Operation, StoreContents
from shim.errors import StoreError
from shim.ports import StoreDone
from shim.store import CallThreadsafe


class DatabaseProbe:
    """A `ports.CommandStore` for the readiness probe of a replica, which may own no shard.

    `answers` returns whether the database answers.
    """

    def __init__(self, answers: Callable[[], bool], call_threadsafe: CallThreadsafe) -> None:
        self._answers = answers
        self._call_threadsafe = call_threadsafe

    def open(self) -> StoreContents:
        """Return empty contents."""
        return StoreContents(b"")

    def submit(self, operations: Sequence[Operation], done: StoreDone | None = None) -> None:
        """Report success if the database answers, and an error otherwise."""
        if done is not None:
            fault = None if self._answers() else StoreError("the database does not answer")
            self._call_threadsafe(partial(done, fault or [None] * len(operations)))

    def close(self) -> None:
        """Do nothing."""
