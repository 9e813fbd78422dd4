"""The leases that this replica holds: taken, renewed, given back, and ended by our own clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from shim.core.leases import Entry, Term
from shim.errors import StoreError
from shim.logs import get
from shim.ports import Timer
from shim.shards.bus import LEASES, Bus
from shim.shards.place import Place
from shim.shards.table import Table, lease_key, member_key, read_entry, write_entry
from shim.shards.wire import Present, encode
from shim.store.jetstream.server import Conflict

log = get(__name__)

RETRY_S = 0.3
ATTEMPTS = 3


class Tenure:
    """Terms by shard. `ended` is told, on the event loop, which one ended without having been given
    back, and why (`expired`, `taken`).
    """

    def __init__(self, bus: Bus, table: Table, place: Place, ended: Callable[[int, str], None]) -> None:
        self._bus = bus
        self._table = table
        self._place = place
        self._clock = place.clock
        self._ended = ended
        self._terms: dict[int, Term] = {}
        self._timers: dict[int, Timer] = {}
        self._member_revision = 0
        self.renewed_at = float("-inf")
        self.leaving = False

    def arm(self, shard: int) -> None:
        """See to it that a term ends in time."""
        term = self._terms.get(shard)
        if term is None:
            return
        if not term.valid(self._clock.monotonic_s()):
            self._lose(shard, "expired")
            return
        left_s = term.ends_at - self._clock.monotonic_s()
        self._timers[shard] = self._place.timers.call_later(max(left_s, 0.001), lambda: self.arm(shard))

    def term(self, shard: int) -> Term | None:
        """The term of a shard that is ours now."""
        term = self._terms.get(shard)
        return term if term is not None and term.valid(self._clock.monotonic_s()) else None

    def shards(self) -> tuple[int, ...]:
        """The shards that are ours."""
        return tuple(self._terms)

    def _entry(self) -> Entry:
        return Entry(self._place.process, self._place.name, self._clock.monotonic_s(), self.leaving)

    # --- taking and giving back ---------------------------------------------------------------------------------------

    async def take(self, shard: int) -> Term | None:
        """Take a lease that nobody has; `None` if somebody does. Raises `StoreError`."""
        seen = self._table.lease(shard)
        revision = seen.revision if seen is not None and self._is_free(seen.entry) else 0
        for _ in range(ATTEMPTS):
            entry = self._entry()
            try:
                revision = await self._bus.put(LEASES, lease_key(shard), write_entry(entry), revision)
            except Conflict:
                found = await self._bus.get(LEASES, lease_key(shard))
                held = read_entry(found[0]) if found is not None else None
                if found is not None and held is not None and not self._is_free(held):
                    self._table.saw(lease_key(shard), *found)
                    return None  # also where it has run out, and the servers have not dropped it yet
                revision = found[1] if found is not None else 0
                continue
            return self._begin(shard, Term(self._place.policy, entry.clock, revision))
        return None

    def _is_free(self, entry: Entry) -> bool:
        """It was given back, or it is ours: taking it was not answered, or giving it back."""
        return entry.process in ("", self._place.process)

    def _begin(self, shard: int, term: Term) -> Term | None:
        if not term.valid(self._clock.monotonic_s()):
            return None
        self._terms[shard] = term
        self._tell()
        return term

    async def give_back(self, shard: int) -> None:
        """Let others have a lease at once; nothing of ours may go on under it any more."""
        term = self._drop(shard)
        if term is None or not term.valid(self._clock.monotonic_s()):
            return
        term.end()
        revision = term.revision
        for _ in range(ATTEMPTS):
            try:
                revision = await self._bus.put(LEASES, lease_key(shard), write_entry(Entry("")), revision)
            except Conflict:
                # A renewal was still under way.
                found = await self._mine(shard)
                if not found:
                    return
                revision = found
            except StoreError:
                break
            else:
                self._tell(given=((shard, revision),))
                return
        log.info("lease_left", shard=shard)  # it runs out by itself

    async def _mine(self, shard: int) -> int:
        """The revision of a lease that the servers have as ours, else 0."""
        try:
            found = await self._bus.get(LEASES, lease_key(shard))
        except StoreError:
            return 0
        entry = read_entry(found[0]) if found is not None else None
        return found[1] if found is not None and entry is not None and entry.process == self._place.process else 0

    def _drop(self, shard: int) -> Term | None:
        timer = self._timers.pop(shard, None)
        if timer is not None:
            timer.cancel()
        return self._terms.pop(shard, None)

    def _lose(self, shard: int, reason: str) -> None:
        term = self._drop(shard)
        if term is not None:
            term.end()
            log.warning("lease_lost", shard=shard, reason=reason)
            self._ended(shard, reason)

    # --- renewing -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Renew until cancelled."""
        while True:
            pause_s = self._place.policy.renew_s if await self.renew() else RETRY_S
            await asyncio.sleep(pause_s)

    async def renew(self) -> bool:
        """Renew everything now. False if something was not answered."""
        steps: list[Coroutine[Any, Any, bool]] = [self._renew_member()]
        steps += [self._renew(shard, term) for shard, term in self._terms.items()]
        done = all(await asyncio.gather(*steps))
        self._tell()
        if not done:
            await self._bus.check()
        return done

    def _tell(self, given: tuple[tuple[int, int], ...] = ()) -> None:
        """Let the others know at once what the servers have of us."""
        held = tuple((shard, term.revision) for shard, term in self._terms.items())
        place, clock = self._place, self._clock.monotonic_s()
        said = Present(place.name, clock, self.leaving, self._member_revision, held, given)
        self._bus.post("", encode(place.process, said, next(place.numbers), self._bus.max_payload_bytes))

    async def _renew_member(self) -> bool:
        entry = self._entry()
        key = member_key(entry.process)
        try:
            self._member_revision = await self._bus.put(LEASES, key, write_entry(entry), self._member_revision)
        except Conflict:
            self._member_revision = await self._revision(key)
            return False
        except StoreError:
            return False
        self.renewed_at = entry.clock
        return True

    async def _revision(self, key: str) -> int:
        try:
            found = await self._bus.get(LEASES, key)
        except StoreError:
            return self._member_revision
        return 0 if found is None else found[1]

    async def _renew(self, shard: int, term: Term) -> bool:
        entry = self._entry()
        try:
            revision = await self._bus.put(LEASES, lease_key(shard), write_entry(entry), term.revision)
        except Conflict:
            return await self._reconsider(shard, term)
        except StoreError:
            return False
        term.renewed(entry.clock, revision)
        return True

    async def _reconsider(self, shard: int, term: Term) -> bool:
        """It is another's or gone, or an earlier renewal was stored and its answer lost."""
        try:
            found = await self._bus.get(LEASES, lease_key(shard))
        except StoreError:
            return False
        entry = read_entry(found[0]) if found is not None else None
        if found is None or entry is None or entry.process != self._place.process:
            if self._terms.get(shard) is term:
                self._lose(shard, "taken" if entry is not None and entry.process else "expired")
            return True
        term.renewed(entry.clock, found[1])
        return False

    async def leave(self) -> None:
        """The last word: we are not there any more."""
        self.leaving = True
        key = member_key(self._place.process)
        try:
            self._member_revision = await self._bus.put(LEASES, key, write_entry(self._entry()), self._member_revision)
            self._tell()
        except StoreError:
            log.info("membership_left")
