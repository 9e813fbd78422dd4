"""Counter of the calls of the last minute by status, route and reason, with bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from shim.core.bounds import cut
from shim.core.text import printable

WINDOW_S = 60.0
STEP_S = 5.0
MAX_KINDS = 32
MAX_ROUTE_CHARS = 80
MAX_REASON_CHARS = 120
OTHER_ROUTES = "other routes"


class CallKind(NamedTuple):
    """Calls that are counted together. `status` is 0 if there was no reply."""

    status: int
    route: str
    reason: str


class CallCount(NamedTuple):
    """Number of calls of one kind within the last minute. `last_at` is the monotonic time of the newest."""

    kind: CallKind
    calls: int
    last_at: float


class RecentCalls:
    """Counts per kind for `WINDOW_S`. All times are monotonic seconds.

    Kinds beyond `max_kinds` are counted together as `OTHER_ROUTES` of their status. Paths and reasons come from outside
    and must not determine the memory that is used.
    """

    def __init__(self, max_kinds: int = MAX_KINDS) -> None:
        self._max_kinds = max_kinds
        self._steps: dict[CallKind, deque[tuple[float, int]]] = {}
        self._last_at: dict[CallKind, float] = {}

    def note(self, now: float, status: int, route: str, reason: str) -> CallKind:
        """Count one call, and return the kind under which it was counted."""
        kind = CallKind(status, bounded(route, MAX_ROUTE_CHARS), bounded(reason, MAX_REASON_CHARS))
        if kind not in self._steps:
            self._drop_old(now)
            if len(self._steps) >= self._max_kinds:
                kind = CallKind(status, OTHER_ROUTES, "")
        steps = self._steps.setdefault(kind, deque())
        if steps and now - steps[-1][0] < STEP_S:
            steps[-1] = (steps[-1][0], steps[-1][1] + 1)
        else:
            steps.append((now, 1))
            while now - steps[0][0] >= WINDOW_S:
                steps.popleft()
        self._last_at[kind] = now
        return kind

    def last_minute(self, now: float) -> list[CallCount]:
        """Return the kinds of the last minute, the most frequent first."""
        self._drop_old(now)
        found = [
            CallCount(kind, sum(count for at, count in steps if now - at < WINDOW_S), self._last_at[kind])
            for kind, steps in self._steps.items()
        ]
        return sorted((each for each in found if each.calls), key=lambda each: (-each.calls, each.kind))

    def _drop_old(self, now: float) -> None:
        for kind in [kind for kind, at in self._last_at.items() if now - at >= WINDOW_S]:
            del self._steps[kind], self._last_at[kind]


def bounded(text: str, chars: int) -> str:
    """Return a text from outside, printable and cut to `chars` characters."""
    return cut(printable(text[: chars + 1]), chars)


def rows(counts: Iterable[CallCount], limit: int) -> list[dict[str, object]]:
    """Return the first `limit` counts in the form used in the status."""
    return [
        {"status": kind.status or None, "route": kind.route, "reason": kind.reason or None, "calls": calls}
        for kind, calls, _ in list(counts)[:limit]
    ]
