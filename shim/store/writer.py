"""The one thread that writes: what waits when it becomes free shares one commit."""

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

# Submissions that share a commit. A commit of that many costs little more for each than one of thousands, and what is
# submitted meanwhile, an agent's result say, does not wait for long.
MAX_BATCH = 256

# The thread gives up the interpreter for every statement. A busy event loop then keeps it for Python's switch interval,
# 5 ms: a commit of a hundred statements would take half a second. The interval is shorter only while a large batch is
# carried out, because every wait then needs a timer that is due before the kernel's next tick: with such timers all the
# time, a commit of one command takes half as much CPU time again.
LARGE_BATCH = 16
SHORT_SWITCH_INTERVAL_S = 0.001
SWITCH_INTERVAL_S = sys.getswitchinterval()

_Submission = tuple[Sequence[Operation], StoreDone | None]
_Outcome = list[Any] | StoreError


class CommitProbe(msgspec.Struct, frozen=True):
    """Watches commits: `observe(commit_s, operations)` is called on the event loop after each one that succeeded.

    `commit_s` is the time by `monotonic` (seconds) from the beginning of the transaction to its sync, with any wait for
    another process; `operations` is how many it carried out. `failed(submissions)` is called with how many could not be
    carried out, `corrupt(error)` after each that shows that the database is damaged: nothing will be stored any more.
    `fenced()` is called once, when another replica has taken the shard. `log(size_bytes, pinned)` is called when
    the write-ahead log has grown or shrunk; `pinned`: a reader keeps it from being emptied.
    """

    monotonic: Callable[[], float]
    observe: Callable[[float, int], None]
    failed: Callable[[int], None] | None = None
    corrupt: Callable[[StoreError], None] | None = None
    fenced: Callable[[], None] | None = None
    log: Callable[[int, bool], None] | None = None


class Failure(NamedTuple):
    """Why a batch was not stored. `concerns_all`: a smaller one would fail of the same."""

    error: StoreError
    concerns_all: bool = False
    corrupt: bool = False
    fenced: bool = False


class Engine(Protocol):
    """Carries out batches of submissions; used by the writer's thread only."""

    def commit(self, batch: Sequence[Sequence[Operation]]) -> list[list[Any]]:
        """Carry out a batch in one synced commit; one result per operation. Raises whatever made it impossible."""

    def roll_back(self) -> None:
        """End what a failed commit left behind. Raises nothing."""

    def failure(self, error: Exception) -> Failure:
        """Tell what an exception of `commit` means."""

    def close(self) -> None:
        """Close the connection. Raises nothing."""


class Writer:
    """Owns an engine from `start()` on, until `close()`."""

    def __init__(self, engine: Engine, post: CallThreadsafe, probe: CommitProbe | None) -> None:
        self._engine = engine
        self._callbacks = CallbackQueue(post)
        self._probe = probe
        self._confirm_up_to = False
        self._queue: SimpleQueue[_Submission | None] = SimpleQueue()
        # A daemon, so that a process which dies without `close()` does not hang; the database survives that.
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, submission: _Submission) -> None:
        """Queue a submission; not after `close()`."""
        self._queue.put(submission)

    def close(self, limit_s: float | None = None) -> None:
        """Wait until everything submitted is carried out and the connection is closed, but no longer than `limit_s`."""
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
        """Answer what waits with an error: the engine cannot tell when it will be free."""
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
        """Carry out a batch; what the probe is to be told is appended to `callbacks`.

        A batch that fails is halved until what cannot be stored stands alone. Savepoints would do the same at the price
        of a copy of every page that is touched, paid by every commit for a case that hardly ever comes.
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
        if probe.fenced is not None and failure.fenced and not self._confirm_up_to:
            self._confirm_up_to = True
            yield probe.fenced

    def _commit(self, batch: list[_Submission], callbacks: list[Callable[[], None]]) -> list[_Outcome]:
        probe = self._probe
        started = probe.monotonic() if probe is not None else 0.0
        outcomes: list[_Outcome] = [*self._engine.commit([operations for operations, _ in batch])]
        carried_out = sum(len(operations) for operations, _ in batch)
        if probe is not None and carried_out:
            callbacks.append(partial(probe.observe, probe.monotonic() - started, carried_out))
        return outcomes
