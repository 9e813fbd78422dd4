"""The way to the controller, step by step: name, proxy, TCP, TLS (protocol.md §2)."""

from __future__ import annotations

import asyncio
import base64
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from shim.clock import Clock
from shim.core.urls import ws_url
from shim.settings import Upstream, is_loopback
from shim.tools.doctor.certificates import certificate, reason, trust
from shim.tools.doctor.findings import Finding, failed, passed, warned
from shim.upstream.proxies import choose_proxy
from shim.upstream.tls import ClientTls

SHOWN_ADDRESSES = 4
_PORTS = {"wss": 443, "ws": 80, "https": 443, "http": 80}


class Blocked(Exception):
    """The way ends here; `finding` says why."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.check)
        self.finding = finding


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy; `authorization` is the value of its header, `""` without credentials."""

    host: str
    port: int
    secure: bool
    source: str
    authorization: str = field(repr=False, default="")


@dataclass(frozen=True, slots=True)
class Target:
    """The controller's WebSocket endpoint as the shim would dial it; `path` is with the configured query."""

    host: str
    port: int
    secure: bool
    path: str = field(repr=False)
    proxy: Proxy | None = None

    @property
    def authority(self) -> str:
        """The `Host` header's value."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Line:
    """An open connection to the controller."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def close(self) -> None:
        """Let go of it."""
        self.writer.close()
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(1):
                await self.writer.wait_closed()


def target_of(upstream: Upstream, environ: Mapping[str, str]) -> Target:
    """Where the shim dials with this configuration. Raises `Blocked`."""
    url = ws_url(upstream.url, upstream.path)
    parts = urlsplit(url)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    choice = choose_proxy(url, upstream.dialling, environ)
    proxy = _proxy(choice.url, choice.source) if choice.url else None
    return Target(parts.hostname or "", parts.port or _PORTS[parts.scheme], parts.scheme == "wss", path, proxy)


def _proxy(url: str, source: str) -> Proxy:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Blocked(failed("proxy", f"{source} names a proxy of a kind that is not spoken", "use an HTTP proxy"))
    authorization = ""
    if parts.username is not None:
        credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        authorization = "Basic " + base64.b64encode(credentials.encode()).decode()
    return Proxy(parts.hostname, parts.port or _PORTS[parts.scheme], parts.scheme == "https", source, authorization)


async def connect(target: Target, upstream: Upstream, found: list[Finding]) -> Line:
    """Go to where a request can be sent; each step is added to `found`. Raises `Blocked` where it ends."""
    timeout_s = upstream.connect_timeout_s
    proxy = target.proxy
    found.append(_way(proxy))
    host, port = (proxy.host, proxy.port) if proxy is not None else (target.host, target.port)
    found.append(await _resolve(host, port, timeout_s, through=proxy is not None))
    reader, writer, finding = await _open(host, port, timeout_s, through=proxy is not None)
    found.append(finding)
    line = Line(reader, writer)
    try:
        if proxy is not None and proxy.secure:
            await _secure(line, ssl.create_default_context(), proxy.host, timeout_s, "proxy")
        if proxy is not None and target.secure:
            await _tunnel(line, target, proxy, timeout_s)
        found.append(await _protect(line, target, upstream))
    except BaseException:
        await line.close()
        raise
    return line


def _way(proxy: Proxy | None) -> Finding:
    if proxy is None:
        return passed("proxy", "none, neither configured nor in the environment")
    return passed("proxy", f"by {proxy.source}: {proxy.host}:{proxy.port}")


async def _resolve(host: str, port: int, timeout_s: float, *, through: bool) -> Finding:
    whose = f"the proxy's name {host}" if through else host
    key = "the proxy" if through else "upstream.url"
    try:
        async with asyncio.timeout(timeout_s):
            entries = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except TimeoutError:
        todo = "the name server does not answer: look at the pod's DNS (/etc/resolv.conf)"
        raise Blocked(failed("dns", f"{whose}: no answer within {timeout_s:g} s", todo)) from None
    except (OSError, UnicodeError) as error:
        todo = f"is {key} spelt right? then look at the pod's DNS (/etc/resolv.conf)"
        raise Blocked(failed("dns", f"{whose}: {reason(error)}", todo)) from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in entries))
    more = f" and {len(addresses) - SHOWN_ADDRESSES} more" if len(addresses) > SHOWN_ADDRESSES else ""
    return passed("dns", f"{whose} is {', '.join(addresses[:SHOWN_ADDRESSES])}{more}")


async def _open(
    host: str, port: int, timeout_s: float, *, through: bool
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, Finding]:
    clock = Clock()
    before = clock.monotonic_s()
    where = f"{host}:{port}" + (" (the proxy)" if through else "")
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        todo = "a firewall drops it: allow outbound TCP from this pod to there"
        raise Blocked(failed("tcp", f"{where}: no answer within {timeout_s:g} s", todo)) from None
    except OSError as error:
        todo = "is the port right, and is something listening there? a firewall may also reject it"
        raise Blocked(failed("tcp", f"{where}: {reason(error)}", todo)) from None
    took_ms = (clock.monotonic_s() - before) * 1000
    return reader, writer, passed("tcp", f"{where} answers in {took_ms:.0f} ms")


async def _tunnel(line: Line, target: Target, proxy: Proxy, timeout_s: float) -> None:
    authority = f"{target.host}:{target.port}"
    lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}"]
    if proxy.authorization:
        lines.append(f"Proxy-Authorization: {proxy.authorization}")
    line.writer.write("\r\n".join([*lines, "", ""]).encode())
    try:
        async with asyncio.timeout(timeout_s):
            head = (await line.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        raise Blocked(failed("proxy", "it does not answer CONNECT", "is it an HTTP proxy?")) from None
    status = head.split(" ")[1:2]
    if status == ["200"]:
        return
    said = head.splitlines()[0][:80]
    todo = "let it allow CONNECT to this host and port"
    if status == ["407"]:
        todo = "it wants other credentials: upstream.proxy: http://user:password@host:port"
    raise Blocked(failed("proxy", f"CONNECT {authority}: {said}", todo))


async def _protect(line: Line, target: Target, upstream: Upstream) -> Finding:
    """TLS, or the word that there is none. Raises `Blocked`."""
    if not target.secure:
        if is_loopback(target.host):
            return passed("tls", "none: loopback")
        return warned("tls", "none: tokens can be read on the way", "use https in upstream.url")
    try:
        context = ClientTls(upstream.dialling).context()
    except OSError as error:
        todo = "upstream.ca_file, client_cert_file and client_key_file must be readable PEM files that fit each other"
        raise Blocked(failed("tls", f"a file of the TLS configuration cannot be used: {reason(error)}", todo)) from None
    await _secure(line, context, target.host, upstream.connect_timeout_s, "tls")
    tls: ssl.SSLObject = line.writer.get_extra_info("ssl_object")
    if upstream.insecure_skip_verify:
        todo = "remove upstream.insecure_skip_verify: anyone on the way can read the token"
        return warned("tls", f"{tls.version()}, and the certificate is not checked", todo)
    return certificate("tls", tls, upstream.ca_file)


async def _secure(line: Line, context: ssl.SSLContext, host: str, timeout_s: float, check: str) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await line.writer.start_tls(context, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        todo = trust(error, host, "upstream.url", "upstream.ca_file")
        raise Blocked(failed(check, f"{host}: {error.verify_message}", todo)) from None
    except (ssl.SSLError, OSError) as error:  # TimeoutError is one
        todo = "does this port speak TLS 1.2 or later? something on the way may end it"
        raise Blocked(failed(check, f"{host}: {reason(error)}", todo)) from None
