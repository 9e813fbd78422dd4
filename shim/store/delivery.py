"""Outcomes on their way back to the event loop."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from functools import partial

from shim.errors import StoreError

# Hands a callable to the event loop from any thread; normally `loop.call_soon_threadsafe`.
Post = Callable[[Callable[[], None]], object]

# So many callbacks run in one turn of the loop: few wake-ups, and none that holds the loop up.
_PER_TURN = 100


def deliver(post: Post, callbacks: Sequence[Callable[[], None]]) -> None:
    """Have the event loop call these in order. With a closed loop nobody is left who could be told."""
    try:
        for start in range(0, len(callbacks), _PER_TURN):
            post(partial(_run, callbacks[start : start + _PER_TURN]))
    except RuntimeError:
        return


def _run(callbacks: Sequence[Callable[[], None]]) -> None:
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
