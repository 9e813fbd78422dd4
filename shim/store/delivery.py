"""Deliver outcomes to the event loop."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from shim.errors import StoreError

# Hands a callable to the event loop from any thread; normally `loop.call_soon_threadsafe`.
Post = Callable[[Callable[[], None]], object]

# Callbacks that run in one turn of the loop: few wake-ups, and no turn in which others wait for long.
_PER_TURN = 32


class CallbackQueue:
    """Runs callbacks on the event loop, in order, a few in each turn of it: what else the loop has to do comes between.

    With a closed loop nobody is left who could be told.
    """

    def __init__(self, post: Post) -> None:
        self._post = post
        self._waiting: deque[Callable[[], None]] = deque()
        self._scheduled = False
        self._lock = threading.Lock()

    def add(self, callbacks: Sequence[Callable[[], None]]) -> None:
        """Queue callbacks; may be called from any thread."""
        with self._lock:
            self._waiting.extend(callbacks)
            if self._scheduled or not self._waiting:
                return
            self._scheduled = True
        self._schedule()

    def _schedule(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._post(self._turn)

    def _turn(self) -> None:
        with self._lock:
            due = [self._waiting.popleft() for _ in range(min(_PER_TURN, len(self._waiting)))]
            self._scheduled = bool(self._waiting)
        if self._scheduled:
            self._schedule()
        _run(due)


def deliver(post: Post, callbacks: Sequence[Callable[[], None]]) -> None:
    """Have the event loop call these in order, at once. With a closed loop nobody is left who could be told."""
    with contextlib.suppress(RuntimeError):
        post(partial(_run, callbacks))


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
