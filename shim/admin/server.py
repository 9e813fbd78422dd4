"""The admin HTTP server: `/healthz`, `/readyz`, `/metrics`."""

from __future__ import annotations

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from shim.admin.collector import BridgeCollector
from shim.admin.health import Health
from shim.bridge import Bridge
from shim.settings import Admin

STOP_S = 1.0


class AdminServer:
    """Serves the admin port; reads the bridge, changes nothing.

    `agents_served` is set once the legacy API listens: as a sidecar, the agent must not start before that.
    """

    def __init__(self, settings: Admin, bridge: Bridge, registry: CollectorRegistry) -> None:
        self.agents_served = False
        self._settings = settings
        self._registry = registry
        self._health = Health(bridge)
        registry.register(BridgeCollector(bridge))
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=STOP_S)

    async def start(self) -> tuple[str, int]:
        """Listen; returns the address that was bound."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._settings.host, self._settings.port)
        await site.start()
        host, port, *_ = self._runner.addresses[0]
        return str(host), int(port)

    async def stop(self) -> None:
        """Stop listening and end what is open."""
        await self._runner.cleanup()

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _readyz(self, request: web.Request) -> web.Response:
        reasons = await self._health.reasons_not_ready()
        if not self.agents_served:
            reasons.append("agents are not served yet")
        if reasons:
            return web.json_response({"status": "not ready", "reasons": reasons}, status=503)
        return web.json_response({"status": "ready"})

    async def _metrics(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(self._registry), headers={"Content-Type": content_type})
