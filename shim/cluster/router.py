"""Routing of calls to the caller's shard: agent service and fallback of a replica, which has many bridges or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from shim.bridge import Bridge
from shim.bridge.context import DEFAULT_OWNER
from shim.cluster.forwarding import RemoteReceipt, ReplicaForwarder
from shim.cluster.shard import Shard
from shim.config.settings import Settings
from shim.core.agent_calls import AgentCall, Commands, Failed, HealthCall, Healthy
from shim.core.shard_assignment import owner_id, shard_of
from shim.fallback.policy import is_over
from shim.ports import Caller, CallResult, Clock, DeliveryReceipt, ProxyRequest, ProxyResponse

_NO_TOKEN = CallResult(Failed(401, "a token is required"))


class Places:
    """Mapping of tokens to shards, available once the agreement of the replicas is known."""

    def __init__(self, own_tokens: bool) -> None:
        self._own_tokens = own_tokens
        self._default: int | None = None
        self._own: Callable[[str], int | None] = lambda _: None

    def agree(self, key: bytes, shards: int) -> None:
        """Set the key for owner ids and the number of shards, which all replicas share."""
        self._default = shard_of(DEFAULT_OWNER, shards)
        self._own = lru_cache(maxsize=65_536)(lambda token: shard_of(owner_id(key, token), shards))

    def place(self, token: str) -> int | None:
        """Return the shard of a caller, `None` without a token where one is needed."""
        if not self._own_tokens:
            return self._default
        return self._own(token) if token else None


@dataclass(frozen=True, slots=True)
class LocalReceipt:
    """A `ports.DeliveryReceipt` of a local bridge, with the connection that carries its reply."""

    bridge: Bridge
    receipt: DeliveryReceipt
    connection: int


class Router:
    """Agent service of a replica: implements `ports.AgentService` and `internal.ClusterAgentService`.

    Callers try to forward a call first. A call for a shard that is not here gets the answer of
    `ReplicaForwarder.without_owner`. `usable` returns a local shard that can serve calls.
    """

    def __init__(self, places: Places, usable: Callable[[int], Shard | None], forwarder: ReplicaForwarder) -> None:
        self._places = places
        self._usable = usable
        self._forwarder = forwarder
        self._carrying: dict[int, set[Bridge]] = {}

    def shard(self, token: str) -> Shard | None:
        """Return the shard of a caller if it is local and can serve calls."""
        place = self._places.place(token)
        return None if place is None else self._usable(place)

    # --- ports.AgentService ---

    def try_call_sync(self, client: Caller, call: AgentCall, arrived_s: float) -> CallResult | None:
        """Carry out a call at once, or return `None` if it has to wait or its shard is not here."""
        if isinstance(call, HealthCall):
            return CallResult(Healthy())
        shard = self.shard(client.token)
        return None if shard is None else shard.bridge.try_call_sync(client, call, arrived_s)

    async def call(self, client: Caller, call: AgentCall, arrived_s: float) -> CallResult:
        """Carry out a call at this replica."""
        if isinstance(call, HealthCall):
            return CallResult(Healthy())
        if self._places.place(client.token) is None:
            return _NO_TOKEN
        shard = self.shard(client.token)
        if shard is None:
            return CallResult(self._forwarder.without_owner(call))
        return self.fenced(shard, client, await shard.bridge.call(client, call, arrived_s))

    def fenced(self, shard: Shard, client: Caller, answer: CallResult) -> CallResult:
        """Return an answer, without its commands if the shard was lost: another replica may be offering them."""
        if answer.receipt is None:
            return answer
        if not shard.usable:
            shard.bridge.unwritten(answer.receipt)
            return CallResult(Commands((), shard.bridge.ctx.settings.poll.frequency_s))
        return CallResult(answer.outcome, LocalReceipt(shard.bridge, answer.receipt, client.connection))

    # --- evidence ---

    def written(self, receipt: DeliveryReceipt) -> None:
        """Note that a reply was handed to the kernel."""
        if isinstance(receipt, RemoteReceipt):
            self._forwarder.written(receipt)
        elif isinstance(receipt, LocalReceipt):
            self._carrying.setdefault(receipt.connection, set()).add(receipt.bridge)
            receipt.bridge.written(receipt.receipt)

    def unwritten(self, receipt: DeliveryReceipt) -> None:
        """Note that a reply could not be written."""
        if isinstance(receipt, RemoteReceipt):
            self._forwarder.unwritten(receipt)
        elif isinstance(receipt, LocalReceipt):
            receipt.bridge.unwritten(receipt.receipt)

    def next_request(self, connection: int) -> None:
        """Note that the agent sent another request on a connection."""
        for bridge in self._carrying.pop(connection, ()):
            bridge.next_request(connection)
        self._forwarder.next_request(connection)

    def connection_closed(self, connection: int, clean: bool) -> None:
        """Note that a connection was closed."""
        for bridge in self._carrying.pop(connection, ()):
            bridge.connection_closed(connection, clean)
        self._forwarder.connection_closed(connection, clean)

    def mark_uncertain(self, receipt: DeliveryReceipt, connection: int) -> None:
        """Treat the delivery of a reply as unknown: the connection to the replica that had it ended without a note."""
        self.written(receipt)
        self.lost(connection)

    def lost(self, connection: int) -> None:
        """Treat the delivery of replies on this connection as unknown."""
        for bridge in self._carrying.pop(connection, ()):
            bridge.delivery.connection_lost(connection)


class Fallbacks:
    """Fallback of a replica: implements `composition.Detour` with the fallback of each shard."""

    def __init__(
        self, settings: Callable[[], Settings], clock: Clock, router: Router, shards: Callable[[], Iterable[Shard]]
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._router = router
        self._shards = shards

    def _sunset_over(self) -> bool:
        return is_over(self._settings().sunset, self._clock.wall_s())

    def handles_all(self) -> bool:
        """Return whether all calls use the HTTP API: mode `http`, before the sunset."""
        return self._settings().mode == "http" and not self._sunset_over()

    def handles_some(self) -> bool:
        """Return whether some calls may use the HTTP API: mode `auto` or a partial rollout, before the sunset."""
        settings = self._settings()
        if settings.mode == "http" or not settings.fallback.url:
            return False
        return (settings.mode == "auto" or settings.rollout.partial) and not self._sunset_over()

    def handles(self, client: Caller, call: AgentCall) -> bool:
        """Return whether this call uses the HTTP API."""
        shard = self._router.shard(client.token)
        return shard is not None and shard.fallback.handles(client, call)

    def active(self) -> bool:
        """Return whether calls use the HTTP API now, because of the mode or a link that is down."""
        return self.handles_all() or any(shard.fallback.active() for shard in self._shards())

    async def serve(self, request: ProxyRequest) -> ProxyResponse | CallResult | None:
        """Serve a call by the HTTP API if its shard is here. Return `None` otherwise."""
        shard = self._router.shard(request.client.token)
        if shard is None:
            return None
        served = await shard.fallback.serve(request)
        if served is None or served.receipt is None:
            return served
        if isinstance(served, CallResult):
            return self._router.fenced(shard, request.client, served)
        fenced = self._router.fenced(shard, request.client, CallResult(Commands((), 0), served.receipt))
        if fenced.receipt is None:
            return fenced
        return ProxyResponse(served.status, served.headers, served.body, fenced.receipt)

    async def close(self) -> None:
        """Do nothing: each shard closes its own connections."""
