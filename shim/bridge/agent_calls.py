"""Agents' calls, one handler per kind of call (docs/reference/protocol.md#1-legacy-side).

Calls that need neither the disk nor the controller are answered synchronously, without a task.
"""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from shim.bridge.context import BridgeContext
from shim.bridge.delivery import CommandDelivery
from shim.bridge.link_pool import LinkPool
from shim.bridge.links import UpstreamLink
from shim.bridge.long_polls import LongPolls, PollHolds, failed
from shim.bridge.registration import Registrations
from shim.bridge.session_registry import SessionRegistry, outcome_of
from shim.core.agent_calls import (
    Accepted,
    AgentCall,
    Failed,
    HealthCall,
    Healthy,
    HeartbeatCall,
    Outcome,
    PollCall,
    RegisterCall,
    Registered,
    ResultCall,
    StatusCall,
    TunnelInfo,
    TunnelInfoCall,
    TunnelPollCall,
    TunnelState,
)
from shim.core.call_records import route_of
from shim.core.link_state import LinkState
from shim.core.sessions import Session
from shim.errors import AgentError, StoreError
from shim.log import get
from shim.ports import Caller, CallResult

log = get(__name__)

RETRY_AFTER_S = 5


class AgentCallHandler:
    """Handler of agents' calls."""

    def __init__(
        self,
        ctx: BridgeContext,
        links: LinkPool,
        session_registry: SessionRegistry,
        registrations: Registrations,
        delivery: CommandDelivery,
        holding: PollHolds,
    ) -> None:
        self._ctx = ctx
        self._links = links
        self._session_registry = session_registry
        self._usage = session_registry.usage
        self._presence = holding.presence
        self._registrations = registrations
        self._delivery = delivery
        self._holding = holding
        self._polls = LongPolls(ctx, links, session_registry, delivery, holding)

    def call(self, client: Caller, call: AgentCall, arrived_s: float) -> Coroutine[Any, Any, CallResult]:
        """Carry out one call; implements `ports.AgentService.call`."""
        answer = self.try_call_sync(client, call, arrived_s)
        if answer is not None:
            return _ready(answer)
        owner = self._links.owner_of(client.token) or ""
        if isinstance(call, PollCall):
            return self._polls.wait(owner, client, call, arrived_s)
        return self._wait(owner, client, call, arrived_s)

    async def _wait(self, owner: str, client: Caller, call: AgentCall, arrived_s: float) -> CallResult:
        try:
            match call:
                case RegisterCall():
                    return CallResult(await self._register(owner, client, call, arrived_s))
                case ResultCall():
                    return CallResult(await self._result(owner, client, call))
                case TunnelPollCall():
                    return CallResult(await self._tunnel_poll(owner, client, call))
                case _:
                    raise TypeError(f"{type(call).__name__} is answered at once")
        except AgentError as error:
            return failed(error)

    def try_call_sync(self, client: Caller, call: AgentCall, arrived_s: float) -> CallResult | None:
        """Carry out a call that needs no waiting, or return None; implements `ports.AgentService.try_call_sync`.

        None means that the state is unchanged and the caller must use `call`.
        """
        if isinstance(call, HealthCall):
            return CallResult(Healthy())
        owner = self._links.owner_of(client.token)
        if owner is None:
            return CallResult(Failed(401, "a token is required"))
        try:
            if self._ctx.settings.upstream.own_tokens:
                self._vet(owner, client, call)
            match call:
                case HeartbeatCall():
                    return CallResult(self._heartbeat(owner, client, call))
                case PollCall():
                    return self._polls.empty(owner, client, call)
                case StatusCall():
                    return CallResult(self._status(owner, client, call))
                case TunnelPollCall() if not self._ctx.settings.poll.hold_tunnel:
                    return CallResult(self._tunnel_state(owner, client, call))
                case TunnelInfoCall():
                    return CallResult(self._tunnel_info(owner, call))
                case _:
                    return None
        except AgentError as error:
            return failed(error)

    def _vet(self, owner: str, client: Caller, call: AgentCall) -> None:
        """Connect the link of an agent with a token of its own; raise if the controller refuses the token.

        Called before anything is stored for the agent. Does nothing for a session whose token the controller has
        accepted.

        Raises `AgentError`: 401 if the token is refused, 503 for a result whose token is not accepted yet.
        """
        if not isinstance(call, (HeartbeatCall, PollCall, StatusCall, ResultCall)):
            return
        key = self._ctx.sessions.key_of(owner, call.target)
        if self._ctx.sessions.get(key) is not None and not self._session_registry.admission.persistence_deferred(key):
            return
        link = self._links.get(owner, self._links.name_for(owner, str(key)), client.token)
        link.ensure_connected(self._ctx.now)
        if link.machine.refused and link.machine.accepted_at is None:
            raise AgentError(401, "the controller refuses the token")
        unjudged = link.machine.accepted_at is None and not link.machine.connected
        if unjudged and isinstance(call, ResultCall):
            raise AgentError(503, "the controller has not accepted the token yet", retry_after_s=RETRY_AFTER_S)

    def _heartbeat(self, owner: str, client: Caller, call: HeartbeatCall) -> Outcome:
        session = self._session_registry.heartbeat(owner, call)
        self._usage.note(session.key, call.dialect, "heartbeat", session.last_seen_unix)
        link = self._links.link_for(session, client, self._ctx.now)
        self._presence.heartbeat(session)
        return self._verdict(link)

    def _verdict(self, link: UpstreamLink) -> Outcome:
        """Return the reply to a heartbeat, which depends on the state of the session's link."""
        if link.machine.refused:
            return Failed(401, "the controller refuses the token")
        # The link of a new agent is still being dialled for the first time: that is not a failure yet.
        down = not link.machine.connected and (link.machine.failures > 0 or link.state is LinkState.STOPPED)
        if down and self._ctx.settings.heartbeat.when_link_down == "fail":
            return Failed(503, "the controller cannot be reached", retry_after_s=RETRY_AFTER_S)
        return Accepted()

    def _status(self, owner: str, client: Caller, call: StatusCall) -> Outcome:
        session = self._session_registry.session_for_call(owner, call.target, call.dialect)
        self._usage.note(session.key, call.dialect, "status", session.last_seen_unix)
        self._links.link_for(session, client, self._ctx.now)
        self._presence.called(session)
        self._presence.status(session, call.body)
        return Accepted()

    async def _register(self, owner: str, client: Caller, call: RegisterCall, arrived_s: float) -> Outcome:
        stored = self._session_registry.stored_for(owner, call)
        identity = call.agent_id if call.known_by_agent else call.name
        name = self._links.link_name(stored) if stored is not None else self._links.name_for(owner, identity)
        link = self._links.get(owner, name, client.token)
        if stored is None:
            self._session_registry.admission.admit(owner)
        link.ensure_connected(self._ctx.now)
        cluster_id = self._session_registry.upstream_id(owner, call, stored)
        if cluster_id:
            call = replace(call, payload={**call.payload, "cluster_id": cluster_id})

        def cached() -> Outcome | None:
            known = self._session_registry.stored_for(owner, call)
            return outcome_of(known, cached=True) if known is not None else None

        outcome = await self._registrations.register(link, call, cached, arrived_s)
        if isinstance(outcome, Registered):
            self._session_registry.registration_answered(owner, call, outcome)
        return outcome

    async def _result(self, owner: str, client: Caller, call: ResultCall) -> Outcome:
        session = self._session_registry.session_for_call(owner, call.target, call.dialect)
        self._usage.note(session.key, call.dialect, "result", session.last_seen_unix)
        at = self._ctx.moment()
        self._links.link_for(session, client, at.now)
        self._presence.called(session)
        online = self._links.connection_of(session) is not None
        try:
            await self._delivery.post_result(session, call.command_id, call.body, at, online=online)
        except StoreError:
            return Failed(503, "the result cannot be stored now", retry_after_s=RETRY_AFTER_S)
        return Accepted()

    def _tunnel_polled(self, owner: str, client: Caller, call: TunnelPollCall) -> Session | None:
        session = self._session_registry.find_session(owner, call.target)
        key = session.key if session is not None else self._ctx.sessions.key_of(owner, call.target)
        self._usage.note(key, *route_of(call), self._ctx.clock.wall_s())
        if session is not None:
            self._links.link_for(session, client, self._ctx.now)
            self._presence.called(session)
        return session

    def _tunnel_state(self, owner: str, client: Caller, call: TunnelPollCall) -> Outcome:
        session = self._tunnel_polled(owner, client, call)
        return TunnelState(None if session is None else session.tunnel, self._ctx.settings.poll.frequency_s)

    async def _tunnel_poll(self, owner: str, client: Caller, call: TunnelPollCall) -> Outcome:
        session = self._tunnel_polled(owner, client, call)
        if session is not None:
            await self._holding.tunnel(session)
        return TunnelState(None if session is None else session.tunnel, self._ctx.settings.poll.frequency_s)

    def _tunnel_info(self, owner: str, call: TunnelInfoCall) -> Outcome:
        session = self._session_registry.find_session(owner, call.target)
        if session is None or not session.reply:
            return Failed(404, "not registered")
        self._usage.note(session.key, *route_of(call), session.last_seen_unix)
        return TunnelInfo(outcome_of(session, cached=False))


async def _ready(answer: CallResult) -> CallResult:
    return answer
