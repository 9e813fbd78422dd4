"""Leases against a bucket that answers late, twice or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count
from typing import Any, cast

import pytest

from shim.core.leases import Entry, LeasePolicy
from shim.errors import StoreError
from shim.shards.bus import Bus
from shim.shards.place import Place
from shim.shards.table import Table, lease_key, member_key, read_entry, write_entry
from shim.shards.tenure import Tenure
from shim.store.jetstream.server import Conflict, Unavailable
from tests.support.virtual import VirtualClock

POLICY = LeasePolicy(5.0)


class Bucket:
    """`bus.Bus` as `Tenure` uses it: compare-and-set on keys that live for a lease."""

    max_payload_bytes = 65_536

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.entries: dict[str, tuple[bytes, int, float]] = {}
        self.down = False
        self.deaf = 0  # so many writes are stored and not answered
        self.told: list[bytes] = []
        self.checked = 0
        self.before_put: Callable[[str], None] = lambda key: None
        self._revisions = count(1)

    def _live(self, key: str) -> tuple[bytes, int] | None:
        found = self.entries.get(key)
        if found is None or self.loop.time() >= found[2] + POLICY.lease_s:
            return None
        return found[0], found[1]

    async def put(self, _stream: str, key: str, body: bytes, revision: int) -> int:
        before, self.before_put = self.before_put, lambda key: None
        before(key)
        if self.down:
            raise Unavailable("down")
        there = self._live(key)
        if (there[1] if there else 0) != revision:
            raise Conflict("another")
        new = self.write(key, body)
        if self.deaf:
            self.deaf -= 1
            raise Unavailable("no answer")
        return new

    def write(self, key: str, body: bytes) -> int:
        revision = next(self._revisions)
        self.entries[key] = body, revision, self.loop.time()
        return revision

    async def get(self, _stream: str, key: str) -> tuple[bytes, int] | None:
        if self.down:
            raise Unavailable("down")
        return self._live(key)

    async def check(self) -> None:
        self.checked += 1

    def post(self, _process: str, messages: list[bytes], reference: str = "") -> None:
        self.told += messages

    def holder(self, shard: int) -> str | None:
        there = self._live(lease_key(shard))
        entry = read_entry(there[0]) if there else None
        return entry.process if entry is not None else None


class One:
    """A replica's tenure, and what ended."""

    def __init__(self, bucket: Bucket, process: str) -> None:
        loop = bucket.loop
        clock = VirtualClock(loop)
        self.table = Table(POLICY, clock, 4)
        place = Place(process, process, POLICY, clock, loop, cast("Any", None), count(1))
        self.ended: list[tuple[int, str]] = []
        self.tenure = Tenure(cast("Bus", bucket), self.table, place, lambda *each: self.ended.append(each))


async def test_of_two_one_gets_it_and_the_other_after_it_was_given_back() -> None:
    bucket = Bucket()
    a, b = One(bucket, "a"), One(bucket, "b")
    assert await a.tenure.take(1) is not None
    assert await b.tenure.take(1) is None
    assert b.table.holder(1) == "a"
    await a.tenure.give_back(1)
    assert bucket.holder(1) == ""
    assert await b.tenure.take(1) is not None
    assert bucket.holder(1) == "b"


async def test_who_died_is_followed_when_its_lease_has_run_out() -> None:
    bucket = Bucket()
    a, b = One(bucket, "a"), One(bucket, "b")
    await a.tenure.take(1)
    a.tenure.arm(1)
    await asyncio.sleep(4.5)
    assert a.ended == [(1, "expired")]
    assert await b.tenure.take(1) is None
    await asyncio.sleep(0.6)
    term = await b.tenure.take(1)
    assert term is not None
    assert b.tenure.term(1) is term
    assert a.tenure.term(1) is None
    await a.tenure.give_back(1)
    assert bucket.holder(1) == "b"


async def test_renewals_keep_it() -> None:
    bucket = Bucket()
    a = One(bucket, "a")
    await a.tenure.take(1)
    a.tenure.arm(1)
    run = asyncio.get_running_loop().create_task(a.tenure.run())
    await asyncio.sleep(30.0)
    assert a.ended == []
    assert a.tenure.shards() == (1,)
    assert bucket.told
    bucket.down = True
    await asyncio.sleep(6.0)
    assert a.ended == [(1, "expired")]
    assert bucket.checked
    run.cancel()


async def test_a_taking_that_was_not_answered_is_taken_again_by_the_same() -> None:
    bucket = Bucket()
    a = One(bucket, "a")
    bucket.deaf = 1
    with pytest.raises(StoreError):
        await a.tenure.take(1)
    assert bucket.holder(1) == "a"
    assert await a.tenure.take(1) is not None


async def test_a_renewal_that_was_not_answered_counts_from_when_it_was_sent() -> None:
    bucket = Bucket()
    a = One(bucket, "a")
    term = await a.tenure.take(1)
    assert term is not None
    await asyncio.sleep(1.0)
    bucket.deaf = 2
    assert not await a.tenure.renew()
    await asyncio.sleep(1.0)
    assert not await a.tenure.renew()
    assert term.ends_at == pytest.approx(1000.0 + 1.0 + 4.0)
    assert await a.tenure.renew()
    assert a.ended == []


@pytest.mark.parametrize("entry, reason", [(Entry("b"), "taken"), (None, "expired")])
async def test_a_lease_that_is_anothers_or_gone_ends_at_once(entry: Entry | None, reason: str) -> None:
    bucket = Bucket()
    a = One(bucket, "a")
    await a.tenure.take(1)
    if entry is None:
        del bucket.entries[lease_key(1)]
    else:
        bucket.write(lease_key(1), write_entry(entry))
    await a.tenure.renew()
    assert a.ended == [(1, reason)]


async def test_giving_back_while_a_renewal_is_under_way() -> None:
    bucket = Bucket()
    a = One(bucket, "a")
    await a.tenure.take(1)
    bucket.before_put = lambda key: bucket.write(key, write_entry(Entry("a"))) and None
    await a.tenure.give_back(1)
    assert bucket.holder(1) == ""
    await a.tenure.take(2)
    bucket.before_put = lambda key: bucket.write(key, write_entry(Entry("b"))) and None
    await a.tenure.give_back(2)
    assert bucket.holder(2) == "b"
    await a.tenure.take(3)
    bucket.down = True
    await a.tenure.give_back(3)
    bucket.down = False
    assert bucket.holder(3) == "a", "it runs out by itself"


async def test_a_membership_that_somebody_touched_is_written_again() -> None:
    bucket = Bucket()
    a = One(bucket, "a")
    assert await a.tenure.renew()
    bucket.write(member_key("a"), write_entry(Entry("a")))
    assert not await a.tenure.renew()
    assert await a.tenure.renew()
    bucket.down = True
    await a.tenure.leave()
    bucket.down = False
    await a.tenure.leave()
    assert a.tenure.leaving
    found = bucket._live(member_key("a"))
    assert found is not None
    entry = read_entry(found[0])
    assert entry is not None
    assert entry.leaving


async def test_what_is_no_entry_is_not_believed() -> None:
    bucket = Bucket()
    a = One(bucket, "a")
    a.table.saw(lease_key(1), b"nonsense", 1)
    assert a.table.holder(1) == ""
    assert a.table.tenant(1) is None
