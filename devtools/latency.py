"""Latency statistics for reports: percentiles, and a histogram for a terminal."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count

_BAR = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True, slots=True)
class Summary:
    """Summary of latencies in seconds. Percentiles are nearest-rank, so each is a value that was measured."""

    count: int
    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    max_s: float

    @classmethod
    def of(cls, samples_s: Iterable[float]) -> Summary | None:
        """Summarise the samples; return None if there are none."""
        ordered = sorted(samples_s)
        if not ordered:
            return None
        p50_s, p95_s, p99_s = (percentile(ordered, q) for q in (50, 95, 99))
        return cls(len(ordered), math.fsum(ordered) / len(ordered), p50_s, p95_s, p99_s, ordered[-1])

    def __str__(self) -> str:
        shown = (f"{name} {duration(getattr(self, f'{name}_s'))}" for name in ("p50", "p95", "p99", "max"))
        return "  ".join(shown)


def percentile(ordered: Sequence[float], q: float) -> float:
    """Return the nearest-rank percentile `q` (0 < q <= 100) of a sorted, non-empty sequence."""
    return ordered[max(0, math.ceil(len(ordered) * q / 100) - 1)]


def duration(value_s: float) -> str:
    """Format a duration with three digits and its unit: `0.42 ms`, `17.0 ms`, `1.25 s`."""
    value, unit = (value_s, "s") if value_s >= 0.9995 else (value_s * 1000, "ms")
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def histogram(samples_s: Sequence[float], width: int = 40) -> list[str]:
    """Return a histogram as lines, with bucket limits 1, 2, 5, 10, … Without samples there are no lines."""
    if not samples_s:
        return []
    bounds = _bounds(max(min(samples_s), 1e-6), max(samples_s))
    counts = [0] * len(bounds)
    for sample_s in samples_s:
        counts[bisect_left(bounds, sample_s)] += 1
    most = max(counts)
    return [
        f"≤ {duration(bound):>8} │{_bar(found / most, width):<{width}}│ {found}"
        for bound, found in zip(bounds, counts, strict=True)
    ]


def _bounds(least_s: float, most_s: float) -> list[float]:
    """Return the upper bounds of the buckets that cover both values."""
    first = math.floor(math.log10(least_s)) - 1
    steps = (float(f"{factor}e{exponent}") for exponent in count(first) for factor in (1, 2, 5))
    bounds = [next(bound for bound in steps if bound >= least_s)]
    while bounds[-1] < most_s:
        bounds.append(next(steps))
    return bounds


def _bar(share: float, width: int) -> str:
    eighths = math.ceil(share * width * 8)
    return "█" * (eighths // 8) + (_BAR[eighths % 8] if eighths % 8 else "")
