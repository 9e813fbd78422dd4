"""The choice between the WebSocket link and the vendor's HTTP API, per call."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from email.utils import formatdate
from typing import Any

import aiohttp
import msgspec
from msgspec.structs import replace

from shim.bridge import Bridge
from shim.config.rules import is_past, parse_date_s
from shim.config.settings import Settings, Sunset
from shim.core.agent_calls import AgentCall, Commands, HealthCall, PollCall, RegisterCall, ResultCall
from shim.core.call_records import FallbackCall, Why, route_of
from shim.core.failover import Breaker, Failover, Transport, in_rollout
from shim.core.link_state import LinkState
from shim.errors import ConfigError
from shim.fallback.reverse_proxy import ReverseProxy, Unreachable, object_of, unreachable_reply
from shim.log import get
from shim.ports import Caller, CallResult, Clock, FallbackScope, ProxyRequest, ProxyResponse
from shim.protocol.http import fallback_url

log = get(__name__)

PATIENCE_S = 5.0
"""Seconds after which an agent that hangs up unanswered was not served; one that leaves sooner may be stopping."""
BROKEN = frozenset({502, 503, 504})
TELLING = frozenset({200, 201, 409})
"""Statuses of a registration's reply that may contain the agent's cluster id."""


def sunset_headers(sunset: Sunset) -> Mapping[str, str]:
    """Return the headers that announce the end of the legacy API, without those that are not configured.

    `Deprecation` is a structured date (RFC 9745), `Sunset` an HTTP date (RFC 8594); `Link` points to the announcement.
    """
    found: dict[str, str] = {}
    if sunset.deprecation_at:
        found["Deprecation"] = f"@{int(parse_date_s(sunset.deprecation_at))}"
    if sunset.at:
        found["Sunset"] = formatdate(parse_date_s(sunset.at), usegmt=True)
    if sunset.link:
        found["Link"] = f'<{sunset.link}>; rel="deprecation"'
    return found


def uses_http(settings: Settings) -> bool:
    """Return True if these settings send calls to the HTTP API, now or when the link fails."""
    return settings.mode in ("http", "auto") or settings.rollout.partial


def scope_of(settings: Settings, clock: Clock) -> FallbackScope:
    """Return the share of the calls that may go by HTTP now: none after the sunset, when that API no longer exists."""
    if not uses_http(settings) or is_past(settings.sunset, clock.wall_s()):
        return FallbackScope.NONE
    return FallbackScope.ALL if settings.mode == "http" else FallbackScope.SOME


class _Wait(msgspec.Struct):
    """Time since which an agent waits for the API, None while it sends or reads a piece of a body itself."""

    since_s: float | None

    def so_far_s(self, now: float) -> float:
        """Return the seconds for which the agent has been waiting."""
        return 0.0 if self.since_s is None else now - self.since_s


class FallbackPolicy:
    """Implementation of `ports.Fallback` for a bridge whose settings may change at any time."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._proxy = ReverseProxy()
        self._failovers: dict[str, Failover] = {}
        self._breaker = Breaker()
        self.in_use = uses_http(bridge.ctx.settings)

    def reload(self) -> None:
        """Apply the new settings of the bridge."""
        self.in_use = uses_http(self._bridge.ctx.settings)

    async def close(self) -> None:
        """Close the connections to the vendor's API."""
        await self._proxy.close()

    # --- choice of transport ------------------------------------------------------------------------------------------

    def scope(self) -> FallbackScope:
        """Return the share of the calls that may go by HTTP now; implements `ports.Fallback.scope`."""
        return scope_of(self._bridge.ctx.settings, self._bridge.ctx.clock)

    def handles(self, caller: Caller, call: AgentCall) -> bool:
        """Return True if this call goes by HTTP."""
        if isinstance(call, HealthCall):
            return False
        settings = self._bridge.ctx.settings
        if not self._in_rollout(caller, call):
            return True
        return (
            settings.mode == "auto" and self._failed_over(caller, call) and self._breaker.allows(self._bridge.ctx.now)
        )

    def _in_rollout(self, caller: Caller, call: AgentCall) -> bool:
        rollout = self._bridge.ctx.settings.rollout
        if not rollout.partial:
            return True
        name = self._bridge.http_fallback.name_of(caller, call)
        return in_rollout(name, rollout.percent, rollout.include, rollout.exclude)

    def active(self) -> bool:
        """Return True if calls go by HTTP because of the mode or of a failed link, but not because of the rollout."""
        return self.scope() is FallbackScope.ALL or any(
            failover.transport is Transport.HTTP and self._is_used(name) for name, failover in self._failovers.items()
        )

    def _is_used(self, name: str) -> bool:
        """Return True if agents use the link of this name; no calls depend on an idle or removed link."""
        link = self._bridge.links.find(name)
        return link is not None and link.state is not LinkState.IDLE

    def _failed_over(self, caller: Caller, call: AgentCall) -> bool:
        ctx = self._bridge.ctx
        link = self._bridge.http_fallback.link_for(caller, call)
        if link is None:
            return False
        failover = self._failovers.get(link.name)
        if failover is None:
            links = self._bridge.links
            self._failovers = {name: each for name, each in self._failovers.items() if links.find(name) is not None}
            failover = self._failovers[link.name] = Failover()
        before = failover.transport
        fallback = ctx.settings.fallback
        way = failover.update(
            ctx.now,
            up=link.online,
            since=link.changed_at,
            after_s=fallback.after_s,
            hold_down_s=fallback.hold_down_s,
        )
        if way is not before:
            log.warning("failover", way=way.value, was=before.value)
        return way is Transport.HTTP

    # --- serving ------------------------------------------------------------------------------------------------------

    async def serve(self, request: ProxyRequest) -> ProxyResponse | CallResult | None:
        """Serve a call by HTTP, or return None if the bridge must serve it; implements `ports.Fallback.serve`."""
        call = request.call
        if isinstance(call, HealthCall):
            return None  # a health check asks for the health of the shim itself
        if isinstance(call, ResultCall) and not await self._bridge.http_fallback.result_belongs_to_http(
            request.caller, call
        ):
            return None  # the command of this result came by the WebSocket
        wait = _Wait(self._bridge.ctx.now)
        try:
            reply = await self._send(self._timed(request, wait))
        except asyncio.CancelledError:
            waited_s = wait.so_far_s(self._bridge.ctx.now)
            if waited_s >= PATIENCE_S:  # the agent gave up: nobody served it
                self._breaker.failed(self._bridge.ctx.now)
                self._record(request, reason=f"the agent hung up after {waited_s:.0f} s without an answer")
            raise
        except Unreachable as error:
            self._breaker.failed(self._bridge.ctx.now)
            self._record(request, reason=str(error))
            if isinstance(call, PollCall) and self._bridge.http_fallback.waiting(request.caller, call):
                return await self._bridge.http_fallback.merge(request.caller, call, [], request.arrived_s)
            return self._on_unreachable(request, error)
        try:
            if isinstance(call, RegisterCall) and reply.status in TELLING and isinstance(reply.body, bytes):
                told = self._read(reply) or {}
                await self._bridge.http_fallback.registered(request.caller, call, told, conflict=reply.status == 409)
        finally:
            # Also if the agent hangs up while its registration goes to disk. After `registered`, because before it the
            # status does not know whose call this is.
            if isinstance(reply.body, bytes):
                self._judge(request, reply.status)
            else:
                reply = replace(reply, body=self._judged_at_its_end(request, reply.status, reply.body))
            self._bridge.http_fallback.used(request.caller, call)
        if isinstance(call, PollCall):
            return await self._merged(request, call, reply)
        if isinstance(call, ResultCall) and reply.status in (200, 204):
            self._bridge.http_fallback.result_taken(request.caller, call)
        return reply

    def _read(self, reply: ProxyResponse) -> dict[str, Any] | None:
        return object_of(reply.body, self._bridge.ctx.metrics.invalid_characters.labels("fallback").inc)

    async def _send(self, request: ProxyRequest) -> ProxyResponse:
        ctx = self._bridge.ctx
        fallback = ctx.settings.fallback
        try:
            bearer = ctx.read_token() if fallback.use_upstream_token else None
        except ConfigError as error:
            log.error("token_unreadable", dedupe_key="fallback", error=str(error))
            raise Unreachable(str(error)) from None
        whole = isinstance(request.call, (PollCall, RegisterCall))
        base, dialling = fallback_url(ctx.settings), fallback.dialling(ctx.settings.upstream)
        return await self._proxy.send(base, dialling, request, bearer, whole=whole)

    def _timed(self, request: ProxyRequest, wait: _Wait) -> ProxyRequest:
        """Return the request with a body that keeps the agent's own time for its pieces out of `wait`."""
        if isinstance(request.body, bytes):
            return request
        return replace(request, body=self._pieces(request.body, wait))

    async def _pieces(self, pieces: AsyncIterator[bytes], wait: _Wait) -> AsyncGenerator[bytes, None]:
        """Yield the pieces of an agent's body. Before each the API waits for the agent, not the agent for the API."""
        wait.since_s = None
        async for piece in pieces:
            wait.since_s = self._bridge.ctx.now
            yield piece
            wait.since_s = None
        wait.since_s = self._bridge.ctx.now

    async def _judged_at_its_end(
        self, request: ProxyRequest, status: int, pieces: AsyncGenerator[bytes, None]
    ) -> AsyncGenerator[bytes, None]:
        """Yield the pieces of a streamed reply, and record the call when it ends: a reply may stop halfway."""
        wait = _Wait(self._bridge.ctx.now)
        reason = ""
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    wait.since_s = None
                    yield piece
                    wait.since_s = self._bridge.ctx.now
        except (aiohttp.ClientError, OSError, TimeoutError):
            reason = "its reply stopped before the end"
            raise
        except (asyncio.CancelledError, GeneratorExit):
            waited_s = wait.so_far_s(self._bridge.ctx.now)
            if waited_s >= PATIENCE_S:
                reason = f"the agent hung up after {waited_s:.0f} s without the rest of the reply"
            raise
        finally:
            if reason:
                self._breaker.failed(self._bridge.ctx.now)
                self._record(request, reason=reason)
            else:
                self._judge(request, status)

    def _judge(self, request: ProxyRequest, status: int) -> None:
        self._record(request, status)
        if status in BROKEN or status == 410:
            self._breaker.failed(self._bridge.ctx.now)
        else:
            self._breaker.succeeded()

    def _on_unreachable(self, request: ProxyRequest, error: Unreachable) -> ProxyResponse | None:
        """Return the reply to a call while the API is unreachable, or None if the bridge must serve the call.

        The bridge serves it in mode `auto`, except for an unparsed call or one whose body was consumed. Mode `http` and
        agents outside the rollout have no other transport.
        """
        if self._bridge.ctx.settings.mode == "auto" and isinstance(request.body, bytes) and request.call is not None:
            return None
        return unreachable_reply(error)

    async def _merged(self, request: ProxyRequest, call: PollCall, reply: ProxyResponse) -> ProxyResponse | CallResult:
        """Merge the stored commands into the reply to a poll, before the API's own commands.

        No other reply is rewritten. A command that came both ways is delivered once per id.
        """
        http_fallback = self._bridge.http_fallback
        body = self._read(reply)
        if body is None and reply.status == 200:
            return reply  # the agent may be able to read commands in it that the shim cannot: stored ones wait
        body = body or {}
        listed = body.get("commands")
        handed_out = listed if reply.status == 200 and isinstance(listed, list) else []
        if not handed_out and not http_fallback.waiting(request.caller, call):
            return reply
        answer = await http_fallback.merge(request.caller, call, handed_out, request.arrived_s)
        if answer is None:
            return reply
        if reply.status != 200 or not isinstance(answer.outcome, Commands):
            return answer
        merged = msgspec.json.encode({**body, "commands": answer.outcome.commands})
        headers = tuple(
            (name, value) for name, value in reply.headers if name.lower() not in ("content-length", "etag")
        )
        return ProxyResponse(reply.status, headers, merged, answer.receipt)

    def _record(self, request: ProxyRequest, status: int = 0, reason: str = "") -> None:
        """Record the result of a call for the metrics and the status."""
        call, ctx = request.call, self._bridge.ctx
        if call is None:
            ended, agent = FallbackCall(ctx.clock.wall_s(), "", status, reason), None
        else:
            dialect, operation = route_of(call)
            name, why = self._bridge.http_fallback.name_of(request.caller, call), self._why(request.caller, call)
            ended = FallbackCall(ctx.clock.wall_s(), operation, status, reason, dialect, name, why)
            agent = self._bridge.http_fallback.agent_of(request.caller, call)
        ctx.fallback.add(ended, agent)
        ctx.metrics.fallback.labels(ended.outcome).inc()

    def _why(self, caller: Caller, call: AgentCall) -> Why:
        if self.scope() is FallbackScope.ALL:
            return Why.MODE
        return Why.LINK_DOWN if self._in_rollout(caller, call) else Why.ROLLOUT
