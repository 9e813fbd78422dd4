"""A store that keeps nothing: what is written to it tells whether the database answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from shim.core.records import Operation, StoreContents
from shim.errors import StoreError
from shim.ports import StoreDone
from shim.store import CallThreadsafe


class DatabaseProbe:
    """A `ports.CommandStore` for the readiness probe of a replica, which may own no shard. `answers` decides."""

    def __init__(self, answers: Callable[[], bool], post: CallThreadsafe) -> None:
        self._answers = answers
        self._post = post

    def open(self) -> StoreContents:
        """Return nothing."""
        return StoreContents(b"")

    def submit(self, operations: Sequence[Operation], done: StoreDone | None = None) -> None:
        """Report success or failure of what was submitted."""
        if done is not None:
            fault = None if self._answers() else StoreError("the database does not answer")
            self._post(partial(done, fault or [None] * len(operations)))

    def close(self) -> None:
        """Close nothing."""
