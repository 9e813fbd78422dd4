"""Migration of agents: deprecated routes in use, the days left, reasons to keep the shim, places in the rollout."""

from __future__ import annotations

from functools import cache
from typing import Any

from shim.bridge.session_registry import RouteUse
from shim.config.rules import is_past, parse_date_s
from shim.config.settings import Sunset
from shim.core.call_records import Route
from shim.core.failover import bucket, in_rollout
from shim.core.records import SessionKey
from shim.core.text import format_duration, plural
from shim.management.status import MigrationStatus, Rows
from shim.management.subject import Subject
from shim.protocol import dialects

DAY_S = 86_400.0
"""Seconds of a day: as long without a deprecated call, agents are assumed to have migrated."""
MAX_AGENTS = 200

_Uses = list[tuple[SessionKey, dict[Route, RouteUse]]]


@cache
def paths() -> dict[Route, tuple[str, str]]:
    """Return (method, path pattern) by (dialect, operation), for every route of every dialect."""
    return {(d.NAME, r.operation): (r.method, r.pattern) for d in dialects.load() for r in d.ROUTES}


def migration(bridge: Subject, wall: float, started_unix: float) -> MigrationStatus:
    """Return the panel's data at `wall`.

    Calls are counted since the start. The time at which an agent was last seen survives restarts.
    """
    uses: _Uses = list(bridge.usage)
    last_seen = {session.key: session.last_seen_unix for session in bridge.sessions}
    for key, routes in uses:
        last_seen[key] = max(last_seen.get(key, 0.0), *(use.last_unix for use in routes.values()))
    reasons = _reasons(bridge, last_seen, wall, started_unix)
    return MigrationStatus(
        sunset=sunset(bridge.ctx.settings.sunset, wall),
        counted_since=started_unix,
        routes=_by_route(uses),
        agents=_by_agent(bridge, dict(uses), last_seen),
        removable=not reasons,
        reasons=reasons,
    )


def sunset(configured: Sunset, wall: float) -> dict[str, Any]:
    """Return the configured end of the legacy API. `days_left` is negative after it."""
    at = parse_date_s(configured.at) if configured.at else None
    return {
        "deprecated_at": parse_date_s(configured.deprecation_at) if configured.deprecation_at else None,
        "at": at,
        "days_left": None if at is None else (at - wall) / DAY_S,
        "link": configured.link or None,
    }


def _reasons(bridge: Subject, last_seen: dict[SessionKey, float], wall: float, started_unix: float) -> list[str]:
    """Return the reasons why the shim cannot be removed, empty if it can."""
    reasons = []
    active = [seen for seen in last_seen.values() if wall - seen < DAY_S]
    if active:
        ago = format_duration(wall - max(active))
        reasons.append(f"{plural(len(active), 'agent')} called in the last 24 h, the last one {ago} ago")
    elif wall - started_unix < DAY_S:
        reasons.append(f"no call in the {format_duration(wall - started_unix)} since the start: wait until it is 24 h")
    commands = sum(len(queue) for _, queue in bridge.queues)
    if commands:
        verb = "waits" if commands == 1 else "wait"
        reasons.append(f"{plural(commands, 'command')} {verb} to be fetched")
    if not bridge.all_results_confirmed:
        reasons.append("results are not confirmed by the controller yet")
    return reasons


def _route(route: Route) -> dict[str, Any]:
    method, path = paths().get(route, ("", ""))
    return {"dialect": route[0], "operation": route[1], "method": method, "path": path}


def _by_route(uses: _Uses) -> list[dict[str, Any]]:
    found: dict[Route, list[RouteUse]] = {}
    for _, routes in uses:
        for route, use in routes.items():
            found.setdefault(route, []).append(use)
    rows = [
        {
            **_route(route),
            "agents": len(each),
            "calls": sum(use.count for use in each),
            "last": max(use.last_unix for use in each),
        }
        for route, each in found.items()
    ]
    return sorted(rows, key=lambda row: (row["dialect"], row["path"]))


def _by_agent(bridge: Subject, uses: dict[SessionKey, dict[Route, RouteUse]], last: dict[SessionKey, float]) -> Rows:
    newest = sorted(last, key=lambda key: last[key], reverse=True)[:MAX_AGENTS]
    agents = [_agent(bridge, key, uses.get(key, {}), last[key]) for key in newest]
    return Rows(total=len(last), items=sorted(agents, key=lambda agent: agent["name"] or agent["id"]))


def _agent(bridge: Subject, key: SessionKey, routes: dict[Route, RouteUse], last: float) -> dict[str, Any]:
    session = bridge.session(key)
    return {
        "id": key.ident,
        "kind": key.kind,
        "name": session.name or None if session is not None else None,
        "dialect": session.dialect if session is not None else None,
        "last": last or None,
        "calls": sum(use.count for use in routes.values()),
        "routes": [
            {**_route(route), "calls": use.count, "every_s": _every_s(use), "last": use.last_unix}
            for route, use in sorted(routes.items())
        ],
    }


def _every_s(use: RouteUse) -> float | None:
    """Return the average seconds between calls, `None` for a single call."""
    return None if use.count < 2 else round((use.last_unix - use.first_unix) / (use.count - 1), 1)


def rollout(bridge: Subject, wall: float) -> dict[str, Any]:
    """Return the settings of the rollout and the places of the agents that called within 24 hours.

    `hash` is `None` unless there is one agent, and `inside` is `None` unless all agents are on the same side. The
    configured `identity.name` is placed until the first agent calls. After the sunset all agents are inside.
    """
    settings = bridge.ctx.settings
    over = is_past(settings.sunset, wall)
    chosen = settings.rollout
    names = _names(bridge, wall) or [name for name in [settings.identity.name] if name]
    places = [
        {
            "name": name,
            "hash": round(bucket(name), 2),
            "inside": over or in_rollout(name, chosen.percent, chosen.include, chosen.exclude),
        }
        for name in names
    ]
    inside = sum(place["inside"] is True for place in places)
    return {
        "percent": chosen.percent,
        "since": next(iter(bridge.ctx.metrics.rollout_changed.collect())).samples[0].value or None,
        "include": list(chosen.include),
        "exclude": list(chosen.exclude),
        "hash": places[0]["hash"] if len(places) == 1 else None,
        "inside": None if inside not in (0, len(places)) or not places else inside > 0,
        "agents": {"total": len(places), "inside": inside, "items": places[:MAX_AGENTS]},
    }


def _names(bridge: Subject, wall: float) -> list[str]:
    """Return the names by which the rollout places agents: the cluster's name if known, else the agent's id."""
    names = {
        session.name or session.key.ident
        for session in bridge.sessions
        if session.superseded_by is None and wall - session.last_seen_unix < DAY_S
    }
    for key, call in bridge.ctx.fallback.by_agent.items():
        if wall - call.wall_s < DAY_S and bridge.session(key) is None:
            names.add(call.name)
    return sorted(names)
