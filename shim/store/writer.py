"""The writer's thread: all submissions that wait when it becomes free share one commit."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol

import msgspec

from shim.core.records import Operation
from shim.errors import StoreError
from shim.ports import StoreDone
from shim.store.delivery import CallbackQueue, CallThreadsafe

# Limit of submissions per commit. Larger batches would save little per submission, and would delay submissions that
# arrive meanwhile, such as an agent's result.
MAX_BATCH = 256

# The thread releases the interpreter lock (GIL) for every statement. A busy event loop then holds the lock for Python's
# switch interval, 5 ms: a commit of a hundred statements would take half a second. The interval is shortened only
# during a large batch, because short waits need a timer that expires before the kernel's next tick. With a short
# interval all the time, a commit of one command would take half as much CPU time again.
LARGE_BATCH = 16
SHORT_SWITCH_INTERVAL_S = 0.001
SWITCH_INTERVAL_S = sys.getswitchinterval()

_Submission = tuple[Sequence[Operation], StoreDone | None]
_Outcome = list[Any] | StoreError


class CommitProbe(msgspec.Struct, frozen=True):
    """Callbacks that observe commits. All of them run on the event loop.

    `observe(commit_s, operations)` is called after each successful commit with its duration in seconds by `monotonic`
    and the number of operations. The duration includes waiting for another process.
    `failed(submissions)` is called with the number of submissions that were not stored.
    `corrupt(error)` is called after each commit that failed because the database is corrupt.
    `fenced()` is called once, when another replica has taken the shard.
    `log(size_bytes, pinned)` is called when the size of the write-ahead log has changed noticeably. `pinned` is true
    while a reader prevents its truncation.
    """

    monotonic: Callable[[], float]
    observe: Callable[[float, int], None]
    failed: Callable[[int], None] | None = None
    corrupt: Callable[[StoreError], None] | None = None
    fenced: Callable[[], None] | None = None
    log: Callable[[int, bool], None] | None = None


class Failure(NamedTuple):
    """Reason why a batch was not stored. `concerns_all` is true if a smaller batch would fail with the same error."""

    error: StoreError
    concerns_all: bool = False
    corrupt: bool = False
    fenced: bool = False


class Engine(Protocol):
    """Database connection that carries out batches of submissions. Used by the writer's thread only."""

    def commit(self, batch: Sequence[Sequence[Operation]]) -> list[list[Any]]:
        """Carry out a batch in one synced commit and return one result per operation.

        Raises any exception of the engine or its driver; `failure` explains it.
        """

    def roll_back(self) -> None:
        """Roll back the transaction of a failed commit. Raises nothing."""

    def failure(self, error: Exception) -> Failure:
        """Convert an exception of `commit` into a `Failure`."""

    def close(self) -> None:
        """Close the connection. Raises nothing."""


class Writer:
    """Owner of an engine and of the thread that uses it, from `start()` to `close()`."""

    def __init__(self, engine: Engine, call_threadsafe: CallThreadsafe, probe: CommitProbe | None) -> None:
        self._engine = engine
        self._callbacks = CallbackQueue(call_threadsafe)
        self._probe = probe
        self._fence_reported = False
        self._queue: SimpleQueue[_Submission | None] = SimpleQueue()
        # A daemon thread, so that a process that ends without `close()` does not hang. The database survives that.
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, submission: _Submission) -> None:
        """Queue a submission. Must not be called after `close()`."""
        self._queue.put(submission)

    def close(self, limit_s: float | None = None) -> None:
        """Wait up to `limit_s` until all submissions are carried out and the connection is closed."""
        self._queue.put(None)
        self._thread.join(limit_s)

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        running = True
        while running:
            batch = self._next_batch()
            submissions = [each for each in batch if each is not None]
            running = len(submissions) == len(batch)
            if len(submissions) > LARGE_BATCH:
                sys.setswitchinterval(SHORT_SWITCH_INTERVAL_S)
                self._serve(submissions)
                sys.setswitchinterval(SWITCH_INTERVAL_S)
            elif submissions:
                self._serve(submissions)
        self._engine.close()

    def _next_batch(self) -> list[_Submission | None]:
        batch = [self._queue.get()]
        with contextlib.suppress(Empty):
            while len(batch) < MAX_BATCH:
                batch.append(self._queue.get_nowait())
        return batch

    def refuse_waiting(self, error: StoreError) -> None:
        """Answer all queued submissions with an error, while the engine waits for its database.

        The end marker of `close()` is kept in the queue.
        """
        refused, ending = [], False
        with contextlib.suppress(Empty):
            while True:
                submission = self._queue.get_nowait()
                ending = ending or submission is None
                if submission is not None:
                    refused.append(submission)
        if ending:
            self._queue.put(None)
        if refused:
            callbacks = list(self._bad_news(Failure(error), len(refused)))
            self._callbacks.add(callbacks + [partial(done, error) for _, done in refused if done is not None])

    def _serve(self, batch: list[_Submission]) -> None:
        callbacks: list[Callable[[], None]] = []
        for outcome, (_, done) in zip(self._outcomes(batch, callbacks), batch, strict=True):
            if done is not None:
                callbacks.append(partial(done, outcome))
        self._callbacks.add(callbacks)

    def _outcomes(self, batch: list[_Submission], callbacks: list[Callable[[], None]]) -> list[_Outcome]:
        """Carry out a batch and append calls of the probe to `callbacks`.

        A batch that fails is halved until the failing submission is alone. Savepoints would isolate it too, but would
        make every commit copy each page it touches, for a case that is rare.
        """
        try:
            return self._commit(batch, callbacks)
        except Exception as error:  # noqa: BLE001 - whatever it was, this thread must live to serve the next batch
            self._engine.roll_back()
            failure = self._engine.failure(error)
            if len(batch) == 1 or failure.concerns_all:
                callbacks.extend(self._bad_news(failure, len(batch)))
                return [failure.error] * len(batch)
        half = len(batch) // 2
        return self._outcomes(batch[:half], callbacks) + self._outcomes(batch[half:], callbacks)

    def _bad_news(self, failure: Failure, submissions: int) -> Iterator[Callable[[], None]]:
        probe = self._probe
        if probe is None:
            return
        if probe.failed is not None:
            yield partial(probe.failed, submissions)
        if probe.corrupt is not None and failure.corrupt:
            yield partial(probe.corrupt, failure.error)
        if probe.fenced is not None and failure.fenced and not self._fence_reported:
            self._fence_reported = True
            yield probe.fenced

    def _commit(self, batch: list[_Submission], callbacks: list[Callable[[], None]]) -> list[_Outcome]:
        probe = self._probe
        started = probe.monotonic() if probe is not None else 0.0
        outcomes: list[_Outcome] = [*self._engine.commit([operations for operations, _ in batch])]
        carried_out = sum(len(operations) for operations, _ in batch)
        if probe is not None and carried_out:
            callbacks.append(partial(probe.observe, probe.monotonic() - started, carried_out))
        return outcomes
