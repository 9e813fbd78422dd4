"""The objects that all connections of one agents' server share."""

from __future__ import annotations

import msgspec
from prometheus_client import Gauge

from shim.agent_api.responses import RefusedCalls, ResponseBuilder
from shim.config.settings import Listen
from shim.core.bounds import Budget
from shim.fallback.websocket_proxy import WebSocketProxy
from shim.metrics import Metrics
from shim.ports import AgentService, DeliveryEvidence, Fallback, Forwarder


class ConnectionCount(msgspec.Struct):
    """Number of open connections, also in a gauge if one is given."""

    gauge: Gauge | None = None
    open: int = 0

    def entered(self) -> None:
        """Count a new connection."""
        self.open += 1
        if self.gauge is not None:
            self.gauge.inc()

    def left(self) -> None:
        """End the count of a connection."""
        self.open -= 1
        if self.gauge is not None:
            self.gauge.dec()


class Backends(msgspec.Struct, frozen=True):
    """The services that answer requests behind the agents' server; None if the shim is not configured for one.

    `evidence` learns if agents received their replies. `fallback` serves calls that go by the vendor's HTTP API,
    `websockets` agents that connect by WebSocket. `forwarder` sends calls to the replica that owns the agent's shard.
    """

    agent_service: AgentService
    evidence: DeliveryEvidence
    fallback: Fallback | None = None
    forwarder: Forwarder | None = None
    websockets: WebSocketProxy | None = None
    max_message_bytes: int = 0


class ServerContext(msgspec.Struct, frozen=True):
    """The objects that all connections of one server share."""

    listen: Listen
    backends: Backends
    metrics: Metrics
    responses: ResponseBuilder
    budget: Budget
    refused: RefusedCalls
    connections: ConnectionCount = msgspec.field(default_factory=ConnectionCount)
