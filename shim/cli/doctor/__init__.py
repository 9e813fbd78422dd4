"""`agent-shim doctor`: examine everything between this machine and a working shim, with a remedy for each fault.

It changes nothing, registers nothing upstream, and shows no secret. The functions are in the order of the examination:
configuration, machine, path to the controller, running shim.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Mapping

import click

from shim.cli import kubectl, threads
from shim.cli.admin_client import given, reachable
from shim.cli.doctor import host, running_shim, sources
from shim.cli.doctor.report import Finding, Report, Status, failed, passed, warned
from shim.cli.doctor.running_shim import RunningShim
from shim.cli.doctor.sources import Sources
from shim.cli.doctor.way import (
    Dial,
    ask,
    ask_time_unverified,
    dial_websocket,
    judge_clock,
    judge_fallback,
    judge_frames,
    judge_token,
    judge_upgrade,
    judge_way,
)
from shim.cli.inject.missing_sidecars import agents
from shim.clock import Clock
from shim.config import loader
from shim.config.rules import is_past
from shim.config.settings import Settings, Upstream
from shim.config.warnings import find_warnings
from shim.core.text import plural
from shim.errors import ConfigError
from shim.hosts import is_loopback
from shim.protocol.http import fallback_url, origin_of, under, ws_url
from shim.redaction import Redaction

KUBECTL_S = 20.0
_NAMED = 5
_REFUSED = (401, 403)


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
    if pid and (config or sets):
        raise click.UsageError("--pid has the configuration of the process: leave out --config and --set")
    report, admin = Report(Redaction()), given(url) if url else None
    try:
        if admin is not None and not (config or sets or pid):
            _examine_remote(report, *admin, token_file, admin_token_file, dial=dial)
        else:
            source = sources.of_process(pid) if pid else Sources(config, sets, os.environ)
            _examine_given(report, source, admin, token_file, admin_token_file, dial=dial)
    except ConfigError as error:
        report.add(
            failed("config", str(fault), "docs/reference/configuration.md describes each key") for fault in error.faults
        )
    if cluster:
        report.add(examine_cluster(cluster))
    click.echo(report.json() if as_json else "\n".join(report.lines()))
    sys.exit(0 if report.ok else 1)


def _examine_given(
    report: Report,
    source: Sources,
    admin: tuple[str, int] | None,
    token_file: str | None,
    admin_token_file: str | None,
    *,
    dial: bool,
) -> None:
    """Examine the configuration of this command line, or of a process. Raises `ConfigError`.

    `admin` is the address of the admin port, if it is not the configured one.
    """
    settings = source.load()
    path = admin_token_file or settings.admin.token_file
    admin_token = loader.read_secret(path, "admin.token_file") if path else ""
    for secret in (*loader.secrets(settings), admin_token):
        report.redaction.add(secret)
    address, port = admin or (reachable(settings.admin.hosts[0]), settings.admin.port)
    shim = running_shim.ask(address, port, admin_token) if port else RunningShim(f"{address}:0")
    found, token = examine(settings, shim, token_file, source.environ, dial=dial)
    report.redaction.add(token)
    report.add(
        describe_configuration(source.describe(), settings, find_warnings(settings, source.environ, source.path))
    )
    if shim.configuration:
        report.add(sources.compare(settings, shim.configuration))
    report.add(found)


def _examine_remote(
    report: Report, address: str, port: int, token_file: str | None, admin_token_file: str | None, *, dial: bool
) -> None:
    """Examine the configuration that a running shim works with, as its admin port shows it. Raises `ConfigError`."""
    admin_token = loader.read_secret(admin_token_file, "--admin-token-file") if admin_token_file else ""
    report.redaction.add(admin_token)
    shim = running_shim.ask(address, port, admin_token)
    if not shim.configuration:
        unreadable = [sources.unreadable(shim.where)] if shim.answers else []
        report.add([*unreadable, *running_shim.examine(shim, must_run=True)])
        return
    settings = sources.of_running(shim.configuration)
    upstream = shim.configuration.get("upstream") or {}
    found, token = examine(
        settings,
        shim,
        token_file,
        os.environ,
        dial=dial,
        here=is_loopback(address),
        hidden_token=bool(upstream.get("token") or upstream.get("token_file")),
    )
    report.redaction.add(token)
    report.add([*describe_configuration(f"the running shim on {shim.where}, as it is now", settings), *found])


def describe_configuration(where: str, settings: Settings, warnings: Iterable[str] = ()) -> list[Finding]:
    """Return the findings on the configuration: its sources and its warnings."""
    todo = "docs/reference/configuration.md describes each key and where values come from"
    doubtful = [warned("config", warning, todo) for warning in warnings]
    if settings.mode != "http":
        return [passed("config", f"{where}: mode {settings.mode}"), *doubtful]
    if is_past(settings.sunset, Clock().wall_s()):
        return [passed("config", f"{where}: mode http, which is as websocket since sunset.at"), *doubtful]
    api = origin_of(fallback_url(settings))
    text = f"{where}: mode http, agents are served by the vendor's HTTP API at {api}"
    return [warned("config", text, "the WebSocket side is examined as well: it is the way to go on to"), *doubtful]


def examine(
    settings: Settings,
    shim: RunningShim,
    token_file: str | None,
    environ: Mapping[str, str],
    *,
    dial: bool,
    here: bool = True,
    hidden_token: bool = False,
) -> tuple[list[Finding], str]:
    """Return the findings on everything after the configuration, and the token that was used, to be masked.

    Without `here` the shim runs on another machine, so ports and store cannot be examined. `hidden_token` is true if
    the configuration came from the admin port, which shows no secret.
    """
    found = examine_machine(settings, shim) if here else []
    try:
        if hidden_token and not token_file:
            raise ConfigError([])
        token = loader.read_secret(token_file, "--token-file") if token_file else loader.read_token(settings)
    except ConfigError as error:
        todo = "the file must exist, be readable for the shim's user, and hold one word"
        untested = sources.unknown_token() if hidden_token else failed("token", str(error), todo)
        # the path up to the handshake needs no token, and may have a fault of its own
        way = threads.run(_examine_network(settings, "", environ, quiet=True))
        found += [finding for finding in way if finding.check not in ("upgrade", "token")]
        return [*found, untested, *running_shim.examine(shim)], ""
    quiet = not dial and not token_file and shim.is_online(settings)
    found += threads.run(_examine_network(settings, token, environ, quiet=quiet))
    return [*found, *running_shim.examine(shim)], token


def examine_machine(settings: Settings, shim: RunningShim) -> list[Finding]:
    """Return the findings on ports and store."""
    store = settings.store
    kept = host.examine_database(store) if store.url else host.examine_store(store, shim)
    return [
        *(host.examine_port("listen", name, settings.listen.port, shim) for name in settings.listen.hosts),
        *(host.examine_port("admin", name, settings.admin.port, shim) for name in settings.admin.hosts),
        *kept,
    ]


async def examine_way(settings: Settings, token: str, environ: Mapping[str, str], *, quiet: bool) -> list[Finding]:
    """Return the findings on the path to the controller.

    With `quiet` no handshake is tried: the link of a running shim proves that it succeeds.
    """
    upstream = settings.upstream
    if quiet:
        dial = await ask(ws_url(upstream.url, upstream.path).partition("?")[0], upstream.dialling, environ)
        found = judge_way(dial)
        if _blocked(found):
            return found
        online = "not tried: the running shim's link is online (--dial tries it all the same)"
        return [*found, passed("upgrade", online), passed("token", online), judge_clock(dial.trace.headers)]
    dials: list[tuple[str, Dial]] = []
    for way, in_header, in_query in _ways(upstream, token):
        dial = await dial_websocket(upstream, token, environ, in_header=in_header, in_query=in_query)
        dials.append((way, dial))
        if dial.failure is None or dial.failure.status not in _REFUSED:
            break
    last = dials[-1][1]
    found = judge_way(last)
    if _blocked(found):
        if found[-1].check == "tls":
            found.append(judge_clock((await ask_time_unverified(upstream, environ)).trace.headers))
        return found
    found += [judge_upgrade(last), judge_token(dials, given=bool(token)), *judge_frames(last)]
    return [*found, judge_clock(last.trace.headers)]


def _blocked(found: list[Finding]) -> bool:
    """Return True if the path failed before any response arrived."""
    return found[-1].status is Status.FAIL


def _ways(upstream: Upstream, token: str) -> tuple[tuple[str, bool, bool], ...]:
    """Return the ways in which the shim presents the token, in the order of trying: (name, in header, in query)."""
    header, query = ("header", True, False), ("query", False, True)
    match upstream.auth:
        case "auto":
            return (header, query) if token else (header,)
        case "query":
            return (query,)
        case "both":
            return (("header and the query", True, True),)
        case _:
            return (header,)


async def examine_fallback(settings: Settings, environ: Mapping[str, str]) -> list[Finding]:
    """Return the findings on the vendor's HTTP API, which a rollback needs. Nothing if it is not used."""
    if not settings.uses_fallback:
        return []
    if is_past(settings.sunset, Clock().wall_s()):
        return [passed("fallback", "not asked: sunset.at has passed, and no call goes there any longer")]
    dialling = settings.fallback.dialling(settings.upstream)
    url = under(fallback_url(settings), "/api/v1/health")
    return [judge_fallback(await ask(url, dialling, environ, name="fallback"))]


async def _examine_network(settings: Settings, token: str, environ: Mapping[str, str], *, quiet: bool) -> list[Finding]:
    # The dialler logs its path; doctor prints it in lines of its own.
    logger, silence = logging.getLogger("shim"), logging.NullHandler()
    logger.addHandler(silence)
    try:
        way = await examine_way(settings, token, environ, quiet=quiet)
        return way + await examine_fallback(settings, environ)
    finally:
        logger.removeHandler(silence)


def examine_cluster(namespace: str) -> list[Finding]:
    """Return one finding for all agents with a sidecar and one for each without; `all` selects every namespace."""
    terms = kubectl.Terms(namespace, KUBECTL_S, threads.Interruption())
    try:
        pods = agents(kubectl.pods(terms))
    except click.ClickException as error:
        return [failed("cluster", str(error), "doctor needs kubectl, and the right to list pods")]
    where = "the cluster" if namespace == kubectl.ALL else terms.where
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
        found.append(passed("cluster", f"{plural(len(pods) - out, 'agent')} with the shim in {where}, {out} opted out"))
    return found
