"""Reading and decoding of request bodies, within bounds on size, time, memory and concurrency.

aiohttp's own decoding of compressed bodies is off: it does not support `x-gzip`, and bodies for the vendor's HTTP API
must stay unchanged.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncGenerator

from aiohttp import hdrs
from aiohttp.http import HttpVersion11
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestPayloadError

from shim.agent_api.connection import RequestContext
from shim.core.bounds import FREE_BYTES, LONG_TEXT_BYTES, Budget
from shim.errors import AgentError, NoRoom

RETRY_AFTER_S = 1
_GZIP = zlib.MAX_WBITS | 16
_SLICE_BYTES = 262_144


class LongWork:
    """Gate for work that holds the event loop for milliseconds, such as decoding a long body.

    One piece of it passes at a time. Before the next one, as much time is left to everything else as it took.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._next_s = 0.0

    @contextlib.asynccontextmanager
    async def turn(self, size_bytes: int) -> AsyncGenerator[None, None]:
        """Wait for the turn of work on so many bytes. The work itself must not wait for anything."""
        if size_bytes <= LONG_TEXT_BYTES:
            yield
            return
        loop = asyncio.get_running_loop()
        async with self._lock:
            await asyncio.sleep(self._next_s - loop.time())
            began_s = loop.time()
            try:
                yield
            finally:
                self._next_s = 2 * loop.time() - began_s


class BodyRejected(AgentError):
    """A rejection after which the rest of the body is not read: the connection closes with the reply."""


def check_announcement(request: RequestContext, limit_bytes: float) -> None:
    """Reject a body whose announced length exceeds the limit, and send `100 Continue` if the agent waits for it.

    Raises `BodyRejected` 413 or 417.
    """
    length = request.headers.get(hdrs.CONTENT_LENGTH)
    if length is not None and int(length) > limit_bytes:
        raise too_large()
    if hdrs.EXPECT in request.headers:
        meet_expectation(request)


@contextlib.asynccontextmanager
async def _reading(payload: StreamReader, limit_bytes: float, limit: asyncio.Timeout) -> AsyncGenerator[None, None]:
    """Bound the time of reading a body, and raise `BodyRejected` 400, 408, 413 or 503 for one that cannot be read."""
    try:
        async with limit:
            yield
    except TimeoutError:
        raise BodyRejected(408, "the body did not arrive in time") from None
    except NoRoom:
        raise BodyRejected(503, "too many large bodies at a time", retry_after_s=RETRY_AFTER_S) from None
    except (HttpProcessingError, RequestPayloadError):
        # A fault hides the bytes before it from the reader, which would have rejected them if they had come alone.
        too_many = payload.total_bytes > limit_bytes
        raise (too_large() if too_many else BodyRejected(400, "the body cannot be read")) from None


async def read_body(request: RequestContext, limit_bytes: int, timeout_s: float, budget: Budget) -> bytes:
    """Read a whole body without decoding it. Raises `BodyRejected` 400, 408, 413 or 503.

    The memory that is reserved from `budget` while reading is released at the end.
    """
    if request.complete:
        return whole_body(request.body, limit_bytes)
    payload = request.payload
    taken_bytes = 0
    try:
        async with _reading(payload, limit_bytes, asyncio.timeout(timeout_s)):
            data = bytearray()
            while part := await payload.readany():
                if len(data) + len(part) > limit_bytes:
                    raise too_large()
                more_bytes = max(0, len(data) + len(part) - FREE_BYTES) - taken_bytes
                if not budget.reserve(more_bytes):
                    raise NoRoom
                taken_bytes += more_bytes
                data += part
        return bytes(data)
    finally:
        budget.release(taken_bytes)


async def stream_body(request: RequestContext, limit_bytes: float, timeout_s: float) -> AsyncGenerator[bytes, None]:
    """Yield a body in pieces, for those who pass it on. Raises `BodyRejected` 400, 408, 413, 417 or 503.

    `timeout_s` bounds the time that the agent takes, without the time that the reader of the pieces takes for them.
    """
    check_announcement(request, limit_bytes)
    loop, left_s = asyncio.get_running_loop(), timeout_s
    size = 0
    while True:
        began_s = loop.time()
        async with _reading(request.payload, limit_bytes, asyncio.timeout(left_s)):
            piece = await request.payload.readany()
        left_s -= loop.time() - began_s
        if not piece:
            return
        size += len(piece)
        if size > limit_bytes:
            raise too_large()
        yield piece


def whole_body(body: StreamReader | bytes, limit_bytes: int) -> bytes:
    """Return a complete body without consuming it. Raises `BodyRejected` 413.

    `StreamReader._buffer` is not public. The public `read_nowait` would make aiohttp resume reading and parse the next
    request, which must not happen before this one is answered.
    """
    if isinstance(body, bytes):
        data = body
    elif body is EMPTY_PAYLOAD:
        return b""
    else:
        parts = body._buffer  # noqa: SLF001 - see above
        data = parts[0] if len(parts) == 1 else b"".join(parts)
    if len(data) > limit_bytes:
        raise too_large()
    return data


def meet_expectation(request: RequestContext) -> None:
    """Send `100 Continue` to an agent that waits for it. Raises `BodyRejected` 417 for another expectation."""
    expectation = request.headers.get(hdrs.EXPECT)
    if expectation is None or request.message.version < HttpVersion11:
        return
    if expectation.lower() != "100-continue":
        raise BodyRejected(417, "the expectation cannot be met")
    transport = request.connection.transport
    if transport is not None and not request.payload.is_eof():
        transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def too_large() -> BodyRejected:
    """Return the rejection of a body beyond its limit."""
    return BodyRejected(413, "the body is too large")


async def plain_body(request: RequestContext, data: bytes, limit_bytes: int, budget: Budget) -> bytes:
    """Return a body, read as `data`, without its content coding.

    Raises `AgentError` 415 for a coding that is not accepted, and `BodyRejected` 400, 413 or 503 as `read_body` does.
    """
    coding = ",".join(request.headers.getall(hdrs.CONTENT_ENCODING, ())).strip().lower()
    if not data or coding in ("", "identity"):
        return data
    if coding in ("gzip", "x-gzip"):
        return await _inflate(data, _GZIP, limit_bytes, budget)
    if coding == "deflate":
        # RFC 9110, 8.4.1.2 requires a zlib header, whose first byte ends in 8. Some clients send none.
        bits = zlib.MAX_WBITS if data[0] & 0x0F == 8 else -zlib.MAX_WBITS
        return await _inflate(data, bits, limit_bytes, budget)
    raise AgentError(415, "the content coding is not accepted: use gzip or none")


async def _inflate(data: bytes, bits: int, limit_bytes: int, budget: Budget) -> bytes:
    """Inflate a body in slices, which bounds its memory and lets other agents' calls be served in between."""
    parts: list[bytes] = []
    size, rest = 0, data
    decoder = zlib.decompressobj(bits)
    try:
        while rest or not decoder.eof:
            if decoder.eof:  # RFC 1952, 2.2: a file may consist of several members
                decoder = zlib.decompressobj(bits)
            part = decoder.decompress(rest, _SLICE_BYTES)
            rest = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
            if size + len(part) > limit_bytes:
                raise too_large()
            if not budget.reserve(len(part)):
                raise BodyRejected(503, "too many large bodies at a time", retry_after_s=RETRY_AFTER_S)
            size += len(part)
            parts.append(part)
            if not part and not rest and not decoder.eof:
                raise BodyRejected(400, "the body is cut short")
            await asyncio.sleep(0)
    except zlib.error:
        raise BodyRejected(400, "the body does not match its Content-Encoding") from None
    finally:
        budget.release(size)
    return b"".join(parts)
