"""Gauges that are read from the bridge at each scrape, so that they are always current."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from shim import __version__
from shim.core.call_records import Why
from shim.core.link_state import LinkState
from shim.core.poll_hold import PollPacing
from shim.management.call_status import RECENT_S, http_agent
from shim.management.health_messages import PROBLEMS
from shim.management.subject import Subject


class BridgeCollector:
    """`prometheus_client` collector of one bridge. `problems` returns the codes of the health summary."""

    def __init__(self, bridge: Subject, problems: Callable[[], Iterable[str]]) -> None:
        self._bridge = bridge
        self._problems = problems

    def collect(self) -> Iterator[Metric]:
        """Yield all gauges."""
        yield from self._build()
        yield from self._health()
        yield from self._links()
        yield from self._sessions()
        yield from self._queues()

    def _build(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("agent_shim_build_info", "1, with the version that runs.", labels=["version"])
        family.add_metric([__version__], 1)
        yield family
        family = GaugeMetricFamily("agent_shim_mode", "1 for the configured mode.", labels=["mode"])
        for mode in ("websocket", "http", "auto"):
            family.add_metric([mode], mode == self._bridge.ctx.settings.mode)
        yield family

    def _health(self) -> Iterator[Metric]:
        found = set(self._problems())
        family = GaugeMetricFamily(
            "agent_shim_health_problem",
            "1 for each problem that the status shows now (docs/how-to/diagnose.md).",
            labels=["problem"],
        )
        for code in PROBLEMS:
            family.add_metric([code], code in found)
        yield family
        now, wall = self._bridge.ctx.now, self._bridge.ctx.clock.wall_s()
        record = self._bridge.ctx.fallback
        why: Counter[str] = Counter()
        for key in record.by_agent:
            session = self._bridge.sessions.get(key)
            contact_at = session.contact_at if session is not None else None
            call = http_agent(record, key, None if contact_at is None else wall - (now - contact_at), wall)
            if call is not None and wall - call.wall_s < RECENT_S:
                why[call.why.value] += 1
        family = GaugeMetricFamily(
            "agent_shim_agents_by_http",
            "Agents whose calls went to the vendor's HTTP API within the last 2 minutes, by the reason.",
            labels=["why"],
        )
        for each in Why:
            family.add_metric([each.value], why[each.value])
        yield family

    def _links(self) -> Iterator[Metric]:
        states = Counter(link.state for link in self._bridge.links)
        family = GaugeMetricFamily("agent_shim_links", "Upstream links by state.", labels=["state"])
        for state in LinkState:
            family.add_metric([state.value], states[state])
        yield family
        refused = sum(link.machine.refused for link in self._bridge.links)
        yield GaugeMetricFamily("agent_shim_links_refused", "Links whose token the controller refuses.", value=refused)
        contended = sum(link.machine.contended for link in self._bridge.links)
        yield GaugeMetricFamily(
            "agent_shim_links_contended", "Links that another process with our identity keeps closing.", value=contended
        )

    def _sessions(self) -> Iterator[Metric]:
        now = self._bridge.ctx.now
        counts = Counter((s.dialect, s.fresh(now)) for s in self._bridge.sessions)
        family = GaugeMetricFamily(
            "agent_shim_sessions", "Known agents by dialect and freshness.", labels=["dialect", "fresh"]
        )
        for (dialect, fresh), number in sorted(counts.items()):
            family.add_metric([dialect, "true" if fresh else "false"], number)
        yield family
        paces = Counter(s.hold.pace for s in self._bridge.sessions if s.fresh(now) and s.poll_at is not None)
        family = GaugeMetricFamily(
            "agent_shim_polling_sessions",
            "Fresh agents that poll for commands, by how they space their polls.",
            labels=["pace"],
        )
        for pace in PollPacing:
            family.add_metric([pace.value], paces[pace])
        yield family
        held = self._bridge.delivery.held() + self._bridge.long_polls.held_tunnels()
        yield GaugeMetricFamily(
            "agent_shim_polls_held", "Polls held open now, those for tunnel states too.", value=held
        )

    def _queues(self) -> Iterator[Metric]:
        states: Counter[str] = Counter()
        size_bytes = 0
        now = oldest = self._bridge.ctx.clock.wall_s()
        for queue in self._bridge.queues.values():
            size_bytes += queue.size_bytes
            for live in queue.all():
                states[live.state.value] += 1
                oldest = min(oldest, live.record.arrived_unix)
        family = GaugeMetricFamily(
            "agent_shim_commands_queued", "Commands that agents are not known to have, by state.", labels=["state"]
        )
        for state in ("queued", "offered", "uncertain"):
            family.add_metric([state], states[state])
        yield family
        yield GaugeMetricFamily("agent_shim_queue_bytes", "JSON bytes of those commands.", value=size_bytes)
        yield GaugeMetricFamily(
            "agent_shim_command_oldest_seconds", "Age of the oldest of those commands.", value=now - oldest
        )
        yield GaugeMetricFamily(
            "agent_shim_results_pending",
            "Results that the controller is not known to have.",
            value=len(self._bridge.outbox),
        )
