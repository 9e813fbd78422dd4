"""Heads of requests as bytes: where they end, and which of them were parsed before."""

from __future__ import annotations

import msgspec
from aiohttp import hdrs
from aiohttp.http import HttpVersion11
from aiohttp.http_parser import RawRequestMessage

from shim.core.bounds import FREE_BYTES

_MAX_KNOWN_HEADS = 4096  # about 10 MB


class EmptyLine:
    """Search for the next empty line in bytes that arrive in pieces.

    Every head and every chunked body ends with an empty line.
    """

    __slots__ = ("_tail",)

    def __init__(self) -> None:
        self._tail = b""

    def find(self, data: bytes) -> int:
        """Return the number of bytes of `data` up to the end of the next empty line, 0 if there is none yet."""
        seen = self._tail + data
        at = seen.find(b"\r\n\r\n")
        if at < 0:
            self._tail = seen[-3:]
            return 0
        end = at + 4 - len(self._tail)
        self._tail = b""
        return end


class KnownHead(msgspec.Struct, frozen=True):
    """A parsed head without any special meaning, and the size of the body behind it."""

    message: RawRequestMessage
    body_bytes: int


class KnownHeads(dict[bytes, KnownHead]):
    """Heads that were parsed lately, by their bytes.

    An agent sends the same few heads for its whole life, and parsing a head is a sixth of the work for a heartbeat.
    """

    def add(self, request: bytes, message: RawRequestMessage) -> None:
        """Remember the head of a small request, unless it asks for an upgrade, an interim response or the end."""
        special = message.chunked or message.upgrade or message.should_close or hdrs.EXPECT in message.headers
        if special or message.method == hdrs.METH_CONNECT or message.version != HttpVersion11:
            return
        if len(request) > FREE_BYTES:
            return
        if len(self) >= _MAX_KNOWN_HEADS:
            self.clear()
        end = request.find(b"\r\n\r\n") + 4
        self[request[:end]] = KnownHead(message, len(request) - end)
