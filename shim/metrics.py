"""All metrics of one shim, in one registry that is passed down: two shims in one process share nothing.

docs/reference/metrics.md defines each metric. Every label has a bounded set of values.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import accumulate, product
from typing import Generic, TypeVar

import msgspec
from msgspec.structs import replace
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from shim.core.backoff import FAILURES, DialOutcome
from shim.core.call_records import OUTCOMES
from shim.core.liveness import LivenessState
from shim.core.standing import HeartbeatOutcome
from shim.protocol.controller_replies import REFUSED_TYPES
from shim.protocol.dialects import Match, Route
from shim.protocol.upstream_message import KNOWN_TYPES

OPEN = None  # label values that come from routes, dialects or HTTP
OTHER = "other"
MAX_CHILDREN = 1024

Values = Collection[str] | None
"""Values of a label, `None` if they are not known in advance. `MAX_CHILDREN` bounds their number then."""

# Register may take 25 s, a held poll 20 s, everything else well under 10 ms.
REQUEST_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30)
LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
RECONNECT_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)

ENDINGS = ("closed", "lost", LivenessState.HALF_OPEN.value, LivenessState.STALLED.value)
COMMAND_EVENTS = (
    *("queued", "duplicate", "offered", "redelivered", "requeued", "uncertain", "delivered", "closed"),
    *(
        "redelivered_by_hand",
        "expired",
        "dead",
        "rejected_malformed",
        "rejected_queue_full",
        "rejected_store_unavailable",
    ),
    *("rejected_unknown_agent", "rejected_ambiguous_target"),
)
REGISTRATION_OUTCOMES = ("ok", "cached", "timeout", "400", "401", "409", "502")
BAD_REQUEST_REASONS = (
    *("guard", "route", "auth", "in_flight", "body", "call", "answer"),
    *("connections", "head", "http", "memory"),
)


_Metric = TypeVar("_Metric", Counter, Histogram)
FORWARD_OUTCOMES = ("answered", "no_owner", "lost")
RELEASE_REASONS = ("given", "expired", "taken", "failed")


class Labelled(Generic[_Metric]):
    """A metric's children by label values. A value that the label does not have counts as `other`.

    If all label values are known, all children exist from the start. Prometheus does not see the first increment of a
    series that did not exist before. Keep the child of a frequent event: looking it up costs as much as counting.
    """

    def __init__(self, metric: _Metric, values_of: Mapping[str, Values]) -> None:
        self.metric: _Metric = metric
        self.values_of = values_of
        self._children: dict[tuple[str, ...], _Metric] = {}
        closed = [each for each in values_of.values() if each is not None]
        if len(closed) == len(values_of):
            for known in product(*closed):
                self.labels(*known)

    def labels(self, *values: str) -> _Metric:
        """Return the child with these label values, which is created on first use."""
        child = self._children.get(values)
        if child is not None:
            return child
        if len(self._children) >= MAX_CHILDREN:
            return self.metric.labels(*(OTHER,) * len(values))
        allowed = self.values_of.values()
        bounded = [v if known is None or v in known else OTHER for v, known in zip(values, allowed, strict=True)]
        child = self._children[values] = self.metric.labels(*bounded)
        return child

    def collect(self) -> Iterable[Metric]:
        """Return the metric with all children, as the registry collects it."""
        return self.metric.collect()


LabelledCounter = Labelled[Counter]
LabelledHistogram = Labelled[Histogram]


class RequestCount(msgspec.Struct):
    """Replies to one route with one status: the number in each of `REQUEST_BUCKETS_S`, and their whole duration.

    `route` is the method and pattern of a deprecated route, empty for any other.
    """

    dialect: str
    operation: str
    status: str
    route: str
    buckets: list[int]
    total_s: float = 0.0

    @property
    def number(self) -> int:
        """The number of replies."""
        return sum(self.buckets)


class RequestCounts(Collector):
    """Counts of answered requests; three metrics are built from them at each scrape.

    Three metrics of `prometheus_client` would take four locks for every request.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._counts: dict[tuple[Route | None, int], RequestCount] = {}
        registry.register(self)

    def count(self, match: Match | None, status: int, took_s: float) -> None:
        """Count one answered request; `match` is None if no route matched."""
        key = (None if match is None else match.route, status)
        count = self._counts.get(key)
        if count is None:
            count = self._add(key, match)
        count.buckets[bisect_left(REQUEST_BUCKETS_S, took_s)] += 1
        count.total_s += took_s

    def _add(self, key: tuple[Route | None, int], match: Match | None) -> RequestCount:
        names = ("", "", "")
        status = str(key[1])
        if match is not None:
            route = "" if match.route.open else f"{match.route.method} {match.route.pattern}"
            names = (match.dialect.NAME, match.route.operation, route)
        if len(self._counts) >= MAX_CHILDREN:
            key, names, status = (None, 0), (OTHER, OTHER, OTHER), OTHER
        dialect, operation, route = names
        buckets = [0] * (len(REQUEST_BUCKETS_S) + 1)
        return self._counts.setdefault(key, RequestCount(dialect, operation, status, route, buckets))

    def sums(self, *names: str) -> dict[tuple[str, ...], RequestCount]:
        """Return the sums of the counts that agree in the named attributes, by their values."""
        found: dict[tuple[str, ...], RequestCount] = {}
        for each in self._counts.values():
            of = tuple(getattr(each, name) for name in names)
            former = found.get(of)
            if former is None:
                found[of] = each
            else:
                buckets = [one + other for one, other in zip(former.buckets, each.buckets, strict=True)]
                found[of] = replace(each, buckets=buckets, total_s=former.total_s + each.total_s)
        return found

    def collect(self) -> Iterator[Metric]:
        """Yield the three metrics."""
        requests = CounterMetricFamily(
            "agent_shim_requests",
            "Replies to agents' requests by dialect, operation and HTTP status. Labels are empty if no route matched.",
            labels=("dialect", "operation", "status"),
        )
        durations = HistogramMetricFamily(
            "agent_shim_request_duration_seconds",
            "Time from a request's first byte to its reply's last byte, including the time for which a poll was held.",
            labels=("dialect", "operation"),
        )
        deprecated = CounterMetricFamily(
            "agent_shim_deprecated_calls",
            "Requests to routes that the vendor removes, by dialect and route, whatever the reply was.",
            labels=("dialect", "route"),
        )
        for names, count in self.sums("dialect", "operation", "status").items():
            requests.add_metric(names, count.number)
        bounds = [*(str(float(bound)) for bound in REQUEST_BUCKETS_S), "+Inf"]
        for names, count in self.sums("dialect", "operation").items():
            durations.add_metric(names, list(zip(bounds, accumulate(count.buckets), strict=True)), count.total_s)
        for names, count in self.sums("dialect", "route").items():
            if count.route:
                deprecated.add_metric(names, count.number)
        yield from (requests, durations, deprecated)


class Registry(CollectorRegistry):
    """Registry without the `_created` series, which would double the number of counter series."""

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        for metric in super().collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class Metrics:
    """All metrics as attributes. Their names start with `agent_shim_`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._add_requests()
        self._add_agents()
        self._add_other_transports()
        self._add_process()
        self._add_link()
        self._add_messages()
        self._add_registrations_and_heartbeats()
        self._add_commands()

    # --- construction -------------------------------------------------------------------------------------------------

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"agent_shim_{name}", text, registry=self.registry)

    def _counters(self, name: str, text: str, **labels: Values) -> LabelledCounter:
        return Labelled(Counter(f"agent_shim_{name}", text, list(labels), registry=self.registry), labels)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"agent_shim_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"agent_shim_{name}", text, buckets=buckets, registry=self.registry)

    def _histograms(self, name: str, text: str, buckets: tuple[float, ...], **labels: Values) -> LabelledHistogram:
        metric = Histogram(f"agent_shim_{name}", text, list(labels), buckets=buckets, registry=self.registry)
        return Labelled(metric, labels)

    # --- the metrics --------------------------------------------------------------------------------------------------

    def _add_requests(self) -> None:
        self.requests = RequestCounts(self.registry)
        self.bad_requests = self._counters(
            "bad_requests",
            "Requests refused before they reached the bridge, by the step that refused them.",
            reason=BAD_REQUEST_REASONS,
        )
        self.replies_lost = self._counter(
            "replies_lost", "Replies that could not be written: the agent had closed the connection or did not read."
        )
        self.connections = self._gauge("connections", "Open TCP connections of agents.")
        self.hold_seconds = self._histograms(
            "poll_hold_seconds",
            "Time for which polls were held, by what ended it: the shim's reply, or the agent that left.",
            (0.1, 0.5, 1, 2, 5, 10, 15, 20, 30),
            ended=("replied", "left"),
        )

    def _add_agents(self) -> None:
        self.sessions_adopted = self._counter(
            "sessions_adopted", "Sessions created for agents that did not register at this shim."
        )
        self.sessions_refused = self._counter(
            "sessions_refused", "Calls of new agents refused because their token already has as many agents as it may."
        )
        self.alias_conflicts = self._counter("alias_conflicts", "Agent ids that moved between two fresh sessions.")
        self.agent_heartbeats = self._counters(
            "agent_heartbeats",
            "Agents' heartbeats: acknowledged by the controller within one interval, only written to it, or missed.",
            outcome=[each.value for each in HeartbeatOutcome],
        )

    def _add_other_transports(self) -> None:
        self.fallback = self._counters(
            "fallback_calls",
            "Calls sent to the vendor's HTTP API, by the class of the response, or unreachable.",
            outcome=OUTCOMES,
        )
        self.websocket_handshakes = self._counters(
            "websocket_agent_handshakes",
            "WebSocket handshakes of agents passed on to the controller, by outcome.",
            outcome=("ok", "refused", "failed", "busy"),
        )
        self.websocket_connections = self._gauge(
            "websocket_agent_connections", "Agents whose own WebSocket connection is passed on to the controller now."
        )
        self.fallback_active = self._gauge(
            "fallback_active",
            "1 while agents' calls use the vendor's HTTP API because of the mode or of a link that is down.",
        )
        self.rollout_percent = self._gauge("rollout_percent", "The configured rollout.percent.")
        self.rollout_changed = self._gauge(
            "rollout_changed_timestamp_seconds",
            "Unix time of the last change of mode or rollout, or of the start.",
        )

    def _add_process(self) -> None:
        self.internal_errors = self._counters(
            "internal_errors",
            "Defects of the shim that were caught at a boundary.",
            part=("frontend", "bridge", "connection"),
        )
        self.log_lines_dropped = self._counter(
            "log_lines_dropped", "Log lines that could not be written: the reader was too slow, or writing failed."
        )
        self.loop_lag_seconds = self._histogram(
            "event_loop_lag_seconds",
            "Delay of a timer on the event loop, sampled ten times a second while the loop works.",
            (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5),
        )
        self.loop_lag_max_seconds = self._gauge(
            "event_loop_lag_max_seconds", "Longest delay of the event loop since the start."
        )
        self.store_commit_seconds = self._histogram(
            "store_commit_seconds", "Duration of a commit of the store, including its sync.", LATENCY_BUCKETS_S
        )
        self.store_operations = self._counter("store_operations", "Operations carried out in commits of the store.")
        self.store_failures = self._counter(
            "store_failures", "Submissions to the store that failed. Nothing of them was applied."
        )
        self.store_log_bytes = self._gauge("store_log_bytes", "Size in bytes of the database's write-ahead log.")
        self.store_log_pinned = self._gauge(
            "store_log_pinned", "1 while another program keeps the write-ahead log from being emptied."
        )
        self.store_moved_aside = self._counter(
            "store_moved_aside", "Corrupt databases moved aside. Data that was only in them is lost."
        )
        self.store_quarantined = self._counter(
            "store_quarantined_rows", "Rows of the database that could not be decoded."
        )
        self.config_valid = self._gauge(
            "config_valid", "0 while the configuration file is faulty and an older one is used."
        )
        self.config_valid.set(1)

    def _add_link(self) -> None:
        self.attempts = self._counters(
            "connection_attempts",
            "Attempts to bring a link online: ok, failed with the controller reachable, or made while it was away.",
            outcome=[each.value for each in DialOutcome],
        )
        self.dials = self._counters(
            "upstream_dials", "Handshakes with the controller, by outcome.", outcome=("ok", *FAILURES)
        )
        self.retries = self._counters(
            "upstream_retries",
            "Waits before another dial, by the failure that made it necessary.",
            reason=(*FAILURES, *ENDINGS),
        )
        self.disconnects = self._counters(
            "upstream_disconnects", "Connections to the controller that ended, by reason.", reason=ENDINGS
        )
        self.early_disconnects = self._counter(
            "upstream_early_disconnects",
            "Connections to the controller that ended before upstream.reconnect.stable_after_s.",
        )
        self.reconnect_seconds = self._histogram(
            "upstream_reconnect_seconds", "Time from the loss of a link until it is online again.", RECONNECT_BUCKETS_S
        )
        self.return_seconds = self._histogram(
            "upstream_reconnect_after_return_seconds",
            "Upper bound of the time from the controller's return until a lost link is online again.",
            RECONNECT_BUCKETS_S,
        )
        self.gateway = self._counters(
            "gateway_dials", "Dials of a gateway by outcome.", outcome=("ok", "failed", "host_refused")
        )

    def _add_messages(self) -> None:
        self.messages = self._counters(
            "upstream_messages",
            "Messages to and from the controller by direction and type. Unknown types count as other.",
            direction=OPEN,
            type=(*sorted(KNOWN_TYPES), OTHER),
        )
        self.message_seconds = self._histograms(
            "message_latency_seconds",
            "Time that messages spend in the shim while they can be passed on: a poll is held, or the link is up.",
            LATENCY_BUCKETS_S,
            direction=("down", "up"),
        )
        self.bad_frames = self._counters(
            "upstream_bad_frames",
            "Data frames that contained no valid message, by the reason.",
            kind=("not_json", "not_object", "no_type", "bad_payload", "too_many_values", "too_big", "protocol_error"),
        )
        self.invalid_characters = self._counters(
            "invalid_characters",
            "Bodies and messages with bytes that are not UTF-8. They are accepted, each such byte as U+FFFD.",
            source=("agent", "controller", "fallback"),
        )
        self.unknown_types = self._counter(
            "upstream_unknown_types", "Messages of a type that the shim does not know. They are ignored."
        )
        self.upstream_errors = self._counter(
            "upstream_errors", "Error messages of the controller that answer no registration."
        )
        self.refused = self._counters(
            "upstream_refused",
            "Requests of the controller refused because a legacy agent cannot serve them, by type.",
            type=sorted(REFUSED_TYPES),
        )
        self.leftovers = self._counter(
            "upstream_leftovers", "Streaming messages of the controller that belong to no open stream."
        )

    def _add_registrations_and_heartbeats(self) -> None:
        self.registrations = self._counters("registrations", "Registrations by outcome.", outcome=REGISTRATION_OUTCOMES)
        self.heartbeats_up = self._counters(
            "upstream_heartbeats",
            "Heartbeats sent to the controller, and those that it acknowledged.",
            event=("sent", "acked"),
        )
        self.heartbeat_ack_seconds = self._histogram(
            "upstream_heartbeat_ack_seconds",
            "Time from a heartbeat to the controller until its acknowledgement.",
            (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
        )
        self.status_dropped = self._counter(
            "status_dropped", "Agents' status reports that were not sent to the controller."
        )

    def _add_commands(self) -> None:
        self.commands = self._counters("commands", "Steps in the lives of commands, by event.", event=COMMAND_EVENTS)
        self.results = self._counters(
            "results",
            "Results posted by agents: of a known command, a repeat, or of an unknown command.",
            kind=("known", "repeat", "unknown"),
            success=("true", "false"),
        )
        self.offer_seconds = self._histograms(
            "command_offer_seconds",
            "Time from a command's arrival to its first offer to the agent.",
            LATENCY_BUCKETS_S,
            dialect=OPEN,
        )
        self.hand_over_seconds = self._histograms(
            "command_hand_over_seconds",
            "Time from a command's arrival until the reply with it was handed to the agent's connection.",
            LATENCY_BUCKETS_S,
            dialect=OPEN,
        )


class ClusterMetrics:
    """Metrics of shards and forwarded requests, one attribute each."""

    def __init__(self, metrics: Metrics) -> None:
        registry = metrics.registry
        self.shards = Gauge("agent_shim_shards", "Shards that this replica owns.", registry=registry)
        self.replicas = Gauge("agent_shim_replicas", "Replicas that live, as this one sees it.", registry=registry)
        self.taken = Counter("agent_shim_shards_taken", "Shards that this replica took over.", registry=registry)
        released = Counter(
            "agent_shim_shards_released", "Shards that this replica gave up, by reason.", ["reason"], registry=registry
        )
        self.released = Labelled(released, {"reason": RELEASE_REASONS})
        forwarded = Counter(
            "agent_shim_forwarded_requests",
            "Agents' requests sent on to the replica that owns their shard, by what became of them.",
            ["outcome"],
            registry=registry,
        )
        self.forwarded = Labelled(forwarded, {"outcome": FORWARD_OUTCOMES})
