"""Results of rounds: counts, recovery times, violations; as data, and as a table for people."""

from __future__ import annotations

import math
import os
import platform
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from bench.herd import measured
from tests.chaos.harness import checker
from tests.chaos.harness import events as ev
from tests.chaos.harness.checker import Case, Violation, case, check
from tests.chaos.harness.outages import half_open_s, returns_s, stalled_s
from tests.chaos.harness.runner import Played

# Faults during which nobody can reach the controller, and those in which it answers and wants us to wait.
REFUSING = frozenset({"refuse_401", "refuse_403", "refuse_429", "refuse_503_later", "register_closes"})
AWAY = frozenset(
    {
        "controller_killed",
        "controller_restarted",
        "controller_forgetful",
        "refuse_503",
        "accept_then_close",
        "hang_handshake",
        "cut",
        "reset",
        "dns_hangs",
    }
)
# The way there is open, but what passes is slow, or is not answered.
DEGRADED = frozenset({"loss", "latency", "narrow", "slow", "delay", "register_unanswered", "register_in_progress"})
HALF_OPEN, STALLED = "half_open", "stalled"

Span = tuple[float, float]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all does not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def spans(history: Iterable[ev.AnyEvent], kinds: frozenset[str]) -> list[Span]:
    """Return when faults of these kinds lasted."""
    return checker.spans((event for event in history if isinstance(event, ev.Fault)), kinds)


def _touches(some: Iterable[Span], begin: float, end: float) -> bool:
    return any(since <= end and until >= begin for since, until in some)


def recoveries(history: Sequence[ev.AnyEvent]) -> list[float]:
    """Seconds from the moment at which the controller could be reached (again) to the link being online again.

    Left out is what is no recovery from a loss: a shim that has just started, a controller that refuses or asks to
    wait, a line or a controller that is slow.
    """
    away = spans(history, AWAY)
    excluded = spans(history, REFUSING | DEGRADED)
    found: list[float] = []
    lost_at: float | None = None
    for event in sorted(history, key=lambda event: event.at):
        if isinstance(event, ev.Life) and event.who == "shim":
            lost_at = None
        elif isinstance(event, ev.Link):
            if event.was in ("online", "replaying") and event.state in ("waiting", "opening"):
                lost_at = event.at if lost_at is None else lost_at
            elif event.state == "idle":
                lost_at = None
            elif event.state == "online" and lost_at is not None:
                begin = max([lost_at, *(until for _, until in away if until < event.at)])
                lost_at = None
                if not _touches(excluded, begin, event.at):
                    found.append(event.at - begin)
    return found


def detections(history: Sequence[ev.AnyEvent], kind: str) -> list[float]:
    """Seconds from the beginning of a fault that only silence tells of to the connection being given up for it."""
    given_up = sorted(event.at for event in history if isinstance(event, ev.Condemned) and event.reason == kind)
    found = []
    for since, until in spans(history, frozenset({kind})):
        at = next((at for at in given_up if since < at <= until), None)
        if at is not None:
            found.append(at - since)
    return found


def simulated() -> dict[str, Any]:
    """Measure in simulated time: recovery with the real settings of the shim, and a thousand shims at once."""
    return {
        "virtual": {
            "link_back": distribution(returns_s(1000)),
            "half_open_found": distribution(half_open_s(200)),
            "stalled_found": distribution(stalled_s(200)),
        },
        "herd": [asdict(herd) | {"ratio": round(herd.ratio, 2)} for herd in measured()],
    }


def figures(played: Sequence[Played]) -> dict[str, Any]:
    """All rounds together, as JSON. Times in seconds, as measured: at pace p time-outs are p times shorter."""
    judged = [(one, case(one.history, one.nameless)) for one in played]
    violations = [(one.plan.seed, violation) for one, found in judged for violation in check(found)]
    by_pace = sorted({one.plan.pace for one in played})
    return {
        "machine": machine(),
        "rounds": [
            {
                "seed": one.plan.seed,
                "pace": one.plan.pace,
                "duration_s": one.plan.duration_s,
                "settled_s": one.settled_s,
            }
            for one in played
        ],
        "faults": dict(sorted(sum((Counter(one.counts) for one in played), Counter()).items())),
        "rude_calls": dict(sorted(sum((Counter(one.rude) for one in played), Counter()).items())),
        "commands": _commands([found for _, found in judged]),
        "heartbeats": {
            "from_agents": sum(1 for one in played for e in one.history if _is_beat(e)),
            "upstream": sum(1 for one in played for e in one.history if isinstance(e, ev.Beat)),
        },
        "shim_starts": sum(1 for one in played for e in one.history if isinstance(e, ev.Life) and _shim_born(e)),
        "stores_lost": sum(len(found.lost_stores) for _, found in judged),
        "recovery": {f"pace {pace:g}": _recovery([o for o in played if o.plan.pace == pace]) for pace in by_pace},
        "stops": distribution([e.seconds for one in played for e in one.history if isinstance(e, ev.Stopped)]),
        "loop_blocked_max_s": _longest(played, ev.Lag),
        "harness_late_max_s": _longest(played, ev.Late),
        "violations": [{"seed": seed, **_shown(violation)} for seed, violation in violations],
    }


def _longest(played: Sequence[Played], kind: type[ev.Lag | ev.Late]) -> float:
    return max((event.seconds for one in played for event in one.history if isinstance(event, kind)), default=0.0)


def _is_beat(event: ev.AnyEvent) -> bool:
    return isinstance(event, ev.Contact) and event.what == "heartbeat" and event.outcome == "ok"


def _shim_born(event: ev.Life) -> bool:
    return event.who == "shim" and event.born


def _shown(violation: Violation) -> dict[str, str]:
    return {"rule": violation.rule, "subject": violation.subject, "text": violation.text}


def _commands(cases: Sequence[Case]) -> dict[str, Any]:
    commands = [command for found in cases for command in found.commands.values()]
    accepted = [command for command in commands if command.accepted_at is not None]
    codes = Counter(report.code for command in commands for report in command.reported if report.code)
    reasons = Counter(
        step.reason for c in commands for step in c.offers if isinstance(step, ev.Offered) and step.reason
    )
    lost_in_store = [
        c for found in cases for c in found.commands.values() if not c.received and not c.reported
        and c.last_accepted_at is not None and found.excused(c.last_accepted_at)
    ]  # fmt: skip
    waiting = [
        c for found in cases for c in found.commands.values() if not c.received and not c.reported
        and c.last_accepted_at is not None and checker.stranded(found, c, c.last_accepted_at)
    ]  # fmt: skip
    return {
        "pushed": sum(1 for command in commands if command.pushed),
        "accepted": len(accepted),
        "received": sum(1 for command in commands if command.received),
        "received_more_than_once": sum(1 for command in commands if len(command.received) > 1),
        "offers_taken_back": sum(1 for c in commands for step in c.offers if isinstance(step, ev.Requeued)),
        "redelivered_by_reason": dict(sorted(reasons.items())),
        "results_taken": sum(1 for c in commands if any(200 <= post.status < 300 for post in c.posted)),
        "results_reported": sum(1 for c in commands if any(not report.code for report in c.reported)),
        "results_reported_more_than_once": sum(1 for c in commands if len(c.reported) > 1),
        "ended_by_code": dict(sorted(codes.items())),
        "lost": sum(1 for found in cases for violation in check(found) if violation.rule == "lost"),
        "gone_with_destroyed_databases": len(lost_in_store),
        "wait_for_an_id_of_before": len(waiting),
    }


def _recovery(played: Sequence[Played]) -> dict[str, Any]:
    back = [seconds for one in played for seconds in recoveries(one.history)]
    found: dict[str, Any] = {"link_back": distribution(back)}
    for kind in (HALF_OPEN, STALLED):
        found[f"{kind}_found"] = distribution([s for one in played for s in detections(one.history, kind)])
    return found


def distribution(values: Sequence[float]) -> dict[str, float]:
    shares = {"p50": 0.5, "p95": 0.95, "p99.9": 0.999}
    found = {name: round(percentile(values, share), 3) for name, share in shares.items()}
    return {"count": len(values), **found, "max": round(max(values, default=0.0), 3)}


def machine() -> dict[str, str]:
    """Return where and on which day it was measured."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "system": f"{platform.system()} {platform.release()}",
        "processor": platform.machine(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
    }


def table(found: dict[str, Any]) -> Iterator[str]:
    """The lines for people."""
    yield from _section("faults injected", found["faults"])
    for kind, reason in found["impossible"].items():
        yield f"  {kind.replace('_', ' ')}: left out: {reason}"
    yield from _section("calls that agents made badly", found["rude_calls"])
    yield from _section("commands", {k: v for k, v in found["commands"].items() if not isinstance(v, dict)})
    yield from _section("redelivered, by reason", found["commands"]["redelivered_by_reason"])
    yield from _section("ended by the shim, by code", found["commands"]["ended_by_code"])
    yield ""
    yield f"heartbeats: {found['heartbeats']['from_agents']} from agents, {found['heartbeats']['upstream']} upstream"
    yield f"shim starts: {found['shim_starts']}; databases destroyed: {found['stores_lost']}"
    yield f"longest block of the shim's event loop: {found['loop_blocked_max_s'] * 1000:.0f} ms"
    yield f"longest time in which the harness itself was not served: {found['harness_late_max_s'] * 1000:.0f} ms"
    yield ""
    yield f"{'recovery (s)':<36}{'n':>5}{'p50':>9}{'p95':>9}{'p99.9':>9}{'max':>9}"
    stops = {"all": {"gone_after_sigterm": found["stops"]}}
    links = {"many links": {kind: d for kind, d in found.get("links", {}).items() if kind != "links"}}
    for pace, kinds in (stops | found["recovery"] | links | {"virtual time": found["virtual"]}).items():
        for kind, d in kinds.items():
            if not d["count"]:
                continue
            name = f"{kind.replace('_', ' ')}, {pace}"
            yield f"{name:<36}{d['count']:>5}{d['p50']:>9.3f}{d['p95']:>9.3f}{d['p99.9']:>9.3f}{d['max']:>9.3f}"
    yield ""
    seeds = ", ".join(f"{one['seed']} (pace {one['pace']:g}, {one['duration_s']:.0f} s)" for one in found["rounds"])
    yield f"seeds: {seeds}"
    if found["violations"]:
        yield f"VIOLATIONS: {len(found['violations'])}"
        for violation in found["violations"][:50]:
            yield f"  seed {violation['seed']}: {violation['rule']}: {violation['subject']}: {violation['text']}"
    else:
        yield "violations: 0"


def _section(title: str, values: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield f"{title}:"
    for name, value in values.items():
        yield f"  {name.replace('_', ' '):<34}{value:>7}"
