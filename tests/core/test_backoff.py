"""Loss or refusal, and how long to wait (docs/reference/protocol.md#21-link-life)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.core.backoff import (
    FAILURES,
    Backoff,
    BackoffPolicy,
    FailureKind,
    classify,
    failure_name,
    is_controller_unreachable,
)

LOSS, REFUSED = FailureKind.LOSS, FailureKind.REFUSED
RNG = st.floats(0, 1, exclude_max=True)


@pytest.mark.parametrize(
    "status, retry_after_s, since_working_s, kind",
    [
        (0, None, None, LOSS),
        (408, None, None, LOSS),
        (500, None, None, LOSS),
        (502, None, None, LOSS),
        (503, None, None, LOSS),
        (503, 1.0, None, REFUSED),
        (500, 0.0, None, REFUSED),
        (401, None, 5.0, REFUSED),
        (403, None, 5.0, REFUSED),
        (429, None, 5.0, REFUSED),
        (429, 30.0, None, REFUSED),
        (400, None, 5.0, REFUSED),
        (410, None, 5.0, REFUSED),
        (426, None, 5.0, REFUSED),
        (200, None, 5.0, REFUSED),
        (301, None, 5.0, REFUSED),
        (404, None, None, REFUSED),
        (404, None, 599.0, LOSS),
        (404, None, 600.0, REFUSED),
        (404, 10.0, 5.0, REFUSED),
    ],
)
def test_classify(status: int, retry_after_s: float | None, since_working_s: float | None, kind: FailureKind) -> None:
    assert classify(status, retry_after_s, since_working_s) is kind


@given(st.lists(st.tuples(st.sampled_from(FailureKind), RNG), min_size=1, max_size=80))
def test_full_jitter_doubles_up_to_the_cap_of_its_kind(failures: list[tuple[FailureKind, float]]) -> None:
    backoff = Backoff(BackoffPolicy(), lambda: drawn)
    for number, (kind, drawn) in enumerate(failures):
        bound_s = min(5.0 if kind is LOSS else 60.0, 2.0**number)
        assert backoff.next_delay_s(kind) == pytest.approx(drawn * bound_s)
    assert backoff.failures == len(failures)


@given(st.floats(allow_nan=False), RNG, st.integers(0, 30), st.sampled_from(FailureKind))
def test_retry_after_is_clamped_and_never_undercut(
    asked_s: float, drawn: float, failures: int, kind: FailureKind
) -> None:
    backoff = Backoff(BackoffPolicy(), lambda: drawn)
    for _ in range(failures):
        backoff.next_delay_s(kind)
    floor_s = min(max(asked_s, 1.0), 300.0)
    assert floor_s <= backoff.next_delay_s(kind, asked_s) <= 2 * floor_s


def test_those_who_were_told_the_same_second_do_not_come_back_in_it() -> None:
    delays = {Backoff(BackoffPolicy(), lambda n=n: n / 10).next_delay_s(REFUSED, 30.0) for n in range(10)}  # type: ignore[misc]
    assert len(delays) == 10


def test_starts_over_only_when_told() -> None:
    backoff = Backoff(BackoffPolicy(), lambda: 1.0)
    assert [backoff.next_delay_s(REFUSED) for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    backoff.reset()
    assert backoff.failures == 0
    assert backoff.next_delay_s(LOSS) == 1


@given(RNG, st.one_of(st.none(), st.floats(0, 10_000)))
def test_a_fixed_pace_is_about_a_minute_but_respects_retry_after(drawn: float, asked_s: float | None) -> None:
    delay_s = Backoff(BackoffPolicy(), lambda: drawn).fixed_delay_s(asked_s)
    assert delay_s >= 60
    assert delay_s >= min(asked_s or 0.0, 300.0)
    assert delay_s <= 1.1 * max(60.0, min(asked_s or 0.0, 300.0))


def test_the_configured_delays_are_used() -> None:
    backoff = Backoff(BackoffPolicy(initial_s=0.1, max_s=0.2, refused_max_s=0.3, contended_s=9), lambda: 0.999)
    for _ in range(5):
        backoff.next_delay_s(LOSS)
    assert backoff.next_delay_s(LOSS) == pytest.approx(0.1998)
    assert backoff.next_delay_s(REFUSED) == pytest.approx(0.2997)
    assert backoff.fixed_delay_s() == pytest.approx(9.8991)


# --- What a failed dial is called and what it tells of the controller ---


@pytest.mark.parametrize(
    "reason, status, name",
    [
        ("dns", 0, "dns"),
        ("status", 401, "http_401"),
        ("status", 418, "http_4xx"),
        ("status", 503, "http_5xx"),
        ("status", 302, "http_3xx"),
        ("status", 200, "http_2xx"),
        ("a new reason", 0, "other"),
        ("status", 999, "other"),
    ],
)
def test_names_are_bounded(reason: str, status: int, name: str) -> None:
    assert failure_name(reason, status) == name
    assert name in (*FAILURES, "other")


@pytest.mark.parametrize(
    "reason, status, since_working_s, away",
    [
        ("dns", 0, None, True),
        ("tcp", 0, 5, True),
        ("timeout", 0, 5, True),
        ("proxy", 0, None, True),
        ("tls", 0, None, False),  # somebody answered, wrongly
        ("handshake", 0, None, False),
        ("status", 503, None, True),
        ("status", 408, None, True),
        ("status", 401, None, False),
        ("status", 429, None, False),
        ("status", 404, 5, True),  # being redeployed
        ("status", 404, None, False),  # a wrong address
    ],
)
def test_away_or_there(reason: str, status: int, since_working_s: float | None, away: bool) -> None:
    assert is_controller_unreachable(reason, status, since_working_s) is away


def test_jitter_is_added_to_retry_after_up_to_the_bound_of_the_failures_so_far() -> None:
    backoff = Backoff(BackoffPolicy(), lambda: 0.5)
    assert [backoff.next_delay_s(REFUSED, 30.0) for _ in range(4)] == [30.5, 31, 32, 34]


def test_fixed_delays_count_as_failures_and_may_be_short() -> None:
    backoff = Backoff(BackoffPolicy(contended_s=0.5), lambda: 0.0)
    assert [backoff.fixed_delay_s(), backoff.fixed_delay_s(2.0)] == [0.5, 2.0]
    assert backoff.failures == 2
