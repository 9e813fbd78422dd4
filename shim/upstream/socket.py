"""aiohttp's WebSocket, stripped of its own ideas of closing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiohttp import ClientWebSocketResponse, WSMsgType


class RawWebSocket(ClientWebSocketResponse):
    """A WebSocket whose end is decided by its pump alone.

    aiohttp closes by itself on end of file and on protocol errors, waits for the peer while it does, and closes the
    transport gracefully, which never ends when the peer has stopped reading.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # `response.connection` forgets its transport when it is released, but a stuck one must still be aborted then.
        self._transport = None if self._conn is None else self._conn.transport

    def watch(self, on_bytes: Callable[[], None]) -> None:
        """Call back whenever bytes have arrived, before the frames in them can be received."""
        protocol = None if self._conn is None else self._conn.protocol
        if protocol is not None and self._parser is not None:
            protocol.set_parser(self._parser, self._reader, on_bytes)

    async def send_close(self, code: int) -> None:
        """Send a close frame. Raises `ConnectionError`."""
        await self.send_frame(code.to_bytes(2, "big"), WSMsgType.CLOSE)

    async def close(self, *, code: int = 1000, message: bytes = b"") -> bool:
        """Do nothing: `receive` calls this on its own."""
        return False

    def abort(self) -> None:
        """Drop the connection at once and give it back to its session. Idempotent."""
        if self._transport is not None:
            self._transport.abort()
        self._response.close()
