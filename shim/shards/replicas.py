"""The switchboard of a replica: calls are carried out here or passed on to the owner of their link.

What may be said while nobody owns the link: polls that there is nothing, heartbeats what is said while a link is down;
the newest heartbeat of each agent is kept for the next owner. Never that something is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from shim.bridge import Bridge
from shim.bridge.context import DEFAULT_OWNER
from shim.core.calls import (
    Accepted,
    AgentCall,
    Commands,
    Failed,
    HealthCall,
    Healthy,
    HeartbeatCall,
    Outcome,
    PollCall,
    RegisterCall,
    StatusCall,
    TunnelPollCall,
)
from shim.core.owners import owner_id, shard_of
from shim.logs import get
from shim.ports import Answer, Client, Clock, Lease
from shim.settings import Settings
from shim.shards.metrics import ShardMetrics
from shim.shards.relay import Asked, Miss, Relay, RemoteLease
from shim.shards.shard import Shard
from shim.shards.table import Table
from shim.shards.wire import kind_of

log = get(__name__)

PATIENCE_S = 10.0
"""How long a call waits for a new owner: longer than a takeover takes, shorter than agents wait for an answer."""
RETRY_AFTER_S = 3
AGAIN_S = 0.2
ANSWER_S = 10.0
MAX_KEPT = 50_000


@dataclass(frozen=True, slots=True)
class LocalLease:
    """A `ports.Lease` of a bridge here, for a reply on a connection of ours."""

    bridge: Bridge
    lease: Lease
    connection: int


@dataclass(frozen=True, slots=True)
class Known:
    """What a replica knows of itself. `settings` are those of the moment; `shard` gives one that is ours and serves."""

    clock: Clock
    settings: Callable[[], Settings]
    shard: Callable[[int], Shard | None]
    owner_key: bytes
    count: int


class Replicas:
    """Implements `ports.Switchboard`."""

    def __init__(self, known: Known, table: Table, relay: Relay, metrics: ShardMetrics, spawn: Any) -> None:
        self._known = known
        self._table = table
        self._relay = relay
        self._metrics = metrics
        self._spawn = spawn
        self._place_of = lru_cache(maxsize=65_536)(self._find_place)
        self._kept: dict[tuple[str, object], HeartbeatCall] = {}
        self._local: dict[int, set[Bridge]] = {}
        self.stopping = False

    def _find_place(self, token: str) -> int:
        return shard_of(owner_id(self._known.owner_key, token), self._known.count)

    def place(self, token: str) -> int | None:
        """The shard of a caller; `None` without a token where one is needed."""
        if not self._known.settings().upstream.own_tokens:
            return shard_of(DEFAULT_OWNER, self._known.count)
        return self._place_of(token) if token else None

    # --- calls --------------------------------------------------------------------------------------------------------

    def at_once(self, client: Client, call: AgentCall, arrived_s: float) -> Answer | None:
        """See `ports.Switchboard`; only what is owned here is answered at once."""
        if isinstance(call, HealthCall):
            return Answer(Healthy())
        place = self.place(client.token)
        if place is None:
            return Answer(Failed(401, "a Bearer token is required"))
        shard = self._known.shard(place)
        return None if shard is None else shard.bridge.at_once(client, call, arrived_s)

    async def call(self, client: Client, call: AgentCall, arrived_s: float) -> Answer:
        """See `ports.Switchboard`."""
        place = self.place(client.token)
        if isinstance(call, HealthCall) or place is None:
            return self.at_once(client, call, arrived_s) or Answer(Healthy())
        now_s = self._known.clock.monotonic_s
        # A heartbeat is answered at once (protocol.md §1.2): it is kept for the next owner.
        until = now_s() + (AGAIN_S if isinstance(call, HeartbeatCall) else PATIENCE_S)
        while True:
            shard = self._known.shard(place)
            if shard is not None:
                return await self._here(shard, client, call, arrived_s)
            holder = self._table.holder(place)
            if holder in self._table.members() and not self.stopping:
                answer = await self._there(holder, place, client, call, arrived_s)
                if isinstance(answer, Answer):
                    return answer
                if answer is Miss.LOST and not isinstance(call, (PollCall, HeartbeatCall)):
                    return self._without(client, call)
            left_s = until - now_s()
            if left_s <= 0 or self.stopping:
                self._metrics.relayed.labels(kind_of(call), "no_owner").inc()
                return self._without(client, call)
            await self._table.change(min(left_s, AGAIN_S))

    async def _here(self, shard: Shard, client: Client, call: AgentCall, arrived_s: float) -> Answer:
        answer = await shard.bridge.call(client, call, arrived_s)
        if answer.lease is None:
            return answer
        if not shard.usable:
            # Another replica may be offering them by now.
            shard.bridge.unwritten(answer.lease)
            return Answer(Commands((), self._known.settings().poll.frequency_s))
        return Answer(answer.outcome, LocalLease(shard.bridge, answer.lease, client.connection))

    async def _there(self, holder: str, place: int, client: Client, call: AgentCall, arrived_s: float) -> Answer | Miss:
        answer = await self._relay.ask(Asked(holder, place, self._limit_s(call)), client, call, arrived_s)
        if isinstance(answer, Answer):
            self._metrics.relayed.labels(kind_of(call), "answered").inc()
        elif answer is Miss.LOST:
            self._metrics.relayed.labels(kind_of(call), "lost").inc()
        return answer

    def _limit_s(self, call: AgentCall) -> float:
        """How long the owner may take at most; after that its answer was lost."""
        settings = self._known.settings()
        if isinstance(call, (PollCall, TunnelPollCall)):
            return settings.poll.max_hold_s + ANSWER_S
        return settings.register.deadline_s + 1 if isinstance(call, RegisterCall) else ANSWER_S

    # --- without an owner ---------------------------------------------------------------------------------------------

    def _without(self, client: Client, call: AgentCall) -> Answer:
        settings = self._known.settings()
        outcome: Outcome = Failed(503, "the agent's link is between two replicas", retry_after_s=RETRY_AFTER_S)
        if isinstance(call, PollCall):
            outcome = Commands((), settings.poll.frequency_s)
        elif isinstance(call, HeartbeatCall):
            self._keep(client, call)
            if settings.heartbeat.when_link_down == "accept":
                outcome = Accepted()
        elif isinstance(call, StatusCall) and settings.heartbeat.when_link_down == "accept":
            outcome = Accepted()
        return Answer(outcome)

    def _keep(self, client: Client, call: HeartbeatCall) -> None:
        """The next owner will hear of it."""
        key = (client.token, call.target)
        waits = key in self._kept
        if not waits and len(self._kept) >= MAX_KEPT:
            return
        self._kept[key] = call
        if not waits:
            self._spawn("heartbeat kept", self._pass_on(key, client))

    async def _pass_on(self, key: tuple[str, object], client: Client) -> None:
        place = self.place(client.token)
        until = self._known.clock.monotonic_s() + 3 * PATIENCE_S
        try:
            while place is not None and not self.stopping and self._known.clock.monotonic_s() < until:
                shard, holder = self._known.shard(place), self._table.holder(place)
                call = self._kept[key]
                arrived_s = self._known.clock.monotonic_s()
                if shard is not None:
                    shard.bridge.at_once(client, call, arrived_s)
                    return
                if holder in self._table.members():
                    answer = await self._there(holder, place, client, call, arrived_s)
                    if isinstance(answer, Answer):
                        return
                await self._table.change(1.0)
        finally:
            del self._kept[key]

    # --- evidence -----------------------------------------------------------------------------------------------------

    def written(self, lease: Lease) -> None:
        """See `ports.Switchboard`."""
        if isinstance(lease, RemoteLease):
            self._relay.written(lease)
        elif isinstance(lease, LocalLease):
            self._local.setdefault(lease.connection, set()).add(lease.bridge)
            lease.bridge.written(lease.lease)

    def unwritten(self, lease: Lease) -> None:
        """See `ports.Switchboard`."""
        if isinstance(lease, RemoteLease):
            self._relay.unwritten(lease)
        elif isinstance(lease, LocalLease):
            lease.bridge.unwritten(lease.lease)

    def next_request(self, connection: int) -> None:
        """See `ports.Switchboard`."""
        for bridge in self._local.pop(connection, ()):
            bridge.next_request(connection)
        self._relay.next_request(connection)

    def connection_closed(self, connection: int, clean: bool) -> None:
        """See `ports.Switchboard`."""
        for bridge in self._local.pop(connection, ()):
            bridge.connection_closed(connection, clean)
        self._relay.connection_closed(connection, clean)
