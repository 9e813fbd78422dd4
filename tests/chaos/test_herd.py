"""A thousand shims whose controller restarts do not come back as a herd (`python -m bench.herd` shows the figures)."""

from __future__ import annotations

import pytest

from bench.herd import BOUND, OUTAGES_S, SHIMS, restart


@pytest.mark.parametrize("outage_s", OUTAGES_S)
def test_connections_per_second_stay_within_twice_what_is_uniform(outage_s: float) -> None:
    herd = restart(outage_s)
    assert herd.ratio <= BOUND
    assert herd.back_s < 10  # and all of them are back soon


def test_a_fleet_that_is_asked_to_wait_does_not_come_back_in_the_same_second() -> None:
    herd = restart(10.0, asked_to_wait=True)
    assert herd.ratio <= BOUND
    assert herd.peak_per_s < SHIMS / 10
