"""Server-sent events of the status: a whole snapshot every second, and each sample for the plots."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, cast

import msgspec
from aiohttp import hdrs
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import StreamResponse

from shim.admin.connection_limit import AdminConnection
from shim.errors import OperatorError
from shim.management.status import Status
from shim.management.time_series import Sampler
from shim.ports import Clock

EVERY_S = 1.0
MAX_EVERY_S = 5.0
SHARE = 0.02
"""Largest share of the event loop's time for snapshots. With thousands of agents they are taken less often."""
MAX_READERS = 16


class EventStream:
    """Handler of `/events`. `prepare` awaits the readiness checks, and `take` then makes the snapshot synchronously.

    All readers share a snapshot, so that their number does not slow down the agents' calls.
    """

    def __init__(
        self,
        clock: Clock,
        sampler: Sampler,
        prepare: Callable[[], Awaitable[list[str]]],
        take: Callable[[list[str]], Status],
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
        """End all streams, after a last snapshot that says that the shim stops."""
        self._taken_at = float("-inf")
        self._stopped.set()

    async def serve(self, request: BaseRequest) -> StreamResponse:
        """Stream until the reader disconnects or the shim stops. Raises `OperatorError` 503."""
        reader = cast("AdminConnection", request.protocol)
        response = StreamResponse(headers={**reader.headers, "Content-Type": "text/event-stream; charset=utf-8"})
        if request.method == hdrs.METH_HEAD:
            return response
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
        """Drop the readers that do not read. Raises `OperatorError` 503 if there is none."""
        stalled = {reader for reader in self._readers if reader.stalled}
        if not stalled:
            raise OperatorError(503, "too many pages are open")
        self._readers -= stalled
        for reader in stalled:
            reader.abort()

    async def _stream(self, response: StreamResponse) -> None:
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
        await response.write(await self.status())

    async def status(self) -> bytes:
        """Return the event with the present snapshot, which is shared for half of the interval."""
        reasons = await self._prepare()
        began = self._clock.monotonic_s()
        if began - self._taken_at >= self._every_s / 2:
            self._status = _event("status", self._take(reasons))
            took_s = self._clock.monotonic_s() - began
            self._taken_at = began
            self._every_s = min(max(EVERY_S, took_s / SHARE), MAX_EVERY_S)
        return self._status


def _event(name: str, data: Status | dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(data))
