"""The legacy HTTP server that agents talk to, on aiohttp's low-level server (protocol.md §1)."""

from shim.agent_api.server import AgentServer

__all__ = ["AgentServer"]
