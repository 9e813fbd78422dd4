"""Connections to the admin port, limited in number, idle time, and the time for which a peer may not read.

The kubelet's probes use this port, so a new connection is always accepted: the one that is idle for longest is closed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, cast

import msgspec
from aiohttp import hdrs
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import StreamResponse, json_response
from aiohttp.web_server import Server

from shim.core.bounds import Budget
from shim.http_connection import HttpConnection

MAX_CONNECTIONS = 64
MAX_BUSY = 48
"""Requests in progress at a time. Probes are served beyond that."""
FIRST_REQUEST_S = 10.0
"""Seconds for the head of the first request."""
IDLE_S = 5.0
"""Seconds between two requests of a connection."""
STALL_S = 10.0
"""Seconds after which a peer that reads nothing of a response is dropped."""
SEND_BYTES = 16_384
"""Size of the kernel's send buffer: a small one shows sooner that a peer does not read."""
MAX_HELD_BYTES = 1_048_576
"""Bytes of the heads and waiting requests of all connections together."""
PROBES = frozenset({"/healthz", "/readyz"})

logger = logging.getLogger(__name__)


class Connections:
    """All connections, the least recently used first. An instance is the listener's protocol factory."""

    def __init__(self, server: Server, options: dict[str, Any], headers: Mapping[str, str]) -> None:
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
        """Number of connections with a request in progress."""
        return sum(connection.busy for connection in self._open)

    def enter(self, connection: AdminConnection) -> None:
        """Add a new connection. If there is no room, the one that is idle for longest is closed."""
        if len(self._open) >= MAX_CONNECTIONS:
            idle = next((each for each in self._open if not each.busy), None)
            leaving = next(iter(self._open)) if idle is None else idle
            self.leave(leaving)
            leaving.abort()
        self._open[connection] = None

    def used(self, connection: AdminConnection) -> None:
        """Mark a connection as the most recently used."""
        if connection in self._open:
            del self._open[connection]
            self._open[connection] = None

    def leave(self, connection: AdminConnection) -> None:
        """Remove a connection. Idempotent."""
        self._open.pop(connection, None)


class AdminConnection(HttpConnection):
    """One connection to the admin port."""

    __slots__ = ("_connections", "_stall_timer", "_unsent_bytes", "headers")

    def __init__(self, connections: Connections, server: Server, options: dict[str, Any]) -> None:
        super().__init__(server, connections.budget, FIRST_REQUEST_S, options)
        self.headers = connections.headers
        self._connections = connections
        self._stall_timer: asyncio.TimerHandle | None = None
        self._unsent_bytes = 0

    @property
    def busy(self) -> bool:
        """True while a request is in progress."""
        return self._open

    @property
    def stalled(self) -> bool:
        """True while the peer does not read what is written for it."""
        return self.writing_paused

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection and bound the time of its first request."""
        self._wire = wire = cast("asyncio.Transport", transport)
        self._connections.enter(self)
        wire.set_write_buffer_limits(high=0)
        super().connection_made(transport)
        self._watch_for_first_request(FIRST_REQUEST_S)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Release everything that the connection holds, and end its count."""
        self._connections.leave(self)
        self._drop_what_is_held()
        self._watch_writing(None)
        self._wire = None
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Bound the time for which the peer may stop reading."""
        super().pause_writing()
        self._unsent_bytes = self._size_unsent()
        self._watch_writing(STALL_S)

    def resume_writing(self) -> None:
        """End the bound: the peer has read everything."""
        super().resume_writing()
        self._watch_writing(None)

    def _watch_writing(self, after_s: float | None) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        self._stall_timer = None if after_s is None else self._loop.call_later(after_s, self._check_writing)

    def _check_writing(self) -> None:
        """Drop a peer that has read nothing since the last check."""
        before_bytes, self._unsent_bytes = self._unsent_bytes, self._size_unsent()
        if self._unsent_bytes >= before_bytes:
            logger.info("a reader of the admin port that does not read is dropped")
            self.abort()
        else:
            self._watch_writing(STALL_S)

    def _size_unsent(self) -> int:
        return 0 if self._wire is None else self._wire.get_write_buffer_size()

    def _begin_request(self, message: RawRequestMessage, body: StreamReader, arrived_s: float) -> bool:
        self._connections.used(self)
        if message.headers.get(hdrs.EXPECT, "100-continue").lower() == "100-continue":
            return False
        self._turn_away(417, "the expectation cannot be met", "http")  # aiohttp would repeat the header's value
        return True

    def _refusal(self, status: int, text: str, more: str = "") -> bytes:
        body = msgspec.json.encode({"error": text})
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "Content-Type: application/json; charset=utf-8"]
        lines += (f"{name}: {value}" for name, value in self._connections.headers.items())
        lines += (f"Content-Length: {len(body)}", "Connection: close", more)
        return "\r\n".join(lines).encode() + b"\r\n" + body

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> StreamResponse:
        """Return a JSON reply for an exception of a handler: aiohttp would return a page of its own."""
        logger.error("a defect of the admin port", exc_info=exc)
        response = json_response({"error": "internal error"}, status=status, headers=self._connections.headers)
        response.force_close()
        return response
