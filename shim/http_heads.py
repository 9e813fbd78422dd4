"""Heads of requests as bytes: where they end, and which of them were parsed before."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import hdrs
from aiohttp.http import HttpVersion11
from aiohttp.http_parser import RawRequestMessage

from shim.core.bounds import FREE_BYTES

MAX_KNOWN_HEADS = 3  # of a connection: a poll, and heartbeats whose bodies have two lengths
MAX_KNOWN_HEADERS = 16  # header lines of a known head, whose parsed form has many times the size of its bytes
KnownHeads = tuple["KnownHead", ...]


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


class KnownHead(msgspec.Struct):
    """The bytes of a head, its parsed form, and the size of the request with the body behind it.

    `admitted` is what the server derives from such a head alone, None until it has accepted one.
    """

    head: bytes
    message: RawRequestMessage
    size_bytes: int
    admitted: Any = None


def remember(known: KnownHeads, request: bytes, message: RawRequestMessage) -> KnownHeads:
    """Return the known heads with that of a request; the oldest of more than three is dropped.

    Heads that are large, or ask for an upgrade, an interim response or the end of the connection, are not remembered.
    """
    special = message.chunked or message.upgrade or message.should_close or hdrs.EXPECT in message.headers
    if special or message.method == hdrs.METH_CONNECT or message.version != HttpVersion11:
        return known
    if len(request) > FREE_BYTES or len(message.raw_headers) > MAX_KNOWN_HEADERS:
        return known
    head = request[: request.find(b"\r\n\r\n") + 4]
    if any(each.head == head for each in known):
        return known
    return (*known[1 - MAX_KNOWN_HEADS :], KnownHead(head, message, len(request)))
