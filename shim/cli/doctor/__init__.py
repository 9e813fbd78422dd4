"""`agent-shim doctor`: examine everything between this machine and a working shim, with a remedy for each fault.

It changes nothing, registers nothing upstream, and shows no secret.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from shim.cli.admin_client import given
from shim.cli.doctor.report import Finding, failed, passed, warned
from shim.cli.inject.missing_sidecars import agents, in_cluster
from shim.cli.inject.sidecar import InjectError
from shim.config import loader as configuration
from shim.config.warnings import find_warnings
from shim.errors import ConfigError
from shim.hosts import is_loopback
from shim.log import Redaction

if TYPE_CHECKING:
    from shim.cli.doctor.report import Report
_NAMED = 5


@click.command("doctor")
@click.option("--config", metavar="FILE", help="The shim's configuration; without it, defaults and environment.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="As given to `run`.")
@click.option("--token-file", metavar="FILE", help="Holds the token to examine instead of the configured one.")
@click.option("--admin-token-file", metavar="FILE", help="Holds the admin token; default: admin.token_file.")
@click.option(
    "--url",
    metavar="URL",
    help="The running shim's admin port, http://host:port; default: as configured. Without --config, --set and --pid"
    " the configuration that it works with is examined.",
)
@click.option("--pid", type=click.IntRange(1), help="Examine the configuration of this running `agent-shim run`.")
@click.option("--dial", is_flag=True, help="Try the WebSocket also while the running shim's link is online.")
@click.option(
    "--cluster", metavar="NAMESPACE", help="Also find agents without the shim, with kubectl; `all`: everywhere."
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(  # noqa: PLR0913, PLR0917 - one parameter per option
    config: str | None,
    sets: tuple[str, ...],
    token_file: str | None,
    admin_token_file: str | None,
    url: str | None,
    pid: int | None,
    dial: bool,
    cluster: str | None,
    as_json: bool,
) -> None:
    """Examine DNS, TCP, TLS, proxy, WebSocket, token, clock, ports, store and the running shim.

    The first line names the sources of the configuration. For a service with settings in its own environment (a systemd
    unit, a container) use --pid as root, or --url.

    Exit code 1 if a line says FAIL.
    """
    from shim.cli.doctor.report import Report

    if pid and (config or sets):
        raise click.UsageError("--pid has the configuration of the process: leave out --config and --set")
    report = Report(Redaction())
    remote = bool(url) and not (config or sets or pid)
    examine = _examine_remote if remote else _examine_given
    options = _Options(config, sets, token_file, admin_token_file, url, pid, dial)
    examine(options, report)
    if cluster:
        report.add(examine_cluster(cluster))
    click.echo(report.json() if as_json else "\n".join(report.lines()))
    sys.exit(0 if report.ok else 1)


@dataclass(frozen=True, slots=True)
class _Options:
    config: str | None
    sets: tuple[str, ...]
    token_file: str | None
    admin_token_file: str | None
    url: str | None
    pid: int | None
    dial: bool


def _examine_given(options: _Options, report: Report) -> None:
    """Examine the configuration of this command line, or of a process."""
    from shim.cli.doctor import runner, sources

    redaction = report.redaction
    try:
        if options.pid:
            source = sources.of_process(options.pid)
        else:
            source = sources.Sources(options.config, options.sets, os.environ)
        settings = source.load()
        path = options.admin_token_file or settings.admin.token_file
        admin_token = configuration.read_secret(path, "admin.token_file") if path else ""
    except ConfigError as error:
        report.add(runner.faults(error))
        return
    for secret in (*configuration.secrets(settings), admin_token):
        redaction.add(secret)
    shim = runner.find_running_shim(settings, given(options.url) if options.url else None, admin_token)
    found, token = runner.examine(settings, shim, options.token_file, source.environ, dial=options.dial)
    redaction.add(token)
    warnings = find_warnings(settings, source.environ, source.path)
    report.add(runner.configuration(source.describe(), settings, warnings))
    if shim.configuration:
        report.add(sources.compare(settings, shim.configuration))
    report.add(found)


def _examine_remote(options: _Options, report: Report) -> None:
    """Examine the configuration that a running shim works with, as its admin port shows it."""
    from shim.cli.doctor import runner, running_shim, sources

    host, port = given(options.url or "")
    try:
        path = options.admin_token_file
        admin_token = configuration.read_secret(path, "--admin-token-file") if path else ""
        report.redaction.add(admin_token)
        shim = running_shim.ask(host, port, admin_token)
        if not shim.configuration:
            unreadable = [sources.unreadable(shim.where)] if shim.answers else []
            report.add([*unreadable, *running_shim.examine(shim, must_run=True)])
            return
        settings = sources.of_running(shim.configuration)
    except ConfigError as error:
        report.add(runner.faults(error))
        return
    upstream = shim.configuration.get("upstream") or {}
    hidden = bool(upstream.get("token") or upstream.get("token_file"))
    found, token = runner.examine(
        settings,
        shim,
        options.token_file,
        os.environ,
        dial=options.dial,
        here=is_loopback(host),
        hidden_token=hidden,
    )
    report.redaction.add(token)
    report.add([*runner.configuration(f"the running shim on {shim.where}, as it is now", settings), *found])


def examine_cluster(namespace: str) -> list[Finding]:
    """Return one finding for all agents with a sidecar and one for each without; `all` selects every namespace."""
    try:
        pods = agents(in_cluster("" if namespace == "all" else namespace))
    except InjectError as error:
        return [failed("cluster", str(error), "doctor needs kubectl, and the right to list pods")]
    where = "the cluster" if namespace == "all" else f"namespace {namespace}"
    if not pods:
        return [warned("cluster", f"no agent's pod in {where}", "is it the namespace that the agent runs in?")]
    wrong = [pod for pod in pods if pod.fault]
    found = [
        failed("cluster", f"{p.namespace}/{p.name} {p.fault}", "docs/how-to/kubernetes.md") for p in wrong[:_NAMED]
    ]
    if len(wrong) > _NAMED:
        found.append(failed("cluster", f"and {len(wrong) - _NAMED} more", "`agent-shim inject --check` lists them all"))
    if not wrong:
        out = sum(pod.opted_out for pod in pods)
        found.append(passed("cluster", f"{len(pods) - out} agents in {where} have the shim, {out} opted out"))
    return found
