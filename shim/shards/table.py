"""Who is there and who holds which shard, as seen from here, and a bell for those who wait for it to change."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import msgspec

from shim.core.leases import Entry, LeasePolicy, Offset, Sighting, Sightings
from shim.logs import get
from shim.ports import Clock
from shim.shards.wire import Present

log = get(__name__)

_decode = msgspec.json.Decoder(Entry).decode
_encode = msgspec.json.Encoder().encode


def lease_key(shard: int) -> str:
    """Where the lease of a shard stands."""
    return f"shard.{shard}"


def member_key(process: str) -> str:
    """Where a replica says that it is there."""
    return f"replica.{process}"


def read_entry(body: bytes) -> Entry | None:
    """What stands in the bucket, `None` for what is no entry of ours."""
    try:
        return _decode(body)
    except (msgspec.MsgspecError, ValueError):
        return None


def write_entry(entry: Entry) -> bytes:
    """Inverse of `read_entry`."""
    return _encode(entry)


@dataclass(frozen=True, slots=True, eq=False)
class Tenant:
    """A replica's time with a shard."""

    process: str


class Table:
    """Sightings by shard and by replica."""

    def __init__(self, policy: LeasePolicy, clock: Clock, count: int) -> None:
        self._clock = clock
        self._count = count
        self._sightings = Sightings(policy)
        self._offsets: dict[str, Offset] = {}
        self._tenants: dict[int, Tenant] = {}
        self._bell = asyncio.Event()

    def saw(self, key: str, body: bytes, revision: int) -> None:
        """An entry was seen just now."""
        entry = read_entry(body)
        if entry is None:
            log.warning("lease_unreadable", key=key)
            return
        self._saw(key, entry, revision)

    def _saw(self, key: str, entry: Entry, revision: int) -> None:
        now = self._clock.monotonic_s()
        self.heard(entry.process, entry.clock)
        if self._sightings.saw(key, Sighting(entry, revision, now)):
            self.ring()

    def present(self, process: str, said: Present) -> None:
        """A replica tells what it has written."""
        entry = Entry(process, said.name, said.clock, said.leaving)
        self._saw(member_key(process), entry, said.revision)
        for shard, revision in said.held:
            self._saw(lease_key(shard), entry, revision)
        for shard, revision in said.given:
            self._saw(lease_key(shard), Entry(""), revision)
        held = {shard for shard, _ in said.held}
        for shard in range(self._count):
            if shard not in held and self.holder(shard) == process:
                self._sightings.drop(lease_key(shard))
                self._tenants.pop(shard, None)
                self.ring()

    def heard(self, process: str, its_clock: float) -> None:
        """A replica's clock showed this a moment ago."""
        if process:
            self._offsets.setdefault(process, Offset()).heard(its_clock, self._clock.monotonic_s())

    def in_terms_of(self, process: str, at_s: float) -> float | None:
        """A moment of ours on another replica's clock, or earlier."""
        offset = self._offsets.get(process)
        return None if offset is None else offset.in_its_terms(at_s)

    def forget(self) -> None:
        """Drop what was not renewed."""
        if self._sightings.forget(self._clock.monotonic_s()):
            members = self.members()
            self._offsets = {process: each for process, each in self._offsets.items() if process in members}
            self.ring()

    def lease(self, shard: int) -> Sighting | None:
        """The lease of a shard, also one that was given back."""
        return self._sightings.get(lease_key(shard))

    def holders(self) -> dict[int, str]:
        """Who holds which shard."""
        found: dict[int, str] = {}
        for shard in range(self._count):
            holder = self.holder(shard)
            if holder:
                found[shard] = holder
        return found

    def holder(self, shard: int) -> str:
        """The process that holds a shard, `""` if none does."""
        seen = self.lease(shard)
        return "" if seen is None else seen.entry.process

    def tenant(self, shard: int) -> Tenant | None:
        """Another one each time that a living replica has taken the shard, `None` while nobody has it."""
        holder = self.holder(shard)
        if not holder or holder not in self.members():
            self._tenants.pop(shard, None)
            return None
        tenant = self._tenants.get(shard)
        if tenant is None or tenant.process != holder:
            tenant = self._tenants[shard] = Tenant(holder)
        return tenant

    def members(self) -> dict[str, Entry]:
        """The replicas that live, by process."""
        return {
            each.entry.process: each.entry
            for key, each in self._sightings.items()
            if key == member_key(each.entry.process)
        }

    # --- waiting ------------------------------------------------------------------------------------------------------

    def ring(self) -> None:
        """Something changed."""
        self._bell.set()
        self._bell = asyncio.Event()

    async def change(self, at_most_s: float) -> None:
        """Wait for a change, or so long."""
        bell = self._bell
        try:
            async with asyncio.timeout(max(0.0, at_most_s)):
                await bell.wait()
        except TimeoutError:
            return
