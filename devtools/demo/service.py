"""A stand-in for a Kubernetes Service, for one agent: each of its connections goes to a replica that accepts it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress

_CHUNK_BYTES = 65_536


class Service:
    """A TCP proxy. `replicas` maps names to addresses and may change; `reached` is where the last connection went."""

    def __init__(self, replicas: Mapping[str, str]) -> None:
        self._replicas = replicas
        self._first = ""
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self.reached = ""

    async def listen(self) -> str:
        """Start, and return the URL that the agent calls."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        return f"http://{host}:{port}"

    def prefer(self, replica: str) -> None:
        """Send connections to this replica from now on, while it accepts them; close those that are open."""
        self._first = replica
        for writer in self._open:
            writer.close()

    def close(self) -> None:
        """Stop, and close all connections."""
        if self._server is not None:
            self._server.close()
        for writer in self._open:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            await self._pass_on(reader, writer)
        except OSError:
            pass  # one side is gone, and so is the other
        finally:
            self._open.discard(writer)
            writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found = await self._connect()
        if found is None:
            return
        back, forth = found
        self._open.add(forth)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_pump(reader, forth))
                group.create_task(_pump(back, writer))
        finally:
            self._open.discard(forth)
            forth.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        for name in sorted(self._replicas, key=lambda each: each != self._first):
            host, _, port = self._replicas[name].rpartition(":")
            with suppress(OSError):
                found = await asyncio.open_connection(host, int(port))
                self.reached = name
                return found
        return None


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on all bytes of one direction, then close the other side."""
    with suppress(OSError):
        while data := await reader.read(_CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
    writer.close()
