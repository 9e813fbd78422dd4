"""The switchboard: core and ports, wired together (design.md §2)."""

from shim.bridge.context import BridgeContext
from shim.bridge.bridge import Bridge

__all__ = ["Bridge", "BridgeContext"]
