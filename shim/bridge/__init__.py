"""The switchboard: core and ports, wired together (design.md §2)."""

from shim.bridge.bridge import Bridge
from shim.bridge.context import BridgeContext

__all__ = ["Bridge", "BridgeContext"]
