"""Which way a call goes (docs/reference/protocol.md#4-modes)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.core.failover import BREAKER_MAX_S, Breaker, Failover, Transport, bucket, in_rollout


def test_buckets_never_change() -> None:
    """Other shims, other versions and other languages must place an agent alike: these values are for ever."""
    assert f"{bucket('prod-cluster'):.9f}" == "6.120480289"
    assert f"{bucket('staging'):.9f}" == "91.054769312"
    assert f"{bucket(''):.9f}" == "88.941599489"
    assert f"{bucket('größe'):.9f}" == "82.549490945"
    assert 0 <= bucket("\ud83d") < 100, "half a character has a place, too"


@given(st.text())
def test_a_bucket_is_a_percentage(name: str) -> None:
    assert 0 <= bucket(name) < 100


def test_buckets_are_spread_evenly() -> None:
    inside = sum(bucket(f"cluster-{n}") < 10 for n in range(10_000))
    assert 900 < inside < 1100


def look(failover: Failover, now: float, *, up: bool, since: float) -> Transport:
    return failover.update(now, up=up, since=since, after_s=10, hold_down_s=60)


def test_fails_over_after_a_while_and_comes_back_after_a_longer_while() -> None:
    failover = Failover()
    assert look(failover, 1, up=True, since=0) is Transport.WEBSOCKET
    assert look(failover, 109.9, up=False, since=100) is Transport.WEBSOCKET
    assert look(failover, 110, up=False, since=100) is Transport.HTTP
    assert look(failover, 259, up=True, since=200) is Transport.HTTP
    assert look(failover, 265, up=False, since=260) is Transport.HTTP
    assert look(failover, 330, up=True, since=271) is Transport.HTTP
    assert look(failover, 331, up=True, since=271) is Transport.WEBSOCKET


def test_the_time_counts_from_the_change_of_the_link_not_from_the_first_call_after_it() -> None:
    failover = Failover()
    assert look(failover, 110, up=False, since=100) is Transport.HTTP
    assert look(failover, 300, up=True, since=240) is Transport.WEBSOCKET


def test_the_breaker_opens_after_three_failures_ever_longer_and_closes_with_a_success() -> None:
    breaker = Breaker()
    for now in (0.0, 0.1):
        breaker.failed(now)
        assert breaker.allows(now)
    breaker.failed(0.2)
    assert breaker.open
    assert not breaker.allows(1.1)
    assert breaker.allows(1.2)
    breaker.failed(1.2)
    assert not breaker.allows(3.1)
    assert breaker.allows(3.2)
    for _ in range(20):
        breaker.failed(10)
    assert not breaker.allows(10 + BREAKER_MAX_S - 0.1)
    assert breaker.allows(10 + BREAKER_MAX_S)
    breaker.succeeded()
    assert not breaker.open
    assert breaker.allows(0.0)
    for now in (200.0, 201.0):
        breaker.failed(now)
        assert breaker.allows(now)
    breaker.failed(202)
    assert not breaker.allows(202.9)
    assert breaker.allows(203)  # as short as the first time


@pytest.mark.parametrize(
    "name, percent, include, exclude, served",
    [
        ("prod-cluster", 10, (), (), True),
        ("staging", 10, (), (), False),
        ("staging", 10, ("stag*",), (), True),
        ("staging", 0, ("staging",), (), True),
        ("prod-cluster", 100, (), ("prod-*",), False),
        ("prod-cluster", 100, ("prod-cluster",), ("prod-*",), False),
        ("Prod-cluster", 100, (), ("prod-*",), True),
    ],
)
def test_named_clusters_come_before_the_hash(
    name: str, percent: float, include: tuple[str, ...], exclude: tuple[str, ...], served: bool
) -> None:
    assert in_rollout(name, percent, include, exclude) is served
