"""Places of the agents in the rollout: which of them the shim serves, and which go by the vendor's HTTP API."""

from __future__ import annotations

from typing import Any

from shim.core.failover import bucket, in_rollout
from shim.management.subject import Subject

RECENT_S = 86_400.0
MAX_AGENTS = 200


def rollout(bridge: Subject, wall: float) -> dict[str, Any]:
    """Return the settings of the rollout and the places of the agents that called within 24 hours.

    `hash` is `None` unless there is one agent, and `inside` is `None` unless all agents are on the same side. The
    configured `identity.name` is placed until the first agent calls.
    """
    settings = bridge.ctx.settings
    chosen = settings.rollout
    names = _names(bridge, wall) or [name for name in [settings.identity.name] if name]
    places = [
        {
            "name": name,
            "hash": round(bucket(name), 2),
            "inside": in_rollout(name, chosen.percent, chosen.include, chosen.exclude),
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
        str(session.registration.get("name") or session.known.get("name") or session.key.ident)
        for session in bridge.sessions
        if session.superseded_by is None and wall - session.last_seen_unix < RECENT_S
    }
    for key, call in bridge.ctx.fallback.by_agent.items():
        if wall - call.wall_s < RECENT_S and bridge.sessions.get(key) is None:
            names.add(call.name)
    return sorted(names)
