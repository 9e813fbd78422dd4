"""WebSocket on top of aiohttp with explicit close (no autoclose, no autoping) and sending that never waits."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any, ClassVar, Literal, NamedTuple

from aiohttp import ClientWebSocketResponse, WebSocketError, WSCloseCode, WSMessage, WSMsgType, hdrs
from aiohttp._websocket.reader import WebSocketDataQueue, WebSocketReader

from shim.core.bounds import LONG_TEXT_BYTES
from shim.errors import MessageError
from shim.ports import Frame, WebSocketListener
from shim.protocol import upstream_message

CLOSE_WAIT_S = 2.0
MAX_WAITING_BYTES = 64 * 1024 * 1024
FRAME_COST_BYTES = 128  # memory of a queued frame besides its payload, so that many small frames count, too
FRAMES_PER_TURN = 64
MAX_PAUSE_S = 0.1
HELD_BACK_S = 1.0
ROOM_CHECK_S = 0.001

logger = logging.getLogger(__name__)

# RFC 6455 section 7.4: the codes that may be sent in a frame.
_SENDABLE = (range(1000, 1004), range(1007, 1015), range(3000, 5000))
_KINDS: dict[WSMsgType, Literal["text", "binary", "ping", "pong"]] = {
    WSMsgType.TEXT: "text",
    WSMsgType.BINARY: "binary",
    WSMsgType.PING: "ping",
    WSMsgType.PONG: "pong",
}
_OPCODES = {kind: opcode for opcode, kind in _KINDS.items()} | {"close": WSMsgType.CLOSE}
_MAX_CLOSE_TEXT_BYTES = 123
_DATA_TYPES = frozenset({WSMsgType.TEXT, WSMsgType.BINARY})


def reply_code(code: int) -> int:
    """Return the code for the reply to a peer's close frame: the peer's own, if it may be sent."""
    if not code:
        return int(WSCloseCode.OK)
    return code if any(code in codes for codes in _SENDABLE) else int(WSCloseCode.PROTOCOL_ERROR)


def frame_of(message: Any) -> Frame | None:
    """Convert a message of aiohttp to a frame; `None` for one that ends the connection without a close frame."""
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
    """aiohttp's frame reader, except that a close frame is always accepted with its code and text.

    aiohttp treats a reserved code, and a text that is no UTF-8, as a protocol error and hides the code. A controller
    that cuts its text at 123 bytes may cut a character in half, and its code must count nevertheless.
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
    """One WebSocket that only its pump closes.

    aiohttp closes by itself on end of file and on protocol errors, and waits for the peer meanwhile. It closes the
    transport gracefully, which never ends if the peer has stopped reading.
    """

    max_message_bytes: ClassVar[int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A released `response.connection` has no transport. A transport that hangs must be aborted even then, so it is
        # kept here.
        self._transport = None if self._conn is None else self._conn.transport

    @property
    def _parser(self) -> WebSocketReader | None:
        return self._frame_reader

    @_parser.setter
    def _parser(self, reader: WebSocketReader | None) -> None:
        """Install `CloseFrameReader` when the session sets aiohttp's reader, before the first byte is read."""
        self._frame_reader = reader and CloseFrameReader(self._reader, self.max_message_bytes)

    def watch(self, on_bytes: Callable[[], None]) -> None:
        """Call `on_bytes` whenever bytes have arrived, before the frames in them can be received."""
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
        """Wait for the next frame (`ports.FrameSocket`). A peer that violates the protocol is sent a close frame."""
        message = await self.receive()
        if isinstance(message.data, WebSocketError):
            with contextlib.suppress(ConnectionError):
                await self.send_close(int(message.data.code))
        return frame_of(message)

    async def write_frame(self, frame: Frame) -> None:
        """Write a frame, waiting while the peer does not read. Raises `ConnectionError`."""
        await self.send_frame(frame.data, opcode_of(frame))

    async def close(self, *, code: int = 1000, message: bytes = b"") -> bool:
        """Do nothing, because aiohttp's `receive` calls this method by itself."""
        return False

    def abort(self) -> None:
        """Abort the connection at once and release it to its session. Idempotent."""
        if self._transport is not None:
            self._transport.abort()
        self._response.close()


def websocket_class(max_message_bytes: int) -> type[RawWebSocket]:
    """Return the class for sockets whose messages must have fewer than `max_message_bytes` bytes."""
    return type("BoundedWebSocket", (RawWebSocket,), {"max_message_bytes": max_message_bytes})


class _State(Enum):
    OPEN = "open"
    CLOSING = "closing"  # the close frame is queued or sent, and the timer runs
    GONE = "gone"


class _End(NamedTuple):
    """The end of a connection, as in `ports.WebSocketListener.on_closed`.

    `reply` is the code of the close frame that answers the peer's last frame, 0 if none is due.
    """

    by_close_frame: bool = False
    code: int = 0
    reason: str = ""
    reply: int = 0


class WebSocketPump:
    """`ports.WebSocket` on aiohttp.

    `read()` reads and `write()` writes, each in its own task, until the connection ends.
    """

    def __init__(self, ws: RawWebSocket, events: WebSocketListener) -> None:
        self._ws = ws
        self._events = events
        self._state = _State.OPEN
        self._close_code = 1000
        self._close_sent = False
        self._frames: deque[tuple[bytes, WSMsgType]] = deque()
        self._waiting_bytes = 0
        self._wake = asyncio.Event()
        self._impatient = False
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self.ended = asyncio.Event()
        ws.watch(self._on_bytes)

    # --- ports.WebSocket ---

    def send(self, message: upstream_message.Message) -> None:
        """Queue one envelope as a text frame."""
        self._queue(upstream_message.encode(message), WSMsgType.TEXT)

    def ping(self, payload: bytes) -> None:
        """Queue a ping behind everything sent before, so that its pong proves that all of that has arrived."""
        self._queue(payload, WSMsgType.PING)

    def close(self, code: int) -> None:
        """Send the queued frames and a close frame; wait at most 2 s in all for the peer, then abort."""
        if self._state is _State.OPEN:
            self._state = _State.CLOSING
            self._close_code = code
            self._timer = self._loop.call_later(CLOSE_WAIT_S, self.abort)
            self._wake.set()

    def abort(self) -> None:
        """Abort the connection. `read` ends and reports it in the next iteration of the event loop."""
        self._state = _State.GONE
        self._frames.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake.set()
        self._ws.abort()

    # --- writing ---

    def _queue(self, data: bytes, kind: WSMsgType) -> None:
        if self._state is not _State.OPEN:
            return
        self._waiting_bytes += len(data) + FRAME_COST_BYTES
        if self._waiting_bytes > MAX_WAITING_BYTES:
            logger.warning("the peer does not read: the connection is dropped with %d bytes unsent", MAX_WAITING_BYTES)
            self.abort()
            return
        self._frames.append((data, kind))
        self._wake.set()

    async def write(self) -> None:
        """Write queued frames in order, the close frame last, until the connection ends."""
        try:
            while self._state is not _State.GONE:
                while self._frames:
                    data, kind = self._frames.popleft()
                    await self._ws.send_frame(data, kind)
                    self._waiting_bytes -= len(data) + FRAME_COST_BYTES
                if self._state is _State.CLOSING and not self._close_sent:
                    self._close_sent = True
                    await self._ws.send_close(self._close_code)
                self._wake.clear()
                await self._wake.wait()
        except ConnectionError:
            logger.debug("writing failed; the reader reports the end of the connection")
        except Exception:
            self.abort()  # otherwise the link would go on with nobody who writes
            raise

    # --- reading ---

    async def read(self) -> None:
        """Read until the connection ends, then report that. Frames after a protocol error are discarded."""
        end: _End | None = None
        frames = 0
        try:
            while end is None:
                message = await self._ws.receive()
                if message.type in _DATA_TYPES:
                    frame = bytes(message.data)
                    del message  # frees a long message: keep no second copy, and none while waiting for the next
                    began_s = self._loop.time()
                    await self._on_data(frame)
                    if len(frame) > LONG_TEXT_BYTES:
                        # Decoding it held the event loop: leave as much time to everything else.
                        await asyncio.sleep(min(self._loop.time() - began_s, MAX_PAUSE_S))
                    del frame
                else:
                    end = self._on_control(message)
                frames += 1
                if frames % FRAMES_PER_TURN == 0:
                    # receive() does not suspend while frames are buffered, so let other tasks run.
                    await asyncio.sleep(0)
        finally:
            self._finish(end or _End())

    def _finish(self, end: _End) -> None:
        """Close the connection with the reply that the peer's last frame requires, and report its end."""
        if end.reply and not self._close_sent:
            # A peer that closes, or that violates the protocol, does not process the queued frames. The TCP
            # connection is kept until the timer fires: closing it at once could reset it before the close frame
            # is read.
            self._frames.clear()
            self.close(end.reply)
        else:
            self.abort()
        self._report(self._events.on_closed, end.by_close_frame, end.code, end.reason)
        self.ended.set()

    async def _wait_for_room(self) -> None:
        """Wait until the listener has room, so that TCP slows down a peer that sends too fast.

        After `HELD_BACK_S` frames are read even without room, until there was room again: pings must be answered.
        """
        if self._events.has_room():
            self._impatient = False
        elif not self._impatient:
            give_up_at = self._loop.time() + HELD_BACK_S
            # Polling keeps the store independent of sockets: it makes the room, also by finishing commands of other
            # connections.
            while self._must_wait() and self._loop.time() < give_up_at:  # noqa: ASYNC110 - see above
                await asyncio.sleep(ROOM_CHECK_S)
            self._impatient = not self._events.has_room()

    def _must_wait(self) -> bool:
        """Return True if there is no room for a further frame and the connection is open."""
        return not self._events.has_room() and self._state is _State.OPEN

    def _on_bytes(self) -> None:
        self._report(self._events.on_frame)

    def _on_control(self, message: WSMessage) -> _End | None:
        """Handle a frame without data. Returns the end of the connection if the frame is the last one."""
        match message.type:
            case WSMsgType.PING:
                self._report(self._events.on_frame)
                self._queue(bytes(message.data), WSMsgType.PONG)
            case WSMsgType.PONG:
                self._report(self._events.on_frame)
                self._report(self._events.on_pong, bytes(message.data))
            case WSMsgType.CLOSE:
                self._report(self._events.on_frame)
                return _End(True, message.data, message.extra or "", reply_code(message.data))
            case WSMsgType.ERROR:
                return _End(reply=self._on_error(message.data))
            case _:
                return _End()
        return None

    async def _on_data(self, frame: bytes) -> None:
        """Report the messages of a frame at the pace at which the listener has room; there may be many of them."""
        self._report(self._events.on_frame)
        for number, message in enumerate(upstream_message.decode_frame(frame), 1):
            try:
                if isinstance(message, MessageError):
                    self._events.on_bad_frame(message.kind)
                else:
                    self._events.on_message(message)
            except Exception:
                logger.exception("a handler of messages failed")
            await self._wait_for_room()
            if number % FRAMES_PER_TURN == 0:
                await asyncio.sleep(0)

    def _on_error(self, error: BaseException) -> int:
        """Report a protocol error. Returns the code for the close frame."""
        code = int(error.code) if isinstance(error, WebSocketError) else int(WSCloseCode.PROTOCOL_ERROR)
        kind = "too_big" if code == WSCloseCode.MESSAGE_TOO_BIG else "protocol_error"
        self._report(self._events.on_bad_frame, kind)
        return code

    def _report(self, handler: Callable[..., None], *values: Any) -> None:
        """Call a handler. An exception from it is logged, so that it does not end the connection."""
        try:
            handler(*values)
        except Exception:
            logger.exception("a handler of socket events failed")
