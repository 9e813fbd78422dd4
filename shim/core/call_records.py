"""Records of calls for the status, doctor and the alerts, each with bounded memory.

The calls of the last minute, and the calls to the vendor's HTTP API (docs/reference/protocol.md#4-modes).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

import msgspec

from shim.core.agent_calls import (
    AgentCall,
    HealthCall,
    HeartbeatCall,
    PollCall,
    RegisterCall,
    ResultCall,
    StatusCall,
    TunnelInfoCall,
    TunnelPollCall,
)
from shim.core.bounds import cut
from shim.core.records import SessionKey
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
    """Number of calls of one kind within the last minute."""

    kind: CallKind
    calls: int


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
            CallCount(kind, sum(count for at, count in steps if now - at < WINDOW_S))
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
        for kind, calls in list(counts)[:limit]
    ]


UNREACHABLE = "unreachable"
OUTCOMES = ("1xx", "2xx", "3xx", "4xx", "5xx", UNREACHABLE)
MAX_AGENTS = 10_000


class Why(Enum):
    """Reasons for sending an agent's calls to the vendor's HTTP API."""

    MODE = "mode"
    ROLLOUT = "rollout"
    LINK_DOWN = "link_down"


_NORMAL = frozenset({(404, "tunnel_poll"), (404, "tunnel_info"), (404, ""), (409, "register")})
"""Statuses above 399 that are no failure: an API without tunnels, an unknown path, a cluster that exists already."""


class FallbackCall(msgspec.Struct, frozen=True):
    """One finished call. `status` is 0 if the API could not be reached, and `reason` is the cause.

    `name` is the name by which the rollout places the caller: its cluster's name, else its id.
    """

    wall_s: float
    operation: str
    status: int = 0
    reason: str = ""
    dialect: str = ""
    name: str = ""
    why: Why = Why.MODE

    @property
    def outcome(self) -> str:
        """The class of the response, one of `OUTCOMES`. A status that HTTP does not define counts as 5xx."""
        return f"{min(self.status // 100, 5)}xx" if self.status >= 100 else UNREACHABLE

    @property
    def ok(self) -> bool:
        """True if the API served the agent: 2xx, and the statuses that are no failure.

        A redirect serves nobody: an agent that follows it leaves its token behind, or turns its POST into a GET.
        """
        return 200 <= self.status < 300 or (self.status, self.operation) in _NORMAL


class FallbackRecord(msgspec.Struct):
    """The newest calls, those of the last minute, and each agent's newest call.

    `failing_since_s` is the time of the first of the failed calls in a row, `None` while the newest call was served.
    `recent` has the calls of the last minute and `recent_failures` the failed ones among them.
    """

    last: FallbackCall | None = None
    last_failure: FallbackCall | None = None
    failing_since_s: float | None = None
    by_agent: OrderedDict[SessionKey, FallbackCall] = msgspec.field(default_factory=OrderedDict)
    recent: RecentCalls = msgspec.field(default_factory=RecentCalls)
    recent_failures: RecentCalls = msgspec.field(default_factory=RecentCalls)

    def add(self, call: FallbackCall, agent: SessionKey | None = None) -> None:
        """Record a finished call. `agent` is the caller's session if it is known."""
        self.last = call
        route = call.operation or "another call"
        self.recent.note(call.wall_s, call.status, route, "")
        if call.ok:
            self.failing_since_s = None
        else:
            self.recent_failures.note(call.wall_s, call.status, route, call.reason)
            self.last_failure = call
            if self.failing_since_s is None:
                self.failing_since_s = call.wall_s
        if agent is not None:
            self.by_agent[agent] = call
            self.by_agent.move_to_end(agent)
            if len(self.by_agent) > MAX_AGENTS:
                self.by_agent.popitem(last=False)


Route = tuple[str, str]
"""(dialect, operation) as in `dialects`."""

_OPERATIONS: dict[type[AgentCall], str] = {
    RegisterCall: "register",
    HeartbeatCall: "heartbeat",
    StatusCall: "status",
    PollCall: "poll",
    ResultCall: "result",
    TunnelPollCall: "tunnel_poll",
    TunnelInfoCall: "tunnel_info",
    HealthCall: "health",
}
_DIALECTS: dict[type[AgentCall], str] = {
    TunnelPollCall: "common",
    TunnelInfoCall: "clusters_agent",
    HealthCall: "common",
}


def route_of(call: AgentCall) -> Route:
    """Return the route of a call. A call type without a dialect field has only one route."""
    kind = type(call)
    dialect: str = _DIALECTS[kind] if kind in _DIALECTS else getattr(call, "dialect", "")
    return dialect, _OPERATIONS[kind]
