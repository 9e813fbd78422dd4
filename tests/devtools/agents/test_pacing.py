"""Pacing: Go's ticker, and a fixed pause."""

from __future__ import annotations

import pytest

from devtools.agents.pacing import Pace, Pause, Ticker


def starts(pace: Pace, durations_s: list[float], now_s: float) -> list[float]:
    """When calls of these durations begin, made one after another as `pace` says."""
    found = []
    for duration_s in durations_s:
        now_s = max(now_s, pace.due_s)
        found.append(round(now_s, 6))
        pace.started(now_s)
        now_s += duration_s
        pace.ended(now_s)
    return found


def test_a_ticker_keeps_its_grid_whatever_the_calls_take() -> None:
    assert starts(Ticker(5, 100), [0, 4.9, 1, 0], 100) == [105, 110, 115, 120]


def test_a_long_call_leaves_one_tick_waiting_and_loses_the_rest() -> None:
    assert starts(Ticker(5, 0), [0, 17, 0, 0], 0) == [5, 10, 27, 30]


def test_a_call_of_exactly_a_period_is_followed_at_once() -> None:
    assert starts(Ticker(5, 0), [5, 5, 0], 0) == [5, 10, 15]


def test_a_ticker_may_begin_at_once() -> None:
    assert starts(Ticker(5, 3, at_once=True), [0, 0], 3) == [3, 8]


def test_a_timer_that_fires_early_is_not_the_same_tick_twice() -> None:
    ticker = Ticker(5, 0)
    ticker.started(4.9999)
    assert ticker.due_s == 10


def test_a_pause_counts_from_the_answer() -> None:
    assert starts(Pause(5, 0), [20, 1, 0], 0) == [0, 25, 31]


@pytest.mark.parametrize("pace", [Ticker, Pause])
@pytest.mark.parametrize("period_s", [0, -1])
def test_no_period_would_spin(pace: type[Ticker | Pause], period_s: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        pace(period_s, 0)
