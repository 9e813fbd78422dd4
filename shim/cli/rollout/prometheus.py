"""Clusters from one Prometheus that scrapes all shims (docs/reference/rollout.md#the-queries)."""

from __future__ import annotations

import json
import math
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.parse import unquote, urlencode, urlsplit, urlunsplit

import click
import msgspec

from shim.cli.rollout.cluster import Cluster, Measured, Trouble
from shim.core.text import plural, printable
from shim.hosts import is_loopback
from shim.management.objectives import CODES, OBJECTIVES
from shim.protocol.http import origin_of
from shim.redaction import basic_credentials

MAX_ANSWER_BYTES = 64 * 1_048_576
WINDOWS = {"1h": "1h", "24h": "1d"}
DAY_S = 86_400.0

_AGENT_PODS = 'kube_pod_container_info{container=~"agent|pipeops-agent", pod=~"(.+-)?pipeops-agent-.+"}'
QUERIES = {
    "seen": "max by (CLUSTER) (last_over_time(agent_shim_build_info[1d]))",
    "versions": "count by (CLUSTER, version) (agent_shim_build_info)",
    "unanswered": 'sum by (CLUSTER) (up{job=~".*agent-shim.*"} == bool 0) > 0',
    "modes": "max by (CLUSTER, mode) (agent_shim_mode) > 0",
    "sunset": "min by (CLUSTER) (agent_shim_sunset_timestamp_seconds > 0)",
    "percent": "min by (CLUSTER) (agent_shim_rollout_percent)",
    "since": "max by (CLUSTER) (agent_shim_rollout_changed_timestamp_seconds)",
    # No change in 24 h, whatever was restarted meanwhile: one percentage, no mode http, and a sample from before.
    "unchanged": (
        "(min by (CLUSTER) (min_over_time(agent_shim_rollout_percent[1d])) "
        "== max by (CLUSTER) (max_over_time(agent_shim_rollout_percent[1d]))) "
        'and on (CLUSTER) (max by (CLUSTER) (max_over_time(agent_shim_mode{mode="http"}[1d])) == 0) '
        "and on (CLUSTER) max by (CLUSTER) (agent_shim_rollout_percent offset 1d)"
    ),
    "fresh": 'sum by (CLUSTER) (agent_shim_sessions{fresh="true"})',
    "by_http": "sum by (CLUSTER, why) (agent_shim_agents_by_http)",
    "links": "sum by (CLUSTER, state) (agent_shim_links)",
    "refused": "sum by (CLUSTER) (agent_shim_links_refused)",
    "problems": "max by (CLUSTER, problem) (agent_shim_health_problem) > 0",
    "down_2m": 'max by (CLUSTER) (min_over_time(agent_shim_health_problem{problem="link_down"}[2m])) > 0',
    "routes": "sum by (CLUSTER, route) (increase(agent_shim_deprecated_calls_total[1d])) > 0",
    "commands": "sum by (CLUSTER) (agent_shim_commands_queued)",
    "results": "sum by (CLUSTER) (agent_shim_results_pending)",
    "agent_pods": f"count by (CLUSTER) ({_AGENT_PODS})",
    # As the rule agent_shim:agent_pods_without_sidecar, which need not be loaded for it.
    "no_sidecar": (
        f"max by (CLUSTER, namespace, pod) ({_AGENT_PODS}) "
        'unless on (CLUSTER, namespace, pod) kube_pod_init_container_info{container="agent-shim"} '
        'unless on (CLUSTER, namespace, pod) kube_pod_labels{label_agent_shim_inject="disabled"} '
        'and on (CLUSTER, namespace, pod) (kube_pod_status_phase{phase=~"Pending|Running"} == 1)'
    ),
}
WINDOW_QUERIES = {
    "connection_success good": 'increase(agent_shim_connection_attempts_total{outcome="ok"}[WINDOW])',
    "connection_success all": 'increase(agent_shim_connection_attempts_total{outcome=~"ok|failed"}[WINDOW])',
    "reconnection good": 'increase(agent_shim_upstream_reconnect_after_return_seconds_bucket{le="10.0"}[WINDOW])',
    "reconnection all": "increase(agent_shim_upstream_reconnect_after_return_seconds_count[WINDOW])",
    "heartbeat_success good": 'increase(agent_shim_agent_heartbeats_total{outcome=~"acked|written"}[WINDOW])',
    "heartbeat_success all": "increase(agent_shim_agent_heartbeats_total[WINDOW])",
    "message_latency good": 'increase(agent_shim_message_latency_seconds_bucket{le="0.1"}[WINDOW])',
    "message_latency all": "increase(agent_shim_message_latency_seconds_count[WINDOW])",
}
WITHOUT_RESULT = (
    'sum by (CLUSTER, event) (increase(agent_shim_commands_total{event=~"dead|expired|rejected_.*"}[WINDOW]))'
)

_LINK_PHASES = {"online": "up", "idle": "idle", "opening": "down", "replaying": "down", "waiting": "down"}


class Sample(msgspec.Struct, frozen=True):
    """One sample of an instant query."""

    labels: dict[str, str]
    value: float


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Handler that follows no redirect: urllib would send the token along to the other host."""

    def redirect_request(self, *_: object) -> None:
        """Follow no redirect: the token must not be sent to another host."""


class Prometheus:
    """Client of one Prometheus' query API. `warnings` collects what it says about incomplete answers."""

    def __init__(self, url: str, token: str, label: str, timeout_s: float) -> None:
        """Create a client. User and password in the URL are sent as basic authentication."""
        parts = urlsplit(url)
        host = (parts.hostname or "") if ":" not in (parts.hostname or "") else f"[{parts.hostname}]"
        netloc = host + (f":{parts.port}" if parts.port else "")
        self.address = urlunsplit((parts.scheme, netloc, parts.path.rstrip("/"), "", ""))
        self.warnings: set[str] = set()
        self.label = label
        self._timeout_s = timeout_s
        self._at: dict[str, str] = {}  # the parameter of queries that names their time
        # As for the shim's own connections, loopback is never proxied by the environment; urllib would do so.
        proxies = {} if is_loopback(host) else urllib.request.getproxies()
        # With the port, as urllib asks: NO_PROXY may name one. A proxy's scheme may be left out.
        proxy = "" if urllib.request.proxy_bypass(netloc) else proxies.get(parts.scheme, "")
        origin = origin_of(proxy if "://" in proxy else f"http://{proxy}")
        through = f" (through {origin}, the proxy of the environment)" if proxy else ""
        self._shown = self.address + through
        self._opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler(proxies))
        self._headers = {"Accept": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        elif parts.username is not None:
            login = basic_credentials(unquote(parts.username), unquote(parts.password or ""))
            self._headers["Authorization"] = f"Basic {login}"

    def fix_time(self) -> None:
        """Let all queries from now on be evaluated at the same time, which is the present one of Prometheus' own clock.

        A growth is extrapolated to the time of its query. If the good ones were asked for a second before all, one in
        an hour's thousand would be missing. Raises click's error as `query` does.
        """
        for sample in self.query("vector(time())"):
            self._at = {"time": f"{sample.value:.3f}"}

    def query(self, expression: str) -> list[Sample]:
        """Return the samples of an instant query, in which `CLUSTER` stands for the label.

        Raises click's error, without secrets, if Prometheus does not answer, or answers something else.
        """
        text = expression.replace("CLUSTER", self.label)
        request = urllib.request.Request(  # noqa: S310 - the option is checked for http and https
            f"{self.address}/api/v1/query",
            urlencode({"query": text, **self._at}).encode(),
            self._headers,
            method="POST",
        )
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                data = response.read(MAX_ANSWER_BYTES)
        except HTTPError as error:
            with error:
                reason = _error(error.read(MAX_ANSWER_BYTES)) or "not what a Prometheus answers"
            raise click.ClickException(f"{self._shown} answers {error.code}: {reason}") from None
        except (OSError, HTTPException) as error:
            cause = getattr(error, "reason", None) or error
            why = getattr(cause, "strerror", "") or str(cause) or type(error).__name__
            raise click.ClickException(f"{self._shown} does not answer: {why}") from None
        return list(self._samples(data))

    def clusters_by(self, expression: str) -> dict[str, list[Sample]]:
        """Return the samples of a query by the value of the label, `""` for those without it."""
        found: dict[str, list[Sample]] = {}
        for sample in self.query(expression):
            found.setdefault(sample.labels.get(self.label, ""), []).append(sample)
        return found

    def _samples(self, data: bytes) -> Iterator[Sample]:
        try:
            answer = json.loads(data)
            self.warnings |= {printable(str(each)) for each in answer.get("warnings") or ()}
            for each in answer["data"]["result"]:
                value = float(each["value"][1])
                if math.isfinite(value):
                    yield Sample({str(key): str(text) for key, text in each["metric"].items()}, value)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise click.ClickException(f"{self._shown} answers something else than Prometheus' query API") from None


def _error(data: bytes) -> str:
    try:
        return printable(str(json.loads(data)["error"]))[:300]
    except (ValueError, KeyError, TypeError):
        return ""


def clusters(prometheus: Prometheus, now: float) -> list[Cluster]:
    """Return a row for each cluster of which Prometheus has series. Raises click's error."""
    prometheus.fix_time()
    answers = {name: prometheus.clusters_by(query) for name, query in QUERIES.items()}
    rows = {name: Cluster(name=name) for name in sorted(answers["seen"].keys() | answers["agent_pods"].keys())}
    for name, row in rows.items():
        _fill(row, {query: found.get(name, []) for query, found in answers.items()}, now)
    for window, length in WINDOWS.items():
        _measure(rows, prometheus, window, length)
    nameless = rows.get("")
    if nameless is not None:
        nameless.name = f"(no label {prometheus.label})"
        nameless.gaps.append("these series name no cluster: give the label that does with --cluster-label")
    return list(rows.values())


_Answers = dict[str, list[Sample]]
"""Samples of one cluster by query."""


def _one(samples: list[Sample]) -> float | None:
    """Return the only value of a query, `None` without one."""
    return samples[0].value if samples else None


def _total(samples: list[Sample]) -> int:
    """Return the value of a query as a count, 0 without one."""
    return round(_one(samples) or 0)


def _by(samples: list[Sample], label: str) -> dict[str, float]:
    """Return the values of a query by a label."""
    return {sample.labels.get(label, ""): sample.value for sample in samples}


def _fill(row: Cluster, answers: _Answers, now: float) -> None:
    versions = _by(answers["versions"], "version")
    row.shims = round(sum(versions.values()))
    row.versions = sorted(versions)
    unanswered = _total(answers["unanswered"])
    if unanswered:
        row.gaps.append(f"{plural(unanswered, 'shim')} did not answer the last scrape")
    if answers["agent_pods"]:
        row.agent_pods = _total(answers["agent_pods"])
        pods = [sample.labels.get("pod", "") for sample in answers["no_sidecar"]]
        row.sidecar_faults = [f"{pod} has no sidecar" for pod in pods]
    if not row.shims:
        known = "was seen in the last 24 h, and is not now" if answers["seen"] else "is not scraped"
        row.gaps.append(f"its shim {known}")
        return
    row.modes = sorted(_by(answers["modes"], "mode"))
    sunset_unix = _one(answers["sunset"])
    row.sunset_days = None if sunset_unix is None else (sunset_unix - now) / DAY_S
    row.percent, row.since = _one(answers["percent"]), _one(answers["since"])
    if row.percent is None:
        row.gaps.append(f"version {', '.join(row.versions)} is too old for this report: upgrade it")
    if answers["unchanged"]:
        row.since = min(row.since or now, now - DAY_S)
    _fill_agents(row, answers)
    down_2m = bool(answers["down_2m"])
    row.troubles = [
        Trouble(code, f"problem {code}", 120.0 if down_2m and code == "link_down" else None)
        for code in sorted(_by(answers["problems"], "problem"))
    ]


def _fill_agents(row: Cluster, answers: _Answers) -> None:
    by_http = _by(answers["by_http"], "why")
    fresh = _total(answers["fresh"])
    row.agents = fresh + round(sum(by_http.values()))
    row.outside = round(by_http.get("rollout", 0))
    row.inside = 0 if row.all_by_http else fresh + round(by_http.get("link_down", 0))
    for state, number in _by(answers["links"], "state").items():
        phase = _LINK_PHASES.get(state)
        if phase is not None and number:
            row.links[phase] = row.links.get(phase, 0) + round(number)
    refused = _total(answers["refused"])
    if refused:
        row.links["refused"] = refused
    row.still_used = sorted(_by(answers["routes"], "route"))
    commands, results = _total(answers["commands"]), _total(answers["results"])
    row.keep_reasons = [f"{plural(len(row.still_used), 'route')} called in the last 24 h"] if row.still_used else []
    row.keep_reasons += [f"{plural(commands, 'command')} not fetched"] if commands else []
    row.keep_reasons += [f"{plural(results, 'result')} not confirmed"] if results else []
    if not answers["unchanged"] and not row.keep_reasons:
        row.keep_reasons = ["not observed for 24 h yet"]


def _measure(rows: dict[str, Cluster], prometheus: Prometheus, window: str, length: str) -> None:
    """Add the objectives and the commands without result in one window to all rows."""
    counts: dict[str, dict[str, float]] = {}
    for name, query in WINDOW_QUERIES.items():
        found = prometheus.clusters_by(f"sum by (CLUSTER) ({query.replace('WINDOW', length)})")
        counts[name] = {cluster: samples[0].value for cluster, samples in found.items()}
    ended = prometheus.clusters_by(WITHOUT_RESULT.replace("WINDOW", length))
    for name, row in rows.items():
        row.objectives[window] = {
            each.name: Measured(
                each.target, counts[f"{each.name} good"].get(name, 0), counts[f"{each.name} all"].get(name, 0)
            )
            for each in OBJECTIVES
        }
        # A growth is extrapolated to the window's ends, and need not be a whole number.
        row.without_result[window] = {
            CODES.get(sample.labels.get("event", ""), "other"): max(1, round(sample.value))
            for sample in ended.get(name, [])
            if sample.value > 0
        }
