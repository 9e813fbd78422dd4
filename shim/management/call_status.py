"""Status of agents' calls: rejected by the shim, unknown to the controller, or served by HTTP."""

from __future__ import annotations

from typing import Any

from shim.bridge import BridgeContext
from shim.core.call_records import FallbackCall, FallbackRecord, rows
from shim.core.failover import bucket
from shim.core.records import SessionKey
from shim.core.sessions import MIN_FRESH_S, Session
from shim.core.text import shorten
from shim.management.status import Rows
from shim.management.subject import Subject

MAX_SHOWN = 20
REGISTERING_S = MIN_FRESH_S
"""Seconds in which an agent that has only polled for tunnels may still register or send a heartbeat."""
RECENT_S = 120.0
DAY_S = 86_400.0


def refused_calls(ctx: BridgeContext) -> dict[str, Any]:
    """Return the calls that were rejected in the last minute, by status, route and reason."""
    counts = ctx.refused_calls.last_minute(ctx.now)
    return {"calls": sum(each.calls for each in counts), "kinds": rows(counts, MAX_SHOWN)}


def websocket_agents(bridge: Subject) -> dict[str, Any]:
    """Return the agents that connect by WebSocket themselves and need no shim. The latest come first."""
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
                "since": agent.since_unix,
                "seen_at": agent.last_seen_unix,
            }
            for agent in agents[:MAX_SHOWN]
        ],
    }


def fallback_calls(ctx: BridgeContext, *, active: bool) -> dict[str, Any]:
    """Return the outcomes of calls to the vendor's HTTP API. `used` is true if calls may be sent there now."""
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


def http_agent(record: FallbackRecord, key: SessionKey, contact_unix: float | None, wall: float) -> FallbackCall | None:
    """Return an agent's newest call by HTTP, `None` if its newest call was served by the shim itself."""
    call = record.by_agent.get(key)
    if call is None or wall - call.wall_s >= DAY_S or (contact_unix is not None and contact_unix > call.wall_s):
        return None
    return call


def by_http(call: FallbackCall) -> dict[str, Any]:
    """Return an agent's newest call by HTTP for its row. `hash` is the agent's place in the rollout."""
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
    """Return the living agents that the controller rejects, does not know or does not acknowledge."""
    now = bridge.ctx.now
    refusals = bridge.refusals
    troubled = [s for s in bridge.sessions if s.standing.trouble is not None and s.fresh(now)]
    in_trouble = {session.key for session in troubled}
    unacknowledged = [each for each in bridge.unacknowledged() if each[0].key not in in_trouble]
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


def unregistered(bridge: Subject, wall: float) -> Rows:
    """Return the agents that poll for tunnels without a session: their registration failed, or is still to come."""
    found = []
    for key, uses in bridge.usage:
        if bridge.session(key) is not None or bridge.alias(key.owner, key.ident) is not None:
            continue
        if key in bridge.ctx.fallback.by_agent or bridge.registers(key.ident):
            continue
        last = max(use.last_unix for use in uses.values())
        if wall - last < RECENT_S:
            first = min(use.first_unix for use in uses.values())
            found.append({"id": key.ident, "last": last, "overdue": last - first >= REGISTERING_S})
    return Rows(total=len(found), items=found[:MAX_SHOWN])


def _agent(session: Session) -> dict[str, Any]:
    return {"id": session.key.ident, "name": session.name or None}
