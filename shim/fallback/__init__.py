"""Calls that go by the vendor's HTTP API: modes `http` and `auto`, and `rollout.percent`.

See docs/reference/protocol.md#4-modes.
"""

from shim.fallback.policy import FallbackPolicy, sunset_headers
from shim.fallback.websocket_proxy import WebSocketProxy

__all__ = ["FallbackPolicy", "WebSocketProxy", "sunset_headers"]
