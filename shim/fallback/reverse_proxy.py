"""A streaming reverse proxy to `fallback.url`, which removes hop-by-hop headers in both directions."""

from __future__ import annotations

import os
import zlib
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping
from typing import Any

import aiohttp
import msgspec
from aiohttp import hdrs
from multidict import CIMultiDict

from shim.config.settings import DialSettings
from shim.core.bounds import Budget
from shim.errors import AgentError, ShimError
from shim.log import get
from shim.ports import ProxyRequest, ProxyResponse
from shim.protocol import lenient_json
from shim.protocol.http import origin_of, under
from shim.upstream import DialError, Dialler, failure_of

log = get(__name__)

READ_S = 60.0  # maximum time between two pieces of a reply; agents themselves give up after 30 s
WHOLE_BYTES = 262_144  # a larger reply is streamed
MAX_READ_BYTES = 16_777_216  # of all replies together that are being read whole
HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


class Unreachable(ShimError):
    """An error of a request to the vendor's HTTP API, raised before any part of a reply was passed on.

    Its text is for agents, log and status, and holds no secret.
    """


class ReverseProxy:
    """A client that sends agents' requests to the API and returns the replies.

    Redirects are returned unchanged, and bodies are not decoded. `environ` names the proxies that the configuration
    does not name.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._environ = environ
        self._budget = Budget(MAX_READ_BYTES)
        self._diallers: dict[DialSettings, Dialler] = {}

    async def send(
        self, base: str, dialling: DialSettings, request: ProxyRequest, bearer: str | None, *, whole: bool
    ) -> ProxyResponse:
        """Send a request to the API and return the reply. Raises `Unreachable`, and `AgentError` for a body cut short.

        `bearer` replaces the agent's token. With `whole` the reply is read completely and decoded.
        """
        headers = CIMultiDict(end_to_end(request.headers))
        headers.popall(hdrs.HOST, None)
        headers.popall(hdrs.EXPECT, None)  # the shim has answered it: the API may never send `100 Continue`
        if bearer is not None:
            headers[hdrs.AUTHORIZATION] = f"Bearer {bearer}"
        if whole:
            headers[hdrs.ACCEPT_ENCODING] = "identity"
        try:
            response = await self._dialler(dialling).request(
                request.method, under(base, request.target), headers, request.body or None
            )
            return await self._reply(response, whole=whole)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, DialError) as error:
            if isinstance(error.__cause__, AgentError):  # raised by the body, and wrapped by aiohttp's writer
                raise error.__cause__ from None
            failure = failure_of(error)
            reason = "answer" if failure.reason == "handshake" else failure.reason
            about, where = f"{reason} {failure.detail}", origin_of(base)
            log.warning("fallback_unreachable", dedupe_key=about, upstream=where, reason=reason, detail=failure.detail)
            raise Unreachable(failure.detail) from None

    async def close(self) -> None:
        """Close all connections."""
        for dialler in self._diallers.values():
            await dialler.close()

    def _dialler(self, settings: DialSettings) -> Dialler:
        """Return the dialler of these settings. One of earlier settings stays: replies may still come through it."""
        if settings not in self._diallers:
            self._diallers[settings] = Dialler(
                settings, self._environ, name="fallback", keep=True, read_timeout_s=READ_S
            )
        return self._diallers[settings]

    async def _reply(self, response: aiohttp.ClientResponse, *, whole: bool) -> ProxyResponse:
        headers = tuple(end_to_end(response.headers.items()))
        length = response.content_length
        long = length > WHOLE_BYTES if length is not None else not response.content.at_eof()
        if not whole and long:
            return ProxyResponse(response.status, headers, _pieces(response))
        async with response:
            body = await _read(response.content, self._budget)
        if whole and response.headers.get("Content-Encoding", "").lower() in ("gzip", "x-gzip"):
            body = _inflate(body)
            headers = tuple((name, value) for name, value in headers if name.lower() != "content-encoding")
        return ProxyResponse(response.status, headers, body)


async def _read(content: aiohttp.StreamReader, budget: Budget) -> bytes:
    """Return a whole body. Raises `Unreachable` for one that is too large, alone or together with others."""
    parts, size = [], 0
    try:
        async for piece in content.iter_any():
            if not budget.reserve(len(piece)):
                raise Unreachable("it sent more than can be read at a time")
            size += len(piece)
            parts.append(piece)
    finally:
        budget.release(size)
    return b"".join(parts)


def _inflate(body: bytes) -> bytes:
    """Return a gzip body decoded; some servers send gzip although `identity` was requested.

    Raises `Unreachable` for a body that is not gzip or too large.
    """
    decoder = zlib.decompressobj(31)
    try:
        plain = decoder.decompress(body, MAX_READ_BYTES)
    except zlib.error:
        raise Unreachable("it sent a body that is not gzip") from None
    if not decoder.eof:
        raise Unreachable("it sent a reply that is too large to read")
    return plain


def unreachable_reply(error: Unreachable) -> ProxyResponse:
    """Return the 502 for an agent whose only transport is the unreachable API.

    It has the reason, because that may be a key of the shim's own configuration, with which the API has nothing to do.
    """
    body = msgspec.json.encode({"success": False, "error": f"no answer of the vendor's HTTP API: {error}"})
    return ProxyResponse(502, (("Content-Type", "application/json"),), body)


def object_of(body: bytes | AsyncGenerator[bytes, None], replaced: Callable[[], None]) -> dict[str, Any] | None:
    """Return the JSON object in a reply that was read whole, or None; `replaced` as in `lenient_json.decode`.

    A reply with too many values is not decoded: an agent gets it as it is.
    """
    if not isinstance(body, bytes) or lenient_json.has_too_many_values(body):
        return None
    try:
        value = lenient_json.decode(body, replaced)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


async def _pieces(response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
    async with response:
        async for piece in response.content.iter_any():
            yield piece


def end_to_end(headers: Iterable[tuple[str, str]], dropped: Collection[str] = HOP_BY_HOP) -> Iterable[tuple[str, str]]:
    """Return the headers without those that are `dropped` and those that `Connection` lists."""
    pairs = list(headers)
    named = {
        token.strip().lower() for name, value in pairs if name.lower() == "connection" for token in value.split(",")
    }
    return [(name, value) for name, value in pairs if name.lower() not in dropped and name.lower() not in named]
