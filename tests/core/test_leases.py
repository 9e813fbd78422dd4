"""How long a right lasts, what is seen of others', moments on another machine's clock: pure, in virtual time."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.core.shards import ClockOffset, HeldLease, LeasePolicy, Member, View

POLICY = LeasePolicy(5.0)


@given(
    st.lists(st.tuples(st.floats(0.0, 3.0), st.floats(0.0, 2.0)), min_size=1, max_size=30),
    st.floats(0.0, 20.0),
)
def test_no_two_hold_a_lease_at_once(renewals: list[tuple[float, float]], late_s: float) -> None:
    """A holder renews at any pace, over a line as slow as it may be; the row runs out, and another takes over."""
    now = 0.0
    stored_at = sent_at = now
    term = HeldLease(POLICY, sent_at)
    for pause_s, under_way_s in renewals:
        sent_at = now + pause_s
        arrives_at = sent_at + under_way_s
        if not term.valid(sent_at) or arrives_at >= stored_at + POLICY.lease_s:
            break
        stored_at = now = arrives_at
        term.renewed(sent_at)
    taken_by_another_at = stored_at + POLICY.lease_s
    assert term.ends_at <= taken_by_another_at - POLICY.margin_s
    assert not term.valid(taken_by_another_at + late_s)


def test_a_term_that_was_over_never_is_again() -> None:
    term = HeldLease(POLICY, 0.0)
    assert term.valid(3.9)
    assert not term.valid(4.0)
    term.renewed(4.5)
    assert not term.valid(4.6)
    given_up = HeldLease(POLICY, 0.0)
    given_up.end()
    assert not given_up.valid(0.1)


@given(st.floats(1.0, 600.0), st.floats(0.0, 1.0))
def test_a_database_that_is_away_for_no_longer_than_is_said_ends_no_right(lease_s: float, phase: float) -> None:
    """The outage may begin at any moment between two renewals, and the next renewal after it comes at once."""
    policy = LeasePolicy(lease_s)
    term = HeldLease(policy, 0.0)
    outage_begins = phase * policy.renew_s
    assert term.valid(outage_begins + policy.rides_out_s - 1e-6)


@pytest.mark.parametrize("lease_s, rides_out_s", [(5, 2.3), (22, 10.27), (65, 30.3)])
def test_the_documented_lengths_ride_out_what_the_page_says(lease_s: float, rides_out_s: float) -> None:
    assert LeasePolicy(lease_s).rides_out_s == pytest.approx(rides_out_s, abs=0.05)


def test_the_shards_of_a_holder_without_a_row_are_free() -> None:
    here = Member("a", "shim-0", "10.0.0.1:7081", "f")
    view = View({"a": here}, {0: ("a", 3), 1: ("gone", 7), 2: ("", 1)})
    assert view.owner(0) is here
    assert view.owner(1) is None
    assert view.owner(2) is None
    assert view.owner(99) is None
    assert view.holders() == {0: "a"}


@given(
    st.floats(-1e6, 1e6),
    st.lists(st.tuples(st.floats(0.0, 100.0), st.floats(0.0, 5.0)), min_size=1, max_size=20),
    st.floats(-50.0, 200.0),
)
def test_a_moment_told_on_another_clock_is_never_later_than_it_was(
    ahead_s: float, heard: list[tuple[float, float]], moment: float
) -> None:
    offset = ClockOffset()
    assert offset.to_peer(moment) is None
    for sent_at, under_way_s in sorted(heard):
        offset.update(sent_at + ahead_s, sent_at + under_way_s)
    told = offset.to_peer(moment)
    assert told is not None
    assert told <= moment + ahead_s + 1e-6


def test_a_renewal_lasts_from_when_it_was_sent_and_one_that_overtakes_another_shortens_nothing() -> None:
    lease = HeldLease(POLICY, 0.0)
    lease.renewed(3.0)
    lease.renewed(2.0)
    assert lease.valid(6.9)
    assert not lease.valid(7.0)


def test_a_time_on_another_clock_is_as_late_as_drift_allows() -> None:
    offset = ClockOffset()
    for impossible in (math.nan, math.inf, -math.inf):
        offset.update(impossible, 50.0)
    offset.update(100.0, 50.0)
    assert offset.to_peer(40.0) == 90.0
    assert offset.to_peer(50.0) == 100.0
    assert offset.to_peer(50.5) == pytest.approx(100.5 - 0.5e-3, abs=1e-9)
    assert offset.to_peer(150.0) == pytest.approx(200.0 - 0.1)
    offset.update(199.85, 150.0)  # this message took longer than a drift of 0.1 s explains
    assert offset.to_peer(150.0) == pytest.approx(199.9)
    offset.update(199.95, 150.0)
    assert offset.to_peer(150.0) == 199.95
