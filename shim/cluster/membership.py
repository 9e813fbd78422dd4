"""Membership of this replica: renewal of its row, its view of the others, and the loss of its lease."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from shim.cluster.database import Agreement, Database
from shim.core.leases import HeldLease, LeasePolicy, Member, View
from shim.errors import ConfigError, ShimError, StoreError
from shim.log import get
from shim.ports import Clock, Timer, Timers

log = get(__name__)

LOOK_S = 0.5
RETRY_S = 0.3
LIMIT_S = 2.0
HINT_PAUSE_S = 0.02
"""Pause before reading the rows after a hint: changes come in groups, and one read covers all of them."""


class Membership:
    """Row of this replica and its view of all. `ended` is called with a reason when the lease has ended."""

    def __init__(
        self,
        database: Database,
        me: Member,
        settings: dict[str, Any],
        policy: LeasePolicy,
        clock: Clock,
        timers: Timers,
        ended: Callable[[str], None],
    ) -> None:
        """Prepare a membership. `settings` are those that all replicas must have in common, by key."""
        self._settings = settings
        self.me = me
        self.view = View()
        self.term: HeldLease | None = None
        self.leaving = False
        self.renewed_at = float("-inf")
        self._database = database
        self._policy = policy
        self._clock = clock
        self._timers = timers
        self._ended = ended
        self._timer: Timer | None = None
        self._bell = asyncio.Event()
        self._hint = asyncio.Event()
        self._told = ""

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

    def works(self) -> tuple[tuple[str, Coroutine[Any, Any, None]], ...]:
        """Return the background tasks of a member, with their names."""
        return (
            ("renewals", self._renew_forever()),
            ("leases", self._look_forever()),
            ("hints", self._listen_forever()),
        )

    def valid(self) -> bool:
        """Return whether this replica's lease is valid by its own clock."""
        return self.term is not None and self.term.valid(self._clock.monotonic_s())

    # --- renewing -----------------------------------------------------------------------------------------------------

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
                self._lose("taken")  # another replica deleted the expired row
                if self.leaving:
                    return True  # the row may be gone because `leave` deleted it
                self.me = replace(self.me, process=new_process())
                await self.join()
                return True
        except (StoreError, ConfigError) as error:
            self._failed(error)
            return False
        self._stored(sent_at)
        return True

    def _stored(self, sent_at: float) -> None:
        self._told = ""
        self.renewed_at = sent_at
        if self.valid() and self.term is not None:
            self.term.renewed(sent_at)
            return
        self.term = HeldLease(self._policy, sent_at)
        self._arm()

    def _arm(self) -> None:
        """Schedule a check at the end of the term. If the term was renewed by then, schedule the next check."""
        if self.term is None:
            return
        now = self._clock.monotonic_s()
        if not self.term.valid(now):
            self._lose("expired")
            return
        self._timer = self._timers.call_later(max(0.001, self.term.ends_at - now), self._arm)

    def _lose(self, reason: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
        term, self.term, self._timer = self.term, None, None
        if term is not None:
            term.end()
            tell = log.info if reason == "given" else log.warning  # a planned stop is no trouble
            tell("lease_lost", reason=reason, replica=self.me.name)
            self._ended(reason)

    def _failed(self, error: ShimError) -> None:
        if str(error) != self._told:
            self._told = str(error)
            log.warning("leases_unreachable", error=self._told)

    # --- seeing -------------------------------------------------------------------------------------------------------

    async def _look_forever(self) -> None:
        while True:
            try:
                view = await self._database.look(LIMIT_S)
            except StoreError as error:
                self._failed(error)
            else:
                if view != self.view:
                    self.view = view
                    self.ring()
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._hint.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(HINT_PAUSE_S)
            self._hint.clear()

    async def _listen_forever(self) -> None:
        while True:
            try:
                async for _ in self._database.hints(LIMIT_S):
                    self._hint.set()
            except StoreError as error:
                self._failed(error)
            await asyncio.sleep(RETRY_S)

    def look_soon(self) -> None:
        """Request a new read of the rows without waiting for the next interval."""
        self._hint.set()

    def ring(self) -> None:
        """Wake all tasks that wait in `change`."""
        self._bell.set()
        self._bell = asyncio.Event()

    async def change(self, at_most_s: float) -> None:
        """Wait for a change, at most the given time in seconds."""
        bell = self._bell
        try:
            async with asyncio.timeout(max(0.0, at_most_s)):
                await bell.wait()
        except TimeoutError:
            return

    # --- shards -------------------------------------------------------------------------------------------------------

    async def take(self, shard: int) -> int | None:
        """Take a shard. Return its fencing token, or `None` if another replica has it. Raises `StoreError`."""
        fence = await self._database.take(shard, self.me.process, LIMIT_S)
        if fence is not None:
            self.view.leases[shard] = (self.me.process, fence)
            self.ring()
        return fence

    async def give(self, shards: list[int]) -> None:
        """Release shards. Raises `StoreError`; their leases end with the membership then."""
        await self._database.give(shards, self.me.process, LIMIT_S)
        for shard in shards:
            self.view.leases[shard] = ("", self.view.leases.get(shard, ("", 0))[1])
        self.ring()

    async def leave(self) -> None:
        """Stop being a member. Raises `StoreError`."""
        await self._database.leave(self.me.process, LIMIT_S)
        self._lose("given")


def new_process() -> str:
    """Return a new unique name for a membership."""
    return uuid.uuid4().hex[:16]
