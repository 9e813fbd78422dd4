"""Read and decode the bodies of agents' requests, within the bounds on them."""

from __future__ import annotations

import asyncio
import re
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
    """Counts requests by agent: by its token, where agents bring tokens of their own, and the id that it calls by."""

    def __init__(self, limit: int, *, own_tokens: bool) -> None:
        self._limit = limit
        self._own_tokens = own_tokens
        self._counts: dict[tuple[str, str], int] = {}

    def __len__(self) -> int:
        """How many agents have requests under way."""
        return len(self._counts)

    def key(self, token: str, ident: str) -> tuple[str, str]:
        """Return the key of the agent that calls with this token by this id."""
        return (token if self._own_tokens else "", ident)

    def has_room(self, key: tuple[str, str]) -> bool:
        """Return true if one more request of this agent is within the limit."""
        return self._counts.get(key, 0) < self._limit

    def enter(self, key: tuple[str, str]) -> None:
        """Count a request in. Raises `AgentError` 429 when its agent has enough under way."""
        if not self.has_room(key):
            raise AgentError(429, "too many requests of this agent at a time", retry_after_s=RETRY_AFTER_S)
        self._counts[key] = self._counts.get(key, 0) + 1

    def leave(self, key: tuple[str, str]) -> None:
        """Count it out."""
        count = self._counts[key] - 1
        if count:
            self._counts[key] = count
        else:
            del self._counts[key]


_TEXTS = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


class BodyRejected(AgentError):
    """The rest of the body is not wanted: the connection ends with the reply."""


async def read_body(request: web.BaseRequest, limit_bytes: int, timeout_s: float, budget: Budget) -> bytes:
    """Read the whole body as it came, compressed or not; what it takes of the budget is given back at the end.

    Raises `BodyRejected` (408, 413, 417, 503 or 400 for what is not chunked properly).
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
    """Yield a body piece by piece, for another replica. Raises `BodyRejected` (408, 413, 417 or 400)."""
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
    """A whole body, left where it is. `read_nowait` would let aiohttp parse and read on, which is not wanted yet."""
    if payload is EMPTY_PAYLOAD:
        return b""
    parts = payload._buffer  # noqa: SLF001 - see above
    return parts[0] if len(parts) == 1 else b"".join(parts)


def decode_body(data: bytes, replaced: Callable[[], None]) -> Any:
    """Return the JSON value of a body, `None` if it is empty; `replaced` as in `jsontext.decode`.

    Raises `AgentError` 400, or 413 for more values than memory is meant for.
    """
    if not data:
        return None
    too_many = _count_values(data) > MAX_VALUES and _count_values(_TEXTS.sub(b"", data)) > MAX_VALUES
    try:
        if not too_many:
            return lenient_json.decode(data, replaced)
        msgspec.json.decode(data, type=msgspec.Raw)  # is it JSON at all? This makes no values
    except (ValueError, RecursionError):
        raise AgentError(400, "the body is not valid JSON") from None
    raise AgentError(413, f"the body may have {MAX_VALUES} values, this one has more")


def _count_values(data: bytes) -> int:
    """Return how many values a JSON text has at most: each follows one of these, but for those within texts."""
    return data.count(b",") + data.count(b":") + data.count(b"[") + data.count(b"{")


def is_shallow(data: bytes) -> bool:
    """True for what cannot be nested deeper than `MAX_DEPTH`, because it has no more brackets."""
    return data.count(b"{") + data.count(b"[") <= MAX_DEPTH


def _check_announcement(request: web.BaseRequest, limit_bytes: float) -> None:
    """Refuse by the headers what would be refused later, and let a waiting agent send the rest."""
    length = request.content_length
    if length is not None and length > limit_bytes:
        raise too_large()
    meet_expectation(request)


def meet_expectation(request: web.BaseRequest) -> None:
    """Tell an agent that waits for it to go on sending (`Expect: 100-continue`). Raises `BodyRejected` 417."""
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
    """Return the refusal of a body beyond its limit."""
    return BodyRejected(413, "the body is too large")
