"""Verdict on the rollout: go on, wait, or go back, with the reasons. It is never better than what was seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum

import msgspec

from shim.cli.rollout.cluster import NO_WAY_BACK, TITLES, WANTED, Cluster, Measured, Trouble
from shim.core.text import format_duration, plural

LINK_DOWN_S = 120.0
"""Seconds without a link after which going back is due; a controller's restart takes less."""
FEW_FAILURES = 2
"""Failures in an hour that are too few for going back: one lost heartbeat of 120 misses 99.9 %."""
STARTING_S = 10.0
"""Seconds between the start of a shim and its first percentage, at most."""
HOUR_S = 3_600.0
DAY_S = 86_400.0

_GO_BACK = frozenset(
    {
        *("token_refused", "identity_contended", "registration_refused", "registration_unanswered"),
        *("name_unknown", "agent_unknown", "heartbeats_refused", "not_registered"),
    }
)
_NOTES = frozenset({"log_lines_lost", "store_log_pinned", "commands_not_fetched", "commands_in_doubt"})


class Decision(IntEnum):
    """A decision on the rollout; its value is the exit code."""

    GO_ON = 0
    WAIT = 1
    GO_BACK = 2

    @property
    def text(self) -> str:
        """The decision in words."""
        return self.name.lower().replace("_", " ")


class Reason(msgspec.Struct, frozen=True):
    """One reason for a decision. `until` is the time at which it ends by itself, `None` if somebody has to act."""

    decision: Decision
    cluster: str
    text: str
    since: float | None = None
    until: float | None = None


class Verdict(msgspec.Struct, frozen=True):
    """Decision over all clusters, with its reasons, the worst first.

    `since` is the latest change of the rollout in a cluster that is in. `until` is known if every reason has one.
    """

    decision: Decision
    reasons: list[Reason]
    percent: float | None
    since: float | None
    until: float | None

    @property
    def clusters(self) -> list[str]:
        """Names of the clusters that are the reason for going back."""
        found = [each.cluster for each in self.reasons if each.decision is Decision.GO_BACK and each.cluster]
        return list(dict.fromkeys(found))


def judge(
    clusters: Sequence[Cluster], now: float, observe_s: float, faults: Sequence[str] = (), *, start: bool = False
) -> Verdict:
    """Return the verdict. `faults` are failures of the source itself, which may hide clusters.

    With `start` mode `http` everywhere is no reason to wait: the canary is about to begin.
    """
    reasons = [Reason(Decision.WAIT, "", fault) for fault in faults]
    for each in clusters:
        reasons += _of_cluster(each, now, observe_s)
    reasons += _of_all(clusters, start=start)
    decision = max((reason.decision for reason in reasons), default=Decision.GO_ON)
    reasons.sort(key=lambda reason: -reason.decision)
    waits = [reason.until for reason in reasons if reason.decision is Decision.WAIT]
    known = [until for until in waits if until is not None]
    until = max(known) if decision is Decision.WAIT and len(known) == len(waits) else None
    changes = [each.since for each in clusters if each.on_websocket and each.since is not None]
    return Verdict(decision, reasons, common_percent(clusters), max(changes, default=None), until)


def common_percent(clusters: Sequence[Cluster]) -> float | None:
    """Return the percentage of most clusters, the lowest of several such; `None` if none is known."""
    percents = [each.percent for each in clusters if each.percent is not None]
    return min(percents, key=lambda percent: (-percents.count(percent), percent), default=None)


def _of_all(clusters: Sequence[Cluster], *, start: bool) -> Iterator[Reason]:
    if not clusters:
        yield Reason(Decision.WAIT, "", "no cluster was seen")
        return
    seen = [each for each in clusters if each.seen]
    if seen and all(each.all_by_http for each in seen):
        if start:
            return
        text = "mode http everywhere: nothing goes by WebSocket; `rollout step --start` begins or begins again"
        yield Reason(Decision.WAIT, "", text)
        return
    yield from _of_differences(seen, common_percent(clusters) or 0)
    if seen and not any(each.on_websocket for each in seen) and any(each.percent for each in seen):
        percent = max(each.percent or 0 for each in seen)
        yield Reason(Decision.WAIT, "", f"no cluster with an agent is in at {percent:g} %: name one in rollout.include")


def _of_differences(seen: Sequence[Cluster], percent: float) -> Iterator[Reason]:
    """Yield the clusters that are behind the others: what was taken back, or has not got the change yet."""
    for each in seen:
        if each.all_by_http:
            text = "mode http: it was taken back, or has not got the change yet"
            yield Reason(Decision.WAIT, each.name, text)
        elif each.percent is not None and each.percent < percent:
            text = (
                f"at {each.percent:g} %, most are at {percent:g} %: it has not got the change yet, or has its own value"
            )
            yield Reason(Decision.WAIT, each.name, text)


def _of_cluster(row: Cluster, now: float, observe_s: float) -> Iterator[Reason]:
    """Yield the reasons for which one cluster holds the rollout."""
    for gap in row.gaps:
        yield Reason(Decision.WAIT, row.name, gap)
    for fault in row.sidecar_faults or ():
        yield Reason(Decision.WAIT, row.name, f"pod {fault}")
    if row.agent_pods == 0 and not row.agents:
        yield Reason(Decision.WAIT, row.name, "no pod of the agent was found, and no agent calls")
    if not row.seen:
        return
    if len(row.modes) > 1:
        yield Reason(Decision.WAIT, row.name, f"its shims have different modes: {', '.join(row.modes)}")
    if not row.agents:
        yield Reason(Decision.WAIT, row.name, "no agent calls its shim")
    yield from _of_troubles(row)
    if row.on_websocket:
        yield from _of_time(row, now, observe_s)
        yield from _of_objectives(row, now)
        yield from _of_commands(row, now)


def _of_troubles(row: Cluster) -> Iterator[Reason]:
    for trouble in row.troubles:
        decision, text = Decision.WAIT, trouble.text
        if trouble.code in _NOTES:
            continue
        if trouble.code in NO_WAY_BACK:
            text = f"there is no way back by HTTP: {text}"
        elif row.may_use_websocket and (trouble.code in _GO_BACK or _is_long_down(trouble)):
            decision = Decision.GO_BACK
        yield Reason(decision, row.name, text)


def _is_long_down(trouble: Trouble) -> bool:
    return trouble.code == "link_down" and (trouble.lasts_s or 0) >= LINK_DOWN_S


def _of_time(row: Cluster, now: float, observe_s: float) -> Iterator[Reason]:
    if row.since is None:
        yield Reason(Decision.WAIT, row.name, "since when it has this percentage is not known")
    elif now - row.since < observe_s:
        text = f"in for {format_duration(now - row.since)} of {observe_s / HOUR_S:g} h"
        if any(abs(row.since - started) < STARTING_S for started in row.started):
            text += ", counted from the shim's start: what was before it is not known without Prometheus"
        yield Reason(Decision.WAIT, row.name, text, row.since, row.since + observe_s)


def _of_objectives(row: Cluster, now: float) -> Iterator[Reason]:
    hour, day = row.objectives.get("1h", {}), row.objectives.get("24h", {})
    for name, title in TITLES.items():
        measured, over = hour.get(name), day.get(name)
        if measured is not None and measured.state == "missed":
            decision = Decision.GO_BACK if measured.failures > FEW_FAILURES else Decision.WAIT
            text = f"{title} missed over 1 h: {missed(measured)}, wanted {WANTED[name]}"
            yield Reason(decision, row.name, text, until=now + HOUR_S if decision is Decision.WAIT else None)
        elif over is not None and over.state == "missed":
            text = f"{title} missed over 24 h, not in the last hour: {missed(over)}, wanted {WANTED[name]}"
            # The misses are older than an hour, so they have left the 24 h by then.
            yield Reason(Decision.WAIT, row.name, text, until=now + DAY_S - HOUR_S)
    heartbeats = hour.get("heartbeat_success")
    if heartbeats is None or not heartbeats.samples:
        yield Reason(Decision.WAIT, row.name, "no heartbeat was measured in the last hour")


def _of_commands(row: Cluster, now: float) -> Iterator[Reason]:
    for window, left_s in (("1h", DAY_S), ("24h", DAY_S - HOUR_S)):
        codes = row.without_result.get(window, {})
        if codes:
            kinds = ", ".join(f"{number} {code}" for code, number in sorted(codes.items()))
            text = f"{plural(sum(codes.values()), 'command')} ended without a result over {window}: {kinds}"
            yield Reason(Decision.WAIT, row.name, text, until=now + left_s)
            return


def missed(measured: Measured) -> str:
    """Return a measurement as text: the share and the failures behind it."""
    return f"{percentage(measured.share)} ({measured.failures} of {measured.samples:.0f})"


def percentage(share: float | None) -> str:
    """Return a share as text, cut so that 99.95 % is not shown as 100 %."""
    return "none" if share is None else f"{int(share * 10_000) / 100:g} %"
