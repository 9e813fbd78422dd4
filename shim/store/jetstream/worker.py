"""Carries submissions out on the mirror and commits what they changed, in a thread and on a loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from shim.core.records import Loaded, Operation, Touch
from shim.errors import StoreError
from shim.ports import StoreDone
from shim.store.delivery import Post, deliver, store_error
from shim.store.jetstream import journal
from shim.store.jetstream.keeper import Keeper, Taken
from shim.store.jetstream.layout import RowKey
from shim.store.jetstream.mirror import Mirror
from shim.store.jetstream.server import Rejected, Unavailable
from shim.store.writer import CommitProbe

# After a failure nobody is kept waiting long.
DOWN_LIMIT_S = 2.5
# All that a store which closes still waits for: the shim stops within 5 s, servers or not.
CLOSE_LIMIT_S = 2.5
# How often rows that could not be written are tried again while nothing else is to be done.
RETRY_S = 1.0
_BATCH = 500

Submission = tuple[Sequence[Operation], StoreDone | None]
_Outcome = list[Any] | StoreError


@dataclass(frozen=True, slots=True)
class Limits:
    """How long may be waited for the servers, in seconds.

    A cluster that lost a node needs some seconds to agree on a new leader; the commits of that time wait for it.
    """

    commit_s: float = 8.0
    open_s: float = 30.0


class Worker:
    """Made and `run` on the loop of its thread; `submit` and `close` come from any other, once `run` has opened."""

    def __init__(self, keeper: Keeper, post: Post, probe: CommitProbe | None, limits: Limits) -> None:
        self._keeper = keeper
        self._post = post
        self._probe = probe
        self._limits = limits
        self._mirror = Mirror()
        self._queue: asyncio.Queue[Submission | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._scope: asyncio.Timeout | None = None
        self._is_down = False
        self._closes_at = math.inf

    def submit(self, submission: Submission) -> None:
        """Queue a submission; not after `close()`."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, submission)

    def close(self) -> None:
        """Have `run` end when what was submitted is carried out, or cannot be."""
        self._loop.call_soon_threadsafe(self._hurry)

    def _hurry(self) -> None:
        self._closes_at = self._loop.time() + CLOSE_LIMIT_S
        self._queue.put_nowait(None)
        if self._scope is not None:
            self._scope.reschedule(min(self._closes_at, self._scope.when() or math.inf))

    async def run(self, opened: Future[Loaded]) -> None:
        """Open the store, tell so, and serve until `close()`."""
        try:
            try:
                loaded = await self._open()
            except Exception as error:  # noqa: BLE001 - who waits for `opened` must be told, whatever it was
                opened.set_exception(error if isinstance(error, StoreError) else store_error(error))
                return
            opened.set_result(loaded)
            await self._serve()
        finally:
            self._mirror.close()

    async def _open(self) -> Loaded:
        reason = "the NATS server did not answer in time"
        try:
            async with asyncio.timeout(self._limits.open_s):
                while isinstance(taken := await self._take_over(), str):
                    reason = taken
                    await asyncio.sleep(RETRY_S)
                loaded, refused = self._mirror.fill(taken.rows, taken.high)
                self._mirror.begin()
                writes = self._keeper.needed(self._mirror.changes())
                await self._keeper.commit(writes, self._mirror.high())
                self._mirror.commit()
                await self._keeper.settle()
                await self._keeper.purge()
        except TimeoutError:
            raise StoreError(reason) from None
        return replace(loaded, quarantined=loaded.quarantined + taken.unreadable + refused)

    async def _take_over(self) -> Taken | str:
        """What the keeper found, or why it has to be tried again."""
        try:
            return await self._keeper.open()
        except Rejected:
            raise
        except Unavailable as error:
            return str(error)

    # --- serving ------------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        running = True
        while running:
            batch = await self._next_batch()
            submissions = [each for each in batch if each is not None]
            running = len(submissions) == len(batch)
            if submissions:
                await self._carry_out(submissions)
            with contextlib.suppress(StoreError):
                await self._within_limit(self._keeper.settle)
        with contextlib.suppress(StoreError):
            await self._within_limit(self._keeper.purge)

    async def _next_batch(self) -> list[Submission | None]:
        batch: list[Submission | None] = []
        try:
            async with asyncio.timeout(RETRY_S if self._keeper.is_behind else None):
                batch.append(await self._queue.get())
        except TimeoutError:
            return batch
        while len(batch) < _BATCH and not self._queue.empty() and batch[-1] is not None:
            batch.append(self._queue.get_nowait())
        return batch

    async def _carry_out(self, batch: list[Submission]) -> None:
        callbacks: list[Callable[[], None]] = []
        try:
            outcomes = await self._outcomes(batch, callbacks)
        except Exception as error:  # noqa: BLE001 - whatever it was, this thread must live to serve the next batch
            self._mirror.roll_back()
            failure = error if isinstance(error, StoreError) else store_error(error)
            outcomes = [failure] * len(batch)
            if self._probe is not None and self._probe.failed is not None:
                callbacks.append(partial(self._probe.failed, len(batch)))
        for outcome, (_, done) in zip(outcomes, batch, strict=True):
            if done is not None:
                callbacks.append(partial(done, outcome))
        deliver(self._post, callbacks)

    async def _outcomes(self, batch: list[Submission], callbacks: list[Callable[[], None]]) -> list[_Outcome]:
        probe = self._probe
        started = probe.monotonic() if probe is not None else 0.0
        self._mirror.begin()
        writes: dict[RowKey, bytes | None] = {}
        outcomes = [self._one(operations, writes) for operations, _ in batch]
        failed = sum(isinstance(each, StoreError) for each in outcomes)
        touched = any(isinstance(each, Touch) for operations, _ in batch for each in operations)
        await self._commit(writes, touched)
        self._mirror.commit()
        if probe is not None:
            carried_out = sum(len(operations) for operations, _ in batch)
            callbacks.append(partial(probe.observe, probe.monotonic() - started, carried_out))
            if failed and probe.failed is not None:
                callbacks.append(partial(probe.failed, failed))
        return outcomes

    def _one(self, operations: Sequence[Operation], writes: dict[RowKey, bytes | None]) -> _Outcome:
        """Carry out one submission on the mirror, and add its rows to `writes` if all of them can be stored."""
        try:
            results, changed = self._mirror.carry_out(operations)
        except Exception as error:  # noqa: BLE001 - it is the fault of this submission; the others must not suffer
            return store_error(error)
        limit = self._keeper.max_payload_bytes
        if not all(journal.fits(key, value, limit) for key, value in changed.items()):
            self._mirror.undo()
            return StoreError(f"it is larger than the NATS server takes (max_payload: {limit} bytes)")
        writes.update(changed)
        return results

    async def _commit(self, writes: dict[RowKey, bytes | None], touched: bool) -> None:
        if writes or touched:
            await self._within_limit(self._keeper.settle)
            needed = self._keeper.needed(writes)
            await self._within_limit(lambda: self._keeper.commit(needed, self._mirror.high()))
            self._is_down = False

    async def _within_limit(self, step: Callable[[], Any]) -> None:
        limit_s = self._limits.commit_s
        if self._is_down:
            limit_s = min(limit_s, DOWN_LIMIT_S)
        ends_at = min(self._loop.time() + limit_s, self._closes_at)
        try:
            async with asyncio.timeout_at(ends_at) as self._scope:
                await step()
        except TimeoutError:
            self._is_down = True
            raise StoreError("the NATS server did not answer in time") from None
        finally:
            self._scope = None
