"""aiohttp's server with connections of our own kind, with and without TLS."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from aiohttp import web

from shim.frontend.connection import AgentConnection, SyncHandler
from shim.frontend.house import ServerContext

ACCEPT_AGAIN_S = 1.0

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

logger = logging.getLogger(__name__)


class ConnectionServer(web.Server):
    """aiohttp's server with connections of our own kind. `express` answers at once what it can."""

    def __init__(
        self, handler: Handler, house: ServerContext, express: SyncHandler, make: Callable[..., AgentConnection], **options: Any
    ) -> None:
        # aiohttp's default keeps a handler running after its agent has left: a held poll would swallow a command
        super().__init__(handler, handler_cancellation=True, **options)
        self._express = express
        self._house = house
        self._make = make
        self._numbers = itertools.count(1)

    def __call__(self) -> AgentConnection:
        return self._make(self, self._house, self._express, next(self._numbers), self._kwargs)


class TlsListener:
    """Accepts connections and makes the TLS handshake, so that they are counted before it and bounded in time.

    asyncio's own listener tells of a connection only after its handshake: peers that never begin one would be unseen.
    """

    def __init__(self, make: Callable[[], AgentConnection], context: ssl.SSLContext, timeout_s: float, backlog: int) -> None:
        self._make = make
        self._context = context
        self._timeout_s = timeout_s
        self._backlog = backlog
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, sockets: list[socket.socket]) -> None:
        """Listen on bound sockets."""
        for listening in sockets:
            listening.listen(self._backlog)
            self._spawn(self._accept(listening))

    def stop(self) -> None:
        """Accept no more, and give up the handshakes under way."""
        for task in self._tasks:
            task.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listening)
            except OSError as error:  # no descriptors left: the kernel keeps the connections meanwhile
                logger.warning("a connection cannot be accepted: %s", error.strerror)
                await asyncio.sleep(ACCEPT_AGAIN_S)
                continue
            connection = self._make()
            if connection.enter():
                self._spawn(self._shake_hands(accepted, connection))
            else:
                connection.leave()
                accepted.close()

    async def _shake_hands(self, accepted: socket.socket, connection: AgentConnection) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection, accepted, ssl=self._context, ssl_handshake_timeout=self._timeout_s
            )
        except OSError as error:  # that is ssl.SSLError and TimeoutError, too
            logger.debug("a TLS handshake failed: %s", type(error).__name__)
        finally:
            if connection.transport is None:
                connection.leave()
                accepted.close()
