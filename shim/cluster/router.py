"""Routing of calls to the caller's shard: agent service and fallback of a replica, which has many bridges or none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from shim.bridge import Bridge
from shim.cluster.forwarding import RETRY_AFTER_S, RemoteReceipt
from shim.cluster.shard import Shard
from shim.cluster.shard_locator import ShardLocator
from shim.cluster.shard_manager import ShardManager
from shim.config.settings import Settings
from shim.core.agent_calls import (
    Accepted,
    AgentCall,
    Commands,
    Failed,
    HealthCall,
    Healthy,
    HeartbeatCall,
    Outcome,
    PollCall,
    StatusCall,
)
from shim.fallback.policy import is_over
from shim.ports import Caller, CallResult, Clock, DeliveryReceipt, ProxyRequest, ProxyResponse

_NO_TOKEN = CallResult(Failed(401, "a token is required"))


@dataclass(frozen=True, slots=True)
class LocalReceipt:
    """Receipt of a local bridge. `connection` carries its reply."""

    bridge: Bridge
    receipt: DeliveryReceipt
    connection: int

    def written(self) -> None:
        """Record that the reply was handed to the kernel."""
        self.bridge.written(self.receipt)

    def unwritten(self) -> None:
        """Record that the reply could not be written."""
        self.bridge.unwritten(self.receipt)

    def next_request(self) -> None:
        """Record that the agent sent another request on the connection."""
        self.bridge.next_request(self.connection)

    def connection_closed(self, clean: bool | None) -> None:
        """Record the end of the connection. `clean` is `None` if the replica that served it is gone."""
        if clean is None:
            self.bridge.delivery.connection_lost(self.connection)
        else:
            self.bridge.connection_closed(self.connection, clean)


_Receipt = LocalReceipt | RemoteReceipt


class Router:
    """Implements `internal.ClusterAgentService` with the bridges of this replica's shards.

    Callers try to forward a call first. A call whose shard is not here gets an answer that confirms nothing.
    """

    def __init__(self, locator: ShardLocator, settings: Callable[[], Settings]) -> None:
        self._locator = locator
        self._settings = settings
        self._awaiting_evidence: defaultdict[int, list[_Receipt]] = defaultdict(list)

    def try_call_sync(self, client: Caller, call: AgentCall, arrived_s: float) -> CallResult | None:
        """Carry out a call at once, or return `None` if it has to wait or its shard is not here."""
        if isinstance(call, HealthCall):
            return CallResult(Healthy())
        shard = self._locator.local(client.token)
        return None if shard is None else shard.bridge.try_call_sync(client, call, arrived_s)

    async def call(self, client: Caller, call: AgentCall, arrived_s: float) -> CallResult:
        """Carry out a call at this replica."""
        if isinstance(call, HealthCall):
            return CallResult(Healthy())
        if self._locator.shard_number(client.token) is None:
            return _NO_TOKEN
        shard = self._locator.local(client.token)
        if shard is None:
            return CallResult(self.without_owner(call))
        return fenced(shard, client, await shard.bridge.call(client, call, arrived_s))

    def without_owner(self, call: AgentCall) -> Outcome:
        """Return the answer to a call while no replica owns its shard. It never confirms that data is stored."""
        settings = self._settings()
        if isinstance(call, PollCall):
            return Commands((), settings.poll.frequency_s)
        if isinstance(call, (HeartbeatCall, StatusCall)) and settings.heartbeat.when_link_down == "accept":
            return Accepted()
        return Failed(503, "the agent's link is between two replicas", retry_after_s=RETRY_AFTER_S)

    # --- evidence -----------------------------------------------------------------------------------------------------

    def written(self, receipt: DeliveryReceipt) -> None:
        """Record that a reply was handed to the kernel."""
        found = cast("_Receipt", receipt)
        self._awaiting_evidence[found.connection].append(found)
        found.written()

    def unwritten(self, receipt: DeliveryReceipt) -> None:
        """Record that a reply could not be written."""
        cast("_Receipt", receipt).unwritten()

    def next_request(self, connection: int) -> None:
        """Record that the agent sent another request on a connection."""
        for receipt in self._awaiting_evidence.pop(connection, ()):
            receipt.next_request()

    def connection_closed(self, connection: int, clean: bool | None) -> None:
        """Record that a connection was closed."""
        for receipt in self._awaiting_evidence.pop(connection, ()):
            receipt.connection_closed(clean)

    def mark_uncertain(self, receipt: DeliveryReceipt, connection: int) -> None:
        """Treat the delivery of a reply as unknown: the connection to the replica that had it ended without a note."""
        self.written(receipt)
        self.lost(connection)

    def lost(self, connection: int) -> None:
        """Treat the delivery of replies on this connection as unknown."""
        self.connection_closed(connection, None)


def fenced(shard: Shard, client: Caller, answer: CallResult) -> CallResult:
    """Return an answer, without its commands if the shard was lost: another replica may be offering them."""
    if answer.receipt is None:
        return answer
    if not shard.usable:
        shard.bridge.unwritten(answer.receipt)
        return CallResult(Commands((), shard.bridge.ctx.settings.poll.frequency_s))
    return CallResult(answer.outcome, LocalReceipt(shard.bridge, answer.receipt, client.connection))


class ClusterFallback:
    """Implements `runtime.ClosableFallback` with the fallback of each shard."""

    def __init__(
        self, locator: ShardLocator, shards: ShardManager, settings: Callable[[], Settings], clock: Clock
    ) -> None:
        self._locator = locator
        self._shards = shards
        self._settings = settings
        self._clock = clock

    def handles_all(self) -> bool:
        """Return whether all calls use the HTTP API."""
        return self._settings().mode == "http" and not self._sunset_over()

    def handles_some(self) -> bool:
        """Return whether some calls may use the HTTP API."""
        settings = self._settings()
        if settings.mode == "http":
            return False
        return (settings.mode == "auto" or settings.rollout.partial) and not self._sunset_over()

    def _sunset_over(self) -> bool:
        return is_over(self._settings().sunset, self._clock.wall_s())

    def handles(self, client: Caller, call: AgentCall) -> bool:
        """Return whether this call uses the HTTP API."""
        shard = self._locator.local(client.token)
        return shard is not None and shard.fallback.handles(client, call)

    def active(self) -> bool:
        """Return whether calls use the HTTP API now, because of the mode or a link that is down."""
        return self.handles_all() or any(shard.fallback.active() for shard in self._shards.serving())

    async def serve(self, request: ProxyRequest) -> ProxyResponse | CallResult | None:
        """Serve a call by the HTTP API if its shard is here. Return `None` otherwise."""
        shard = self._locator.local(request.client.token)
        if shard is None:
            return None
        served = await shard.fallback.serve(request)
        if served is None or served.receipt is None:
            return served
        if isinstance(served, CallResult):
            return fenced(shard, request.client, served)
        checked = fenced(shard, request.client, CallResult(Commands((), 0), served.receipt))
        if checked.receipt is None:
            return checked
        return ProxyResponse(served.status, served.headers, served.body, checked.receipt)

    async def close(self) -> None:
        """Do nothing: each shard closes its own connections."""
