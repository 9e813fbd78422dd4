"""Delivery of outcomes from the writer's thread to the event loop."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from shim.errors import StoreError

# Schedules a callable on the event loop from any thread; normally `loop.call_soon_threadsafe`.
CallThreadsafe = Callable[[Callable[[], None]], object]

# Callbacks per turn of the loop: enough to need few wake-ups, few enough not to delay other work.
_PER_TURN = 32


class CallbackQueue:
    """A queue whose callbacks run on the event loop, in order and a few per turn, so that other work can run too.

    After the loop is closed, callbacks are dropped.
    """

    def __init__(self, call_threadsafe: CallThreadsafe) -> None:
        self._call_threadsafe = call_threadsafe
        self._waiting: deque[Callable[[], None]] = deque()
        self._scheduled = False

    def add(self, callbacks: Sequence[Callable[[], None]]) -> None:
        """Queue callbacks. May be called from any thread."""
        self._waiting.extend(callbacks)
        self._schedule()

    def _schedule(self) -> None:
        if self._waiting and not self._scheduled:
            self._scheduled = True
            with contextlib.suppress(RuntimeError):
                self._call_threadsafe(self._turn)

    def _turn(self) -> None:
        waiting = self._waiting
        due = [waiting.popleft() for _ in range(min(_PER_TURN, len(waiting)))]
        # No lock is needed. `_schedule` below sees callbacks that another thread added before this line. For callbacks
        # added after this line, the other thread schedules a turn itself. If both happen, the second turn finds fewer
        # callbacks or none.
        self._scheduled = False
        self._schedule()
        _run_batch(due)


def run_on_loop(call_threadsafe: CallThreadsafe, callbacks: Sequence[Callable[[], None]]) -> None:
    """Schedule callbacks to run in order in one turn of the event loop. On a closed loop, drop them."""
    with contextlib.suppress(RuntimeError):
        call_threadsafe(partial(_run_batch, callbacks))


def _run_batch(callbacks: Sequence[Callable[[], None]]) -> None:
    """Call all callbacks, then raise the exceptions of those that failed as one group."""
    errors = []
    for callback in callbacks:
        try:
            callback()
        except Exception as error:  # noqa: BLE001 - one failing callback must not take the outcome from the others
            errors.append(error)
    if errors:
        raise ExceptionGroup("callbacks of the store failed", errors)


def store_error(error: Exception) -> StoreError:
    """Convert an exception to a `StoreError` whose text contains no stored data."""
    if isinstance(error, sqlite3.Error):
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        return StoreError(f"the database refused: {name}")
    return StoreError(f"it cannot be stored: {type(error).__name__}")
