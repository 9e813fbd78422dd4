"""Calls of the last minute are counted by kind, within a fixed bound."""

from __future__ import annotations

from shim.core.call_records import MAX_ROUTE_CHARS, OTHER_ROUTES, STEP_S, RecentCalls, bounded


def test_calls_are_counted_for_a_minute_the_most_frequent_first() -> None:
    calls = RecentCalls()
    for at in range(5):
        calls.note(float(at), 404, "GET /a", "not found")
    calls.note(30.0, 401, "GET /b", "a token is required")
    assert [(each.kind.status, each.calls) for each in calls.last_minute(50.0)] == [(404, 5), (401, 1)]
    assert [(each.kind.status, each.calls) for each in calls.last_minute(70.0)] == [(401, 1)]
    assert calls.last_minute(90.0) == []


def test_what_goes_on_for_hours_is_still_counted_by_the_minute() -> None:
    calls = RecentCalls()
    for second in range(7200):
        calls.note(float(second), 400, "POST /x", "")
    ((_, counted),) = calls.last_minute(7200.0)
    assert 55 <= counted <= 60


def test_kinds_and_texts_are_bounded_and_printable() -> None:
    calls = RecentCalls(max_kinds=3)
    for number in range(1000):
        calls.note(0.0, 404, f"GET /{number}\x1b[2J" + "x" * 5000, "r" * 5000)
    found = calls.last_minute(1.0)
    assert len(found) == 4
    assert found[0].kind == (404, OTHER_ROUTES, "")
    assert sum(each.calls for each in found) == 1000
    assert all(len(each.kind.route) <= MAX_ROUTE_CHARS and each.kind.route.isprintable() for each in found)


def test_kinds_of_the_past_make_room() -> None:
    calls = RecentCalls(max_kinds=1)
    calls.note(0.0, 404, "GET /old", "")
    calls.note(100.0, 404, "GET /new", "")
    assert [each.kind.route for each in calls.last_minute(100.0)] == ["GET /new"]


def test_a_kind_has_its_reason_and_texts_that_fit_are_whole() -> None:
    calls = RecentCalls()
    route, reason = "r" * MAX_ROUTE_CHARS, "not found"
    assert calls.note(0.0, 404, route, reason) == (404, route, reason)
    assert bounded("x" * 10, 10) == "x" * 10
    assert bounded("a\x1bb", 10) == "a?b"


def test_calls_of_some_seconds_share_a_place() -> None:
    calls = RecentCalls()
    for second in range(60):
        kind = calls.note(1000.0 + second, 404, "GET /a", "")
    assert len(calls._steps[kind]) == 60 / STEP_S
