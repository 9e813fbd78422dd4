"""The route of each call, and counts of calls as the status shows them."""

from __future__ import annotations

import pytest

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


def test_the_status_has_the_first_counts() -> None:
    counts = [CallCount(CallKind(404, "GET /a", "not found"), 3), CallCount(CallKind(0, "poll", ""), 2)]
    assert rows(counts, 1) == [{"status": 404, "route": "GET /a", "reason": "not found", "calls": 3}]
    assert rows(counts, 2)[1] == {"status": None, "route": "poll", "reason": None, "calls": 2}
