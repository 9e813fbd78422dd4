"""Polls for commands: answered at once, or held until something arrives (protocol.md §1.3)."""

from __future__ import annotations

import asyncio

from shim.bridge.context import BridgeContext
from shim.bridge.delivery import CommandDelivery
from shim.bridge.holding import PollHolds
from shim.bridge.roster import SessionRegistry
from shim.bridge.routes import LinkLookup
from shim.core.calls import Commands, Failed, PollCall
from shim.core.sessions import Session
from shim.errors import AgentError
from shim.ports import CallResult, Caller


class LongPolls:
    """Carries out polls."""

    def __init__(self, ctx: BridgeContext, routes: LinkLookup, roster: SessionRegistry, delivery: CommandDelivery, holding: PollHolds) -> None:
        self._ctx = ctx
        self._routes = routes
        self._roster = roster
        self._delivery = delivery
        self._holding = holding

    def _polled(self, owner: str, client: Caller, call: PollCall) -> Session:
        session = self._roster.session_for_call(owner, call.target, call.dialect)
        session.poll_at = self._ctx.now
        self._roster.usage.note(session.key, call.dialect, "poll", session.last_seen_unix)
        self._routes.link_for(session, client)
        return session

    def empty(self, owner: str, client: Caller, call: PollCall) -> CallResult | None:
        """Answer a poll for which there is nothing, and which may not be held either."""
        known = self._ctx.sessions.get(self._ctx.sessions.key_of(owner, call.target))
        if known is None or self._holding.limit_s(known.hold) > 0 or self._delivery.has_pending(known.key):
            return None
        session = self._polled(owner, client, call)
        self._holding.poll_arrived(session, session.hold)
        self._holding.presence.called(session)
        self._holding.hold_answered(session.hold)
        return CallResult(Commands((), self._ctx.settings.poll.frequency_s))

    async def wait(self, owner: str, client: Caller, call: PollCall, arrived_s: float) -> CallResult:
        """Answer a poll when there is something for it, or its hold is over.

        Thousands of these may wait at a time: there is no coroutine in this one, and no timer for each.
        """
        try:
            session = self._polled(owner, client, call)
        except AgentError as error:
            return failed(error)
        key, hold = session.key, session.hold
        limit_s = self._holding.poll_arrived(session, hold)
        poll = self._delivery.poll(key, client.connection, arrived_s, hold=limit_s > 0)
        held_at: float | None = None
        if poll.offering is None and not poll.offered.done():
            held_at = self._holding.hold_started(session, limit_s, self._delivery.expire_poll, poll)
        else:
            self._holding.presence.called(session)
        try:
            await poll.offered
        except asyncio.CancelledError:
            if held_at is None:
                hold.connection_lost()  # it waited for the disk
            else:
                self._holding.agent_disconnected(session, hold, held_at)
            self._delivery.cancel_poll(key, poll)
            raise
        if held_at is not None:
            self._holding.reply_sent(session, held_at)
        self._holding.hold_answered(hold)
        offering = poll.offered.result()
        commands = offering.commands if offering is not None else ()
        poll.offering = None
        return CallResult(Commands(commands, self._ctx.settings.poll.frequency_s), offering)


def failed(error: AgentError) -> CallResult:
    """An error as a call's answer."""
    return CallResult(Failed(error.status, str(error), error.retry_after_s))
