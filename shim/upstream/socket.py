"""aiohttp's WebSocket, stripped of its own ideas of closing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from aiohttp import ClientWebSocketResponse, WebSocketError, WSCloseCode, WSMessage, WSMsgType, hdrs
from aiohttp._websocket.reader import WebSocketDataQueue, WebSocketReader

from shim.ports import Frame

# RFC 6455 section 7.4: the codes between 1000 and 4999 that may not stand in a frame.
_UNSENDABLE = frozenset({1004, 1005, 1006, *range(1015, 3000)})


def reply_code(code: int) -> int:
    """Return the code that answers a peer's close frame: its own, where it may be sent at all."""
    if not code:
        return int(WSCloseCode.OK)
    return code if 1000 <= code < 5000 and code not in _UNSENDABLE else int(WSCloseCode.PROTOCOL_ERROR)


_KINDS: dict[WSMsgType, Literal["text", "binary", "ping", "pong"]] = {
    WSMsgType.TEXT: "text",
    WSMsgType.BINARY: "binary",
    WSMsgType.PING: "ping",
    WSMsgType.PONG: "pong",
}
_OPCODES = {kind: opcode for opcode, kind in _KINDS.items()} | {"close": WSMsgType.CLOSE}
_MAX_CLOSE_TEXT_BYTES = 123


def frame_of(message: Any) -> Frame | None:
    """Return one of aiohttp's messages as a frame, `None` for one that ends the connection without a close frame."""
    kind = _KINDS.get(message.type)
    if kind is not None:
        return Frame(kind, bytes(message.data))
    if message.type is not WSMsgType.CLOSE:
        return None
    text = (message.extra or "").encode()[:_MAX_CLOSE_TEXT_BYTES].decode("utf-8", "ignore").encode()
    return Frame("close", message.data.to_bytes(2, "big") + text if message.data else b"")


def opcode_of(frame: Frame) -> WSMsgType:
    """Return the opcode of a frame."""
    return _OPCODES[frame.kind]


class CloseFrameReader(WebSocketReader):
    """aiohttp's reader of frames, except that a close frame is always taken with its code and its text.

    aiohttp calls a reserved code, and a text that is no UTF-8, a protocol error and hides the code. A controller that
    cuts its text at 123 bytes may cut a character in half, and its code must count all the same.
    """

    def __init__(self, queue: WebSocketDataQueue, max_message_bytes: int) -> None:
        super().__init__(queue, max_message_bytes, compress=False, decode_text=False)
        self._frames = queue

    def _handle_frame(self, fin: bool, opcode: int, payload: bytes | bytearray, compressed: int) -> None:
        if opcode == WSMsgType.CLOSE and len(payload) >= 2:
            code, text = int.from_bytes(payload[:2], "big"), payload[2:].decode("utf-8", "replace")
            self._frames.feed_data(WSMessage(WSMsgType.CLOSE, code, text), 0)
        else:
            super()._handle_frame(fin, opcode, payload, compressed)


class RawWebSocket(ClientWebSocketResponse):
    """One WebSocket whose end is decided by its pump alone.

    aiohttp closes by itself on end of file and on protocol errors, waits for the peer while it does, and closes the
    transport gracefully, which never ends when the peer has stopped reading.
    """

    max_message_bytes: ClassVar[int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # `response.connection` forgets its transport when it is released, but a stuck one must still be aborted then.
        self._transport = None if self._conn is None else self._conn.transport

    @property
    def _parser(self) -> WebSocketReader | None:
        return self._frame_reader

    @_parser.setter
    def _parser(self, reader: WebSocketReader | None) -> None:
        """Take our own reader where the session sets aiohttp's, before the first byte is read."""
        self._frame_reader = reader and CloseFrameReader(self._reader, self.max_message_bytes)

    def watch(self, on_bytes: Callable[[], None]) -> None:
        """Call back whenever bytes have arrived, before the frames in them can be received."""
        protocol = None if self._conn is None else self._conn.protocol
        if protocol is not None and self._parser is not None:
            protocol.set_parser(self._parser, self._reader, on_bytes)

    async def send_close(self, code: int) -> None:
        """Send a close frame. Raises `ConnectionError`."""
        await self.send_frame(code.to_bytes(2, "big"), WSMsgType.CLOSE)

    @property
    def subprotocol(self) -> str:
        """The subprotocol that the server chose, or an empty text."""
        return self._response.headers.get(hdrs.SEC_WEBSOCKET_PROTOCOL, "")

    async def receive_frame(self) -> Frame | None:
        """Wait for the next frame (`ports.FrameSocket`); a peer that breaks the protocol is told so."""
        message = await self.receive()
        if isinstance(message.data, WebSocketError):
            with contextlib.suppress(ConnectionError):
                await self.send_close(int(message.data.code))
        return frame_of(message)

    async def write_frame(self, frame: Frame) -> None:
        """Write a frame, and wait while the peer does not read. Raises `ConnectionError`."""
        await self.send_frame(frame.data, opcode_of(frame))

    async def close(self, *, code: int = 1000, message: bytes = b"") -> bool:
        """Do nothing: `receive` calls this on its own."""
        return False

    def abort(self) -> None:
        """Drop the connection at once and give it back to its session. Idempotent."""
        if self._transport is not None:
            self._transport.abort()
        self._response.close()


def websocket_class(max_message_bytes: int) -> type[RawWebSocket]:
    """Return the class for sockets that take messages of fewer bytes than this."""
    return type("BoundedWebSocket", (RawWebSocket,), {"max_message_bytes": max_message_bytes})
