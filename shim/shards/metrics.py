"""What a replica among others counts, in the registry of its process."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from shim.counting import Counts
from shim.metrics import Metrics
from shim.shards.wire import KINDS

RELAYED = ("answered", "no_owner", "lost")
LOSSES = ("given", "expired", "taken", "failed")


class ShardMetrics:
    """By attribute."""

    def __init__(self, metrics: Metrics) -> None:
        registry = metrics.registry
        self.shards = Gauge("agent_shim_shards", "Link partitions that this replica owns.", registry=registry)
        self.replicas = Gauge("agent_shim_replicas", "Replicas that live, as this one sees it.", registry=registry)
        self.taken = Counter(
            "agent_shim_shards_taken", "Link partitions that this replica took over.", registry=registry
        )
        self.released = Counts(
            "agent_shim_shards_released", "Link partitions that this replica gave up, by reason.", {"reason": LOSSES}
        )
        self.relayed = Counts(
            "agent_shim_relayed_calls",
            "Agents' calls passed on to the replica that owns their link, by kind and what became of them.",
            {"kind": KINDS, "outcome": RELAYED},
        )
        registry.register(self.released)
        registry.register(self.relayed)
        self.served = Counter(
            "agent_shim_served_for_others", "Agents' calls carried out for other replicas.", registry=registry
        )
