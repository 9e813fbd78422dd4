"""Routing of calls to the caller's shard: agent service and fallback of a replica, which has many bridges or none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar, cast

from shim.bridge.delivery import CommandDelivery
from shim.cluster.forwarding import RETRY_AFTER_S, RemoteReceipt
from shim.cluster.shard import Shard
from shim.cluster.shard_manager import ShardLocator, ShardManager
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
from shim.core.command_queue import OpenUntil
from shim.fallback.policy import scope_of, uses_http
from shim.ports import Caller, CallResult, Clock, DeliveryReceipt, FallbackScope, ProxyRequest, ProxyResponse

# An agent that pipelines shows no evidence by its connection, which may be open for weeks. Each receipt of another
# replica occupies a connection between replicas.
MAX_RECEIPTS = 32
_First = TypeVar("_First")
_Result = TypeVar("_Result")
_NO_TOKEN = CallResult(Failed(401, "a token is required"))


@dataclass(frozen=True, slots=True)
class LocalReceipt:
    """Receipt of a local bridge. `connection` carries its reply."""

    delivery: CommandDelivery
    receipt: DeliveryReceipt
    connection: int

    def written(self, open_until: OpenUntil) -> None:
        """Record that the reply was handed to the kernel."""
        self.delivery.written(self.receipt, open_until)

    def unwritten(self) -> None:
        """Record that the reply could not be written."""
        self.delivery.unwritten(self.receipt)

    def next_request(self) -> None:
        """Record that the agent sent another request on the connection."""
        self.delivery.next_request(self.connection)

    def connection_open(self, until_s: float) -> bool:
        """Record that the connection was open, as `DeliveryEvidence.connection_open` does."""
        return self.delivery.connection_open(self.connection, until_s)

    def connection_closed(self, clean: bool | None) -> None:
        """Record the end of the connection, as `DeliveryEvidence.connection_closed` does."""
        self.delivery.connection_closed(self.connection, clean)


_Receipt = LocalReceipt | RemoteReceipt


class Router:
    """`ports.AgentService` and `ports.DeliveryEvidence` on the bridges of this replica's shards.

    Callers try to forward a call first. A call whose shard is not here gets an answer that confirms nothing.
    """

    def __init__(self, locator: ShardLocator, settings: Callable[[], Settings]) -> None:
        self._locator = locator
        self._settings = settings
        self._awaiting_evidence: defaultdict[int, list[_Receipt]] = defaultdict(list)

    def call(
        self, caller: Caller, call: AgentCall, arrived_s: float, now_s: float
    ) -> CallResult | Coroutine[Any, Any, CallResult]:
        """Carry out a call at this replica."""
        if isinstance(call, HealthCall):
            return CallResult(Healthy())
        shard = self._locator.local(caller.token)
        if shard is None:
            unknown = self._locator.shard_of(caller.token) is None
            return _NO_TOKEN if unknown else CallResult(self._without_owner(call))
        answer = shard.bridge.calls.call(caller, call, arrived_s, now_s)
        if isinstance(answer, CallResult):
            return fenced(shard, caller, answer)
        return Continued(answer, partial(fenced, shard, caller))

    def _without_owner(self, call: AgentCall) -> Outcome:
        """Return the answer to a call while no replica owns its shard. It never confirms that data is stored."""
        settings = self._settings()
        if isinstance(call, PollCall):
            return Commands((), settings.poll.frequency_s)
        if isinstance(call, (HeartbeatCall, StatusCall)) and settings.heartbeat.when_link_down == "accept":
            return Accepted()
        return Failed(503, "the agent's link is between two replicas", retry_after_s=RETRY_AFTER_S)

    # --- evidence -----------------------------------------------------------------------------------------------------

    def written(self, receipt: DeliveryReceipt, open_until: OpenUntil) -> None:
        """Record that a reply was handed to the kernel."""
        found = cast("_Receipt", receipt)
        awaiting = self._awaiting_evidence[found.connection]
        # A local delivery needs one receipt for each connection: its evidence concerns all offers of the connection.
        bridges = [other.delivery for other in awaiting if isinstance(other, LocalReceipt)]
        if not (isinstance(found, LocalReceipt) and found.delivery in bridges):
            awaiting.append(found)
        found.written(open_until)
        if len(awaiting) > MAX_RECEIPTS:
            awaiting.pop(0).connection_closed(False)

    def unwritten(self, receipt: DeliveryReceipt) -> None:
        """Record that a reply could not be written."""
        cast("_Receipt", receipt).unwritten()

    def next_request(self, connection: int) -> None:
        """Record that the agent sent another request on a connection."""
        for receipt in self._awaiting_evidence.pop(connection, ()):
            receipt.next_request()

    def connection_open(self, connection: int, until_s: float) -> bool:
        """Record that a connection to an agent was open at `until_s`. Returns False if no evidence is awaited on it."""
        awaited = [receipt.connection_open(until_s) for receipt in self._awaiting_evidence.get(connection, ())]
        return any(awaited)

    def connection_closed(self, connection: int, clean: bool | None) -> None:
        """Record that a connection was closed."""
        for receipt in self._awaiting_evidence.pop(connection, ()):
            receipt.connection_closed(clean)


def fenced(shard: Shard, caller: Caller, answer: CallResult) -> CallResult:
    """Return an answer, without its commands if the shard was lost: another replica may be offering them."""
    if answer.receipt is None:
        return answer
    if not shard.usable:
        shard.bridge.delivery.unwritten(answer.receipt)
        return CallResult(Commands((), shard.bridge.ctx.settings.poll.frequency_s))
    return CallResult(answer.outcome, LocalReceipt(shard.bridge.delivery, answer.receipt, caller.connection))


class Continued(Coroutine[Any, Any, _Result], Generic[_First, _Result]):
    """Coroutine that awaits `first` and returns `finish` of its result. Closing it closes `first` as well.

    A coroutine function that took `first` as its argument would leave it open if it was closed before it started, and
    Python would report that `first` was never awaited.
    """

    def __init__(self, first: Coroutine[Any, Any, _First], finish: Callable[[_First], _Result]) -> None:
        self._first = first
        self._whole = self._run(finish)

    async def _run(self, finish: Callable[[_First], _Result]) -> _Result:
        return finish(await self._first)

    def __await__(self) -> Generator[Any, Any, _Result]:
        return self._whole.__await__()

    def send(self, value: Any, /) -> Any:
        """Resume the coroutine (`Coroutine.send`)."""
        return self._whole.send(value)

    def throw(self, *error: Any) -> Any:
        """Raise an exception in the coroutine (`Coroutine.throw`)."""
        return self._whole.throw(*error)

    def close(self) -> None:
        """Close this coroutine and the one that it awaits."""
        self._whole.close()
        self._first.close()


class ClusterFallback:
    """`ports.Fallback` on the fallback of each shard."""

    def __init__(
        self, locator: ShardLocator, shards: ShardManager, settings: Callable[[], Settings], clock: Clock
    ) -> None:
        self._locator = locator
        self._shards = shards
        self._settings = settings
        self._clock = clock
        self.in_use = uses_http(settings())

    def reload(self) -> None:
        """Apply the new settings."""
        self.in_use = uses_http(self._settings())

    def scope(self) -> FallbackScope:
        """Return the share of the calls that may go by HTTP now; implements `ports.Fallback.scope`."""
        return scope_of(self._settings(), self._clock)

    def handles(self, caller: Caller, call: AgentCall) -> bool:
        """Return whether this call uses the HTTP API."""
        shard = self._locator.local(caller.token)
        return shard is not None and shard.fallback.handles(caller, call)

    def active(self) -> bool:
        """Return whether calls use the HTTP API now, because of the mode or a link that is down."""
        return self.scope() is FallbackScope.ALL or any(shard.fallback.active() for shard in self._shards.serving())

    async def serve(self, request: ProxyRequest) -> ProxyResponse | CallResult | None:
        """Serve a call by the HTTP API if its shard is here. Return `None` otherwise."""
        shard = self._locator.local(request.caller.token)
        if shard is None:
            return None
        served = await shard.fallback.serve(request)
        if served is None or served.receipt is None:
            return served
        if isinstance(served, CallResult):
            return fenced(shard, request.caller, served)
        checked = fenced(shard, request.caller, CallResult(Commands((), 0), served.receipt))
        if checked.receipt is None:
            return checked
        return ProxyResponse(served.status, served.headers, served.body, checked.receipt)

    async def close(self) -> None:
        """Do nothing: each shard closes its own connections."""
