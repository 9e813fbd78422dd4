"""The bridge between agents' calls and upstream messages (docs/contributing/architecture.md#the-bridge)."""

from shim.bridge.bridge import Bridge
from shim.bridge.context import BridgeContext

__all__ = ["Bridge", "BridgeContext"]
