"""The next step of the rollout as a change for people or pipelines to apply; nothing is applied here."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import click
import msgspec

from shim.cli.rollout.cluster import Cluster
from shim.cli.rollout.report import Report, headline, reason_line
from shim.cli.rollout.verdict import Decision
from shim.core.text import printable

PERCENT = "config.rollout.percent"
MODE = "config.mode"


class Target(msgspec.Struct, frozen=True):
    """Place of the chart's release, for commands. `access` maps clusters to helm's options that select them."""

    chart: str
    release: str
    namespace: str
    access: dict[str, tuple[str, ...]]


def next_percent(current: float, steps: Sequence[float]) -> float | None:
    """Return the first step above the present percentage, `None` after the last one."""
    return next((step for step in sorted(steps) if step > current), None)


def previous_percent(current: float, steps: Sequence[float]) -> float | None:
    """Return the last step below the present percentage, `None` before the first one."""
    return next((step for step in sorted(steps, reverse=True) if step < current), None)


def change(keys: dict[str, str], form: str, target: Target, clusters: Sequence[str]) -> str:
    """Return one change of the chart's values: as a values file, as helm's commands, or for the shim's own file."""
    if form == "helm":
        return "\n".join(_helm(keys, target, name) for name in clusters)
    plain = {key.removeprefix("config."): value for key, value in keys.items()}
    return _yaml(keys if form == "values" else plain)


def _helm(keys: dict[str, str], target: Target, cluster: str) -> str:
    access = target.access.get(cluster)
    words = ["helm", "upgrade", target.release, target.chart, "--namespace", target.namespace, "--reuse-values"]
    words += [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    # Without kubectl's access the command names no cluster: a comment says where to run it. A name is a label's value
    # and may hold a line end, which would end the comment.
    return shlex.join([*words, *access]) if access else f"# in {printable(cluster)}:\n{shlex.join(words)}"


def _yaml(keys: dict[str, str]) -> str:
    """Return dotted keys as YAML; keys with a common section stand in one."""
    lines: list[str] = []
    open_sections: list[str] = []
    for key, value in sorted(keys.items()):
        *sections, last = key.split(".")
        common = 0
        while common < min(len(sections), len(open_sections)) and sections[common] == open_sections[common]:
            common += 1
        lines += [f"{'  ' * depth}{name}:" for depth, name in enumerate(sections) if depth >= common]
        lines.append(f"{'  ' * len(sections)}{last}: {value}")
        open_sections = sections
    return "\n".join(lines)


def begun(clusters: Sequence[Cluster]) -> list[str]:
    """Return the clusters that are neither in mode http nor at 0 percent."""
    return [each.name for each in clusters if each.seen and each.modes != ["http"] and each.percent != 0]


def advise(report: Report, steps: Sequence[float], form: str, target: Target, *, start: bool) -> int:
    """Print what to do and return the exit code: the change to standard output, all else to standard error."""
    verdict = report.verdict
    _say(headline(report), *(f"  {reason.decision.text:<8} {reason_line(reason)}" for reason in verdict.reasons))
    if verdict.decision is Decision.GO_BACK:
        _go_back(report, steps, form, target)
        return int(verdict.decision)
    running = begun(report.clusters) if start else []
    if running:
        _say(f"--start: {', '.join(running)} go by WebSocket already; leave it out")
        return int(Decision.WAIT)
    if verdict.decision is Decision.WAIT:
        return int(verdict.decision)
    current = 0 if start else verdict.percent or 0
    following = next_percent(current, steps)
    if following is None:
        _say("Every step is taken. docs/how-to/removal.md says when a shim can go.")
        return 0
    keys = {PERCENT: f"{following:g}", **({MODE: "websocket"} if start else {})}
    _say(f"Next step: {current:g} to {following:g} %. Apply this, and run the report again:")
    click.echo(change(keys, form, target, [each.name for each in report.clusters if each.seen]))
    return 0


def _go_back(report: Report, steps: Sequence[float], form: str, target: Target) -> None:
    """Print the change that takes the clusters back that are the reason; and the one for all to standard error."""
    clusters = report.verdict.clusters
    no_way = [each.name for each in report.clusters if each.http_fails]
    if no_way:
        _say(f"Careful: the vendor's HTTP API does not serve {', '.join(no_way)}: going back would not help there.")
    if form != "helm":
        _say(f"In the file of {', '.join(clusters)} alone:")
    click.echo(change({MODE: "http"}, form, target, clusters))
    previous = previous_percent(report.verdict.percent or 0, steps)
    keys = {MODE: "http"} if previous is None else {PERCENT: f"{previous:g}"}
    _say("To take all clusters one step back instead:")
    _say(change(keys, form, target, [each.name for each in report.clusters if each.seen]))


def _say(*lines: str) -> None:
    for line in lines:
        click.echo("\n".join(map(printable, line.split("\n"))), err=True)
