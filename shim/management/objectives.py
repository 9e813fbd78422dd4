"""The vendor's four objectives and the commands without result, over the last hour and the last 24 hours.

docs/reference/metrics.md defines the objectives, and docs/reference/status.md the form in which they are shown.
"""

from __future__ import annotations

from array import array
from collections import deque
from typing import Any, NamedTuple

from prometheus_client import Histogram

from shim.metrics import LabelledCounter, LabelledHistogram, Metrics

ROW_S = 60.0
WINDOWS = {"1h": 3_600.0, "24h": 86_400.0}
RECONNECT_LIMIT_S = 10.0
LATENCY_LIMIT_S = 0.1
CODES = {
    "expired": "expired",
    "dead": "undeliverable",
    "rejected_queue_full": "queue_full",
    "rejected_unknown_agent": "unknown_agent",
    "rejected_ambiguous_target": "ambiguous_target",
    "rejected_malformed": "malformed",
    "rejected_store_unavailable": "store_unavailable",
}
"""Codes of the results that the shim makes itself (docs/reference/protocol.md#3-commands), by the event counted."""


class Objective(NamedTuple):
    """One objective: more than `target` of the samples must be good. `limit_s` is the time that a good one may take."""

    name: str
    target: float
    limit_s: float | None = None


OBJECTIVES = (
    Objective("connection_success", 0.99),
    Objective("reconnection", 0.95, RECONNECT_LIMIT_S),
    Objective("heartbeat_success", 0.999),
    Objective("message_latency", 0.95, LATENCY_LIMIT_S),
)


class ObjectiveWindows:
    """Counters of the last 24 hours, one row a minute: 1,441 rows of 15 numbers.

    Each row has the good samples and all samples of each objective, and then the commands by code, since the start.
    Times are monotonic seconds.
    """

    def __init__(self, metrics: Metrics, now: float) -> None:
        self._metrics = metrics
        self._rows: deque[tuple[float, array[int]]] = deque(maxlen=round(WINDOWS["24h"] / ROW_S) + 1)
        self._rows.append((now, self._read()))

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, now: float) -> None:
        """Keep the present counters if a minute has passed since the newest row."""
        if now - self._rows[-1][0] >= ROW_S:
            self._rows.append((now, self._read()))

    def objectives(self, now: float) -> list[dict[str, Any]]:
        """Return the four objectives with their measurements in each window."""
        counted = {name: self._counted(now, window_s) for name, window_s in WINDOWS.items()}
        return [
            {
                **each._asdict(),
                "windows": {
                    name: _measurement(each, counts[2 * at], counts[2 * at + 1], observed_s)
                    for name, (observed_s, counts) in counted.items()
                },
            }
            for at, each in enumerate(OBJECTIVES)
        ]

    def without_result(self, now: float) -> dict[str, Any]:
        """Return the commands in each window that ended without a result of their agent, by the code of the result."""
        found = {}
        for name, window_s in WINDOWS.items():
            observed_s, counts = self._counted(now, window_s)
            codes = dict(zip(CODES.values(), counts[2 * len(OBJECTIVES) :], strict=True))
            found[name] = {"observed_s": observed_s, "total": sum(codes.values()), "codes": codes}
        return found

    def _counted(self, now: float, window_s: float) -> tuple[float, list[int]]:
        """Return the seconds observed, up to one minute more than the window, and what was counted in them."""
        older = (row for row in reversed(self._rows) if row[0] <= now - window_s)
        began, base = next(older, self._rows[0])
        return round(now - began, 1), [new - old for new, old in zip(self._read(), base, strict=True)]

    def _read(self) -> array[int]:
        metrics = self._metrics
        attempts, heartbeats = _by_label(metrics.attempts), _by_label(metrics.agent_heartbeats)
        commands = _by_label(metrics.commands)
        return array(
            "Q",
            [
                attempts["ok"],
                attempts["ok"] + attempts["failed"],
                *_within(metrics.return_seconds, RECONNECT_LIMIT_S),
                heartbeats["acked"] + heartbeats["written"],
                sum(heartbeats.values()),
                *_within(metrics.message_seconds, LATENCY_LIMIT_S),
                *(commands[event] for event in CODES),
            ],
        )


def state_of(share: float | None, target: float) -> str:
    """Return the outcome by the share of good samples: `met`, `missed`, or `unknown` without samples."""
    return "unknown" if share is None else "met" if share > target else "missed"


def _measurement(objective: Objective, good: int, samples: int, observed_s: float) -> dict[str, Any]:
    measured = good / samples if samples else None
    state = state_of(measured, objective.target)
    return {"state": state, "measured": measured, "good": good, "samples": samples, "observed_s": observed_s}


def _by_label(counters: LabelledCounter) -> dict[str, int]:
    """Return the values of a counter with one label."""
    (family,) = counters.collect()
    return {value: int(s.value) for s in family.samples for value in s.labels.values() if s.name.endswith("_total")}


def _within(histogram: Histogram | LabelledHistogram, limit_s: float) -> tuple[int, int]:
    """Return the observations that took at most `limit_s`, which is the bound of a bucket, and all observations."""
    (family,) = histogram.collect()
    buckets = [(sample.labels["le"], int(sample.value)) for sample in family.samples if "le" in sample.labels]
    bound = str(float(limit_s))
    return sum(value for le, value in buckets if le == bound), sum(value for le, value in buckets if le == "+Inf")
