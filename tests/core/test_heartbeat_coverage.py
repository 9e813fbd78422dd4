"""Which heartbeats of an agent count as heard of by the controller."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from shim.core.standing import HeartbeatCoverage, HeartbeatOutcome

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
