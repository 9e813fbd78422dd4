"""A proxy for the WebSocket of an agent that speaks the new API already.

See docs/reference/protocol.md#5-an-agent-that-has-migrated-already.

A restarted pod may run a newer agent that still has the shim's address. Its handshake is sent to the controller with
its own token, and then every frame is passed on unchanged. The shim queues, registers and answers nothing for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import Any

from shim.bridge.websocket_agents import WebSocketEvent
from shim.config.settings import Settings
from shim.core.bounds import MAX_NAME_CHARS, MAX_REQUEST_ID_CHARS
from shim.errors import AgentError, MessageError
from shim.fallback.reverse_proxy import HOP_BY_HOP, end_to_end
from shim.log import get
from shim.metrics import Metrics
from shim.ports import Frame, FrameSocket
from shim.protocol.http import http_url, under, ws_url
from shim.protocol.upstream_message import decode_frame
from shim.upstream.dial_errors import failure_of
from shim.upstream.dialler import Dialler, Spawn
from shim.upstream.websocket import RawWebSocket

log = get(__name__)

AGENT_PATH = "/api/v1/clusters/agent/ws"
GATEWAY_PATH = "/ws"
WRITE_S = 30.0
"""Time after which a peer that does not read is disconnected."""
CLOSE_WAIT_S = 2.0
IDLE_S = 300.0
"""Time without a frame after which both sides are disconnected; agents and controllers ping far more often."""
STOP_S = 1.0
MAX_SNIFFED_BYTES = 1_048_576
MAX_PENDING = 16
RETRY_AFTER_S = 30
GOING_AWAY = Frame("close", (1001).to_bytes(2, "big"))

# The handshake with the controller is a new one with its own keys and extensions: only the other headers are passed on.
_OURS = HOP_BY_HOP | {
    "host",
    "content-length",
    "expect",
    "sec-websocket-key",
    "sec-websocket-version",
    "sec-websocket-extensions",
    "sec-websocket-accept",
}
_PASSED_STATUSES = range(400, 500)
_IDENTITY = ("name", "agent_id", "cluster_id")
"""Fields of a `register` that are kept. The others may be large, and the controller may never answer."""


class WebSocketProxy:
    """All WebSockets of agents that connect by WebSocket themselves, proxied to the controller.

    The rules are docs/reference/protocol.md#5-an-agent-that-has-migrated-already.
    `settings()` returns the current settings. `record` is called with each event that shows that an agent no longer
    needs the shim.
    """

    def __init__(
        self, settings: Callable[[], Settings], metrics: Metrics, spawn: Spawn, record: Callable[[WebSocketEvent], None]
    ) -> None:
        upstream = settings().upstream
        self._settings = settings
        self._metrics = metrics
        self._spawn = spawn
        self._record = record
        self._dialler = Dialler(upstream.dialling, max_message_bytes=upstream.max_message_bytes)
        self._open: set[Carried] = set()
        self._dialling = 0
        self._stopping = False

    def serves(self, target: str) -> bool:
        """Return True if a WebSocket handshake for this request target is proxied."""
        return self._url_of(target) is not None

    async def open(self, target: str, headers: Iterable[tuple[str, str]], token: str) -> Carried:
        """Open the controller's side with the agent's own token. Raises `AgentError` if that fails.

        `target` is as in `ProxyRequest`; `token` comes from the handshake's header or query.
        """
        url = self._url_of(target)
        if url is None:
            raise AgentError(404, "no such endpoint")
        if self._stopping or len(self._open) + self._dialling >= self._settings().upstream.max_links:
            self._metrics.websocket_handshakes.labels("busy").inc()
            raise AgentError(503, "too many upstream links", retry_after_s=RETRY_AFTER_S)
        self._dialling += 1
        try:
            async with asyncio.timeout(self._settings().upstream.connect_timeout_s):
                upstream = await self._dialler.websocket(url, dict(end_to_end(headers, _OURS)))
        except Exception as error:  # noqa: BLE001 - texts and tracebacks of aiohttp's errors contain the token
            raise self._refusal(error) from None
        finally:
            self._dialling -= 1
        self._metrics.websocket_handshakes.labels("ok").inc()
        carried = Carried(upstream, token, self._record, self._spawn, self._open.discard)
        self._open.add(carried)
        return carried

    def count(self) -> int:
        """Return the number of proxied WebSockets."""
        return len(self._open)

    async def close(self) -> None:
        """Close all WebSockets: send 1001 to both sides, wait briefly, then drop the connections that are left."""
        self._stopping = True
        carried = list(self._open)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await asyncio.gather(*(each.go_away() for each in carried), return_exceptions=True)
                await asyncio.gather(*(each.ended for each in carried))
        for each in carried:
            each.abort()
        await self._dialler.close()

    def _url_of(self, target: str) -> str | None:
        path, _, query = target.partition("?")
        upstream = self._settings().upstream
        if path in (AGENT_PATH, f"/{upstream.path.strip('/')}"):
            url = ws_url(upstream.url, upstream.path)
        elif path == GATEWAY_PATH:
            url = under(ws_url(http_url(upstream.url, upstream.path)), GATEWAY_PATH)
        else:
            return None
        return f"{url}{'&' if '?' in url else '?'}{query}" if query else url

    def _refusal(self, error: Exception) -> AgentError:
        failure = failure_of(error)
        refused = failure.status in _PASSED_STATUSES
        self._metrics.websocket_handshakes.labels("refused" if refused else "failed").inc()
        why = f"{failure.reason} {failure.status}" if failure.status else failure.reason
        log.warning("websocket_agent_refused", dedupe_key=why, reason=why, detail=failure.detail)
        retry_after_s = None if failure.retry_after_s is None else int(min(failure.retry_after_s, 300.0))
        if refused:
            return AgentError(failure.status, "the controller refuses the handshake", retry_after_s=retry_after_s)
        # The detail may name a key of the shim's own configuration, with which the controller has nothing to do.
        detail = f": {failure.detail}" if failure.detail and not failure.status else ""
        return AgentError(502, f"the controller cannot be reached{detail}", retry_after_s=retry_after_s)


class Carried:
    """One proxied WebSocket: the agent's connection and the controller's.

    `run` passes the agent's frames on; a task of its own passes the controller's frames on.
    """

    def __init__(
        self,
        upstream: RawWebSocket,
        token: str,
        record: Callable[[WebSocketEvent], None],
        spawn: Spawn,
        gone: Callable[[Carried], None],
    ) -> None:
        self.subprotocol = upstream.subprotocol
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._upstream = upstream
        self._token = token
        self._record = record
        self._spawn = spawn
        self._gone = gone
        self._agent: FrameSocket | None = None
        self._registers: dict[str, dict[str, Any]] = {}
        self._registered: dict[str, Any] | None = None
        self._frame_at_s = 0.0
        self._closing = False
        self._down_ended = asyncio.Event()

    async def run(self, agent: FrameSocket) -> None:
        """Pass frames on until either side ends. Raises only `CancelledError`, when the agent has disconnected."""
        self._agent = agent
        if self._spawn("agent-websocket", self._down(agent)) is None:
            agent.abort()
            self.abort()
            return
        try:
            await self._carry(agent, self._upstream, self._sniff_up)
            if self._closing:  # the agent waits for the controller's answer to its close frame
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(CLOSE_WAIT_S):
                        await self._down_ended.wait()
        finally:
            # A close frame to the controller needs time to arrive. Without one the agent's connection was lost, and the
            # controller's is dropped at once.
            if self._closing:
                asyncio.get_running_loop().call_later(CLOSE_WAIT_S, self._upstream.abort)
            else:
                self._upstream.abort()

    async def _down(self, agent: FrameSocket) -> None:
        try:
            await self._carry(self._upstream, agent, self._sniff_down)
        finally:
            self._down_ended.set()
            if self._closing:
                loop = asyncio.get_running_loop()
                loop.call_later(CLOSE_WAIT_S, agent.abort)
                loop.call_later(CLOSE_WAIT_S, self.abort)
            else:
                self.abort()
                agent.abort()

    async def _carry(self, source: FrameSocket, target: FrameSocket, look: Callable[[Frame], None]) -> None:
        """Pass frames from `source` to `target` until a close frame was passed on or one side is lost.

        `look` is called with each frame before it is passed on.
        """
        loop = asyncio.get_running_loop()
        self._frame_at_s = loop.time()
        while True:
            try:
                async with asyncio.timeout(IDLE_S):
                    frame = await source.receive_frame()
            except TimeoutError:
                if loop.time() - self._frame_at_s >= IDLE_S:
                    return
                continue
            if frame is None:
                return
            self._frame_at_s = loop.time()
            look(frame)
            try:
                async with asyncio.timeout(WRITE_S):
                    await target.write_frame(frame)
            except (ConnectionError, TimeoutError):
                return
            if frame.kind == "close":
                self._closing = True
                return

    async def go_away(self) -> None:
        """Send a close frame with 1001 to both sides."""
        self._closing = True
        for side in (self._agent, self._upstream):
            if side is not None:
                with contextlib.suppress(ConnectionError):
                    await side.write_frame(GOING_AWAY)

    def abort(self) -> None:
        """Drop the controller's connection and end the proxying. Idempotent."""
        self._upstream.abort()
        if not self.ended.done():
            self.ended.set_result(None)
            self._gone(self)
            if self._registered is not None:
                self._record(WebSocketEvent("closed", self._token, self._registered))

    # --- inspection of passing frames ---------------------------------------------------------------------------------

    def _sniff_up(self, frame: Frame) -> None:
        """Report the agent's own `register` to the bridge, which then ends the cluster's legacy session."""
        for request_id, payload in _messages(frame, "register"):
            named = {key: payload[key] for key in _IDENTITY if _is_short_text(payload.get(key))}
            if len(self._registers) < MAX_PENDING and len(request_id) <= MAX_REQUEST_ID_CHARS:
                self._registers[request_id] = named
            anew, self._registered = self._registered is None, self._registered or named
            self._record(WebSocketEvent("registers", self._token, named, anew=anew))

    def _sniff_down(self, frame: Frame) -> None:
        if self._registers:
            for request_id, payload in _messages(frame, "register_success"):
                register = self._registers.pop(request_id, None)
                cluster_id = payload.get("cluster_id")
                if register is not None and isinstance(cluster_id, str):
                    self._record(WebSocketEvent("registered", self._token, register, cluster_id))


def _is_short_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_NAME_CHARS


def _messages(frame: Frame, kind: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield the request id and the payload of each message of one type in a frame."""
    if frame.kind in ("text", "binary") and len(frame.data) <= MAX_SNIFFED_BYTES and kind.encode() in frame.data:
        for message in decode_frame(frame.data):
            if not isinstance(message, MessageError) and message.type == kind:
                yield message.request_id, message.payload
