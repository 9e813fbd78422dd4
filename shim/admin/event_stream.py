"""The status as server-sent events: a whole snapshot every second, and the samples of the plots as they are taken."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, cast

import msgspec
from aiohttp import hdrs, web

from shim.admin.connection_limit import AdminConnection
from shim.admin.time_series import Sampler
from shim.errors import OperatorError
from shim.ports import Clock

EVERY_S = 1.0
MAX_EVERY_S = 5.0
SHARE = 0.02
"""Of the event loop's time: with thousands of agents a snapshot takes so long that it must be taken less often."""
MAX_READERS = 16


class EventStream:
    """Serves `/events`. `prepare` gets what takes its time, and `take` makes the snapshot of it at once.

    All readers share a snapshot, so that their number costs the agents nothing.
    """

    def __init__(
        self,
        clock: Clock,
        sampler: Sampler,
        prepare: Callable[[], Awaitable[list[str]]],
        take: Callable[[list[str]], dict[str, Any]],
    ) -> None:
        self._clock = clock
        self._sampler = sampler
        self._prepare = prepare
        self._take = take
        self._stopped = asyncio.Event()
        self._readers: set[AdminConnection] = set()
        self._every_s = EVERY_S
        self._taken_at = float("-inf")
        self._status = b""

    def stop(self) -> None:
        """End all streams."""
        self._stopped.set()

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Stream until the reader leaves or the shim stops. Raises `OperatorError` 503."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        if request.method == hdrs.METH_HEAD:
            return response
        reader = cast("AdminConnection", request.protocol)
        if len(self._readers) >= MAX_READERS:
            self._make_room()
        self._readers.add(reader)
        try:
            await response.prepare(request)
            with suppress(ConnectionError):
                await self._stream(response)
        finally:
            self._readers.discard(reader)
        return response

    def _make_room(self) -> None:
        """Drop the readers that do not read. Raises `OperatorError` 503 if all do."""
        stalled = {reader for reader in self._readers if reader.stalled}
        if not stalled:
            raise OperatorError(503, "too many pages are open")
        self._readers -= stalled
        for reader in stalled:
            reader.abort()

    async def _stream(self, response: web.StreamResponse) -> None:
        taken = self._sampler.taken
        await response.write(_event("series", self._sampler.last()))
        while not self._stopped.is_set():
            await response.write(await self.status())
            if self._sampler.taken > taken:
                await response.write(_event("samples", self._sampler.last(self._sampler.taken - taken)))
                taken = self._sampler.taken
            with suppress(TimeoutError):
                async with asyncio.timeout(self._every_s):
                    await self._stopped.wait()

    async def status(self) -> bytes:
        """The event of a snapshot that is not older than its readers' pace."""
        reasons = await self._prepare()
        began = self._clock.monotonic_s()
        if began - self._taken_at >= self._every_s / 2:
            self._status = _event("status", self._take(reasons))
            took_s = self._clock.monotonic_s() - began
            self._taken_at = began
            self._every_s = min(max(EVERY_S, took_s / SHARE), MAX_EVERY_S)
        return self._status


def _event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(data))
