"""Mode `http` on a replica: calls go to the vendor's HTTP API, and what came by the WebSocket before is not lost."""

from __future__ import annotations

from shim.composition import Surroundings
from shim.core.calls import AgentCall, HealthCall, PollCall, ResultCall
from shim.core.records import VIA_HTTP
from shim.errors import OperatorError
from shim.passthrough.proxy import Proxy, Unreachable, object_of, unreachable_reply
from shim.passthrough.sunset import is_over
from shim.ports import Answer, Client, Forwarded, Proxied
from shim.shards.lookup import Lookup
from shim.shards.replicas import Known, Replicas


class Rollback:
    """Implements `ports.Fallback`. There is no mode `auto` and no partial rollout with shards (docs/decisions)."""

    def __init__(self, replicas: Replicas, known: Known, around: Surroundings, lookup: Lookup) -> None:
        self._replicas = replicas
        self._known = known
        self._around = around
        self._lookup = lookup
        self._proxy = Proxy()

    async def close(self) -> None:
        """Close the connections to the vendor's API."""
        await self._proxy.close()

    def active(self) -> bool:
        """Whether calls go by HTTP now."""
        return self.takes_all()

    def takes_all(self) -> bool:
        """Mode `http`, before the sunset."""
        settings = self._known.settings()
        return settings.mode == "http" and not is_over(settings.sunset, self._around.clock.wall_s())

    def takes_some(self) -> bool:
        """All or none."""
        return False

    def takes(self, client: Client, call: AgentCall) -> bool:
        """All or none."""
        return False

    async def serve(self, request: Forwarded) -> Proxied | Answer | None:
        """See `ports.Fallback`. Results go the way that their commands came."""
        settings = self._known.settings()
        call = request.call
        if isinstance(call, HealthCall):
            return None
        if isinstance(call, ResultCall) and await self._came_by_websocket(request.client, call):
            return None
        bearer = self._around.read_token() if settings.fallback.use_upstream_token else None
        try:
            reply = await self._proxy.send(settings.fallback.url, request, bearer, whole=isinstance(call, PollCall))
        except Unreachable:
            self._around.metrics.fallback.labels("unreachable").inc()
            reply = unreachable_reply()
        else:
            self._around.metrics.fallback.labels(f"{reply.status // 100}xx").inc()
        if isinstance(call, PollCall) and not _has_commands(reply):
            left = await self._replicas.leftovers(request.client, call, request.arrived_s)
            if left is not None and left.lease is not None:
                return left
        return reply

    async def _came_by_websocket(self, client: Client, call: ResultCall) -> bool:
        """Where that cannot be known now, the switchboard says so: it waits for the owner, and answers 503 without."""
        if self._replicas.unowned(client):
            return True
        try:
            found = await self._lookup.everywhere(call.command_id)
        except OperatorError:
            return True
        owner = self._replicas.owner(client)
        return any(
            each["stored"] and each["via"] != VIA_HTTP and each["session"]["key"].startswith(f"{owner}/")
            for each in found
        )


def _has_commands(reply: Proxied) -> bool:
    return reply.status == 200 and bool(object_of(reply.body).get("commands"))
