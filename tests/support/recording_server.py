"""A raw HTTP/1.1 server that records calls byte for byte and answers what a test tells it to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Recorded:
    """One call: headers in wire order; `connection` numbers the server's connections from 1."""

    method: str
    path: str
    headers: list[list[str]]
    body: bytes
    connection: int

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Last(bytes):
    """An answer, or a part of one, after which the server closes the connection."""


Answer = Callable[[Recorded], "bytes | Awaitable[bytes | None] | None"]


def http(status: int, body: object = None, *headers: str) -> bytes:
    """An answer's bytes; a body that is not bytes is encoded as JSON, `None` is no body at all."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", *headers]
    if status != 204:
        lines.append(f"Content-Length: {len(data)}")
    return "\r\n".join([*lines, "", ""]).encode() + data


@dataclass(slots=True)
class RecordingServer:
    """An async context manager. `answer` returns the bytes of a reply, or `None` to close the connection."""

    answer: Answer
    calls: list[Recorded] = field(default_factory=list)
    url: str = ""
    connections: int = 0
    closed: int = 0
    _server: asyncio.Server | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()
        await self.until(lambda: self.closed == self.connections)

    async def until(self, condition: Callable[[], bool], within_s: float = 60) -> None:
        """Wait until `condition` holds; it is looked at after every call, closed connection and `wake`."""
        async with asyncio.timeout(within_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def wake(self) -> None:
        """Let `until` look again."""
        self._changed.set()

    def of(self, end: str) -> list[Recorded]:
        """The calls whose path ends so."""
        return [call for call in self.calls if call.path.endswith(end)]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        try:
            while True:
                call = await _read_call(reader, number)
                self.calls.append(call)
                self.wake()
                reply = self.answer(call)
                data = await reply if isinstance(reply, Awaitable) else reply
                if data is None:
                    return
                writer.write(data)
                await writer.drain()
                if isinstance(data, Last):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            self.closed += 1
            self.wake()


async def _read_call(reader: asyncio.StreamReader, connection: int) -> Recorded:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    method, path, _ = head[0].split(" ")
    headers = [line.split(": ", 1) for line in head[1:-2]]
    length = int(dict(map(tuple, headers)).get("Content-Length", 0))
    return Recorded(method, path, headers, await reader.readexactly(length), connection)
