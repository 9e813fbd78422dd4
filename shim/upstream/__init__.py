"""The WebSocket side on aiohttp (protocol.md §2): dials, and pumps frames between a socket and its events."""

from shim.upstream.dial import AiohttpUpstream
from shim.upstream.pump import WebSocketPump, WireObserver

__all__ = ["AiohttpUpstream", "WebSocketPump", "WireObserver"]
