"""Percentiles, durations and the histogram."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devtools.latency import Summary, duration, histogram, percentile

SAMPLES_S = st.lists(st.floats(1e-6, 1e4), min_size=1, max_size=200)


def test_percentiles_are_nearest_rank() -> None:
    hundred = [float(n) for n in range(1, 101)]
    assert [percentile(hundred, q) for q in (1, 50, 95, 99, 99.9, 100)] == [1, 50, 95, 99, 100, 100]
    assert percentile([7.0], 50) == percentile([7.0], 99.9) == 7


def test_a_summary_of_nothing_is_none() -> None:
    assert Summary.of([]) is None


def test_a_summary_reads_in_fitting_units() -> None:
    summary = Summary.of([0.001, 0.002, 2.5])
    assert summary is not None
    assert (summary.count, round(summary.mean_s, 4)) == (3, 0.8343)
    assert str(summary) == "p50 2.00 ms  p95 2.50 s  p99 2.50 s  max 2.50 s"


@pytest.mark.parametrize(
    "value_s, shown",
    [
        (0.00042, "0.42 ms"),
        (0.017, "17.0 ms"),
        (0.4567, "457 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.00 s"),
        (90, "90.0 s"),
    ],
)
def test_durations(value_s: float, shown: str) -> None:
    assert duration(value_s) == shown


@given(SAMPLES_S)
def test_every_sample_is_in_exactly_one_bucket(samples_s: list[float]) -> None:
    shown = histogram(samples_s)
    assert sum(int(line.rpartition("│ ")[2]) for line in shown) == len(samples_s)
    assert int(shown[0].rpartition("│ ")[2]) > 0
    assert int(shown[-1].rpartition("│ ")[2]) > 0


def test_the_fullest_bucket_fills_the_width_and_the_others_are_in_proportion() -> None:
    shown = histogram([0.001] * 8 + [0.002] * 4 + [0.02], width=8)
    assert shown == [
        "≤  1.00 ms │████████│ 8",
        "≤  2.00 ms │████    │ 4",
        "≤  5.00 ms │        │ 0",
        "≤  10.0 ms │        │ 0",
        "≤  20.0 ms │█       │ 1",
    ]


def test_no_samples_no_histogram() -> None:
    assert histogram([]) == []
