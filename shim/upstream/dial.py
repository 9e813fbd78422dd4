"""Dialling of upstream WebSockets (docs/reference/protocol.md#2-upstream-side-the-websocket)."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from aiohttp import hdrs

import shim
from shim.config.settings import Upstream
from shim.ports import DialFailure, DialRequest, WebSocket, WebSocketListener
from shim.protocol.http import origin_of, with_query
from shim.upstream.dial_errors import failure_of
from shim.upstream.dialler import Dialler, DialTrace
from shim.upstream.websocket import CLOSE_WAIT_S, RawWebSocket, WebSocketPump

Spawn = Callable[[str, Coroutine[Any, Any, None]], "asyncio.Task[None] | None"]
DialDone = Callable[[WebSocket | DialFailure], None]

logger = logging.getLogger(__name__)


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
        outcome = await self._connect(spec)
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
