"""`agent-shim fleet`: simulated legacy agents against a shim or the vendor's legacy API, with a latency report."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import click

from devtools.agents import GENERATIONS, AgentProfile, Callbacks, Event, PollStyle, Pool
from devtools.controller.client import control_client
from devtools.fleet.command_load import CommandLoad
from devtools.fleet.report import Report, lines, report
from devtools.fleet.runner import Fleet, FleetPlan, FleetStats
from shim.clock import Clock
from shim.process import loop_factory

_REFRESH_S = 0.25
_GRACE_S = 5
_FILES_PER_AGENT = 3
_SECONDS = click.FloatRange(min=0, max=86_400)
_WARM_UP_S = 60
_INTERVAL = click.FloatRange(min=0.001, max=86_400)


def _url(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        try:
            Pool(value, lambda: 0.0)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return value


@click.command("fleet")
@click.option("--url", callback=_url, required=True, metavar="URL", help="Where the agents' legacy API is served.")
@click.option("--agents", type=click.IntRange(1, 100_000), default=10, show_default=True, help="How many.")
@click.option(
    "--dialect",
    type=click.Choice([*GENERATIONS, "mixed"]),
    default="mixed",
    show_default=True,
    help="Their dialect; mixed: one of each in turn.",
)
@click.option("--poll-interval", type=_SECONDS, default=5, show_default=True, help="Between polls, in s; 0: none.")
@click.option(
    "--poll-style",
    type=click.Choice([style.value for style in PollStyle]),
    default="ticker",
    show_default=True,
    help="Fixed rate, fixed pause after each answer, or one loop with the heartbeats.",
)
@click.option("--heartbeat-interval", type=_INTERVAL, help="In s; default: 5 or 30, as their generation does.")
@click.option("--tunnel-interval", type=_SECONDS, default=0, show_default=True, help="Tunnel polls, in s; 0: none.")
@click.option(
    "--duration",
    type=_INTERVAL,
    default=30,
    show_default=True,
    help="How long, in s, a warm-up not counted; Ctrl-C ends it earlier.",
)
@click.option("--spread", type=_SECONDS, help="Start them over so many s; default: one interval, at most a fifth.")
@click.option("--token", default="fleet", metavar="T", help="The agents' Bearer token.")
@click.option(
    "--token-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A file that holds it."
)
@click.option("--prefix", default="fleet", show_default=True, help="The agents' names begin with it.")
@click.option("--control", callback=_url, metavar="URL", help="Push commands through this development controller.")
@click.option("--control-token", default="", metavar="T", help="The Bearer token of its control API.")
@click.option(
    "--warm-up",
    type=_SECONDS,
    help=f"Push no commands in the first so many s, while polls are held briefly; default: {_WARM_UP_S}"
    " with --control, else 0.",
)
@click.option("--rate", type=click.FloatRange(0.001, 10_000), default=1, show_default=True, help="Commands a second.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, allow_dash=True), help="Write the report; - is stdout."
)
def command(**given: Any) -> None:
    """Run simulated legacy agents of every dialect and print a latency report.

    With --control it also measures commands: from the controller's send until the agent has received the command. That
    begins after a warm-up, because polls of an agent that has just appeared are held briefly at first.

    Exits with 1 if an agent was failing at the end, could not decode a reply, or a pushed command did not arrive.
    """
    plan = _plan(given)
    if given["control"] and not any(profile.drains for profile in plan.profiles):
        raise click.UsageError("agents that do not poll cannot be given commands")
    if given["warm_up"] is None:
        given["warm_up"] = _WARM_UP_S if given["control"] else 0
    if given["warm_up"] and given["json_file"] != "-":
        click.echo(f"warming up for {given['warm_up']:g} s, then measuring for {given['duration']:g} s", err=True)
    _allow_files(plan.agents)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        sys.exit(_publish(runner.run(_run(plan, given)), given["json_file"]))


def _publish(found: Report, json_file: str | None) -> int:
    """Print the report and return the exit code."""
    if json_file:
        with click.open_file(json_file, "w") as file:
            file.write(json.dumps(found.to_json()) + "\n")
    if json_file != "-":
        click.echo("\n".join(lines(found)))
    return 0 if found.good else 1


def _plan(given: dict[str, Any]) -> FleetPlan:
    dialects = list(GENERATIONS) if given["dialect"] == "mixed" else [given["dialect"]]
    profiles = tuple(
        AgentProfile(
            dialect=dialect,
            heartbeat_interval_s=given["heartbeat_interval"],
            poll_interval_s=given["poll_interval"] or None,
            poll_style=PollStyle(given["poll_style"]),
            tunnel_interval_s=given["tunnel_interval"] or None,
        )
        for dialect in dialects
    )
    spread_s = given["spread"]
    if spread_s is None:
        spread_s = min(given["duration"] / 5, max(profile.beat_s for profile in profiles))
    token = given["token_file"].read_text().strip() if given["token_file"] else given["token"]
    return FleetPlan(
        url=given["url"],
        agents=given["agents"],
        profiles=profiles,
        token=token,
        prefix=given["prefix"],
        spread_s=spread_s,
    )


def _allow_files(agents: int) -> None:
    """Raise the limit of open files as far as permitted, and warn if that does not suffice."""
    wanted = agents * _FILES_PER_AGENT + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        click.echo(f"warning: only {allowed} open files are allowed here, {wanted} may be needed", err=True)


async def _run(plan: FleetPlan, given: dict[str, Any]) -> Report:
    clock, tally, stop = Clock(), FleetStats(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    start_s = clock.monotonic_s()
    async with _pusher(given, clock) as pusher:
        herd = Fleet(plan, clock, _callbacks(tally, pusher))
        over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(herd.run(over))
            progress = group.create_task(_show(tally, pusher, plan.agents, given["warm_up"] + given["duration"]))
            await _until(stop, given, herd, pusher)
            over.set()
            progress.cancel()
        return report(clock.monotonic_s() - start_s, herd.agents, tally, pusher, given["warm_up"])


def _callbacks(tally: FleetStats, pusher: CommandLoad | None) -> Callbacks:
    if pusher is None:
        return Callbacks(event=tally.record)

    def record(event: Event) -> None:
        tally.record(event)
        pusher.record(event)

    return Callbacks(event=record, call=pusher.call)


@asynccontextmanager
async def _pusher(given: dict[str, Any], clock: Clock) -> AsyncIterator[CommandLoad | None]:
    if not given["control"]:
        yield None
        return
    async with control_client(given["control"].removesuffix("/control"), given["control_token"]) as control:
        yield CommandLoad(control, clock)


async def _until(stop: asyncio.Event, given: dict[str, Any], herd: Fleet, pusher: CommandLoad | None) -> None:
    """Return when the time is over or `stop` is set; commands in transit get the duration of one poll to arrive."""
    async with asyncio.TaskGroup() as group:
        pushing = group.create_task(_push(given, herd, pusher)) if pusher else None
        try:
            async with asyncio.timeout(given["warm_up"] + given["duration"]):
                await stop.wait()
        except TimeoutError:
            pass
        if pusher and pushing:
            pushing.cancel()
            await pusher.settle(_GRACE_S + 2 * given["poll_interval"])


async def _push(given: dict[str, Any], herd: Fleet, pusher: CommandLoad) -> None:
    """Push commands after the warm-up, in which the shim learns how long it may hold the agents' polls."""
    await asyncio.sleep(given["warm_up"])
    await pusher.run(herd.agents, given["rate"], given["duration"])


async def _show(tally: FleetStats, pusher: CommandLoad | None, agents: int, duration_s: float) -> None:
    """Show a progress bar on a terminal if rich is installed; otherwise print nothing."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ModuleNotFoundError:
        return
    console = Console(stderr=True)
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=duration_s)
        while True:
            text = f"{len(tally.alive)}/{agents} agents, {tally.counts.total()} events, {len(tally.failing())} failing"
            if pusher:
                text += f", {pusher.answered}/{pusher.pushed} commands"
            progress.update(task, completed=progress.tasks[0].elapsed, description=text)
            await asyncio.sleep(_REFRESH_S)
