"""All metrics of one shim, in one registry that is passed down: two shims in one process share nothing.

Names start with `agent_shim_`; every label has a bounded set of values.
"""

from __future__ import annotations

from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

# Register may take 25 s, a held poll 20 s, everything else well under 10 ms.
REQUEST_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30)


M = TypeVar("M", bound=MetricWrapperBase)


class Children(dict[tuple[str, ...], M]):
    """The children of a metric with labels, each resolved once: `labels` of the library itself takes a lock."""

    def __init__(self, metric: M) -> None:
        super().__init__()
        self._metric = metric

    def __missing__(self, values: tuple[str, ...]) -> M:
        child = self[values] = self._metric.labels(*values)
        return child

    def labels(self, *values: str) -> M:
        """The child with these label values."""
        return self[values]


class Metrics:
    """The metrics by attribute."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Children(
            Counter(
                "agent_shim_requests",
                "Legacy requests answered, by dialect, operation and HTTP status; empty labels where no route matched.",
                ("dialect", "operation", "status"),
                registry=registry,
            )
        )
        self.request_seconds = Children(
            Histogram(
                "agent_shim_request_duration_seconds",
                "Time from a legacy request's first byte to its reply's last byte, hold times of polls included.",
                ("dialect", "operation"),
                buckets=REQUEST_BUCKETS_S,
                registry=registry,
            )
        )
        self.bad_requests = Children(
            Counter(
                "agent_shim_bad_requests",
                "Legacy requests refused before the switchboard saw them, by the step that refused them.",
                ("reason",),
                registry=registry,
            )
        )
        self.replies_lost = Counter(
            "agent_shim_replies_lost",
            "Legacy replies that could not be written: the agent had hung up or did not read.",
            registry=registry,
        )
        self.connections = Gauge("agent_shim_connections", "Open legacy connections.", registry=registry)
        self.internal_errors = Children(
            Counter(
                "agent_shim_internal_errors",
                "Defects of the shim that were caught at a boundary.",
                ("part",),
                registry=registry,
            )
        )
        self.loop_lag_seconds = Histogram(
            "agent_shim_event_loop_lag_seconds",
            "How late the event loop came to a timer, sampled ten times a second.",
            buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5),
            registry=registry,
        )
        self.loop_lag_max_seconds = Gauge(
            "agent_shim_event_loop_lag_max_seconds", "The longest of those delays since the start.", registry=registry
        )
        self._add_store(registry)
        self._add_upstream(registry)
        self._add_commands(registry)
        self.config_valid = Gauge(
            "agent_shim_config_valid",
            "0 while the configuration file is faulty and an older one is used.",
            registry=registry,
        )
        self.config_valid.set(1)

    def _add_store(self, registry: CollectorRegistry) -> None:
        self.store_moved_aside = Counter(
            "agent_shim_store_moved_aside",
            "Corrupt databases that were moved aside: what was only in them is lost.",
            registry=registry,
        )
        self.store_quarantined = Counter(
            "agent_shim_store_quarantined_rows", "Rows of the database that could not be decoded.", registry=registry
        )

    def _add_upstream(self, registry: CollectorRegistry) -> None:
        self.dials = Children(
            Counter("agent_shim_upstream_dials", "Dials of the controller by outcome.", ("outcome",), registry=registry)
        )
        self.disconnects = Children(
            Counter(
                "agent_shim_upstream_disconnects", "Connections that ended, by reason.", ("reason",), registry=registry
            )
        )
        self.reconnect_seconds = Histogram(
            "agent_shim_upstream_reconnect_seconds",
            "Time from the loss of a link to it being online again.",
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600),
            registry=registry,
        )
        self.messages = Children(
            Counter(
                "agent_shim_upstream_messages",
                "Upstream envelopes by direction and type (unknown types as other).",
                ("direction", "type"),
                registry=registry,
            )
        )
        self.bad_frames = Children(
            Counter(
                "agent_shim_upstream_bad_frames", "Data frames that were no envelope.", ("kind",), registry=registry
            )
        )
        self.upstream_errors = Counter(
            "agent_shim_upstream_errors", "Error messages that answered no registration.", registry=registry
        )
        self.refused = Children(
            Counter(
                "agent_shim_upstream_refused",
                "Requests that a legacy agent cannot serve.",
                ("type",),
                registry=registry,
            )
        )
        self.leftovers = Counter(
            "agent_shim_upstream_leftovers", "Streaming messages that belong to nothing.", registry=registry
        )
        self.gateway = Children(
            Counter("agent_shim_gateway_dials", "Dials of a gateway by outcome.", ("outcome",), registry=registry)
        )
        self.fallback = Children(
            Counter(
                "agent_shim_fallback_calls",
                "Calls that went to the vendor's HTTP API, by the class of its answer, or unreachable.",
                ("outcome",),
                registry=registry,
            )
        )
        self.registrations = Children(
            Counter("agent_shim_registrations", "Registrations by outcome.", ("outcome",), registry=registry)
        )
        self.heartbeats_up = Children(
            Counter(
                "agent_shim_upstream_heartbeats",
                "Heartbeats sent upstream and acknowledged.",
                ("event",),
                registry=registry,
            )
        )
        self.heartbeat_ack_seconds = Histogram(
            "agent_shim_upstream_heartbeat_ack_seconds",
            "Time from a heartbeat to its acknowledgement.",
            buckets=(0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=registry,
        )
        self.status_dropped = Counter(
            "agent_shim_status_dropped", "Status reports that did not go upstream.", registry=registry
        )

    def _add_commands(self, registry: CollectorRegistry) -> None:
        latency_s = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
        self.commands = Children(
            Counter("agent_shim_commands", "What happened to commands.", ("event",), registry=registry)
        )
        self.results = Children(
            Counter(
                "agent_shim_results",
                "Results that agents posted: known, repeat, unknown.",
                ("kind",),
                registry=registry,
            )
        )
        self.offer_seconds = Children(
            Histogram(
                "agent_shim_command_offer_seconds",
                "Time from a command's arrival to its first offer: the shim's own share while a poll is held.",
                ("dialect",),
                buckets=latency_s,
                registry=registry,
            )
        )
        self.hand_over_seconds = Children(
            Histogram(
                "agent_shim_command_hand_over_seconds",
                "Time from a command's arrival to its reply being handed to the agent's connection.",
                ("dialect",),
                buckets=latency_s,
                registry=registry,
            )
        )
        self.hold_seconds = Histogram(
            "agent_shim_poll_hold_seconds",
            "How long polls were held, however they ended.",
            buckets=(0.1, 0.5, 1, 2, 5, 10, 15, 20, 30),
            registry=registry,
        )
        self.sessions_adopted = Counter(
            "agent_shim_sessions_adopted", "Sessions made for agents that did not register here.", registry=registry
        )
        self.alias_conflicts = Counter(
            "agent_shim_alias_conflicts", "Agent ids that moved between two fresh sessions.", registry=registry
        )
