"""The command store on NATS JetStream; imported only where `store.url` is set, and needs `agent-shim[nats]`."""

from __future__ import annotations

from shim.store.jetstream.layout import Layout
from shim.store.jetstream.store import NatsStore

__all__ = ["Layout", "NatsStore"]
