"""The switchboard of a replica: calls are carried out here or passed on to the owner of their link.

What may be said while nobody owns the link: polls that there is nothing, heartbeats what is said while a link is down
(the next owner is told of them). Never that something is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

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
from shim.shards.wire import AnyCall, Leftovers, kind_of

log = get(__name__)

PATIENCE_S = 10.0
"""How long a call waits for a new owner: longer than a takeover takes, shorter than agents wait for an answer."""
RETRY_AFTER_S = 3
AGAIN_S = 0.2
ANSWER_S = 10.0
HEARTBEAT_S = 1.0


Heard = Callable[[int, Client, HeartbeatCall], None]
"""Told of each heartbeat: the shard, who calls, the call."""


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
    process: str


class Replicas:
    """Implements `ports.Switchboard`."""

    def __init__(self, known: Known, table: Table, relay: Relay, metrics: ShardMetrics, heard: Heard) -> None:
        self._known = known
        self._table = table
        self._relay = relay
        self._metrics = metrics
        self._heard = heard
        self._place_of = lru_cache(maxsize=65_536)(self._find_place)
        self._local: dict[int, set[Bridge]] = {}
        self.stopping = False

    def _find_place(self, token: str) -> int:
        return shard_of(owner_id(self._known.owner_key, token), self._known.count)

    def place(self, token: str) -> int | None:
        """The shard of a caller; `None` without a token where one is needed."""
        if not self._known.settings().upstream.own_tokens:
            return shard_of(DEFAULT_OWNER, self._known.count)
        return self._place_of(token) if token else None

    def owner(self, client: Client) -> str:
        """The owner of a caller's sessions, `""` without a token where one is needed."""
        if not self._known.settings().upstream.own_tokens:
            return DEFAULT_OWNER
        return owner_id(self._known.owner_key, client.token) if client.token else ""

    def unowned(self, client: Client) -> bool:
        """Whether nobody has the caller's shard now."""
        place = self.place(client.token)
        return (
            place is not None and self._known.shard(place) is None and not self._is_elsewhere(self._table.holder(place))
        )

    # --- calls --------------------------------------------------------------------------------------------------------

    def at_once(self, client: Client, call: AgentCall, arrived_s: float) -> Answer | None:
        """See `ports.Switchboard`; only what is owned here is answered at once."""
        if isinstance(call, HealthCall):
            return Answer(Healthy())
        place = self.place(client.token)
        if place is None:
            return Answer(Failed(401, "a Bearer token is required"))
        shard = self._known.shard(place)
        answer = None if shard is None else shard.bridge.at_once(client, call, arrived_s)
        if answer is not None and isinstance(call, HeartbeatCall):
            self._remember(place, client, call, answer)
        return answer

    def _remember(self, place: int, client: Client, call: HeartbeatCall, answer: Answer) -> None:
        if isinstance(answer.outcome, Accepted):
            self._heard(place, client, call)

    async def call(self, client: Client, call: AgentCall, arrived_s: float) -> Answer:
        """See `ports.Switchboard`."""
        place = self.place(client.token)
        if isinstance(call, HealthCall) or place is None:
            return self.at_once(client, call, arrived_s) or Answer(Healthy())
        answer = await self._call(place, client, call, arrived_s)
        if isinstance(call, HeartbeatCall):
            self._remember(place, client, call, answer)
        return answer

    async def leftovers(self, client: Client, call: PollCall, arrived_s: float) -> Answer | None:
        """What came over the WebSocket before and still waits for an agent that goes by HTTP now."""
        place = self.place(client.token)
        if place is None:
            return None
        return await self._call(place, client, Leftovers(call.dialect, call.target), arrived_s)

    async def _call(self, place: int, client: Client, call: AnyCall, arrived_s: float) -> Answer:
        now_s = self._known.clock.monotonic_s
        # A heartbeat is answered at once (protocol.md §1.2): the next owner will be told of it.
        until = now_s() + (AGAIN_S if isinstance(call, (HeartbeatCall, Leftovers)) else PATIENCE_S)
        while True:
            shard = self._known.shard(place)
            if shard is not None:
                return await self._here(shard, client, call, arrived_s)
            holder = self._table.holder(place)
            if self._is_elsewhere(holder) and not self.stopping:
                answer = await self._there(holder, place, client, call, arrived_s)
                if isinstance(answer, Answer):
                    return answer
                if answer is Miss.LOST and not isinstance(call, (PollCall, HeartbeatCall, Leftovers)):
                    return self._without(client, call)
            left_s = until - now_s()
            if left_s <= 0 or self.stopping:
                self._metrics.relayed.labels(kind_of(call), "no_owner").inc()
                return self._without(client, call)
            await self._table.change(min(left_s, AGAIN_S))

    def _is_elsewhere(self, holder: str) -> bool:
        """Whether a shard is another living replica's. Ours, still being opened, are waited for."""
        return holder != self._known.process and holder in self._table.members()

    async def _here(self, shard: Shard, client: Client, call: AnyCall, arrived_s: float) -> Answer:
        answer = await shard.call(client, call, arrived_s)
        if answer.lease is None:
            return answer
        if not shard.usable:
            # Another replica may be offering them by now.
            shard.bridge.unwritten(answer.lease)
            return Answer(Commands((), self._known.settings().poll.frequency_s))
        return Answer(answer.outcome, LocalLease(shard.bridge, answer.lease, client.connection))

    async def _there(self, holder: str, place: int, client: Client, call: AnyCall, arrived_s: float) -> Answer | Miss:
        answer = await self._relay.ask(Asked(holder, place, self._limit_s(call)), client, call, arrived_s)
        if isinstance(answer, Answer):
            self._metrics.relayed.labels(kind_of(call), "answered").inc()
        elif answer is Miss.LOST:
            self._metrics.relayed.labels(kind_of(call), "lost").inc()
        return answer

    def _limit_s(self, call: AnyCall) -> float:
        """How long the owner may take at most; after that its answer was lost."""
        settings = self._known.settings()
        if isinstance(call, (PollCall, TunnelPollCall)):
            return settings.poll.max_hold_s + ANSWER_S
        if isinstance(call, HeartbeatCall):
            return HEARTBEAT_S
        return settings.register.deadline_s + 1 if isinstance(call, RegisterCall) else ANSWER_S

    # --- without an owner ---------------------------------------------------------------------------------------------

    def _without(self, client: Client, call: AnyCall) -> Answer:
        settings = self._known.settings()
        outcome: Outcome = Failed(503, "the agent's link is between two replicas", retry_after_s=RETRY_AFTER_S)
        if isinstance(call, (PollCall, Leftovers)):
            outcome = Commands((), settings.poll.frequency_s)
        elif isinstance(call, HeartbeatCall):
            if settings.heartbeat.when_link_down == "accept":
                outcome = Accepted()
        elif isinstance(call, StatusCall) and settings.heartbeat.when_link_down == "accept":
            outcome = Accepted()
        return Answer(outcome)

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
