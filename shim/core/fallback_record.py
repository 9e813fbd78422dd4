"""Statistics of calls to the vendor's HTTP API, for the status, doctor and the alerts. Times are Unix seconds.

Rules: docs/reference/protocol.md#4-modes.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum

from shim.core.recent_calls import RecentCalls
from shim.core.records import SessionKey

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


@dataclass(frozen=True, slots=True)
class FallbackCall:
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


@dataclass(slots=True)
class FallbackRecord:
    """Counts per outcome since the start, the newest calls, and each agent's newest call.

    `failures` is the number of failed calls in a row, and `failing_since_s` the time of the first of them (`None` while
    the newest call was served). `recent` has the calls of the last minute and `recent_failures` the failed ones among
    them.
    """

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    last: FallbackCall | None = None
    last_ok: FallbackCall | None = None
    last_failure: FallbackCall | None = None
    failures: int = 0
    failing_since_s: float | None = None
    by_agent: OrderedDict[SessionKey, FallbackCall] = field(default_factory=OrderedDict)
    recent: RecentCalls = field(default_factory=RecentCalls)
    recent_failures: RecentCalls = field(default_factory=RecentCalls)

    def add(self, call: FallbackCall, agent: SessionKey | None = None) -> None:
        """Record a finished call. `agent` is the caller's session if it is known."""
        self.counts[call.outcome] += 1
        self.last = call
        route = call.operation or "another call"
        self.recent.note(call.wall_s, call.status, route, "")
        if not call.ok:
            self.recent_failures.note(call.wall_s, call.status, route, call.reason)
        if call.ok:
            self.last_ok = call
            self.failures, self.failing_since_s = 0, None
        else:
            self.last_failure = call
            self.failures += 1
            if self.failing_since_s is None:
                self.failing_since_s = call.wall_s
        if agent is not None:
            self.by_agent[agent] = call
            self.by_agent.move_to_end(agent)
            if len(self.by_agent) > MAX_AGENTS:
                self.by_agent.popitem(last=False)
