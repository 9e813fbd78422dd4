"""The usual composition: one bridge with its store."""

from __future__ import annotations

import asyncio

from shim.admin import RecentCommandsStore
from shim.bridge import Bridge
from shim.composition import RuntimeContext
from shim.core.records import StoreContents
from shim.passthrough import FallbackPolicy, WebSocketProxy
from shim.ports import CommandStore
from shim.settings import Settings
from shim.storewatch import log_store_warnings


class SingleRuntime:
    """Implements `composition.Composition`."""

    def __init__(self, around: RuntimeContext, store: CommandStore) -> None:
        self._metrics = around.metrics
        self.recent = RecentCommandsStore(store)
        self.subject = self.switchboard = Bridge(around.context(around.settings, self.recent, around.upstream))
        self.fallback = FallbackPolicy(self.subject)
        self.addresses: dict[str, str] = {}
        self.forwarder = None
        self.websockets = WebSocketProxy(lambda: self.subject.ctx.settings, around.metrics, around.spawn, self.subject)
        around.metrics.websocket_connections.set_function(self.websockets.count)
        self._loaded: StoreContents | None = None
        self._opening = False

    async def open(self) -> None:
        """See `composition.Composition`."""
        self._opening = True
        try:
            self._loaded = await asyncio.to_thread(self.recent.open)
        except Exception:
            self._opening = False
            raise
        self._opening = False
        log_store_warnings(self._loaded, self._metrics)

    def start(self) -> None:
        """See `composition.Composition`."""
        if self._loaded is not None:
            self.subject.start(self._loaded)
            self._loaded = None

    def quiesce(self) -> None:
        """See `composition.Composition`."""
        self.subject.quiesce()

    async def stop(self) -> None:
        """See `composition.Composition`."""
        self.subject.stop()

    async def close(self) -> None:
        """See `composition.Composition`. A store that is still being opened is left to the end of the process."""
        if not self._opening:
            await asyncio.to_thread(self.recent.close)

    def reload(self, settings: Settings) -> None:
        """See `composition.Composition`."""
        self.subject.ctx.settings = settings

    def token_changed(self) -> None:
        """See `composition.Composition`."""
        self.subject.token_changed()
