"""What all connections of one frontend share."""

from __future__ import annotations

from dataclasses import dataclass, field

from prometheus_client import Gauge

from shim.frontend.refused import RefusedCalls
from shim.frontend.replies import ResponseBuilder
from shim.http_connection import Budget
from shim.metrics import Metrics
from shim.ports import AgentService
from shim.settings import Listen


@dataclass(slots=True)
class ConnectionCount:
    """Counts the connections that are open, also in a gauge where one is given."""

    gauge: Gauge | None = None
    open: int = 0

    def entered(self) -> None:
        """Count a connection in."""
        self.open += 1
        if self.gauge is not None:
            self.gauge.inc()

    def left(self) -> None:
        """Count it out."""
        self.open -= 1
        if self.gauge is not None:
            self.gauge.dec()


@dataclass(frozen=True, slots=True)
class ServerContext:
    """What all connections of one frontend share."""

    listen: Listen
    switchboard: AgentService
    metrics: Metrics
    replies: ResponseBuilder
    budget: Budget
    refused: RefusedCalls
    doors: ConnectionCount = field(default_factory=ConnectionCount)
