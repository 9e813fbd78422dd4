"""Store without content for the readiness probe: a write succeeds if the database answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from shim.core.records import Operation, StoreContents, StoreOperation
from shim.errors import StoreError
from shim.ports import StoreDone
from shim.store import CallThreadsafe

_Result = TypeVar("_Result")


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

    def submit(
        self, operation: StoreOperation[_Result], *also: Operation, done: StoreDone[_Result] | None = None
    ) -> None:
        """Report success if the database answers, and an error otherwise."""
        del operation, also
        if done is not None:
            fault: Any = None if self._answers() else StoreError("the database does not answer")
            self._call_threadsafe(partial(done, fault))

    def close(self) -> None:
        """Do nothing."""
