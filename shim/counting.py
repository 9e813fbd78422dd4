"""Counters and histograms with labels for frequent events, without a lock and with a tenth of the library's memory.

Use them only on the event loop: increments from another thread could be lost.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import accumulate, product
from typing import Generic, TypeVar

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

MAX_CHILDREN = 1024
OTHER = "other"

Values = Collection[str] | None
"""Values of a label, `None` if they are not known in advance. `MAX_CHILDREN` bounds their number then."""


class Count:
    """A number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self, by: int = 1) -> None:
        """Add `by`."""
        self.value += by


class Spread:
    """Counts of measured values per bucket. A value equal to a bound belongs to the bucket below it."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


C = TypeVar("C", Count, Spread)


class Family(Generic[C]):
    """A metric's children by label values. A value that the label does not have counts as `other`.

    If all label values are known, all children exist from the start. Prometheus does not see the first increment of a
    series that did not exist before.
    """

    kind = "unknown"

    def __init__(self, name: str, text: str, values_of: Mapping[str, Values], make: Callable[[], C]) -> None:
        self.name = name
        self.text = text
        self.values_of = values_of
        self._make: Callable[[], C] = make
        self._made: dict[tuple[str, ...], C] = {}
        self._asked: dict[tuple[str, ...], C] = {}
        closed = [each for each in values_of.values() if each is not None]
        if len(closed) == len(values_of):
            for known in product(*closed):
                self.labels(*known)

    def labels(self, *values: str) -> C:
        """Return the child with these label values, which is created on first use."""
        child = self._asked.get(values)
        if child is not None:
            return child
        if len(self._asked) >= MAX_CHILDREN:
            return self._child((OTHER,) * len(values))
        allowed = self.values_of.values()
        bounded = (v if known is None or v in known else OTHER for v, known in zip(values, allowed, strict=True))
        child = self._asked[values] = self._child(tuple(bounded))
        return child

    def _child(self, values: tuple[str, ...]) -> C:
        child = self._made.get(values)
        if child is None:
            child = self._made[values] = self._make()
        return child

    def collect(self) -> Iterator[Metric]:
        """Yield the metric with all children, in the form that `prometheus_client` collects."""
        raise NotImplementedError


class Counts(Family[Count]):
    """A counter with labels."""

    kind = "counter"

    def __init__(self, name: str, text: str, values_of: Mapping[str, Values]) -> None:
        super().__init__(name, text, values_of, Count)

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self.name, self.text, labels=list(self.values_of))
        for values, child in self._made.items():
            family.add_metric(values, child.value)
        yield family


class Spreads(Family[Spread]):
    """A histogram with labels."""

    kind = "histogram"

    def __init__(self, name: str, text: str, values_of: Mapping[str, Values], bounds: tuple[float, ...]) -> None:
        super().__init__(name, text, values_of, lambda: Spread(bounds))
        self._names = [*(str(float(bound)) for bound in bounds), "+Inf"]

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self.name, self.text, labels=list(self.values_of))
        for values, child in self._made.items():
            buckets = list(zip(self._names, accumulate(child.counts), strict=True))
            family.add_metric(values, buckets, child.total)
        yield family
