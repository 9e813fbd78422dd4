"""agent-shim: serves an agent's legacy HTTP API on localhost and speaks the vendor's WebSocket API for it."""

__version__ = "0.1.0"
