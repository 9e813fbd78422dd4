"""Our own counters and histograms say exactly what `prometheus_client`'s would."""

from __future__ import annotations

import pytest
from prometheus_client import Counter, Histogram, generate_latest

from shim.counting import MAX_CHILDREN, OTHER, Counts, Spreads
from shim.metrics import Registry

BOUNDS = (0.001, 0.25, 1, 30)
VALUES = (0.0, 0.001, 0.0011, 0.25, 1.0, 29.9, 30.0, 31.0, 0.2)


def both() -> tuple[Registry, Registry]:
    """Registries for ours and for the library's."""
    return Registry(), Registry()


def test_a_histogram_is_the_librarys() -> None:
    ours, theirs = both()
    spreads = Spreads("took_seconds", "How long.", {"kind": None, "ended": ("a", "b")}, BOUNDS)
    ours.register(spreads)
    known = Histogram("took_seconds", "How long.", ("kind", "ended"), buckets=BOUNDS, registry=theirs)
    for value in VALUES:
        for labels in (("x", "a"), ("y", "b")):
            spreads.labels(*labels).observe(value)
            known.labels(*labels).observe(value)
    assert generate_latest(ours) == generate_latest(theirs)


def test_a_counter_is_the_librarys() -> None:
    ours, theirs = both()
    counts = Counts("calls", "How many.", {"kind": ("a", "b")})
    ours.register(counts)
    known = Counter("calls", "How many.", ("kind",), registry=theirs)
    for kind, times in (("a", 1), ("b", 0), ("a", 41)):
        counts.labels(kind).inc(times)
        known.labels(kind).inc(times)
    assert generate_latest(ours) == generate_latest(theirs)


def test_a_wrong_number_of_labels_is_refused() -> None:
    counts = Counts("calls", "How many.", {"kind": ("a", "b")})
    with pytest.raises(ValueError, match="zip"):
        counts.labels("a", "b")


def test_values_of_a_label_beyond_the_bound_are_counted_together() -> None:
    counts = Counts("calls", "How many.", {"kind": None})
    for number in range(MAX_CHILDREN + 10):
        counts.labels(f"kind-{number}").inc()
    (family,) = counts.collect()
    assert len(family.samples) == MAX_CHILDREN + 1
    assert [sample.value for sample in family.samples if sample.labels["kind"] == OTHER] == [10]
