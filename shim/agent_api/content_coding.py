"""Decoding of compressed request bodies (docs/reference/protocol.md#1-legacy-side).

aiohttp's own decoding is off: it does not support `x-gzip`, and bodies for the vendor's HTTP API must stay unchanged.
"""

from __future__ import annotations

import asyncio
import zlib

from aiohttp import hdrs

from shim.agent_api.connection import RequestContext
from shim.agent_api.request_body import RETRY_AFTER_S, BodyRejected, too_large
from shim.errors import AgentError
from shim.http_connection import Budget

_GZIP = zlib.MAX_WBITS | 16
_SLICE_BYTES = 262_144


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
