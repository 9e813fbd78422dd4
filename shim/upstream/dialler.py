"""Dialler of connections to the vendor: one rule for link, gateway, HTTP fallback and doctor.

The rule is docs/reference/protocol.md#2-upstream-side-the-websocket: trust, client certificate, proxy, and the spelling
of names and addresses.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Callable, Coroutine, Mapping
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import aiohttp
import msgspec
from aiohttp import hdrs
from multidict import CIMultiDict
from yarl import URL

import shim
from shim.config.files import FileFingerprint, fingerprints, read_regular, reason
from shim.config.settings import DialSettings, Upstream
from shim.hosts import is_loopback, plain_host
from shim.ports import DialFailure, DialRequest, WebSocket, WebSocketListener
from shim.protocol.http import origin_of, with_query
from shim.redaction import basic_credentials
from shim.upstream.dial_errors import UNANSWERED, DialError, failure_of, retry_after_s, tls_text
from shim.upstream.http_client import Connector, LenientResponse
from shim.upstream.websocket import CLOSE_WAIT_S, RawWebSocket, WebSocketPump, websocket_class

_VARIABLES = {True: ("https_proxy", "all_proxy"), False: ("http_proxy", "all_proxy")}


class ProxyChoice(msgspec.Struct, frozen=True):
    """The proxy of a dial. `url` is `""` for a direct dial; `source` is the setting or rule that decided."""

    url: str = ""
    source: str = ""

    def __repr__(self) -> str:
        return f"ProxyChoice({self.source!r})"


def choose_proxy(url: str, settings: DialSettings, environ: Mapping[str, str]) -> ProxyChoice:
    """Return the proxy for a URL (http, https, ws or wss).

    A configured proxy is always used. In the environment, lower-case names take precedence over upper-case ones. As in
    Go, loopback is never proxied, and `NO_PROXY` may contain names (with their subdomains), addresses, networks,
    `host:port` and `*`.
    """
    if settings.proxy:
        return ProxyChoice(settings.proxy, settings.key("proxy"))
    parts = urlsplit(url)
    secure = parts.scheme in ("https", "wss")
    name, value = next(((each, found) for each in _VARIABLES[secure] if (found := _read(environ, each))), ("", ""))
    if not value:
        return ProxyChoice()
    host = plain_host(parts.hostname or "")
    if is_loopback(parts.hostname or ""):
        return ProxyChoice(source="loopback is not proxied")
    if _is_exempt(host, parts.port or (443 if secure else 80), _read(environ, "no_proxy")):
        return ProxyChoice(source="NO_PROXY of the environment")
    return ProxyChoice(value if "://" in value else f"http://{value}", f"{name.upper()} of the environment")


def _read(environ: Mapping[str, str], name: str) -> str:
    return (environ.get(name) or environ.get(name.upper()) or "").strip()


def _is_exempt(host: str, port: int, no_proxy: str) -> bool:
    return any(_covers(entry, host, port) for entry in no_proxy.replace(",", " ").split())


def _covers(entry: str, host: str, port: int) -> bool:
    if entry == "*":
        return True
    try:
        if "/" in entry:
            return ip_address(host) in ip_network(entry, strict=False)
        name, colon, digits = entry.rpartition(":")
        if colon and digits.isdigit() and (":" not in name or name.endswith("]")):
            if int(digits) != port:
                return False
            entry = name
        name = plain_host(entry.removeprefix("*").removeprefix("."))
    except ValueError:
        return False
    return bool(name) and (host == name or host.endswith(f".{name}"))


_MAX_FILE_BYTES = 4_194_304  # the system's certificate bundle has 0.2 MB
# An idle connection is closed before the server closes it. A request that crosses the server's close is lost, and only
# its sender knows if it may be repeated. The shortest idle times in use are gunicorn's 2 s and Node's 5 s.
KEEP_S = 1.5
_PLAIN = {"ws": "http", "wss": "https"}
logger = logging.getLogger(__name__)
Spawn = Callable[[str, Coroutine[Any, Any, None]], "asyncio.Task[None] | None"]
DialDone = Callable[[WebSocket | DialFailure], None]


class ClientTls:
    """The TLS context for dials, created anew when one of its files has changed."""

    def __init__(self, settings: DialSettings) -> None:
        self._settings = settings
        names = ("ca_file", "client_cert_file", "client_key_file")
        self._files = {name: Path(path) for name in names if (path := getattr(settings, name))}
        self._context: ssl.SSLContext | None = None
        self._signature: tuple[FileFingerprint, ...] = ()

    def context(self) -> ssl.SSLContext:
        """Return the context. Raises `DialError`, whose text names the key of an unusable file."""
        try:
            signature = fingerprints(self._files.values())
        except OSError:
            signature = ()  # `_build` reports the missing file
        if self._context is None or signature != self._signature or len(signature) < len(self._files):
            self._context = self._build()
            self._signature = signature
        return self._context

    def _build(self) -> ssl.SSLContext:
        settings = self._settings
        for name, path in self._files.items():
            try:
                read_regular(path, _MAX_FILE_BYTES)
            except (OSError, ValueError) as error:
                raise self._unusable(reason(error), name) from None
        try:
            # With a CA file only its authorities are trusted, and no public ones.
            context = ssl.create_default_context(cafile=settings.ca_file or None)
        except OSError as error:
            raise self._unusable(f"no PEM file of certificates ({tls_text(error)})", "ca_file") from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if settings.client_cert_file:
            try:
                # With an empty password an encrypted key is an error. Otherwise OpenSSL would prompt for one and block.
                context.load_cert_chain(settings.client_cert_file, settings.client_key_file or None, password="")
            except OSError as error:
                text = f"no PEM certificate and key that fit each other ({tls_text(error)})"
                raise self._unusable(text, "client_cert_file", "client_key_file") from None
        if settings.insecure_skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def _unusable(self, why: str, *names: str) -> DialError:
        keys = ", ".join(self._settings.key(name) for name in names)
        return DialError(DialFailure("tls", detail=f"{keys}: {why}"))


class DialTrace(msgspec.Struct):
    """Facts about the newest dial, for doctor. Each is set as soon as it is known.

    `tried` is true if the configuration allowed a dial. `resolved` has the addresses of the name. `reached` is true
    once the first peer is connected, which may be a proxy. `tls` describes the connection once it is open.
    """

    tried: bool = False
    proxy: ProxyChoice = msgspec.field(default_factory=ProxyChoice)
    resolved: tuple[str, ...] = ()
    reached: bool = False
    connected: bool = False
    tls: ssl.SSLObject | None = None
    status: int = 0
    headers: Mapping[str, str] = msgspec.field(default_factory=dict)


class _TracedResolver(aiohttp.ThreadedResolver):
    def __init__(self, trace: DialTrace) -> None:
        super().__init__()
        self._trace = trace

    async def resolve(self, *args: Any, **options: Any) -> list[aiohttp.abc.ResolveResult]:
        """Resolve a host, and note its addresses in the trace."""
        found = await super().resolve(*args, **options)
        self._trace.resolved = tuple(dict.fromkeys(each["host"] for each in found))
        return found


class Dialler:
    """Client for HTTP requests and WebSockets with one set of settings.

    `name` is used in the log (`upstream`, `fallback`). `keep` reuses idle connections for a moment; without it every
    dial resolves the name again. `max_message_bytes` bounds a WebSocket message. Each dial fills `trace`.
    """

    def __init__(
        self,
        settings: DialSettings,
        environ: Mapping[str, str] = os.environ,
        *,
        name: str = "upstream",
        keep: bool = False,
        read_timeout_s: float | None = None,
        max_message_bytes: int = 0,
        trace: DialTrace | None = None,
    ) -> None:
        self._settings = settings
        self._environ = environ
        self._name = name
        self._keep = keep
        self._read_timeout_s = read_timeout_s
        self._max_message_bytes = max_message_bytes
        self._trace = trace
        self._tls = ClientTls(settings)
        self._session: aiohttp.ClientSession | None = None
        self._transport: asyncio.Transport | None = None
        self._announced: set[tuple[str, str]] = set()
        if settings.insecure_skip_verify:
            key = settings.key("insecure_skip_verify")
            logger.warning("%s: ANYONE ON THE PATH CAN READ THE TOKEN AND SEND COMMANDS", key)

    async def websocket(self, url: str, headers: Mapping[str, str]) -> RawWebSocket:
        """Open a WebSocket. Raises `DialError` and aiohttp's exceptions."""
        target, more, way = self._way(url)
        opened = await self._open_session().ws_connect(
            target,
            headers={**headers, **more},
            autoclose=False,
            autoping=False,
            compress=0,
            max_msg_size=self._max_message_bytes + 1,  # aiohttp rejects a message of exactly its limit
            decode_text=False,  # aiohttp would close the connection for text that is no UTF-8
            **way,
        )
        return cast("RawWebSocket", opened)  # the session's ws_response_class

    async def request(
        self, method: str, url: str, headers: Mapping[str, str], data: Any = None
    ) -> aiohttp.ClientResponse:
        """Send a request without adding headers, following redirects or decoding the body.

        Raises `DialError` and aiohttp's exceptions.
        """
        target, more, way = self._way(url)
        fields = CIMultiDict(headers)
        fields.update(more)
        return await self._open_session().request(
            method,
            target,
            headers=fields,
            data=data,
            allow_redirects=False,
            skip_auto_headers=(hdrs.USER_AGENT, hdrs.CONTENT_TYPE, hdrs.ACCEPT, hdrs.ACCEPT_ENCODING),
            **way,
        )

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, within_s: float) -> int:
        """Send a body and return the status of the reply. Raises `DialError`."""
        try:
            async with asyncio.timeout(within_s):
                response = await self.request("POST", url, headers, body)
                async with response:
                    return response.status
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise DialError(failure_of(error)) from None

    async def close(self) -> None:
        """Close all connections. Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()
        if self._trace is not None:
            # Doctor's event loop ends after its last dial, so there is no time for the peer's half of a TLS shutdown.
            if self._transport is not None:
                self._transport.abort()
            await asyncio.sleep(0)

    def _way(self, url: str) -> tuple[URL, dict[str, str], dict[str, Any]]:
        """Return the target for aiohttp, the headers to add, and its options for proxy and TLS. Raises `DialError`."""
        proxy = choose_proxy(url, self._settings, self._environ)
        if self._trace is not None:
            self._trace.proxy = proxy
        _check(proxy)
        scheme, rest = url.split(":", 1)
        # A request for a plain WebSocket to a proxy has the scheme http: RFC 9110 has no ws scheme.
        plain = f"{_PLAIN.get(scheme, scheme)}:{rest}"
        tls = self._tls.context() if plain.startswith("https:") or proxy.url.startswith("https:") else None
        self._announce(url, proxy)
        if self._trace is not None:
            self._trace.tried = True
        target, secure = URL(plain, encoded=plain.isascii()), plain.startswith("https:")
        # Names in certificates have no final dot. Behind a proxy aiohttp would verify the name with the dot.
        name = (target.raw_host or "").rstrip(".") if secure else None
        address, credentials = _without_credentials(proxy.url)
        way = {"proxy": address or None, "proxy_headers": None, "ssl": tls or True, "server_hostname": name}
        if secure:
            return target, _host_header(target), way | {"proxy_headers": credentials or None}
        return target, _host_header(target) | credentials, way

    def _announce(self, url: str, proxy: ProxyChoice) -> None:
        """Log the route to a host, once per route."""
        way = f"through {origin_of(proxy.url)}" if proxy.url else "direct"
        if proxy.source:
            way += f" ({proxy.source})"
        key = (origin_of(url), way)
        if key not in self._announced:
            self._announced.add(key)
            logger.info("%s %s is dialled %s", self._name, *key)

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            resolver = None if self._trace is None else _TracedResolver(self._trace)
            # Answers are not cached, because the vendor's addresses may change. But the cache lets dials to one host
            # share a look-up. One that hangs cannot be cancelled, and every further dial would add another.
            keep: dict[str, Any] = {"keepalive_timeout": KEEP_S} if self._keep else {"force_close": True}
            connector = Connector(
                self._reached, self._connected, limit=0, use_dns_cache=True, ttl_dns_cache=0, resolver=resolver, **keep
            )
            connect_s = self._settings.connect_timeout_s
            self._session = aiohttp.ClientSession(
                connector=connector,
                timeout=aiohttp.ClientTimeout(total=None, connect=connect_s, sock_read=self._read_timeout_s),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers=(hdrs.ACCEPT_ENCODING,),
                middlewares=(self._send,),
                response_class=LenientResponse,
                ws_response_class=websocket_class(self._max_message_bytes + 1),
            )
        return self._session

    def _reached(self) -> None:
        if self._trace is not None:
            self._trace.reached = True

    def _connected(self, transport: asyncio.BaseTransport | None) -> None:
        if self._trace is not None and transport is not None:
            self._trace.connected, self._trace.tls = True, transport.get_extra_info("ssl_object")
            self._transport = cast("asyncio.Transport", transport)

    async def _send(self, request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        """Send a request as client middleware: separate the proxy's errors from the controller's, and fill the trace.

        Without it aiohttp would repeat a GET whose connection is cut. A handshake would be dialled twice, and a poll
        might take commands twice. It would also follow redirects of a handshake, and send our token to another host.
        """
        try:
            response = await send(request)
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
            if isinstance(error.__cause__, ssl.SSLError):  # in TLS 1.3 a client is rejected after the handshake
                raise DialError(DialFailure("tls", detail=tls_text(error.__cause__))) from None
            raise DialError(DialFailure("handshake", detail=UNANSWERED)) from error
        if self._trace is not None:
            self._trace.status, self._trace.headers = response.status, response.headers
        if response.status == 407 and request.proxy is not None and not request.is_ssl():
            response.close()
            raise DialError(DialFailure("proxy", detail="the proxy answered HTTP 407"))
        upgrade, upgraded = hdrs.UPGRADE in request.headers, response.status == 101
        if upgrade is upgraded:
            return response
        response.close()
        if upgraded:
            raise DialError(DialFailure("handshake", detail="the answer is an upgrade that nobody asked for"))
        status = response.status  # of a refusal, or of a redirect
        raise DialError(DialFailure("status", status, retry_after_s(response.headers), f"HTTP {status}"))


def _check(proxy: ProxyChoice) -> None:
    """Raise `DialError` for an unusable proxy. The rules of the configuration do not check one of the environment."""
    if not proxy.url:
        return
    try:
        parts = urlsplit(proxy.url)
        scheme = parts.scheme if parts.hostname and parts.port != 0 else ""
    except ValueError:
        scheme = ""
    if not scheme:
        raise DialError(DialFailure("proxy", detail="the address of the proxy is not a URL http://host:port"))
    if scheme not in ("http", "https"):
        raise DialError(DialFailure("proxy", detail="only http and https proxies are supported"))


def _without_credentials(proxy: str) -> tuple[str, dict[str, str]]:
    """Return a proxy's address without user name and password, and the header that has them.

    aiohttp would encode them in Latin-1 and fail for other characters. RFC 7617 recommends UTF-8.
    """
    parts = urlsplit(proxy)
    if parts.username is None:
        return proxy, {}
    credentials = basic_credentials(unquote(parts.username), unquote(parts.password or ""))
    address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return address, {hdrs.PROXY_AUTHORIZATION: f"Basic {credentials}"}


def _host_header(target: URL) -> dict[str, str]:
    """Return a `Host` header without the name's final dot if it has one, else `{}`: servers know names without it."""
    host = target.raw_host or ""
    if not host.endswith("."):
        return {}
    port = "" if target.is_default_port() else f":{target.port}"
    return {hdrs.HOST: host.rstrip(".") + port}


class AiohttpUpstream:
    """`ports.UpstreamPort` on aiohttp. `close()` ends pending dials without calling their `done`."""

    def __init__(
        self,
        settings: Upstream,
        spawn: Spawn,
        environ: Mapping[str, str] = os.environ,
        trace: DialTrace | None = None,
    ) -> None:
        self._settings = settings
        self._spawn = spawn
        self._dialler = Dialler(settings.dialling, environ, max_message_bytes=settings.max_message_bytes, trace=trace)
        self._dials: set[asyncio.Task[None]] = set()
        self._pumps: set[WebSocketPump] = set()
        self._closed = False

    def dial(self, spec: DialRequest, events: WebSocketListener, done: DialDone) -> None:
        """Dial in the background. Two more tasks then read from the socket and write to it."""
        if self._closed:
            return
        task = self._spawn("upstream", self._serve(spec, events, done))
        if task is not None:
            self._dials.add(task)
            task.add_done_callback(self._dials.discard)

    async def close(self) -> None:
        """Close all sockets with 1000, waiting at most 2 s, and cancel pending dials. Idempotent."""
        self._closed = True
        pumps = list(self._pumps)
        for pump in pumps:
            pump.close(1000)
        try:
            async with asyncio.timeout(CLOSE_WAIT_S):
                for pump in pumps:
                    await pump.ended.wait()
        except TimeoutError:
            logger.info("the upstream did not answer the close frame in time")
        for pump in list(self._pumps):
            pump.abort()
        dials = list(self._dials)
        for task in dials:
            task.cancel()
        await asyncio.gather(*dials, return_exceptions=True)
        await self._dialler.close()

    async def _serve(self, spec: DialRequest, events: WebSocketListener, done: DialDone) -> None:
        try:
            outcome = await self._connect(spec)
        except Exception:  # a defect: without an answer the link would wait for this dial for ever
            self._notify(done, DialFailure("handshake", detail="an error of the shim: see its log"))
            raise
        if isinstance(outcome, DialFailure):
            self._notify(done, outcome)
            return
        pump = WebSocketPump(outcome, events)
        self._pumps.add(pump)
        if not self._notify(done, pump):
            pump.abort()
        writer = self._spawn("upstream-writer", pump.write())
        reader = self._spawn("upstream-reader", pump.read())
        try:
            # The writer ends with the connection, at the latest by the pump's close timer.
            running = [task for task in (reader, writer) if task is not None]
            if running:
                await asyncio.wait(running)
        finally:
            pump.abort()
            self._pumps.discard(pump)

    def _notify(self, done: DialDone, outcome: WebSocket | DialFailure) -> bool:
        try:
            done(outcome)
        except Exception:
            logger.exception("a handler of dial results failed")
            return False
        return True

    async def _connect(self, spec: DialRequest) -> RawWebSocket | DialFailure:
        query = (*spec.query, ("token", spec.token)) if spec.in_query and spec.token else spec.query
        headers: dict[str, str] = {hdrs.USER_AGENT: f"agent-shim/{shim.__version__}"}
        if spec.in_header and spec.token:
            headers[hdrs.AUTHORIZATION] = f"Bearer {spec.token}"
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                return await self._dialler.websocket(with_query(spec.url, query), headers)
        except Exception as error:  # noqa: BLE001 - texts and tracebacks of aiohttp's errors contain the token
            failure = failure_of(error)
            logger.debug("dial of %s failed: %s (%s)", origin_of(spec.url), failure.reason, failure.detail)
            return failure
