"""Takes, serves and gives away the shards of this replica."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from shim.bridge import Bridge
from shim.composition import Surroundings
from shim.core.shards import moves
from shim.errors import StoreError
from shim.logs import get
from shim.settings import Settings
from shim.shards.metrics import ShardMetrics
from shim.shards.shard import Shard
from shim.shards.table import Table
from shim.shards.tenure import Tenure

log = get(__name__)

LOOK_S = 0.25
AFTER_FAILURE_S = 3.0
SETTLE_S = 1.0
"""Replicas that start together wait for each other: what one takes alone it would have to give away."""


class Steward:
    """The shards here. `owner_key` is set before it starts."""

    def __init__(
        self, around: Surroundings, table: Table, tenure: Tenure, metrics: ShardMetrics, changed: Callable[[], None]
    ) -> None:
        self.owner_key = b""
        self.stopping = False
        self.settings = around.settings
        self._around = around
        self._table = table
        self._tenure = tenure
        self._metrics = metrics
        self._changed = changed
        self._shards: dict[int, Shard] = {}
        self._busy: set[int] = set()
        self._not_before: dict[int, float] = {}
        self._joined_at: float | None = None

    # --- what is here -------------------------------------------------------------------------------------------------

    def usable(self, number: int) -> Shard | None:
        """A shard that is ours and serves."""
        shard = self._shards.get(number)
        return shard if shard is not None and shard.usable else None

    def serving(self) -> list[Shard]:
        """All of them."""
        return [shard for shard in self._shards.values() if shard.usable]

    def bridges(self) -> list[Bridge]:
        """Their bridges."""
        return [shard.bridge for shard in self.serving()]

    def reload(self, settings: Settings) -> None:
        """Go on with these settings."""
        self.settings = settings
        for shard in self._shards.values():
            shard.bridge.ctx.settings = settings

    # --- taking and giving away ---------------------------------------------------------------------------------------

    async def run(self, me: str) -> None:
        """Look what is to be done, at each change and from time to time, until cancelled."""
        while True:
            self._table.forget()
            if not self.stopping:
                self._look(me)
            await self._table.change(LOOK_S)

    def _look(self, me: str) -> None:
        members = self._table.members()
        self._metrics.replicas.set(len(members))
        holders = {shard: holder for shard, holder in self._table.holders().items() if holder != me}
        holders |= dict.fromkeys((*self._tenure.shards(), *self._busy), me)
        staying = [process for process, entry in members.items() if not entry.leaving]
        wanted = moves(me, self.settings.shards.count, staying, holders)
        now = self._around.clock.monotonic_s()
        if self._joined_at is None and me in members:
            self._joined_at = now
        settled = any(each != me for each in holders.values()) or (
            self._joined_at is not None and now >= self._joined_at + SETTLE_S
        )
        for number in wanted.take if settled else ():
            if self._not_before.get(number, 0.0) <= now:
                self._begin(number, self._take(number))
        for number in wanted.give:
            self._begin(number, self.give(number))

    def _begin(self, number: int, step: Any) -> None:
        if number in self._busy:
            step.close()
            return
        self._busy.add(number)

        async def carry_out() -> None:
            try:
                await step
            finally:
                self._busy.discard(number)
                self._changed()

        self._around.spawn(f"shard {number}", carry_out())

    async def _take(self, number: int) -> None:
        try:
            term = await self._tenure.take(number)
        except StoreError:
            self._later(number, LOOK_S)
            return
        if term is None:
            self._later(number, LOOK_S)
            return
        self._tenure.arm(number)
        shard = self._shards[number] = Shard(number, term, self._around, self.owner_key, self.settings)
        try:
            await shard.open()
        except StoreError as error:
            log.error("shard_not_opened", shard=number, error=str(error))
            self._metrics.released.labels("failed").inc()
            self._shards.pop(number, None)
            self._later(number, AFTER_FAILURE_S)
            await self._tenure.give_back(number)
            return
        if shard.usable:
            self._metrics.taken.inc()
            self._count()
            log.info("shard_taken", shard=number, fence=term.revision)

    def _later(self, number: int, after_s: float) -> None:
        self._not_before[number] = self._around.clock.monotonic_s() + after_s

    async def give(self, number: int) -> None:
        """Let another replica have a shard: everything of ours under it is over before."""
        shard = self._shards.pop(number, None)
        if shard is None:
            await self._tenure.give_back(number)
            return
        shard.stop()
        await shard.close()
        await self._tenure.give_back(number)
        self._metrics.released.labels("given").inc()
        self._count()
        log.info("shard_given", shard=number)

    def ended(self, number: int, reason: str) -> None:
        """A lease ended by itself: nothing more goes out."""
        shard = self._shards.pop(number, None)
        if shard is None:
            return
        shard.cut()
        self._metrics.released.labels(reason).inc()
        self._count()
        self._begin(number, shard.close())
        self._changed()

    def _count(self) -> None:
        self._metrics.shards.set(len(self.serving()))

    async def give_all(self) -> None:
        """Give everything away."""
        self.stopping = True
        numbers = {*self._shards, *self._tenure.shards()}
        await asyncio.gather(*(self.give(number) for number in numbers))

    async def close(self) -> None:
        """What could not be given away is left."""
        for shard in list(self._shards.values()):
            shard.cut()
            await shard.close()
