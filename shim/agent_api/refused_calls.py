"""Make every refused call of an agent visible: count it for the status, and log it at most once a minute a kind."""

from __future__ import annotations

from typing import Any

from shim.core.recent_calls import RecentCalls
from shim.log import get
from shim.protocol.dialects import Match

log = get(__name__)

NO_ROUTE = "a request without a route"


class RefusedCalls:
    """Notes the calls that a frontend answers with 4xx or 5xx."""

    def __init__(self, recent: RecentCalls) -> None:
        self._recent = recent

    def note(self, now: float, status: int, route: str, body: Any = None) -> None:
        """Note one call; `body` is the reply's, with the reason under `error`."""
        reason = body.get("error") if isinstance(body, dict) else body
        kind = self._recent.note(now, status, route, reason if isinstance(reason, str) else "")
        about = f"{kind.status} {kind.route} {kind.reason}"
        log.warning("call_refused", about=about, status=status, route=kind.route, reason=kind.reason)


def route_of(method: str, target: str, match: Match | None) -> str:
    """Return a request's route for people: its pattern, or its path where no route matched, never the query."""
    if match is not None:
        return f"{match.route.method} {match.route.pattern}"
    path = target.partition("?")[0].partition("#")[0]
    return f"{method} {path}"
