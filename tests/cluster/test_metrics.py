"""The metrics of a replica are there from the start, with every label."""

from __future__ import annotations

from prometheus_client import generate_latest

from shim.metrics import FORWARD_OUTCOMES, RELEASE_REASONS, ClusterMetrics, Metrics, Registry


def test_every_series_exists_before_anything_happens() -> None:
    registry = Registry()
    ClusterMetrics(Metrics(registry))
    text = generate_latest(registry).decode()
    for outcome in FORWARD_OUTCOMES:
        assert f'agent_shim_forwarded_requests_total{{outcome="{outcome}"}} 0.0' in text
    for reason in RELEASE_REASONS:
        assert f'agent_shim_shards_released_total{{reason="{reason}"}} 0.0' in text
    for name in ("agent_shim_shards", "agent_shim_replicas", "agent_shim_shards_taken_total"):
        assert f"\n{name} 0.0" in text
