"""The legacy HTTP API for agents, on aiohttp's low-level server (docs/reference/protocol.md#1-legacy-side)."""

from shim.agent_api.server import AgentServer
from shim.agent_api.server_context import Backends

__all__ = ["AgentServer", "Backends"]
