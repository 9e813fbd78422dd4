"""The legacy routes that each agent uses, within a fixed bound."""

from __future__ import annotations

from shim.bridge.session_registry import RouteUsage, RouteUse
from shim.core.records import SessionKey


def key(number: int) -> SessionKey:
    return SessionKey("default", "agent", f"a{number}")


def test_calls_are_counted_by_agent_and_route() -> None:
    usage = RouteUsage()
    for number, operation, wall in ((1, "poll", 5.0), (1, "poll", 6.0), (1, "heartbeat", 7.0), (2, "poll", 8.0)):
        usage.note(key(number), "agents", operation, wall)
    usage.note(key(1), "clusters_agent", "poll", 9.0)
    assert dict(usage) == {
        key(1): {
            ("agents", "poll"): RouteUse(2, 5.0, 6.0, ("agents", "poll")),
            ("agents", "heartbeat"): RouteUse(1, 7.0, 7.0, ("agents", "heartbeat")),
            ("clusters_agent", "poll"): RouteUse(1, 9.0, 9.0, ("clusters_agent", "poll")),
        },
        key(2): {("agents", "poll"): RouteUse(1, 8.0, 8.0, ("agents", "poll"))},
    }
    usage.forget(key(1))
    usage.forget(key(1))
    assert list(dict(usage)) == [key(2)]


def test_of_too_many_agents_the_first_is_dropped() -> None:
    usage = RouteUsage(max_agents=2)
    for number in (1, 2, 1, 3):
        usage.note(key(number), "agents", "poll", 0.0)
    assert list(dict(usage)) == [key(2), key(3)]
