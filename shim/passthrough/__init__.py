"""Modes `http` and `auto`, and `rollout.percent`: calls that go by the vendor's HTTP API (protocol.md §4)."""

from shim.passthrough.passthrough import FallbackPolicy
from shim.passthrough.sunset import sunset_headers
from shim.passthrough.websocket_proxy import WebSocketProxy

__all__ = ["FallbackPolicy", "WebSocketProxy", "sunset_headers"]
