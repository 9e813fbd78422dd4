"""The examination in its order: configuration, machine, path to the controller, running shim."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from shim.cli import threads
from shim.cli.admin_client import reachable
from shim.cli.doctor import host, running_shim, sources
from shim.cli.doctor.report import Finding, Status, failed, passed, warned
from shim.cli.doctor.running_shim import RunningShim
from shim.cli.doctor.way import (
    Dial,
    ask_head,
    ask_time_unverified,
    dial_websocket,
    judge_clock,
    judge_fallback,
    judge_frames,
    judge_token,
    judge_upgrade,
    judge_way,
)
from shim.config import loader
from shim.config.settings import Settings, Upstream
from shim.errors import ConfigError
from shim.protocol.http import fallback_url, origin_of, under, ws_url

_REFUSED = (401, 403)


def find_running_shim(settings: Settings, admin: tuple[str, int] | None, token: str) -> RunningShim:
    """Query the shim whose admin port is given by the configuration, or by `admin`."""
    host, port = admin or (reachable(settings.admin.hosts[0]), settings.admin.port)
    return running_shim.ask(host, port, token) if port else RunningShim(f"{host}:0")


def examine_machine(settings: Settings, shim: RunningShim) -> list[Finding]:
    """Return the findings on ports and store."""
    store = settings.store
    kept = host.examine_database(store) if store.url else host.examine_store(store, shim)
    return [
        *(host.examine_port("listen", name, settings.listen.port, shim) for name in settings.listen.hosts),
        *(host.examine_port("admin", name, settings.admin.port, shim) for name in settings.admin.hosts),
        *kept,
    ]


def upstream_token(settings: Settings, token_file: str | None) -> str:
    """Return the token to examine, `""` if agents bring their own. Raises `ConfigError`."""
    return loader.read_secret(token_file, "--token-file") if token_file else loader.read_token(settings)


async def examine_way(settings: Settings, token: str, environ: Mapping[str, str], *, quiet: bool) -> list[Finding]:
    """Return the findings on the path to the controller.

    With `quiet` no handshake is tried: the link of a running shim proves that it succeeds.
    """
    upstream = settings.upstream
    if quiet:
        dial = await ask_head(ws_url(upstream.url, upstream.path).partition("?")[0], upstream.dialling, environ)
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
    dialling = settings.fallback.dialling(settings.upstream)
    url = under(fallback_url(settings), "/api/v1/health")
    return [judge_fallback(await ask_head(url, dialling, environ, name="fallback"))]


async def _examine_network(settings: Settings, token: str, environ: Mapping[str, str], *, quiet: bool) -> list[Finding]:
    # The dialler logs its path; doctor prints it in lines of its own.
    logger, silence = logging.getLogger("shim"), logging.NullHandler()
    logger.addHandler(silence)
    try:
        way = await examine_way(settings, token, environ, quiet=quiet)
        return way + await examine_fallback(settings, environ)
    finally:
        logger.removeHandler(silence)


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
        token = upstream_token(settings, token_file)
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


def faults(error: ConfigError) -> list[Finding]:
    """Return the findings on a configuration that cannot be used."""
    return [
        failed("config", str(fault), "docs/reference/configuration.md describes each key") for fault in error.faults
    ]


def configuration(where: str, settings: Settings, warnings: Iterable[str] = ()) -> list[Finding]:
    """Return the findings on the configuration: its sources and its warnings."""
    todo = "docs/reference/configuration.md describes each key and where values come from"
    doubtful = [warned("config", warning, todo) for warning in warnings]
    if settings.mode != "http":
        return [passed("config", f"{where}: mode {settings.mode}"), *doubtful]
    api = origin_of(fallback_url(settings))
    text = f"{where}: mode http, agents are served by the vendor's HTTP API at {api}"
    return [warned("config", text, "the WebSocket side is examined as well: it is the way to go on to"), *doubtful]
