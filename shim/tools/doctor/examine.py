"""The examination in its order: configuration, machine, the way to the controller, the running shim."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec

from shim import config
from shim.errors import ConfigError
from shim.settings import Settings, Upstream
from shim.tools.admin_address import reachable
from shim.tools.doctor import machine, running
from shim.tools.doctor.findings import Finding, failed, passed, warned
from shim.tools.doctor.handshake import Answer, ask, ask_time, judge_clock, judge_token, judge_upgrade, ping
from shim.tools.doctor.network import Blocked, Target, connect, target_of
from shim.tools.doctor.running import Running

_UPGRADED = 101
_REFUSED = (401, 403)


def running_shim(settings: Settings, admin: tuple[str, int] | None, token: str) -> Running:
    """What the shim says that listens where the configuration, or `admin`, says."""
    host, port = admin or (reachable(settings.admin.host), settings.admin.port)
    return running.ask(host, port, token) if port else Running(f"{host}:0")


def examine_machine(settings: Settings, shim: Running) -> list[Finding]:
    """Ports and store."""
    store = settings.store
    kept = machine.examine_store(store, shim)
    return [
        machine.examine_port("listen", settings.listen.host, settings.listen.port, shim),
        machine.examine_port("admin", settings.admin.host, settings.admin.port, shim),
        *kept,
    ]


def upstream_token(settings: Settings, token_file: str | None) -> str:
    """The token to examine, `""` where agents bring their own. Raises `ConfigError`."""
    return config.read_secret(token_file, "--token-file") if token_file else config.read_token(settings)


async def examine_way(settings: Settings, token: str, environ: Mapping[str, str], *, quiet: bool) -> list[Finding]:
    """The way to the controller. With `quiet` no handshake is tried: a running shim's link proves it already."""
    found: list[Finding] = []
    upstream = settings.upstream
    try:
        target = target_of(upstream, environ)
        answers, line_found = await _handshakes(target, upstream, token, found, quiet=quiet)
    except Blocked as blocked:
        found.append(blocked.finding)
        if blocked.finding.check == "tls":
            found.append(await _clock_behind(upstream, environ))
        return found
    found += line_found
    found.append(judge_clock(next((answer for _, answer in answers if answer is not None), None)))
    return found


async def _handshakes(
    target: Target, upstream: Upstream, token: str, found: list[Finding], *, quiet: bool
) -> tuple[list[tuple[str, Answer | None]], list[Finding]]:
    """Dial as the shim does, one way to present the token after the other; (way, answer) and what they mean."""
    if quiet:
        line = await connect(target, upstream, found)
        try:
            answer = await ask_time(line, target, upstream)
        finally:
            await line.close()
        online = "not tried: the running shim's link is online (--dial tries it all the same)"
        return [("", answer)], [passed("upgrade", online), passed("token", online)]
    answers: list[tuple[str, Answer | None]] = []
    frames: list[Finding] = []
    for way in _ways(upstream, token):
        line = await connect(target, upstream, found if not answers else [])
        try:
            answer = await ask(line, target, upstream, token, query=way == "query")
            answers.append((way, answer))
            if answer is not None and answer.status == _UPGRADED:
                frames.append(await ping(line, upstream.connect_timeout_s))
        finally:
            await line.close()
        if answer is None or answer.status not in _REFUSED:
            break
    return answers, [judge_upgrade(answers[-1][1]), judge_token(answers, given=bool(token)), *frames]


def _ways(upstream: Upstream, token: str) -> tuple[str, ...]:
    if not token:
        return ("header",)
    match upstream.auth:
        case "auto":
            return ("header", "query")
        case "query":
            return ("query",)
        case _:
            return ("header",)


async def _clock_behind(upstream: Upstream, environ: Mapping[str, str]) -> Finding:
    """The clocks where a certificate is refused: a wrong clock makes good ones look expired.

    The certificate is not checked for that, and nothing is said but a request without a name or a token.
    """
    unchecked = msgspec.structs.replace(upstream, insecure_skip_verify=True)
    try:
        target = target_of(unchecked, environ)
        line = await connect(target, unchecked, [])
    except Blocked:
        return judge_clock(None)
    try:
        return judge_clock(await ask_time(line, target, unchecked))
    finally:
        await line.close()


async def examine_fallback(settings: Settings, environ: Mapping[str, str]) -> list[Finding]:
    """Whether the vendor's HTTP API, to which one may have to go back, can be reached."""
    url = settings.fallback.url
    if not url:
        return []
    plain = Upstream(url=url, path="/api/v1/health", allow_insecure=True)
    try:
        target = target_of(plain, environ)
        line = await connect(target, plain, [])
    except Blocked as blocked:
        finding = blocked.finding
        return [failed("fallback", f"{finding.check}: {finding.text}", finding.todo)]
    try:
        answer = await ask_time(line, target, plain)
    finally:
        await line.close()
    if answer is None or answer.status >= 500:
        said = "no answer" if answer is None else f"HTTP {answer.status}"
        return [failed("fallback", f"{target.host}: {said}", "modes http and auto need it: is fallback.url right?")]
    if answer.status == 410:
        return [warned("fallback", f"{target.host}: gone (HTTP 410)", "its sunset is over: there is no way back")]
    return [passed("fallback", f"{target.host} answers (HTTP {answer.status})")]


async def _examine_network(settings: Settings, token: str, environ: Mapping[str, str], *, quiet: bool) -> list[Finding]:
    way = await examine_way(settings, token, environ, quiet=quiet)
    return way + await examine_fallback(settings, environ)


def examine(
    settings: Settings, shim: Running, token_file: str | None, environ: Mapping[str, str], *, dial: bool
) -> tuple[list[Finding], str]:
    """Everything after the configuration; the token that was used comes along, to be masked."""
    found = examine_machine(settings, shim)
    try:
        token = upstream_token(settings, token_file)
    except ConfigError as error:
        todo = "the file must exist, be readable for the shim's user, and hold one word"
        # the way up to the handshake needs no token, and may have a fault of its own
        way = asyncio.run(_examine_network(settings, "", environ, quiet=True))
        found += [finding for finding in way if finding.check not in ("upgrade", "token")]
        return [*found, failed("token", str(error), todo), *running.examine(shim)], ""
    quiet = not dial and not token_file and shim.is_online(settings)
    found += asyncio.run(_examine_network(settings, token, environ, quiet=quiet))
    return [*found, *running.examine(shim)], token


def faults(error: ConfigError) -> list[Finding]:
    """A configuration that cannot be used."""
    return [failed("config", str(fault), "docs/configuration.md describes each key") for fault in error.faults]


def configuration(path: str | None, settings: Settings) -> Finding:
    """What is examined."""
    where = path or "defaults and environment"
    if settings.mode != "http":
        return passed("config", f"{where}: mode {settings.mode}")
    return warned("config", f"{where}: mode http, agents are served by fallback.url", "the WebSocket side is examined")
