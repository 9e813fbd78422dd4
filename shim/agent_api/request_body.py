"""Reading and decoding of request bodies, within bounds on size, time, memory and concurrency."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec
from aiohttp import hdrs, web
from aiohttp.http import HttpVersion11
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestPayloadError

from shim.core.bounds import FREE_BYTES, MAX_VALUES
from shim.errors import AgentError
from shim.http_connection import Budget, NoRoom
from shim.protocol import lenient_json
from shim.protocol.dialects import MAX_DEPTH

RETRY_AFTER_S = 1


class InFlight:
    """Number of requests in progress per agent.

    An agent is identified by the id in its calls, and by its token if agents bring tokens of their own.
    """

    def __init__(self, limit: int, *, own_tokens: bool) -> None:
        self._limit = limit
        self._own_tokens = own_tokens
        self._counts: dict[tuple[str, str], int] = {}

    def __len__(self) -> int:
        """Return the number of agents with requests in progress."""
        return len(self._counts)

    def key(self, token: str, ident: str) -> tuple[str, str]:
        """Return the key of the agent that calls with this token and id."""
        return (token if self._own_tokens else "", ident)

    def has_room(self, key: tuple[str, str]) -> bool:
        """Return True if one more request of this agent is within the limit."""
        return self._counts.get(key, 0) < self._limit

    def enter(self, key: tuple[str, str]) -> None:
        """Count a request of an agent. Raises `AgentError` 429 beyond the limit."""
        if not self.has_room(key):
            raise AgentError(429, "too many requests of this agent at a time", retry_after_s=RETRY_AFTER_S)
        self._counts[key] = self._counts.get(key, 0) + 1

    def leave(self, key: tuple[str, str]) -> None:
        """End the count of a request."""
        count = self._counts[key] - 1
        if count:
            self._counts[key] = count
        else:
            del self._counts[key]


class BodyRejected(AgentError):
    """A rejection after which the rest of the body is not read: the connection closes with the reply."""


async def read_body(request: web.BaseRequest, limit_bytes: int, timeout_s: float, budget: Budget) -> bytes:
    """Read a whole body without decoding it. Raises `BodyRejected` 400, 408, 413, 417 or 503.

    The memory that is reserved from `budget` while reading is released at the end.
    """
    payload = request.content
    _check_announcement(request, limit_bytes)
    taken_bytes = 0
    try:
        if payload.is_eof():
            return _bounded(payload.read_nowait(), limit_bytes)
        async with asyncio.timeout(timeout_s):
            data = bytearray()
            while part := await payload.readany():
                if len(data) + len(part) > limit_bytes:
                    raise too_large()
                more_bytes = max(0, len(data) + len(part) - FREE_BYTES) - taken_bytes
                if not budget.take(more_bytes):
                    raise BodyRejected(503, "too many large bodies at a time", retry_after_s=RETRY_AFTER_S)
                taken_bytes += more_bytes
                data += part
        return bytes(data)
    except TimeoutError:
        raise BodyRejected(408, "the body did not arrive in time") from None
    except NoRoom:
        raise BodyRejected(503, "too many large bodies at a time", retry_after_s=RETRY_AFTER_S) from None
    except (HttpProcessingError, RequestPayloadError):
        raise BodyRejected(400, "the body cannot be read") from None
    finally:
        budget.give_back(taken_bytes)


async def stream_body(request: web.BaseRequest, limit_bytes: float, timeout_s: float) -> AsyncGenerator[bytes, None]:
    """Yield a body in pieces, for another replica. Raises `BodyRejected` 400, 408, 413 or 417."""
    _check_announcement(request, limit_bytes)
    deadline = asyncio.get_running_loop().time() + timeout_s
    size = 0
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                piece = await request.content.readany()
        except TimeoutError:
            raise BodyRejected(408, "the body did not arrive in time") from None
        except (HttpProcessingError, RequestPayloadError):
            raise BodyRejected(400, "the body cannot be read") from None
        if not piece:
            return
        size += len(piece)
        if size > limit_bytes:
            raise too_large()
        yield piece


def peek(payload: StreamReader) -> bytes:
    """Return a complete body without consuming it.

    `StreamReader._buffer` is not public. The public `read_nowait` would make aiohttp resume reading and parse the next
    request, which must not happen before this one is answered.
    """
    if payload is EMPTY_PAYLOAD:
        return b""
    parts = payload._buffer  # noqa: SLF001 - see above
    return parts[0] if len(parts) == 1 else b"".join(parts)


def decode_body(data: bytes, replaced: Callable[[], None]) -> Any:
    """Return the JSON value of a body, or None if it is empty; `replaced` as in `lenient_json.decode`.

    Raises `AgentError` 400, or 413 for more values than `MAX_VALUES`: a small body can have many, each an object in
    memory.
    """
    if not data:
        return None
    too_many = lenient_json.has_too_many_values(data)
    try:
        if not too_many:
            return lenient_json.decode(data, replaced)
        msgspec.json.decode(data, type=msgspec.Raw)  # raises for invalid JSON, without creating any values
    except (ValueError, RecursionError):
        raise AgentError(400, "the body is not valid JSON") from None
    raise AgentError(413, f"the body has more than {MAX_VALUES} values")


def is_shallow(data: bytes) -> bool:
    """Return True if a body has too few brackets to be nested deeper than `MAX_DEPTH`."""
    return data.count(b"{") + data.count(b"[") <= MAX_DEPTH


def _check_announcement(request: web.BaseRequest, limit_bytes: float) -> None:
    """Reject a body whose announced length exceeds the limit, and send `100 Continue` if the agent waits for it."""
    length = request.content_length
    if length is not None and length > limit_bytes:
        raise too_large()
    meet_expectation(request)


def meet_expectation(request: web.BaseRequest) -> None:
    """Send `100 Continue` to an agent that waits for it. Raises `BodyRejected` 417 for another expectation."""
    expectation = request.headers.get(hdrs.EXPECT)
    if expectation is None or request.version < HttpVersion11:
        return
    if expectation.lower() != "100-continue":
        raise BodyRejected(417, "the expectation cannot be met")
    if request.transport is not None and not request.content.is_eof():
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def _bounded(data: bytes, limit_bytes: int) -> bytes:
    if len(data) > limit_bytes:
        raise too_large()
    return data


def too_large() -> BodyRejected:
    """Return the rejection of a body beyond its limit."""
    return BodyRejected(413, "the body is too large")
