"""Opens upstream WebSockets (protocol.md §2)."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, cast
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

import shim
from shim.core.urls import origin_of, with_query
from shim.ports import DialFailure, DialSpec, Socket, SocketEvents
from shim.settings import Upstream
from shim.upstream.failures import Refused, Unanswered, failure_of, retry_after_s
from shim.upstream.proxies import environment_proxy
from shim.upstream.pump import CLOSE_WAIT_S, WebSocketPump, WireObserver
from shim.upstream.socket import RawWebSocket, websocket_class
from shim.upstream.tls import ClientTls

Spawn = Callable[[str, Coroutine[Any, Any, None]], "asyncio.Task[None] | None"]
DialDone = Callable[[Socket | DialFailure], None]

logger = logging.getLogger(__name__)


class _Unobserved:
    """The `WireObserver` that looks away."""

    def received(self, size_bytes: int) -> None: ...

    def sent(self, size_bytes: int) -> None: ...

    def handler_failed(self) -> None: ...


async def _one_plain_answer(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Client middleware: aiohttp would follow redirects with our token and dial twice when the first dial is cut."""
    try:
        response = await send(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise Unanswered from error
    if response.status != 101:
        response.close()
        raise Refused(response.status, retry_after_s(response.headers))
    return response


class AiohttpUpstream:
    """`ports.UpstreamPort` on aiohttp. After `close()` pending dials end without a call of their `done`."""

    def __init__(
        self,
        settings: Upstream,
        spawn: Spawn,
        wire: WireObserver | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._settings = settings
        self._spawn = spawn
        self._wire = wire or _Unobserved()
        self._environ = environ
        self._tls = ClientTls(settings)
        self._session: aiohttp.ClientSession | None = None
        self._dials: set[asyncio.Task[None]] = set()
        self._pumps: set[WebSocketPump] = set()
        self._announced: set[tuple[str, str]] = set()
        self._closed = False
        if settings.insecure_skip_verify:
            logger.warning("upstream.insecure_skip_verify: ANYONE ON THE PATH CAN READ THE TOKEN AND SEND COMMANDS")

    def dial(self, spec: DialSpec, events: SocketEvents, done: DialDone) -> None:
        """Dial in the background; the task goes on as the reader of the socket."""
        if self._closed:
            return
        task = self._spawn("upstream", self._serve(spec, events, done))
        if task is not None:
            self._dials.add(task)
            task.add_done_callback(self._dials.discard)

    async def close(self) -> None:
        """Close all sockets with 1000, at most 2 s long, and everything else at once. Idempotent."""
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
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _serve(self, spec: DialSpec, events: SocketEvents, done: DialDone) -> None:
        outcome = await self._connect(spec)
        if isinstance(outcome, DialFailure):
            self._tell(done, outcome)
            return
        pump = WebSocketPump(outcome, events, self._wire)
        self._pumps.add(pump)
        try:
            if not self._tell(done, pump):
                pump.abort()
            writer = self._spawn("upstream-writer", pump.write())
            await pump.run()
            if writer is not None:
                await asyncio.wait([writer])  # it ends when the connection is gone, by the pump's timer at the latest
        finally:
            pump.abort()
            self._pumps.discard(pump)

    def _tell(self, done: DialDone, outcome: Socket | DialFailure) -> bool:
        try:
            done(outcome)
        except Exception:
            logger.exception("a handler of dial results failed")
            self._wire.handler_failed()
            return False
        return True

    async def _connect(self, spec: DialSpec) -> RawWebSocket | DialFailure:
        proxy = self._settings.proxy or environment_proxy(spec.url, self._environ)
        if proxy and urlsplit(proxy).scheme not in ("http", "https"):
            return DialFailure("proxy", detail="only http and https proxies are supported")
        try:
            tls = self._tls.context() if spec.url.startswith("wss:") else None
        except OSError as error:
            return DialFailure("tls", detail=f"a file of the TLS configuration cannot be used: {type(error).__name__}")
        self._announce(spec.url, proxy)
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                return await self._handshake(spec, proxy, tls)
        except Exception as error:  # noqa: BLE001 - texts and tracebacks of aiohttp's errors show the token
            failure = failure_of(error)
            logger.debug("dial of %s failed: %s (%s)", origin_of(spec.url), failure.reason, failure.detail)
            return failure

    async def _handshake(self, spec: DialSpec, proxy: str, tls: ssl.SSLContext | None) -> RawWebSocket:
        query = (*spec.query, ("token", spec.token)) if spec.in_query and spec.token else spec.query
        url = with_query(spec.url, query)
        ws = await self._open_session().ws_connect(
            URL(url, encoded=url.isascii()),
            headers={"Authorization": f"Bearer {spec.token}"} if spec.in_header and spec.token else {},
            proxy=proxy or None,
            ssl=tls or True,
            autoclose=False,
            autoping=False,
            compress=0,
            max_msg_size=self._settings.max_message_bytes + 1,  # aiohttp refuses a message of exactly its limit
            decode_text=False,  # text that is not UTF-8 is a bad frame, not the end of the connection
        )
        return cast("RawWebSocket", ws)  # the session's ws_response_class

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # no pool and no DNS cache: every dial is a new connection to where the name points now
                connector=aiohttp.TCPConnector(limit=0, use_dns_cache=False, force_close=True),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": f"agent-shim/{shim.__version__}"},
                skip_auto_headers=("Accept-Encoding",),
                middlewares=(_one_plain_answer,),
                ws_response_class=websocket_class(self._settings.max_message_bytes + 1),
            )
        return self._session

    def _announce(self, url: str, proxy: str) -> None:
        """Log the way to a host once for each way taken (protocol.md §2)."""
        way = origin_of(proxy) if proxy else "direct"
        key = (origin_of(url), way)
        if key not in self._announced:
            self._announced.add(key)
            source = "" if not proxy else " (configured)" if self._settings.proxy else " (environment)"
            logger.info("upstream %s is dialled %s%s", key[0], f"through {way}" if proxy else way, source)
