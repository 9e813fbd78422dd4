"""One replica among others: connects the parts, and starts and stops them (docs/scaling.md)."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from itertools import count
from socket import gethostname
from typing import Any

from shim.composition import Surroundings
from shim.core.leases import LeasePolicy
from shim.errors import StoreError
from shim.logs import get
from shim.ports import Switchboard
from shim.settings import Settings
from shim.shards.agreement import agree
from shim.shards.bus import Bus, streams
from shim.shards.ears import Ears
from shim.shards.lookup import Lookup
from shim.shards.metrics import ShardMetrics
from shim.shards.overview import NatsProbe, Overview, Recents
from shim.shards.place import Place
from shim.shards.relay import Relay
from shim.shards.replicas import Known, Replicas
from shim.shards.rollback import Rollback
from shim.shards.service import Service
from shim.shards.steward import Steward
from shim.shards.table import Table
from shim.shards.tenure import Tenure
from shim.shards.vouching import Vouching
from shim.store.jetstream.server import Rejected

log = get(__name__)

OPEN_S = 30.0
RETRY_S = 1.0
LOOK_S = 1.0
ANSWER_LEASES = 3
"""NATS that has taken no word from us for so many leases does not answer: not ready."""
STOP_S = 3.0
AGAIN_S = 0.2


async def end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel tasks until they have ended: the NATS client swallows a cancellation that comes while it connects."""
    while left := [task for task in tasks if not task.done()]:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=AGAIN_S)


class Sharded:
    """Implements `composition.Composition`."""

    switchboard: Switchboard
    fallback: Rollback
    _vouching: Vouching

    def __init__(self, around: Surroundings) -> None:
        settings = around.settings
        self._around = around
        process = uuid.uuid4().hex[:16]
        name = settings.shards.replica or f"{gethostname()}-{process[:4]}"
        policy = LeasePolicy(settings.shards.lease_s)
        place = self._place = Place(process, name, policy, around.clock, around.timers, around.spawn, count(1))
        metrics = self._metrics = ShardMetrics(around.metrics)
        self._table = Table(policy, around.clock, settings.shards.count)
        self._bus = Bus(settings.store, process)
        self._tenure = Tenure(self._bus, self._table, place, self._ended)
        self._steward = Steward(around, self._table, self._tenure, metrics, self._table.ring)
        self._relay = Relay(self._bus, self._table, process, place.numbers)
        service = Service(self._bus, place, metrics, self._steward.usable)
        self._lookup = Lookup(self._bus, self._table, place, self._steward.bridges)
        self._ears = Ears(self._table, self._relay, service, self._lookup)
        self._tasks: list[asyncio.Task[None]] = []
        self._replicas: Replicas | None = None
        self.recent = Recents(self._steward.serving)
        self.subject = self._make_overview()

    def _make_overview(self) -> Overview:
        around = self._around
        ctx = around.context(around.settings, NatsProbe(self._answers, around.post), around.upstream)
        return Overview(ctx, self._steward.bridges, self._about_replicas, self._lookup.elsewhere)

    def _ended(self, shard: int, reason: str) -> None:
        self._steward.ended(shard, reason)

    def _answers(self) -> bool:
        """Whether NATS has taken a word from us lately."""
        heard_s = self._around.clock.monotonic_s() - self._tenure.renewed_at
        return self._bus.is_up and heard_s < ANSWER_LEASES * self._steward.settings.shards.lease_s

    def _about_replicas(self) -> dict[str, Any]:
        holders, members = self._table.holders(), self._table.members()
        total = self._steward.settings.shards.count
        return {
            "replica": self._place.name,
            "shards": total,
            "owned": sorted(shard.number for shard in self._steward.serving()),
            "unowned": total - sum(holder in members for holder in holders.values()),
            "replicas": [
                {
                    "name": entry.name,
                    "self": process == self._place.process,
                    "leaving": entry.leaving,
                    "shards": sum(holder == process for holder in holders.values()),
                }
                for process, entry in sorted(members.items(), key=lambda item: (item[1].name, item[0]))
            ],
        }

    # --- composition.Composition --------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Reach NATS and agree with the other replicas. Raises `StoreError`, `ConfigError`."""
        settings = self._around.settings
        reason = "the NATS server did not answer in time"
        owner_key = b""
        try:
            async with asyncio.timeout(OPEN_S):
                while not owner_key:
                    try:
                        await self._bus.connect()
                        await self._bus.ensure(streams(settings.store.replicas, settings.shards.lease_s))
                        owner_key = await agree(self._bus, settings.shards)
                    except Rejected:
                        raise
                    except StoreError as error:
                        reason = str(error)
                        await asyncio.sleep(RETRY_S)
        except TimeoutError:
            raise StoreError(reason) from None
        self._steward.owner_key = owner_key
        known = Known(
            self._around.clock,
            lambda: self._steward.settings,
            self._steward.usable,
            owner_key,
            settings.shards.count,
            self._place.process,
        )
        self._vouching = vouching = Vouching(known, self._table, self._relay)
        self._replicas = Replicas(known, self._table, self._relay, self._metrics, vouching.heard)
        self.switchboard = self._replicas
        self.fallback = Rollback(self._replicas, known, self._around, self._lookup)

    def start(self) -> None:
        """Join the others."""
        process = self._place.process
        for name, coro in (
            ("bus", self._bus.run(self._ears)),
            ("leases", self._tenure.run()),
            ("shards", self._steward.run(process)),
            ("peers", self._watch_peers()),
            ("vouching", self._vouching.run()),
        ):
            task = self._around.spawn(name, coro)
            if task is not None:
                self._tasks.append(task)
        log.info("replica_started", replica=self._place.name, shards=self._steward.settings.shards.count)

    async def _watch_peers(self) -> None:
        while True:
            self._ears.look()
            await self._table.change(LOOK_S)

    def quiesce(self) -> None:
        """Answer what waits, and take no more shards."""
        self._steward.stopping = self._tenure.leaving = self.subject.stopping = True
        if self._replicas is not None:
            self._replicas.stopping = True
        for bridge in self._steward.bridges():
            bridge.quiesce()

    async def stop(self) -> None:
        """Give every shard back, so that other replicas have them at once."""
        try:
            async with asyncio.timeout(STOP_S):
                await self._tenure.renew()  # who is leaving gets nothing back
                await self._steward.give_all()
                await self._tenure.leave()
        except TimeoutError:
            log.warning("shards_left", hint="their leases run out by themselves")

    async def close(self) -> None:
        """Leave NATS."""
        await end(self._tasks)
        await self._steward.close()
        await self._bus.close()

    def reload(self, settings: Settings) -> None:
        """See `composition.Composition`."""
        self.subject.ctx.settings = settings
        self._steward.reload(settings)

    def token_changed(self) -> None:
        """See `composition.Composition`."""
        for bridge in self._steward.bridges():
            bridge.token_changed()
