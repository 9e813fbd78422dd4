"""The status as server-sent events: a whole snapshot every second, and the samples of the plots as they are taken."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import msgspec
from aiohttp import web

from shim.admin.series import Sampler
from shim.errors import OperatorError

EVERY_S = 1.0
MAX_READERS = 16


class Live:
    """Serves `/events`; `take` makes a snapshot."""

    def __init__(self, take: Callable[[], Awaitable[dict[str, Any]]], sampler: Sampler) -> None:
        self._take = take
        self._sampler = sampler
        self._stopped = asyncio.Event()
        self._readers = 0

    def stop(self) -> None:
        """End all streams."""
        self._stopped.set()

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Stream until the reader leaves or the shim stops."""
        if self._readers >= MAX_READERS:
            raise OperatorError(503, "too many pages are open")
        self._readers += 1
        try:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
            await response.prepare(request)
            with suppress(ConnectionError):
                await self._stream(response)
        finally:
            self._readers -= 1
        return response

    async def _stream(self, response: web.StreamResponse) -> None:
        taken = self._sampler.taken
        await response.write(_event("series", self._sampler.last()))
        while not self._stopped.is_set():
            await response.write(_event("status", await self._take()))
            if self._sampler.taken > taken:
                await response.write(_event("samples", self._sampler.last(self._sampler.taken - taken)))
                taken = self._sampler.taken
            with suppress(TimeoutError):
                async with asyncio.timeout(EVERY_S):
                    await self._stopped.wait()


def _event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(data))
