"""Phases of a link: equal ones are joined, and those long past are dropped."""

from __future__ import annotations

from shim.core.link_state import MAX_SEGMENTS, LinkHistory, PhaseKind


def test_a_timeline_joins_what_is_alike_and_forgets_what_is_long_past() -> None:
    timeline = LinkHistory(0.0)
    for at, phase in ((10.0, PhaseKind.DOWN), (11.0, PhaseKind.DOWN), (12.0, PhaseKind.UP), (5000.0, PhaseKind.DOWN)):
        timeline.enter(phase, at, f"at {at:g}")
    assert [(each.phase, each.since_s) for each in timeline.last(5100.0, 3600.0)] == [
        (PhaseKind.UP, 12.0),
        (PhaseKind.DOWN, 5000.0),
    ]
    assert (timeline.current.phase, timeline.current.reason) == (PhaseKind.DOWN, "at 5000")
    for number in range(2 * MAX_SEGMENTS):
        timeline.enter(PhaseKind.UP if number % 2 else PhaseKind.IDLE, 6000.0 + number, "")
    assert len(timeline.last(6000.0 + 2 * MAX_SEGMENTS, 1e6)) == MAX_SEGMENTS


def test_a_link_begins_idle() -> None:
    assert LinkHistory(0.0).current.phase is PhaseKind.IDLE
