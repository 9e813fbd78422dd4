"""Base of the stores that write in a thread."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial

from shim.core.records import Operation
from shim.errors import StoreError
from shim.ports import StoreDone
from shim.store.delivery import CallThreadsafe, run_on_loop
from shim.store.writer import Writer


class QueuedStore:
    """A `ports.CommandStore` without `open()`. The subclass's `open()` calls `_start`."""

    def __init__(self, call_threadsafe: CallThreadsafe) -> None:
        self._call_threadsafe = call_threadsafe
        # Without the lock, a submission could be queued after the end marker of `Writer.close` and never be answered.
        self._gate = threading.Lock()
        self._writer: Writer | None = None

    def _start(self, writer: Writer) -> None:
        self._writer = writer
        writer.start()

    def submit(self, operations: Sequence[Operation], done: StoreDone | None = None) -> None:
        """Queue operations (`ports.CommandStore`). If the store is not open, `done` gets a `StoreError`."""
        with self._gate:
            if self._writer is not None:
                self._writer.submit((tuple(operations), done))
                return
        if done is not None:
            run_on_loop(self._call_threadsafe, [partial(done, StoreError("the store is not open"))])

    def _stop(self, limit_s: float | None = None) -> None:
        with self._gate:
            writer, self._writer = self._writer, None
        if writer is not None:
            writer.close(limit_s)
