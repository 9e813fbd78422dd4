"""agent-shim: a local server for agents' legacy HTTP API that uses the vendor's WebSocket API upstream."""

__version__ = "0.1.0"
