"""A streaming reverse proxy to `fallback.url`: what came in goes out, hop-by-hop headers apart."""

from __future__ import annotations

import zlib
from collections.abc import AsyncGenerator, Iterable
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
from multidict import CIMultiDict
from yarl import URL

from shim import jsontext
from shim.core.urls import origin_of
from shim.errors import ShimError
from shim.logs import get
from shim.ports import Forwarded, Proxied

log = get(__name__)

CONNECT_S = 5.0
READ_S = 60.0  # between two pieces of a reply; agents themselves give up after 30 s
WHOLE_BYTES = 262_144  # a reply up to here goes down at once
MAX_READ_BYTES = 16_777_216  # one that must be understood here may be so large
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
    """The vendor's HTTP API could not be asked; nothing of a reply has come."""


class Proxy:
    """One client session to the API. Redirects are handed down as they are, bodies are not decoded."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def send(self, base: str, request: Forwarded, bearer: str | None, *, whole: bool) -> Proxied:
        """Send a request on. `bearer` replaces the agent's token. With `whole` the reply is read and decoded here.

        Raises `Unreachable`.
        """
        headers = CIMultiDict(_end_to_end(request.headers))
        headers.popall("Host", None)
        if bearer is not None:
            headers["Authorization"] = f"Bearer {bearer}"
        if whole:
            headers["Accept-Encoding"] = "identity"
        try:
            response = await self._client().request(
                request.method,
                _url(base, request.target),
                headers=headers,
                data=request.body or None,
                allow_redirects=False,
                skip_auto_headers=("User-Agent", "Content-Type", "Accept", "Accept-Encoding"),
            )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            reason = type(error).__name__
            log.warning("fallback_unreachable", about=reason, upstream=origin_of(base), reason=reason)
            raise Unreachable("the vendor's HTTP API cannot be reached") from None
        return await self._reply(response, whole=whole)

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=READ_S),
                connector=aiohttp.TCPConnector(limit=0),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=True,
            )
        return self._session

    async def _reply(self, response: aiohttp.ClientResponse, *, whole: bool) -> Proxied:
        headers = tuple(_end_to_end(response.headers.items()))
        length = response.content_length
        long = length > WHOLE_BYTES if length is not None else not response.content.at_eof()
        if not whole and long:
            return Proxied(response.status, headers, _pieces(response))
        try:
            async with response:
                body = await _read(response.content)
        except (aiohttp.ClientError, TimeoutError, OSError):
            raise Unreachable("the vendor's HTTP API broke off") from None
        if whole and response.headers.get("Content-Encoding", "").lower() == "gzip":
            body = _inflate(body)
            headers = tuple((name, value) for name, value in headers if name.lower() != "content-encoding")
        return Proxied(response.status, headers, body)


async def _read(content: aiohttp.StreamReader) -> bytes:
    """A whole body. Raises `Unreachable` for one that is larger than any reply that is read here."""
    parts, size = [], 0
    async for piece in content.iter_any():
        size += len(piece)
        if size > MAX_READ_BYTES:
            raise Unreachable("the vendor's HTTP API answered more than can be read")
        parts.append(piece)
    return b"".join(parts)


def _inflate(body: bytes) -> bytes:
    """Decode gzip that was not asked for. Raises `Unreachable` for what is none, or too much."""
    decoder = zlib.decompressobj(31)
    try:
        plain = decoder.decompress(body, MAX_READ_BYTES)
    except zlib.error:
        raise Unreachable("the vendor's HTTP API answered something that is no gzip") from None
    if not decoder.eof:
        raise Unreachable("the vendor's HTTP API answered more than can be read")
    return plain


def unreachable_reply() -> Proxied:
    """What an agent gets where there is no other way than an API that cannot be reached."""
    body = msgspec.json.encode({"success": False, "error": "the vendor's HTTP API cannot be reached"})
    return Proxied(502, (("Content-Type", "application/json"),), body)


def object_of(body: bytes | AsyncGenerator[bytes, None]) -> dict[str, Any]:
    """The JSON object in a reply that was read whole; an empty one where it is none."""
    try:
        value = jsontext.decode(body) if isinstance(body, bytes) else None
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


async def _pieces(response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
    async with response:
        async for piece in response.content.iter_any():
            yield piece


def _url(base: str, target: str) -> URL:
    """The target under the base's own path; its encoding is left as it came."""
    parts = urlsplit(base)
    return URL(f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}{target}", encoded=True)


def _end_to_end(headers: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    """The headers without those that concern one hop: the fixed ones and those that `Connection` names."""
    pairs = list(headers)
    named = {
        token.strip().lower() for name, value in pairs if name.lower() == "connection" for token in value.split(",")
    }
    return [(name, value) for name, value in pairs if name.lower() not in HOP_BY_HOP and name.lower() not in named]
