"""Labels of a metric have a bounded set of values, and closed sets exist from the start."""

from __future__ import annotations

import pytest
from prometheus_client import Counter, Histogram, generate_latest

from shim.metrics import MAX_CHILDREN, Labelled, LabelledCounter, Metrics, Registry


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
