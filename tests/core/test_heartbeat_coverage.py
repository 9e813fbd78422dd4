"""Which heartbeats of an agent count as heard of by the controller."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from shim.core.standing import MAX_WRITES, HeartbeatCoverage, HeartbeatOutcome

W = 30.0


@dataclass(eq=False)
class FakeLine:
    heard_at: float = 0.0


def test_the_triggering_heartbeat_and_those_that_are_coalesced_into_it_are_covered_by_one_acknowledgement() -> None:
    coverage, line = HeartbeatCoverage(), FakeLine()
    coverage.written(0, line)
    assert coverage.record_heartbeat(0, line, W) is False
    assert coverage.acked(0, line, 0.05, W) == 1
    assert [coverage.record_heartbeat(at, line, W) for at in (5, 10, 25, 30)] == [True] * 4
    assert coverage.record_heartbeat(30.1, line, W) is False
    assert coverage.settle(60, W, acks=True) == {}
    assert coverage.settle(60.2, W, acks=True) == {HeartbeatOutcome.MISSED: 1}


def test_what_was_acknowledged_on_a_connection_that_is_gone_vouches_no_more() -> None:
    coverage, before, after = HeartbeatCoverage(), FakeLine(), FakeLine()
    coverage.record_heartbeat(0, before, W)
    coverage.acked(0, before, 0.1, W)
    assert coverage.record_heartbeat(5, None, W) is False
    assert coverage.record_heartbeat(10, after, W) is False
    # but one that goes up in time covers them
    assert coverage.acked(34, after, 34.9, W) == 2
    assert not coverage.waiting


def test_an_acknowledgement_that_comes_too_late_covers_only_what_is_young_enough() -> None:
    coverage, line = HeartbeatCoverage(), FakeLine()
    coverage.record_heartbeat(0, line, W)
    coverage.record_heartbeat(20, line, W)
    assert coverage.acked(20, line, 40, W) == 1
    assert coverage.settle(40, W, acks=True) == {HeartbeatOutcome.MISSED: 1}


def test_heartbeats_of_one_second_are_kept_together_and_counted_one_by_one() -> None:
    coverage, line = HeartbeatCoverage(), FakeLine()
    for number in range(50):
        coverage.record_heartbeat(number * 0.01, None, W)
    assert len(coverage._waiting) == 1
    assert coverage.acked(1, line, 2, W) == 50


@pytest.mark.parametrize(
    "heard_at, acks, outcome",
    [
        (11.0, False, HeartbeatOutcome.WRITTEN),
        (9.0, False, HeartbeatOutcome.MISSED),  # nothing came in on the connection after the write
        (11.0, True, HeartbeatOutcome.MISSED),  # this controller does acknowledge, and did not
    ],
)
def test_without_acknowledgements_a_write_to_a_live_connection_is_what_can_be_known(
    heard_at: float, acks: bool, outcome: HeartbeatOutcome
) -> None:
    coverage, line = HeartbeatCoverage(), FakeLine()
    coverage.record_heartbeat(10, line, W)
    coverage.written(10, line)
    line.heard_at = heard_at
    assert coverage.settle(40, W, acks=acks) == {}
    assert coverage.settle(40.1, W, acks=acks) == {outcome: 1}


def test_the_same_holds_at_any_time() -> None:
    """Monotonic clocks are far from zero."""
    coverage, line = HeartbeatCoverage(), FakeLine()
    for at in (1000.0, 1000.5, 1001.5):
        coverage.record_heartbeat(at, line, W)
    assert [waiting.count for waiting in coverage._waiting] == [2, 1]
    coverage.written(1000.0, line)
    line.heard_at = 1001.0
    assert coverage.settle(1031.6, W, acks=False) == {HeartbeatOutcome.WRITTEN: 3}
    coverage.acked(1040.0, line, 1040.1, W)
    assert [coverage.record_heartbeat(at, line, W) for at in (1070.0, 1070.1)] == [True, False]


def test_an_acknowledgement_counts_up_to_the_ends_of_its_window() -> None:
    coverage, line = HeartbeatCoverage(), FakeLine()
    coverage.record_heartbeat(100.0, line, W)
    assert coverage.acked(100.0 - W - 0.1, line, 100.0, W) == 0
    assert coverage.acked(100.0, line, 100.0 + W + 0.1, W) == 0
    assert coverage.acked(100.0 - W, line, 100.0 + W, W) == 1


@pytest.mark.parametrize(
    "sent_at, heard_at, outcome",
    [
        (5.0, 5.1, HeartbeatOutcome.WRITTEN),
        (5.0, 5.0, HeartbeatOutcome.MISSED),
        (15.0, 15.1, HeartbeatOutcome.WRITTEN),
        (15.1, 16.0, HeartbeatOutcome.MISSED),
    ],
)
def test_a_write_counts_up_to_the_ends_of_its_window(
    sent_at: float, heard_at: float, outcome: HeartbeatOutcome
) -> None:
    coverage, line = HeartbeatCoverage(), FakeLine(heard_at)
    coverage.record_heartbeat(10.0, line, 5.0)
    coverage.written(sent_at, line)
    assert coverage.settle(15.1, 5.0, acks=False) == {outcome: 1}


def test_the_last_sixteen_writes_are_known() -> None:
    for later, outcome in ((MAX_WRITES - 1, HeartbeatOutcome.WRITTEN), (MAX_WRITES, HeartbeatOutcome.MISSED)):
        coverage, line = HeartbeatCoverage(), FakeLine(99.0)
        coverage.record_heartbeat(10.0, line, 5.0)
        coverage.written(10.0, line)
        for number in range(later):
            coverage.written(20.0 + number, line)
        assert coverage.settle(50.0, 5.0, acks=False) == {outcome: 1}


def test_all_heartbeats_whose_window_is_over_are_counted() -> None:
    coverage = HeartbeatCoverage()
    for at in (0.0, 2.0, 4.0):
        coverage.record_heartbeat(at, None, W)
    assert coverage.settle(33.0, W, acks=True) == {HeartbeatOutcome.MISSED: 2}


def test_an_error_discards_the_write_that_it_names_or_all() -> None:
    for sent_at, outcome in (
        (10.0, HeartbeatOutcome.MISSED),
        (11.0, HeartbeatOutcome.WRITTEN),
        (None, HeartbeatOutcome.MISSED),
    ):
        coverage, line = HeartbeatCoverage(), FakeLine(99.0)
        coverage.record_heartbeat(10.0, line, W)
        coverage.written(10.0, line)
        coverage.refused(sent_at)
        assert coverage.settle(50.0, W, acks=False) == {outcome: 1}
