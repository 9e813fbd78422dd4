"""Deliver outcomes to the event loop."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from shim.errors import StoreError

# Hands a callable to the event loop from any thread; normally `loop.call_soon_threadsafe`.
CallThreadsafe = Callable[[Callable[[], None]], object]

# Callbacks that run in one turn of the loop: few wake-ups, and no turn in which others wait for long.
_PER_TURN = 32


class CallbackQueue:
    """A queue whose callbacks run on the event loop, in order and a few per turn, so that other work comes in between.

    Callbacks are dropped once the loop is closed.
    """

    def __init__(self, post: CallThreadsafe) -> None:
        self._post = post
        self._waiting: deque[Callable[[], None]] = deque()
        self._scheduled = False

    def add(self, callbacks: Sequence[Callable[[], None]]) -> None:
        """Queue callbacks; may be called from any thread."""
        self._waiting.extend(callbacks)
        self._schedule()

    def _schedule(self) -> None:
        if self._waiting and not self._scheduled:
            self._scheduled = True
            with contextlib.suppress(RuntimeError):
                self._post(self._turn)

    def _turn(self) -> None:
        waiting = self._waiting
        due = [waiting.popleft() for _ in range(min(_PER_TURN, len(waiting)))]
        # Without a lock: callbacks that another thread adds before this line are found after it, and those that it adds
        # after this line it schedules itself. Both may happen; the second turn then has less to do, or nothing.
        self._scheduled = False
        self._schedule()
        _run_batch(due)


def run_on_loop(post: CallThreadsafe, callbacks: Sequence[Callable[[], None]]) -> None:
    """Have the event loop call these in order, at once. With a closed loop nobody is left who could be told."""
    with contextlib.suppress(RuntimeError):
        post(partial(_run_batch, callbacks))


def _run_batch(callbacks: Sequence[Callable[[], None]]) -> None:
    """Call all; what some of them raise goes to the loop's exception handler when all have been called."""
    errors = []
    for callback in callbacks:
        try:
            callback()
        except Exception as error:  # noqa: BLE001 - one failing callback must not take the outcome from the others
            errors.append(error)
    if errors:
        raise ExceptionGroup("callbacks of the store failed", errors)


def store_error(error: Exception) -> StoreError:
    """The same as a `StoreError`, without anything of what was to be stored."""
    if isinstance(error, sqlite3.Error):
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        return StoreError(f"the database refused: {name}")
    return StoreError(f"it cannot be stored: {type(error).__name__}")
