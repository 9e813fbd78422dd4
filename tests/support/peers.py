"""Two replicas in virtual time with a network between them by hand: one owns a link, the other serves its agent."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from itertools import count
from typing import Any, cast

from prometheus_client import CollectorRegistry

from shim.composition import Surroundings
from shim.core.calls import HeartbeatCall, Kind, PollCall, RegisterCall, ResultCall, Target
from shim.core.leases import LeasePolicy, Term
from shim.metrics import Metrics
from shim.ports import Client
from shim.settings import Settings
from shim.shards.bus import Bus
from shim.shards.ears import Ears
from shim.shards.lookup import Lookup
from shim.shards.metrics import ShardMetrics
from shim.shards.place import Place
from shim.shards.relay import Relay
from shim.shards.replicas import Known, Replicas
from shim.shards.service import Service
from shim.shards.shard import Shard
from shim.shards.table import Table
from shim.shards.vouching import Vouching
from shim.shards.wire import Present
from tests.support.upstream import Controller
from tests.support.virtual import VirtualClock
from tests.support.world import TOKEN

POLICY = LeasePolicy(5.0)


class Net:
    """Carries messages between replicas in later turns of the loop, in order. What is `cut` off gets nothing."""

    def __init__(self) -> None:
        self.ears: dict[str, Ears] = {}
        self.dead: set[str] = set()
        self.swallowed: deque[bytes] = deque()
        self.swallows = False

    def carry(self, sender: str, process: str, messages: list[bytes], reference: str) -> None:
        loop = asyncio.get_running_loop()
        if process in self.dead:
            if reference:
                loop.call_soon(self.ears[sender].unreachable, reference)
        elif self.swallows:
            self.swallowed.extend(messages)
        else:
            for message in messages:
                loop.call_soon(self.ears[process].message, message)


class FakeBus:
    """`bus.Bus` as relay, service and lookup use it."""

    max_payload_bytes = 65_536

    def __init__(self, net: Net, process: str) -> None:
        self._net = net
        self._process = process
        self.is_up = True

    def post(self, process: str, messages: list[bytes], reference: str = "") -> None:
        if self.is_up:
            self._net.carry(self._process, process, messages, reference)


@dataclass
class Peer:
    """One replica."""

    process: str
    bus: FakeBus
    table: Table
    relay: Relay
    service: Service
    lookup: Lookup
    ears: Ears
    replicas: Replicas
    vouching: Vouching
    shards: dict[int, Shard]


class Peers:
    """`owner` has the only shard, `asker` does not."""

    def __init__(self, settings: Settings) -> None:
        self.loop = asyncio.get_running_loop()
        self.settings = settings
        self.clock = VirtualClock(self.loop)
        self.controller = Controller()
        self.net = Net()
        self.tasks: set[asyncio.Task[None]] = set()
        self._ids = count(1)
        self.owner = self._peer("owner")
        self.asker = self._peer("asker")
        self.shard = self.own(self.owner)
        self.revision = 0
        self.announce()

    def spawn(self, _name: str, coro: Any) -> asyncio.Task[None]:
        task = self.loop.create_task(coro)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def _peer(self, process: str) -> Peer:
        fake = FakeBus(self.net, process)
        bus = cast("Bus", fake)
        shards: dict[int, Shard] = {}

        def usable(number: int) -> Shard | None:
            shard = shards.get(number)
            return shard if shard is not None and shard.usable else None

        metrics = ShardMetrics(Metrics(CollectorRegistry()))
        place = Place(process, process, POLICY, self.clock, self.loop, self.spawn, count(1))
        table = Table(POLICY, self.clock, 1)
        relay = Relay(bus, table, process, place.numbers)
        service = Service(bus, place, metrics, usable)
        lookup = Lookup(bus, table, place, lambda: [shard.bridge for shard in shards.values() if shard.usable])
        ears = self.net.ears[process] = Ears(table, relay, service, lookup)
        known = Known(self.clock, lambda: self.settings, usable, b"k" * 32, 1, process)
        vouching = Vouching(known, table, relay)
        replicas = Replicas(known, table, relay, metrics, vouching.heard)
        return Peer(process, fake, table, relay, service, lookup, ears, replicas, vouching, shards)

    def own(self, peer: Peer) -> Shard:
        """Let a replica have the shard, with an empty store."""
        around = Surroundings(
            settings=self.settings,
            clock=self.clock,
            timers=self.loop,
            rng=lambda: 0.5,
            new_id=lambda: f"id-{next(self._ids)}",
            post=self.loop.call_soon,
            spawn=self.spawn,
            metrics=Metrics(CollectorRegistry()),
            upstream=self.controller.upstream,
            read_token=lambda: TOKEN,
            broken=lambda error: None,
        )
        shard = peer.shards[0] = Shard(0, Term(LeasePolicy(1e9), 0.0, 1), around, b"k" * 32, self.settings)
        shard.bridge.start(shard.recent.open())
        shard.serving = True
        return shard

    def announce(self, *, living: tuple[str, ...] = ("owner", "asker"), holder: str = "owner") -> None:
        """Everybody tells everybody."""
        self.revision += 1
        for peer in (self.owner, self.asker):
            for process in living:
                held = ((0, self.revision),) if process == holder else ()
                said = Present(process, self.clock.monotonic_s(), False, self.revision, held)
                peer.table.present(process, said)
            peer.ears.look()

    async def settle(self) -> None:
        for _ in range(40):
            await asyncio.sleep(0)

    async def pass_s(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self.settle()

    async def close(self) -> None:
        for peer in (self.owner, self.asker):
            for shard in peer.shards.values():
                shard.bridge.stop()
                shard.recent.close()
        for task in list(self.tasks):
            task.cancel()
        await self.settle()

    # --- an agent of the asker's --------------------------------------------------------------------------------------

    client = Client(TOKEN, 7)
    cluster_id = ""

    async def register(self) -> None:
        payload = {"agent_id": "pod-1", "name": "prod"}
        call = RegisterCall("clusters_agent", "pod-1", "prod", payload)
        answer = await self.asker.replicas.call(self.client, call, self.loop.time())
        self.cluster_id = cast("Any", answer.outcome).cluster_id

    @property
    def target(self) -> Target:
        return Target(Kind.CLUSTER, self.cluster_id)

    def poll(self) -> asyncio.Task[Any]:
        call = PollCall("clusters_agent", self.target)
        return self.loop.create_task(self.asker.replicas.call(self.client, call, self.loop.time()))

    async def heartbeat(self) -> Any:
        call = HeartbeatCall("clusters_agent", self.target, "pod-1", "healthy")
        return (await self.asker.replicas.call(self.client, call, self.loop.time())).outcome

    async def result(self, command: str) -> Any:
        call = ResultCall("clusters_agent", self.target, command, {"success": True})
        return (await self.asker.replicas.call(self.client, call, self.loop.time())).outcome

    async def trace(self, command: str) -> list[str]:
        """The steps of a command at its owner."""
        (found,) = await self.shard.bridge.operator.find(command)
        return [entry.event for entry in found.trace]
