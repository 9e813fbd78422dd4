"""The agent's side of a WebSocket that the shim proxies to the controller."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from aiohttp import EofStream, WebSocketError, WSMsgType, hdrs
from aiohttp._websocket.reader import WebSocketReader
from aiohttp.log import ws_logger
from aiohttp.web_request import BaseRequest
from aiohttp.web_ws import WebSocketResponse

from shim.agent_api.connection import RequestContext
from shim.agent_api.forwarding import headers_of
from shim.errors import AgentError
from shim.fallback.websocket_proxy import WebSocketProxy
from shim.ports import Frame
from shim.upstream.websocket import CloseFrameReader, frame_of, opcode_of

# aiohttp logs every subprotocol that it does not support, as the client sent it and at any length. The controller
# decides about subprotocols here, so such a warning would be wrong as well as unbounded.
ws_logger.setLevel(logging.ERROR)


class AgentWebSocket(WebSocketResponse):
    """One agent's WebSocket; implements `ports.FrameSocket`.

    The caller decides when it ends: aiohttp's automatic close and pong are off.
    """

    def __init__(self, max_message_bytes: int, subprotocol: str) -> None:
        super().__init__(
            autoclose=False,
            autoping=False,
            compress=False,
            max_msg_size=max_message_bytes + 1,  # aiohttp refuses a message of exactly its limit
            decode_text=False,  # text that is not UTF-8 is passed on: the controller decides about it
            protocols=(subprotocol,) if subprotocol else (),
        )
        self._bound = max_message_bytes + 1
        self._transport: asyncio.Transport | None = None
        self.headers[hdrs.SERVER] = "agent-shim"

    @property
    def _parser(self) -> WebSocketReader | None:
        return self._frame_reader

    @_parser.setter
    def _parser(self, reader: WebSocketReader | None) -> None:
        """Set a reader of ours in place of aiohttp's.

        aiohttp assigns its reader to its private attribute `_parser` before the first byte is read. That reader rejects
        close frames with a reserved code or an invalid text, which must be passed on.
        """
        self._frame_reader = CloseFrameReader(self._reader, self._bound) if reader and self._reader else None

    async def prepare(self, request: BaseRequest) -> Any:
        """Answer the handshake with 101."""
        self._transport = request.transport
        return await super().prepare(request)

    async def close(self, **_: Any) -> bool:
        """Do nothing: aiohttp calls this method after the handler, but the caller closes the connection."""
        return False

    async def receive_frame(self) -> Frame | None:
        """Wait for the next frame, or return None at the end; implements `ports.FrameSocket.receive_frame`.

        An agent that violates the protocol gets a close frame with the matching code.
        """
        if self._reader is None:
            return None
        try:
            return frame_of(await self._reader.read())
        except WebSocketError as error:
            await self.write_frame(Frame("close", int(error.code).to_bytes(2, "big")))
            return None
        except (EofStream, ConnectionError):
            return None

    async def write_frame(self, frame: Frame) -> None:
        """Write a frame, and wait while the agent does not read. Raises `ConnectionError`."""
        await self.send_frame(frame.data, WSMsgType(opcode_of(frame)))

    def abort(self) -> None:
        """Drop the connection: by FIN if everything is written, else by RST. Idempotent."""
        transport = self._transport
        if transport is None:
            return
        # asyncio's TLS transport drops its connection when it is closed a second time: then only `abort` may be called.
        if transport.is_closing() or transport.get_write_buffer_size():
            transport.abort()
        else:
            transport.close()


async def carry(
    request: RequestContext, websockets: WebSocketProxy, target: str, token: str, max_message_bytes: int
) -> AgentWebSocket:
    """Open both sides of an agent's WebSocket, and pass on its frames until it ends.

    Raises `AgentError` if the handshake is malformed or the controller's side cannot be opened.
    """
    request.step = "call"
    aiohttp_request = request.request
    if aiohttp_request is None or not AgentWebSocket(max_message_bytes, "").can_prepare(aiohttp_request):
        raise AgentError(400, "malformed WebSocket handshake")
    request.step = "answer"
    carried = await websockets.open(target, headers_of(request.message), token)
    agent = AgentWebSocket(max_message_bytes, carried.subprotocol)
    try:
        await agent.prepare(aiohttp_request)
    except BaseException:
        carried.abort()
        raise
    await carried.run(agent)
    return agent
