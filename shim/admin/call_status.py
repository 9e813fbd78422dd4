"""Describe for the status how agents' calls end: refused here, unknown to the controller, or served by HTTP."""

from __future__ import annotations

from typing import Any

from shim.admin.subject import Subject
from shim.bridge import BridgeContext
from shim.core.failover import bucket
from shim.core.fallback_record import FallbackCall, FallbackRecord
from shim.core.recent_calls import rows
from shim.core.records import SessionKey
from shim.core.sessions import MIN_FRESH_S, Session
from shim.core.text import shorten

MAX_SHOWN = 20
REGISTERING_S = MIN_FRESH_S
"""An agent that only asks for tunnels may still register or heartbeat within so long."""
RECENT_S = 120.0
DAY_S = 86_400.0


def name_of(session: Session) -> str | None:
    """Return the cluster's name, if anybody told it."""
    return session.registration.get("name") or session.known.get("name") or None


def refused_calls(ctx: BridgeContext) -> dict[str, Any]:
    """Return the calls that were refused in the last minute, by status, route and reason."""
    counts = ctx.refused_calls.last_minute(ctx.now)
    return {"calls": sum(each.calls for each in counts), "kinds": rows(counts, MAX_SHOWN)}


def websocket_agents(bridge: Subject) -> dict[str, Any]:
    """Return the agents that speak WebSocket by themselves: they need the shim no more. The latest come first."""
    agents = sorted(bridge.websocket_agents, key=lambda agent: (-agent.connections, -agent.last_seen_unix))
    return {
        "total": len(agents),
        "connected": sum(agent.connections > 0 for agent in agents),
        "items": [
            {
                "name": agent.name or None,
                "agent_id": agent.agent_id or None,
                "cluster_id": agent.cluster_id or None,
                "accepted": agent.accepted,
                "connected": agent.connections > 0,
                "since": agent.since_wall,
                "seen_at": agent.last_seen_unix,
            }
            for agent in agents[:MAX_SHOWN]
        ],
    }


def fallback_calls(ctx: BridgeContext, *, active: bool) -> dict[str, Any]:
    """Return how calls to the vendor's HTTP API ended. `used`: calls may go there as things are now."""
    record, wall, settings = ctx.fallback, ctx.clock.wall_s(), ctx.settings
    failures = record.recent_failures.last_minute(wall)
    return {
        "used": active or settings.mode != "websocket" or settings.rollout.partial,
        "calls": sum(each.calls for each in record.recent.last_minute(wall)),
        "failed": sum(each.calls for each in failures),
        "failures": rows(failures, MAX_SHOWN),
        "failing_since": record.failing_since_s,
        "last": _call(record.last),
        "last_failure": _call(record.last_failure),
    }


def _call(call: FallbackCall | None) -> dict[str, Any] | None:
    if call is None:
        return None
    return {
        "at": call.wall_s,
        "operation": call.operation or None,
        "status": call.status or None,
        "reason": call.reason or None,
    }


def http_agent(record: FallbackRecord, key: SessionKey, contact_wall: float | None, wall: float) -> FallbackCall | None:
    """Return an agent's newest call by HTTP, `None` where its newest call came to the shim itself."""
    call = record.by_agent.get(key)
    if call is None or wall - call.wall_s >= DAY_S or (contact_wall is not None and contact_wall > call.wall_s):
        return None
    return call


def by_http(call: FallbackCall) -> dict[str, Any]:
    """Return an agent's newest call by HTTP as its row shows it; `hash` is its place in the rollout."""
    return {
        "why": call.why.value,
        "hash": round(bucket(call.name), 2),
        "at": call.wall_s,
        "operation": call.operation,
        "status": call.status or None,
        "reason": call.reason or None,
        "served": call.ok,
    }


def controller(bridge: Subject, wall: float) -> dict[str, Any]:
    """Return what the controller refuses, does not know or does not acknowledge, of agents that are alive."""
    now = bridge.ctx.now
    refusals = bridge.registrations.refusals
    troubled = [s for s in bridge.sessions if s.standing.trouble is not None and s.fresh(now)]
    in_trouble = {session.key for session in troubled}
    unacknowledged = [each for each in bridge.presence.unacknowledged() if each[0].key not in in_trouble]
    return {
        "registrations": {
            "total": len(refusals),
            "items": [
                {
                    "name": shorten(each.name) or None,
                    "agent": shorten(each.agent) or None,
                    "status": each.status or None,
                    "error": each.error,
                    "at": wall - (now - each.at),
                }
                for each in refusals[-MAX_SHOWN:]
            ],
        },
        "troubles": {
            "total": len(troubled),
            "items": [
                {**_agent(s), "kind": found.kind.value, "text": found.text, "since": wall - (now - found.since)}
                for s in troubled[:MAX_SHOWN]
                if (found := s.standing.trouble)
            ],
        },
        "unacknowledged": {
            "total": len(unacknowledged),
            "items": [
                {**_agent(session), "since": wall - (now - since)} for session, since in unacknowledged[:MAX_SHOWN]
            ],
        },
    }


def unregistered(bridge: Subject, wall: float) -> dict[str, Any]:
    """Return the agents that call for tunnels and have no session: their registration failed, or is still to come."""
    found = []
    for key, uses in bridge.roster.usage:
        if bridge.sessions.get(key) is not None or bridge.sessions.alias(key.owner, key.ident) is not None:
            continue
        if key in bridge.ctx.fallback.by_agent or bridge.registrations.registers(key.ident):
            continue
        last = max(use.last_wall for use in uses.values())
        if wall - last < RECENT_S:
            first = min(use.first_wall for use in uses.values())
            found.append({"id": key.ident, "last": last, "overdue": last - first >= REGISTERING_S})
    return {"total": len(found), "items": found[:MAX_SHOWN]}


def _agent(session: Session) -> dict[str, Any]:
    return {"id": session.key.ident, "name": name_of(session)}
