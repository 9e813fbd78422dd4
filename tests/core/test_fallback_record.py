"""The record of how calls to the vendor's HTTP API end."""

from __future__ import annotations

import pytest

from shim.core.call_records import MAX_AGENTS, OUTCOMES, FallbackCall, FallbackRecord
from shim.core.records import SessionKey


@pytest.mark.parametrize(
    "status, outcome, ok",
    [
        (204, "2xx", True),
        (302, "3xx", False),
        (401, "4xx", False),
        (503, "5xx", False),
        (777, "5xx", False),
        (0, "unreachable", False),
    ],
)
def test_the_class_of_an_answer(status: int, outcome: str, ok: bool) -> None:
    call = FallbackCall(1.0, "heartbeat", status)
    assert (call.outcome, call.ok) == (outcome, ok)
    assert outcome in OUTCOMES


@pytest.mark.parametrize(
    "operation, status, ok",
    [
        ("tunnel_poll", 404, True),
        ("", 404, True),
        ("register", 409, True),
        ("heartbeat", 404, False),
        ("tunnel_poll", 401, False),
        ("poll", 409, False),
    ],
)
def test_answers_that_agents_live_with_are_no_failures(operation: str, status: int, ok: bool) -> None:
    record = FallbackRecord()
    record.add(FallbackCall(1.0, operation, status))
    assert (record.failing_since_s is None) is ok
    assert bool(record.recent_failures.last_minute(1.0)) is not ok
    assert len(record.recent.last_minute(1.0)) == 1


def test_a_row_of_failures_begins_with_the_first_and_ends_with_a_success() -> None:
    record = FallbackRecord()
    assert (record.last, record.failing_since_s) == (None, None)
    for wall_s, status in ((1.0, 204), (2.0, 401), (3.0, 0)):
        record.add(FallbackCall(wall_s, "heartbeat", status))
    assert record.failing_since_s == 2.0
    assert record.last is record.last_failure
    record.add(FallbackCall(4.0, "heartbeat", 200))
    assert record.failing_since_s is None
    assert record.last_failure is not record.last


def test_the_newest_call_of_each_agent_is_kept_for_a_bounded_number() -> None:
    record = FallbackRecord()
    keys = [SessionKey("default", "cluster", str(number)) for number in range(MAX_AGENTS + 1)]
    for number, key in enumerate(keys):
        record.add(FallbackCall(float(number), "poll", 200), key)
        record.add(FallbackCall(float(number), "poll", 500), keys[0])
    assert len(record.by_agent) == MAX_AGENTS
    assert record.by_agent[keys[0]].status == 500
    assert keys[1] not in record.by_agent


def test_calls_of_the_last_minute_are_counted_by_route_and_failed_ones_by_reason() -> None:
    record = FallbackRecord()
    for operation, status, reason in (("", 200, ""), ("heartbeat", 503, "overloaded"), ("heartbeat", 0, "timeout")):
        record.add(FallbackCall(1.0, operation, status, reason))
    assert {tuple(each.kind) for each in record.recent.last_minute(1.0)} == {
        (200, "another call", ""),
        (503, "heartbeat", ""),
        (0, "heartbeat", ""),
    }
    assert {tuple(each.kind) for each in record.recent_failures.last_minute(1.0)} == {
        (503, "heartbeat", "overloaded"),
        (0, "heartbeat", "timeout"),
    }
