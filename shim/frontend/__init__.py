"""The legacy HTTP server that agents talk to, on aiohttp's low-level server (protocol.md §1)."""

from shim.frontend.server import AgentServer

__all__ = ["AgentServer"]
