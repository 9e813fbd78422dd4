"""Membership of this replica: renewal of its row, its view of the others, and the loss of its lease."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

from msgspec.structs import replace

from shim.cluster.database import Agreement, Database
from shim.core.shards import HeldLease, LeasePolicy, Member, View
from shim.errors import ConfigError, ShimError, StoreError
from shim.log import get
from shim.ports import Clock, Timer, Timers

log = get(__name__)

READ_S = 0.5
RETRY_S = 0.3
LIMIT_S = 2.0
HINT_PAUSE_S = 0.02
"""Pause before the rows are read after a notification: changes come in groups, and one read covers all of them."""


class Membership:
    """This replica's row, and its view of all members. `on_lost` is called with a reason when the lease has ended."""

    def __init__(
        self,
        database: Database,
        me: Member,
        settings: dict[str, Any],
        policy: LeasePolicy,
        clock: Clock,
        timers: Timers,
        on_lost: Callable[[str], None],
    ) -> None:
        """Prepare a membership. `settings` are those that all replicas must have in common, by key."""
        self._settings = settings
        self.me = me
        self.view = View()
        self._lease: HeldLease | None = None
        self.leaving = False
        self._database = database
        self._policy = policy
        self._clock = clock
        self._timers = timers
        self._on_lost = on_lost
        self._timer: Timer | None = None
        self._changed = asyncio.Event()  # replaced at each change
        self._refresh = asyncio.Event()
        self._logged = ""

    async def agree(self) -> Agreement:
        """Return the agreement. Raises `StoreError`, and `ConfigError` if living replicas have other settings."""
        return await self._database.agree(self._settings, LIMIT_S)

    async def join(self) -> None:
        """Become a member. Raises `StoreError`, and `ConfigError` if living replicas have other settings."""
        sent_at = self._clock.monotonic_s()
        while not await self._database.join(self.me, self._policy.lease_s, self._settings, LIMIT_S):
            await self._database.agree(self._settings, LIMIT_S)
            sent_at = self._clock.monotonic_s()
        self._stored(sent_at)

    def tasks(self) -> tuple[tuple[str, Coroutine[Any, Any, None]], ...]:
        """Return the background tasks of a member, with their names."""
        return (
            ("renewals", self._renew_forever()),
            ("leases", self._read_forever()),
            ("hints", self._listen_forever()),
        )

    def others(self) -> list[Member]:
        """Return the other living replicas."""
        return [each for each in self.view.members.values() if each.process != self.me.process]

    def valid(self) -> bool:
        """Return whether this replica's lease is valid by its own clock."""
        return self._lease is not None and self._lease.valid(self._clock.monotonic_s())

    # --- renewal ------------------------------------------------------------------------------------------------------

    async def _renew_forever(self) -> None:
        while True:
            done = await self.renew()
            await asyncio.sleep(self._policy.renew_s if done else RETRY_S)

    async def renew(self) -> bool:
        """Renew the row now. Return false if the database did not answer."""
        sent_at = self._clock.monotonic_s()
        limit_s = min(LIMIT_S, self._policy.renew_s)
        try:
            if not await self._database.renew(self.me.process, limit_s, leaving=self.leaving):
                self._end_lease("taken")  # another replica deleted the expired row
                if self.leaving:
                    return True  # the row may be gone because `leave` deleted it
                self.me = replace(self.me, process=new_process())
                await self.join()
                return True
        except (StoreError, ConfigError) as error:
            self._log_failure(error)
            return False
        self._stored(sent_at)
        return True

    def _stored(self, sent_at: float) -> None:
        self._logged = ""
        # Our own clock counts the lease from the time at which the renewal was sent, and the database from a later
        # one. So others never see the row expire before we have stopped.
        if self.valid() and self._lease is not None:
            self._lease.renewed(sent_at)
            return
        self._lease = HeldLease(self._policy, sent_at)
        self._schedule_expiry()

    def _schedule_expiry(self) -> None:
        """Schedule a check at the end of the lease. If it was renewed by then, schedule the next check."""
        if self._lease is None:
            return
        now = self._clock.monotonic_s()
        if not self._lease.valid(now):
            self._end_lease("expired")
            return
        self._timer = self._timers.call_later(max(0.001, self._lease.ends_at - now), self._schedule_expiry)

    def _end_lease(self, reason: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
        lease, self._lease, self._timer = self._lease, None, None
        if lease is not None:
            lease.end()
            log_end = log.info if reason == "given" else log.warning  # a planned stop is no trouble
            log_end("lease_lost", reason=reason, replica=self.me.name)
            self._on_lost(reason)

    def _log_failure(self, error: ShimError) -> None:
        if str(error) != self._logged:
            self._logged = str(error)
            log.warning("leases_unreachable", error=self._logged)

    # --- view of all replicas -----------------------------------------------------------------------------------------

    async def _read_forever(self) -> None:
        while True:
            try:
                view = await self._database.read(LIMIT_S)
            except StoreError as error:
                self._log_failure(error)
            else:
                if view != self.view:
                    self.view = view
                    self.notify()
            try:
                async with asyncio.timeout(READ_S):
                    await self._refresh.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(HINT_PAUSE_S)
            self._refresh.clear()

    async def _listen_forever(self) -> None:
        while True:
            try:
                async for _ in self._database.notifications():
                    self._refresh.set()
            except StoreError as error:
                self._log_failure(error)
            await asyncio.sleep(RETRY_S)

    def refresh_soon(self) -> None:
        """Request a new read of the rows without waiting for the next interval."""
        self._refresh.set()

    def notify(self) -> None:
        """Wake all tasks in `wait_for_change`."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_for_change(self, at_most_s: float) -> None:
        """Wait for a change, at most the given time in seconds."""
        changed = self._changed
        try:
            async with asyncio.timeout(max(0.0, at_most_s)):
                await changed.wait()
        except TimeoutError:
            return

    # --- shards -------------------------------------------------------------------------------------------------------

    async def acquire(self, shard: int) -> int | None:
        """Acquire a shard. Return its fencing token, or `None` if another replica has it. Raises `StoreError`."""
        fence = await self._database.acquire(shard, self.me.process, LIMIT_S)
        if fence is not None:
            self.view.leases[shard] = (self.me.process, fence)
            self.notify()
        return fence

    async def release(self, shards: list[int]) -> None:
        """Release shards. Raises `StoreError`; their leases end with the membership then."""
        await self._database.release(shards, self.me.process, LIMIT_S)
        for shard in shards:
            self.view.leases[shard] = ("", self.view.leases.get(shard, ("", 0))[1])
        self.notify()

    async def leave(self) -> None:
        """Stop being a member. Raises `StoreError`."""
        await self._database.leave(self.me.process, LIMIT_S)
        self._end_lease("given")


def new_process() -> str:
    """Return a new unique name for a membership."""
    return uuid.uuid4().hex[:16]
