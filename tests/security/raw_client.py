"""What an attacker has: raw sockets, and listeners that note who came."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

WAIT_S = 60.0


class Reply(NamedTuple):
    """A response; status 0: the connection was closed without one."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def said(self) -> str:
        """The status and the sentence of a refusal."""
        if not self.status:
            return "closed"
        try:
            return f"{self.status} {self.json['error']}"
        except (ValueError, KeyError, TypeError):
            return str(self.status)


def request(method: str, target: str, *headers: str, body: bytes = b"", host: str = "localhost") -> bytes:
    """A request as bytes."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", *headers]
    if body or method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + body


class Line:
    """One connection to `host:port`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def to(cls, address: str, context: ssl.SSLContext | None = None) -> Line:
        """Connect, by TLS with a context."""
        host, _, port = address.removeprefix("http://").rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port), limit=2**24, ssl=context))

    async def send(self, data: bytes) -> None:
        with suppress(ConnectionError):
            self._writer.write(data)
            await self._writer.drain()

    async def reply(self, *, head_only: bool = False) -> Reply:
        """The next response."""
        async with asyncio.timeout(WAIT_S):
            try:
                head = await self._reader.readuntil(b"\r\n\r\n")
                lines = head.decode("latin-1").split("\r\n")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
                body = await self._reader.readexactly(0 if head_only else int(headers.get("content-length", "0")))
            except (ConnectionError, asyncio.IncompleteReadError):
                return Reply(0, {}, b"")
        return Reply(int(lines[0].split()[1]), headers, body)

    async def closed(self) -> bool:
        """Wait until the other side has closed."""
        async with asyncio.timeout(WAIT_S):
            with suppress(ConnectionError):
                while await self._reader.read(65536):
                    pass
        return True

    def close(self) -> None:
        self._writer.transport.abort()


async def ask(address: str, data: bytes, context: ssl.SSLContext | None = None) -> Reply:
    """Make one request on a connection of its own."""
    line = await Line.to(address, context)
    await line.send(data)
    try:
        return await line.reply()
    finally:
        line.close()


class Trap:
    """A listener of the attacker's, which answers each connection with the same bytes."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.heard: list[bytes] = []
        self.port = 0
        self._visited = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            self.heard.append(await reader.read(65536))
            self._visited.set()
            writer.write(self.answer)
            await writer.drain()
            await reader.read(65536)  # until the visitor has gone, so that the answer is not lost to a reset
        writer.transport.abort()

    async def visited(self) -> None:
        """Wait for the first visitor."""
        async with asyncio.timeout(WAIT_S):
            await self._visited.wait()


@asynccontextmanager
async def trap(answer: bytes = b"", **options: Any) -> AsyncIterator[Trap]:
    """A trap on a free loopback port."""
    it = Trap(answer)
    server = await asyncio.start_server(it.serve, "127.0.0.1", 0, **options)
    it.port = server.sockets[0].getsockname()[1]
    try:
        yield it
    finally:
        server.close()
        await asyncio.sleep(0)
