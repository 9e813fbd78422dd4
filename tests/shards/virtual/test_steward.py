"""What a replica does with the leases that it has: opens, serves, gives away, and drops at once what it lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import count
from typing import Any, cast

import pytest_asyncio
from prometheus_client import CollectorRegistry

from shim.composition import Surroundings
from shim.core.leases import LeasePolicy, Term
from shim.errors import StoreError
from shim.metrics import Metrics
from shim.shards.metrics import ShardMetrics
from shim.shards.steward import Steward
from shim.shards.table import Table
from shim.shards.tenure import Tenure
from shim.shards.wire import Present
from tests.support.upstream import Controller
from tests.support.virtual import VirtualClock
from tests.support.world import TOKEN, settings

POLICY = LeasePolicy(5.0)


class Leases:
    """`Tenure` as a steward uses it: every lease is had that is not refused."""

    def __init__(self, table: Table, clock: VirtualClock) -> None:
        self._table = table
        self._clock = clock
        self._numbers = count(100)
        self.terms: dict[int, Term] = {}
        self.refused: set[int] = set()
        self.failing: set[int] = set()
        self.given: list[int] = []

    async def take(self, shard: int) -> Term | None:
        if shard in self.failing:
            self.failing.discard(shard)
            raise StoreError("no answer")
        if shard in self.refused:
            return None
        self.terms[shard] = Term(LeasePolicy(1e9), self._clock.monotonic_s(), next(self._numbers))
        self.tell()
        return self.terms[shard]

    def arm(self, shard: int) -> None:
        pass

    def shards(self) -> tuple[int, ...]:
        return tuple(self.terms)

    async def give_back(self, shard: int) -> None:
        self.terms.pop(shard, None)
        self.given.append(shard)
        self.tell()

    def tell(self) -> None:
        held = tuple((shard, term.revision) for shard, term in self.terms.items())
        now = self._clock.monotonic_s()
        self._table.present("me", Present("me", now, False, next(self._numbers), held))


class Home:
    """A steward and all around it; `run` is under way."""

    def __init__(self) -> None:
        loop = self.loop = asyncio.get_running_loop()
        clock = self.clock = VirtualClock(loop)
        self.settings = settings(shards={"count": 4})
        self.registry = CollectorRegistry()
        metrics = Metrics(self.registry)
        self.tasks: set[asyncio.Task[None]] = set()
        around = Surroundings(
            settings=self.settings,
            clock=clock,
            timers=loop,
            rng=lambda: 0.5,
            new_id=lambda: "id",
            post=loop.call_soon_threadsafe,
            spawn=self.spawn,
            metrics=metrics,
            upstream=Controller().upstream,
            read_token=lambda: TOKEN,
            broken=lambda error: None,
        )
        self.table = Table(POLICY, clock, 4)
        self.leases = Leases(self.table, clock)
        tenure = cast("Tenure", self.leases)
        self.steward = Steward(around, self.table, tenure, ShardMetrics(metrics), self.table.ring)
        self.steward.owner_key = b"k" * 32
        self.spawn("run", self.steward.run("me"))

    def spawn(self, _name: str, coro: Any) -> asyncio.Task[None]:
        task = self.loop.create_task(coro)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def other(self, *, leaving: bool = False) -> None:
        """Another replica says that it is there."""
        now = self.clock.monotonic_s()
        self.table.present("other", Present("other", now, leaving, int(now * 1000)))

    async def until(self, *owned: int) -> None:
        """Stores are opened in threads, which take no virtual time, but some."""
        async with asyncio.timeout(60):
            while True:
                self.leases.tell()
                if sorted(shard.number for shard in self.steward.serving()) == sorted(owned):
                    return
                await self.table.change(0.1)

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"agent_shim_{name}", labels) or 0.0


@pytest_asyncio.fixture
async def home() -> AsyncIterator[Home]:
    made = Home()
    loop = cast("Any", made.loop)
    loop.outside = lambda: bool(made.steward._busy)
    made.leases.tell()
    yield made
    loop.outside = lambda: True  # until the end: the loop's own threads are waited for, too
    await made.steward.close()
    for task in list(made.tasks):
        task.cancel()
    await asyncio.sleep(0)


async def test_alone_it_takes_everything_and_gives_half_away(home: Home) -> None:
    await home.until(0, 1, 2, 3)
    assert home.metric("shards") == 4
    home.other()
    await home.until(0, 1)
    assert sorted(home.leases.given) == [2, 3]
    assert home.metric("shards_released_total", reason="given") == 2


async def test_what_cannot_be_had_is_tried_again(home: Home) -> None:
    home.leases.failing = {0}
    home.leases.refused = {1}
    await home.until(0, 2, 3)
    home.leases.refused = set()
    await home.until(0, 1, 2, 3)


async def test_what_was_lost_is_dropped_at_once_and_taken_again(home: Home) -> None:
    await home.until(0, 1, 2, 3)
    before = home.steward.usable(2)
    assert before is not None
    home.leases.terms.pop(2).end()
    home.steward.ended(2, "expired")
    assert home.steward.usable(2) is None
    home.steward.ended(2, "expired")
    assert home.metric("shards_released_total", reason="expired") == 1
    await home.until(0, 1, 2, 3)
    assert home.steward.usable(2) is not before


async def test_settings_reach_every_bridge(home: Home) -> None:
    await home.until(0, 1, 2, 3)
    changed = settings(shards={"count": 4}, poll={"frequency_s": 9})
    home.steward.reload(changed)
    assert [bridge.ctx.settings.poll.frequency_s for bridge in home.steward.bridges()] == [9] * 4


async def test_a_stop_gives_everything_away(home: Home) -> None:
    await home.until(0, 1, 2, 3)
    await home.steward.give_all()
    assert home.steward.serving() == []
    assert sorted(home.leases.given) == [0, 1, 2, 3]
    await asyncio.sleep(3.0)
    assert home.steward.serving() == []
