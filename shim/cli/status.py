"""`agent-shim status`: the state of a running shim, once or live in the terminal."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from math import floor
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from shim.cli.admin_client import AdminPort, admin_options, port_of
from shim.cli.threads import until_interrupted
from shim.clock import pause
from shim.core.text import columns, format_duration, plural, printable, shorten

if TYPE_CHECKING:
    from rich.console import Group

HEAD = ("AGENT", "DIALECT", "ALIVE", "HEARTBEATS", "POLLS", "HELD UP TO", "QUEUE")
PHASES = {"up": "connected", "down": "away", "refused": "token refused", "idle": "at rest"}
WORDS = {"good": "OK", "waiting": "WAIT", "warning": "WARN", "bad": "BAD"}
TROUBLES = {
    "name_unknown": "unknown to the controller",
    "unknown": "unknown to the controller",
    "heartbeats_refused": "refused by the controller",
}
OBJECTIVES = {
    "connection_success": ("connections", ""),
    "reconnection": ("reconnects", " within 10 s"),
    "heartbeat_success": ("heartbeats", ""),
    "message_latency": ("messages", " within 100 ms"),
}
WINDOWS_S = {"1h": 3_600.0, "24h": 86_400.0}
WHY_HTTP = {"mode": "mode http", "rollout": "outside", "link_down": "link down"}
EVERY_S = 1.0


class View(NamedTuple):
    """Text of a status. `level` is that of the sentence; `rows` are tuples as long as `HEAD`, each with a level."""

    level: str
    sentence: str
    hints: list[str]
    lines: list[tuple[str, str]]
    rows: list[tuple[str, tuple[str, ...]]]
    more: str


def view(status: dict[str, Any]) -> View:
    """Return the text of a status, free of terminal control characters."""
    overall, sessions = status["overall"], status["sessions"]
    hidden = sessions["total"] - len(sessions["items"])
    first, *others = overall["problems"] or [{"hint": "", "text": ""}]
    hints = [first["hint"]] if first["hint"] else []
    hints += [" ".join(filter(None, (each["text"], each["hint"]))) for each in [*others, *overall["notes"]]]
    return View(
        overall["level"],
        printable(overall["text"]),
        [printable(hint) for hint in hints],
        [(name, printable(text)) for name, text in _lines(status)],
        [_row(session, status) for session in sessions["items"]],
        f"and {plural(hidden, 'more agent')}" if hidden > 0 else "",
    )


def plain(shown: View) -> str:
    """Format the text without colours, for pipes and if rich is not installed."""
    lines = [f"{WORDS[shown.level]}: {shown.sentence}", *(f"  {hint}" for hint in shown.hints), ""]
    lines += [f"{name:<12}{text}" for name, text in shown.lines]
    if shown.rows:
        lines += ["", *columns([HEAD, *(cells for _, cells in shown.rows)])]
    return "\n".join([*lines, *([shown.more] if shown.more else [])])


def _lines(status: dict[str, Any]) -> list[tuple[str, str]]:
    commands, now = status["commands"], status["now"]
    latency = commands["latency"]
    timing = f"half handed over within {_ms(latency['p50_s'])}, 95 % within {_ms(latency['p95_s'])}"
    lines = [
        ("shim", f"{status['version']}, {mode_words(status)}, up {format_duration(now - status['started_at'])}"),
        ("controller", f"{status['upstream']}: {_links(status['links'], now)}"),
        ("commands", f"{commands['waiting']} waiting, {commands['offered']} offered, {commands['uncertain']} in doubt"),
        ("results", f"{commands['results']} to report"),
        *_calls(status),
        ("latency", timing if latency["commands"] else "no command handed over yet"),
        *_objectives(status),
        *_rollout(status),
        ("removal", _removal(status["migration"])),
    ]
    if "replicas" in status:
        lines.append(("replicas", replicas_line(status["replicas"])))
    if status["drain"]["state"] != "off":
        lines.append(("drain", drain_line(status["drain"])))
    return lines


def mode_words(status: dict[str, Any]) -> str:
    """Return the mode in force; after the sunset that is WebSocket, whatever is configured."""
    mode = status["mode"]
    if mode != "websocket" and _is_over(status["migration"]):
        return f"by WebSocket because sunset.at has passed (mode {mode} is set)"
    return f"mode {mode}"


def _is_over(migration: dict[str, Any]) -> bool:
    """Return True after the configured end of the legacy API."""
    days = migration["sunset"]["days_left"]
    return days is not None and days <= 0


def _objectives(status: dict[str, Any]) -> list[tuple[str, str]]:
    """Return one line for each window of the objectives: one until an hour has passed, none for an older shim."""
    objectives = status.get("objectives", [])
    lines: list[tuple[str, str]] = []
    for window, window_s in WINDOWS_S.items():
        found = [_measured(each, window) for each in objectives]
        observed_s = min((each["windows"][window]["observed_s"] for each in objectives), default=0.0)
        if found:
            text = f"last {format_duration(min(observed_s, window_s))}: {', '.join(found)}"
            lines.append(("" if lines else "objectives", text))
        if observed_s < window_s:
            break  # a longer window has seen the same
    return lines


def _measured(objective: dict[str, Any], window: str) -> str:
    """Return an objective in one window; a share is rounded down, so that what is missed by little is not 100 %."""
    found = objective["windows"][window]
    name, limit = OBJECTIVES.get(objective["name"], (objective["name"], ""))
    if found["measured"] is None:
        return f"no {name}"
    missed = f" (missed, more than {objective['target'] * 100:g} % wanted)" if found["state"] == "missed" else ""
    return f"{name} {floor(found['measured'] * 10_000) / 100:g} %{limit}{missed}"


def _rollout(status: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the line about the rollout, none if it has all agents."""
    rollout = status.get("rollout")
    if rollout is None or (rollout["percent"] >= 100 and not rollout["exclude"]):
        return []
    agents, lists = rollout["agents"], " and lists" if status["rollout_lists"] else ""
    place = "" if rollout["hash"] is None else f", hash {rollout['hash']:.1f}"
    inside = f"{agents['inside']} of {plural(agents['total'], 'agent')} inside{place}"
    over = " is set, but sunset.at has passed" if _is_over(status["migration"]) else ""
    return [("rollout", f"{rollout['percent']:g} %{lists}{over}: {inside}")]


def replicas_line(replicas: dict[str, Any]) -> str:
    """Return the shards that a gateway's replica owns, and the other replicas."""
    others = ", ".join(f"{each['name']}: {each['shards']}" for each in replicas["replicas"] if not each["self"])
    unowned = f", {replicas['unowned']} without an owner" if replicas["unowned"] else ""
    return f"{len(replicas['owned'])} of {replicas['shards']} shards here{unowned}; others: {others or 'none'}"


def drain_line(drain: dict[str, Any]) -> str:
    """Return a drain's progress in one line."""
    left = f"{plural(drain['commands'], 'command')} and {plural(drain['results'], 'result')} left"
    return f"{drain['state']}: {left}, {drain['refused']} refused"


def _links(links: dict[str, Any], now: float) -> str:
    if not links["items"]:
        return "no link yet"
    if links["total"] > 1:
        return f"{links['online']} of {links['total']} links up"
    link = links["items"][0]
    told = ", ".join(printable(part) for part in (link["reason"], link.get("detail")) if part)
    reason = f" ({told})" if told and link["phase"] != "up" else ""
    return f"{PHASES[link['phase']]} for {format_duration(now - link['since'])}{reason}"


def _removal(migration: dict[str, Any]) -> str:
    days = migration["sunset"]["days_left"]
    sunset = (
        "" if days is None else "; the legacy API is over" if days < 0 else f"; sunset in {plural(int(days), 'day')}"
    )
    return ("possible" if migration["removable"] else f"not yet: {', '.join(migration['reasons'])}") + sunset


def _calls(status: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the lines about calls that were refused, and about those by the vendor's HTTP API."""
    refused, by_http, now = status["refused"], status["fallback_calls"], status["now"]
    lines = [("refused", f"{plural(refused['calls'], 'call')} in the last minute")] if refused["calls"] else []
    last = by_http["last"]
    if by_http["used"] and last is not None:
        how = last["status"] or last["reason"] or "no answer"
        counts = f"{plural(by_http['calls'], 'call')} in the last minute, {by_http['failed']} not served"
        lines.append(("by HTTP", f"{counts}; the last one {format_duration(now - last['at'])} ago: {how}"))
    return lines


def _row(session: dict[str, Any], status: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    queue, hold, now = session["queue"], session["hold"], status["now"]
    waiting = queue["waiting"] + queue["offered"]
    level = "warning" if queue["not_polling"] or session["silent"] or session["trouble"] else "good"
    every = session["heartbeat_s"]
    beats = f"every {round(every, 1):g} s" if every else _ago(session["heartbeat_at"], now)
    polls = "held now" if session["polling_now"] else _ago(session["poll_at"], now)
    held = f"{hold['limit_s']:.0f} s" if hold["limit_s"] else "not held"
    alive = _alive(session, now)
    if session["http"] is not None:
        http = session["http"]
        level = "warning" if queue["not_polling"] or not http["served"] else "good"
        alive, beats, polls, held = http_words(http, status), "by HTTP", "by HTTP", "by HTTP"
    return level, (
        shorten(session["name"] or session["id"]),
        session["dialect"],
        alive,
        beats,
        polls,
        held,
        (f"{waiting} waiting" if waiting else "empty") + (", does not poll" if queue["not_polling"] else ""),
    )


def _alive(session: dict[str, Any], now: float) -> str:
    if session["fresh"]:
        return f"alive, {TROUBLES[session['trouble']]}" if session["trouble"] else "alive"
    since = session["stale_since"]
    return "silent" if since is None else f"silent for {format_duration(now - since)}"


def http_words(http: dict[str, Any], status: dict[str, Any]) -> str:
    """Return the reason for which an agent's calls use HTTP, and the outcome of the last one."""
    why = WHY_HTTP[http["why"]]
    if http["why"] == "rollout":
        why = f"outside {status['rollout_percent']:g} %, hash {http['hash']:.1f}"
    ended = http["status"] or http["reason"] or "no answer"
    return f"by HTTP ({why}), last call {format_duration(status['now'] - http['at'])} ago: {ended}"


def _ago(at: float | None, now: float) -> str:
    return "none since the start" if at is None else f"{format_duration(now - at)} ago"


def _ms(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


@click.command("status")
@admin_options
@click.option("--json", "as_json", is_flag=True, help="Print /status.json; with --watch one line a second.")
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C, once a second.")
def command(as_json: bool, watch: bool, **where: Any) -> None:
    """Show the state of a running shim: links, agents, commands, and if it can be removed."""
    port = port_of(**where)
    with until_interrupted():
        if as_json:
            _print_json(port, watch)
            return
        shown = _look(port)
        if _has_colours():
            _show_in_colours(shown, (lambda: _look_again(port)) if watch else None)
            return
        click.echo(plain(shown))
        while watch:
            pause(EVERY_S)
            click.echo("\n" + plain(_look_again(port)))


def _print_json(port: AdminPort, watch: bool) -> None:
    click.echo(json.dumps(port.ask("GET", "/status.json"), indent=None if watch else 2))
    while watch:
        pause(EVERY_S)
        click.echo(json.dumps(port.ask("GET", "/status.json")))


def _look(port: AdminPort) -> View:
    return view(port.ask("GET", "/status.json"))


def _look_again(port: AdminPort) -> View:
    """Query the status; return an error as a view, because the shim may restart while it is watched."""
    try:
        return _look(port)
    except click.ClickException as error:
        return View("bad", error.message, [], [], [], "")


# --- colours ----------------------------------------------------------------------------------------------------------

_COLOURS = {"good": "green", "waiting": "dim", "warning": "yellow", "bad": "bold red"}
_ALIVE = HEAD.index("ALIVE")


def _has_colours() -> bool:
    """Return True on a terminal, if rich is installed."""
    return sys.stdout is not None and sys.stdout.isatty() and importlib.util.find_spec("rich") is not None


def _show_in_colours(shown: View, look: Callable[[], View] | None) -> None:
    """Print the status once, or show what `look` returns on the full screen until Ctrl-C."""
    from rich.console import Console
    from rich.live import Live

    if look is None:
        Console().print(_render(shown))
        return
    with Live(_render(shown), screen=True, auto_refresh=False) as live:
        while True:
            pause(EVERY_S)
            live.update(_render(look()), refresh=True)


def _render(shown: View) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    for name, text in shown.lines:
        facts.add_row(Text(name, style="dim"), Text(text))
    agents = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for head in HEAD:
        agents.add_column(head, no_wrap=True)
    for level, cells in shown.rows:
        agents.add_row(*(Text(cell, style=_COLOURS[level] if at == _ALIVE else "") for at, cell in enumerate(cells)))
    word = (f" {WORDS[shown.level]} ", f"reverse {_COLOURS[shown.level]}")
    return Group(
        Text.assemble(word, " ", (shown.sentence, "bold")),
        *(Text(f"  {hint}", style="dim") for hint in shown.hints),
        Text(),
        facts,
        Text(),
        *([agents] if shown.rows else []),
        *([Text(shown.more, style="dim")] if shown.more else []),
    )
