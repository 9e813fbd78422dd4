"""`agent-shim rollout`: preview, report and next step of a rollout over many clusters."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import click
import msgspec

from shim.cli.rollout import placement
from shim.cli.rollout.cluster import Cluster
from shim.cli.rollout.report import Report, as_json, headline, reason_line, text
from shim.cli.rollout.sources import Source, collect, contexts_places, source_of, source_options
from shim.cli.rollout.verdict import Decision, judge
from shim.cli.threads import is_interrupt
from shim.clock import Clock
from shim.config.settings import Rollout
from shim.core.text import printable
from shim.errors import EXIT_USAGE

STEPS = "10,50,100"
HOUR_S = 3_600.0


class _Group(click.Group):
    """A group in which a failure without a verdict exits with 64: click's own codes, 1 and 2, are verdicts here."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the arguments; a fault in them exits with 64."""
        with _failures_exit_64():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a failure that leaves no verdict exits with 64."""
        with _failures_exit_64():
            return super().invoke(ctx)


@contextmanager
def _failures_exit_64() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # click would exit with 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is left in the buffer, which Python writes at its end
        raise click.exceptions.Exit(EXIT_USAGE) from None
    except (click.ClickException, OSError) as error:  # `shim.cli.main` and click read the code
        vars(error)["exit_code"] = EXIT_USAGE
        raise
    except (KeyboardInterrupt, RuntimeError) as error:  # click would exit with 1
        if not is_interrupt(error):
            raise
        click.echo("Aborted!", err=True)
        raise click.exceptions.Exit(EXIT_USAGE) from None


@click.group("rollout", cls=_Group)
def command() -> None:
    """Move many clusters: which are in at which step, may the next step be taken, and which change it is."""


def _percents(_: click.Context, __: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        steps = tuple(sorted({float(each) for each in value.split(",")}))
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of numbers like {STEPS}") from None
    if not all(0 <= each <= 100 for each in steps):
        raise click.BadParameter("a percentage is between 0 and 100")
    return steps


@command.command("preview")
@click.argument("names", nargs=-1)
@click.option("--from-file", metavar="FILE", help="Names, one a line; - is standard input.")
@click.option("--contexts", metavar="A,B", help="Ask the shims in these contexts for their agents' names.")
@click.option("--percent", "percents", metavar="N[,N…]", default=STEPS, show_default=True, callback=_percents)
@click.option("--include", multiple=True, metavar="NAME", help="As rollout.include; may be repeated.")
@click.option("--exclude", multiple=True, metavar="NAME", help="As rollout.exclude; may be repeated.")
@click.option("--namespace", default="pipeops-system", show_default=True, help="With --contexts; `all`: every one.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(1, 600), default=30, show_default=True, metavar="S")
@click.option("--json", "as_json_", is_flag=True, help="Print JSON.")
def preview_command(  # noqa: PLR0913, PLR0917 - one for each option
    names: tuple[str, ...],
    from_file: str | None,
    contexts: str | None,
    percents: tuple[float, ...],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    namespace: str,
    timeout_s: float,
    as_json_: bool,
) -> None:
    """Show which clusters are in at which percentage, by the hash that every shim uses."""
    if sum(map(bool, (names, from_file, contexts))) != 1:
        raise click.UsageError("give either NAMES, --from-file or --contexts")
    lists = Rollout(include=tuple(placement.checked(include)), exclude=tuple(placement.checked(exclude)))
    if contexts:
        found = contexts_places(contexts, namespace, timeout_s, percents, lists)
    else:
        given = placement.read_cluster_names(from_file) if from_file else placement.checked(names)
        if not given:
            raise click.ClickException(f"{from_file or 'the command line'} names no cluster")
        found = placement.places(given, percents, lists)
    click.echo(json.dumps(msgspec.to_builtins(found), indent=2) if as_json_ else placement.table(found, percents))
    if any(each.problem for each in found):
        sys.exit(1)


def _report(source: Source, observe_h: float, *, start: bool = False) -> Report:
    clusters, faults = collect(source)
    now = Clock().wall_s()
    return Report(clusters, judge(clusters, now, observe_h * HOUR_S, faults, start=start), now)


_observe = click.option(
    "--observe",
    "observe_h",
    type=click.FloatRange(0, 720),
    default=24,
    show_default=True,
    metavar="HOURS",
    help="How long a step is watched before the next one.",
)


@command.command("report")
@source_options
@_observe
@click.option("--json", "form", flag_value="json", help="Print JSON.")
@click.option("--html", "form", flag_value="html", help="Print one self-contained HTML page.")
def report_command(form: str | None, observe_h: float, **options: Any) -> NoReturn:
    """Show every cluster and the verdict. Exit code 0: go on, 1: wait, 2: go back."""
    report = _report(source_of(**options), observe_h)
    match form:
        case "json":
            click.echo(json.dumps(as_json(report), indent=2))
        case "html":
            from shim.cli.rollout.report import page

            click.echo(page(report).encode(), nl=False)
        case _:
            click.echo(text(report))
    sys.exit(int(report.verdict.decision))


@command.command("step")
@source_options
@_observe
@click.option("--steps", metavar="N,N,…", default=STEPS, show_default=True, callback=_percents)
@click.option("--start", is_flag=True, help="Begin the canary, or begin it again, while every cluster is in mode http.")
@click.option(
    "--as",
    "form",
    type=click.Choice(["values", "helm", "config"]),
    default="values",
    show_default=True,
    help="values: of the chart; helm: commands; config: the shim's own file.",
)
@click.option("--chart", default="helm/agent-shim", show_default=True, help="With --as helm.")
@click.option("--release", default="agent-shim", show_default=True, help="With --as helm.")
def step_command(
    observe_h: float, steps: tuple[float, ...], start: bool, form: str, chart: str, release: str, **options: Any
) -> NoReturn:
    """Print the change for the next step, and change nothing.

    Exit code 0: the change is on standard output. 1: wait, nothing is printed there. 2: go back, standard output has
    the change that does. What it means is on standard error.
    """
    source = source_of(**options)
    report = _report(source, observe_h, start=start)
    target = Target(chart, release, source.terms.namespace, dict(source.access))
    sys.exit(advise(report, steps, form, target, start=start))


# --- the next step, as a change for people or pipelines to apply ------------------------------------------------------

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
    return [each.name for each in clusters if each.seen and not each.all_by_http and each.percent != 0]


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
    names = [each.name for each in report.clusters if each.seen]
    if form != "helm" and not start and not _mode(report):
        _say("The modes differ or are unknown, and the change has none: if it replaces a file, keep the mode there.")
    if following is None:
        last = f"--steps ends at {current:g} %: name the next one there."
        _say("Every step is taken. docs/how-to/removal.md says when a shim can go." if current >= 100 else last)
        # Often the output replaces the file of the step before: an empty one would take the mode out of it.
        if form != "helm":
            click.echo(change({PERCENT: f"{current:g}", **_mode(report)}, form, target, names))
        return 0
    keys = {PERCENT: f"{following:g}", **({MODE: "websocket"} if start else _mode(report))}
    _say(f"Next step: {current:g} to {following:g} %. Apply this, and run the report again:")
    click.echo(change(keys, form, target, names))
    return 0


def _mode(report: Report) -> dict[str, str]:
    """Return the mode of all clusters as a key of the change, nothing if they differ.

    With it each change is complete: it may replace the one before, in a file as well.
    """
    modes = {mode for each in report.clusters for mode in each.modes}
    return {MODE: modes.pop()} if len(modes) == 1 else {}


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
    keys = {MODE: "http"} if previous is None else {PERCENT: f"{previous:g}", **_mode(report)}
    _say("To take all clusters one step back instead:")
    _say(change(keys, form, target, [each.name for each in report.clusters if each.seen]))


def _say(*lines: str) -> None:
    for line in lines:
        click.echo("\n".join(map(printable, line.split("\n"))), err=True)
