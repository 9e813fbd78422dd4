"""The figures of the report, from histories made by hand."""

from __future__ import annotations

import pytest

from tests.chaos.harness import events as ev
from tests.chaos.harness.report import AWAY, DEGRADED, REFUSING, detections, percentile, recoveries, spans
from tests.chaos.harness.schedule import LINK, MESSAGES, NETWORK

ONLINE = ev.Link(1, "online", "replaying")
LOST = ev.Link(10, "waiting", "online")


def back(at: float) -> list[ev.AnyEvent]:
    return [ev.Link(at - 0.1, "opening", "waiting"), ev.Link(at, "online", "replaying")]


def lasting(name: str, begin: float, end: float) -> list[ev.AnyEvent]:
    return [ev.Fault(begin, name, True), ev.Fault(end, name, False)]


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(value) for value in range(1, 1001)]
    assert [percentile(values, share) for share in (0.5, 0.95, 0.999, 1.0)] == [500, 950, 999, 1000]
    assert percentile([3.0], 0.999) == 3
    assert percentile([], 0.5) == 0


def test_recovery_counts_from_the_moment_at_which_the_controller_can_be_reached() -> None:
    assert recoveries([ONLINE, *lasting("controller_killed", 10, 20), LOST, *back(21.5)]) == [pytest.approx(1.5)]
    assert recoveries([ONLINE, LOST, *back(12)]) == [pytest.approx(2)]  # it was there all the time


@pytest.mark.parametrize(
    "disturbance",
    [
        lasting("refuse_429", 5, 20),
        lasting("loss", 5, 30),
        [ev.Life(15, "shim", False), ev.Life(16, "shim", True)],
        [ev.Link(15, "idle", "waiting")],
    ],
)
def test_what_is_no_recovery_from_a_loss_is_left_out(disturbance: list[ev.AnyEvent]) -> None:
    assert recoveries([ONLINE, LOST, *disturbance, *back(21)]) == []


def test_detection_counts_from_the_beginning_of_the_silence() -> None:
    silence = lasting("half_open", 50, 200)
    assert detections([*silence, ev.Condemned(104, "half_open")], "half_open") == [54]
    assert detections([*silence, ev.Condemned(104, "stalled")], "half_open") == []
    assert detections([*silence, ev.Condemned(40, "half_open"), LOST], "half_open") == []


def test_a_fault_without_an_end_lasts_for_ever() -> None:
    assert spans([ev.Fault(1, "cut", True)], frozenset({"cut"})) == [(1, float("inf"))]


def test_the_report_knows_the_faults_that_it_sorts() -> None:
    assert {*LINK.kinds, *MESSAGES.kinds, *NETWORK.kinds} >= AWAY | DEGRADED | REFUSING
    assert not AWAY & (DEGRADED | REFUSING)
