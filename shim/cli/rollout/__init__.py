"""`agent-shim rollout`: preview, report and next step of a rollout over many clusters."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click
import msgspec

from shim.cli.main import EXIT_USAGE
from shim.cli.rollout import placement, step
from shim.cli.rollout.placement import Lists
from shim.cli.rollout.report import Report, as_json, text
from shim.cli.rollout.sources import Source, collect, contexts_places, source_of, source_options
from shim.cli.rollout.verdict import judge
from shim.clock import Clock

STEPS = "10,50,100"
HOUR_S = 3_600.0


class _Group(click.Group):
    """A group in which faults on the command line exit with 64: 2, click's own code, would mean to go back."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the arguments; a fault in them exits with 64."""
        with _usage_exits_64():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a fault in its arguments exits with 64."""
        with _usage_exits_64():
            return super().invoke(ctx)


@contextmanager
def _usage_exits_64() -> Iterator[None]:
    try:
        yield
    except click.UsageError as error:
        vars(error)["exit_code"] = EXIT_USAGE
        raise


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
    lists = Lists(tuple(placement.checked(include)), tuple(placement.checked(exclude)))
    if contexts:
        found = contexts_places(contexts, namespace, timeout_s, percents, lists)
    else:
        given = placement.read_names(from_file) if from_file else placement.checked(names)
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
    target = step.Target(chart, release, source.terms.namespace, dict(source.access))
    sys.exit(step.advise(report, steps, form, target, start=start))
