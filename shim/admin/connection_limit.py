"""Connections to the admin port: bounded in number, and none may be idle, slow or unread for long.

The kubelet's probes come here, so that a newcomer always gets in: the connection that is idle for longest makes room.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, cast

import msgspec
from aiohttp import hdrs, web
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader

from shim.http_connection import Budget, HttpConnection

MAX_CONNECTIONS = 64
MAX_BUSY = 48
"""Requests under way at a time; those of probes are served beyond."""
FIRST_REQUEST_S = 10.0
"""Time for the head of a request."""
IDLE_S = 5.0
"""Time between two requests of a connection."""
STALL_S = 10.0
"""Time in which a peer takes nothing of a response."""
SEND_BYTES = 16_384
"""What the kernel buffers for a peer, so that one who does not read is noticed soon."""
MAX_HELD_BYTES = 1_048_576
"""Heads and waiting requests of all connections together."""
PROBES = frozenset({"/healthz", "/readyz"})

logger = logging.getLogger(__name__)


class Connections:
    """All connections, the one first that is idle for longest. An instance is the listener's protocol factory."""

    def __init__(self, server: web.Server, options: dict[str, Any], headers: Mapping[str, str]) -> None:
        self.headers = headers
        self.budget = Budget(MAX_HELD_BYTES)
        self._server = server
        self._options = options
        self._open: dict[AdminConnection, None] = {}

    def __call__(self) -> AdminConnection:
        return AdminConnection(self, self._server, self._options)

    def __len__(self) -> int:
        return len(self._open)

    @property
    def busy(self) -> int:
        """How many have a request under way."""
        return sum(connection.busy for connection in self._open)

    def enter(self, connection: AdminConnection) -> None:
        """Take a newcomer in; where there is no room, the one goes that is idle for longest."""
        if len(self._open) >= MAX_CONNECTIONS:
            idle = next((each for each in self._open if not each.busy), None)
            leaving = next(iter(self._open)) if idle is None else idle
            self.leave(leaving)
            leaving.abort()
        self._open[connection] = None

    def used(self, connection: AdminConnection) -> None:
        """Note that a connection is in use now."""
        if connection in self._open:
            del self._open[connection]
            self._open[connection] = None

    def leave(self, connection: AdminConnection) -> None:
        """Forget a connection. Idempotent."""
        self._open.pop(connection, None)


class AdminConnection(HttpConnection):
    """One connection to the admin port."""

    __slots__ = ("_connections", "_stall_timer", "_unsent_bytes")

    def __init__(self, connections: Connections, server: web.Server, options: dict[str, Any]) -> None:
        super().__init__(server, connections.budget, FIRST_REQUEST_S, options)
        self._connections = connections
        self._stall_timer: asyncio.TimerHandle | None = None
        self._unsent_bytes = 0

    @property
    def busy(self) -> bool:
        """True while a request is under way."""
        return self._open

    @property
    def stalled(self) -> bool:
        """True while the peer does not take what is written for it."""
        return self.writing_paused

    def abort(self) -> None:
        """Drop the connection with everything unsent."""
        if self._wire is not None:
            self._wire.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._wire = wire = cast("asyncio.Transport", transport)
        self._connections.enter(self)
        wire.set_write_buffer_limits(high=0)
        super().connection_made(transport)
        self._watch_for_first_request(FIRST_REQUEST_S)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.leave(self)
        self._drop_what_is_held()
        self._watch_writing(None)
        self._wire = None
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent_bytes = self._size_unsent()
        self._watch_writing(STALL_S)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch_writing(None)

    def _watch_writing(self, after_s: float | None) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        self._stall_timer = None if after_s is None else self._loop.call_later(after_s, self._check_writing)

    def _check_writing(self) -> None:
        """Drop a peer that has taken nothing of what was written for it."""
        before_bytes, self._unsent_bytes = self._unsent_bytes, self._size_unsent()
        if self._unsent_bytes >= before_bytes:
            logger.info("a reader of the admin port that does not read is dropped")
            self.abort()
        else:
            self._watch_writing(STALL_S)

    def _size_unsent(self) -> int:
        return 0 if self._wire is None else self._wire.get_write_buffer_size()

    def _answered_at_once(self, message: RawRequestMessage, body: StreamReader, arrived_s: float) -> bool:
        self._connections.used(self)
        if message.headers.get(hdrs.EXPECT, "100-continue").lower() == "100-continue":
            return False
        self._turn_away(417, "the expectation cannot be met", "http")  # aiohttp would echo it
        return True

    def _refusal(self, status: int, text: str, more: str = "") -> bytes:
        body = msgspec.json.encode({"error": text})
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "Content-Type: application/json; charset=utf-8"]
        lines += (f"{name}: {value}" for name, value in self._connections.headers.items())
        lines += (f"Content-Length: {len(body)}", "Connection: close", more)
        return "\r\n".join(lines).encode() + b"\r\n" + body

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what a handler failed over: aiohttp would write a page of its own."""
        logger.error("a defect of the admin port", exc_info=exc)
        response = web.json_response({"error": "internal error"}, status=status, headers=self._connections.headers)
        response.force_close()
        return response
