"""Agents' calls, one handler per kind of call (docs/reference/protocol.md#1-legacy-side).

Calls that need neither the disk nor the controller are answered synchronously, without a task.
"""

from __future__ import annotations

from collections.abc import Coroutine
from functools import partial
from typing import Any

from msgspec.structs import replace

from shim.bridge.context import DEFAULT_OWNER, BridgeContext, Moment
from shim.bridge.heartbeats import HeartbeatForwarder
from shim.bridge.link_pool import LinkPool
from shim.bridge.long_polls import LongPolls, failed
from shim.bridge.outbox import Outbox
from shim.bridge.registration import REFUSED, Registrations
from shim.bridge.session_registry import SessionRegistry
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
from shim.core.link_state import LinkState, LinkStateMachine
from shim.core.sessions import Session
from shim.errors import AgentError, StoreError
from shim.ports import Caller, CallResult

RETRY_AFTER_S = 5
_ACCEPTED = Accepted()
_SessionCall = StatusCall | ResultCall


class AgentCallHandler:
    """Handler of agents' calls."""

    def __init__(
        self,
        ctx: BridgeContext,
        links: LinkPool,
        session_registry: SessionRegistry,
        registrations: Registrations,
        outbox: Outbox,
        long_polls: LongPolls,
        heartbeats: HeartbeatForwarder,
    ) -> None:
        self._ctx = ctx
        self._links = links
        self._session_registry = session_registry
        self._usage = session_registry.usage
        self._heartbeats = heartbeats
        self._registrations = registrations
        self._outbox = outbox
        self._polls = long_polls

    def call(
        self, caller: Caller, call: AgentCall, arrived_s: float, now: float
    ) -> CallResult | Coroutine[Any, Any, CallResult]:
        """Carry out one call; implements `ports.AgentService.call`."""
        if isinstance(call, HealthCall):
            return CallResult(Healthy())
        owner = self._links.owner_of(caller.token)
        if owner is None:
            return CallResult(Failed(401, "a token is required"))
        try:
            if owner != DEFAULT_OWNER:
                self._vet(owner, caller, call, now)
            match call:
                case HeartbeatCall():
                    return CallResult(self._heartbeat(owner, caller, call, now))
                case PollCall():
                    return self._polls.poll(owner, caller, call, arrived_s, now)
                case StatusCall():
                    return CallResult(self._status(owner, caller, call, now))
                case ResultCall():
                    return self._result(owner, caller, call, now)
                case RegisterCall():
                    return self._register(owner, caller, call, arrived_s)
                case TunnelPollCall():
                    return self._tunnel_poll(owner, caller, call, now)
                case TunnelInfoCall():
                    return CallResult(self._tunnel_info(owner, call, now))
        except AgentError as error:
            return failed(error)

    def _vet(self, owner: str, caller: Caller, call: AgentCall, now: float) -> None:
        """Connect the link of an agent with a token of its own; raise if the controller refuses the token.

        Called before anything is stored for the agent. Does nothing for a session whose token the controller has
        accepted.

        Raises `AgentError`: 401 if the token is refused, 503 for a result whose token is not accepted yet.
        """
        if not isinstance(call, (HeartbeatCall, PollCall, StatusCall, ResultCall)):
            return
        key = self._ctx.sessions.key_of(owner, call.target)
        if self._ctx.sessions.get(key) is not None and not self._session_registry.persistence.is_deferred(key):
            return
        link = self._links.get(owner, self._links.name_for(owner, str(key)), caller.token)
        link.ensure_connected(now)
        if link.machine.refused and link.machine.accepted_at is None:
            raise AgentError(401, "the controller refuses the token")
        unjudged = link.machine.accepted_at is None and not link.machine.connected
        if unjudged and isinstance(call, ResultCall):
            raise AgentError(503, "the controller has not accepted the token yet", retry_after_s=RETRY_AFTER_S)

    def _called(self, owner: str, caller: Caller, call: _SessionCall, operation: str, now: float) -> Session:
        """Return the session of a call, with its link connected. Raises `AgentError`."""
        session = self._session_registry.session_for_call(owner, call.target, call.dialect, operation, now)
        self._links.link_for(session, caller, now)
        return session

    def _heartbeat(self, owner: str, caller: Caller, call: HeartbeatCall, now: float) -> Outcome:
        session = self._session_registry.heartbeat(owner, call, now)
        link = self._links.link_for(session, caller, now)
        self._heartbeats.heartbeat(session, now)
        machine = link.machine
        if machine.refused:
            return REFUSED
        if self._ctx.settings.heartbeat.when_link_down == "fail" and _is_down(machine):
            return Failed(503, link.unreachable, retry_after_s=RETRY_AFTER_S)
        return _ACCEPTED

    def _status(self, owner: str, caller: Caller, call: StatusCall, now: float) -> Outcome:
        session = self._called(owner, caller, call, "status", now)
        self._heartbeats.called(session, now)
        self._heartbeats.status(session, call.body)
        return _ACCEPTED

    # --- registrations ------------------------------------------------------------------------------------------------

    async def _register(self, owner: str, caller: Caller, call: RegisterCall, arrived_s: float) -> CallResult:
        try:
            return CallResult(await self._registered(owner, caller, call, arrived_s))
        except AgentError as error:
            return failed(error)

    async def _registered(self, owner: str, caller: Caller, call: RegisterCall, arrived_s: float) -> Outcome:
        stored = self._session_registry.stored_for(owner, call)
        identity = call.agent_id if call.known_by_agent else call.name
        name = self._links.link_name(stored) if stored is not None else self._links.name_for(owner, identity)
        link = self._links.get(owner, name, caller.token)
        if stored is None:
            self._session_registry.admit(owner)
        link.ensure_connected(self._ctx.now)
        cluster_id = self._session_registry.upstream_id(owner, call, stored)
        if cluster_id:
            call = replace(call, payload={**call.payload, "cluster_id": cluster_id})

        find_stored = partial(self._session_registry.stored_for, owner, call)
        outcome = await self._registrations.register(link, call, find_stored, arrived_s)
        if isinstance(outcome, Registered):
            left_s = arrived_s + self._ctx.settings.register.deadline_s - self._ctx.now
            await self._session_registry.registration_answered(owner, call, outcome, left_s)
        return outcome

    # --- results ------------------------------------------------------------------------------------------------------

    def _result(self, owner: str, caller: Caller, call: ResultCall, now: float) -> Coroutine[Any, Any, CallResult]:
        session = self._called(owner, caller, call, "result", now)
        self._heartbeats.called(session, now)
        online = self._links.connection_of(session) is not None
        return self._posted(session, call, Moment(now, session.last_seen_unix), online=online)

    async def _posted(self, session: Session, call: ResultCall, at: Moment, *, online: bool) -> CallResult:
        try:
            await self._outbox.post_result(session, call.command_id, call.body, at, online=online)
        except StoreError:
            return CallResult(Failed(503, "the result cannot be stored now", retry_after_s=RETRY_AFTER_S))
        return CallResult(_ACCEPTED)

    # --- tunnels ------------------------------------------------------------------------------------------------------

    def _tunnel_poll(
        self, owner: str, caller: Caller, call: TunnelPollCall, now: float
    ) -> CallResult | Coroutine[Any, Any, CallResult]:
        session = self._session_registry.find_session(owner, call.target, now)
        key = session.key if session is not None else self._ctx.sessions.key_of(owner, call.target)
        self._usage.note(key, *route_of(call), self._ctx.clock.wall_s())
        if session is None:
            return self._tunnel_state(None)
        self._links.link_for(session, caller, now)
        self._heartbeats.called(session, now)
        if not self._ctx.settings.poll.hold_tunnel:
            return self._tunnel_state(session)
        return self._tunnel_held(session)

    async def _tunnel_held(self, session: Session) -> CallResult:
        await self._polls.tunnel(session)
        return self._tunnel_state(session)

    def _tunnel_state(self, session: Session | None) -> CallResult:
        return CallResult(TunnelState(None if session is None else session.tunnel, self._ctx.settings.poll.frequency_s))

    def _tunnel_info(self, owner: str, call: TunnelInfoCall, now: float) -> Outcome:
        session = self._session_registry.find_session(owner, call.target, now)
        if session is None or not session.reply:
            return Failed(404, "not registered")
        self._usage.note(session.key, *route_of(call), session.last_seen_unix)
        return TunnelInfo(session.registered(cached=False))


def _is_down(machine: LinkStateMachine) -> bool:
    """Return True unless the link is open, or is a new agent's that is being dialled for the first time."""
    return not machine.connected and (machine.failures > 0 or machine.state is LinkState.STOPPED)
