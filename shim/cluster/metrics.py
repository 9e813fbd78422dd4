"""Metrics of a replica, in the registry of its process."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from shim.metrics import Labelled, Metrics

OUTCOMES = ("answered", "no_owner", "lost")
REASONS = ("given", "expired", "taken", "failed")


class ClusterMetrics:
    """Metrics of shards and forwarded requests, one attribute each."""

    def __init__(self, metrics: Metrics) -> None:
        registry = metrics.registry
        self.shards = Gauge("agent_shim_shards", "Shards that this replica owns.", registry=registry)
        self.replicas = Gauge("agent_shim_replicas", "Replicas that live, as this one sees it.", registry=registry)
        self.taken = Counter("agent_shim_shards_taken", "Shards that this replica took over.", registry=registry)
        released = Counter(
            "agent_shim_shards_released", "Shards that this replica gave up, by reason.", ["reason"], registry=registry
        )
        self.released = Labelled(released, {"reason": REASONS})
        forwarded = Counter(
            "agent_shim_forwarded_requests",
            "Agents' requests sent on to the replica that owns their shard, by what became of them.",
            ["outcome"],
            registry=registry,
        )
        self.forwarded = Labelled(forwarded, {"outcome": OUTCOMES})
