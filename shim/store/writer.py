"""The writing thread of a store. All submissions that wait when it becomes free share one commit.

Outcomes are passed to the event loop a few at a time.
"""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec

from shim.clock import Clock
from shim.core.records import (
    CheckStore,
    FindCommand,
    LookUpCommand,
    MoveSession,
    Operation,
    ReadOutbox,
    StoreOperation,
)
from shim.errors import StoreError
from shim.log import get
from shim.metrics import Metrics
from shim.ports import StoreDone

log = get(__name__)

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

# Pause before moves of sessions that the database refused are repeated, unless something is submitted earlier.
RETRY_S = 5.0

_READS = (CheckStore, FindCommand, LookUpCommand, ReadOutbox)

# Callbacks per turn of the event loop: enough to need few wake-ups, few enough not to delay other work.
_PER_TURN = 32
_PINNED_HINT = (
    "another program reads the database in a transaction that it does not end, and the log beside the database grows "
    "with every commit: end that program (a backup, a sqlite3 shell); the log is then emptied within half a minute"
)

_Result = TypeVar("_Result")
# Its first operation's result is the outcome of a submission, unless that is a `StoreError`.
_Submission = tuple[tuple[Operation, ...], StoreDone[Any] | None]

CallThreadsafe = Callable[[Callable[[], None]], object]
"""Schedules a callable on the event loop from any thread; normally `loop.call_soon_threadsafe`."""


def _ignore(*_: object) -> None:
    pass


class CommitProbe(msgspec.Struct, frozen=True):
    """Callbacks that observe commits, and the clock for their duration.

    All callbacks run on the event loop, and do nothing unless they are given. `monotonic` is called in any thread.

    `observe(commit_s, operations)` is called after each successful commit with its duration in seconds by `monotonic`
    and the number of operations. The duration includes waiting for another process.
    `failed(submissions)` is called with the number of submissions that were not stored.
    `corrupt(error)` is called after each commit that failed because the database is corrupt, and when an exception has
    ended the writer's thread.
    `fenced()` is called once, when another replica has taken the shard.
    `log(size_bytes, pinned)` is called when the size of the write-ahead log has changed noticeably. `pinned` is true
    while a reader prevents its truncation.
    """

    monotonic: Callable[[], float] = Clock.monotonic_s
    observe: Callable[[float, int], None] = _ignore
    failed: Callable[[int], None] = _ignore
    corrupt: Callable[[StoreError], None] = _ignore
    fenced: Callable[[], None] = _ignore
    log: Callable[[int, bool], None] = _ignore


UNOBSERVED = CommitProbe()


def commit_probe(
    metrics: Metrics, broken: Callable[[StoreError], None], fenced: Callable[[], None] = _ignore
) -> CommitProbe:
    """Return a probe that feeds the metrics of the store.

    `broken` is called when a commit finds the database corrupt, `fenced` when another replica has taken the shard.
    """

    def observe(commit_s: float, operations: int) -> None:
        """Count one commit, its seconds and its operations."""
        metrics.store_commit_seconds.observe(commit_s)
        metrics.store_operations.inc(operations)

    def log_size(size_bytes: int, pinned: bool) -> None:
        """Record the size of the write-ahead log, and warn if a reader keeps it from shrinking."""
        metrics.store_log_bytes.set(size_bytes)
        metrics.store_log_pinned.set(pinned)
        if pinned:
            log.warning("store_log_pinned", dedupe_key="store.path", size_bytes=size_bytes, hint=_PINNED_HINT)

    return CommitProbe(Clock.monotonic_s, observe, metrics.store_failures.inc, broken, fenced, log_size)


class Failure(NamedTuple):
    """Reason why a batch was not stored.

    `affects_whole_batch` is true if a smaller batch would fail as well, `temporary` if the same batch may be stored
    later.
    """

    error: StoreError
    affects_whole_batch: bool = False
    temporary: bool = False
    corrupt: bool = False
    fenced: bool = False


class Engine(Protocol):
    """Database connection that carries out batches of submissions. Used by the writer's thread only."""

    def commit(self, batch: Sequence[Sequence[Operation]]) -> list[Any]:
        """Carry out a batch in one synced commit. Returns the result of each submission's first operation.

        Raises any exception of the engine or its driver; `failure` explains it.
        """

    def roll_back(self) -> None:
        """Roll back the transaction of a failed commit. Raises nothing."""

    def failure(self, error: Exception) -> Failure:
        """Convert an exception of `commit` into a `Failure`."""

    def close(self) -> None:
        """Close the connection. Raises nothing."""


class Writer:
    """Owner of an engine and of the thread that uses it, from `start()` to `close()`.

    A submission is put into `queue`, never after `close()`; None ends the thread.

    A `MoveSession` that the database cannot store at present is repeated, and all changes that were submitted after it
    are refused until it is stored. Otherwise changes of the moved commands, which name the session that has them now,
    would change nothing and yet succeed.
    """

    def __init__(self, engine: Engine, call_threadsafe: CallThreadsafe, probe: CommitProbe) -> None:
        self._engine = engine
        self._call_threadsafe = call_threadsafe
        self._callbacks = CallbackQueue(call_threadsafe)
        self._probe = probe
        self._fence_reported = False
        self._unmoved: list[_Submission] = []  # moves that were refused, in order
        self._unmoved_in_queue: list[_Submission] = []  # and those that were submitted after them
        self._refusal = Failure(StoreError("a session could not be moved"))  # why the last move was refused
        self.queue: SimpleQueue[_Submission | None] = SimpleQueue()
        # A daemon thread, so that a process that ends without `close()` does not hang. The database survives that.
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, limit_s: float | None = None) -> None:
        """Wait up to `limit_s` until all submissions are carried out and the connection is closed."""
        self.queue.put(None)
        self._thread.join(limit_s)

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Serve submissions until the end marker. An exception ends the process: nobody would answer a submission."""
        try:
            self._serve_all()
        except Exception as error:
            ended = StoreError(f"the thread of the store has ended: {type(error).__name__}")
            run_on_loop(self._call_threadsafe, [partial(self._probe.corrupt, ended)])
            raise

    def _serve_all(self) -> None:
        running = True
        while running:
            batch = self._next_batch()
            running = None not in batch
            submissions = [*self._unmoved, *self._unmoved_in_queue, *(each for each in batch if each is not None)]
            self._unmoved, self._unmoved_in_queue = [], []
            if len(submissions) > LARGE_BATCH:
                sys.setswitchinterval(SHORT_SWITCH_INTERVAL_S)
                self._serve(submissions)
                sys.setswitchinterval(SWITCH_INTERVAL_S)
            elif submissions:
                self._serve(submissions)
        self._engine.close()

    def _next_batch(self) -> list[_Submission | None]:
        unmoved = self._unmoved or self._unmoved_in_queue
        batch: list[_Submission | None] = []
        with contextlib.suppress(Empty):
            batch.append(self.queue.get(timeout=RETRY_S if unmoved else None))
            while len(batch) < MAX_BATCH:
                batch.append(self.queue.get_nowait())
        return batch

    def fail_waiting(self, error: StoreError) -> None:
        """Answer all queued submissions with an error, while the engine waits for its database.

        The end marker of `close()` is kept in the queue.
        """
        refused, ending = [], False
        with contextlib.suppress(Empty):
            while True:
                submission = self.queue.get_nowait()
                ending = ending or submission is None
                if submission is not None:
                    refused.append(submission)
        if ending:
            self.queue.put(None)
        self._unmoved_in_queue += _moves(refused)
        if refused:
            callbacks = list(self._failure_callbacks(Failure(error), len(refused)))
            self._callbacks.add(callbacks + [partial(done, error) for _, done in refused if done is not None])

    def _serve(self, batch: list[_Submission]) -> None:
        callbacks: list[Callable[[], None]] = []
        for outcome, (_, done) in zip(self._outcomes(batch, callbacks), batch, strict=True):
            if done is not None:
                callbacks.append(partial(done, outcome))
        self._callbacks.add(callbacks)

    def _outcomes(self, batch: list[_Submission], callbacks: list[Callable[[], None]]) -> list[Any]:
        """Carry out a batch and append calls of the probe to `callbacks`.

        A batch that fails is halved until the failing submission is alone. Savepoints would isolate it too, but would
        make every commit copy each page it touches, for a case that is rare.
        """
        failure = self._refusal
        if not self._unmoved or all(map(_only_reads, batch)):
            try:
                return self._commit(batch, callbacks)
            except Exception as error:  # noqa: BLE001 - whatever it was, this thread must live to serve the next batch
                self._engine.roll_back()
                failure = self._engine.failure(error)
                if isinstance(error, MemoryError):
                    failure = failure._replace(temporary=True)
        if len(batch) == 1 or failure.affects_whole_batch:
            return self._refused(batch, failure, callbacks)
        half = len(batch) // 2
        return self._outcomes(batch[:half], callbacks) + self._outcomes(batch[half:], callbacks)

    def _refused(
        self, batch: list[_Submission], failure: Failure, callbacks: list[Callable[[], None]]
    ) -> list[StoreError]:
        callbacks.extend(self._failure_callbacks(failure, len(batch)))
        moves = _moves(batch)
        if failure.temporary:
            self._unmoved += moves
            self._refusal = failure._replace(affects_whole_batch=False)
        elif moves and not failure.fenced:
            log.error("session_not_moved", moves=len(moves), error=str(failure.error))
        return [failure.error] * len(batch)

    def _failure_callbacks(self, failure: Failure, submissions: int) -> Iterator[Callable[[], None]]:
        yield partial(self._probe.failed, submissions)
        if failure.corrupt:
            yield partial(self._probe.corrupt, failure.error)
        if failure.fenced and not self._fence_reported:
            self._fence_reported = True
            yield self._probe.fenced

    def _commit(self, batch: list[_Submission], callbacks: list[Callable[[], None]]) -> list[Any]:
        probe = self._probe
        started = probe.monotonic()
        outcomes: list[Any] = [*self._engine.commit([operations for operations, _ in batch])]
        carried_out = sum(len(operations) for operations, _ in batch)
        if carried_out:
            callbacks.append(partial(probe.observe, probe.monotonic() - started, carried_out))
        return outcomes


def _moves(refused: Sequence[_Submission]) -> list[_Submission]:
    """Return the moves among refused submissions, to be repeated. Their callers get no second answer."""
    return [(operations, None) for operations, _ in refused if isinstance(operations[0], MoveSession)]


def _only_reads(submission: _Submission) -> bool:
    return all(isinstance(operation, _READS) for operation in submission[0])


class QueuedStore:
    """A `ports.CommandStore` without `open()`. The subclass's `open()` calls `_start`."""

    def __init__(self, call_threadsafe: CallThreadsafe) -> None:
        self._call_threadsafe = call_threadsafe
        # Without the lock, a submission could be queued after the end marker of `Writer.close` and never be answered.
        self._submit_lock = threading.Lock()
        self._writer: Writer | None = None

    def _start(self, writer: Writer) -> None:
        self._writer = writer
        writer.start()

    def submit(
        self, operation: StoreOperation[_Result], *also: Operation, done: StoreDone[_Result] | None = None
    ) -> None:
        """Queue operations (`ports.CommandStore`). If the store is not open, `done` gets a `StoreError`."""
        with self._submit_lock:
            if self._writer is not None:
                self._writer.queue.put(((operation, *also), done))
                return
        if done is not None:
            run_on_loop(self._call_threadsafe, [partial(done, StoreError("the store is not open"))])

    def _stop(self, limit_s: float | None = None) -> None:
        with self._submit_lock:
            writer, self._writer = self._writer, None
        if writer is not None:
            writer.close(limit_s)


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
