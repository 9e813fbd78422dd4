"""The path to the controller: dials with the shim's own dialler, and the findings on each of their steps.

Nothing is registered: a WebSocket is closed after one ping, and the request for the time carries no identity. The
findings are in the order of the connection: name, proxy, TCP, TLS, upgrade, token, frames and clock.
"""

from __future__ import annotations

import asyncio
import secrets
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from urllib.parse import urlsplit

import msgspec

from shim.cli.doctor.report import Finding, Status, failed, passed, warned
from shim.clock import Clock
from shim.config.settings import DialSettings, Upstream
from shim.core.backoff import CloseMeaning, close_meaning
from shim.core.text import printable
from shim.hosts import is_loopback
from shim.ports import DialFailure, DialRequest, WebSocket
from shim.protocol.http import host_of, http_url, origin_of, ws_url
from shim.protocol.upstream_message import Message
from shim.redaction import without_secrets
from shim.upstream import AiohttpUpstream, Dialler, DialTrace, failure_of
from shim.upstream.dial_errors import PROXY_UNREACHED, UNANSWERED

FRAMES_LOST = -1.0
FRAMES_CLOSED = -2.0
CLOSE_WAIT_S = 0.3


@dataclass(slots=True)
class Dial:
    """One dial: its target, the steps that were observed, and its error, if any.

    `pong_s` is the duration of a ping, `FRAMES_LOST` or `FRAMES_CLOSED` without a pong, `None` if no ping was sent.
    `close_code` and `close_reason`, without secrets, are those of a close frame received meanwhile.
    """

    url: str = field(repr=False)
    settings: DialSettings = field(repr=False)
    trace: DialTrace = field(default_factory=DialTrace)
    failure: DialFailure | None = None
    pong_s: float | None = None
    close_code: int | None = None
    close_reason: str = ""


class _Frames:
    """Implementation of `ports.WebSocketListener` that waits for the pong to one ping."""

    def __init__(self) -> None:
        self.payload = secrets.token_bytes(8)
        self.ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.closed: asyncio.Future[tuple[int, str] | None] = asyncio.get_running_loop().create_future()

    def has_room(self) -> bool:
        """Return True: the probe reads everything."""
        return True

    def on_message(self, message: Message) -> None:
        """Ignore a message."""

    def on_bad_frame(self, kind: str) -> None:
        """Ignore a frame that is no message."""

    def on_frame(self) -> None:
        """Ignore the arrival of a frame."""

    def on_pong(self, payload: bytes) -> None:
        """End the wait if this is the pong to the ping of the probe."""
        if payload == self.payload:
            self._end(True)

    def on_closed(self, by_close_frame: bool, code: int, reason: str = "") -> None:
        """End the wait, and keep code and reason of a close frame."""
        if not self.closed.done():
            self.closed.set_result((code, reason) if by_close_frame else None)
        self._end(False)

    def _end(self, ponged: bool) -> None:
        if not self.ended.done():
            self.ended.set_result(ponged)


async def dial_websocket(
    upstream: Upstream, token: str, environ: Mapping[str, str], *, in_header: bool, in_query: bool
) -> Dial:
    """Open the link's WebSocket, send a ping, and close."""
    dial = Dial(ws_url(upstream.url, upstream.path), upstream.dialling)
    frames = _Frames()
    outcome: asyncio.Future[WebSocket | DialFailure] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as group:
        port = AiohttpUpstream(
            upstream, lambda name, coro: group.create_task(coro, name=name), environ=environ, trace=dial.trace
        )
        port.dial(DialRequest(dial.url, token, in_header, in_query), frames, outcome.set_result)
        opened = await outcome
        if isinstance(opened, DialFailure):
            dial.failure = opened
        else:
            dial.pong_s = await _ping(opened, frames, upstream.connect_timeout_s)
            # A controller that checks the token after the handshake closes a moment later.
            await asyncio.wait((frames.closed,), timeout=CLOSE_WAIT_S)
            if frames.closed.done() and (closed := frames.closed.result()) is not None:
                dial.close_code, dial.close_reason = closed[0], printable(without_secrets(closed[1], token))
        await port.close()
    return dial


async def _ping(socket: WebSocket, frames: _Frames, timeout_s: float) -> float:
    clock = Clock()
    before = clock.monotonic_s()
    socket.ping(frames.payload)
    try:
        async with asyncio.timeout(timeout_s):
            ponged = await asyncio.shield(frames.ended)
    except TimeoutError:
        return FRAMES_LOST
    return clock.monotonic_s() - before if ponged else FRAMES_CLOSED


async def ask(url: str, settings: DialSettings, environ: Mapping[str, str], *, name: str = "upstream") -> Dial:
    """Send a GET request without a token to `url` (any scheme).

    Agents never use HEAD, and some servers and proxies refuse it.
    """
    dial = Dial(http_url(url), settings)
    dialler = Dialler(settings, environ, name=name, read_timeout_s=settings.connect_timeout_s, trace=dial.trace)
    try:
        async with asyncio.timeout(2 * settings.connect_timeout_s):
            response = await dialler.request("GET", dial.url, {})
            response.close()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is why there is no answer
        dial.failure = failure_of(error)
    finally:
        await dialler.close()
    return dial


async def ask_time_unverified(upstream: Upstream, environ: Mapping[str, str]) -> Dial:
    """Ask for the time if a certificate is refused: with a wrong clock, valid certificates look expired.

    The certificate is not verified for this request, which carries neither a name nor a token.
    """
    unchecked = msgspec.structs.replace(upstream.dialling, insecure_skip_verify=True)
    return await ask(ws_url(upstream.url, upstream.path).partition("?")[0], unchecked, environ)


SKEW_WARN_S = 30.0
SKEW_FAIL_S = 300.0
SHOWN_ADDRESSES = 4
_MEND_WAY = "let the proxy or load balancer pass the headers Upgrade and Connection on to the controller"
_VALID_ONE_NEEDED = "put a valid token into upstream.token_file, with the permission to connect agents"
_MEND_FRAMES = "something on the way passes the handshake and not the frames behind it: look at proxies"
_CREDENTIALS = "it wants other credentials: {key}: http://user:password@host:port"
EXPIRES_SOON_S = 14 * 86_400.0


def judge_way(dial: Dial) -> list[Finding]:
    """Return a finding for each step up to the first that failed: proxy, dns, tcp, tls.

    A dial that failed later, in the response, has passed them all.
    """
    found: list[Finding] = []
    for step in (_proxy, _files, _dns, _tcp, _proxy_refusal, _tls):
        finding = step(dial)
        if finding is not None:
            found.append(finding)
            if finding.status is Status.FAIL:
                break
    return found


def _proxy(dial: Dial) -> Finding:
    proxy, failure = dial.trace.proxy, dial.failure
    if not proxy.url:
        return passed("proxy", f"none: {proxy.source or 'neither configured nor in the environment'}")
    if failure is not None and failure.reason == "proxy" and not dial.trace.tried:
        return failed("proxy", f"{proxy.source}: {failure.detail}", "use an HTTP proxy")
    return passed("proxy", f"by {proxy.source}: {origin_of(proxy.url)}")


def _files(dial: Dial) -> Finding | None:
    """A dial that was not tried, for no fault of the proxy's, lacks a file of the TLS configuration."""
    if dial.trace.tried or dial.failure is None:
        return None
    return failed("tls", dial.failure.detail, "name readable PEM files there, for the user that the shim runs as")


def _proxy_refusal(dial: Dial) -> Finding | None:
    """Return the fault of a proxy that is connected, if the way ends there."""
    failure, key = dial.failure, dial.settings.key("proxy")
    if failure is None or dial.trace.connected or not dial.trace.proxy.url or failure.reason == "tls":
        return None
    if failure.reason == "handshake":
        return failed("proxy", f"it does not answer CONNECT: {failure.detail}", "is it an HTTP proxy?")
    if failure.reason != "proxy":
        text = f"it is connected, and nothing behind it, {origin_of(dial.url)}: {failure.detail}"
        return failed(
            "proxy", text, "is it an HTTP proxy? let it allow CONNECT to this host and port, and look at its log"
        )
    todo = _CREDENTIALS.format(key=key) if "407" in failure.detail else "let it allow CONNECT to this host and port"
    return failed("proxy", f"{failure.detail} for {origin_of(dial.url)}", todo)


def _peer(dial: Dial) -> tuple[str, str]:
    """Return the host of the TCP connection, and `host:port`, marked if it is the proxy."""
    proxy = dial.trace.proxy.url
    parts = urlsplit(proxy or dial.url)
    host, secure = parts.hostname or "", parts.scheme in ("https", "wss")
    shown = f"[{host}]" if ":" in host else host
    return host, f"{shown}:{parts.port or (443 if secure else 80)}" + (" (the proxy)" if proxy else "")


def _dns(dial: Dial) -> Finding:
    trace, failure = dial.trace, dial.failure
    host, _ = _peer(dial)
    whose = f"the proxy's name {host}" if trace.proxy.url else host
    key = dial.settings.key("proxy") if trace.proxy.url else f"{dial.settings.section}.url"
    try:
        ip_address(host)
    except ValueError:
        pass
    else:
        return passed("dns", f"not asked: {host} is an address")
    if trace.resolved:
        more = len(trace.resolved) - SHOWN_ADDRESSES
        addresses = ", ".join(trace.resolved[:SHOWN_ADDRESSES]) + (f" and {more} more" if more > 0 else "")
        return passed("dns", f"{whose} is {addresses}")
    if failure is not None and failure.reason == "timeout":
        todo = "the name server does not answer: look at the pod's DNS (/etc/resolv.conf)"
        return failed("dns", f"{whose}: no answer within {dial.settings.connect_timeout_s:g} s", todo)
    todo = f"is {key} spelt right? then look at the pod's DNS (/etc/resolv.conf)"
    return failed("dns", failure.detail if failure is not None else f"{whose}: no address", todo)


def _tcp(dial: Dial) -> Finding:
    failure, (_, where) = dial.failure, _peer(dial)
    if dial.trace.reached or failure is None:
        return passed("tcp", f"{where} answers")
    if failure.reason == "timeout":
        todo = "a firewall drops it (allow outbound TCP from this pod to there), or nobody there completes TLS"
        return failed("tcp", f"{where}: no connection within {dial.settings.connect_timeout_s:g} s", todo)
    if failure.reason == "tcp" or failure.detail.startswith(PROXY_UNREACHED):
        todo = "is the port right, and is something listening there? a firewall may also reject it"
        return failed("tcp", f"{where}: {failure.detail}", todo)
    return passed("tcp", f"{where} answers")


def _tls(dial: Dial) -> Finding:
    settings, failure, host = dial.settings, dial.failure, host_of(dial.url)
    if urlsplit(dial.url).scheme in ("http", "ws"):
        if is_loopback(urlsplit(dial.url).hostname or ""):
            return passed("tls", "none: loopback")
        return warned("tls", "none: tokens can be read on the way", f"use https in {settings.section}.url")
    if failure is not None and failure.reason == "tls":
        keys = f"{settings.section}.url", settings.key("ca_file")
        todo = trust(failure.detail, host, *keys)
        return failed("tls", f"{host}: {failure.detail}", todo or _tls_todo(dial))
    if dial.trace.tls is None:
        return warned("tls", f"{host}: not known, the connection is gone already", "run doctor again")
    if settings.insecure_skip_verify:
        todo = f"remove {settings.key('insecure_skip_verify')}: anyone on the way can read the token"
        return warned("tls", f"{dial.trace.tls.version()}, and the certificate is not checked", todo)
    return certificate("tls", dial.trace.tls, settings.ca_file)


def _tls_todo(dial: Dial) -> str:
    key = dial.settings.key("client_cert_file")
    return f"does this port speak TLS 1.2 or later? something on the way may end it, or {key} is asked for"


# --- the answer -------------------------------------------------------------------------------------------------------


def judge_upgrade(dial: Dial) -> Finding:
    """Return the findings on the WebSocket handshake, and the intermediary that refuses it."""
    trace, failure = dial.trace, dial.failure
    behind = _answered_by(trace)
    if failure is None:
        return passed("upgrade", f"the WebSocket handshake is passed on{behind}")
    if failure.reason == "timeout" or failure.detail == UNANSWERED:
        todo = "something on the way, or the server, drops WebSocket handshakes: look at proxies and load balancers"
        return failed("upgrade", f"the connection ended without an answer to the handshake: {failure.detail}", todo)
    if failure.reason != "status":
        return failed(
            "upgrade", f"the answer to the handshake is not a WebSocket's: {failure.detail}{behind}", _MEND_WAY
        )
    return _judge_status(failure.status, behind)


def _answered_by(trace: DialTrace) -> str:
    """Return what the answer says about its sender, to follow a sentence; empty if it says nothing."""
    named = [f"{trace.headers[name][:60]} ({name})" for name in ("via", "server") if trace.headers.get(name)]
    return f"; the answer comes from {' and '.join(named)}" if named else ""


def _judge_status(status: int, behind: str) -> Finding:
    if status in (401, 403):
        return passed("upgrade", f"the endpoint answers {status}: it asks for a token first{behind}")
    if 300 <= status < 400:
        todo = "upstream.url must be the address itself: redirects are never followed with a token"
        return failed("upgrade", f"the handshake is redirected (HTTP {status}){behind}", todo)
    if status == 404:
        return failed("upgrade", f"no such path (HTTP 404){behind}", "look at upstream.url and upstream.path")
    if status == 429 or status >= 500:
        todo = "the controller, or what stands before it, is not well or asks to wait; the shim goes on trying"
        return failed("upgrade", f"HTTP {status}{behind}", todo)
    return failed("upgrade", f"HTTP {status} instead of 101: the upgrade is stripped on the way{behind}", _MEND_WAY)


def judge_token(dials: Sequence[tuple[str, Dial]], *, given: bool) -> Finding:
    """Return the finding on the token; `dials` are (place of the token, dial) in the order of trying."""
    way, last = dials[-1]
    if last.failure is not None and last.failure.status not in (401, 403):
        return warned("token", "not examined: the handshake does not get that far", "mend the line upgrade first")
    if not given:
        if last.failure is None:
            return warned("token", "the endpoint asks for none", "is upstream.url the vendor's controller?")
        return passed("token", "each agent brings its own; give one with --token-file to have it examined")
    if last.failure is None and last.close_code is not None and close_meaning(last.close_code) is CloseMeaning.REFUSED:
        return failed("token", f"refused behind the handshake: {_closed(last)}", _VALID_ONE_NEEDED)
    if last.failure is None:
        return passed("token", f"accepted (sent in the {way})")
    tried = " and ".join(f"{way} ({dial.failure.status})" for way, dial in dials if dial.failure is not None)
    return failed("token", f"refused: {tried}", _VALID_ONE_NEEDED)


def _closed(dial: Dial) -> str:
    """Describe the close frame, with the controller's reason."""
    code = f"closed {dial.close_code}" if dial.close_code else "closed without a code"
    return f"{code}, “{dial.close_reason}”" if dial.close_reason else code


def judge_frames(dial: Dial) -> list[Finding]:
    """Return the finding on the pong; nothing if no ping was sent."""
    if dial.pong_s is None:
        return []
    if dial.pong_s == FRAMES_CLOSED:
        todo = "the server closes connections at once: its log says why"
        how = f": {_closed(dial)}" if dial.close_code is not None else ""
        return [failed("frames", f"the connection was closed before a ping came back{how}", todo)]
    if dial.pong_s == FRAMES_LOST:
        text = f"a ping did not come back within {dial.settings.connect_timeout_s:g} s"
        return [failed("frames", text, _MEND_FRAMES)]
    return [passed("frames", f"a ping came back in {dial.pong_s * 1000:.0f} ms")]


def judge_clock(headers: Mapping[str, str]) -> Finding:
    """Return the finding on the difference between this clock and the `Date` of a response."""
    try:
        theirs = parsedate_to_datetime(headers.get("Date", "")).timestamp()
    except (ValueError, TypeError):
        return warned("clock", "unknown: no answer told the time", "compare this machine's clock by hand")
    skew_s = Clock().wall_s() - theirs
    text = f"{abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} the controller"
    if abs(skew_s) < SKEW_WARN_S:
        return passed("clock", "agrees with the controller's" if abs(skew_s) < 2 else text)
    todo = "let this machine synchronise its clock (NTP); certificates and expiries depend on it"
    return failed("clock", text, todo) if abs(skew_s) >= SKEW_FAIL_S else warned("clock", text, todo)


def judge_fallback(dial: Dial) -> Finding:
    """Return the finding on the vendor's HTTP API, reached by the shim's own path."""
    host, steps = host_of(dial.url), judge_way(dial)
    worst = next((each for each in steps if each.status is Status.FAIL), None)
    if worst is not None:
        return failed("fallback", f"{worst.check}: {worst.text}", worst.remedy)
    if dial.failure is not None:
        return failed(
            "fallback", f"{host}: {dial.failure.detail}", "modes http and auto need it: is fallback.url right?"
        )
    status, behind = dial.trace.status, _answered_by(dial.trace)
    if status >= 500:
        todo = "modes http and auto need it: is fallback.url right?"
        return failed("fallback", f"{host}: HTTP {status}{behind}", todo)
    if status == 410:
        return warned("fallback", f"{host}: gone (HTTP 410)", "its sunset is over: there is no way back")
    if 300 <= status < 400:
        todo = "fallback.url must be the address itself: agents are handed the redirect as it is"
        return failed("fallback", f"{host}: redirects (HTTP {status})", todo)
    doubt = next((each for each in steps if each.status is Status.WARN), None)
    if doubt is not None:
        return warned("fallback", f"{host} answers (HTTP {status}); {doubt.check}: {doubt.text}", doubt.remedy)
    through = f", through {origin_of(dial.trace.proxy.url)}" if dial.trace.proxy.url else ""
    return passed("fallback", f"{host} answers (HTTP {status}){through}{behind}")


def certificate(check: str, tls: ssl.SSLObject, ca_file: str) -> Finding:
    """Describe a verified certificate: its issuer and its remaining validity."""
    found = tls.getpeercert() or {}
    expires = str(found.get("notAfter", ""))
    left_s = ssl.cert_time_to_seconds(expires) - Clock().wall_s() if expires else EXPIRES_SOON_S
    trusted = f"trusted by {ca_file}" if ca_file else "trusted"
    text = f"{tls.version()}, {trusted}, issued by {_issuer(found)}, expires in {left_s / 86_400:.0f} days"
    if left_s < EXPIRES_SOON_S:
        return warned(check, text, "have the certificate renewed, or expect the link to fail then")
    return passed(check, text)


def trust(why: str, host: str, url_key: str, ca_key: str) -> str:
    """Return a remedy for a certificate that is refused, or `""` if `why` is another TLS failure.

    `why` is OpenSSL's text; the keys are those of the configuration.
    """
    message = why.lower()
    if "expired" in message or "not yet valid" in message:
        return "the certificate must be renewed, unless the clock of this machine is wrong: see the line clock"
    if "mismatch" in message or "not valid for" in message:
        return f"the certificate is for other names: {url_key} must use one of them instead of {host}"
    if "certificate" in message and "alert" not in message:
        return f"a private authority or an inspecting proxy? put its certificate into {ca_key}"
    return ""


def _issuer(found: Mapping[str, object]) -> str:
    names = found.get("issuer")
    parts = {}
    if isinstance(names, tuple):
        parts = {pair[0]: pair[1] for group in names for pair in group}
    return str(parts.get("organizationName") or parts.get("commonName") or "?")
