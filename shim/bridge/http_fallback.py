"""The bridge's part in calls that go by the vendor's HTTP API (docs/reference/protocol.md#4-modes)."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from shim.bridge.command_queues import CommandQueues
from shim.bridge.context import BridgeContext, resolve
from shim.bridge.delivery import CommandDelivery
from shim.bridge.link_pool import LinkPool
from shim.bridge.links import UpstreamLink
from shim.bridge.session_registry import SessionRegistry
from shim.core.agent_calls import (
    AgentCall,
    Commands,
    HealthCall,
    HeartbeatCall,
    PollCall,
    RegisterCall,
    ResultCall,
    TunnelInfoCall,
    TunnelPollCall,
)
from shim.core.call_records import route_of
from shim.core.records import VIA_HTTP, CommandState, FindCommand, SessionKey
from shim.core.sessions import Session
from shim.errors import StoreError
from shim.log import get
from shim.ports import Caller, CallResult
from shim.protocol.command_message import MalformedCommand, parse_command
from shim.protocol.controller_replies import register_reply
from shim.protocol.upstream_message import Message

log = get(__name__)


class HttpFallbackBridge:
    """Link between the HTTP fallback and the bridge's queues and sessions.

    A command is delivered once per id, by the WebSocket or by HTTP.
    """

    def __init__(
        self,
        ctx: BridgeContext,
        links: LinkPool,
        session_registry: SessionRegistry,
        queues: CommandQueues,
        delivery: CommandDelivery,
    ) -> None:
        self._ctx = ctx
        self._queues = queues
        self._links = links
        self._session_registry = session_registry
        self._delivery = delivery

    def name_of(self, caller: Caller, call: AgentCall) -> str:
        """Return the name by which the rollout places an agent: its cluster's name if known, else its id."""
        if isinstance(call, RegisterCall):
            return call.name
        if isinstance(call, HealthCall):
            return ""
        owner = self._links.owner_of(caller.token) or ""
        session = self._ctx.sessions.find_target(owner, call.target)
        name = session.name if session is not None else ""
        if not name and isinstance(call, HeartbeatCall):
            name = call.known.get("name") or ""
        return str(name) or (session.key.ident if session is not None else call.target.ident)

    def link_for(self, caller: Caller, call: AgentCall) -> UpstreamLink | None:
        """Return the link that would carry the call and keep it dialling, or return None without an owner."""
        owner = self._links.owner_of(caller.token)
        if owner is None:
            return None
        if isinstance(call, (RegisterCall, HealthCall)):
            ident = call.name if isinstance(call, RegisterCall) else ""
            name = self._links.name_for(owner, ident)
        else:
            key = self._ctx.sessions.key_of(owner, call.target)
            session = self._ctx.sessions.get(key)
            name = self._links.link_name(session) if session is not None else self._links.name_for(owner, str(key))
        link = self._links.get(owner, name, caller.token)
        link.ensure_connected(self._ctx.now)
        return link

    def used(self, caller: Caller, call: AgentCall | None) -> None:
        """Record that the vendor's HTTP API has served an agent's call on a legacy route."""
        if call is None or isinstance(call, (RegisterCall, HealthCall)):
            return
        owner = self._links.owner_of(caller.token)
        if owner is not None:
            key = self._ctx.sessions.key_of(owner, call.target)
            self._session_registry.usage.note(key, *route_of(call), self._ctx.clock.wall_s())
            self._session_registry.seen(key)

    def agent_of(self, caller: Caller, call: AgentCall) -> SessionKey | None:
        """Return the session key under which a call by HTTP is shown, or None if it does not identify its agent.

        A tunnel call carries an agent id, which identifies an agent only if one is known by that id. The same holds for
        the registration of an agent that is identified by its cluster id.
        """
        owner = self._links.owner_of(caller.token)
        if owner is None or isinstance(call, HealthCall):
            return None
        sessions = self._ctx.sessions
        if isinstance(call, RegisterCall):
            known = sessions.alias(owner, call.agent_id)
            if known is not None:
                return known.key
            return SessionKey(owner, "agent", call.agent_id) if call.known_by_agent else None
        key = sessions.key_of(owner, call.target)
        if isinstance(call, (TunnelPollCall, TunnelInfoCall)):
            known_already = sessions.get(key) is not None or key in self._ctx.fallback.by_agent
            return key if known_already else None
        return key

    # --- registrations ------------------------------------------------------------------------------------------------

    async def registered(
        self, caller: Caller, call: RegisterCall, reply: dict[str, Any], *, conflict: bool = False
    ) -> None:
        """Store the name and ids of an agent that the vendor's HTTP API registered, and wait until they are stored.

        They are used when the agent is served by the WebSocket later. With `conflict` (409) they are stored only if the
        reply carries the id of the existing cluster.
        """
        owner = self._links.owner_of(caller.token)
        cluster = reply.get("cluster")
        ids = {"cluster_id": cluster.get("id")} if isinstance(cluster, dict) else {}
        known = register_reply({**ids, **{k: v for k, v in reply.items() if v is not None}})
        if owner is not None and (known or not conflict):
            await self._session_registry.record_http_registration(owner, call, known)

    # --- polls --------------------------------------------------------------------------------------------------------

    def waiting(self, caller: Caller, call: PollCall) -> bool:
        """Return True if stored commands wait for this agent."""
        owner = self._links.owner_of(caller.token)
        if owner is None:
            return False
        queue = self._queues.get(self._ctx.sessions.key_of(owner, call.target))
        return queue is not None and len(queue) > 0

    async def merge(self, caller: Caller, call: PollCall, commands: list[Any], arrived_s: float) -> CallResult | None:
        """Queue the commands that the vendor's API returned and answer the poll from the queue, oldest first.

        Returns None if the store fails: then the API's own answer must be passed to the agent unchanged.
        """
        owner = self._links.owner_of(caller.token) or ""
        session = self._session_registry.session_for_proxied_call(owner, call.target, call.dialect)
        if not await self._take_in(session, commands):
            return None
        poll = self._delivery.poll(session.key, caller.connection, arrived_s, hold=False)
        try:
            batch = await poll.offered
        except asyncio.CancelledError:
            self._delivery.cancel_poll(session.key, poll)
            raise
        poll.batch = None
        offered = batch.offered if batch is not None else ()
        return CallResult(Commands(offered, self._ctx.settings.poll.frequency_s), batch)

    async def _take_in(self, session: Session, commands: list[Any]) -> bool:
        loop, at = asyncio.get_running_loop(), self._ctx.moment()
        settled: list[asyncio.Future[bool]] = []
        for entry in commands:
            if not isinstance(entry, dict):
                continue
            try:
                command = parse_command(
                    Message("command", entry), at.unix, self._ctx.settings.commands.ttl_s, self._ctx.new_id
                )
            except MalformedCommand as error:
                # One malformed command makes most agents discard the whole reply, so it must not be passed on.
                self._queues.count("rejected_malformed")
                log.warning("command_rejected", command=error.command_id, session=session.key.ident, code="malformed")
                continue
            stored: asyncio.Future[bool] = loop.create_future()
            settled.append(stored)
            self._delivery.arrive(session, command, "", at, partial(resolve, stored), VIA_HTTP)
        return all([await stored for stored in settled])

    # --- results ------------------------------------------------------------------------------------------------------

    async def result_belongs_to_http(self, caller: Caller, call: ResultCall) -> bool:
        """Return True if a result must go to the vendor's HTTP API: its command did not come by the WebSocket."""
        key = self._key(caller, call)
        try:
            found = await self._ctx.execute(FindCommand(call.command_id))
        except StoreError:
            return False  # the bridge will answer 503, and the agent sends the result again
        return all(each.record.via == VIA_HTTP for each in found if each.record.session == key)

    def result_taken(self, caller: Caller, call: ResultCall) -> None:
        """Close a command whose result the vendor's HTTP API has accepted."""
        key, wall = self._key(caller, call), self._ctx.clock.wall_s()
        ids = (call.command_id,)
        mark = self._ctx.mark(key, ids, CommandState.CLOSED, wall, "closed", "by HTTP")
        if self._queues.is_live(key, call.command_id):
            self._queues.store_mark(mark)
        else:  # most were never stored: what a full disk refuses of them must not pile up in memory
            self._ctx.store.submit(mark)
        self._delivery.answered(key, call.command_id)

    def _key(self, caller: Caller, call: ResultCall) -> SessionKey:
        owner = self._links.owner_of(caller.token) or ""
        return self._ctx.sessions.key_of(owner, call.target)
