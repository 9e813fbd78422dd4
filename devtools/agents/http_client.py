"""HTTP/1.1 client that behaves like Go's `net/http`, small enough for thousands of agents in one process.

A general client library is no substitute. The shim depends on when Go keeps a connection, when it closes it, and on
each agent having its own connections (docs/reference/legacy-agents.md#10-common-to-all-ab-clients). For example,
aiohttp's client returns a connection to its pool when a short body has arrived, read or not; Go closes that connection.
"""

from __future__ import annotations

import asyncio
import ssl
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

IDLE_TIMEOUT_S = 90
MAX_IDLE = 10
_BODILESS = frozenset({204, 304})
_REPLAYABLE = frozenset({"GET", "HEAD", "OPTIONS"})


class WireError(Exception):
    """No usable HTTP response arrived; the text is a short phrase (`timeout`, `ConnectionRefusedError`, …)."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `path` is appended to the base URL unescaped; `headers` are sent in this order.

    The pool inserts `Host` first and, for a body, `Content-Length` after `User-Agent`, as Go does. If `reads_success`
    is false, a body under a status of `success` stays unread, and the connection is closed.
    """

    method: str
    path: str
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    timeout_s: float = 30
    success: frozenset[int] = frozenset({200})
    reads_success: bool = True


@dataclass(frozen=True, slots=True)
class Response:
    """One response. Header names are lower case, `body` is inflated, `connection` is its number in the pool."""

    status: int
    headers: dict[str, str]
    body: bytes
    connection: int


@dataclass(slots=True, eq=False)
class Connection:
    """One TCP connection, used by a pool or by a test harness that misbehaves on purpose."""

    number: int
    reader: asyncio.StreamReader = field(repr=False)
    writer: asyncio.StreamWriter = field(repr=False)
    idle_since_s: float = 0
    used: bool = False
    answering: bool = False

    @property
    def stale(self) -> bool:
        """Return True if either side has closed the connection."""
        return self.reader.at_eof() or self.reader.exception() is not None or self.writer.is_closing()

    async def send(self, data: bytes) -> None:
        self.answering = False
        self.writer.write(data)
        await self.writer.drain()

    async def read_head(self) -> tuple[int, dict[str, str]]:
        """Read status and headers of the next final response. Raises `EOFError`, `OSError` or `ValueError`."""
        while True:
            try:
                head = await self.reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError as error:
                self.answering = bool(error.partial)
                raise
            self.answering = True
            lines = head.decode("latin-1").split("\r\n")
            version, code = lines[0].split(" ", 2)[:2]
            if not version.startswith("HTTP/1."):
                raise ValueError("malformed HTTP response")
            headers = {}
            for line in lines[1:-2]:
                name, _, value = line.partition(":")
                headers[name.strip().lower()] = value.strip()
            if version == "HTTP/1.0":
                headers.setdefault("connection", "close")
            if int(code) >= 200:
                return int(code), headers

    async def read_body(self, headers: dict[str, str]) -> bytes:
        """Read the whole body, de-chunked and inflated. Raises the errors of `read_head`."""
        if headers.get("transfer-encoding", "").lower() == "chunked":
            body = await self._read_chunks()
        elif "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
        else:
            headers["connection"] = "close"
            body = await self.reader.read()
        if headers.get("content-encoding", "").lower() == "gzip":
            return zlib.decompress(body, wbits=31)
        return body

    async def _read_chunks(self) -> bytes:
        chunks = []
        while size := int((await self.reader.readuntil(b"\r\n")).split(b";")[0], 16):
            chunks.append(await self.reader.readexactly(size))
            await self.reader.readexactly(2)
        while await self.reader.readuntil(b"\r\n") != b"\r\n":
            pass  # trailers
        return b"".join(chunks)

    def close(self) -> None:
        """Close the socket as an exiting process does: FIN, or RST if the kernel holds unread bytes."""
        self.writer.close()

    def abort(self) -> None:
        """Close at once and discard unsent bytes."""
        self.writer.transport.abort()


class Pool:
    """Connections of one Go `http.Client` to one base URL: kept alive, the latest used first, idle for at most 90 s."""

    def __init__(self, url: str, now_s: Callable[[], float]) -> None:
        """Create an empty pool. `url` is http(s) and may have a base path; `now_s` is a monotonic clock in seconds."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("the URL must be http://host[:port][/path] or https://…")
        self._host = parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._authority = parts.netloc.rpartition("@")[2]
        self._base_path = parts.path
        self._now_s = now_s
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self.opened = 0

    async def exchange(self, request: Request) -> Response:
        """Send one request and read its response within `request.timeout_s`, which includes the connection set-up.

        Raises `WireError`. If cancelled or timed out, it closes the connection, as Go does.
        """
        try:
            async with asyncio.timeout(request.timeout_s):
                return await self._exchange(request)
        except TimeoutError:
            raise WireError("timeout") from None
        except (OSError, EOFError) as error:
            raise WireError(type(error).__name__) from error
        except (ValueError, zlib.error, asyncio.LimitOverrunError) as error:
            raise WireError("malformed HTTP response") from error

    async def dial(self) -> Connection:
        """Open a connection that `close` closes. Until `release` the caller alone uses it."""
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        self.opened += 1
        connection = Connection(self.opened, reader, writer)
        self._busy.add(connection)
        return connection

    def discard(self, connection: Connection) -> None:
        """Close one connection of this pool."""
        self._busy.discard(connection)
        connection.close()

    def close(self) -> None:
        """Close every connection, including those in use."""
        for connection in (*self._idle, *self._busy):
            connection.close()
        self._idle.clear()
        self._busy.clear()

    def encode(self, request: Request) -> bytes:
        """Encode the request as bytes."""
        lines = [f"{request.method} {self._base_path}{request.path} HTTP/1.1", f"Host: {self._authority}"]
        has_length = not request.body
        for name, value in request.headers:
            lines.append(f"{name}: {value}")
            if not has_length and name == "User-Agent":
                lines.append(f"Content-Length: {len(request.body)}")
                has_length = True
        return "\r\n".join([*lines, "", ""]).encode() + request.body

    async def _exchange(self, request: Request) -> Response:
        data = self.encode(request)
        connection = self._take_idle() or await self.dial()
        try:
            try:
                await connection.send(data)
                status, headers = await connection.read_head()
            except (OSError, EOFError):
                # On a kept connection that turns out to be closed, Go repeats a GET but never a POST.
                if not connection.used or connection.answering or request.method not in _REPLAYABLE:
                    raise
                self.discard(connection)
                connection = await self.dial()
                await connection.send(data)
                status, headers = await connection.read_head()
            return await self._finish(request, connection, status, headers)
        except BaseException:
            self.discard(connection)
            raise

    async def _finish(self, request: Request, connection: Connection, status: int, headers: dict[str, str]) -> Response:
        body, keep = b"", True
        if status not in _BODILESS and headers.get("content-length") != "0":
            if request.reads_success or status not in request.success:
                body = await connection.read_body(headers)
            else:
                keep = False
        if keep and headers.get("connection", "").lower() != "close" and len(self._idle) < MAX_IDLE:
            self._busy.discard(connection)
            connection.used, connection.idle_since_s = True, self._now_s()
            self._idle.append(connection)
        else:
            self.discard(connection)
        return Response(status, headers, body, connection.number)

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.stale and self._now_s() - connection.idle_since_s <= IDLE_TIMEOUT_S:
                self._busy.add(connection)
                return connection
            connection.close()
        return None
