"""Facts about one cluster of the rollout, from the status of its shims."""

from __future__ import annotations

from typing import Annotated

import click
import msgspec

from shim.core.text import format_duration, plural, shorten
from shim.management.objectives import state_of

TITLES = {
    "connection_success": "connection success",
    "reconnection": "reconnection",
    "heartbeat_success": "heartbeat success",
    "message_latency": "message latency",
}
WANTED = {
    "connection_success": "> 99 %",
    "reconnection": "95 % in 10 s",
    "heartbeat_success": "> 99.9 %",
    "message_latency": "95 % in 100 ms",
}


CLOCK_S = 120.0
"""Seconds by which a shim's clock may differ from the one here; a slow answer shows as a difference, too."""
NO_WAY_BACK = frozenset({"fallback_failing", "fallback_failed"})
"""Problems with which the vendor's HTTP API does not serve an agent."""


class Measured(msgspec.Struct, frozen=True):
    """Samples of one objective in one window; more than the share `target` of them must be good."""

    target: float
    good: float = 0
    samples: float = 0

    @property
    def share(self) -> float | None:
        """Share of good samples, `None` without samples."""
        return self.good / self.samples if self.samples else None

    @property
    def failures(self) -> int:
        """Number of samples that were not good."""
        return round(self.samples - self.good)

    @property
    def state(self) -> str:
        """The outcome, as in the status: `met`, `missed`, or `unknown` without samples."""
        return state_of(self.share, self.target)

    def plus(self, other: Measured | None) -> Measured:
        """Return the samples of both."""
        return self if other is None else Measured(self.target, self.good + other.good, self.samples + other.samples)


class Trouble(msgspec.Struct, frozen=True):
    """A problem that a shim reports, by its code in docs/how-to/diagnose.md#what-the-status-says."""

    code: str
    text: str
    lasts_s: float | None = None


class Cluster(msgspec.Struct, kw_only=True):
    """One row of the report. A value that could not be seen is `None` or empty; `gaps` has the reasons.

    `inside` and `outside` count the agents of the last 24 h by their place in the rollout. `since` is the Unix time of
    the last change of mode or rollout, `started` has the times at which the shims were started.
    """

    name: str
    gaps: list[str] = msgspec.field(default_factory=list)
    notes: list[str] = msgspec.field(default_factory=list)
    agent_pods: int | None = None
    sidecar_faults: list[str] | None = None
    shims: int = 0
    versions: list[str] = msgspec.field(default_factory=list)
    modes: list[str] = msgspec.field(default_factory=list)
    percent: float | None = None
    since: float | None = None
    started: list[float] = msgspec.field(default_factory=list)
    inside: int = 0
    outside: int = 0
    agents: int | None = None
    links: dict[str, int] = msgspec.field(default_factory=dict)
    troubles: list[Trouble] = msgspec.field(default_factory=list)
    objectives: dict[str, dict[str, Measured]] = msgspec.field(default_factory=dict)
    without_result: dict[str, dict[str, int]] = msgspec.field(default_factory=dict)
    still_used: list[str] = msgspec.field(default_factory=list)
    keep_reasons: list[str] | None = None
    sunset_days: float | None = None

    @property
    def seen(self) -> bool:
        """True if at least one shim answered."""
        return self.shims > 0

    @property
    def over(self) -> bool:
        """True after the configured end of the HTTP API: from then on the modes http and auto serve as websocket."""
        return self.sunset_days is not None and self.sunset_days <= 0

    @property
    def all_by_http(self) -> bool:
        """True if every shim sends all calls to the HTTP API."""
        return self.modes == ["http"] and not self.over

    @property
    def canary(self) -> str:
        """Return `in`, `out`, `part`, `http` (the mode of every shim), `empty` without agents, or `unknown`."""
        if not self.seen:
            return "unknown"
        if self.all_by_http:
            return "http"
        if self.inside and self.outside:
            return "part"
        return "in" if self.inside else "out" if self.outside else "empty"

    @property
    def on_websocket(self) -> bool:
        """True if agents of this cluster depend on the WebSocket API."""
        return self.canary in ("in", "part")

    @property
    def may_use_websocket(self) -> bool:
        """True also if no agent could register, so that its place is not known."""
        return self.on_websocket or (self.canary == "empty" and self.percent != 0)

    @property
    def http_fails(self) -> bool:
        """True if calls by the vendor's HTTP API are not served: there is no way back."""
        return self.over or any(each.code in NO_WAY_BACK for each in self.troubles)


# A status is another program's text: numbers are taken as far as they can be what they are called.
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Moment = Annotated[float, msgspec.Meta(ge=0, le=1e11)]
_Days = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]


class _Window(msgspec.Struct):
    good: _Count
    samples: _Count


class _Objective(msgspec.Struct):
    name: str
    target: Annotated[float, msgspec.Meta(ge=0, le=1)]
    windows: dict[str, _Window]


class _Codes(msgspec.Struct):
    codes: dict[str, _Count]


class _Commands(msgspec.Struct):
    without_result: dict[str, _Codes]


class _Place(msgspec.Struct):
    name: str


class _Agents(msgspec.Struct):
    total: _Count
    inside: _Count
    items: list[_Place]


class _Rollout(msgspec.Struct):
    percent: Annotated[float, msgspec.Meta(ge=0, le=100)]
    agents: _Agents
    since: _Moment | None = None


class _Problem(msgspec.Struct):
    code: str
    level: str
    text: str


class _Overall(msgspec.Struct):
    problems: list[_Problem]


class _Link(msgspec.Struct):
    phase: str
    since: _Moment | None = None


class _Links(msgspec.Struct):
    online: _Count
    items: list[_Link]


class _Sessions(msgspec.Struct):
    fresh: _Count
    by_http: dict[str, _Count]
    by_http_now: dict[str, _Count] | None = None


class _Route(msgspec.Struct):
    path: str
    agents: _Count
    last: _Moment
    method: str = ""


class _Sunset(msgspec.Struct):
    days_left: _Days | None = None


class _Migration(msgspec.Struct):
    routes: list[_Route]
    reasons: list[str]
    sunset: _Sunset


class Status(msgspec.Struct):
    """The part of `/status.json` that the report reads. A field that is missing there names an older shim."""

    now: _Moment
    version: str
    started_at: _Moment
    mode: str
    overall: _Overall
    links: _Links
    sessions: _Sessions
    migration: _Migration
    objectives: list[_Objective]
    rollout: _Rollout
    commands: _Commands


# msgspec builds what it knows of a type at its first use, and that is not safe in several threads at once: the process
# ended by a segmentation fault. A decoder builds it here, at the import, in one thread.
msgspec.json.Decoder(Status)


def read_status(answer: object) -> Status:
    """Return the status in a shim's answer. Raises click's error with the reason if it is none or an older one."""
    try:
        return msgspec.convert(answer, Status, strict=False)
    except msgspec.ValidationError as error:
        version = answer.get("version") if isinstance(answer, dict) else None
        if isinstance(version, str):
            raise click.ClickException(
                f"version {shorten(version)} is too old for this report ({error}): upgrade it"
            ) from None
        raise click.ClickException(f"the answer is no shim's status ({error})") from None


def add_status(cluster: Cluster, status: Status, now: float) -> None:
    """Add what one shim of a cluster reports. Several shims of a cluster are summed up; the latest change counts.

    A shim that answered already, at another address, is left out: its failures would count twice.
    `now` is the Unix time here: the times of a shim whose clock is wrong are corrected by the difference.
    """
    if status.started_at in cluster.started:
        return
    rollout, agents, sessions = status.rollout, status.rollout.agents, status.sessions
    ahead_s = status.now - now
    if abs(ahead_s) > CLOCK_S:
        place = "ahead of" if ahead_s > 0 else "behind"
        cluster.notes.append(f"its clock is {format_duration(abs(ahead_s))} {place} the one here")
    else:  # the answer's own time, or clocks that are well
        ahead_s = 0
    cluster.shims += 1
    cluster.versions = sorted({*cluster.versions, status.version})
    cluster.modes = sorted({*cluster.modes, status.mode})
    cluster.percent = rollout.percent if cluster.percent is None else min(rollout.percent, cluster.percent)
    cluster.since = max((rollout.since or status.started_at) - ahead_s, cluster.since or 0)
    cluster.started.append(status.started_at)
    # An agent that now calls the vendor itself was served by HTTP within the last day, too: `by_http` counts it.
    by_http = sessions.by_http if sessions.by_http_now is None else sessions.by_http_now
    cluster.agents = (cluster.agents or 0) + sessions.fresh + sum(by_http.values())
    cluster.inside += agents.inside
    cluster.outside += max(0, agents.total - agents.inside)
    _add_links(cluster, status)
    _add_counts(cluster, status)
    migration = status.migration
    cluster.still_used += [
        f"{route.method} {route.path} ({plural(route.agents, 'agent')}, {format_duration(status.now - route.last)} ago)"
        for route in migration.routes
    ]
    cluster.keep_reasons = [*(cluster.keep_reasons or []), *migration.reasons]
    if migration.sunset.days_left is not None:
        earlier = float("inf") if cluster.sunset_days is None else cluster.sunset_days
        cluster.sunset_days = min(migration.sunset.days_left, earlier)


def _add_counts(cluster: Cluster, status: Status) -> None:
    for window, ended in status.commands.without_result.items():
        counts = cluster.without_result.setdefault(window, {})
        for code, number in ended.codes.items():
            if number:
                counts[code] = counts.get(code, 0) + number
    for objective in status.objectives:
        for window, each in objective.windows.items():
            measured = cluster.objectives.setdefault(window, {})
            new = Measured(objective.target, each.good, each.samples)
            measured[objective.name] = new.plus(measured.get(objective.name))


def _add_links(cluster: Cluster, status: Status) -> None:
    down_s = [status.now - each.since for each in status.links.items if each.phase == "down" and each.since is not None]
    phases = [each.phase for each in status.links.items]
    counts = {phase: phases.count(phase) for phase in phases} | {"up": status.links.online}
    for phase, number in counts.items():
        cluster.links[phase] = cluster.links.get(phase, 0) + number
    for problem in status.overall.problems:
        lasts_s = max(down_s, default=None) if problem.code == "link_down" else None
        cluster.troubles.append(Trouble(problem.code, problem.text, lasts_s))
