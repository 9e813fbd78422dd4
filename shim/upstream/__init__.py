"""Connections to the vendor on aiohttp: the dialler, WebSockets, and pumps between a socket and its listener.

Rules: docs/reference/protocol.md#2-upstream-side-the-websocket.
"""

from shim.upstream.dial_errors import DialError, failure_of
from shim.upstream.dialler import AiohttpUpstream, Dialler, DialTrace

__all__ = [
    "AiohttpUpstream",
    "DialError",
    "DialTrace",
    "Dialler",
    "failure_of",
]
