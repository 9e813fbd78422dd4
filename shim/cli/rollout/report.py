"""The report as rows of cells, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any, NamedTuple

import msgspec

from shim.cli.rollout.cluster import TITLES, WANTED, Cluster, Measured
from shim.cli.rollout.verdict import Decision, Reason, Verdict, percentage
from shim.core.text import columns, plural, printable

WINDOWS = ("1h", "24h")
SHORT = {
    "connection_success": "Connect",
    "reconnection": "Reconnect",
    "heartbeat_success": "Heartbeat",
    "message_latency": "Latency",
}
"""Titles of the objectives in narrow columns."""
HEAD = ("Cluster", "Agent", "Sidecar", "Version", "Mode", "Canary", "Link")
TAIL = ("No result", "Still used", "Can go")
_LEVELS = {Decision.GO_ON: "good", Decision.WAIT: "warning", Decision.GO_BACK: "bad"}
_STYLE = """
:root { color-scheme: light dark; --bg: #f6f7f9; --card: #fff; --text: #1c2330; --soft: #5b6675; --line: #d9dee6;
  --good: #14713d; --good-bg: #e3f4ea; --warning: #8a5200; --warning-bg: #fdf0d8; --bad: #b3201d; --bad-bg: #fbe4e3; }
@media (prefers-color-scheme: dark) { :root { --bg: #12161c; --card: #1b212a; --text: #e6eaf0; --soft: #9aa6b6;
  --line: #323b48; --good: #6fd39a; --good-bg: #173325; --warning: #f0b95a; --warning-bg: #3a2c12; --bad: #ff8f88;
  --bad-bg: #401c1b; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 1.5rem; background: var(--bg); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 96rem; margin: auto; }
h1 { font-size: 1.1rem; margin: 0 0 1rem; } h2 { font-size: 1rem; margin: 2rem 0 .6rem; }
.verdict { border-left: .4rem solid; border-radius: .5rem; padding: 1rem 1.2rem; }
.verdict strong { display: block; font-size: 1.5rem; line-height: 1.3; }
.verdict p { margin: .3rem 0 0; color: var(--text); }
.good { color: var(--good); } .warning { color: var(--warning); } .bad { color: var(--bad); }
.soft { color: var(--soft); }
.verdict.good { background: var(--good-bg); } .verdict.warning { background: var(--warning-bg); }
.verdict.bad { background: var(--bad-bg); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .8rem; margin-top: 1rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.35rem; } .tile span { color: var(--soft); font-size: .85rem; }
ul { margin: 0; padding-left: 1.2rem; } li { margin: .2rem 0; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .82rem; }
th, td { text-align: left; padding: .45rem .42rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; } th small { display: block; font-weight: 400; }
tbody tr:last-child td { border-bottom: 0; }
td:first-child { font-weight: 600; min-width: 8rem; overflow-wrap: anywhere; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--card); }
td > span { white-space: nowrap; }
footer { color: var(--soft); font-size: .85rem; margin-top: 1.5rem; }
@media print { body { background: none; padding: 0; } .scroll { overflow: visible; } }
"""


class Report(NamedTuple):
    """Rows of all clusters and the verdict, as seen at `at` (Unix seconds)."""

    clusters: list[Cluster]
    verdict: Verdict
    at: float


class Cell(NamedTuple):
    """Text of one cell; `level` is `good`, `warning`, `bad` or empty, `more` explains it."""

    text: str
    level: str = ""
    more: str = ""


def head() -> list[tuple[str, str]]:
    """Return the columns, each with the target of its objective or an empty text."""
    objectives = [(SHORT[name], WANTED[name]) for name in TITLES]
    return [*((name, "") for name in HEAD), *objectives, *((name, "") for name in TAIL)]


def cells(row: Cluster) -> list[Cell]:
    """Return the cells of one cluster, as many as `head` has, free of terminal control characters."""
    found = [
        Cell(row.name),
        _agent(row),
        _sidecar(row),
        Cell(", ".join(row.versions) or "?", "" if len(row.versions) < 2 else "warning"),
        Cell(", ".join(row.modes) or "?", "" if len(row.modes) < 2 else "warning"),
        _canary(row),
        _link(row),
        *(_objective(row, name) for name in TITLES),
        _without_result(row),
        Cell(", ".join(_tails(row.still_used)) if row.seen else "?", "", "\n".join(row.still_used)),
        _can_go(row),
    ]
    return [Cell(printable(cell.text), cell.level, "\n".join(map(printable, cell.more.splitlines()))) for cell in found]


def _agent(row: Cluster) -> Cell:
    if row.agents:
        return Cell("calls", "good", f"{plural(row.agents, 'agent')} alive, or by HTTP within 2 min")
    if row.agent_pods:
        return Cell("silent", "bad", f"{plural(row.agent_pods, 'pod')} of the agent, and none calls a shim")
    return Cell("none", "warning") if row.seen or row.agent_pods == 0 else Cell("?", "warning")


def _sidecar(row: Cluster) -> Cell:
    if row.sidecar_faults:
        return Cell(f"{len(row.sidecar_faults)} without", "bad", "\n".join(row.sidecar_faults))
    if row.seen:
        return Cell("yes", "good", plural(row.shims, "shim") + " answered")
    return Cell("none" if row.agent_pods is not None else "?", "warning")


def _canary(row: Cluster) -> Cell:
    words = {"http": "mode http", "empty": "no agent", "unknown": "?", "part": f"{row.inside} in, {row.outside} out"}
    percent = "" if row.percent is None else f" ({row.percent:g} %)"
    if row.canary in ("in", "out"):
        return Cell(f"{row.canary}{percent}", "good" if row.canary == "in" else "")
    return Cell(words[row.canary] + (percent if row.canary == "part" else ""), "")


def _link(row: Cluster) -> Cell:
    if not row.seen:
        return Cell("?", "warning")
    names = {"up": "up", "down": "down", "refused": "refused", "idle": "at rest"}
    found = [(number, names.get(phase, phase)) for phase, number in row.links.items() if number]
    text = (
        "none" if not found else found[0][1] if found == [(1, found[0][1])] else ", ".join(f"{n} {w}" for n, w in found)
    )
    bad = any(row.links.get(phase) for phase in ("down", "refused"))
    return Cell(text, "bad" if bad else "good" if row.links.get("up") else "")


def _objective(row: Cluster, name: str) -> Cell:
    measured = [row.objectives.get(window, {}).get(name) for window in WINDOWS]
    states = [each.state if each is not None else "unknown" for each in measured]
    level = "bad" if "missed" in states else "good" if "met" in states else ""
    more = [f"{window}: {_words(each)}" for window, each in zip(WINDOWS, measured, strict=True) if each is not None]
    return Cell(" / ".join(map(_share, measured)) if row.seen else "?", level, "\n".join(more))


def _share(measured: Measured | None) -> str:
    if measured is None or measured.share is None:
        return "-"
    return percentage(measured.share).replace(" %", "%") + ("!" if measured.state == "missed" else "")


def _words(measured: Measured) -> str:
    if measured.share is None:
        return "nothing to measure"
    share = percentage(measured.share)
    return f"{share}, {measured.state}: {measured.samples - measured.failures:.0f} of {measured.samples:.0f}"


def _without_result(row: Cluster) -> Cell:
    totals = [sum(row.without_result.get(window, {}).values()) for window in WINDOWS]
    more = [
        f"{window}: {number} {code}"
        for window in WINDOWS
        for code, number in sorted(row.without_result.get(window, {}).items())
    ]
    return Cell(f"{totals[0]} / {totals[1]}" if row.seen else "?", "warning" if any(totals) else "", "\n".join(more))


def _tails(routes: Sequence[str]) -> list[str]:
    """Return the last part of each route, for a narrow column."""
    return sorted({route.partition(" (")[0].rpartition("/")[2] for route in routes})


def _can_go(row: Cluster) -> Cell:
    if row.keep_reasons is None or row.gaps:
        return Cell("?")
    reasons = "\n".join(row.keep_reasons)
    return Cell("no" if row.keep_reasons else "yes", "" if row.keep_reasons else "good", reasons)


# --- the verdict ------------------------------------------------------------------------------------------------------


def headline(report: Report) -> str:
    """Return the verdict in one sentence."""
    verdict = report.verdict
    if verdict.decision is Decision.GO_BACK:
        return f"Go back: {', '.join(map(printable, verdict.clusters))}."
    if verdict.decision is Decision.WAIT:
        since = f" since {moment(verdict.since)}" if verdict.since else ""
        until = (
            f" until {moment(verdict.until)} at the latest" if verdict.until else " until the reasons below are gone"
        )
        return f"Wait{since},{until}." if since else f"Wait{until}."
    if verdict.percent != 100 or any(cluster.all_by_http for cluster in report.clusters):
        return "Go on."
    left = [printable(cluster.name) for cluster in report.clusters if cluster.canary != "in"]
    if left:
        return f"Go on: every step is taken; not in are {', '.join(left)}: take them out of rollout.exclude."
    return "Go on: every cluster is in; the shims can go as soon as their agents are replaced."


def summary(report: Report) -> str:
    """Return how many clusters were seen and how many are in, in one sentence."""
    seen = sum(each.seen and not each.gaps for each in report.clusters)
    canary = sum(each.on_websocket for each in report.clusters)
    parts = [f"{plural(len(report.clusters), 'cluster')}, {seen} seen whole, {canary} in"]
    if report.verdict.percent is not None:
        parts.append(f"at {report.verdict.percent:g} %")
    days = _days_left(report.clusters)
    over = [each.name for each in report.clusters if each.over]
    if over:
        # A date that one cluster has alone takes its way back, and must not be shown as that of all.
        whose = "" if _all_over(report) else f" by sunset.at of {', '.join(map(printable, over))}"
        parts.append(f"the HTTP API is over{whose}")
    if days:
        parts.append(f"{plural(int(min(days)), 'day')} until the HTTP API ends")
    return ", ".join(parts)


def _days_left(rows: Sequence[Cluster]) -> list[float]:
    """Return the days until the end of the HTTP API of the clusters for which it is not over."""
    return [each.sunset_days for each in rows if each.sunset_days is not None and not each.over]


def _all_over(report: Report) -> bool:
    """Return True if the HTTP API is over for every cluster that was seen. One without a date still uses it."""
    seen = [each for each in report.clusters if each.seen]
    return bool(seen) and all(each.over for each in seen)


def reason_line(reason: Reason) -> str:
    """Return a reason as one line."""
    where = f"{printable(reason.cluster)}: " if reason.cluster else ""
    until = f" (until {moment(reason.until)} at the latest)" if reason.until is not None else ""
    return f"{where}{printable(reason.text)}{until}"


def moment(at: float) -> str:
    """Return a Unix time as text in UTC, `?` for one that is beyond every calendar."""
    try:
        return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):
        return "?"


def text(report: Report) -> str:
    """Return the report as text: a row for each cluster, then the verdict and its reasons."""
    rows = [[name.upper() for name, _ in head()], *([cell.text for cell in cells(each)] for each in report.clusters)]
    wanted = "; ".join(f"{title} {WANTED[name]}" for name, title in TITLES.items())
    lines = [
        *columns(rows),
        "",
        f"Objectives over 1 h / 24 h, ! is missed; wanted: {wanted}.",
        f"{summary(report)}.",
        "",
    ]
    lines.append(headline(report))
    lines += [f"  {reason.decision.text:<8} {reason_line(reason)}" for reason in report.verdict.reasons]
    notes = [f"{each.name}: {note}" for each in report.clusters for note in each.notes]
    return "\n".join([*lines, *(f"  {'note':<8} {printable(note)}" for note in notes)])


def as_json(report: Report) -> dict[str, Any]:
    """Return the report for programs."""
    verdict = report.verdict
    return {
        "at": report.at,
        "verdict": verdict.decision.text,
        "exit_code": int(verdict.decision),
        "since": verdict.since,
        "until": verdict.until,
        "percent": verdict.percent,
        "go_back": verdict.clusters,
        "reasons": [
            {**msgspec.to_builtins(reason), "decision": reason.decision.text, "cluster": reason.cluster or None}
            for reason in verdict.reasons
        ],
        "clusters": [_cluster(each) for each in report.clusters],
    }


def _cluster(row: Cluster) -> dict[str, Any]:
    data: dict[str, Any] = msgspec.to_builtins(row)
    data["canary"] = row.canary
    data["removable"] = None if row.keep_reasons is None or row.gaps else not row.keep_reasons
    data["objectives"] = {
        window: {
            name: {
                "state": each.state,
                "measured": each.share,
                "target": each.target,
                "good": each.good,
                "samples": each.samples,
            }
            for name, each in measured.items()
        }
        for window, measured in row.objectives.items()
    }
    return data


def page(report: Report) -> str:
    """Return the page. Everything that comes from a cluster is escaped."""
    level = _LEVELS[report.verdict.decision]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Rollout: {escape(report.verdict.decision.text)}</title>
<style>{_STYLE}</style>
</head>
<body><main>
<h1>Migration to the WebSocket API</h1>
<section class="verdict {level}"><strong class="{level}">{escape(headline(report))}</strong>
<p>{escape(summary(report))}.</p></section>
<section class="tiles">{_tiles(report)}</section>
{_reasons(report)}
<h2>Clusters</h2>
{_table(report)}
<footer>Seen at {moment(report.at)} by <code>agent-shim rollout report</code>. The objectives are those of
the vendor's guide, over the last hour / the last 24 hours; “!” is missed, “-” means that nothing happened that could be
measured. “In” are clusters whose agents use the WebSocket API, “out” those that use the HTTP API. “No result” counts
commands that ended without a result of the agent; “can go” says if the shim can be removed.</footer>
</main></body>
</html>
"""


def _tiles(report: Report) -> str:
    rows = report.clusters
    seen = [each for each in rows if each.seen and not each.gaps]
    canary = [each for each in rows if each.on_websocket]
    tiles = [
        _tile("clusters seen whole", f"{len(seen)} of {len(rows)}", "good" if len(seen) == len(rows) else "warning"),
        _tile("clusters in", f"{len(canary)} of {len(rows)}", ""),
    ]
    days = _days_left(rows) or ([0.0] if _all_over(report) else [])
    if days:
        tiles.append(_tile("days until the HTTP API ends", f"{int(min(days))}", "bad" if min(days) < 7 else ""))
    for name, title in TITLES.items():
        measured = _together(canary, name)
        text = "-" if measured is None else percentage(measured.share) if measured.samples else "-"
        state = "unknown" if measured is None else measured.state
        level = {"met": "good", "missed": "bad", "unknown": ""}[state]
        tiles.append(_tile(f"{title} over 24 h, wanted {WANTED[name]}", text, level))
    return "".join(tiles)


def _tile(title: str, value: str, level: str) -> str:
    return f'<div class="tile"><b class="{level}">{escape(value)}</b><span>{escape(title)}</span></div>'


def _together(rows: list[Cluster], name: str) -> Measured | None:
    """Return the samples of an objective over 24 h of all these clusters."""
    total: Measured | None = None
    for row in rows:
        measured = row.objectives.get("24h", {}).get(name)
        total = total if measured is None else measured.plus(total)
    return total


def _reasons(report: Report) -> str:
    lines = [
        _line(_LEVELS[reason.decision], reason.decision.text, reason_line(reason)) for reason in report.verdict.reasons
    ]
    lines += [_line("soft", "note", printable(f"{row.name}: {note}")) for row in report.clusters for note in row.notes]
    return f"<h2>Why</h2><ul>{''.join(lines)}</ul>" if lines else ""


def _line(level: str, word: str, text: str) -> str:
    return f'<li><b class="{level}">{escape(word)}</b> {escape(text)}</li>'


def _table(report: Report) -> str:
    heads = "".join(f'<th scope="col">{escape(name)}<small>{escape(wanted)}</small></th>' for name, wanted in head())
    rows = "".join(f"<tr>{''.join(map(_cell, cells(each)))}</tr>" for each in report.clusters)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(cell: Cell) -> str:
    """Return a cell. What is wrong stands under "Why", so that a row is one line; the tooltip has the rest."""
    title = f' title="{escape(cell.more)}"' if cell.more else ""
    return f'<td{title}><span class="{cell.level}">{escape(cell.text)}</span></td>'
