"""Management of this replica's shards: acquire, serve, release.

Once the row of a replica that died is deleted, its shards are acquired like all others that no member holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import lru_cache
from typing import Any

from shim.bridge import Bridge
from shim.bridge.context import DEFAULT_OWNER
from shim.cluster.membership import Membership
from shim.cluster.shard import Shard
from shim.config.settings import Settings
from shim.core.shards import Member, owner_id, plan_rebalance, shard_of
from shim.errors import StoreError
from shim.log import get
from shim.metrics import ClusterMetrics
from shim.ports import Clock
from shim.upstream.dialler import Spawn

log = get(__name__)

CHECK_S = 0.25
AFTER_FAILURE_S = 3.0
REMEMBERED_TOKENS = 65_536
SETTLE_S = 1.0
"""Replicas that start together wait for each other: shards that one acquires alone would soon have to move."""

MakeShard = Callable[[int, int], Shard]
"""Function that makes a shard from its number and its fencing token."""


class ShardManager:
    """Shards of this replica. `count` must be set before `run`; `opened` is called with the bridge of each."""

    def __init__(
        self,
        membership: Membership,
        make: MakeShard,
        opened: Callable[[Bridge], None],
        clock: Clock,
        spawn: Spawn,
        metrics: ClusterMetrics,
    ) -> None:
        self.count = 0
        self._membership = membership
        self._make = make
        self._opened = opened
        self._clock = clock
        self._spawn = spawn
        self._metrics = metrics
        self._shards: dict[int, Shard] = {}
        self._busy: set[int] = set()
        self._not_before: dict[int, float] = {}
        self._joined_at: float | None = None

    # --- what is here -------------------------------------------------------------------------------------------------

    def usable(self, number: int) -> Shard | None:
        """Return a shard if it is here and can serve calls."""
        shard = self._shards.get(number)
        return shard if shard is not None and shard.usable else None

    def serving(self) -> list[Shard]:
        """Return all shards that can serve calls."""
        return [shard for shard in self._shards.values() if shard.usable]

    def bridges(self) -> list[Bridge]:
        """Return the bridges of all shards that can serve calls."""
        return [shard.bridge for shard in self.serving()]

    def reload(self, settings: Settings) -> None:
        """Apply new settings to all shards."""
        for shard in self._shards.values():
            shard.bridge.ctx.settings = settings
            shard.fallback.reload()

    # --- takeover and release -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Acquire and release shards at each change and at intervals, until cancelled."""
        while True:
            if not self._membership.leaving:
                self._reconcile()
            await self._membership.wait_for_change(CHECK_S)

    def _reconcile(self) -> None:
        membership, now = self._membership, self._clock.monotonic_s()
        me, view = membership.me.process, membership.view
        self._metrics.replicas.set(len(view.members))
        if not membership.valid():
            return
        for number, shard in list(self._shards.items()):
            if view.leases.get(number, ("", 0))[1] > shard.fence and number not in self._busy:
                self._end(number, "taken")
        holders = {shard: holder for shard, holder in view.holders().items() if holder != me}
        holders |= dict.fromkeys((*self._shards, *self._busy), me)
        staying = [process for process, member in view.members.items() if not member.leaving]
        wanted = plan_rebalance(me, self.count, staying, holders)
        if self._joined_at is None and me in view.members:
            self._joined_at = now
        settled = any(each != me for each in holders.values()) or (
            self._joined_at is not None and now >= self._joined_at + SETTLE_S
        )
        for number in wanted.acquire if settled else ():
            if self._not_before.get(number, 0.0) <= now:
                self._run_exclusive(number, self._acquire(number))
        for number in wanted.release:
            self._run_exclusive(number, self._release(number))

    def _run_exclusive(self, number: int, step: Coroutine[Any, Any, None]) -> None:
        if number in self._busy:
            step.close()
            return
        self._busy.add(number)

        async def carry_out() -> None:
            """Acquire or release the shard, then have all shards looked at again."""
            try:
                await step
            except StoreError as error:
                log.warning("shard_step_failed", shard=number, error=str(error))
                self._retry_after(number, CHECK_S)
            finally:
                self._busy.discard(number)
                self._membership.notify()

        self._spawn(f"shard {number}", carry_out())

    async def _acquire(self, number: int) -> None:
        fence = await self._membership.acquire(number)
        if fence is None:
            self._retry_after(number, CHECK_S)
            self._membership.refresh_soon()
            return
        shard = self._shards[number] = self._make(number, fence)
        try:
            await shard.open()
        except StoreError as error:
            log.error("shard_not_opened", shard=number, error=str(error))
            self._metrics.released.labels("failed").inc()
            self._shards.pop(number, None)
            self._retry_after(number, AFTER_FAILURE_S)
            await shard.close()
            await self._membership.release([number])
            return
        if not shard.usable:
            await shard.close()  # the lease ended meanwhile
            self._shards.pop(number, None)
            return
        self._opened(shard.bridge)
        self._metrics.taken.inc()
        self._count()
        log.info("shard_taken", shard=number, fence=fence)

    def _retry_after(self, number: int, after_s: float) -> None:
        self._not_before[number] = self._clock.monotonic_s() + after_s

    async def _release(self, number: int) -> None:
        """Close a shard, then release its lease. In this order, two replicas never serve it at the same time."""
        await self._close(number)
        await self._membership.release([number])

    async def _close(self, number: int) -> None:
        shard = self._shards.get(number)
        if shard is None:
            return
        shard.stop()
        await shard.close()
        self._shards.pop(number, None)
        self._metrics.released.labels("given").inc()
        self._count()
        log.info("shard_given", shard=number)

    def lease_lost(self, reason: str) -> None:
        """Stop all shards at once, because the membership has ended."""
        for number in list(self._shards):
            self._end(number, reason)

    def fenced(self, number: int, fence: int) -> None:
        """Stop a shard whose store reported that another replica has taken it."""
        shard = self._shards.get(number)
        if shard is not None and shard.fence == fence:
            self._end(number, "taken")

    def _end(self, number: int, reason: str) -> None:
        shard = self._shards.pop(number, None)
        if shard is None:
            return
        log.warning("shard_lost", shard=number, reason=reason)
        shard.cut()
        self._metrics.released.labels(reason).inc()
        self._count()
        self._run_exclusive(number, shard.close())  # a shard that is being opened or released is closed by that step
        self._membership.notify()

    def _count(self) -> None:
        self._metrics.shards.set(len(self.serving()))

    async def release_all(self) -> None:
        """Close all shards of a replica that is leaving. Raises `StoreError`."""
        while self._busy:  # a shard that is being opened must be open before it can be closed
            await self._membership.wait_for_change(CHECK_S)
        await asyncio.gather(*(self._close(number) for number in list(self._shards)))

    async def close(self) -> None:
        """Stop and close the shards that `release_all` has not closed."""
        for shard in list(self._shards.values()):
            shard.cut()
            await shard.close()


class ShardLocator:
    """Finder of a token's shard, and of the replica that owns it.

    `shard_of(token)` returns the number of a caller's shard, `None` without a token where one is needed.
    """

    def __init__(self, shards: ShardManager, membership: Membership, *, own_tokens: bool) -> None:
        """Create a locator that finds nothing until `agree`. `own_tokens` is true if agents bring their own tokens."""
        self._shards = shards
        self._membership = membership
        self.shard_of: Callable[[str], int | None] = lambda _: None
        self._own_tokens = own_tokens

    def agree(self, key: bytes, count: int) -> None:
        """Set the key for owner ids and the number of shards, which all replicas share."""
        default = shard_of(DEFAULT_OWNER, count)

        def of_own_token(token: str) -> int | None:
            """Return the shard of an agent's own token, or None without a token."""
            return shard_of(owner_id(key, token), count) if token else None

        self.shard_of = lru_cache(REMEMBERED_TOKENS)(of_own_token) if self._own_tokens else lambda _: default

    def local(self, token: str) -> Shard | None:
        """Return the shard of a caller if this replica owns it and can serve it now."""
        number = self.shard_of(token)
        return None if number is None else self._shards.usable(number)

    def is_elsewhere(self, token: str) -> bool:
        """Return whether this replica cannot carry out calls with this token now."""
        number = self.shard_of(token)
        return number is not None and self._shards.usable(number) is None

    def remote_owner(self, token: str) -> Member | None:
        """Return the replica that owns the shard of a token, `None` if that is this one or none."""
        number = self.shard_of(token)
        owner = None if number is None else self._membership.view.owner(number)
        return None if owner is None or owner.process == self._membership.me.process else owner
