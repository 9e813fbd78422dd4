"""The status of a shim as data (docs/reference/status.md).

The page, `/status.json`, `agent-shim status`, doctor, the gauges and the health summary follow this structure. It has
no payloads and no secrets, and its lists are bounded. Times called `now`, `…_at`, `since` and `last` are Unix seconds,
`None` if it never happened; `…_s` are seconds. Rows of lists are JSON objects.
"""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType, field

Row = dict[str, Any]


class Rows(Struct, kw_only=True):
    """A list that is cut: `total` counts all rows."""

    total: int
    items: list[Row]


class StoreStatus(Struct, kw_only=True):
    """The write-ahead log of the store. It is pinned while another program keeps it from being emptied.

    `replaced` is true if the database was damaged at the start of this process, and an empty one took its place.
    """

    log_bytes: int
    log_pinned: bool
    replaced: bool = False


class LogStatus(Struct, kw_only=True):
    """Log lines that could not be written: those of the last hour, and all since the start."""

    lost: int
    lost_total: int = 0
    last: float | None = None


class DrainStatus(Struct, kw_only=True):
    """The progress of a drain: what is left, and the commands refused since it began."""

    state: str
    since: float | None = None
    deadline_at: float | None = None
    commands: int
    results: int
    refused: int = 0


class LinksStatus(Struct, kw_only=True):
    """Links to the controller. `states` counts them by state; `refused` and `contended` count links in that trouble."""

    total: int
    online: int
    states: dict[str, int] = field(default_factory=dict)
    refused: int = 0
    contended: int = 0
    items: list[Row]


class ControllerStatus(Struct, kw_only=True):
    """Living agents that the controller rejects, does not know or does not acknowledge."""

    registrations: Rows
    troubles: Rows
    unacknowledged: Rows


class RefusedCalls(Struct, kw_only=True):
    """Agents' calls that the shim refused in the last minute, by status, route and reason."""

    calls: int
    kinds: list[Row]


class FallbackStatus(Struct, kw_only=True):
    """Calls to the vendor's HTTP API in the last minute. `used` is true if calls may be sent there now."""

    used: bool
    calls: int
    failed: int
    failures: list[Row]
    failing_since: float | None
    last: Row | None
    last_failure: Row | None


class WebSocketAgentsStatus(Struct, kw_only=True):
    """Agents that connect by WebSocket themselves and need no shim."""

    total: int
    connected: int = 0
    items: list[Row]


class SessionsStatus(Struct, kw_only=True):
    """Known agents.

    `by_http` counts those whose newest call, within a day, was sent to the vendor's HTTP API, by the reason;
    `by_http_now` those within the last two minutes. `dialects` counts the known sessions by dialect and freshness, and
    `paces` the fresh ones that poll by how they space their polls.
    """

    total: int
    fresh: int
    silent: int
    not_polling: int
    by_http: dict[str, int]
    by_http_now: dict[str, int] = field(default_factory=dict)
    dialects: list[Row] = field(default_factory=list)
    paces: dict[str, int] = field(default_factory=dict)
    items: list[Row]


class CommandsStatus(Struct, kw_only=True):
    """Commands that their agent is not known to have, and results that the controller is not known to have.

    `waiting` counts queued and uncertain commands. `oldest_s` is the age of the oldest command, 0 without any.
    """

    waiting: int = 0
    offered: int = 0
    uncertain: int
    bytes: int = 0
    oldest_s: float = 0.0
    results: int = 0
    held_polls: int = 0
    held_tunnels: int = 0
    items: list[Row] = field(default_factory=list)
    latency: Row = field(default_factory=dict)
    without_result: Row = field(default_factory=dict)
    recent: list[Row] = field(default_factory=list)


class MigrationStatus(Struct, kw_only=True):
    """Use of the deprecated routes, and the reasons why the shim cannot be removed."""

    sunset: Row
    counted_since: float
    routes: list[Row]
    agents: Rows
    removable: bool
    reasons: list[str]

    @property
    def over(self) -> bool:
        """True after the configured end of the legacy API: from then on nothing goes by HTTP, whatever the mode is."""
        days = self.sunset.get("days_left")
        return days is not None and days <= 0


class Status(Struct, kw_only=True):
    """All that a running shim shows. `overall` is the health summary of the rest."""

    overall: Row = field(default_factory=dict)
    now: float
    version: str
    started_at: float
    uptime_s: float
    mode: str
    rollout_percent: float
    rollout_lists: bool
    by_http: bool
    upstream: str
    fallback: str | None
    listen: str | None
    agents_url: str | None
    own_tokens: bool
    token_required: bool
    config_valid: bool
    store: StoreStatus
    log: LogStatus
    not_ready: list[str]
    objectives: list[Row]
    rollout: Row
    drain: DrainStatus
    links: LinksStatus
    controller: ControllerStatus
    refused: RefusedCalls
    fallback_calls: FallbackStatus
    websocket_agents: WebSocketAgentsStatus
    unregistered: Rows
    sessions: SessionsStatus
    commands: CommandsStatus
    migration: MigrationStatus
    events: list[Row]
    replicas: Row | UnsetType = UNSET
    series: dict[str, list[Any]] | UnsetType = UNSET

    @property
    def all_by_http(self) -> bool:
        """True if all calls go to the vendor's HTTP API, so that no link is needed."""
        return self.mode == "http" and not self.migration.over
