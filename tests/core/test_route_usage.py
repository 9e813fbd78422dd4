"""The legacy routes that each agent uses, within a fixed bound."""

from __future__ import annotations

import pytest

from shim.bridge.session_registry import RouteUsage, RouteUse
from shim.core.agent_calls import (
    AgentCall,
    HealthCall,
    HeartbeatCall,
    PollCall,
    RegisterCall,
    ResultCall,
    SessionTarget,
    StatusCall,
    TargetKind,
    TunnelInfoCall,
    TunnelPollCall,
)
from shim.core.call_records import CallCount, CallKind, route_of, rows
from shim.core.records import SessionKey

TARGET = SessionTarget(TargetKind.AGENT, "a")


@pytest.mark.parametrize(
    "call, route",
    [
        (RegisterCall("agents", "a", "n", {}, "", True), ("agents", "register")),
        (HeartbeatCall("agents", TARGET, "a"), ("agents", "heartbeat")),
        (StatusCall("agents", TARGET, {}), ("agents", "status")),
        (PollCall("clusters_agent", TARGET), ("clusters_agent", "poll")),
        (ResultCall("agents", TARGET, "k1", {}), ("agents", "result")),
        (TunnelPollCall(TARGET), ("common", "tunnel_poll")),
        (TunnelInfoCall(TARGET), ("clusters_agent", "tunnel_info")),
        (HealthCall(), ("common", "health")),
    ],
)
def test_each_call_has_a_route(call: AgentCall, route: tuple[str, str]) -> None:
    assert route_of(call) == route


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


def test_the_status_has_the_first_counts() -> None:
    counts = [CallCount(CallKind(404, "GET /a", "not found"), 3), CallCount(CallKind(0, "poll", ""), 2)]
    assert rows(counts, 1) == [{"status": 404, "route": "GET /a", "reason": "not found", "calls": 3}]
    assert rows(counts, 2)[1] == {"status": None, "route": "poll", "reason": None, "calls": 2}
