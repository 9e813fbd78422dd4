"""The report as one self-contained HTML page: no script, no file and no address outside of it."""

from __future__ import annotations

from html import escape

from shim.cli.rollout.cluster import TITLES, WANTED, Cluster, Measured
from shim.cli.rollout.report import Cell, Report, cells, head, headline, moment, reason_line, summary
from shim.cli.rollout.verdict import Decision, percentage
from shim.core.text import printable

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
    days = [each.sunset_days for each in rows if each.sunset_days is not None]
    if days:
        tiles.append(_tile("days until the HTTP API ends", f"{max(0, int(min(days)))}", "bad" if min(days) < 7 else ""))
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
