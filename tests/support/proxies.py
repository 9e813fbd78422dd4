"""HTTP proxies for tests: one that passes everything on, and ones that get in the way."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from tests.support.sockets import answer, read_head, tcp_server


class ForwardProxy:
    """Serves CONNECT and absolute-form requests.

    `strips_upgrade`: hands requests on without the headers that make a WebSocket of them, and says `Via`.
    `swallows_frames`: passes the handshake on and nothing after it.
    """

    CONNECTED = b"HTTP/1.1 200 Connection established\r\n\r\n"

    def __init__(self, *, strips_upgrade: bool = False, swallows_frames: bool = False) -> None:
        self._strips_upgrade = strips_upgrade
        self._swallows_frames = swallows_frames
        self.heads: list[str] = []

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads.append(head)
        method, target, rest = head.split(" ", 2)
        if method == "CONNECT":
            host, _, port = target.replace("[", "").replace("]", "").rpartition(":")
        else:
            parts = urlsplit(target)
            host, port = parts.hostname or "", str(parts.port or 80)
            path = parts.path + (f"?{parts.query}" if parts.query else "")
            head = f"{method} {path} {rest}"
        try:
            there, back = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            return
        try:
            if method == "CONNECT":
                writer.write(self.CONNECTED)
            else:
                back.write(self._passed_on(head).encode())
            async with asyncio.TaskGroup() as group:
                group.create_task(self._upstream(reader, back))
                group.create_task(self._downstream(there, writer))
        finally:
            back.transport.abort()

    def _passed_on(self, head: str) -> str:
        lines = [line for line in head.split("\r\n") if not line.lower().startswith("proxy-")]
        if self._strips_upgrade:
            hop = ("upgrade:", "connection:", "sec-websocket-")
            lines = [line for line in lines if not line.lower().startswith(hop)]
            lines[-2:] = ["Connection: close", "", ""]
        return "\r\n".join(lines)

    async def _upstream(self, reader: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if not self._swallows_frames:
                back.write(data)
        back.close()

    async def _downstream(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._strips_upgrade:
            answer = (await there.readuntil(b"\r\n")).decode()
            writer.write(f"{answer}Via: 1.1 office-proxy\r\n".encode())
        while data := await there.read(65536):
            writer.write(data)
        writer.close()


class PickyProxy(ForwardProxy):
    """A CONNECT proxy that leads every name to `target`; it insists on credentials and on what RFC 9110 says of `Host`.

    `heads` are the first lines only.
    """

    CREDENTIALS = "us%40er:pass%20w%E2%82%ACrd"

    def __init__(self, target: int) -> None:
        super().__init__()
        self._target = target

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, headers = await read_head(reader)
        self.heads.append(line)
        if headers.get("host") != line.split(" ")[1]:
            writer.write(answer("400 Bad Request"))
            return
        if headers.get("proxy-authorization") != "Basic " + base64.b64encode("us@er:pass w€rd".encode()).decode():
            writer.write(answer("407 Proxy Authentication Required", "Proxy-Authenticate: Basic"))
            return
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        writer.write(self.CONNECTED)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._upstream(reader, back))
                group.create_task(self._downstream(there, writer))
        finally:
            back.transport.abort()


@asynccontextmanager
async def forward_proxy(proxy: ForwardProxy) -> AsyncIterator[str]:
    """Its host:port while it runs."""
    async with tcp_server(proxy.converse) as port:
        yield f"127.0.0.1:{port}"
