"""Bounds of the admin listener: whoever reaches it must not use up the descriptors that agents need."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

MAX_CONNECTIONS = 64
FIRST_REQUEST_S = 10.0
_END_OF_HEAD = b"\r\n\r\n"


class Bounded:
    """A protocol factory in front of another's: so many connections at a time, none silent or slow at its start.

    Once a connection has sent the head of a request, the inner protocol's keep-alive watches it.
    """

    def __init__(self, make: Callable[[], asyncio.Protocol]) -> None:
        self._make = make
        self.open_connections = 0

    def __call__(self) -> asyncio.Protocol:
        return _Connection(self, self._make())


class _Connection(asyncio.Protocol):
    def __init__(self, owner: Bounded, inner: asyncio.Protocol) -> None:
        self._owner = owner
        self._inner = inner
        self._refused = False
        self._timer: asyncio.TimerHandle | None = None
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._owner.open_connections += 1
        wire = cast("asyncio.Transport", transport)
        if self._owner.open_connections > MAX_CONNECTIONS:
            self._refused = True
            wire.abort()
            return
        self._timer = asyncio.get_running_loop().call_later(FIRST_REQUEST_S, wire.abort)
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._timer is not None:
            seen = self._tail + data
            if _END_OF_HEAD in seen:
                self._timer.cancel()
                self._timer = None
            self._tail = seen[1 - len(_END_OF_HEAD) :]
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner.open_connections -= 1
        if self._timer is not None:
            self._timer.cancel()
        if not self._refused:
            self._inner.connection_lost(exc)
