"""Gauges that are read from the status at each scrape, so that they are always current."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric

from shim.core.call_records import Why
from shim.core.link_state import LinkState
from shim.core.poll_hold import PollPacing
from shim.management.health_summary import PROBLEMS
from shim.management.status import CommandsStatus, LinksStatus, SessionsStatus, Status


class StatusCollector:
    """`prometheus_client` collector of the gauges that follow from a status. `take` returns the present one."""

    def __init__(self, take: Callable[[], Status]) -> None:
        self._take = take

    def collect(self) -> Iterator[Metric]:
        """Yield all gauges."""
        status = self._take()
        yield _gauges("build_info", "1, with the version that runs.", "version", {status.version: 1})
        modes = {mode: mode == status.mode for mode in ("websocket", "http", "auto")}
        yield _gauges("mode", "1 for the configured mode, 0 for the others.", "mode", modes)
        yield _gauge(
            "sunset_timestamp_seconds",
            "Unix time of sunset.at, 0 without one: from then on no call goes by the vendor's HTTP API.",
            status.migration.sunset["at"] or 0,
        )
        found = {problem["code"] for problem in status.overall["problems"]}
        yield _gauges(
            "health_problem",
            "1 for each problem that the status shows now (docs/how-to/diagnose.md).",
            "problem",
            {code: code in found for code in PROBLEMS},
        )
        yield from _links(status.links)
        yield from _sessions(status.sessions)
        yield _gauge(
            "polls_held",
            "Polls held open now, those for tunnel states included.",
            status.commands.held_polls + status.commands.held_tunnels,
        )
        yield from _commands(status.commands)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"agent_shim_{name}", text, value=value)


def _gauges(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(f"agent_shim_{name}", text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


def _links(links: LinksStatus) -> Iterator[Metric]:
    states = {state.value: links.states.get(state.value, 0) for state in LinkState}
    yield _gauges("links", "Links to the controller, by state.", "state", states)
    yield _gauge("links_refused", "Links whose token the controller refuses.", links.refused)
    yield _gauge(
        "links_contended",
        "Links that the controller keeps closing for another process with the same identity.",
        links.contended,
    )


def _sessions(sessions: SessionsStatus) -> Iterator[Metric]:
    yield _gauges(
        "agents_by_http",
        "Agents whose calls went to the vendor's HTTP API within the last 2 minutes, by the reason.",
        "why",
        {why.value: sessions.by_http_now.get(why.value, 0) for why in Why},
    )
    family = GaugeMetricFamily(
        "agent_shim_sessions", "Known agents by dialect and freshness.", labels=["dialect", "fresh"]
    )
    for row in sessions.dialects:
        family.add_metric([row["dialect"], "true" if row["fresh"] else "false"], row["number"])
    yield family
    yield _gauges(
        "polling_sessions",
        "Fresh agents that poll for commands, by how they space their polls.",
        "pace",
        {pace.value: sessions.paces.get(pace.value, 0) for pace in PollPacing},
    )


def _commands(commands: CommandsStatus) -> Iterator[Metric]:
    yield _gauges(
        "commands_queued",
        "Commands that agents are not known to have received, by state.",
        "state",
        {
            "queued": commands.waiting - commands.uncertain,
            "offered": commands.offered,
            "uncertain": commands.uncertain,
        },
    )
    yield _gauge("queue_bytes", "JSON bytes of commands that agents are not known to have received.", commands.bytes)
    yield _gauge(
        "command_oldest_seconds",
        "Age of the oldest command that its agent is not known to have received, 0 without any.",
        commands.oldest_s,
    )
    yield _gauge("results_pending", "Results that the controller is not known to have received.", commands.results)
