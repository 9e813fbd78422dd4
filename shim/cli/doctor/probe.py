"""Dial the controller with the shim's own dialler, and record the steps.

Nothing is registered: a WebSocket is closed after one ping, and the request for the time carries no identity.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from shim.clock import Clock
from shim.config.settings import DialSettings, Upstream
from shim.core.text import printable
from shim.ports import DialFailure, DialRequest, WebSocket
from shim.protocol.http import http_url, ws_url
from shim.protocol.upstream_message import Message
from shim.redaction import without_secrets
from shim.upstream import AiohttpUpstream, Dialler, DialTrace, failure_of

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
    """Implementation of `ports.SocketEvents` that waits for the pong to one ping."""

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


async def ask_head(url: str, settings: DialSettings, environ: Mapping[str, str], *, name: str = "upstream") -> Dial:
    """Send a HEAD request without a token to `url` (any scheme)."""
    dial = Dial(http_url(url), settings)
    dialler = Dialler(settings, environ, name=name, read_timeout_s=settings.connect_timeout_s, trace=dial.trace)
    try:
        async with asyncio.timeout(2 * settings.connect_timeout_s):
            response = await dialler.request("HEAD", dial.url, {})
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
    return await ask_head(ws_url(upstream.url, upstream.path).partition("?")[0], unchecked, environ)
