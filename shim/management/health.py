"""Readiness of the shim for `/readyz`, and a probe of its store. `health_summary` has the sentences of the status."""

from __future__ import annotations

import asyncio

from shim.core.records import WriteProbe
from shim.errors import StoreError
from shim.management.subject import Subject

STORE_PROBE_S = 2.0


class Health:
    """Readiness check for `/readyz`. It depends on the upstream only with `admin.ready_requires_upstream`."""

    def __init__(self, bridge: Subject) -> None:
        self._bridge = bridge
        self._probe: asyncio.Future[bool] | None = None
        self._probed_at = float("-inf")
        self._writable = False

    async def reasons_not_ready(self) -> list[str]:
        """Return the reasons why the shim is not ready, empty if it is."""
        reasons = []
        if self._bridge.stopping:
            reasons.append("stopping")
        if self._bridge.admin_actions.draining:
            reasons.append("draining")
        if not await self.store_writable():
            reasons.append("the store cannot be written")
        requires_upstream = self._bridge.ctx.settings.admin.ready_requires_upstream
        if requires_upstream and not any(link.online for link in self._bridge.links):
            reasons.append("no upstream link is online")
        return reasons

    async def store_writable(self) -> bool:
        """Return True if a synced write succeeds. At most one write is done in 2 s, however many callers ask."""
        ctx = self._bridge.ctx
        if ctx.now - self._probed_at < STORE_PROBE_S:
            return self._writable
        if self._probe is None:
            self._probe = asyncio.get_running_loop().create_future()
            ctx.store.submit(WriteProbe(ctx.clock.wall_s()), done=self._probe_done)
        try:
            async with asyncio.timeout(STORE_PROBE_S):
                return await asyncio.shield(self._probe)
        except TimeoutError:
            return False

    def _probe_done(self, outcome: StoreError | None) -> None:
        self._writable = outcome is None
        self._probed_at = self._bridge.ctx.now
        probe, self._probe = self._probe, None
        if probe is not None and not probe.done():
            probe.set_result(self._writable)
