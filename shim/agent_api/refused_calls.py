"""Records of agents' calls that were answered with an error, for the status and the log."""

from __future__ import annotations

from typing import Any

from shim.core.call_records import RecentCalls
from shim.log import get
from shim.protocol.dialects import Match

log = get(__name__)

NO_ROUTE = "a request without a route"


class RefusedCalls:
    """Recorder of the calls that the server answers with 4xx or 5xx.

    The status shows every kind of refusal; the log shows each at most once a minute.
    """

    def __init__(self, recent: RecentCalls) -> None:
        self._recent = recent

    def note(self, now: float, status: int, route: str, body: Any = None) -> None:
        """Record one refused call; `body` is the reply's body with the reason under `error`."""
        reason = body.get("error") if isinstance(body, dict) else body
        kind = self._recent.note(now, status, route, reason if isinstance(reason, str) else "")
        about = f"{kind.status} {kind.route} {kind.reason}"
        log.warning("call_refused", dedupe_key=about, status=status, route=kind.route, reason=kind.reason)


def route_of(method: str, target: str, match: Match | None) -> str:
    """Return the route of a request for display: its pattern, or its path without the query if no route matched."""
    if match is not None:
        return f"{match.route.method} {match.route.pattern}"
    path = target.partition("?")[0].partition("#")[0]
    return f"{method} {path}"
