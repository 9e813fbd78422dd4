"""Labels of a metric have a bounded set of values, and closed sets exist from the start."""

from __future__ import annotations

import pytest
from prometheus_client import Counter, Histogram, generate_latest

from shim.agent_api.admission import Router
from shim.metrics import MAX_CHILDREN, Labelled, LabelledCounter, Metrics, Registry, RequestCounts
from shim.protocol.dialects import load


def counter(registry: Registry, **labels: tuple[str, ...] | None) -> LabelledCounter:
    return Labelled(Counter("calls", "How many.", list(labels), registry=registry), labels)


def test_a_closed_set_of_values_exists_from_the_start() -> None:
    registry = Registry()
    counter(registry, kind=("a", "b"), end=("x", "y"))
    values = [registry.get_sample_value("calls_total", {"kind": k, "end": e}) for k in "ab" for e in "xy"]
    assert values == [0.0] * 4


def test_an_open_set_begins_empty() -> None:
    registry = Registry()
    counter(registry, kind=None)
    assert b"calls_total{" not in generate_latest(registry)


def test_a_value_that_the_label_does_not_have_counts_as_other() -> None:
    registry = Registry()
    counts = counter(registry, kind=("a", "other"))
    counts.labels("a").inc()
    counts.labels("unheard-of").inc(2)
    counts.labels("unheard-of").inc()
    assert registry.get_sample_value("calls_total", {"kind": "a"}) == 1
    assert registry.get_sample_value("calls_total", {"kind": "other"}) == 3
    assert b"unheard-of" not in generate_latest(registry)


def test_open_values_beyond_the_bound_count_as_other() -> None:
    registry = Registry()
    counts = counter(registry, kind=None)
    for number in range(MAX_CHILDREN + 5):
        counts.labels(str(number)).inc()
    assert registry.get_sample_value("calls_total", {"kind": "other"}) == 5
    assert registry.get_sample_value("calls_total", {"kind": str(MAX_CHILDREN + 1)}) is None


def test_a_wrong_number_of_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        counter(Registry(), kind=("a", "b")).labels("a", "b")


def test_a_histogram_with_labels_counts_per_bucket() -> None:
    registry = Registry()
    took = Histogram("took_seconds", "How long.", ["ended"], buckets=(0.25, 1.0), registry=registry)
    spread = Labelled(took, {"ended": ("a",)})
    for value in (0.25, 0.3, 31.0):
        spread.labels("a").observe(value)
    counted = [
        registry.get_sample_value("took_seconds_bucket", {"ended": "a", "le": le}) for le in ("0.25", "1.0", "+Inf")
    ]
    assert counted == [1, 2, 3]


def test_no_series_tells_when_it_was_created() -> None:
    registry = Registry()
    Metrics(registry)
    assert b"_created" not in generate_latest(registry)


def test_a_reply_counts_in_three_metrics() -> None:
    registry = Registry()
    counts = RequestCounts(registry)
    poll = Router(load()).match("GET", "/api/v1/clusters/agent/c1/poll")
    for status, took_s in ((200, 0.0005), (200, 0.3), (503, 31.0)):
        counts.count(poll, status, took_s)
    counts.count(Router(load()).match("GET", "/api/v1/health"), 200, 0.0)
    counts.count(None, 404, 0.0)
    named = {"dialect": "clusters_agent", "operation": "poll"}

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"agent_shim_{name}", labels)

    assert value("requests_total", **named, status="200") == 2
    assert value("requests_total", **named, status="503") == 1
    assert value("requests_total", dialect="", operation="", status="404") == 1
    buckets = [value("request_duration_seconds_bucket", **named, le=le) for le in ("0.0005", "0.25", "0.5", "+Inf")]
    assert buckets == [1, 1, 2, 3]
    assert value("request_duration_seconds_count", **named) == 3
    assert value("request_duration_seconds_sum", **named) == pytest.approx(31.3005)
    route = {"dialect": "clusters_agent", "route": "GET /api/v1/clusters/agent/{cluster_id}/poll"}
    assert value("deprecated_calls_total", **route) == 3
    assert sum(count.number for names, count in counts.sums("route").items() if names != ("",)) == 3


def test_the_same_route_of_two_requests_is_one_series() -> None:
    registry = Registry()
    counts = RequestCounts(registry)
    for cluster in ("c1", "c2"):
        counts.count(Router(load()).match("POST", f"/api/v1/clusters/agent/{cluster}/heartbeat"), 204, 0.0)
    labels = {"dialect": "clusters_agent", "operation": "heartbeat", "status": "204"}
    assert registry.get_sample_value("agent_shim_requests_total", labels) == 2


def test_replies_beyond_the_bound_count_as_other() -> None:
    registry = Registry()
    counts = RequestCounts(registry)
    poll = Router(load()).match("GET", "/api/v1/clusters/agent/c1/poll")
    for status in range(1, MAX_CHILDREN + 6):  # a proxied reply has any status
        counts.count(poll, status, 0.5)
    counts.count(poll, 1, 0.5)
    named = {"dialect": "clusters_agent", "operation": "poll"}
    other = {"dialect": "other", "operation": "other"}
    requests = "agent_shim_requests_total"
    assert registry.get_sample_value(requests, {**other, "status": "other"}) == 5
    assert registry.get_sample_value(requests, {**named, "status": "1"}) == 2
    assert registry.get_sample_value(requests, {**named, "status": str(MAX_CHILDREN)}) == 1
    assert registry.get_sample_value(requests, {**named, "status": str(MAX_CHILDREN + 1)}) is None
    assert registry.get_sample_value("agent_shim_request_duration_seconds_sum", other) == 2.5
    deprecated = {"dialect": "other", "route": "other"}
    assert registry.get_sample_value("agent_shim_deprecated_calls_total", deprecated) == 5
