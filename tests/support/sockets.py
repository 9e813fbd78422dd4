"""Fakes for tests of the upstream side: a record of socket events, an owner of tasks, scripted servers."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

from shim.ports import DialFailure, DialRequest, WebSocket
from shim.protocol.upstream_message import Message
from shim.upstream import AiohttpUpstream

DEADLINE_S = 40


class Events:
    """`ports.WebSocketListener` that notes everything; `on_message` may be told to raise, and calls `handle`."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.failing = False
        self.handle: Callable[[], None] = lambda: None
        self.close_reason: str | None = None
        self.room = True
        self._changed = asyncio.Event()

    def _note(self, *entry: Any) -> None:
        self.log.append(entry)
        self._changed.set()

    def on_message(self, message: Message) -> None:
        self.handle()
        self._note("message", message)
        if self.failing:
            raise RuntimeError("a defect of a handler")

    def on_bad_frame(self, kind: str) -> None:
        self._note("bad", kind)

    def on_frame(self) -> None:
        self._note("frame")

    def has_room(self) -> bool:
        return self.room

    def on_pong(self, payload: bytes) -> None:
        self._note("pong", payload)

    def on_closed(self, by_close_frame: bool, code: int, reason: str) -> None:
        self._note("closed", by_close_frame, code)
        self.close_reason = reason

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        """The noted events of one kind, without the kind."""
        return [entry[1:] for entry in self.log if entry[0] == kind]

    @property
    def messages(self) -> list[Message]:
        return [entry[0] for entry in self.of("message")]

    async def until(self, kind: str, count: int = 1) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while len(self.of(kind)) < count:
                self._changed.clear()
                await self._changed.wait()


class Tasks:
    """Owns what `spawn` starts."""

    def __init__(self) -> None:
        self.running: set[asyncio.Task[None]] = set()
        self.names: list[str] = []

    def spawn(self, name: str, coro: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        self.names.append(name)
        task = asyncio.get_running_loop().create_task(coro, name=name)
        self.running.add(task)
        return task

    async def finish(self) -> None:
        """Wait for all tasks; whatever one of them raised is raised here."""
        async with asyncio.timeout(DEADLINE_S):
            for result in await asyncio.gather(*self.running, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result


async def dial(upstream: AiohttpUpstream, spec: DialRequest, events: Events | None = None) -> WebSocket | DialFailure:
    """The outcome of one dial."""
    outcome: asyncio.Future[WebSocket | DialFailure] = asyncio.get_running_loop().create_future()
    upstream.dial(spec, events or Events(), outcome.set_result)
    async with asyncio.timeout(DEADLINE_S):
        return await outcome


async def connect(upstream: AiohttpUpstream, spec: DialRequest, events: Events) -> WebSocket:
    """A dial that must succeed."""
    outcome = await dial(upstream, spec, events)
    assert not isinstance(outcome, DialFailure), outcome
    return outcome


async def refusal(upstream: AiohttpUpstream, spec: DialRequest) -> DialFailure:
    """A dial that must fail."""
    outcome = await dial(upstream, spec)
    assert isinstance(outcome, DialFailure)
    return outcome


Conversation = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def tcp_server(converse: Conversation, host: str = "127.0.0.1", **options: Any) -> AsyncIterator[int]:
    """A server that holds a conversation by hand on each connection; yields its port."""
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await converse(reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, host, 0, **options)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(0)


async def read_head(reader: asyncio.StreamReader) -> tuple[str, dict[str, str]]:
    """The first line and the headers (names in lower case) of a request."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    return lines[0], {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:] if line)}


def answer(status: str, *headers: str) -> bytes:
    """A response without a body."""
    return "\r\n".join([f"HTTP/1.1 {status}", "Content-Length: 0", *headers, "", ""]).encode()


async def accept_websocket(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, connection: str = "Upgrade"
) -> tuple[str, dict[str, str]]:
    """Answer a WebSocket handshake; frames are the conversation's own business.

    `connection` is the header of that name; a line end in it makes it several.
    """
    line, headers = await read_head(reader)
    key = headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    accept = base64.b64encode(hashlib.sha1(key.encode(), usedforsecurity=False).digest()).decode()
    writer.write(
        f"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: {connection}\r\n"
        f"Sec-WebSocket-Accept: {accept}\r\n\r\n".encode()
    )
    return line, headers
